//! What a load test found: one struct, shown as JSON or as one screen of text.

use std::collections::BTreeMap;
use std::fmt::Write;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Times are milliseconds or, where a field ends in `_s`, seconds since the start of the run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub schema: u32,
    pub target: String,
    pub mode: String,
    pub method: String,
    /// Scheduled: `ok` + `failed` + `not_sent`.
    pub requests: u64,
    pub ok: u64,
    pub failed: u64,
    /// Never sent: no connection was free until the timeout had passed, or this machine had no
    /// sockets or no time for it. They say nothing about the server but that the run is no proof.
    pub not_sent: u64,
    /// Taken up more than 100 ms after they were due.
    pub late: u64,
    pub rate_asked: f64,
    pub rate_achieved: f64,
    pub seconds: f64,
    /// From the time a request was due to the end of its good answer.
    pub latency_ms: Latency,
    /// From the time it was taken up (opening a connection included, waiting for its turn not).
    pub service_ms: Latency,
    /// Failed requests by kind.
    pub failures: BTreeMap<String, u64>,
    /// The first failures.
    pub samples: Vec<FailureSample>,
    /// Answers by the version they named, answers with a failing status included.
    pub versions: BTreeMap<String, u64>,
    pub changes: Vec<Change>,
    pub expected_changes: Option<usize>,
    /// Answers of a version that clients had seen replaced before they asked.
    pub mixed: u64,
    /// The longest time in which no good answer ended, and when it began.
    pub longest_gap_ms: f64,
    pub longest_gap_at_s: f64,
    /// What `zd switch` said, for each switch made during the run.
    pub switches: Vec<serde_json::Value>,
}

#[derive(Debug, Default, Serialize)]
pub struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

#[derive(Debug, Serialize)]
pub struct Change {
    pub at_s: f64,
    pub from: String,
    pub to: String,
}

#[derive(Debug, Serialize)]
pub struct FailureSample {
    pub at_s: f64,
    pub kind: String,
    pub detail: String,
    pub method: &'static str,
    pub connection: &'static str,
}

impl Latency {
    /// From a histogram of microseconds.
    pub fn of(h: &Histogram<u64>) -> Latency {
        let at = |q| round(h.value_at_quantile(q) as f64 / 1000.0);
        Latency {
            mean: round(h.mean() / 1000.0),
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p999: at(0.999),
            max: round(h.max() as f64 / 1000.0),
        }
    }
}

/// To three decimals: what is measured is microseconds.
pub fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

impl Report {
    /// No request failed, none was left out, no versions were mixed, and there were just as many
    /// changes of version as expected, where that was said. Lateness does not fail a run: it shows in
    /// the latencies, which count from the due time.
    pub fn passed(&self) -> bool {
        self.ok > 0
            && self.failed == 0
            && self.not_sent == 0
            && self.mixed == 0
            && self.expected_changes.is_none_or(|n| n == self.changes.len())
    }

    /// One screen.
    pub fn text(&self) -> String {
        let mut lines = Lines(String::new());
        let Report { target, mode, method, seconds, .. } = self;
        lines.add("target", format!("{target}  ({mode} connections, {method} requests, {seconds:.1} s)"));
        let counts = format!(
            "{}  ok {}  failed {}  not sent {}  late {}",
            self.requests, self.ok, self.failed, self.not_sent, self.late
        );
        lines.add("requests", counts);
        lines.add("rate", format!("{:.0}/s asked, {:.1}/s achieved", self.rate_asked, self.rate_achieved));
        lines.add("", "      mean       p50       p90       p95       p99     p99.9       max");
        lines.add("latency ms", self.latency_ms.row());
        lines.add("service ms", self.service_ms.row());
        let gap =
            format!("{:.1} ms without an answer, at {:.3} s", self.longest_gap_ms, self.longest_gap_at_s);
        lines.add("longest gap", gap);
        let versions: Vec<String> = self.versions.iter().map(|(v, n)| format!("{v} {n}")).collect();
        lines.add("versions", versions.join("  "));
        lines.add("mixed", self.mixed.to_string());
        let expected = self.expected_changes.map_or(String::new(), |n| format!(" ({n} expected)"));
        lines.add("changes", format!("{}{expected}", self.changes.len()));
        for c in self.changes.iter().take(10) {
            lines.add("", format!("at {:.3} s  {} -> {}", c.at_s, c.from, c.to));
        }
        if self.changes.len() > 10 {
            lines.add("", format!("and {} more", self.changes.len() - 10));
        }
        for (kind, n) in &self.failures {
            lines.add("failed", format!("{kind} {n}"));
        }
        for f in &self.samples {
            let what =
                format!("at {:.3} s  {} {} ({}): {}", f.at_s, f.kind, f.method, f.connection, f.detail);
            lines.add("", what);
        }
        if !self.switches.is_empty() {
            lines.add("switches", self.switches.len().to_string());
        }
        lines.add("result", if self.passed() { "passed" } else { "FAILED" });
        lines.0
    }
}

impl Latency {
    fn row(&self) -> String {
        [self.mean, self.p50, self.p90, self.p95, self.p99, self.p999, self.max]
            .iter()
            .fold(String::new(), |row, ms| row + &format!("{ms:>10.3}"))
    }
}

struct Lines(String);

impl Lines {
    fn add(&mut self, label: &str, text: impl AsRef<str>) {
        let _ = writeln!(self.0, "{label:<12} {}", text.as_ref());
    }
}
