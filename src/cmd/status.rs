//! `zd status`: what runs, since when and by whom, and any difference to what was recorded.

use comfy_table::{Table, presets};
use serde::Serialize;

use crate::bundle::manifest::Service;
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::docker::{Docker, Found};
use crate::host::{paths, systemd};
use crate::ids::{Name, Slot};
use crate::service::health::{self, Probe};
use crate::service::pointer::{self, Pointer};
use crate::service::state::State;
use crate::service::switch;
use crate::ui::Ui;

/// Show what runs here: slots, versions, health, and what is not as it was left
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd status\n  zd status --json | jq '.services[0].slots'")]
pub struct Args {}

#[derive(Serialize)]
pub struct Report {
    pub schema: u32,
    pub bundle: String,
    pub ip: std::net::Ipv4Addr,
    pub components: Vec<Component>,
    pub services: Vec<ServiceReport>,
    /// What is not as it was recorded, each with its cure.
    pub drift: Vec<String>,
}

#[derive(Serialize)]
pub struct Component {
    pub name: String,
    pub state: String,
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
    let mut units = vec!["docker.service".to_owned(), "zd-registry.service".to_owned()];
    units.extend(installed.lock.services.iter().map(|s| paths::nginx_unit(&s.name)));
    let mut components = Vec::new();
    for name in units {
        let state = systemd::state(&name).await?;
        if state != "active" {
            drift.push(format!("{name} is {state}: systemctl start {name}, then journalctl -u {name}"));
        }
        components.push(Component { name, state });
    }
    let docker = match Docker::connect().await {
        Ok(docker) => Some(docker),
        Err(e) => {
            drift.push(format!("{e}; containers that run go on serving"));
            None
        }
    };
    let mut services = Vec::new();
    for service in &installed.lock.services {
        services.push(service_report(installed, service, docker.as_ref(), &mut drift).await?);
    }
    Ok(Report {
        schema: 1,
        bundle: installed.lock.title(),
        ip: installed.host.ip,
        components,
        services,
        drift,
    })
}

async fn service_report(
    installed: &Installed,
    service: &Service,
    docker: Option<&Docker>,
    drift: &mut Vec<String>,
) -> Result<ServiceReport> {
    let name = &service.name;
    let now = pointer::read(name)?;
    let active = now.slot();
    if matches!(now, Pointer::Held(_)) {
        drift.push(format!("{name}: a switch was interrupted while it held requests; {active} serves on: zd switch --to {active}"));
    }
    let state = State::read(name)?;
    let mut slots = Vec::new();
    for slot in Slot::BOTH {
        let recorded = state.slots.get(&slot);
        let probes = health::probe(installed, service, slot).await;
        let mut containers = Vec::new();
        for instance in 1..=service.instances {
            let container = paths::container(name, slot, instance);
            let found = match docker {
                Some(docker) => docker.find(&container).await?,
                None => None,
            };
            if docker.is_some() {
                drift.extend(container_drift(
                    &container,
                    found.as_ref(),
                    recorded.map(|r| r.digest.as_str()),
                ));
            }
            containers.push(found);
        }
        let healthy = probes.iter().all(|p| p.healthy);
        let role = if slot == active { "active" } else { "standby" };
        if !healthy {
            let why = probes.iter().find(|p| !p.healthy).map(|p| p.answer.clone()).unwrap_or_default();
            drift.push(format!(
                "{name} {slot} ({role}) is not healthy ({why}): zd deploy VERSION, or docker logs"
            ));
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
        drift.push(format!(
            "port {} gives {why}: systemctl status {}",
            service.listen,
            paths::nginx_unit(name)
        ));
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
    })
}

fn container_drift(name: &str, found: Option<&Found>, recorded: Option<&str>) -> Option<String> {
    match found {
        None => Some(format!("container {name} is gone: zd deploy VERSION to its slot")),
        Some(found) if !found.running => Some(format!("container {name} does not run: docker start {name}")),
        Some(found) if Some(found.digest.as_str()) != recorded => Some(format!(
            "container {name} runs {} ({}), recorded is {}: somebody changed it by hand",
            found.version,
            found.digest,
            recorded.unwrap_or("nothing")
        )),
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
    }
    let components: Vec<String> = r.components.iter().map(|c| format!("{} {}", c.name, c.state)).collect();
    out.push_str(&format!("\n{}\n", components.join(", ")));
    if r.drift.is_empty() {
        out.push_str("all is as recorded");
    } else {
        out.push_str(&format!("not as recorded:\n  - {}", r.drift.join("\n  - ")));
    }
    out
}
