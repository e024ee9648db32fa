//! Reports of changes, for a plant's change control: a page to print and the same as JSON, named by the number
//! of the record in the audit log, with its signature in them, and each signed by the host (`.minisig` beside it).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use crate::apply::Done;
use crate::assets;
use crate::audit::{Written, signed_bytes};
use crate::error::{At, Code, OrCode, Result};
use crate::host::config::HostConfig;
use crate::host::{fs, paths, signing};
use crate::service::watch::Sample;

/// How many are kept.
const KEPT: usize = 400;
/// Of the plot: left edge, width, bottom, height, in units of its view box.
const PLOT: (f64, f64, f64, f64) = (60.0, 930.0, 210.0, 200.0);

/// What happened, beside what the record says.
#[derive(Default, Serialize)]
pub struct Change {
    pub begun: Timestamp,
    /// One line each.
    pub differences: Vec<String>,
    /// Steps that acted; each was looked at afterwards.
    pub gates: Vec<Done>,
    /// Figures worth printing, with their unit.
    pub numbers: BTreeMap<&'static str, String>,
    pub probes: Vec<Sample>,
}

/// Writes both; returns the page.
pub fn write(written: &Written, change: &Change) -> Result<PathBuf> {
    let record = &written.record;
    let dir = Path::new(paths::REPORTS);
    fs::make_dir(dir, 0o755, None)?;
    let host = HostConfig::read()?.map(|h| h.node()).unwrap_or_default();
    let name = format!("{:06}-{}", record.seq, record.verb);
    let text = serde_json::to_vec_pretty(&whole(written, change, &host)).or_code(Code::Bug, "a report")?;
    write_signed(dir, &format!("{name}.json"), &text, &host)?;
    let page = page(written, change, &host)?;
    let path = write_signed(dir, &format!("{name}.html"), page.as_bytes(), &host)?;
    prune(dir)?;
    Ok(path)
}

/// The file, its signature, and the public key that checks it.
fn write_signed(dir: &Path, name: &str, bytes: &[u8], host: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    fs::write(&path, bytes, 0o644, None)?;
    if let Some(signed) = signing::sign(bytes, &format!("report {name} of {host}")) {
        signing::keep(&signed.key)?;
        fs::write(&dir.join(format!("{name}.minisig")), signed.text.as_bytes(), 0o644, None)?;
    }
    Ok(path)
}

fn whole(written: &Written, change: &Change, host: &str) -> Value {
    let Written { record, hash, signed } = written;
    let (key, signature) = signed.as_ref().map(|signed| (signed.key.id(), &signed.text)).unzip();
    json!({
        "schema": 1,
        "host": host,
        "record": record,
        "hash": hash,
        "log": { "seq": record.seq, "hash": hash, "key": key, "signature": signature },
        "change": change,
    })
}

fn page(written: &Written, change: &Change, host: &str) -> Result<String> {
    let record = &written.record;
    let subject = record.service.as_ref().map_or_else(|| record.detail.clone(), ToString::to_string);
    assets::html(
        assets::REPORT,
        json!({
            "title": format!("{} of {subject}", record.verb),
            "host": host,
            "record": record,
            "hash": written.hash,
            "key": written.signed.as_ref().map(|signed| signed.key.id()),
            "signed": signed_bytes(record.seq, &written.hash),
            "signature": written.signed.as_ref().map(|signed| &signed.text),
            "begun": change.begun,
            "differences": change.differences,
            "gates": change.gates,
            "numbers": change.numbers,
            "plot": plot(&change.probes),
        }),
    )
}

#[derive(Serialize)]
struct Plot {
    requests: usize,
    failed: usize,
    max_ms: f64,
    seconds: f64,
    /// Of a polyline.
    points: String,
    /// Where a request failed: x.
    failures: Vec<String>,
}

fn plot(samples: &[Sample]) -> Option<Plot> {
    let (first, last) = (samples.first()?.at, samples.last()?.at);
    let seconds = (last - first).total(jiff::Unit::Second).unwrap_or(0.0).max(0.1);
    let max_ms = samples.iter().map(|s| s.ms).fold(1.0, f64::max);
    let (left, width, bottom, height) = PLOT;
    let x = |s: &Sample| left + width * (s.at - first).total(jiff::Unit::Second).unwrap_or(0.0) / seconds;
    let point = |s: &Sample| format!("{:.1},{:.1}", x(s), bottom - height * s.ms / max_ms);
    let failures = samples.iter().filter(|s| s.failure.is_some());
    Some(Plot {
        requests: samples.len(),
        failed: failures.clone().count(),
        max_ms,
        seconds,
        points: samples.iter().map(point).collect::<Vec<_>>().join(" "),
        failures: failures.map(|s| format!("{:.1}", x(s))).collect(),
    })
}

