//! `zd status`: what runs, since when and by whom, and any difference to what was recorded.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use comfy_table::{Table, presets};
use jiff::Timestamp;
use serde::Serialize;

use super::backup::{self, Last};
use crate::backup::Settings;
use crate::bundle::manifest::{Door, Engine, ImageRef, LongLived, Product, Service, Sessions};
use crate::error::{At, Code, Error, OrCode, Result};
use crate::facts;
use crate::host::config::Installed;
use crate::host::docker::{self, Docker, Found};
use crate::host::lock::HostLock;
use crate::host::{consul, jobs, nginx, nomad, packages, paths, stores, systemd};
use crate::ids::{Name, Slot};
use crate::plan;
use crate::plan::backup::{SERVICE, TIMER};
use crate::receipt;
use crate::service::cluster;
use crate::service::health::{self, Probe};
use crate::service::pointer::{self, Pointer};
use crate::service::sessions;
use crate::service::state::State;
use crate::service::switch;
use crate::ui::Ui;
use crate::units;

/// Show what runs here: slots, versions, health, and what is not as it was left
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd status\n  zd status --json | jq '.services[0].slots'")]
pub struct Args {}

#[derive(Serialize)]
pub struct Report {
    pub schema: u32,
    pub bundle: String,
    pub ip: Ipv4Addr,
    pub components: Vec<Component>,
    pub services: Vec<ServiceReport>,
    /// None where no key for backups is set.
    pub backup: Option<BackupReport>,
    /// What is not as it was recorded.
    pub drift: Vec<Drift>,
}

#[derive(Serialize)]
pub struct BackupReport {
    #[serde(flatten)]
    pub settings: Settings,
    /// The last one that came to its end.
    pub last: Option<Last>,
}

#[derive(Serialize)]
pub struct Drift {
    pub what: String,
    pub cure: String,
}

impl From<Error> for Drift {
    fn from(e: Error) -> Self {
        Self { what: e.what, cure: e.cure.unwrap_or_default() }
    }
}

impl Drift {
    fn new(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { what: what.into(), cure: cure.into() }
    }
}

#[derive(Serialize)]
pub struct Component {
    /// Its unit.
    pub name: String,
    pub state: String,
    pub version: Option<String>,
    /// Seconds since it was started.
    pub uptime_s: Option<u64>,
}

#[derive(Serialize)]
pub struct ServiceReport {
    pub name: Name,
    pub active: Slot,
    pub serving: bool,
    pub listen: u16,
    pub standby_listen: u16,
    pub active_since: Option<String>,
    pub active_by: Option<String>,
    pub slots: Vec<SlotReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tcp: Vec<TcpReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub long_lived: Vec<LongLivedReport>,
}

#[derive(Serialize)]
pub struct TcpReport {
    pub listen: u16,
    /// What a switch does about open sessions.
    pub sessions: Sessions,
    pub listening: bool,
    /// Sessions open with each slot.
    pub open: BTreeMap<Slot, usize>,
}

#[derive(Serialize)]
pub struct LongLivedReport {
    pub path: String,
    /// What a switch does about open requests.
    pub sessions: Sessions,
    /// Requests open with each slot.
    pub open: BTreeMap<Slot, usize>,
}

#[derive(Serialize)]
pub struct SlotReport {
    pub slot: Slot,
    pub role: &'static str,
    pub version: Option<String>,
    pub digest: Option<String>,
    pub since: Option<String>,
    pub by: Option<String>,
    pub healthy: bool,
    pub probes: Vec<Probe>,
    pub containers: Vec<Option<Found>>,
}

pub async fn run(_: Args, ui: &Ui) -> Result<()> {
    let report = gather(&Installed::require()?).await?;
    ui.report(&report, text);
    Ok(())
}

