//! `zd undo`: go back from an interrupted plan.

use serde::Serialize;

use super::ChangeArgs;
use crate::apply;
use crate::audit::{self, Event};
use crate::error::Result;
use crate::host::Host;
use crate::host::lock::HostLock;
use crate::receipt;
use crate::ui::Ui;

/// Take back what an interrupted install or deploy has done so far
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd undo --dry-run\n  zd undo")]
pub struct Args {
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    verb: Option<String>,
    undone: Vec<String>,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("undo")?) };
    let Some(mut journal) = receipt::unfinished()? else {
        ui.report(&Report { verb: None, undone: Vec::new() }, |_| {
            "nothing is unfinished; `zd rollback` goes back to the version before, `zd uninstall` removes all"
                .into()
        });
        return Ok(());
    };
    let header = journal.header.clone();
    if args.change.dry_run {
        let undone = journal.steps.iter().rev().filter(|i| !i.undone).map(|i| i.step.clone()).collect();
        ui.report(&Report { verb: Some(header.verb), undone }, |r| {
            r.undone.iter().map(|s| format!("undo {s}\n")).collect()
        });
        return Ok(());
    }
    ui.confirm(&format!("take back the interrupted {} of {}?", header.verb, header.about), args.change.yes)?;
    let host = Host { ui, bundle: None };
    // Nothing of an install that never finished was in service: its data goes too.
    let first_install = header.verb == "install" && receipt::all()?.len() == 1;
    let undone = apply::undo(&mut journal, &host, header.verb == "install").await?;
    if first_install {
        apply::sweep()?;
    } else {
        let reason = &args.change.reason;
        audit::append(Event {
            verb: &header.verb,
            outcome: "undone",
            reason,
            detail: header.about,
            ..Event::default()
        })?;
    }
    ui.report(&Report { verb: Some(header.verb), undone }, |r| {
        format!("taken back: {} steps; the host is as it was before", r.undone.len())
    });
    Ok(())
}
