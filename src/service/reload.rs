//! A reload that no client notices. nginx's own closes idle connections under clients that may just be
//! sending on them; so every answer says `Connection: close` first, until hardly anybody has one left.

use std::path::Path;
use std::time::{Duration, Instant};

use super::pointer::{self, Pointer};
use crate::error::{Code, Result};
use crate::host::nginx::{self, Masters, Status};
use crate::host::{fs, until};
use crate::ids::Name;

const EVERY: Duration = Duration::from_millis(20);
/// A client that sends nothing for so long is hardly sending at this very moment: when no idle connection has ended
/// meanwhile, those that are left are not waited for.
const IDLE: Duration = Duration::from_secs(3);
/// However many connections end by and by.
const LONGEST: Duration = Duration::from_secs(20);
/// How long new workers may take to come, and the old ones to stop listening.
const LOADED: Duration = Duration::from_secs(10);

/// Writes a file of nginx's configuration and has it loaded; one that nginx refuses is taken back, for it
/// must not be there at nginx's next start. Call it while holding the lock.
pub async fn with(service: &Name, path: &Path, bytes: &[u8]) -> Result<()> {
    let old = fs::read_if_any(path)?;
    fs::write(path, bytes, 0o644, None)?;
    let loaded = gently(service).await;
    if let (Err(_), Some(old)) = (&loaded, &old) {
        fs::write(path, old, 0o644, None)?;
    }
    loaded
}

async fn gently(service: &Name) -> Result<()> {
    nginx::check(service).await?;
    let old = Masters::of(service).await?.workers()?;
    let status = Status::open(service).await?;
    closing(service, status, async || {
        nginx::remove_stale_sockets(service)?;
        nginx::hang_up(service).await?;
        let replaced = async || {
            let now = Masters::of(service).await?.workers()?;
            if !now.is_empty() && now.iter().all(|pid| !old.contains(pid)) {
                return Ok(());
            }
            Err(Code::Nginx
                .err(format!("nginx of {service} goes on with its old configuration"))
                .cure(format!("see `zd logs nginx` and `systemctl status zd-nginx@{service}`")))
        };
        until(LOADED, EVERY, replaced).await
    })
    .await
}

/// Acts while every answer closes its connection and hardly anybody has an idle one: workers that are retired
/// then cut nobody off. `status` counts the connections of those that are to go.
pub async fn closing(service: &Name, status: Status, act: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    pointer::release_stale_hold(service)?;
    let active = pointer::read(service)?.slot();
    pointer::set(service, Pointer::Closing(active))?;
    idle_are_gone(status).await;
    let acted = act().await;
    pointer::set(service, Pointer::Active(active))?;
    acted
}

/// Waits for idle connections to end, for as long as they do.
async fn idle_are_gone(mut status: Status) {
    let begun = Instant::now();
    let (mut least, mut since) = (u64::MAX, begun);
    while least > 0 && since.elapsed() < IDLE && begun.elapsed() < LONGEST {
        if let Some(fewer) = status.read().await.ok().map(|c| c.waiting).filter(|n| *n < least) {
            (least, since) = (fewer, Instant::now());
        }
        tokio::time::sleep(EVERY).await;
    }
}