pub async fn gather(installed: &Installed) -> Result<Report> {
    let mut drift = Vec::new();
    drift.extend(receipt::refuse_unfinished().err().filter(|_| !HostLock::is_held()).map(Drift::from));
    let nomad_engine = installed.lock.engine == Engine::Nomad;
    let components = components(installed).await?;
    for Component { name, state, .. } in components.iter().filter(|c| c.state != "active") {
        let cure = format!("systemctl start {name}, then journalctl {} -u {name}", systemd::JOURNALS);
        drift.push(Drift::new(format!("{name} is {state}"), cure));
    }
    drift.extend(address_gone(installed.host.ip));
    let docker = match Docker::connect().await {
        Ok(docker) => Some(docker),
        Err(e) => {
            let cure = e.cure.unwrap_or_else(|| "systemctl start docker".into());
            drift.push(Drift::new(format!("{}; containers that run go on serving", e.what), cure));
            None
        }
    };
    let mut services = Vec::new();
    if nomad_engine {
        let broken = stores::diagnose(installed).await?;
        drift.extend(broken.iter().map(|broken| Drift::new(broken.what(), broken.cure())));
        for (product, answer) in
            [(Product::Consul, consul::version().await), (Product::Nomad, nomad::version().await)]
        {
            // Of one with a broken store there is no more to say.
            if !broken.iter().any(|broken| broken.product == product) {
                drift.extend(answer.err().map(Drift::from));
            }
        }
        for service in &installed.lock.services {
            drift.extend(stack_drift(installed, service).await);
        }
    }
    for service in &installed.lock.services {
        services.push(service_report(installed, service, docker.as_ref(), &mut drift).await?);
    }
    let backup = backup_report(installed, &mut drift).await?;
    Ok(Report {
        schema: 1,
        bundle: installed.lock.title(),
        ip: installed.host.ip,
        components,
        services,
        backup,
        drift,
    })
}

/// The site has given the host another address, or not yet this one.
fn address_gone(ip: Ipv4Addr) -> Option<Drift> {
    let what = format!("{ip}, the address of zd's registry, is on no interface of this host");
    let cure = "zd reconfigure --ip auto (or one of its addresses), or give it back to an interface";
    (!facts::is_here(ip)).then(|| Drift::new(what, cure))
}

/// How old the last backup is, and whether the timer still takes them.
async fn backup_report(installed: &Installed, drift: &mut Vec<Drift>) -> Result<Option<BackupReport>> {
    let Some(settings) = Settings::read(&installed.lock)? else { return Ok(None) };
    let last = backup::last()?;
    let (timer, _) = systemd::state(TIMER).await?;
    if timer != "active" {
        let cure = format!(
            "systemctl enable --now {TIMER}; where it is gone: zd backup --recipient {}",
            settings.recipient
        );
        drift.push(Drift::new(format!("{TIMER} is {timer}: no backups are taken"), cure));
    } else if let Some(how) = systemd::failure(SERVICE).await? {
        let cure = format!("zd logs backup shows why; mend that, then systemctl restart {SERVICE}");
        drift.push(Drift::new(format!("the last timed backup failed ({how})"), cure));
    } else if let Some(age) = overdue(&settings, last.as_ref(), Timestamp::now())? {
        let age = units::rough(age);
        let what = match &last {
            Some(_) => format!("the last backup is {age} old, expected is one every {}", settings.every),
            None => format!("no backup was ever taken, for {age}; expected is one every {}", settings.every),
        };
        drift.push(Drift::new(what, "zd logs backup shows why; mend that, then zd backup"));
    }
    Ok(Some(BackupReport { settings, last }))
}

/// How long ago the last one was, where that is too long: two have been missed.
fn overdue(settings: &Settings, last: Option<&Last>, now: Timestamp) -> Result<Option<Duration>> {
    let since = match last {
        Some(last) => last.at,
        // Since timed backups were set.
        None => {
            let unit = Path::new(paths::UNITS).join(TIMER);
            let set = unit.metadata().and_then(|m| m.modified()).at(&unit)?;
            Timestamp::try_from(set).or_code(Code::Io, unit.display())?
        }
    };
    let age = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    Ok((age > settings.every.length() * 2).then_some(age))
}

