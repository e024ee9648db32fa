//! `zd restore`: what a backup holds, put back on the host it is of, or on a bare one in its place.
//! open (every byte is checked) -> facts -> what stands in the way -> plan -> confirm -> apply.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bytesize::ByteSize;
use jiff::Timestamp;
use serde::Serialize;

use super::ChangeArgs;
use super::install::{assess, foreign_docker, tell_notes};
use super::verify::{BundleArgs, check_target, verify_blobs};
use crate::apply::{self, Summary};
use crate::audit::{self, Event};
use crate::backup::{Backup, Settings, key};
use crate::bundle::Bundle;
use crate::bundle::signature::Key;
use crate::error::{At, Code, Error, OrCode, Result};
use crate::facts::{self, Facts};
use crate::host::config::{HostConfig, Installed};
use crate::host::docker::Docker;
use crate::host::lock::HostLock;
use crate::host::trust::{self, Trust};
use crate::host::{Host, fs, generation, paths, signing};
use crate::ids::{Digest, Name, Slot, Version};
use crate::plan::Plan;
use crate::plan::install::{self, Inputs};
use crate::plan::preflight::{self, Finding};
use crate::plan::restore::{self as planner, Present, Serving};
use crate::receipt::{self, Receipt};
use crate::service::state::State;
use crate::service::{cluster, pointer};
use crate::ui::Ui;

/// Where secrets are, beneath /etc/zd; beside them the private parts of configurations.
const SECRETS: [&str; 3] = ["tls", "registry", "secrets"];

/// Put a backup back: onto the same host, which serves on, or onto a bare one from the stick of its bundle
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  sudo zd restore /media/stick/zd-node-10-4-0-17-20260101T020000Z.tar.age --identity zd-backup.key\n  \
                        sudo ./zd restore FILE --identity zd-backup.key --host-key host.pub    onto a bare host\n  \
                        zd restore FILE --identity zd-backup.key --dry-run\n\n\
                        A bare host needs the address that the backup is of, the key of the host that made it, and the bundle that was installed beside zd."
)]
pub struct Args {
    /// The backup
    file: PathBuf,
    /// Secret key of backups, as `zd keygen --backup` wrote it
    #[arg(long, value_name = "FILE")]
    identity: PathBuf,
    /// For a bare host: the key of the host that made the backup, its host.pub or the line in it. An installed host
    /// knows its own
    #[arg(long, value_name = "FILE|KEY")]
    host_key: Option<String>,
    /// For a bare host: the bundle that was installed, its file or folder; the one beside zd where not given
    #[arg(long, value_name = "PATH")]
    bundle: Option<PathBuf>,
    /// For a bare host: open the services' ports in its firewall
    #[arg(long)]
    open_firewall: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    backup: PathBuf,
    /// When it was taken.
    at: Timestamp,
    /// By whom, and the key of the host that signed it.
    by: String,
    signed_by: String,
    /// Nothing was installed here before.
    bare: bool,
    ip: Ipv4Addr,
    bundle: String,
    services: Vec<Restored>,
    changed: usize,
    same: usize,
    seconds: f64,
    steps: Vec<apply::Done>,
}

#[derive(Serialize)]
struct Restored {
    name: Name,
    active: Slot,
    versions: BTreeMap<Slot, Version>,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    let identity = key::read_identity(&args.identity)?;
    let signers = signers(&args, is_bare())?;
    let size = std::fs::metadata(&args.file).at(&args.file)?.len();
    let bar = ui.bytes("check the backup", size);
    let opened = Backup::open(&args.file, identity, &signers, |n| bar.inc(n));
    bar.finish_and_clear();
    let backup = opened?;
    let index = &backup.index;
    ui.done(format!(
        "backup of {} ({}), taken {} by {}, is whole and signed with the host's key {}",
        index.hostname,
        index.host.ip,
        index.at,
        index.by,
        backup.signed_by.id()
    ));
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("restore", ui)?) };
    let resumed = receipt::resumed(|header| header.is("restore", &index.host.bundle))?;
    let bare = is_bare();
    // Keys of its own that a host trusts stay. Half of those that this very restore brings are not its own.
    let brought =
        |r: &Receipt| r.steps.iter().any(|s| s.step.starts_with(install::TRUSTED_KEYS) && !s.undone);
    let trusts = !Trust::read()?.keys().is_empty() && !resumed.is_some_and(|r| brought(&r));
    let summary = match bare {
        true => onto_bare(&args, &backup, trusts, ui).await?,
        false => onto_same(&args, &backup, trusts, ui).await?,
    };
    let Some(summary) = summary else { return Ok(()) };
    let installed = Installed::require()?;
    cluster::tell_all(&installed, ui).await?;
    let versions =
        |state: &State| state.slots.iter().map(|(slot, held)| (*slot, held.version.clone())).collect();
    let restored = index.services.iter();
    let restored =
        restored.map(|s| Restored { name: s.name.clone(), active: s.active, versions: versions(&s.state) });
    let report = Report {
        backup: args.file,
        at: index.at,
        by: index.by.clone(),
        signed_by: backup.signed_by.id(),
        bare,
        ip: index.host.ip,
        bundle: index.bundle.clone(),
        services: restored.collect(),
        changed: summary.done.len(),
        same: summary.same,
        seconds: start.elapsed().as_secs_f64(),
        steps: summary.done,
    };
    ui.report(&report, text);
    Ok(())
}

