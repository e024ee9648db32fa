//! `zd check-stores`, run by Nomad's unit before Nomad starts, for two starts that would stop what serves. A client that
//! remembers allocations of which the server beside it has never heard stops all of them. And one that loses dockerd while
//! it finds its containers again takes them for lost and starts others.

use std::path::Path;
use std::time::Duration;

use crate::error::{Code, Result};
use crate::host::{nomad, paths, stores, systemd};

const DOCKER: &str = "docker.service";
/// A dockerd that has crashed is trusted when it has been up for so long: one that keeps crashing never is.
const STEADY: Duration = Duration::from_secs(5);
const EVERY: Duration = Duration::from_millis(200);

/// Refuse a start of Nomad that would stop what serves
#[derive(clap::Args)]
pub struct Args {}

pub async fn run(_: Args) -> Result<()> {
    nomad::put_back_ids()?;
    if let Some(broken) = stores::nomad(Path::new(paths::NOMAD_DATA))?.first() {
        return Err(Code::Stack.err(broken.what()).cure(broken.cure()));
    }
    // Where dockerd ends meanwhile, systemd ends this as well (systemd.unit(5), BindsTo).
    while systemd::restarts(DOCKER).await? > 0
        && systemd::state(DOCKER).await?.1.is_none_or(|uptime| uptime < STEADY)
    {
        tokio::time::sleep(EVERY).await;
    }
    Ok(())
}
