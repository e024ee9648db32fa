//! A plan applied to services at work: recorded, watched, and taken back where a step or a request fails; with a
//! page for change control either way.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::apply::{self, Summary};
use crate::audit::{self, Event};
use crate::bundle::manifest::Service;
use crate::error::Result;
use crate::host::Host;
use crate::host::config::Installed;
use crate::ids::Digest;
use crate::plan::Plan;
use crate::receipt;
use crate::report::{self, Change};
use crate::service::watch::{Sample, Watch};

/// What is said of a change, beside its plan.
pub struct Told<'a> {
    pub detail: String,
    /// One line for each part that becomes another.
    pub differences: &'a [String],
    pub reason: &'a str,
    /// What is there again after a failure: `generation 1`.
    pub before: String,
    /// More for its page.
    pub numbers: BTreeMap<&'static str, String>,
}

pub struct Applied {
    pub summary: Summary,
    pub seen: Seen,
    /// The page for change control.
    pub page: PathBuf,
}

/// What requests to the services saw while it went on.
#[derive(Default, Serialize)]
pub struct Seen {
    probes: usize,
    failed: usize,
    slowest_ms: f64,
}

impl From<&[Sample]> for Seen {
    fn from(samples: &[Sample]) -> Self {
        Self {
            probes: samples.len(),
            failed: samples.iter().filter(|s| s.failure.is_some()).count(),
            slowest_ms: samples.iter().map(|s| s.ms).fold(0.0, f64::max),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Seen { probes, failed, slowest_ms } = self;
        write!(f, "{probes} requests, {failed} failed, slowest {slowest_ms:.0} ms")
    }
}

/// `from` is what is at work now, `bundle` the lock that the receipt is of.
pub async fn apply(
    plan: &Plan,
    host: Host<'_>,
    from: &Installed,
    bundle: &Digest,
    told: Told<'_>,
) -> Result<Applied> {
    let stays = |s: &&Service| host.coming.is_none_or(|to| to.lock.service(&s.name).is_some());
    let services: Vec<Service> = from.lock.services.iter().filter(stays).cloned().collect();
    let watch = Watch::start(&services);
    let host = Host { watch: Some(&watch), ..host };
    let event = |outcome, detail| {
        audit::write(Event { verb: plan.verb, outcome, reason: told.reason, detail, ..Event::default() })
    };
    event("begun", told.detail.clone())?;
    let begun = jiff::Timestamp::now();
    let change = |gates| Change {
        begun,
        differences: told.differences.to_vec(),
        gates,
        probes: watch.samples(),
        numbers: told.numbers.clone(),
    };
    match apply::apply_or_back(plan, &host, Some(bundle)).await {
        Ok(summary) => {
            let written = event("done", told.detail.clone())?;
            let page = report::write(&written, &change(summary.done.clone()))?;
            Ok(Applied { summary, seen: Seen::from(watch.samples().as_slice()), page })
        }
        Err(e) => {
            let written = event("failed", format!("{}: {}", told.detail, e.what))?;
            let page = report::write(&written, &change(Vec::new()))?;
            host.ui.say(format!("report {}", page.display()));
            let cure = e.cure.as_deref().unwrap_or("see `zd status` and `zd logs`, then try again");
            let cure = match receipt::unfinished()? {
                None => format!("{} is back as it was; {cure}", told.before),
                Some(_) => format!("the way back is not at its end: `zd undo` goes on with it; {cure}"),
            };
            Err(e.cure(cure))
        }
    }
}
