//! The one loop that carries out steps and journals them, and the one that takes them back.

mod act;
mod check;
mod revert;

use std::time::Instant;

use serde::Serialize;

use crate::audit;
use crate::error::Result;
use crate::host::Host;
use crate::ids::Digest;
use crate::plan::{Plan, Undo};
use crate::receipt::{self, Outcome, Receipt};

pub use revert::{purge_leftovers, sweep};

/// What looking at a step found.
pub enum Check {
    /// It is so already. Found, not made: an undo leaves it.
    Satisfied,
    /// It has to act; this would put back what is there now.
    Needed(Undo),
}

#[derive(Debug, Default, Serialize)]
pub struct Summary {
    pub done: Vec<Done>,
    pub same: usize,
}

#[derive(Debug, Serialize)]
pub struct Done {
    pub step: String,
    pub seconds: f64,
}

/// A plan as a dry run shows it: every step, and whether it would act.
#[derive(Debug, Serialize)]
pub struct Preview {
    pub verb: String,
    pub about: String,
    pub steps: Vec<PreviewStep>,
}

#[derive(Debug, Serialize)]
pub struct PreviewStep {
    pub title: String,
    pub needed: bool,
}

pub async fn preview(plan: &Plan, host: &Host<'_>) -> Result<Preview> {
    let mut steps = Vec::new();
    for step in &plan.steps {
        let needed = matches!(check::check(step, host).await?, Check::Needed(_));
        steps.push(PreviewStep { title: step.title(), needed });
    }
    Ok(Preview { verb: plan.verb.into(), about: plan.about.clone(), steps })
}

impl Preview {
    pub fn text(&self) -> String {
        let mut out = format!("{} {}: {} steps\n", self.verb, self.about, self.steps.len());
        for step in &self.steps {
            out.push_str(&format!("  {} {}\n", if step.needed { "do  " } else { "same" }, step.title));
        }
        out
    }
}

/// Applies a plan. An unfinished receipt of the same plan is taken up; otherwise a new one begins with
/// the first step that has to act, so that a run with nothing to do leaves no trace.
pub async fn apply(plan: &Plan, host: &Host<'_>, by: &str, bundle: Option<&Digest>) -> Result<Summary> {
    let mut journal = receipt::unfinished()?;
    let mut summary = Summary::default();
    let bar = host.ui.count(format!("{} {}", plan.verb, plan.about), plan.steps.len() as u64);
    for step in &plan.steps {
        let title = step.title();
        bar.set_message(title.clone());
        match check::check(step, host).await? {
            Check::Satisfied => {
                summary.same += 1;
            }
            Check::Needed(undo) => {
                let journal = match &mut journal {
                    Some(journal) => journal,
                    none => none.insert(Receipt::begin(plan, by, bundle)?),
                };
                journal.intend(&title, &undo)?;
                let start = Instant::now();
                act::act(step, host).await.map_err(|e| e.during(&title))?;
                journal.done(&title)?;
                let seconds = start.elapsed().as_secs_f64();
                host.ui.done(if seconds < 1.0 { title.clone() } else { format!("{title} ({seconds:.1} s)") });
                summary.done.push(Done { step: title, seconds });
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(mut journal) = journal {
        journal.end(Outcome::Applied)?;
    }
    Ok(summary)
}

/// Applies a plan that must not be left half done: on failure all is as it was before.
pub async fn apply_or_back(plan: &Plan, host: &Host<'_>) -> Result<Summary> {
    let failed = match apply(plan, host, &audit::actor(), None).await {
        Ok(summary) => return Ok(summary),
        Err(e) => e,
    };
    if let Some(mut journal) = receipt::unfinished()? {
        undo(&mut journal, host, false)
            .await
            .map_err(|u| u.during(format!("after: {failed}; going back")))?;
    }
    Err(failed)
}

/// Takes back what a receipt did, last first. Each undo is idempotent; a kill in between is resumed.
/// A plan that had passed its point of no return is finished instead: nothing is taken back then.
pub async fn undo(journal: &mut Receipt, host: &Host<'_>, purge: bool) -> Result<Vec<String>> {
    let mut taken_back = Vec::new();
    if let Some(last) = journal.steps.last().filter(|i| matches!(i.undo, Undo::FinishRemoving { .. })) {
        revert::revert(&last.undo.clone(), host, purge).await?;
        journal.end(Outcome::Applied)?;
        return Ok(taken_back);
    }
    let todo: Vec<(String, Undo)> =
        journal.steps.iter().rev().filter(|i| !i.undone).map(|i| (i.step.clone(), i.undo.clone())).collect();
    let bar =
        host.ui.count(format!("undo {} {}", journal.header.verb, journal.header.about), todo.len() as u64);
    for (step, undo) in todo {
        bar.set_message(step.clone());
        revert::revert(&undo, host, purge).await.map_err(|e| e.during(format!("undoing {step}")))?;
        journal.undone(&step)?;
        if undo != Undo::Nothing {
            host.ui.done(format!("undone: {step}"));
            taken_back.push(step);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    journal.end(Outcome::Undone)?;
    Ok(taken_back)
}
