//! systemd through systemctl(1).

use super::exec;
use crate::error::{Code, Result};

async fn says(verb: &str, unit: &str) -> Result<String> {
    Ok(exec::try_run(&["systemctl", verb, unit]).await?.stdout.trim().to_owned())
}

pub async fn is_active(unit: &str) -> Result<bool> {
    Ok(says("is-active", unit).await? == "active")
}

/// `active`, `inactive`, `failed`, `activating`, …
pub async fn state(unit: &str) -> Result<String> {
    says("is-active", unit).await
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
