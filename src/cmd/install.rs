//! `zd install`: open -> verify -> facts -> preflight -> plan -> confirm -> apply.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::ChangeArgs;
use super::verify::{BundleArgs, check_target, verify_blobs};
use crate::apply;
use crate::audit::{self, Event};
use crate::backup::Settings;
use crate::bundle::manifest::REGISTRY_PORT;
use crate::bundle::{Bundle, Lock};
use crate::error::{Code, OrCode, Result};
use crate::facts::{self, Facts};
use crate::host::config::{HostConfig, Installed};
use crate::host::lock::HostLock;
use crate::host::trust::Trust;
use crate::host::{Host, paths, signing};
use crate::ids::{Digest, Name};
use crate::plan::preflight::{self, Finding};
use crate::plan::{Undo, install as planner};
use crate::receipt::{self, Receipt};
use crate::service::cluster;
use crate::service::state::State;
use crate::ui::Ui;

/// Install a bundle: registry, Docker, nginx, the full stack if the bundle has it, and the services
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  sudo ./zd install --ip auto            the bundle beside zd\n  \
                        sudo ./zd install --ip 10.4.0.17 --dry-run")]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Address that clients use: `auto`, or one of this host's
    #[arg(long, default_value = "auto", value_name = "auto|ADDRESS")]
    ip: String,
    /// Port of the private registry [default: 5443]
    #[arg(long, value_name = "PORT")]
    registry_port: Option<u16>,
    /// First two octets of the containers' own network; chosen where not given
    #[arg(long, value_name = "A.B")]
    subnet: Option<String>,
    /// Open the services' ports in the host's firewall
    #[arg(long)]
    open_firewall: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    bundle: String,
    id: Digest,
    ip: Ipv4Addr,
    changed: usize,
    same: usize,
    seconds: f64,
    /// What was done, and how long each took.
    steps: Vec<apply::Done>,
    urls: Vec<String>,
    /// Id of the key that this host signs its log and its reports with.
    signing_key: Option<String>,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    asked_ip(&args.ip)?;
    let (bundle, trust) = args.bundle.open_for_host()?;
    check_target(&bundle, &facts::target()?)?;
    if trust == super::verify::Trust::FirstUse {
        ui.warn(format!(
            "trusting the key beside the bundle from now on; its fingerprint: {}",
            bundle.key.fingerprint()
        ));
    }
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("install", ui)?) };
    let unfinished = receipt::unfinished()?;
    refuse_other(&bundle, unfinished.as_ref())?;
    verify_blobs(&bundle, ui)?;
    ui.done(format!("{} is whole and signed", bundle.lock.title()));

    let facts = Facts::gather().await?;
    let known = known_config(&bundle)?;
    let installed = Installed::new(decide(&args, &facts, &bundle, known.as_ref(), ui)?, bundle.lock.clone())?;
    let foreign_docker = foreign_docker(&facts)?;
    let mut findings = preflight::host(&facts);
    findings.extend(assess(&bundle, &facts, &installed.host, foreign_docker, known.is_none())?);
    if let Some(present) = Installed::read()? {
        findings.extend(preflight::stores(&present).await?);
    }
    tell_notes(&findings, ui);
    let open_firewall = facts.firewall.filter(|_| args.open_firewall);
    let inputs = planner::Inputs {
        installed: &installed,
        pin: Trust::read()?.keys().is_empty().then_some(&bundle.key),
        lock_bytes: planner::lock_text(&bundle.lock)?,
        foreign_docker,
        states: states(&bundle.lock)?,
        open_firewall,
        backup: Settings::read(&bundle.lock)?,
        restored: None,
    };
    let plan = planner::plan(&inputs)?;
    let host = Host { bundle: Some(&bundle), ..Host::new(ui) };
    if args.change.dry_run {
        let preview = apply::preview(&plan, &host).await?;
        ui.report(&preview, apply::Preview::text);
        return preflight::refuse(&findings);
    }
    preflight::refuse(&findings)?;
    if known.is_none() {
        ui.confirm(
            &format!("install {} on this host as {}?", bundle.lock.title(), installed.host.ip),
            args.change.yes,
        )?;
    }
    let summary = match apply::apply(&plan, &host, Some(&bundle.id)).await {
        Ok(summary) => summary,
        Err(e) => {
            let (reason, detail) = (&args.change.reason, e.what.clone());
            audit::append(Event { verb: "install", outcome: "failed", reason, detail, ..Event::default() })?;
            let go_on =
                "mend it and run the same command again (it goes on where it stopped), or go back: zd undo";
            return Err(if e.cure.is_some() { e } else { e.cure(go_on) });
        }
    };
    if !summary.done.is_empty() {
        let detail = format!("{} {} {}", bundle.lock.title(), bundle.id, installed.host.ip);
        audit::append(Event {
            verb: "install",
            outcome: "done",
            reason: &args.change.reason,
            detail,
            ..Event::default()
        })?;
    }
    Trust::learn(&bundle.lock)?;
    cluster::tell_all(&installed, ui).await?;
    let report = Report {
        bundle: bundle.lock.title(),
        id: bundle.id.clone(),
        ip: installed.host.ip,
        changed: summary.done.len(),
        same: summary.same,
        seconds: start.elapsed().as_secs_f64(),
        steps: summary.done,
        urls: installed.urls(),
        signing_key: signing::key().map(|key| key.id()),
    };
    ui.report(&report, text);
    Ok(())
}

