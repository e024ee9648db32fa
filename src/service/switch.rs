//! The switch: check the standby, hold, drain, flip, release, verify. Nothing is reloaded; the only
//! thing that changes for clients is one symlink.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::gate::Gate;
use super::health;
use super::in_flight::InFlight;
use super::pointer::{self, Pointer};
use super::remaining::{self, Remaining, Which};
use super::sessions;
use super::state::State;
use crate::audit::{self, Event, Release};
use crate::bundle::manifest::Service;
use crate::error::{Code, Error, Result};
use crate::failpoint;
use crate::host::config::Installed;
use crate::host::nginx::{self, Status};
use crate::host::{fs, http, paths};
use crate::ids::{Name, Slot};
use crate::report::{self, Change};

/// Answers that clients must see after the switch, on fresh connections.
const VERIFY: u32 = 10;
/// An answer through nginx that takes longer is none. A request that is held waits as long as the drain takes.
const PROBE: Duration = Duration::from_secs(10);
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// How often nginx is asked whether the old answers are out.
const POLL: Duration = Duration::from_micros(300);
/// How long nginx may take to count out what was closed.
const CLOSED: Duration = Duration::from_millis(200);
/// How long requests are closed, and then, where some are still counted, connections.
const CUT: Duration = Duration::from_secs(2);
/// The gate stays this long after the last request left it: some are still on their way.
const LINGER: Duration = Duration::from_millis(50);

#[derive(Debug, Serialize)]
pub struct Report {
    pub schema: u32,
    pub service: Name,
    pub changed: bool,
    pub from: Release,
    pub to: Release,
    /// Requests that were held, and for how long.
    pub held: u64,
    pub held_p99_ms: f64,
    pub held_max_ms: f64,
    /// From hold to release.
    pub hold_ms: f64,
    /// The whole command.
    pub total_ms: f64,
    pub verified: u32,
    /// Requests of the old slot that were closed, for their answers were not out in time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cut: Vec<Remaining>,
    /// What became of the sessions of the old slot, by TCP port and by long-lived path.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sessions: Vec<sessions::Moved>,
}

/// Who asked, and why.
pub struct Request<'a> {
    pub verb: &'a str,
    pub reason: &'a str,
    /// Close what is left of the old slot when the time to drain is over.
    pub cut: bool,
}

/// Moves all traffic of a service to `to`. Call it while holding the lock.
pub async fn run(
    installed: &Installed,
    service: &Service,
    to: Slot,
    request: &Request<'_>,
) -> Result<Report> {
    let start = Instant::now();
    let name = &service.name;
    settle_killed(service).await?;
    let from = pointer::read(name)?.slot();
    let state = State::read(name)?;
    let (old, new) = (release_of(&state, name, from)?, release_of(&state, name, to)?);
    let mut report = Report {
        schema: 1,
        service: name.clone(),
        changed: from != to,
        from: old,
        to: new,
        held: 0,
        held_p99_ms: 0.0,
        held_max_ms: 0.0,
        hold_ms: 0.0,
        total_ms: 0.0,
        verified: 0,
        cut: Vec::new(),
        sessions: Vec::new(),
    };
    if from == to {
        // A switch before may not have come to the disk.
        fs::sync_dir(&paths::service(name))?;
        return Ok(report);
    }
    check_standby(installed, service, to).await?;
    let event = |outcome, detail| Event {
        verb: request.verb,
        outcome,
        reason: request.reason,
        service: Some(name),
        from: Some(report.from.clone()),
        to: Some(report.to.clone()),
        detail,
    };
    audit::append(event("begun", String::new()))?;
    let begun = jiff::Timestamp::now();
    let change = |numbers| Change { begun, numbers, ..Change::default() };
    let gate = Gate::open(name)?;
    let result = hold_and_flip(service, &gate, from, to, request.cut).await;
    let Moved { hold, cut, mut on_disk } = match result {
        Ok(moved) => moved,
        Err(e) => {
            let written = audit::write(event(FAILED, e.what.clone()))?;
            linger(&gate).await;
            report::write(&written, &change(BTreeMap::new()))?;
            return Err(e);
        }
    };
    report.cut = cut;
    // Before the flip is written down: whoever finds it unwritten closes what is to be closed.
    report.sessions = sessions::leave(service, from).await;
    failpoint::reach("switch:cut");
    let mut state = state;
    state.activate(to);
    on_disk = on_disk.and(state.write(name));
    let verified = verify(service, to).await;
    linger(&gate).await;
    let detail: Vec<String> = std::iter::once(held_text(&gate))
        .chain(report.cut.iter().map(|one| format!("cut {one}")))
        .chain(report.sessions.iter().filter_map(|m| m.text(from)))
        .chain(on_disk.as_ref().err().map(|e| e.what.clone()))
        .collect();
    let outcome = outcome(&on_disk, &verified);
    let written = audit::write(event(outcome, detail.join("; ")))?;
    if verified.is_ok() {
        sessions::wait(service, from, &mut report.sessions).await;
    }

    let mut waits = Histogram::<u64>::new(3).map_err(|e| Code::Bug.err(e.to_string()))?;
    for wait in gate.waits() {
        waits.saturating_record(wait.as_micros() as u64);
    }
    report.held = waits.len();
    report.held_p99_ms = waits.value_at_quantile(0.99) as f64 / 1000.0;
    report.held_max_ms = waits.max() as f64 / 1000.0;
    report.hold_ms = hold.as_secs_f64() * 1000.0;
    let numbers = BTreeMap::from([
        ("requests held", report.held.to_string()),
        ("held, p99", format!("{:.1} ms", report.held_p99_ms)),
        ("held, longest", format!("{:.1} ms", report.held_max_ms)),
        ("from hold to release", format!("{:.1} ms", report.hold_ms)),
    ]);
    report::write(&written, &change(numbers))?;
    on_disk.map_err(|e| not_on_disk(e, to))?;
    report.verified = verified?;
    report.total_ms = start.elapsed().as_secs_f64() * 1000.0;
    Ok(report)
}

