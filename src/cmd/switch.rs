//! `zd switch`: move all traffic to the other slot at once.

use super::ChangeArgs;
use crate::bundle::manifest::Service;
use crate::error::Result;
use crate::host::Host;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::ids::{Name, Slot};
use crate::service::switch::{self, Report, Request};
use crate::service::{cluster, pointer, remaining};
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
    #[command(flatten)]
    drain: DrainArgs,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(clap::Args)]
pub struct DrainArgs {
    /// How long to wait for answers of the old slot, instead of the manifest's drain-ms
    #[arg(long, value_name = "TIME", value_parser = crate::units::duration)]
    drain: Option<std::time::Duration>,
    /// Close the requests that have no answer by then, and name them, instead of giving up
    #[arg(long)]
    pub cut: bool,
}

impl DrainArgs {
    pub fn of(&self, service: &Service) -> Service {
        let drain_ms = self.drain.map_or(service.drain_ms, |drain| drain.as_millis().min(60_000) as u32);
        Service { drain_ms, ..service.clone() }
    }
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("switch", ui)?) };
    if !args.change.dry_run {
        super::deploy::settle_interrupted(&Host::new(ui)).await?;
    }
    let installed = Installed::require()?;
    let service = args.drain.of(installed.service(args.service.as_ref())?);
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
    let request = Request { verb: "switch", reason: &args.change.reason, cut: args.drain.cut };
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
    let cut = match r.cut.len() {
        0 => String::new(),
        n => format!("cut {n} that had no answer in time:{}\n", remaining::list(&r.cut)),
    };
    let sessions: String =
        r.sessions.iter().filter_map(|m| m.text(r.from.slot)).map(|text| text + "\n").collect();
    format!(
        "{}: {} {} ({}) -> {} {} ({})\nheld {} requests for {:.1} ms (p99 {:.1} ms), verified {} answers, {:.0} ms in all\n\
         {cut}{sessions}back  zd rollback",
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