/// The oldest go; their records stay in the log.
fn prune(dir: &Path) -> Result<()> {
    let all: Vec<String> =
        std::fs::read_dir(dir).at(dir)?.flatten().map(|e| e.file_name().to_string_lossy().into()).collect();
    // Not the public keys: they have no `-` in their names.
    let name = |file: &'_ str| Some(file.split_once('.')?.0.to_owned()).filter(|name| name.contains('-'));
    let names: BTreeSet<String> = all.iter().filter_map(|file| name(file)).collect();
    let gone: Vec<&String> = names.iter().take(names.len().saturating_sub(KEPT)).collect();
    let mut files = all.iter().filter(|file| name(file).is_some_and(|name| gone.contains(&&name)));
    files.try_for_each(|file| fs::remove_file(&dir.join(file)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::signing::Signed;

    fn sample(at: &str, ms: f64, failure: Option<&str>) -> Sample {
        let (service, failure) = ("hello".parse().unwrap(), failure.map(str::to_owned));
        Sample { at: at.parse().unwrap(), service, ms, failure }
    }

    #[test]
    fn a_page_shows_what_was_done_and_escapes_what_people_wrote() {
        let record = serde_json::from_value(json!({
            "schema": 1, "seq": 7, "at": "2026-01-01T00:00:10Z", "by": "kim", "verb": "upgrade", "outcome": "done",
            "reason": "<script>4711</script>", "detail": "a to b", "prev": crate::ids::Digest::of(b"x"),
        }));
        let (_, key) = crate::bundle::signature::generate(None).unwrap();
        let (id, text) = (key.id(), "untrusted comment: x\n".to_owned());
        let signed = Some(Signed { key, text });
        let written = Written { record: record.unwrap(), hash: crate::ids::Digest::of(b"y"), signed };
        let change = Change {
            differences: vec!["package nginx 1 -> 2".into()],
            gates: vec![Done { step: "registry answers".into(), seconds: 0.256 }],
            probes: vec![sample("2026-01-01T00:00:00Z", 1.0, None)],
            ..Change::default()
        };
        let page = page(&written, &change, "node-10-4-0-17").unwrap();
        let hash = written.hash.to_string();
        for part in
            ["&lt;script&gt;4711", "node-10-4-0-17", "package nginx 1", "0.26", "<polyline", &hash, &id]
        {
            assert!(page.contains(part), "{part} in {page}");
        }
        let log = &whole(&written, &change, "node-10-4-0-17")["log"];
        let expected = json!({ "seq": 7, "hash": hash, "key": id, "signature": "untrusted comment: x\n" });
        assert_eq!(*log, expected);
        // Of a host that has no key yet.
        let written = Written { signed: None, ..written };
        assert!(super::page(&written, &change, "node").unwrap().contains("Not signed"));
        assert_eq!(whole(&written, &change, "node")["log"]["key"], Value::Null);
    }

    #[test]
    fn the_oldest_reports_go_with_their_signatures_and_keys_stay() {
        let dir = tempfile::tempdir().unwrap();
        let ending = [".html", ".html.minisig", ".json", ".json.minisig"];
        let put = |name: &str| std::fs::write(dir.path().join(name), "").unwrap();
        let report = |n: usize| ending.map(|end| format!("{n:06}-switch{end}"));
        (1..=KEPT + 2).flat_map(report).for_each(|name| put(&name));
        let keys = ["0123456789ABCDEF.pub", "0123456789ABCDEF.pub.minisig"];
        keys.iter().for_each(|name| put(name));
        prune(dir.path()).unwrap();
        let there = |name: &str| dir.path().join(name).exists();
        assert!(keys.iter().all(|name| there(name)));
        assert!((1..=2).flat_map(report).all(|name| !there(&name)));
        assert!((3..=KEPT + 2).flat_map(report).all(|name| there(&name)));
    }

    #[test]
    fn a_plot_spans_its_time_and_its_slowest_request() {
        let plot = plot(&[
            sample("2026-01-01T00:00:00Z", 1.0, None),
            sample("2026-01-01T00:00:05Z", 4.0, Some("refused")),
            sample("2026-01-01T00:00:10Z", 2.0, None),
        ])
        .unwrap();
        assert_eq!(plot.points, "60.0,160.0 525.0,10.0 990.0,110.0");
        assert_eq!((plot.failed, plot.failures), (1, vec!["525.0".to_owned()]));
        assert!(super::plot(&[]).is_none());
    }
}