/// How a switch that was begun ends in the audit log: no traffic moved;
const FAILED: &str = "failed";
/// or all of it did, and that may be forgotten by a power cut, is not what clients saw, or is well.
fn outcome(on_disk: &Result<()>, verified: &Result<u32>) -> &'static str {
    match (on_disk, verified) {
        (Err(_), _) => "moved, not on disk",
        (Ok(()), Err(_)) => "unverified",
        (Ok(()), Ok(_)) => "done",
    }
}

fn not_on_disk(e: Error, to: Slot) -> Error {
    let what = format!("all traffic is on {to}, but a power cut may bring the slot before back: {}", e.what);
    let cure = format!("see `dmesg` and `df -h`; when the disk takes writes again: zd switch --to {to}");
    Error { what, cure: Some(e.cure.map_or(cure.clone(), |first| format!("{first}; then {cure}"))), ..e }
}

/// A zd that was killed in the middle of a switch left a hold, or a flip that was not written down. The
/// pointer is the truth: what clients saw. Call it while holding the lock.
pub async fn settle_killed(service: &Service) -> Result<()> {
    let name = &service.name;
    let recovered = |detail: String| {
        audit::append(Event {
            verb: "switch",
            outcome: "recovered",
            service: Some(name),
            detail,
            ..Event::default()
        })
    };
    if pointer::release_stale_hold(name)? {
        recovered("a switch or a reload was killed half way; the slot that was active serves on".into())?;
    }
    let active = pointer::read(name)?.slot();
    let mut state = State::read(name)?;
    if state.active != active {
        let left = sessions::leave(service, active.other()).await;
        state.activate(active);
        state.unpublished = true;
        state.write(name)?;
        let what = format!(
            "a switch was killed or not written down after it had moved the traffic; {active} is active"
        );
        let left = left.iter().filter_map(|m| m.text(active.other()));
        recovered(std::iter::once(what).chain(left).collect::<Vec<_>>().join("; "))?;
    }
    Ok(())
}

fn release_of(state: &State, service: &Name, slot: Slot) -> Result<Release> {
    state.release(slot).ok_or_else(|| {
        Code::NotInstalled
            .err(format!("{service}: nothing was ever deployed to {slot}"))
            .cure(format!("zd deploy VERSION {service}"))
    })
}

fn held_text(gate: &Gate) -> String {
    format!("{} requests held", gate.waits().len())
}

