//! Is a slot healthy? Every container asked directly, at its own address.
//! TCP ports are tried where a slot is to take sessions, and not only to be looked at.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio::net::TcpStream;

use crate::bundle::manifest::{Engine, Service};
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::docker::{self, Docker};
use crate::host::{exec, http, jobs, nomad, paths};
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

/// As [`probe`], and each container must accept on the service's TCP ports. A port that has a session open does,
/// and is let alone: HSMS equipment may serve one session and no more (SEMI E37, HSMS-SS), and this would be it.
pub async fn probe_all(installed: &Installed, service: &Service, slot: Slot) -> Vec<Probe> {
    let mut probes = probe(installed, service, slot).await;
    if service.tcp.is_empty() {
        // /proc/net/tcp is long where many connections have just been closed.
        return probes;
    }
    let busy: BTreeSet<SocketAddr> = procfs::net::tcp().map_or(BTreeSet::new(), |all| {
        let open = all.into_iter().filter(|e| e.state == procfs::net::TcpState::Established);
        open.map(|e| e.remote_address).collect()
    });
    for port in service.tcp.iter().map(|t| t.port) {
        let addresses = installed.addresses_at(service, slot, port).into_iter().zip(&mut probes);
        let ask =
            addresses.filter(|(a, probe)| probe.healthy && !busy.contains(a)).map(|(a, probe)| async move {
                let answer = tokio::time::timeout(PROBE, TcpStream::connect(a)).await;
                let why = match answer {
                    Ok(Ok(_)) => return,
                    Ok(Err(e)) => e.to_string(),
                    Err(_) => format!("no answer in {PROBE:?}"),
                };
                probe.healthy = false;
                probe.answer = format!("{}, but TCP port {port} does not accept: {why}", probe.answer);
            });
        futures_util::future::join_all(ask).await;
    }
    probes
}

/// Healthy, and not only for the moment: a container that has just started may be about to end.
pub async fn is_healthy(
    installed: &Installed,
    service: &Service,
    slot: Slot,
    docker: &Docker,
) -> Result<bool> {
    let life = look(installed.lock.engine, service, slot, docker).await?;
    Ok(life == Life::Settled && probe_all(installed, service, slot).await.iter().all(|p| p.healthy))
}

#[derive(PartialEq)]
enum Life {
    Settled,
    Young,
    /// Some container is gone, or keeps ending.
    Dying,
}

/// How the slot's containers live, of which the least well tells.
async fn look(engine: Engine, service: &Service, slot: Slot, docker: &Docker) -> Result<Life> {
    let mut life = Life::Settled;
    let containers = docker.of_slot(&service.name, slot).await?;
    for instance in 1..=service.instances {
        let found = match (docker::instance(&containers, instance), engine) {
            (Some(found), _) if found.restarts < RESTARTS => found,
            // Nomad starts each in its own time, and a new one where the last has ended.
            (None, Engine::Nomad) => {
                let dying = jobs::keeps_ending(&nomad::connect()?, &paths::job(&service.name, slot)).await;
                return Ok(if dying { Life::Dying } else { Life::Young });
            }
            _ => return Ok(Life::Dying),
        };
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
        let life = look(installed.lock.engine, service, slot, docker).await?;
        let probes = probe_all(installed, service, slot).await;
        if life == Life::Settled && probes.iter().all(|p| p.healthy) {
            return Ok(());
        }
        let dying = life == Life::Dying;
        if dying || start.elapsed() > limit {
            return Err(unhealthy(
                installed.lock.engine,
                service,
                slot,
                &probes,
                docker,
                dying,
                start.elapsed(),
            )
            .await);
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn unhealthy(
    engine: Engine,
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
        if dying { "it keeps ending" } else { "not every probe succeeds" },
        waited.as_secs_f32()
    );
    // One that keeps ending may just have answered.
    for (i, probe) in probes.iter().enumerate().filter(|(_, p)| dying || !p.healthy) {
        let name = paths::container(&service.name, slot, i as u8 + 1);
        what.push_str(&format!("\n  http://{}{} gives {}", probe.address, service.health, probe.answer));
        if engine == Engine::Docker {
            let log = docker.log_tail(&name, 5).await;
            let log = exec::last_lines(&log, 5);
            let log = if log.is_empty() { "(none)" } else { &log };
            what.push_str(&format!("\n  {name}: its last lines: {log}"));
        }
    }
    let mut cure = "mend the image and deploy it again";
    if engine == Engine::Nomad {
        match explain(service, slot).await {
            Ok(reason) => {
                what.extend(reason.lines.iter().map(|line| format!("\n  {line}")));
                cure = reason.cure.unwrap_or(cure);
            }
            Err(e) => what.push_str(&format!("\n  {}", e.what)),
        }
    }
    Code::Unhealthy.err(what).cure(format!("the active slot was not touched; {cure}"))
}

/// Why Nomad does not run a slot as it should.
pub async fn explain(service: &Service, slot: Slot) -> Result<jobs::Reason> {
    jobs::explain(&nomad::connect()?, &paths::job(&service.name, slot)).await
}
