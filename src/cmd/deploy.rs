//! `zd deploy`: fill the standby slot. No traffic moves.

use serde::Serialize;

use super::ChangeArgs;
use super::undo::take_back;
use crate::apply::{self, Way};
use crate::audit::{self, Event, Release};
use crate::bundle::manifest::{ImageRef, Inlet, Service};
use crate::error::{Code, Result};
use crate::host::Host;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::registry::Registry;
use crate::ids::{Digest, Name, Slot, Version};
use crate::plan::{self, Plan};
use crate::receipt;
use crate::service::state::State;
use crate::service::{pointer, sessions};
use crate::ui::Ui;

/// Put a version into the standby slot; the active slot is not touched
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd deploy v2\n  zd deploy v2 hello --reason 'ticket 4711'")]
pub struct Args {
    /// A version the private registry holds
    version: Version,
    /// The service; the only one where not given
    service: Option<Name>,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    service: Name,
    slot: Slot,
    version: Version,
    digest: Digest,
    changed: bool,
    seconds: f64,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = std::time::Instant::now();
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("deploy", ui)?) };
    let host = Host::new(ui);
    if !args.change.dry_run {
        settle_interrupted(&host).await?;
    }
    let installed = Installed::require()?;
    let service = installed.service(args.service.as_ref())?;
    let reference = ImageRef { name: service.image.clone(), version: args.version };
    let digest = find_version(&installed, &reference).await?;
    let slot = pointer::read(&service.name)?.slot().other();
    let plan = plan::deploy::plan(&installed, service, slot, &reference, &digest)?;
    if args.change.dry_run {
        ui.report(&apply::preview(&plan, &host).await?, apply::Preview::text);
        return Ok(());
    }
    ui.confirm(&format!("deploy {reference} to {slot}, the standby of {}?", service.name), args.change.yes)?;
    for Inlet { door, .. } in service.inlets() {
        let open = sessions::open(&service.name, slot, &door)?.len();
        if open > 0 {
            ui.warn(format!(
                "{open} sessions of {door} are still with {slot}; another version there ends them"
            ));
        }
    }
    let changed = carry_out(&plan, &host, service, slot, &reference, &digest, &args.change.reason).await?;
    let report = Report {
        service: service.name.clone(),
        slot,
        version: reference.version,
        digest,
        changed,
        seconds: start.elapsed().as_secs_f64(),
    };
    ui.report(&report, |r| {
        let done = if r.changed { "is healthy in" } else { "was already in" };
        format!(
            "{} {} {done} {} ({:.1} s); no traffic was moved\nnext  zd switch",
            r.service, r.version, r.slot, r.seconds
        )
    });
    Ok(())
}

/// Digest of a version in the private registry, or what it holds instead.
pub async fn find_version(installed: &Installed, reference: &ImageRef) -> Result<Digest> {
    let registry = Registry::connect(&installed.host).await?;
    if let Some(digest) = registry.digest(reference).await? {
        return Ok(digest);
    }
    let known = registry.versions(&reference.name).await?;
    let known: Vec<&str> = known.iter().map(Version::as_str).collect();
    Err(Code::UnknownVersion
        .err(format!("the registry of this host has no {reference}"))
        .cure(format!("use one of: {}", if known.is_empty() { "(none)".into() } else { known.join(", ") })))
}

/// An interrupted deploy or scale is settled before anything else happens to the slots: taken back, or finished
/// where it had passed the point of no return.
pub async fn settle_interrupted(host: &Host<'_>) -> Result<()> {
    match receipt::unfinished()? {
        Some(mut journal) if ["deploy", "scale"].contains(&journal.header.verb.as_str()) => {
            let receipt::Header { verb, about, .. } = &journal.header;
            host.ui.warn(format!("an interrupted {verb} of {about} is settled first"));
            take_back(&mut journal, host, Way::Back, "").await.map(drop)
        }
        _ => receipt::refuse_unfinished(),
    }
}

/// Applies a deploy plan; on failure the standby is as it was before. Tells whether anything changed.
pub async fn carry_out(
    plan: &Plan,
    host: &Host<'_>,
    service: &Service,
    slot: Slot,
    reference: &ImageRef,
    digest: &Digest,
    reason: &str,
) -> Result<bool> {
    let to = Release { slot, version: reference.version.clone(), digest: digest.clone() };
    let event = |outcome, from, detail| Event {
        verb: "deploy",
        outcome,
        reason,
        service: Some(&service.name),
        from,
        to: Some(to.clone()),
        detail,
    };
    let before = State::read(&service.name).ok().and_then(|s| s.release(slot));
    match apply::apply_or_back(plan, host, None).await {
        Ok(summary) if summary.done.is_empty() => Ok(false),
        Ok(_) => {
            audit::append(event("done", before, String::new()))?;
            Ok(true)
        }
        Err(e) => {
            audit::append(event("failed", before, e.what.clone()))?;
            Err(e)
        }
    }
}