/// The standby must be healthy at its own addresses and through nginx's standby entry.
async fn check_standby(installed: &Installed, service: &Service, to: Slot) -> Result<()> {
    let bad = |what: String| {
        Code::Unhealthy
            .err(what)
            .cure("nothing was changed; see `zd status`, deploy a version that works, then switch")
    };
    for probe in health::probe_all(installed, service, to).await {
        if !probe.healthy {
            return Err(bad(format!(
                "{} {to} at {} is not healthy: {}",
                service.name, probe.address, probe.answer
            )));
        }
    }
    let entry = local(service.standby_listen);
    // Whom nginx once found failing it leaves alone for this long, and so it would the clients' requests.
    let again = Instant::now() + Duration::from_secs(u64::from(service.fail_timeout) + 1);
    let mut passed = 0;
    while passed < service.instances {
        let answer = http::get(entry, host_name(service), &service.health, PROBE).await;
        let of_slot = answer.as_ref().is_ok_and(|a| a.header("x-zd-slot") == Some(to.as_str()));
        match answer {
            Ok(a) if a.status == 200 && of_slot => passed += 1,
            Ok(a) if a.status == 502 && of_slot && Instant::now() < again => {
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Ok(a) => {
                return Err(bad(format!(
                    "the standby entry {entry} answers status {} from {}, expected 200 from {to}",
                    a.status,
                    a.header("x-zd-slot").unwrap_or("nobody")
                )));
            }
            Err(why) => return Err(bad(format!("the standby entry {entry} does not answer: {why}"))),
        }
    }
    Ok(())
}

/// A pointer that clients go by.
struct Moved {
    /// How long requests were held.
    hold: Duration,
    /// What was closed for it.
    cut: Vec<Remaining>,
    /// Whether it outlives a power cut.
    on_disk: Result<()>,
}

/// Holds new requests, waits until the old answers are out, flips, releases. On any trouble before the
/// flip all go to the old slot and nothing has changed: only that is an error.
async fn hold_and_flip(service: &Service, gate: &Gate, from: Slot, to: Slot, cut: bool) -> Result<Moved> {
    let name = &service.name;
    let mut status = Status::open(name).await?;
    status.read().await?;
    let in_flight = InFlight::new(service).await;
    let start = Instant::now();
    pointer::swap(name, Pointer::Held(from))?;
    failpoint::reach("switch:held");
    let mut drain = Drain { service, gate, status, in_flight, start };
    let flipped = match drain.run(cut).await {
        Ok(cut) => pointer::swap(name, Pointer::Active(to)).map(|()| cut),
        Err(e) => Err(e),
    };
    let cut = match flipped {
        Ok(cut) => cut,
        Err(e) => {
            let back = pointer::swap(name, Pointer::Active(from));
            gate.release(from);
            back?;
            fs::sync_dir(&paths::service(name))?;
            return Err(e);
        }
    };
    failpoint::reach("switch:flipped");
    // On disk before any client sees the new version: a power cut must not bring the old one back.
    let on_disk = fs::sync_dir(&paths::service(name));
    gate.release(to);
    failpoint::reach("switch:released");
    Ok(Moved { hold: start.elapsed(), cut, on_disk })
}

/// Waits for answers of the old slot while new requests are held.
struct Drain<'a> {
    service: &'a Service,
    gate: &'a Gate,
    status: Status,
    in_flight: InFlight,
    start: Instant,
}