/// The units that zd answers for, and what runs in them.
async fn components(installed: &Installed) -> Result<Vec<Component>> {
    let lock = &installed.lock;
    let mut units = Vec::new();
    for (unit, role) in
        [("docker.service", &lock.packages.docker), ("zd-registry.service", &lock.packages.registry)]
    {
        units.push((unit.to_owned(), packages::version(role).await?));
    }
    for release in &lock.releases {
        units.push((format!("{}.service", release.product), Some(release.version.to_string())));
    }
    let nginx = packages::version(&lock.packages.nginx).await?;
    units.extend(lock.services.iter().map(|s| (paths::nginx_unit(&s.name), nginx.clone())));
    let mut components = Vec::new();
    for (name, version) in units {
        let (state, uptime) = systemd::state(&name).await?;
        components.push(Component { name, state, version, uptime_s: uptime.map(|t| t.as_secs()) });
    }
    Ok(components)
}

/// What somebody changed in Nomad or Consul by hand. Where one does not answer, that was said already.
async fn stack_drift(installed: &Installed, service: &Service) -> Vec<Drift> {
    let mut drift = Vec::new();
    let name = &service.name;
    match cluster::difference(installed, service).await {
        Ok(Some((what, cure))) => drift.push(Drift { what, cure }),
        Ok(None) => drift.extend(stale_pools(installed, service)),
        Err(_) => {}
    }
    let (Ok(state), Ok(nomad)) = (State::read(name), nomad::connect()) else { return drift };
    for (slot, filled) in &state.slots {
        let reference = ImageRef { name: service.image.clone(), version: filled.version.clone() };
        let id = paths::job(name, *slot);
        // A deploy fills the standby: what is wrong in the active slot is first made one.
        let active = pointer::read(name).is_ok_and(|p| p.slot() == *slot);
        let first = if active { "zd switch, then " } else { "" };
        let cure = format!("{first}zd deploy {}", filled.version);
        let record = jobs::record(name, *slot).unwrap_or_default();
        match jobs::job(&nomad, &id).await {
            Ok(None) => drift.push(Drift::new(format!("Nomad job {id} is gone"), cure)),
            Ok(Some(found)) => {
                let same = match record {
                    Some(record) => Ok(jobs::covers(&found, &record)),
                    // An earlier zd has not kept it, and made it from a template of its own.
                    None => plan::slot::job(installed, service, *slot, &reference, &filled.digest)
                        .map(|job| plan::slot::same_content(&found, &job)),
                };
                if !same.unwrap_or(true) {
                    drift.push(Drift::new(format!("Nomad job {id} was changed by hand"), cure));
                }
            }
            Err(_) => {}
        }
    }
    drift
}

/// Consul has the right pools, and nginx others.
fn stale_pools(installed: &Installed, service: &Service) -> Option<Drift> {
    let wanted = nginx::servers_of(installed, service);
    let has = |path: PathBuf| nginx::servers(&path).is_ok_and(|found| found == wanted);
    let name = &service.name;
    if !has(paths::pools(name)) {
        let what = format!("consul-template has not written the pools of {name} that stand in Consul");
        return Some(Drift::new(what, "systemctl restart consul-template, then zd logs consul-template"));
    }
    if !has(paths::nginx_pools(name)) {
        let what = format!("nginx of {name} has not loaded the pools that consul-template has written");
        return Some(Drift::new(what, format!("systemctl start zd-pools@{name}, then zd history")));
    }
    None
}