fn text(r: &Report) -> String {
    if r.changed == 0 {
        return format!(
            "{} is installed as it should be: {} of {} steps found as they are, nothing was changed ({:.1} s)",
            r.bundle, r.same, r.same, r.seconds
        );
    }
    let urls: Vec<String> = r.urls.iter().map(|u| format!("\nserving  {u}")).collect();
    format!(
        "installed {} in {:.1} s ({} steps done, {} found){}\nsigns    with key {} (change control needs {})\n\
         next     zd status, then zd deploy VERSION",
        r.bundle,
        r.seconds,
        r.changed,
        r.same,
        urls.concat(),
        r.signing_key.as_deref().unwrap_or("-"),
        paths::SIGNING_PUB
    )
}

/// What speaks for and against this bundle on this host.
pub fn assess(
    bundle: &Bundle,
    facts: &Facts,
    host: &HostConfig,
    foreign_docker: bool,
    fresh: bool,
) -> Result<Vec<Finding>> {
    let wants = preflight::Wants {
        lock: &bundle.lock,
        ip: host.ip,
        registry_port: host.registry_port,
        packages_installed: installed_size(bundle)?,
        foreign_docker,
        fresh,
    };
    preflight::bundle(facts, &wants)
}

/// As an `install --ip auto` of this bundle would find it; for `zd doctor`.
pub fn assess_before(bundle: &Bundle, facts: &Facts) -> Result<Vec<Finding>> {
    let host = HostConfig {
        schema: 1,
        ip: facts.auto_ip()?.ip,
        node: None,
        subnet: free_subnet(facts)?,
        registry_port: REGISTRY_PORT,
        former_registries: Vec::new(),
        generation: 1,
        bundle: bundle.id.clone(),
    };
    let foreign_docker = foreign_docker(facts)?;
    assess(bundle, facts, &host, foreign_docker, true)
}

/// What the slots of the bundle's services hold by now; nothing before the first install.
pub fn states(lock: &Lock) -> Result<BTreeMap<Name, State>> {
    let names = lock.services.iter().map(|s| s.name.clone());
    names.map(|name| Ok((name.clone(), State::read(&name)?))).collect()
}

/// One bundle at a time: another one is an upgrade, or waits until this one is finished or undone.
fn refuse_other(bundle: &Bundle, unfinished: Option<&Receipt>) -> Result<()> {
    let other = |r: &&Receipt| r.header.verb != "install" || r.header.bundle.as_ref() != Some(&bundle.id);
    if let Some(r) = unfinished.filter(other) {
        return Err(Code::Unfinished
            .err(format!("an interrupted {} of {} stands in the way", r.header.verb, r.header.about))
            .cure("finish it by running it again with the same bundle, or go back: zd undo"));
    }
    match Installed::read()? {
        Some(i) if i.host.bundle != bundle.id => Err(Code::OtherBundle
            .err(format!("{} is installed here, this bundle is {}", i.lock.title(), bundle.lock.title()))
            .cure("zd upgrade replaces it by this one, with the services at work")),
        _ => Ok(()),
    }
}

/// What an earlier run of this very install decided.
fn known_config(bundle: &Bundle) -> Result<Option<HostConfig>> {
    Ok(HostConfig::read()?.filter(|config| config.bundle == bundle.id))
}

/// What `--ip` asks for; None is `auto`.
pub fn asked_ip(ip: &str) -> Result<Option<Ipv4Addr>> {
    if ip == "auto" {
        return Ok(None);
    }
    ip.parse().map(Some).map_err(|_| {
        Code::Usage
            .err(format!("--ip {ip:?} is not an IPv4 address"))
            .cure("--ip auto, or one of this host's addresses")
    })
}

/// The address that was asked for, or the one that `auto` finds.
pub fn address(asked: Option<Ipv4Addr>, facts: &Facts, ui: &Ui) -> Result<Ipv4Addr> {
    if let Some(ip) = asked {
        return Ok(ip);
    }
    let found = facts.auto_ip()?;
    ui.say(format!("address {} of {}", found.ip, found.name));
    Ok(found.ip)
}

