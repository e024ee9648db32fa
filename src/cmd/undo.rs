//! `zd undo`: go back from an interrupted plan.

use serde::Serialize;

use super::{ChangeArgs, repair};
use crate::apply::{self, Way};
use crate::audit::{self, Event};
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::{Host, fs, paths};
use crate::receipt::{self, Outcome, Receipt};
use crate::ui::Ui;

/// Take back what an interrupted run has done so far
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd undo --dry-run\n  zd undo")]
pub struct Args {
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    verb: Option<String>,
    /// It had passed the point from which there is a way back, and is finished instead.
    finished: bool,
    undone: Vec<String>,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("undo", ui)?) };
    let Some(mut journal) = receipt::unfinished()? else {
        ui.report(&Report { verb: None, finished: false, undone: Vec::new() }, |_| {
            "nothing is unfinished; `zd rollback` goes back to the version before, `zd uninstall` removes all"
                .into()
        });
        return Ok(());
    };
    let header = journal.header.clone();
    if header.verb == repair::VERB {
        return Err(Code::Unfinished
            .err("an interrupted repair has no way back: what it began anew could not be read")
            .cure("zd repair goes on where it stopped"));
    }
    let first = is_first_install(&journal)?;
    let way = if first || Installed::read()?.is_none() { Way::Purge } else { Way::Back };
    let finished = way == Way::Back && apply::finish_of(&journal).is_some();
    if args.change.dry_run {
        let steps = journal.steps.iter().rev().filter(|i| !i.undone && !finished);
        let undone = steps.map(|i| i.step.clone()).collect();
        ui.report(&Report { verb: Some(header.verb), finished, undone }, |r| match finished {
            true => "finish it: there is no way back any more\n".into(),
            false => r.undone.iter().map(|s| format!("undo {s}\n")).collect(),
        });
        return Ok(());
    }
    let question = if finished { "finish" } else { "take back" };
    let question = format!("{question} the interrupted {} of {}?", header.verb, header.about);
    ui.confirm(&question, args.change.yes)?;
    let host = Host::new(ui);
    let undone = if first {
        let undone = apply::undo(&mut journal, &host, way).await?;
        apply::sweep(true).await?;
        undone
    } else {
        take_back(&mut journal, &host, way, &args.change.reason).await?
    };
    ui.report(&Report { verb: Some(header.verb), finished, undone }, |r| match finished {
        true => "finished: there was no way back any more; what runs now: zd status".into(),
        false => format!("taken back: {} steps; the host is as it was before", r.undone.len()),
    });
    Ok(())
}

/// Nothing of an install that never finished was in service: its data goes too.
pub fn is_first_install(journal: &Receipt) -> Result<bool> {
    Ok(["install", "restore"].contains(&journal.header.verb.as_str()) && receipt::all()?.len() == 1)
}

/// Undoes what is unfinished, or finishes it where there is no way back, and says so in the audit log.
pub async fn take_back(
    journal: &mut Receipt,
    host: &Host<'_>,
    way: Way,
    reason: &str,
) -> Result<Vec<String>> {
    let undone = apply::undo(journal, host, way).await?;
    fs::remove_tree(paths::BEFORE.as_ref())?;
    let header = &journal.header;
    let (verb, detail) = (header.verb.as_str(), header.about.clone());
    let outcome = if journal.outcome == Some(Outcome::Applied) { "finished" } else { "undone" };
    audit::append(Event { verb, outcome, reason, detail, ..Event::default() })?;
    Ok(undone)
}