impl Drain<'_> {
    /// Until all are out. Returns what was closed for it.
    async fn run(&mut self, cut: bool) -> Result<Vec<Remaining>> {
        let limit = Duration::from_millis(self.service.drain_ms.into());
        match (self.wait(self.start + limit).await?, cut) {
            (0, _) => Ok(Vec::new()),
            (_, true) => self.cut().await,
            (old, false) => {
                let left = self.find(Which::Requests).await;
                Err(self.not_drained(old, left))
            }
        }
    }

    /// Requests of the old slot that have no answer yet, 0 as soon as that is so.
    async fn wait(&mut self, until: Instant) -> Result<u64> {
        loop {
            // In this order, and only those that were there before nginx counted: one that arrives between
            // the two looks must not hide an old request. The status request counts itself.
            let arrived = self.gate.arrived();
            let counted = self.status.read().await?.writing;
            let old = counted.saturating_sub(self.gate.waiting_of(arrived) as u64 + 1);
            let old = old - self.in_flight.of(old);
            if old == 0 || Instant::now() > until {
                return Ok(old);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn find(&self, which: Which) -> Result<Vec<Remaining>> {
        remaining::find(self.service, self.gate, self.start, which).await
    }

    /// Closes requests that have no answer; then, where nginx's count says that some are left, every connection from
    /// before the hold. In bounded time: when none of these is open, there is nobody whom the old slot could answer.
    async fn cut(&mut self) -> Result<Vec<Remaining>> {
        let mut cut = BTreeMap::new();
        for which in [Which::Requests, Which::Connections] {
            let begun = Instant::now();
            while begun.elapsed() < CUT {
                let found = match (self.find(which).await, which) {
                    (Err(_), Which::Requests) => break,
                    (found, _) => found?,
                };
                nginx::hang_up_on(&found.iter().map(|one| one.inode).collect())?;
                let none = found.is_empty();
                cut.extend(found.into_iter().map(|one| (one.inode, one)));
                if self.wait(Instant::now() + CLOSED).await? == 0 {
                    return Ok(cut.into_values().collect());
                }
                if none {
                    break;
                }
            }
        }
        match self.find(Which::Connections).await? {
            none if none.is_empty() => Ok(cut.into_values().collect()),
            left => Err(self.not_drained(left.len() as u64, Ok(left))),
        }
    }

    fn not_drained(&self, old: u64, left: Result<Vec<Remaining>>) -> Error {
        let (name, waited) = (&self.service.name, self.service.drain_ms);
        let named = match &left {
            Ok(left) => remaining::list(left),
            Err(e) => format!("\n  whose they are is not known: {}", e.what),
        };
        let what = format!(
            "{name}: {old} requests of the old slot had no answer after {waited} ms; all went on to it, nothing changed"
        );
        match &self.in_flight.trouble {
            None => Code::NotDrained.err(format!("{what}{named}")).cure(
                "try again at a quieter moment, or with more time: --drain 10s, or close what is left then: --cut",
            ),
            Some(why) => Code::NotDrained
                .err(format!(
                    "{what}; long-lived ones are among them, for they cannot be told apart: {why}{named}"
                ))
                .cure("try again when none is open, or `modprobe unix_diag` and try again"),
        }
    }
}

/// Waits until nobody is at the gate any more.
async fn linger(gate: &Gate) {
    let mut quiet = Instant::now();
    let start = Instant::now();
    let mut seen = gate.waits().len();
    while quiet.elapsed() < LINGER && start.elapsed() < Duration::from_secs(2) {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if gate.waits().len() != seen {
            seen = gate.waits().len();
            quiet = Instant::now();
        }
    }
}

/// What clients see now: healthy answers, all from the new slot.
async fn verify(service: &Service, to: Slot) -> Result<u32> {
    let entry = local(service.listen);
    for _ in 0..VERIFY {
        let answer = http::get(entry, host_name(service), &service.health, PROBE).await;
        let seen = match &answer {
            Ok(a) if a.status == 200 && a.header("x-zd-slot") == Some(to.as_str()) => continue,
            Ok(a) => format!("status {} from {}", a.status, a.header("x-zd-slot").unwrap_or("nobody")),
            Err(why) => why.clone(),
        };
        return Err(Code::Unverified
            .err(format!("{}: after the switch {entry}{} gives {seen}, expected 200 from {to}", service.name, service.health))
            .cure("all traffic is on the new slot; `zd rollback` moves it back, `zd status` shows what is wrong"));
    }
    Ok(VERIFY)
}

/// Serving check of an install: clients get healthy answers from this slot.
pub async fn serves(service: &Service, slot: Slot) -> Result<(), String> {
    match answers(service).await? {
        Some(from) if from == slot.as_str() => Ok(()),
        from => Err(format!("status 200 from {}", from.as_deref().unwrap_or("nobody"))),
    }
}

/// Clients get healthy answers; which slot they come from.
pub async fn answers(service: &Service) -> Result<Option<String>, String> {
    let answer = http::get(local(service.listen), host_name(service), &service.health, PROBE).await?;
    let slot = answer.header("x-zd-slot").map(str::to_owned);
    match answer.status {
        200 => Ok(slot),
        status => Err(format!("status {status} from {}", slot.as_deref().unwrap_or("nobody"))),
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn host_name(service: &Service) -> &str {
    let mut exact = service.server_names.iter().filter(|name| !name.contains('*'));
    exact.next().map_or("localhost", String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_that_moved_is_never_called_failed() {
        let bad = || Code::Io.err("input/output error");
        assert_eq!(outcome(&Ok(()), &Ok(10)), "done");
        assert_eq!(outcome(&Ok(()), &Err(bad())), "unverified");
        for verified in [Ok(10), Err(bad())] {
            assert_eq!(outcome(&Err(bad()), &verified), "moved, not on disk");
        }
        let told = not_on_disk(bad(), Slot::Green);
        assert!(told.what.starts_with("all traffic is on green") && told.code == Code::Io);
        assert!(told.cure.unwrap().contains("zd switch --to green"));
    }
}