fn text(r: &Report) -> String {
    if r.changed == 0 {
        return format!("all is as the backup of {} says: nothing was changed ({:.1} s)", r.at, r.seconds);
    }
    let services = r.services.iter().map(|s| {
        let slots = s.versions.iter().map(|(slot, version)| format!("{slot} {version}")).collect::<Vec<_>>();
        format!("\n{}  {}, {} is active", s.name, slots.join(", "), s.active)
    });
    format!(
        "{} on {} is as it was at {} ({:.1} s, {} steps done, {} found){}\n\
         backup  taken by {}, signed with the host's key {}\nnext    zd status",
        r.bundle,
        r.ip,
        r.at,
        r.seconds,
        r.changed,
        r.same,
        services.collect::<String>(),
        r.by,
        r.signed_by
    )
}

fn states(backup: &Backup) -> BTreeMap<Name, State> {
    backup.index.services.iter().map(|s| (s.name.clone(), s.state.clone())).collect()
}

fn is_bare() -> bool {
    !Path::new(paths::CURRENT).exists()
}

/// Keys that may have signed the backup. Anybody can encrypt one to the public key, so a host takes none but its own;
/// a bare one knows none, and what lies beside or in the backup proves nothing.
fn signers(args: &Args, bare: bool) -> Result<Vec<Key>> {
    let named = args.host_key.as_deref().map(|text| Key::given("--host-key", text)).transpose()?;
    let own = if bare { Vec::new() } else { signing::keys() };
    match named {
        None if own.is_empty() => Err(Code::Usage
            .err("nothing on this host says which host's backups it may take")
            .cure(format!(
                "name the key of the host that was backed up, as it was taken from its {} or as its `zd backup` said: \
                 --host-key FILE|KEY",
                paths::SIGNING_PUB
            ))),
        None => Ok(own),
        Some(named) if own.is_empty() || own.contains(&named) => Ok(vec![named]),
        Some(named) => Err(Code::Signature
            .err(format!("--host-key: {} is no key that this host has or had; nothing was changed", named.id()))
            .cure("leave it away: an installed host takes its own backups, and only those")),
    }
}

/// Keys that may have signed the bundle of the backup. Its digest stands in the backup, so one that is revoked by now
/// does as well.
fn trusted(backup: &Backup) -> Result<Vec<Key>> {
    let of = |entry: &crate::backup::index::Entry| Some((entry.place(), backup.member(&entry.path)?));
    let files: Vec<_> = backup.index.beneath(Path::new(paths::TRUST)).filter_map(of).collect();
    let keys = trust::of_backup(files.iter().map(|(path, bytes)| (path.as_path(), *bytes)))?;
    match keys.is_empty() {
        false => Ok(keys),
        true => Err(Code::Bundle
            .err(format!("the backup has no keys of {}", paths::TRUST))
            .cure("take an earlier backup")),
    }
}

/// How the host was backed up.
fn settings(backup: &Backup) -> Result<Option<Settings>> {
    match backup.file(Path::new(paths::BACKUP_TOML)) {
        Some(bytes) => Settings::parse(bytes).map(Some),
        None => Ok(backup.lock.backup.clone()),
    }
}

