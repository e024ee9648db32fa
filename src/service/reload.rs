//! A reload that no client notices. nginx's own closes idle connections under clients that may just be
//! sending on them; so every answer says `Connection: close` first, until hardly anybody has one left.

use std::path::Path;
use std::time::Duration;

use super::pointer::{self, Pointer};
use crate::error::{Code, Result};
use crate::host::nginx::{self, Status};
use crate::host::{fs, until};
use crate::ids::Name;

const EVERY: Duration = Duration::from_millis(20);
/// How long is waited for clients that keep a connection open and send nothing on it.
const IDLE: Duration = Duration::from_secs(3);
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
    pointer::release_stale_hold(service)?;
    let active = pointer::read(service)?.slot();
    pointer::set(service, Pointer::Closing(active))?;
    let loaded = load(service).await;
    pointer::set(service, Pointer::Active(active))?;
    loaded
}

async fn load(service: &Name) -> Result<()> {
    let old = nginx::workers(service)?;
    let mut status = Status::open(service).await?;
    let idle = async || match status.read().await?.waiting {
        0 => Ok(()),
        n => Err(Code::Nginx.err(format!("{n} connections of {service} are idle"))),
    };
    // Whoever is idle for so long is hardly sending at this very moment.
    let _ = until(IDLE, EVERY, idle).await;
    nginx::hang_up(service).await?;
    let replaced = async || {
        let now = nginx::workers(service)?;
        if !now.is_empty() && now.iter().all(|pid| !old.contains(pid)) {
            return Ok(());
        }
        Err(Code::Nginx
            .err(format!("nginx of {service} goes on with its old configuration"))
            .cure(format!("see `zd logs nginx` and `systemctl status zd-nginx@{service}`")))
    };
    until(LOADED, EVERY, replaced).await
}
