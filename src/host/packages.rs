//! OS packages on the host, from the carried ones alone, through apt with a private source list.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{exec, fs, paths};
use crate::bundle::sources::apt::simulated;
use crate::error::{At, Code, Result};
use crate::plan::Moved;

/// apt's lists and cache while zd installs: gone with the next boot.
const SCRATCH: &str = "/run/zd/apt";

/// What installing would do, from apt's own simulation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Not on the host: what an undo purges.
    pub new: Vec<String>,
    /// On the host in another version.
    pub upgraded: Vec<String>,
}

/// Names of `wanted` that are not installed.
pub async fn missing(wanted: &[String]) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    for name in wanted {
        if !is_installed(name).await? {
            missing.push(name.clone());
        }
    }
    Ok(missing)
}

pub async fn is_installed(name: &str) -> Result<bool> {
    let out = exec::try_run(&["dpkg-query", "-W", "-f", "${db:Status-Status}", name]).await?;
    Ok(out.ok && out.stdout == "installed")
}

/// Installed version of the first of these, which the others belong to.
pub async fn version(names: &[String]) -> Result<Option<String>> {
    match names.first() {
        Some(name) => version_of(name).await,
        None => Ok(None),
    }
}

pub async fn version_of(name: &str) -> Result<Option<String>> {
    let out = exec::try_run(&["dpkg-query", "-W", "-f", "${Version}", name]).await?;
    Ok((out.ok && !out.stdout.is_empty()).then_some(out.stdout))
}

fn apt(scratch: &Path, repository: &Path, more: &[&str]) -> Result<Vec<String>> {
    let lists = scratch.join("lists/partial");
    std::fs::create_dir_all(&lists).at(&lists)?;
    let source = scratch.join("zd.list");
    let scratch = scratch.display();
    // trusted: every byte was checked against the signed lock on its way here.
    let line = format!("deb [trusted=yes] file:{} ./\n", repository.display());
    fs::write(&source, line.as_bytes(), 0o644, None)?;
    let mut argv = vec!["apt-get".to_owned()];
    for option in [
        format!("Dir::Etc::sourcelist={}", source.display()),
        "Dir::Etc::sourceparts=/dev/null".into(),
        format!("Dir::State::lists={scratch}/lists"),
        format!("Dir::State::extended_states={scratch}/extended_states"),
        format!("Dir::Cache={scratch}"),
        "APT::Sandbox::User=root".into(),
        "APT::Install-Recommends=false".into(),
        "Acquire::Languages=none".into(),
        "DPkg::Lock::Timeout=120".into(),
        "Dpkg::Options::=--force-confold".into(),
    ] {
        argv.extend(["-o".to_owned(), option]);
    }
    argv.extend(more.iter().map(|s| (*s).to_owned()));
    Ok(argv)
}

/// Asks apt what installing would do; removing anything is refused. In a folder of its own: a dry run does this beside
/// an install that is under way.
pub async fn simulate(repository: &Path, wanted: &[String]) -> Result<Change> {
    std::fs::create_dir_all(paths::RUN).at(paths::RUN)?;
    let scratch = tempfile::Builder::new().prefix("apt-").tempdir_in(paths::RUN).at(paths::RUN)?;
    let scratch = scratch.path();
    exec::run(&apt(scratch, repository, &["update", "-qq"])?).await?;
    let mut args = vec!["-s", "-qq", "install"];
    args.extend(wanted.iter().map(String::as_str));
    let plan = exec::run(&apt(scratch, repository, &args)?).await.map_err(|e| {
        e.cure("the host's own packages stand in the way: `apt-get check`, `dpkg --audit`; then run it again")
    })?;
    let removed: Vec<&str> = plan.lines().filter_map(|l| l.strip_prefix("Remv ")).collect();
    if !removed.is_empty() {
        return Err(Code::Preflight
            .err(format!("the carried packages would remove {} from this host", removed.join(", ")))
            .cure("zd never forces that: remove what conflicts yourself, or use another host"));
    }
    let mut change = Change::default();
    for (name, _) in simulated(&plan) {
        let list = if is_installed(name).await? { &mut change.upgraded } else { &mut change.new };
        list.push(name.to_owned());
    }
    Ok(change)
}

pub async fn install(repository: &Path, wanted: &[String]) -> Result<()> {
    change(repository, &[], wanted).await
}

/// Brings packages to other versions, up or down. Nothing is restarted: when each process changes its program
/// is for the plan to say.
pub async fn upgrade(repository: &Path, packages: &[Moved]) -> Result<()> {
    let _quiet = NoRestarts::begin()?;
    let wanted: Vec<String> = packages.iter().map(|p| format!("{}={}", p.name, p.to)).collect();
    change(repository, &["--allow-downgrades"], &wanted).await
}

async fn change(repository: &Path, options: &[&str], wanted: &[String]) -> Result<()> {
    let scratch = Path::new(SCRATCH);
    if !scratch.is_dir() {
        fs::make_dir(scratch, 0o700, None)?;
    }
    // Half-configured packages of an interrupted run first.
    exec::run(&["dpkg", "--configure", "-a", "--force-confold"]).await?;
    exec::run(&apt(scratch, repository, &["update", "-qq"])?).await?;
    let mut args = vec!["install", "-y", "-qq", "--no-remove"];
    args.extend(options);
    args.extend(wanted.iter().map(String::as_str));
    exec::run(&apt(scratch, repository, &args)?).await.map(drop)
}