/// An install whose secrets, state, pointers and records are those of the backup.
async fn onto_bare(args: &Args, backup: &Backup, trusts: bool, ui: &Ui) -> Result<Option<Summary>> {
    let asked = BundleArgs { bundle: args.bundle.clone(), key: None };
    let bundle = asked.open_with(&trusted(backup)?).map_err(|e| needs_bundle(backup, e))?;
    check_bundle(backup, &bundle)?;
    check_target(&bundle, &facts::target()?)?;
    verify_blobs(&bundle, ui)?;
    ui.done(format!("{} is whole and signed with a key that the host trusted", bundle.lock.title()));
    let facts = Facts::gather().await?;
    let installed = backup.installed();
    let ip = installed.host.ip;
    if !facts.has_ip(ip) {
        let have: Vec<String> = facts.interfaces.iter().map(|i| i.ip.to_string()).collect();
        return Err(Code::Preflight
            .err(format!("the backup is of the host {ip}, this one has {}; nothing was changed", have.join(", ")))
            .cure(format!(
                "give this host the address first (the other one must be off): ip address add {ip}/BITS dev INTERFACE, \
                 and in the site's network configuration"
            )));
    }
    let foreign_docker = foreign_docker(&facts)?;
    let fresh = HostConfig::read()?.is_none();
    let mut findings = preflight::host(&facts);
    findings.push(room(backup)?);
    findings.extend(assess(&bundle, &facts, &installed.host, foreign_docker, fresh)?);
    tell_notes(&findings, ui);
    let plan = install::plan(&Inputs {
        installed: &installed,
        pin: (!trusts).then_some(&bundle.key),
        lock_bytes: install::lock_text(&bundle.lock)?,
        foreign_docker,
        states: states(backup),
        open_firewall: facts.firewall.filter(|_| args.open_firewall),
        backup: settings(backup)?,
        restored: Some(&backup.index),
    })?;
    let host = Host { bundle: Some(&bundle), backup: Some(backup), ..Host::new(ui) };
    if args.change.dry_run {
        return preview(&plan, &host, ui).await.and_then(|()| preflight::refuse(&findings)).map(|()| None);
    }
    preflight::refuse(&findings)?;
    let question =
        format!("make this host {} with {}, as it was at {}?", ip, bundle.lock.title(), backup.index.at);
    ui.confirm(&question, args.change.yes)?;
    let applied = apply::apply(&plan, &host, Some(&bundle.id)).await;
    finish(args, backup, applied, ui).await.map(Some).map_err(|e| {
        let go_on =
            "mend it and run the same command again (it goes on where it stopped), or go back: zd undo";
        if e.cure.is_some() { e } else { e.cure(go_on) }
    })
}

fn needs_bundle(backup: &Backup, e: Error) -> Error {
    let (title, id) = (&backup.index.bundle, &backup.index.host.bundle);
    Error {
        cure: Some(format!(
            "a bare host is restored from the stick of {title} ({id}): run the zd there, or --bundle FILE"
        )),
        ..e
    }
}

fn check_bundle(backup: &Backup, bundle: &Bundle) -> Result<()> {
    let wanted = &backup.index.host.bundle;
    if bundle.id == *wanted {
        return Ok(());
    }
    let what = format!(
        "the backup is of a host with {} ({wanted}), this bundle is {} ({})",
        backup.index.bundle,
        bundle.lock.title(),
        bundle.id
    );
    Err(needs_bundle(backup, Code::Bundle.err(what)))
}

/// Back to what the backup says, with the services at work.
async fn onto_same(args: &Args, backup: &Backup, trusts: bool, ui: &Ui) -> Result<Option<Summary>> {
    let index = &backup.index;
    check_same(backup)?;
    let installed = backup.installed();
    let present = present(backup, &installed).await?;
    let trusted = trusted(backup)?;
    let host = Host { backup: Some(backup), ..Host::new(ui) };
    let facts = Facts::gather().await?;
    let inputs = Inputs {
        installed: &installed,
        pin: trusted.first().filter(|_| !trusts),
        lock_bytes: text_of(backup)?,
        foreign_docker: foreign_docker(&facts)?,
        states: states(backup),
        open_firewall: None,
        backup: settings(backup)?,
        restored: Some(index),
    };
    let plan = planner::plan(&inputs, &present)?;
    let mut findings = preflight::host(&facts);
    findings.push(room(backup)?);
    if !facts.has_ip(index.host.ip) {
        let what = format!("{} is not on this host any more", index.host.ip);
        findings.push(Finding::bad("address", what, "give it back to an interface"));
    }
    if args.change.dry_run {
        return preview(&plan, &host, ui).await.and_then(|()| preflight::refuse(&findings)).map(|()| None);
    }
    preflight::refuse(&findings)?;
    ui.confirm(
        &format!("put this host back to what it was at {}, while it serves?", index.at),
        args.change.yes,
    )?;
    let applied = apply::apply_or_back(&plan, &host, Some(&index.host.bundle)).await;
    finish(args, backup, applied, ui).await.map(Some)
}

/// For the images that it brings, beside what the bundle needs.
fn room(backup: &Backup) -> Result<Finding> {
    let need = backup.index.blobs.iter().map(|b| b.size).fold(0u64, u64::saturating_add).saturating_mul(2);
    let (_, free) = facts::space(Path::new(paths::VAR))?;
    let what =
        format!("{} for images of the backup, {} free for {}", ByteSize(need), ByteSize(free), paths::VAR);
    Ok(match need <= free {
        true => Finding::ok("disk", what),
        false => Finding::bad("disk", what, format!("free {} there", ByteSize(need - free))),
    })
}

