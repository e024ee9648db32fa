//! `zd upgrade`: from the installed bundle to another one, under load, and back where a gate fails. The way
//! back to a kept generation is the same plan with an earlier lock.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::install::{foreign_docker, states, tell_notes};
use super::verify::{BundleArgs, check_target, verify_blobs};
use super::watched::{self, Seen, Told};
use super::{ChangeArgs, lines};
use crate::apply::{self, Preview};
use crate::backup::Settings;
use crate::bundle::Bundle;
use crate::bundle::Lock;
use crate::bundle::manifest::{ImageRef, Service};
use crate::error::{Code, OrCode, Result};
use crate::facts::{self, Facts};
use crate::host::config::{HostConfig, Installed};
use crate::host::docker::Docker;
use crate::host::firewall::{self, Firewall};
use crate::host::lock::HostLock;
use crate::host::trust::Trust;
use crate::host::{Host, fs, generation, packages, paths};
use crate::ids::{Digest, Name, Slot, Version};
use crate::plan::install::Inputs;
use crate::plan::preflight;
use crate::plan::upgrade as planner;
use crate::plan::{Moved, Standing, Undo};
use crate::receipt;
use crate::service::switch::{self, Request};
use crate::service::{cluster, pointer};
use crate::ui::Ui;

/// Replace the installed bundle by the next one while the services serve; go back where something fails
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  sudo ./zd upgrade --dry-run        what the bundle beside zd would change\n  \
                        sudo ./zd upgrade\n  sudo ./zd upgrade --switch --reason 'patches of the 4th quarter'"
)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Switch each service to its new version when it is healthy in the standby slot
    #[arg(long)]
    switch: bool,
    /// Take a bundle that was packed before one that was installed here already; wants --reason
    #[arg(long)]
    allow_older: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    from: String,
    to: String,
    generation: u32,
    /// What became another, one line each.
    differences: Vec<String>,
    changed: usize,
    same: usize,
    /// Services whose standby holds the bundle's version now.
    deployed: Vec<Deployed>,
    /// With `--switch`: the switches to them.
    switched: Vec<switch::Report>,
    #[serde(flatten)]
    seen: Seen,
    seconds: f64,
    steps: Vec<apply::Done>,
    /// Generations that were removed.
    pruned: Vec<u32>,
    /// What was backed up before it began; none where no key is set on this host.
    backup: Option<PathBuf>,
    /// The page for change control.
    report: Option<PathBuf>,
}

#[derive(Serialize)]
struct Deployed {
    service: Name,
    slot: Slot,
    version: Version,
}

#[derive(Serialize)]
struct DryRun {
    differences: Vec<String>,
    #[serde(flatten)]
    plan: Preview,
}

/// Where to go.
struct Target<'a> {
    verb: &'static str,
    installed: Installed,
    lock_bytes: Vec<u8>,
    bundle: Option<&'a Bundle>,
    /// A run that was interrupted is gone on with.
    resumed: bool,
    /// Also where a newer bundle was installed here already.
    allow_older: bool,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    if args.allow_older && args.change.reason.trim().is_empty() {
        return Err(Code::Usage
            .err("--allow-older without a reason")
            .cure("say why, for the audit log: --reason TEXT"));
    }
    let (bundle, _) = args.bundle.open_for_host()?;
    check_target(&bundle, &facts::target()?)?;
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("upgrade", ui)?) };
    let resumed = receipt::resumed(|header| header.is("upgrade", &bundle.id))?.is_some();
    let from = Installed::require()?;
    if from.host.bundle == bundle.id && !resumed {
        if !args.change.dry_run {
            // An upgrade that was killed behind the end of its receipt did not come to it.
            cluster::tell_all(&from, ui).await?;
        }
        let report = nothing(&from, start);
        ui.report(&report, text);
        return Ok(());
    }
    verify_blobs(&bundle, ui)?;
    ui.done(format!("{} is whole and signed", bundle.lock.title()));
    let host = HostConfig {
        generation: generation::next(&bundle.id)?,
        bundle: bundle.id.clone(),
        ..from.host.clone()
    };
    let target = Target {
        verb: "upgrade",
        installed: Installed::new(host, bundle.lock.clone())?,
        lock_bytes: bundle.lock.to_bytes(),
        bundle: Some(&bundle),
        resumed,
        allow_older: args.allow_older,
    };
    let Some(mut report) = carry_out(&from, &target, &args.change, ui, start).await? else { return Ok(()) };
    Trust::learn(&bundle.lock)?;
    let switched = if args.switch { switch_all(&mut report, &args.change.reason, ui).await } else { Ok(()) };
    ui.report(&report, text);
    switched
}