/// Debian's way of forbidding packages' scripts to restart anything (invoke-rc.d(8), policy-rc.d). A policy of
/// the site's own stays what it is.
struct NoRestarts(Option<PathBuf>);

const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_MARK: &str = "# zd: while it changes packages";

impl NoRestarts {
    fn begin() -> Result<Self> {
        let path = PathBuf::from(POLICY);
        let ours = |found: Vec<u8>| String::from_utf8_lossy(&found).contains(POLICY_MARK);
        if fs::read_if_any(&path)?.is_some_and(|found| !ours(found)) {
            return Ok(Self(None));
        }
        // Left behind by a killed zd, it forbids nothing.
        let pid = std::process::id();
        let text = format!("#!/bin/sh\n{POLICY_MARK}\n[ -d /proc/{pid} ] && exit 101\nexit 0\n");
        fs::write(&path, text.as_bytes(), 0o755, None)?;
        Ok(Self(Some(path)))
    }
}

impl Drop for NoRestarts {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// Purges what zd installed. What something else needs by now is left, and named.
pub async fn purge(names: &[String]) -> Result<Vec<String>> {
    exec::try_run(&["dpkg", "--configure", "-a", "--force-confold"]).await?;
    let mut here = Vec::new();
    for name in names {
        let out = exec::try_run(&["dpkg-query", "-W", "-f", "${db:Status-Status}", name]).await?;
        if out.ok && out.stdout != "not-installed" {
            here.push(name.clone());
        }
    }
    if here.is_empty() {
        return Ok(here);
    }
    let mut argv = vec!["dpkg".to_owned(), "--purge".to_owned()];
    argv.extend(here.iter().cloned());
    exec::try_run(&argv).await?;
    let mut left = Vec::new();
    for name in here {
        if is_installed(&name).await? {
            left.push(name);
        }
    }
    Ok(left)
}

/// What the packages make at run time and a purge leaves behind: of all that zd knows of, what was not
/// there before. Only this is taken away again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftovers {
    /// State of daemons: the site's data.
    pub trees: Vec<PathBuf>,
    /// Folders that were there, empty, and their mode.
    pub emptied: Vec<(PathBuf, u32)>,
    pub files: Vec<PathBuf>,
    /// Removed when empty, in this order.
    pub folders: Vec<PathBuf>,
    pub users: Vec<String>,
    pub groups: Vec<String>,
}

const TREES: [&str; 6] = [
    "/var/lib/docker",
    "/var/lib/containerd",
    "/opt/containerd",
    "/var/lib/docker-registry",
    "/var/lib/nginx",
    "/var/log/nginx",
];
const FILES: [&str; 2] = ["/etc/docker/key.json", "/var/www/html/index.nginx-debian.html"];
const FOLDERS: [&str; 6] =
    ["/var/www/html", "/var/www", "/etc/cni/net.d", "/etc/cni", "/etc/containerd", "/var/lib/registry"];
const USERS: [&str; 1] = ["docker-registry"];
const GROUPS: [&str; 2] = ["docker", "docker-registry"];

impl Leftovers {
    pub fn look() -> Result<Self> {
        let absent = |known: &[&str]| known.iter().map(PathBuf::from).filter(|p| !p.exists()).collect();
        let has = |file: &str, name: &str| {
            let text = std::fs::read_to_string(file).at(file)?;
            Ok(text.lines().any(|l| l.split(':').next() == Some(name)))
        };
        let missing = |file: &str, known: &[&str]| -> Result<Vec<String>> {
            let mut names = Vec::new();
            for name in known {
                if !has(file, name)? {
                    names.push((*name).to_owned());
                }
            }
            Ok(names)
        };
        let mut emptied = Vec::new();
        for path in TREES.map(PathBuf::from) {
            if std::fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_none()) {
                let mode = std::fs::metadata(&path).at(&path)?.permissions().mode() & 0o7777;
                emptied.push((path, mode));
            }
        }
        Ok(Self {
            trees: absent(&TREES),
            emptied,
            files: absent(&FILES),
            folders: absent(&FOLDERS),
            users: missing("/etc/passwd", &USERS)?,
            groups: missing("/etc/group", &GROUPS)?,
        })
    }

    /// `data`: also what the daemons stored.
    pub async fn remove(&self, data: bool) -> Result<()> {
        for file in &self.files {
            fs::remove_file(file)?;
        }
        for folder in &self.folders {
            fs::remove_empty(folder)?;
        }
        // Gone is good: the packages' own scripts remove some.
        for user in &self.users {
            exec::try_run(&["userdel", user]).await?;
        }
        for group in &self.groups {
            exec::try_run(&["groupdel", group]).await?;
        }
        if data {
            for path in &self.trees {
                fs::remove_tree(path)?;
            }
            for (path, mode) in &self.emptied {
                fs::empty_dir(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(*mode)).at(path)?;
            }
        }
        Ok(())
    }
}