async fn service_report(
    installed: &Installed,
    service: &Service,
    docker: Option<&Docker>,
    drift: &mut Vec<Drift>,
) -> Result<ServiceReport> {
    let name = &service.name;
    let now = pointer::read(name)?;
    let active = now.slot();
    if now != Pointer::Active(active) {
        let what = format!("{name}: a switch or a reload was interrupted; {active} serves on");
        drift.push(Drift::new(what, format!("zd switch --to {active}")));
    }
    let state = State::read(name)?;
    let mut slots = Vec::new();
    for slot in Slot::BOTH {
        let recorded = state.slots.get(&slot);
        let probes = health::probe(installed, service, slot).await;
        let running = match docker {
            Some(docker) => docker.of_slot(name, slot).await?,
            None => Vec::new(),
        };
        let mut containers = Vec::new();
        for instance in 1..=service.instances {
            let container = format!("{name} {slot} {instance}");
            let found = docker::instance(&running, instance);
            if docker.is_some() {
                drift.extend(container_drift(&container, found, recorded.map(|r| r.digest.as_str())));
            }
            containers.push(found.cloned());
        }
        let healthy = probes.iter().all(|p| p.healthy);
        let role = if slot == active { "active" } else { "standby" };
        if !healthy {
            let why = probes.iter().find(|p| !p.healthy).map(|p| p.answer.clone()).unwrap_or_default();
            let cure = format!("zd logs {slot}, then zd deploy VERSION");
            drift.push(Drift::new(format!("{name} {slot} ({role}) is not healthy ({why})"), &cure));
            if installed.lock.engine == Engine::Nomad {
                drift.extend(reason(service, slot, &cure).await);
            }
        }
        slots.push(SlotReport {
            slot,
            role,
            version: recorded.map(|r| r.version.to_string()),
            digest: recorded.map(|r| r.digest.to_string()),
            since: recorded.map(|r| r.since.to_string()),
            by: recorded.map(|r| r.by.clone()),
            healthy,
            probes,
            containers,
        });
    }
    let serving = switch::serves(service, active).await;
    if let Err(why) = &serving {
        let cure = format!("systemctl status {}", paths::nginx_unit(name));
        drift.push(Drift::new(format!("port {} gives {why}", service.listen), cure));
    }
    Ok(ServiceReport {
        name: name.clone(),
        active,
        serving: serving.is_ok(),
        listen: service.listen,
        standby_listen: service.standby_listen,
        active_since: state.active_since.map(|t| t.to_string()),
        active_by: state.active_by,
        slots,
        tcp: tcp_reports(service, drift)?,
        long_lived: long_lived_reports(service)?,
    })
}

/// What Nomad knows of a slot that is not healthy. Where it does not answer, that was said already.
async fn reason(service: &Service, slot: Slot, cure: &str) -> Option<Drift> {
    let reason = health::explain(service, slot).await.ok().filter(|reason| !reason.lines.is_empty())?;
    Some(Drift::new(reason.lines.join("; "), reason.cure.unwrap_or(cure)))
}

/// Of TCP ports nothing is tried here: a session of ours could keep a client's away.
fn tcp_reports(service: &Service, drift: &mut Vec<Drift>) -> Result<Vec<TcpReport>> {
    let mut reports = Vec::new();
    for tcp in &service.tcp {
        let listen = tcp.listen();
        let open = open_sessions(service, &Door::Listen(listen))?;
        let all = procfs::net::tcp().unwrap_or_default();
        let mut listening = all.iter().filter(|e| e.state == procfs::net::TcpState::Listen);
        let listening = listening.any(|e| e.local_address.port() == listen);
        if !listening {
            let cure = format!("systemctl status {}", paths::nginx_unit(&service.name));
            drift.push(Drift::new(format!("nobody listens on tcp port {listen} of {}", service.name), cure));
        }
        reports.push(TcpReport { listen, sessions: tcp.sessions, listening, open });
    }
    Ok(reports)
}

fn long_lived_reports(service: &Service) -> Result<Vec<LongLivedReport>> {
    let report = |LongLived { path, sessions, .. }: &LongLived| {
        let open = open_sessions(service, &Door::Path(path.clone()))?;
        Ok(LongLivedReport { path: path.clone(), sessions: *sessions, open })
    };
    service.long_lived.iter().map(report).collect()
}

fn open_sessions(service: &Service, door: &Door) -> Result<BTreeMap<Slot, usize>> {
    let open = |slot| Ok((slot, sessions::open(&service.name, slot, door)?.len()));
    Slot::BOTH.into_iter().map(open).collect()
}

fn container_drift(name: &str, found: Option<&Found>, recorded: Option<&str>) -> Option<Drift> {
    match found {
        None => Some(Drift::new(format!("container {name} is gone"), "zd deploy VERSION to its slot")),
        Some(found) if !found.running => {
            Some(Drift::new(format!("container {name} does not run"), format!("docker start {}", found.name)))
        }
        Some(found) if Some(found.digest.as_str()) != recorded => {
            let (version, digest, recorded) = (&found.version, &found.digest, recorded.unwrap_or("nothing"));
            let what = format!("container {name} runs {version} ({digest}), recorded is {recorded}");
            Some(Drift::new(what, "somebody changed it by hand: zd deploy VERSION to its slot"))
        }
        Some(_) => None,
    }
}

