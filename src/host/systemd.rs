//! systemd through systemctl(1).

use std::time::Duration;

use super::exec;
use crate::error::{Code, Result};

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

pub async fn is_enabled(unit: &str) -> Result<bool> {
    Ok(says("is-enabled", unit).await? == "enabled")
}

pub async fn is_masked(unit: &str) -> Result<bool> {
    Ok(says("is-enabled", unit).await? == "masked")
}

pub async fn daemon_reload() -> Result<()> {
    exec::run(&["systemctl", "daemon-reload"]).await.map(drop)
}

pub async fn enable(unit: &str) -> Result<()> {
    exec::run(&["systemctl", "enable", "--quiet", unit]).await.map(drop)
}

/// Starts and waits until systemd calls it started; on failure shows the unit's last log lines.
pub async fn start(unit: &str) -> Result<()> {
    let _ = exec::try_run(&["systemctl", "reset-failed", unit]).await?;
    if exec::try_run(&["systemctl", "start", unit]).await?.ok {
        return Ok(());
    }
    let log = exec::try_run(&["journalctl", "-u", unit, "-n", "8", "-o", "cat", "--no-pager"]).await?.stdout;
    Err(Code::Command.err(format!("{unit} does not start: {}", exec::last_lines(&log, 8))).cure(format!(
        "mend what it says, then run the same command again; `journalctl -u {unit}` shows more"
    )))
}

pub async fn restart(unit: &str) -> Result<()> {
    stop(unit).await?;
    start(unit).await
}

pub async fn stop(unit: &str) -> Result<()> {
    // A unit that is not there is stopped.
    exec::try_run(&["systemctl", "stop", unit]).await.map(drop)
}

pub async fn disable(unit: &str) -> Result<()> {
    exec::try_run(&["systemctl", "disable", "--quiet", unit]).await.map(drop)
}

pub async fn mask(unit: &str) -> Result<()> {
    exec::run(&["systemctl", "mask", "--quiet", unit]).await.map(drop)
}

pub async fn unmask(unit: &str) -> Result<()> {
    exec::run(&["systemctl", "unmask", "--quiet", unit]).await.map(drop)
}
