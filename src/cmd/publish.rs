//! `zd publish`, run by a unit when Consul starts: it is told what was switched while it was away.

use std::time::{Duration, Instant};

use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::{consul, until};
use crate::service::cluster;
use crate::ui::Ui;

const LIMIT: Duration = Duration::from_secs(60);

/// Tell Consul what it has missed
#[derive(clap::Args)]
pub struct Args {}

pub async fn run(_: Args, ui: &Ui) -> Result<()> {
    let Some(installed) = Installed::read()? else { return Ok(()) };
    until(LIMIT, Duration::from_millis(500), async || consul::version().await.map(drop)).await?;
    let _lock = wait_for_lock("publish", LIMIT, ui).await?;
    for service in &installed.lock.services {
        if cluster::is_behind(&service.name)? {
            cluster::tell(&installed, &service.name, ui).await?;
        }
    }
    Ok(())
}

/// For what nobody waits for: another zd may finish first.
pub async fn wait_for_lock(verb: &str, limit: Duration, ui: &Ui) -> Result<HostLock> {
    let start = Instant::now();
    loop {
        match HostLock::take(verb, ui) {
            Err(e) if e.code == Code::Locked && start.elapsed() < limit => {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            other => return other,
        }
    }
}
