//! `zd uninstall`: everything an install did, taken back by its own receipts.

use serde::Serialize;

use super::ChangeArgs;
use crate::apply::{self, Way};
use crate::audit::{self, Event};
use crate::error::{Code, Result};
use crate::host::lock::HostLock;
use crate::host::{Host, operators};
use crate::receipt::{self, Outcome, Receipt};
use crate::ui::Ui;

/// Remove all that zd brought; what was there before stays. Data goes only with --purge
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd uninstall --dry-run\n  zd uninstall --yes\n  zd uninstall --purge --yes"
)]
pub struct Args {
    /// Remove the data too: registry, logs, audit, receipts, Docker's images
    #[arg(long)]
    purge: bool,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    undone: Vec<String>,
    purged: bool,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("uninstall", ui)?) };
    let (earlier, mut journals): (Vec<Receipt>, Vec<Receipt>) =
        receipt::all()?.into_iter().partition(|r| r.outcome == Some(Outcome::Undone));
    if journals.is_empty() && (earlier.is_empty() || !args.purge) {
        return Err(Code::NotInstalled
            .err("zd is not installed on this host")
            .cure("there is nothing to remove"));
    }
    if args.change.dry_run {
        let steps = journals.iter().rev().filter(|r| changed_the_host(r)).flat_map(|r| r.steps.iter().rev());
        let undone = steps.filter(|i| !i.undone).map(|i| i.step.clone()).collect();
        ui.report(&Report { undone, purged: args.purge }, |r| {
            r.undone.iter().map(|s| format!("undo {s}\n")).collect()
        });
        return Ok(());
    }
    let what = if args.purge { "and all its data" } else { "(data stays)" };
    if !args.change.yes && !std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        return Err(Code::NotConfirmed
            .err("uninstall stops the services, and there is nobody here to ask")
            .cure("zd uninstall --yes"));
    }
    ui.confirm(&format!("stop the services and remove zd {what} from this host?"), args.change.yes)?;
    let host = Host::new(ui);
    let way = if args.purge { Way::Purge } else { Way::Remove };
    operators::remove_all().await?;
    let mut undone = Vec::new();
    for journal in journals.iter_mut().rev() {
        // What a deploy or a scale left is in what the install takes away.
        if changed_the_host(journal) {
            undone.extend(apply::undo(journal, &host, way).await?);
        } else {
            journal.end(Outcome::Undone)?;
        }
    }
    if args.purge {
        apply::purge_leftovers(&earlier).await?;
    }
    apply::sweep(args.purge).await?;
    if !args.purge {
        let reason = &args.change.reason;
        audit::append(Event { verb: "uninstall", outcome: "done", reason, ..Event::default() })?;
    }
    ui.report(&Report { undone, purged: args.purge }, |r| {
        let data = if r.purged {
            "data included"
        } else {
            "data left in /var/lib/zd and /var/log/zd (--purge removes it)"
        };
        format!("removed: {} steps taken back; {data}", r.undone.len())
    });
    Ok(())
}

/// Of an install, a restore, a repair, an upgrade, the way back from one, another address, or timed backups (a service's own rollback is
/// recorded as its deploy).
fn changed_the_host(receipt: &Receipt) -> bool {
    ["install", "restore", "upgrade", "rollback", "reconfigure", "repair", "backup"]
        .contains(&receipt.header.verb.as_str())
}