fn text_of(backup: &Backup) -> Result<String> {
    let bytes = backup.member(crate::backup::index::LOCK).unwrap_or_default();
    String::from_utf8(bytes.to_vec()).or_code(Code::Bundle, "the lock in the backup")
}

/// It must be the host of the backup, with the bundle that it had then.
fn check_same(backup: &Backup) -> Result<()> {
    let wanted = &backup.index.host;
    if let Some(here) = HostConfig::read()?.filter(|here| here.ip != wanted.ip) {
        return Err(Code::Usage
            .err(format!(
                "the backup is of the host {}, this one is {}; nothing was changed",
                wanted.ip, here.ip
            ))
            .cure("give a backup of this host; another host can only be replaced by a bare one"));
    }
    let current = std::fs::read_link(paths::CURRENT).at(paths::CURRENT)?;
    let number = current.to_str().and_then(|n| n.parse().ok()).unwrap_or(0);
    let here = Digest::of(&generation::lock_bytes(number)?);
    if here != wanted.bundle {
        let cure = match generation::locks()?.iter().find(|(.., id)| *id == wanted.bundle) {
            Some((number, ..)) => format!("go there first: zd rollback --generation {number}"),
            None => {
                "go there first, with its stick: zd upgrade; or take a backup of what is installed now".into()
            }
        };
        return Err(Code::OtherBundle
            .err(format!(
                "the backup is of {}, which is not what is installed; nothing was changed",
                backup.index.bundle
            ))
            .cure(cure));
    }
    Ok(())
}

/// What each service has now.
pub async fn serving(installed: &Installed) -> Result<BTreeMap<Name, Serving>> {
    let docker = Docker::connect().await?;
    let mut services = BTreeMap::new();
    for service in &installed.lock.services {
        let name = &service.name;
        let mut containers = BTreeMap::new();
        for slot in Slot::BOTH {
            containers.insert(slot, docker.of_slot(name, slot).await?);
        }
        let active = match pointer::link(name).is_symlink() {
            true => Some(pointer::read(name)?.slot()),
            false => None,
        };
        let serving = Serving { adopted: Slot::BOTH.into(), active, state: State::read(name)?, containers };
        services.insert(name.clone(), serving);
    }
    Ok(services)
}

async fn present(backup: &Backup, installed: &Installed) -> Result<Present> {
    let lost = |path: &str| !Path::new("/").join(path).exists();
    let files = || backup.index.files.iter().map(|e| e.path.as_str());
    let secret = |path: &str| {
        let beneath = path.strip_prefix(&format!("{}/", &paths::ETC[1..])).unwrap_or_default();
        let folder = beneath.split('/').next().unwrap_or_default();
        SECRETS.contains(&folder) || beneath.ends_with("/private.json")
    };
    let reports = &paths::REPORTS[1..];
    Ok(Present {
        services: serving(installed).await?,
        secrets_lost: files().any(|path| secret(path) && lost(path)),
        signing_key_lost: !Path::new(paths::SIGNING_KEY).exists(),
        reports_lost: files().filter(|p| p.starts_with(reports) && lost(p)).map(str::to_owned).collect(),
    })
}

async fn preview(plan: &Plan, host: &Host<'_>, ui: &Ui) -> Result<()> {
    let preview = apply::preview(plan, host).await?;
    ui.report(&preview, apply::Preview::text);
    Ok(())
}

/// Records how it went.
async fn finish(args: &Args, backup: &Backup, applied: Result<Summary>, ui: &Ui) -> Result<Summary> {
    let (index, key) = (&backup.index, backup.signed_by.id());
    let of =
        format!("{} of {}, taken {}, signed with key {key}", args.file.display(), index.host.ip, index.at);
    let event = |outcome, detail| {
        let reason = args.change.reason.as_str();
        audit::append(Event { verb: "restore", outcome, reason, detail, ..Event::default() })
    };
    match applied {
        Ok(summary) => {
            fs::remove_tree(paths::BEFORE.as_ref())?;
            if !summary.done.is_empty() {
                event("done", of)?;
            }
            if let Err(e) = audit::read() {
                ui.warn(format!("{}: it was so on the host that was backed up, or is so here", e.what));
            }
            Ok(summary)
        }
        Err(e) => {
            // Where there is no log yet, the one of the backup is still to come.
            if Path::new(paths::AUDIT).exists() {
                event("failed", format!("{of}: {}", e.what))?;
            }
            Err(e)
        }
    }
}
