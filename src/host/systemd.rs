//! systemd through systemctl(1).

use std::path::Path;
use std::time::Duration;

use super::{exec, fs, until};
use crate::error::{Code, Error, Result};

/// A unit that systemd has started so often again will not do better by waiting.
const RESTARTS: u32 = 3;

/// Option of journalctl(1): the host's journal, and the one that zd's units have for themselves.
pub const JOURNALS: &str = "--namespace=+zd";
const JOURNAL: &str = "systemd-journald@zd.service";

async fn says(verb: &str, unit: &str) -> Result<String> {
    Ok(exec::try_run(&["systemctl", verb, unit]).await?.stdout.trim().to_owned())
}

pub async fn is_active(unit: &str) -> Result<bool> {
    Ok(says("is-active", unit).await? == "active")
}

/// `active`, `inactive`, `failed`, `activating`, …; and for how long it has been active.
pub async fn state(unit: &str) -> Result<(String, Option<Duration>)> {
    let shown = ["--property=ActiveState", "--property=ActiveEnterTimestampMonotonic"];
    let out = exec::try_run(&["systemctl", "show", shown[0], shown[1], unit]).await?.stdout;
    let value = |key: &str| out.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
    let state = value("ActiveState").unwrap_or("unknown").to_owned();
    let entered = value("ActiveEnterTimestampMonotonic").and_then(|us| us.parse().ok());
    let now = Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Monotonic));
    let uptime = match (entered.filter(|_| state == "active"), now) {
        (Some(entered), Ok(now)) => now.checked_sub(Duration::from_micros(entered)),
        _ => None,
    };
    Ok((state, uptime))
}

/// How a unit ended that did not end well; systemd.exec(5), `$SERVICE_RESULT`.
pub async fn failure(unit: &str) -> Result<Option<String>> {
    let out = exec::try_run(&["systemctl", "show", "--property=Result", "--value", unit]).await?.stdout;
    Ok(Some(out.trim().to_owned()).filter(|result| !result.is_empty() && result != "success"))
}

/// Its main process, while it has one.
pub async fn main_pid(unit: &str) -> Result<Option<u32>> {
    let out = exec::try_run(&["systemctl", "show", "--property=MainPID", "--value", unit]).await?;
    Ok(out.stdout.trim().parse().ok().filter(|pid| *pid != 0))
}

/// Path of its cgroup, for as long as it has one (systemd.resource-control(5)).
pub async fn cgroup(unit: &str) -> Result<String> {
    let out = exec::try_run(&["systemctl", "show", "--property=ControlGroup", "--value", unit]).await?;
    match out.stdout.trim() {
        "" => Err(Code::Command.err(format!("{unit} does not run"))),
        path => Ok(path.to_owned()),
    }
}

/// A process is in this cgroup of systemd's, or beneath it.
pub fn is_in(pid: u32, cgroup: &str) -> bool {
    let found = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    is_listed(&found, cgroup)
}

