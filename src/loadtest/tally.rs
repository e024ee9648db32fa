//! What has been counted so far, and the report made of it.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use super::Options;
use super::mixed::{self, Sample};
use super::report::{self, Change, FailureSample, Latency, Report};

/// How many failures are shown in full.
const FAILURES_SHOWN: usize = 5;
/// More versions than this is a header that is no version.
const MAX_VERSIONS: usize = 1000;

/// Counts and samples of one run.
pub struct Tally {
    pub ok: u64,
    pub failed: u64,
    pub not_sent: u64,
    pub late: u64,
    pub latency: Histogram<u64>,
    pub service: Histogram<u64>,
    pub failures: BTreeMap<String, u64>,
    shown: Vec<FailureSample>,
    /// Versions in the order in which they were met, with their answers; a sample's version is an index.
    pub versions: Vec<(String, u64)>,
    pub samples: Vec<Sample>,
    pub last_good_us: u64,
    pub last_end_us: u64,
    /// The longest gap between good answers, and when it began.
    gap_us: (u64, u64),
}

impl Tally {
    pub fn new(requests: u64) -> Tally {
        // Up to ten minutes, to three digits.
        let histogram = || Histogram::new_with_max(600_000_000, 3).expect("the bounds are constants");
        Tally {
            ok: 0,
            failed: 0,
            not_sent: 0,
            late: 0,
            latency: histogram(),
            service: histogram(),
            failures: BTreeMap::new(),
            shown: Vec::new(),
            versions: Vec::new(),
            // Room for all of them, so that no copy of a big vector disturbs the timing; the kernel
            // gives the memory only as it is used.
            samples: Vec::with_capacity(requests.min(1 << 26) as usize),
            last_good_us: 0,
            last_end_us: 0,
            gap_us: (0, 0),
        }
    }

    /// The number of a version.
    pub fn version(&mut self, name: &str) -> u16 {
        let name = if self.versions.len() < MAX_VERSIONS { name } else { "(too many versions)" };
        let known = self.versions.iter().position(|(known, _)| known == name);
        let index = known.unwrap_or_else(|| {
            self.versions.push((name.to_owned(), 0));
            self.versions.len() - 1
        });
        index as u16
    }

    pub fn show(&mut self, failure: FailureSample) {
        if self.shown.len() < FAILURES_SHOWN {
            self.shown.push(failure);
        }
    }

    pub fn gap_until(&mut self, us: u64) {
        let gap = us.saturating_sub(self.last_good_us);
        if gap > self.gap_us.0 {
            self.gap_us = (gap, self.last_good_us);
        }
    }

    pub fn report(mut self, o: &Options) -> Report {
        self.gap_until(self.last_end_us);
        let seconds = self.last_end_us as f64 / 1e6;
        let (changes, mixed) = mixed::analyse(&self.samples, o.expect_changes);
        let name = |version: u16| self.versions[usize::from(version)].0.clone();
        let ended = (self.ok + self.failed) as f64;
        Report {
            schema: 1,
            target: format!("http://{}{}", o.target, o.path),
            mode: format!("{:?}", o.mode).to_lowercase(),
            method: format!("{:?}", o.method).to_lowercase(),
            requests: self.ok + self.failed + self.not_sent,
            ok: self.ok,
            failed: self.failed,
            not_sent: self.not_sent,
            late: self.late,
            rate_asked: f64::from(o.rate),
            rate_achieved: if seconds > 0.0 { report::round(ended / seconds) } else { 0.0 },
            seconds: report::round(seconds),
            latency_ms: Latency::of(&self.latency),
            service_ms: Latency::of(&self.service),
            failures: self.failures,
            samples: self.shown,
            changes: changes
                .iter()
                .map(|c| Change { at_s: c.at_us as f64 / 1e6, from: name(c.from), to: name(c.to) })
                .collect(),
            versions: self.versions.iter().filter(|(_, n)| *n > 0).cloned().collect(),
            expected_changes: o.expect_changes,
            mixed,
            longest_gap_ms: report::round(self.gap_us.0 as f64 / 1000.0),
            longest_gap_at_s: report::round(self.gap_us.1 as f64 / 1e6),
            switches: Vec::new(),
        }
    }
}
