//! `zd rollback`: back to the slot and version before.

use super::ChangeArgs;
use super::deploy::{carry_out, settle_interrupted};
use super::switch::DrainArgs;
use crate::bundle::manifest::ImageRef;
use crate::error::{Code, Result};
use crate::host::Host;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::ids::Name;
use crate::plan;
use crate::service::state::State;
use crate::service::switch::{self, Request};
use crate::service::{cluster, pointer};
use crate::ui::Ui;

/// Go back to the slot and version that was active before
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd rollback\n  zd rollback hello --reason 'recipe 12 fails'\n  \
                        zd rollback --cut\n  \
                        zd rollback --generation 1")]
pub struct Args {
    /// The service; the only one where not given
    service: Option<Name>,
    /// Back to an earlier generation of the stack instead (zd generations); what the slots hold stays
    #[arg(long, value_name = "N", conflicts_with = "service")]
    generation: Option<u32>,
    #[command(flatten)]
    drain: DrainArgs,
    #[command(flatten)]
    change: ChangeArgs,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    if let Some(number) = args.generation {
        return super::upgrade::back_to(number, &args.change, ui).await;
    }
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("rollback", ui)?) };
    let host = Host::new(ui);
    if !args.change.dry_run {
        settle_interrupted(&host).await?;
    }
    let installed = Installed::require()?;
    let service = installed.service(args.service.as_ref())?;
    if !args.change.dry_run {
        switch::settle_killed(service).await?;
    }
    let active = pointer::read(&service.name)?.slot();
    let previous = State::read(&service.name)?.previous.ok_or_else(|| {
        Code::NotInstalled
            .err(format!("{} was never switched: there is nothing to go back to", service.name))
            .cure("zd status shows what runs")
    })?;
    if previous.slot == active {
        return Err(Code::Bug.err(format!("{active} is active and recorded as the slot before")));
    }
    let reference = ImageRef { name: service.image.clone(), version: previous.version.clone() };
    let plan = plan::deploy::plan(&installed, service, previous.slot, &reference, &previous.digest)?;
    if args.change.dry_run {
        ui.report(&crate::apply::preview(&plan, &host).await?, |p| {
            format!("{}switch {}: from {active} to {}", p.text(), service.name, previous.slot)
        });
        return Ok(());
    }
    ui.confirm(
        &format!("take {} back to {} {}?", service.name, previous.slot, previous.version),
        args.change.yes,
    )?;
    // Nothing to do where it still runs; else it is started again, by the digest it had.
    carry_out(&plan, &host, service, previous.slot, &reference, &previous.digest, &args.change.reason)
        .await?;
    let request = Request { verb: "rollback", reason: &args.change.reason, cut: args.drain.cut };
    let report = switch::run(&installed, &args.drain.of(service), previous.slot, &request).await?;
    ui.report(&report, super::switch::text);
    cluster::tell(&installed, &service.name, ui).await
}