async fn switch_all(report: &mut Report, reason: &str, ui: &Ui) -> Result<()> {
    let installed = Installed::require()?;
    for deployed in &report.deployed {
        let service = installed.service(Some(&deployed.service))?;
        let request = Request { verb: "switch", reason, cut: false };
        report.switched.push(switch::run(&installed, service, deployed.slot, &request).await?);
        cluster::tell(&installed, &service.name, ui).await?;
    }
    Ok(())
}

/// `zd rollback --generation N`. What the slots hold stays: that has a rollback of its own.
pub async fn back_to(number: u32, change: &ChangeArgs, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    let _lock = if change.dry_run { None } else { Some(HostLock::take("rollback", ui)?) };
    let lock_bytes = generation::lock_bytes(number)?;
    let (lock, id) = (Lock::parse(&lock_bytes)?, Digest::of(&lock_bytes));
    let resumed = receipt::resumed(|header| header.is("rollback", &id))?.is_some();
    let from = Installed::require()?;
    if from.host.generation == number && !resumed {
        if !change.dry_run {
            cluster::tell_all(&from, ui).await?;
        }
        ui.report(&nothing(&from, start), text);
        return Ok(());
    }
    let host = HostConfig { generation: number, bundle: id, ..from.host.clone() };
    let installed = Installed::new(host, lock)?;
    let target = Target { verb: "rollback", installed, lock_bytes, bundle: None, resumed, allow_older: true };
    if let Some(report) = carry_out(&from, &target, change, ui, start).await? {
        ui.report(&report, text);
    }
    Ok(())
}

