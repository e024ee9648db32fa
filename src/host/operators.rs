//! Operators without root: a group for each role, and one file for sudo that lets it run `zd as ROLE …`.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{exec, fs, paths};
use crate::error::{At, Code, Result};
use crate::role::Role;

const SUDOERS: &str = "/etc/sudoers.d";
const GROUPS: &str = "/etc/group";

pub fn group(role: Role) -> String {
    format!("zd-{}", role.name())
}

/// sudo leaves out files with a dot in their name.
fn rule_path(role: Role) -> PathBuf {
    Path::new(SUDOERS).join(group(role))
}

/// Without a password: an account whose only way in is an SSH key has none, and the group was given on purpose.
fn rule(role: Role) -> String {
    let (tool, name) = (paths::TOOL, role.name());
    format!(
        "# Written by zd operator, and taken away by zd uninstall. What a role may ask for is decided by zd.\n\
         Defaults!{tool} env_reset, !env_keep, umask=0022\n\
         %{} ALL=(root) NOSETENV: NOPASSWD: {tool} as {name} *\n",
        group(role)
    )
}

/// Members of a role's group; None without the group.
pub fn members(role: Role) -> Result<Option<Vec<String>>> {
    let text = std::fs::read_to_string(GROUPS).at(GROUPS)?;
    Ok(members_in(&text, &group(role)))
}

fn members_in(groups: &str, group: &str) -> Option<Vec<String>> {
    let line = groups.lines().find(|line| line.split(':').next() == Some(group))?;
    let members = line.split(':').nth(3)?.split(',').filter(|name| !name.is_empty());
    Some(members.map(str::to_owned).collect())
}

/// The file that sudo reads is the one that zd writes.
pub fn rule_stands(role: Role) -> Result<bool> {
    Ok(fs::read_if_any(&rule_path(role))?.is_some_and(|text| text == rule(role).into_bytes())
        && fs::looks_like(&rule_path(role), 0o440, (0, 0)))
}

/// Somebody else than root, known to the host.
pub async fn check(user: &str) -> Result<()> {
    let fit = |c: char| c.is_alphanumeric() || "_.-@".contains(c);
    if user.starts_with('-') || user.is_empty() || !user.chars().all(fit) {
        return Err(Code::Usage
            .err(format!("{user:?} is no user's name"))
            .cure("name a user of this host: getent passwd"));
    }
    let said = exec::try_run(&["id", "-u", "--", user]).await?;
    match said.stdout.trim() {
        "0" => Err(Code::Usage.err(format!("{user} has root")).cure("root needs no role")),
        uid if said.ok && uid.parse::<u32>().is_ok() => Ok(()),
        _ => Err(Code::Usage
            .err(format!("this host knows no user {user}"))
            .cure(format!("make the account first (adduser {user}), or correct the name"))),
    }
}

/// sudo goes by the groups that a session began with; who has lost the role since has lost it. Root may take any.
pub fn check_caller(role: Role) -> Result<()> {
    let Some(user) = std::env::var("SUDO_USER").ok().filter(|user| user != "root") else { return Ok(()) };
    if members(role)?.unwrap_or_default().contains(&user) {
        return Ok(());
    }
    Err(Code::NotAllowed
        .err(format!("{user} has not the role {} on this host", role.name()))
        .cure(format!("who has root gives it: zd operator add {user} --role {}", role.name())))
}

pub fn check_sudo() -> Result<()> {
    let missing = ["sudo", "visudo", "gpasswd"].into_iter().find(|program| which::which(program).is_err());
    let Some(program) = missing.or((!Path::new(SUDOERS).is_dir()).then_some(SUDOERS)) else { return Ok(()) };
    Err(Code::Preflight.err(format!("{program} is not on this host, and roles are carried by sudo; nothing was changed")).cure(
        "install the package sudo from the site's archive, or bring it in the next bundle: extra = [\"sudo\"] in [packages] of \
         its manifest, then zd upgrade",
    ))
}

/// Gives a user this role and no other; what sudo makes of it is asked of sudo.
pub async fn add(user: &str, role: Role) -> Result<()> {
    write_rule(role).await?;
    let group = group(role);
    if members(role)?.is_none() {
        exec::run(&["groupadd", "--system", &group]).await?;
    }
    for other in Role::ALL.into_iter().filter(|other| *other != role) {
        take(user, other).await?;
    }
    exec::run(&["gpasswd", "-a", user, &group]).await?;
    let asked = ["sudo", "-n", "-l", "-U", user, paths::TOOL, "as", role.name(), "status"];
    if exec::try_run(&asked).await?.ok {
        return Ok(());
    }
    take(user, role).await?;
    Err(Code::Preflight.err(format!("sudo does not let {user} run zd as {}", role.name())).cure(format!(
        "@includedir {SUDOERS} has to stand in /etc/sudoers, and no later rule take it back: visudo"
    )))
}

/// As `visudo` does it: sudo never sees a file that it cannot read, for then it would let in nobody at all.
async fn write_rule(role: Role) -> Result<()> {
    let path = rule_path(role);
    let mut temp = fs::temp_beside(&path)?;
    temp.write_all(rule(role).as_bytes()).at(&path)?;
    let checked = temp.path().to_string_lossy().into_owned();
    exec::run(&["visudo", "-c", "-q", "-f", &checked]).await?;
    fs::keep(temp, &path, 0o440, (0, 0))
}

/// Takes a role from a user who may have it.
pub async fn take(user: &str, role: Role) -> Result<bool> {
    let has = members(role)?.unwrap_or_default().iter().any(|member| member == user);
    if has {
        exec::run(&["gpasswd", "-d", user, &group(role)]).await?;
    }
    Ok(has)
}

/// All files and groups. The files first: a group without its rule is nothing.
pub async fn remove_all() -> Result<()> {
    for role in Role::ALL {
        fs::remove_file(&rule_path(role))?;
        if members(role)?.is_some() {
            exec::run(&["groupdel", &group(role)]).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_a_group_and_of_no_other() {
        let text = "zd-operators:x:990:eve\nzd-operator:x:991:kim,lee\nzd-viewer:x:992:\n";
        assert_eq!(members_in(text, "zd-operator"), Some(vec!["kim".into(), "lee".into()]));
        assert_eq!(members_in(text, "zd-viewer"), Some(Vec::new()));
        assert_eq!(members_in(text, "zd-admin"), None);
    }
}
