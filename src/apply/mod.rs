//! The one loop that carries out steps and journals them, and the one that takes them back.

mod act;
mod check;
mod daemon;
mod revert;

use std::convert::Infallible;
use std::time::Instant;

use serde::Serialize;
use tokio::sync::oneshot;

use crate::audit;
use crate::error::Result;
use crate::host::{Host, registry};
use crate::ids::Digest;
use crate::plan::{Plan, Step, Undo};
use crate::receipt::{self, Intended, Outcome, Receipt};

pub use revert::{purge_leftovers, sweep};

/// How far an undo goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What was there before serves again.
    Back,
    /// All of zd goes: nothing is started again only to be stopped by the next undo. Data stays.
    Remove,
    /// As `Remove`, with the data.
    Purge,
}

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

#[derive(Clone, Debug, Serialize)]
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

/// Applies a plan, and ends what was open for its time only: also after a failure, and for a run that was killed.
pub async fn apply(plan: &Plan, host: &Host<'_>, bundle: Option<&Digest>) -> Result<Summary> {
    let (summary, applied) = attempt(plan, host, bundle).await;
    applied.map(|()| summary)
}

/// As [`apply`]; what was done before a failure is told as well.
async fn attempt(plan: &Plan, host: &Host<'_>, bundle: Option<&Digest>) -> (Summary, Result<()>) {
    let mut summary = Summary::default();
    let (pushing, pushed) = oneshot::channel();
    // Beside the steps behind the last push: it takes longer than most of them.
    let close = async {
        let Err(_dropped) = pushed.await;
        if pushes(&plan.steps) { registry::close().await } else { Ok(()) }
    };
    let (applied, closed) = tokio::join!(carry_out(plan, host, bundle, &mut summary, pushing), close);
    (summary, applied.and(closed))
}

fn pushes(steps: &[Step]) -> bool {
    steps.iter().any(|step| matches!(step, Step::Push { .. }))
}

/// An unfinished receipt of the same plan is taken up; otherwise a new one begins with the first step that has to
/// act, so that a run with nothing to do leaves no trace. `pushing` is dropped behind the last push.
async fn carry_out(
    plan: &Plan,
    host: &Host<'_>,
    bundle: Option<&Digest>,
    summary: &mut Summary,
    pushing: oneshot::Sender<Infallible>,
) -> Result<()> {
    let mut pushing = Some(pushing);
    let mut journal = receipt::unfinished()?;
    let bar = host.ui.count(format!("{} {}", plan.verb, plan.about), plan.steps.len() as u64);
    for (at, step) in plan.steps.iter().enumerate() {
        let title = step.title();
        bar.set_message(title.clone());
        // The files may be there while their process runs with those before: its restart was not reached.
        let half_done = matches!(step, Step::Daemon { .. } | Step::Gate { .. } | Step::Renew(_))
            && journal.as_ref().is_some_and(|j| j.is_half_done(&title));
        let undo = match check::check(step, host).await? {
            Check::Satisfied if !half_done => None,
            Check::Satisfied => Some(Undo::Nothing),
            Check::Needed(undo) => Some(undo),
        };
        match undo {
            None => {
                summary.same += 1;
            }
            Some(undo) => {
                let journal = match &mut journal {
                    Some(journal) => journal,
                    none => none.insert(Receipt::begin(plan, &audit::actor(), bundle)?),
                };
                journal.intend(&title, &undo)?;
                let start = Instant::now();
                act::act(step, host).await.map_err(|e| e.during(&title))?;
                // Behind the last way back what requests see changes nothing any more; the report has it.
                if let Some(watch) = host.watch.filter(|_| !undo.is_finish()) {
                    watch.verdict().map_err(|e| e.during(&title))?;
                }
                journal.done(&title)?;
                let seconds = start.elapsed().as_secs_f64();
                host.ui.done(if seconds < 1.0 { title.clone() } else { format!("{title} ({seconds:.1} s)") });
                summary.done.push(Done { step: title, seconds });
            }
        }
        pushing = pushing.filter(|_| pushes(&plan.steps[at + 1..]));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(mut journal) = journal {
        journal.end(Outcome::Applied)?;
    }
    Ok(())
}

/// Applies a plan that must not be left half done: on failure all is as it was before, or, behind the last way back,
/// as the plan says after all.
pub async fn apply_or_back(plan: &Plan, host: &Host<'_>, bundle: Option<&Digest>) -> Result<Summary> {
    let (summary, applied) = attempt(plan, host, bundle).await;
    let Err(failed) = applied else { return Ok(summary) };
    let start = Instant::now();
    if let Some(mut journal) = receipt::unfinished()? {
        undo(&mut journal, host, Way::Back)
            .await
            .map_err(|u| u.during(format!("after: {failed}; going back")))?;
        if journal.outcome == Some(Outcome::Applied) {
            host.ui.warn(format!("{failed}; the second try went well"));
            return Ok(summary);
        }
        host.ui.done(format!("back as it was before, in {:.1} s", start.elapsed().as_secs_f64()));
    }
    Err(failed)
}

/// The step by which a plan passed its point of no return.
pub fn finish_of(journal: &Receipt) -> Option<&Intended> {
    journal.steps.last().filter(|step| step.undo.is_finish())
}

/// Takes back what a receipt did, last first. Each undo is idempotent; a kill in between is resumed.
/// On the way back a plan that had passed its point of no return is finished instead: nothing is taken back then, and
/// the receipt's outcome is `Applied`.
pub async fn undo(journal: &mut Receipt, host: &Host<'_>, way: Way) -> Result<Vec<String>> {
    let mut taken_back = Vec::new();
    if let Some(last) = finish_of(journal).filter(|_| way == Way::Back) {
        revert::revert(&last.undo.clone(), host, way).await?;
        journal.end(Outcome::Applied)?;
        return Ok(taken_back);
    }
    let todo: Vec<(String, Undo)> =
        journal.steps.iter().rev().filter(|i| !i.undone).map(|i| (i.step.clone(), i.undo.clone())).collect();
    let bar =
        host.ui.count(format!("undo {} {}", journal.header.verb, journal.header.about), todo.len() as u64);
    for (step, undo) in todo {
        bar.set_message(step.clone());
        revert::revert(&undo, host, way).await.map_err(|e| e.during(format!("undoing {step}")))?;
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