/// Plans, looks, asks, applies, or goes back. None after a dry run.
async fn carry_out(
    from: &Installed,
    target: &Target<'_>,
    args: &ChangeArgs,
    ui: &Ui,
    start: Instant,
) -> Result<Option<Report>> {
    let installed = &target.installed;
    if !args.dry_run && !target.resumed {
        // Of an upgrade that has ended, whichever way.
        fs::remove_tree(paths::BEFORE.as_ref())?;
        for service in &from.lock.services {
            switch::settle_killed(service).await?;
        }
    }
    let mut states = states(&installed.lock)?;
    let mut filled = Vec::new();
    for service in installed.lock.services.iter().filter(|_| target.bundle.is_some()) {
        let Some(state) = states.get_mut(&service.name) else { continue };
        let reference = ImageRef { name: service.image.clone(), version: service.version.clone() };
        let Some(image) = installed.lock.image(&reference) else { continue };
        if from.lock.service(&service.name).is_none() {
            continue;
        }
        let active = pointer::read(&service.name)?.slot();
        if state.slots.get(&active).is_some_and(|held| held.digest == image.manifest) {
            continue;
        }
        if let Some(held) = state.slots.get_mut(&active.other()) {
            (held.version, held.digest) = (service.version.clone(), image.manifest.clone());
            filled.push((service, active.other()));
        }
    }
    let packages = moved(from, &installed.lock, ui).await?;
    let facts = Facts::gather().await?;
    let foreign_docker = foreign_docker(&facts)?;
    let mut findings = preflight::host(&facts);
    findings.push(preflight::address(&facts, from.host.ip, false));
    findings.extend(preflight::another(&facts, installed, target.bundle.is_some()));
    let (open_firewall, opened) = opened(&facts)?;
    let in_use = |port: &u16| installed.lock.client_ports().any(|p| p == *port);
    if open_firewall.is_none()
        && !installed.lock.client_ports().all(|p| from.lock.client_ports().any(|b| b == p))
    {
        findings.extend(preflight::firewall(&facts, &installed.lock));
    }
    if !target.resumed {
        // A daemon that a killed run has just restarted does not know its tokens yet.
        findings.extend(preflight::stores(from).await?);
    }
    let trust = Trust::read()?;
    let newest = trust.newest().map_or(from.lock.created, |newest| newest.max(from.lock.created));
    if let Some(older) = planner::older(newest, &installed.lock) {
        match target.allow_older {
            true if target.bundle.is_some() => ui.warn(format!("{}; allowed: {}", older.what, args.reason)),
            true => {}
            false => findings.push(older),
        }
    }
    findings.extend(planner::obstacles(&from.lock, &installed.lock, &packages));
    findings.extend(match target.bundle {
        Some(_) => planner::closes(&from.lock, &installed.lock),
        None => {
            let later = generation::later(installed.host.generation)?;
            planner::way_back(&from.lock, &installed.lock, &later)
        }
    });
    // An earlier generation is gone back to on purpose.
    findings.retain(|f| target.bundle.is_some() || ![planner::SEQUENCE, planner::DROPPED].contains(&f.name));
    if let Some(bundle) = target.bundle.filter(|_| !target.resumed) {
        findings.extend(preflight::room(&bundle.lock, Some(&from.lock))?);
    }
    tell_notes(&findings, ui);
    let differences = planner::differences(&from.lock, &installed.lock, &packages);
    let inputs = Inputs {
        installed,
        pin: target.bundle.map(|bundle| &bundle.key).filter(|_| trust.keys().is_empty()),
        lock_bytes: String::from_utf8(target.lock_bytes.clone())
            .or_code(Code::Bug, "the lock is not text")?,
        foreign_docker,
        states,
        open_firewall,
        backup: Settings::read(&installed.lock)?,
        restored: None,
    };
    let change = planner::Change {
        verb: target.verb,
        from,
        packages,
        carried: target.bundle.is_some(),
        filled: filled.clone(),
        dropped: if target.bundle.is_none() { dropped(&installed.lock)? } else { Vec::new() },
        shut: opened.into_iter().filter(|port| !in_use(port)).collect(),
        standing: standing(from, &filled).await?,
    };
    let plan = planner::plan(&inputs, change)?;
    let host = Host { bundle: target.bundle, coming: Some(installed), ..Host::new(ui) };
    if args.dry_run {
        let dry_run = DryRun { plan: apply::preview(&plan, &host).await?, differences };
        ui.report(&dry_run, |d| format!("{}{}", lines(&d.differences), d.plan.text()));
        preflight::refuse(&findings)?;
        return Ok(None);
    }
    preflight::refuse(&findings)?;
    for line in &differences {
        ui.say(line);
    }
    ui.confirm(&format!("{} {} while it serves?", target.verb, plan.about), args.yes)?;

    let saved = if target.bundle.is_some() && !target.resumed {
        back_up(from, &args.reason, ui).await?
    } else {
        None
    };
    let told = Told {
        detail: format!("{} generation {}", plan.about, installed.host.generation),
        differences: &differences,
        reason: &args.reason,
        before: format!("generation {}", from.host.generation),
        numbers: saved.iter().map(|file| ("backup before", file.display().to_string())).collect(),
    };
    let applied = watched::apply(&plan, host, from, &installed.host.bundle, told).await?;
    fs::remove_tree(paths::BEFORE.as_ref())?;
    let pruned = generation::prune(from.host.generation)?;
    cluster::tell_all(installed, ui).await?;
    Ok(Some(Report {
        from: from.lock.title(),
        to: installed.lock.title(),
        generation: installed.host.generation,
        differences,
        changed: applied.summary.done.len(),
        same: applied.summary.same,
        deployed: filled
            .iter()
            .map(|(s, slot)| Deployed { service: s.name.clone(), slot: *slot, version: s.version.clone() })
            .collect(),
        switched: Vec::new(),
        seen: applied.seen,
        seconds: start.elapsed().as_secs_f64(),
        steps: applied.summary.done,
        pruned,
        backup: saved,
        report: Some(applied.page),
    }))
}

/// Backs this host up, where a key is set. Where none is, that is said and nothing waits for it.
async fn back_up(from: &Installed, reason: &str, ui: &Ui) -> Result<Option<PathBuf>> {
    let Some(settings) = Settings::read(&from.lock)? else {
        let e = super::backup::no_key();
        ui.warn(format!("no backup is taken before: {} ({})", e.what, e.cure.unwrap_or_default()));
        return Ok(None);
    };
    let saved = super::backup::take(from, &settings, reason, ui).await.map_err(|e| {
        let cure = e.cure.clone().unwrap_or_default();
        e.during("the backup before the upgrade").cure(format!("nothing was changed; {cure}"))
    })?;
    ui.done(format!("backup {}", saved.file.display()));
    Ok(Some(saved.file))
}