/// A plain table: columns aligned, no lines (also with Korean text).
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header.map(str::to_owned));
    table
}

fn text(r: &Report) -> String {
    let mut out = format!("{} on {}\n", r.bundle, r.ip);
    for service in &r.services {
        let since = match (&service.active_since, &service.active_by) {
            (Some(at), Some(by)) => format!(", since {} by {by}", &at[..19.min(at.len())]),
            _ => String::new(),
        };
        out.push_str(&format!(
            "\n{}: {} is active{since}; {} on port {}, standby entry {}\n",
            service.name,
            service.active,
            if service.serving { "serving" } else { "NOT SERVING" },
            service.listen,
            service.standby_listen
        ));
        let mut rows =
            table(["slot", "role", "version", "digest", "health", "since (UTC)", "by", "containers"]);
        for slot in &service.slots {
            let short = |s: &Option<String>, n: usize| {
                s.as_deref().unwrap_or("-").chars().take(n).collect::<String>()
            };
            let digest = slot.digest.as_deref().and_then(|d| d.strip_prefix("sha256:")).map(str::to_owned);
            let running = slot.containers.iter().flatten().filter(|c| c.running).count();
            rows.add_row([
                slot.slot.to_string(),
                slot.role.into(),
                short(&slot.version, 64),
                short(&digest, 12),
                if slot.healthy { "healthy".into() } else { "UNHEALTHY".to_owned() },
                short(&slot.since, 19),
                short(&slot.by, 24),
                format!("{running}/{}", slot.probes.len()),
            ]);
        }
        out.push_str(&format!("{rows}\n"));
        let open = |open: &BTreeMap<Slot, usize>| {
            open.iter().map(|(slot, n)| format!("{n} with {slot}")).collect::<Vec<_>>().join(", ")
        };
        for tcp in &service.tcp {
            out.push_str(&format!(
                "tcp port {} (sessions {}): {}; {} open\n",
                tcp.listen,
                tcp.sessions,
                if tcp.listening { "listening" } else { "NOT LISTENING" },
                open(&tcp.open)
            ));
        }
        for path in &service.long_lived {
            out.push_str(&format!(
                "path {} (sessions {}): {} open\n",
                path.path,
                path.sessions,
                open(&path.open)
            ));
        }
    }
    if let Some(backup) = &r.backup {
        let last = backup.last.as_ref().map_or("none yet".into(), |last| {
            format!("last {} as {}", last.at.strftime("%F %T"), last.file.display())
        });
        let settings = &backup.settings;
        out.push_str(&format!(
            "\nbackups: every {} to {}, {} kept, for {}; {last}\n",
            settings.every,
            settings.to.display(),
            settings.keep,
            settings.recipient
        ));
    }
    let mut rows = table(["component", "version", "state", "for"]);
    for c in &r.components {
        let uptime = c.uptime_s.map_or("-".into(), |s| units::rough(Duration::from_secs(s)));
        rows.add_row([&c.name, c.version.as_deref().unwrap_or("-"), &c.state, &uptime]);
    }
    out.push_str(&format!("\n{rows}\n"));
    if r.drift.is_empty() {
        out.push_str("all is as recorded");
    } else {
        out.push_str("not as recorded:");
        for drift in &r.drift {
            out.push_str(&format!("\n  - {}: {}", drift.what, drift.cure));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_missed_backups_are_too_many() {
        let key = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";
        let settings: Settings = toml::from_str(&format!("recipient = {key:?}")).unwrap();
        let last = serde_json::json!({ "schema": 1, "at": "2026-01-01T02:00:00Z", "file": "x" });
        let last: Last = serde_json::from_value(last).unwrap();
        let late = |now: &str| overdue(&settings, Some(&last), now.parse().unwrap()).unwrap();
        assert_eq!(late("2026-01-03T01:59:00Z"), None);
        assert!(late("2026-01-03T02:01:00Z").is_some());
        // A clock that was set back says nothing.
        assert_eq!(late("2025-01-01T00:00:00Z"), None);
    }
}