/// cgroups(7): `hierarchy:controllers:path`; systemd's is the unified one or that named after it.
fn is_listed(cgroups: &str, wanted: &str) -> bool {
    let paths = cgroups.lines().filter_map(|line| {
        let (hierarchy, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        (hierarchy == "0" || controllers == "name=systemd").then_some(Path::new(path))
    });
    wanted.len() > 1 && paths.into_iter().any(|path| path.starts_with(wanted))
}

pub async fn is_enabled(unit: &str) -> Result<bool> {
    Ok(says("is-enabled", unit).await? == "enabled")
}

pub async fn is_masked(unit: &str) -> Result<bool> {
    Ok(says("is-enabled", unit).await? == "masked")
}

pub async fn daemon_reload() -> Result<()> {
    exec::run(&["systemctl", "daemon-reload"]).await.map(drop)
}

/// systemd reads all units anew with it, as with `daemon-reload` (systemctl(1)).
pub async fn enable(unit: &str) -> Result<()> {
    exec::run(&["systemctl", "enable", "--quiet", unit]).await.map(drop)
}

/// Starts and waits until systemd calls it started; on failure shows the unit's last log lines.
pub async fn start(unit: &str) -> Result<()> {
    // One that has failed too often is not started again before this (systemd.unit(5), StartLimitBurst).
    let _ = exec::try_run(&["systemctl", "reset-failed", unit]).await?;
    if exec::try_run(&["systemctl", "start", unit]).await?.ok {
        return Ok(());
    }
    Err(ends(unit, "does not start").await?)
}

async fn ends(unit: &str, how: &str) -> Result<Error> {
    let log = ["journalctl", JOURNALS, "-u", unit, "-n", "8", "-o", "cat", "--no-pager"];
    let log = exec::try_run(&log).await?.stdout;
    Ok(Code::Command.err(format!("{unit} {how}: {}", exec::last_lines(&log, 8))).cure(format!(
        "mend what it says, then run the same command again; `journalctl {JOURNALS} -u {unit}` shows more"
    )))
}

/// As [`until`], of what a unit serves: ends early where the unit keeps ending.
pub async fn until_serving<T>(
    unit: &str,
    limit: Duration,
    every: Duration,
    mut ask: impl AsyncFnMut() -> Result<T>,
) -> Result<T> {
    let asked = async || match ask().await {
        Err(_) if keeps_ending(unit).await => Ok(Err(ends(unit, "keeps ending").await?)),
        Err(e) => Err(e),
        Ok(answer) => Ok(Ok(answer)),
    };
    until(limit, every, asked).await?
}

async fn keeps_ending(unit: &str) -> bool {
    restarts(unit).await.is_ok_and(|restarts| restarts >= RESTARTS)
}

/// How often systemd has started a unit again by itself since somebody has started it.
pub async fn restarts(unit: &str) -> Result<u32> {
    let out = exec::try_run(&["systemctl", "show", "--property=NRestarts", "--value", unit]).await?;
    Ok(out.stdout.trim().parse().unwrap_or(0))
}

pub async fn restart(unit: &str) -> Result<()> {
    stop(unit).await?;
    start(unit).await
}

/// Where it runs; else it is started.
pub async fn reload(unit: &str) -> Result<()> {
    exec::run(&["systemctl", "reload-or-restart", unit]).await.map(drop)
}

/// Stops, and waits until systemd calls it stopped. What comes next may take its data away, so a unit that may still run
/// is an error; one that is not there is stopped.
pub async fn stop(unit: &str) -> Result<()> {
    let out = exec::try_run(&["systemctl", "stop", unit]).await?;
    if out.ok
        || exec::try_run(&["systemctl", "show", "--property=LoadState", "--value", unit]).await?.stdout.trim()
            == "not-found"
    {
        return Ok(());
    }
    Err(not_done(unit, "does not stop", &out))
}

/// Ends all processes of a unit at once, as a crash would. Where there are none it is done; that it has stopped is what
/// [`stop`] says.
pub async fn kill(unit: &str) -> Result<()> {
    exec::try_run(&["systemctl", "kill", "--signal=KILL", unit]).await.map(drop)
}

/// One that is not there is disabled.
pub async fn disable(unit: &str) -> Result<()> {
    let out = exec::try_run(&["systemctl", "disable", "--quiet", unit]).await?;
    if out.ok || !is_enabled(unit).await? { Ok(()) } else { Err(not_done(unit, "stays enabled", &out)) }
}

fn not_done(unit: &str, how: &str, out: &exec::Output) -> Error {
    Code::Command
        .err(format!("{unit} {how}: {}", exec::last_lines(&out.stderr, 4)))
        .cure(format!("systemctl status {unit} shows why; then run the same command again"))
}

pub async fn mask(unit: &str) -> Result<()> {
    exec::run(&["systemctl", "mask", "--quiet", unit]).await.map(drop)
}

pub async fn unmask(unit: &str) -> Result<()> {
    exec::run(&["systemctl", "unmask", "--quiet", unit]).await.map(drop)
}

/// Ends the journal that zd's units had for themselves; with `purge`, what they wrote goes too.
pub async fn end_journal(purge: bool) -> Result<()> {
    stop(JOURNAL).await?;
    let machine = fs::read_if_any(Path::new("/etc/machine-id"))?.unwrap_or_default();
    for journals in ["/var/log/journal", "/run/log/journal"].iter().filter(|_| purge) {
        // sd-journal(3): one folder for each machine and namespace.
        let name = format!("{}.zd", String::from_utf8_lossy(&machine).trim());
        fs::remove_tree(&Path::new(journals).join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_of_that_name_elsewhere_is_another() {
        const UNIT: &str = "/system.slice/system-zd\\x2dnginx.slice/zd-nginx@hello.service";
        let (v1, v2) = (format!("5:cpu,cpuacct:/\n1:name=systemd:{UNIT}\n"), format!("0::{UNIT}/sub\n"));
        assert!(is_listed(&v1, UNIT) && is_listed(&v2, UNIT));
        let own = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/zd-nginx@hello.service\n";
        assert!(!is_listed(own, UNIT));
        assert!(!is_listed(&format!("5:cpu,cpuacct:{UNIT}\n"), UNIT), "not systemd's hierarchy");
        assert!(!is_listed(&format!("0::{UNIT}2\n"), UNIT));
        assert!(!is_listed("0::/init.scope\n", "/") && !is_listed("", UNIT));
    }
}
