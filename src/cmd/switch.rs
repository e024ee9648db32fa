//! `zd switch`: move all traffic to the other slot at once.

use super::ChangeArgs;
use crate::error::Result;
use crate::host::Host;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::ids::{Name, Slot};
use crate::service::switch::{self, Report, Request};
use crate::service::{cluster, pointer};
use crate::ui::Ui;

/// Move all traffic to the other slot: no request fails, no versions mix
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd switch\n  zd switch --to green --reason 'ticket 4711'\n  zd switch hello --drain 10s"
)]
pub struct Args {
    /// The service; the only one where not given
    service: Option<Name>,
    /// The slot that shall be active; the standby where not given
    #[arg(long)]
    to: Option<Slot>,
    /// How long to wait for answers of the old slot, instead of the manifest's drain-ms
    #[arg(long, value_name = "TIME", value_parser = crate::units::duration)]
    drain: Option<std::time::Duration>,
    #[command(flatten)]
    change: ChangeArgs,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("switch", ui)?) };
    if !args.change.dry_run {
        super::deploy::settle_interrupted(&Host::new(ui)).await?;
    }
    let installed = Installed::require()?;
    let mut service = installed.service(args.service.as_ref())?.clone();
    if let Some(drain) = args.drain {
        service.drain_ms = drain.as_millis().min(60_000) as u32;
    }
    let active = pointer::read(&service.name)?.slot();
    let to = args.to.unwrap_or(active.other());
    if args.change.dry_run {
        let plan = serde_json::json!({ "verb": "switch", "service": service.name, "from": active, "to": to });
        ui.report(&plan, |_| format!("switch {}: from {active} to {to}", service.name));
        return Ok(());
    }
    if to != active {
        ui.confirm(&format!("move all traffic of {} from {active} to {to}?", service.name), args.change.yes)?;
    }
    let request = Request { verb: "switch", reason: &args.change.reason };
    let report = switch::run(&installed, &service, to, &request).await?;
    ui.report(&report, text);
    cluster::tell(&installed, &service.name, ui).await
}

pub fn text(r: &Report) -> String {
    if !r.changed {
        return format!(
            "{}: {} {} is active already; nothing was changed",
            r.service, r.to.slot, r.to.version
        );
    }
    let sessions: String =
        r.sessions.iter().filter_map(|m| m.text(r.from.slot)).map(|text| text + "\n").collect();
    format!(
        "{}: {} {} ({}) -> {} {} ({})\nheld {} requests for {:.1} ms (p99 {:.1} ms), verified {} answers, {:.0} ms in all\n\
         {sessions}back  zd rollback",
        r.service,
        r.from.slot,
        r.from.version,
        r.from.digest.short(),
        r.to.slot,
        r.to.version,
        r.to.digest.short(),
        r.held,
        r.hold_ms,
        r.held_p99_ms,
        r.verified,
        r.total_ms
    )
}