fn decide(
    args: &Args,
    facts: &Facts,
    bundle: &Bundle,
    known: Option<&HostConfig>,
    ui: &Ui,
) -> Result<HostConfig> {
    let asked = asked_ip(&args.ip)?;
    let subnet = args.subnet.as_deref().map(check_subnet).transpose()?;
    if let Some(known) = known {
        refuse_moved(known, asked, args.registry_port, subnet)?;
        return Ok(known.clone());
    }
    Ok(HostConfig {
        schema: 1,
        ip: address(asked, facts, ui)?,
        node: None,
        subnet: subnet.map_or_else(|| free_subnet(facts), Ok)?,
        registry_port: args.registry_port.unwrap_or(REGISTRY_PORT),
        former_registries: Vec::new(),
        generation: 1,
        bundle: bundle.id.clone(),
    })
}

/// An install that runs again keeps what the first decided.
fn refuse_moved(
    known: &HostConfig,
    ip: Option<Ipv4Addr>,
    registry_port: Option<u16>,
    subnet: Option<String>,
) -> Result<()> {
    let installed = Path::new(paths::CURRENT).exists();
    let refuse = |what: &str, is: String, flag: String, cure: &str| {
        let cure = if installed { cure.to_owned() } else { format!("leave {flag} away, or zd undo first") };
        Err(Code::Usage.err(format!("this host was set up with {what} {is}, asked for is {flag}")).cure(cure))
    };
    if let Some(ip) = ip.filter(|ip| *ip != known.ip) {
        return refuse(
            "address",
            known.ip.to_string(),
            format!("--ip {ip}"),
            &format!("zd reconfigure --ip {ip}"),
        );
    }
    if let Some(port) = registry_port.filter(|port| *port != known.registry_port) {
        let flag = format!("--registry-port {port}");
        let cure = format!("zd reconfigure {flag}");
        return refuse("registry port", known.registry_port.to_string(), flag, &cure);
    }
    if let Some(subnet) = subnet.filter(|subnet| *subnet != known.subnet) {
        let cure =
            "leave --subnet away; another network moves every container: zd uninstall, then zd install";
        return refuse("subnet", known.subnet.clone(), format!("--subnet {subnet}"), cure);
    }
    Ok(())
}

fn check_subnet(given: &str) -> Result<String> {
    let octets: Vec<Option<u8>> = given.split('.').map(|o| o.parse().ok()).collect();
    match octets.as_slice() {
        [Some(a), Some(b)] if *a > 0 && *a < 224 && *a != 127 => Ok(format!("{a}.{b}")),
        _ => Err(Code::Usage
            .err(format!("--subnet {given:?}: expected two octets"))
            .cure("for instance --subnet 10.213")),
    }
}

/// A private /16 that no route of this host overlaps.
fn free_subnet(facts: &Facts) -> Result<String> {
    let candidates = ["172.31", "172.30", "172.29", "172.28", "10.213", "10.214", "10.215"];
    let overlaps = |candidate: &str| {
        let net: Ipv4Addr = format!("{candidate}.0.0").parse().unwrap_or(Ipv4Addr::UNSPECIFIED);
        facts.routes.iter().any(|(dest, bits)| {
            let mask = u32::MAX.checked_shl(32 - u32::from((*bits).min(16))).unwrap_or(0);
            u32::from(*dest) & mask == u32::from(net) & mask
        })
    };
    candidates.into_iter().find(|c| !overlaps(c)).map(str::to_owned).ok_or_else(|| {
        Code::Preflight
            .err("every network zd would take for containers overlaps a route of this host")
            .cure("name one that is free in this plant: --subnet A.B (a /16)")
    })
}

/// What is worth knowing of a host, and no reason to stop.
pub fn tell_notes(findings: &[Finding], ui: &Ui) {
    for note in findings.iter().filter(|f| f.good.is_none()) {
        ui.warn(format!("{}: {} ({})", note.name, note.what, note.cure));
    }
}

/// Docker is here, and no receipt of ours says that we brought it.
pub fn foreign_docker(facts: &Facts) -> Result<bool> {
    let ours = |r: &Receipt| {
        r.steps.iter().any(|i| {
            matches!(&i.undo, Undo::Purge { packages, .. } if !i.undone && packages.iter().any(|p| p.starts_with("docker.io") || p.starts_with("docker-ce")))
        })
    };
    Ok(facts.programs.contains_key("dockerd") && !receipt::all()?.iter().any(ours))
}

/// Sum of the Installed-Size fields of the carried packages (deb-control(5), in KiB).
fn installed_size(bundle: &Bundle) -> Result<u64> {
    let Some(index) = &bundle.lock.apt_index else { return Ok(0) };
    let text = String::from_utf8(bundle.small_blob(index)?).or_code(Code::Bundle, "the apt index")?;
    let sizes = text.lines().filter_map(|l| l.strip_prefix("Installed-Size: ")?.trim().parse::<u64>().ok());
    Ok(sizes.fold(0u64, u64::saturating_add).saturating_mul(1024))
}
