//! Is a slot healthy? Every container asked directly, at its own address.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::bundle::manifest::Service;
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::docker::Docker;
use crate::host::{exec, http, paths};
use crate::ids::Slot;

const PROBE: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_millis(100);
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

pub async fn is_healthy(installed: &Installed, service: &Service, slot: Slot) -> bool {
    probe(installed, service, slot).await.iter().all(|p| p.healthy)
}

/// Waits until all are healthy; bounded; gives up early on a container that keeps dying.
pub async fn wait(installed: &Installed, service: &Service, slot: Slot, docker: &Docker) -> Result<()> {
    let start = Instant::now();
    let limit = Duration::from_secs(service.health_timeout.into());
    let mut looked = Instant::now();
    loop {
        let probes = probe(installed, service, slot).await;
        if probes.iter().all(|p| p.healthy) {
            return Ok(());
        }
        let mut dying = false;
        if looked.elapsed() > Duration::from_millis(500) {
            looked = Instant::now();
            for instance in 1..=service.instances {
                let name = paths::container(&service.name, slot, instance);
                dying |= docker.find(&name).await?.is_none_or(|found| found.restarts >= RESTARTS);
            }
        }
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
