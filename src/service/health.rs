//! Is a slot healthy? Every container asked directly, at its own address.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::bundle::manifest::Service;
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::docker::Docker;
use crate::host::{exec, http, paths};
use crate::ids::Slot;

const PROBE: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_millis(100);
/// A container younger than this has proved nothing yet.
const SETTLE: SignedDuration = SignedDuration::from_secs(1);
/// A container that died this often by itself will not become healthy by waiting.
const RESTARTS: i64 = 3;

#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    pub address: SocketAddr,
    pub healthy: bool,
    /// Status, or why there was no answer.
    pub answer: String,
}

pub async fn probe(installed: &Installed, service: &Service, slot: Slot) -> Vec<Probe> {
    let addresses = installed.addresses(service, slot);
    let probes = addresses.into_iter().map(|address| async move {
        match http::get(address, service.name.as_str(), &service.health, PROBE).await {
            Ok(a) => Probe { address, healthy: a.status == 200, answer: format!("status {}", a.status) },
            Err(why) => Probe { address, healthy: false, answer: why },
        }
    });
    futures_util::future::join_all(probes).await
}

/// Healthy, and not only for the moment: a container that has just started may be about to end.
pub async fn is_healthy(
    installed: &Installed,
    service: &Service,
    slot: Slot,
    docker: &Docker,
) -> Result<bool> {
    let life = look(service, slot, docker).await?;
    Ok(life == Life::Settled && probe(installed, service, slot).await.iter().all(|p| p.healthy))
}

#[derive(PartialEq)]
enum Life {
    Settled,
    Young,
    /// Some container is gone, or keeps ending.
    Dying,
}

/// How the slot's containers live, of which the least well tells.
async fn look(service: &Service, slot: Slot, docker: &Docker) -> Result<Life> {
    let mut life = Life::Settled;
    for instance in 1..=service.instances {
        let found = docker.find(&paths::container(&service.name, slot, instance)).await?;
        let Some(found) = found.filter(|f| f.restarts < RESTARTS) else { return Ok(Life::Dying) };
        let age = found.started_at.parse::<Timestamp>().map(|at| Timestamp::now().duration_since(at));
        if !found.running || age.is_ok_and(|age| age < SETTLE) {
            life = Life::Young;
        }
    }
    Ok(life)
}

/// Waits until all are healthy; bounded; gives up early on a container that keeps dying.
pub async fn wait(installed: &Installed, service: &Service, slot: Slot, docker: &Docker) -> Result<()> {
    let start = Instant::now();
    let limit = Duration::from_secs(service.health_timeout.into());
    loop {
        // In this order: healthy answers count only of containers that had settled before.
        let life = look(service, slot, docker).await?;
        let probes = probe(installed, service, slot).await;
        if life == Life::Settled && probes.iter().all(|p| p.healthy) {
            return Ok(());
        }
        let dying = life == Life::Dying;
        if dying || start.elapsed() > limit {
            return Err(unhealthy(service, slot, &probes, docker, dying, start.elapsed()).await);
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn unhealthy(
    service: &Service,
    slot: Slot,
    probes: &[Probe],
    docker: &Docker,
    dying: bool,
    waited: Duration,
) -> crate::error::Error {
    let mut what = format!(
        "{} in {slot} did not become healthy: {} after {:.1} s",
        service.name,
        if dying { "it keeps ending" } else { "no 200" },
        waited.as_secs_f32()
    );
    for (i, probe) in probes.iter().enumerate().filter(|(_, p)| !p.healthy) {
        let name = paths::container(&service.name, slot, i as u8 + 1);
        let log = docker.log_tail(&name, 5).await;
        let log = exec::last_lines(&log, 5);
        what.push_str(&format!(
            "\n  {name}: http://{}{} gives {}\n  its last lines: {}",
            probe.address,
            service.health,
            probe.answer,
            if log.is_empty() { "(none)" } else { &log }
        ));
    }
    Code::Unhealthy.err(what).cure("the active slot was not touched; mend the image and deploy it again")
}
