//! `zd scale`: another number of containers in both slots.

use serde::Serialize;

use super::ChangeArgs;
use super::deploy::settle_interrupted;
use crate::apply;
use crate::audit::{self, Event};
use crate::error::Result;
use crate::host::Host;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::ids::Name;
use crate::plan;
use crate::service::state::State;
use crate::service::switch;
use crate::ui::Ui;

/// Run a service in more containers, or fewer; those that stay are not touched
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd scale hello 4\n  zd scale hello 1 --reason 'night shift'")]
pub struct Args {
    service: Name,
    /// Containers per slot, 1 to 9
    #[arg(value_parser = clap::value_parser!(u8).range(1..=9))]
    instances: u8,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    service: Name,
    from: u8,
    to: u8,
    changed: bool,
    seconds: f64,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = std::time::Instant::now();
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("scale", ui)?) };
    let host = Host::new(ui);
    if !args.change.dry_run {
        settle_interrupted(&host).await?;
    }
    let mut installed = Installed::require()?;
    let service = installed.service(Some(&args.service))?;
    let from = service.instances;
    if !args.change.dry_run {
        switch::settle_killed(service).await?;
    }
    let to = args.instances;
    installed.set_instances(&args.service, to);
    let service = installed.service(Some(&args.service))?;
    let name = &service.name;
    let plan = plan::scale::plan(&installed, service, from, &State::read(name)?)?;
    if args.change.dry_run {
        ui.report(&apply::preview(&plan, &host).await?, apply::Preview::text);
        return Ok(());
    }
    ui.confirm(&format!("run {name} in {to} containers per slot instead of {from}?"), args.change.yes)?;
    let event = |outcome, detail| {
        let (service, reason) = (Some(name), args.change.reason.as_str());
        audit::append(Event { verb: "scale", outcome, reason, service, detail, ..Event::default() })
    };
    let changed = match apply::apply_or_back(&plan, &host, None).await {
        Ok(summary) => !summary.done.is_empty(),
        Err(e) => {
            event("failed", e.what.clone())?;
            return Err(e);
        }
    };
    if changed {
        event("done", format!("{from} to {to} containers per slot"))?;
    }
    let report = Report { service: name.clone(), from, to, changed, seconds: start.elapsed().as_secs_f64() };
    ui.report(&report, |r| {
        let was = if r.changed { format!("instead of {}", r.from) } else { "as before".into() };
        format!("{} runs in {} containers per slot {was} ({:.1} s)", r.service, r.to, r.seconds)
    });
    Ok(())
}