fn nothing(installed: &Installed, start: Instant) -> Report {
    Report {
        from: installed.lock.title(),
        to: installed.lock.title(),
        generation: installed.host.generation,
        differences: Vec::new(),
        changed: 0,
        same: 0,
        deployed: Vec::new(),
        switched: Vec::new(),
        seen: Seen::default(),
        seconds: start.elapsed().as_secs_f64(),
        steps: Vec::new(),
        pruned: Vec::new(),
        backup: None,
        report: None,
    }
}

fn text(r: &Report) -> String {
    if r.changed == 0 {
        return format!("{} is installed already, as generation {}: nothing was changed", r.to, r.generation);
    }
    let switched: Vec<String> = r.switched.iter().map(|s| super::switch::text(s) + "\n").collect();
    let next = match r.deployed.as_slice() {
        deployed if deployed.is_empty() || !switched.is_empty() => "zd status".into(),
        [one] => format!("zd switch    moves the traffic to {} {} in {}", one.service, one.version, one.slot),
        many => many.iter().map(|d| format!("zd switch {}", d.service)).collect::<Vec<_>>().join(", "),
    };
    let text = format!(
        "{} is generation {} now ({:.1} s, {} steps done, {} found)\nwatched  {}\n\
         backup   {}\nreport   {}\nnext     {next}\nback     zd rollback --generation N (zd generations lists them)",
        r.to,
        r.generation,
        r.seconds,
        r.changed,
        r.same,
        r.seen,
        r.backup.as_deref().unwrap_or(Path::new("none")).display(),
        r.report.as_deref().unwrap_or(Path::new("-")).display()
    );
    switched.concat() + &text
}

/// Packages that zd brought and that the other lock carries in another version. One whose version is not
/// what this generation brought was changed by somebody else, and there would be no way back: it stays.
async fn moved(from: &Installed, to: &Lock, ui: &Ui) -> Result<Vec<Moved>> {
    let receipts = receipt::all()?;
    let brought: Vec<&String> = receipt::undos(&receipts)
        .filter_map(|undo| match undo {
            Undo::Purge { packages, .. } => Some(packages),
            _ => None,
        })
        .flatten()
        .collect();
    let mut moved = Vec::new();
    for deb in to.debs.iter().filter(|d| brought.contains(&&d.name)) {
        let Some(here) = packages::version_of(&deb.name).await?.filter(|v| *v != deb.version) else {
            continue;
        };
        if from.lock.debs.iter().any(|d| d.name == deb.name && d.version == here) {
            moved.push(Moved { name: deb.name.clone(), from: here, to: deb.version.clone() });
        } else {
            ui.warn(format!("package {} {here} is not what zd brought: it is left as it is", deb.name));
        }
    }
    Ok(moved)
}

/// Services of kept generations that have a folder here, and that the lock has not: also those of a way back that was
/// broken off.
fn dropped(lock: &Lock) -> Result<Vec<Name>> {
    let kept = generation::locks()?;
    let services = kept.iter().flat_map(|(_, kept, _)| &kept.services).map(|service| &service.name);
    let gone: BTreeSet<&Name> =
        services.filter(|name| lock.service(name).is_none() && paths::service(name).exists()).collect();
    Ok(gone.into_iter().cloned().collect())
}

/// The firewall that is active, where zd has opened ports in it, and those that it remembers.
fn opened(facts: &Facts) -> Result<(Option<Firewall>, BTreeSet<u16>)> {
    let mut ports = BTreeSet::new();
    let opened = match &facts.firewall {
        None => false,
        Some(Firewall::Nftables { .. }) => Path::new(paths::UNITS).join(firewall::UNIT).exists(),
        Some(Firewall::Manager(manager)) => {
            for undo in receipt::undos(&receipt::all()?) {
                match undo {
                    Undo::CloseFirewall { kind, port } if kind == manager => ports.insert(*port),
                    Undo::OpenFirewall { kind, port } if kind == manager => ports.remove(port),
                    _ => continue,
                };
            }
            !ports.is_empty()
        }
    };
    Ok((facts.firewall.clone().filter(|_| opened), ports))
}

/// Containers at work in slots that are not to change.
pub async fn standing(from: &Installed, filled: &[(&Service, Slot)]) -> Result<Vec<Standing>> {
    let docker = Docker::connect().await?;
    let mut standing = Vec::new();
    for service in &from.lock.services {
        let changes = |slot: &Slot| filled.iter().any(|(s, filled)| s.name == service.name && filled == slot);
        for slot in Slot::BOTH.into_iter().filter(|slot| !changes(slot)) {
            standing.extend(docker.standing(&service.name, slot).await?);
        }
    }
    Ok(standing)
}
