//! Receipts: the journal of a plan being applied. One JSON line per entry, each with fsync before what
//! it announces happens. A kill at any point leaves a receipt to resume or to undo from.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{At, Code, OrCode, Result};
use crate::failpoint;
use crate::host::{fs as hostfs, paths};
use crate::ids::Digest;
use crate::plan::{Plan, Undo};

/// One line of the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "kebab-case")]
enum Entry {
    Begin(Header),
    /// The step is about to act; `undo` puts back what is there now.
    Intend {
        step: String,
        undo: Undo,
    },
    Done {
        step: String,
    },
    Undone {
        step: String,
    },
    End {
        outcome: Outcome,
        at: Timestamp,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Header {
    pub schema: u32,
    pub verb: String,
    pub about: String,
    pub by: String,
    pub at: Timestamp,
    /// The lock of the bundle being applied.
    pub bundle: Option<Digest>,
}

impl Header {
    pub fn is(&self, verb: &str, bundle: &Digest) -> bool {
        self.verb == verb && self.bundle.as_ref() == Some(bundle)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Applied,
    Undone,
}

/// What a receipt says so far.
#[derive(Debug)]
pub struct Receipt {
    pub header: Header,
    pub path: PathBuf,
    /// Intended steps in order, with their undo and whether that was carried out.
    pub steps: Vec<Intended>,
    pub outcome: Option<Outcome>,
    file: Option<File>,
}

#[derive(Debug)]
pub struct Intended {
    pub step: String,
    pub undo: Undo,
    pub done: bool,
    pub undone: bool,
}

/// What would be undone of these receipts, oldest first.
pub fn undos(receipts: &[Receipt]) -> impl Iterator<Item = &Undo> {
    receipts.iter().flat_map(|r| &r.steps).filter(|i| !i.undone).map(|i| &i.undo)
}

impl Receipt {
    /// Begins a new receipt with the next number.
    pub fn begin(plan: &Plan, by: &str, bundle: Option<&Digest>) -> Result<Self> {
        let dir = Path::new(paths::RECEIPTS);
        // What files held before, and jobs with their services' environment.
        for (dir, mode) in [(Path::new(paths::VAR), 0o711), (dir, 0o700)] {
            if !hostfs::looks_like(dir, mode, (0, 0)) {
                hostfs::make_dir(dir, mode, None)?;
            }
        }
        let next = list()?.last_key_value().map_or(1, |(n, _)| n + 1);
        let path = dir.join(format!("{next:06}-{}.jsonl", plan.verb));
        let header = Header {
            schema: 1,
            verb: plan.verb.into(),
            about: plan.about.clone(),
            by: by.into(),
            at: Timestamp::now(),
            bundle: bundle.cloned(),
        };
        let file = OpenOptions::new().append(true).create_new(true).open(&path).at(&path)?;
        hostfs::sync_dir(dir)?;
        let mut receipt =
            Self { header: header.clone(), path, steps: Vec::new(), outcome: None, file: Some(file) };
        receipt.append(&Entry::Begin(header))?;
        Ok(receipt)
    }

    fn read(path: &Path) -> Result<Option<Self>> {
        let text = fs::read_to_string(path).at(path)?;
        let mut receipt: Option<Self> = None;
        // A line cut short by a crash announced nothing that happened.
        for line in text.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
            let entry: Entry = serde_json::from_str(line).or_code(Code::Io, path.display())?;
            match (entry, &mut receipt) {
                (Entry::Begin(header), none @ None) => {
                    *none = Some(Self {
                        header,
                        path: path.into(),
                        steps: Vec::new(),
                        outcome: None,
                        file: None,
                    });
                }
                (Entry::Intend { step, undo }, Some(r)) => {
                    r.steps.push(Intended { step, undo, done: false, undone: false });
                }
                (Entry::Done { step }, Some(r)) => r.mark(&step, |i| i.done = true),
                (Entry::Undone { step }, Some(r)) => r.mark(&step, |i| i.undone = true),
                (Entry::End { outcome, .. }, Some(r)) => r.outcome = Some(outcome),
                _ => return Err(Code::Io.err(format!("{}: a receipt out of order", path.display()))),
            }
        }
        Ok(receipt)
    }

    fn mark(&mut self, step: &str, set: impl Fn(&mut Intended)) {
        self.steps.iter_mut().filter(|i| i.step == step).for_each(set);
    }

    fn append(&mut self, entry: &Entry) -> Result<()> {
        if self.file.is_none() {
            // What a crash left of a last line goes first: lines must stay whole.
            let text = fs::read(&self.path).at(&self.path)?;
            let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
            let file = OpenOptions::new().append(true).open(&self.path).at(&self.path)?;
            file.set_len(whole as u64).at(&self.path)?;
            self.file = Some(file);
        }
        let mut line = serde_json::to_vec(entry).or_code(Code::Bug, "writing a receipt")?;
        line.push(b'\n');
        let file = self.file.as_mut().ok_or_else(|| Code::Bug.err("a receipt without a file"))?;
        file.write_all(&line).and_then(|()| file.sync_data()).at(&self.path)?;
        failpoint::journal_entry();
        Ok(())
    }

    /// Writes down the way back before the step acts. A step that an interrupted run wrote down
    /// already keeps its first undo: what is there now may be half ours.
    pub fn intend(&mut self, step: &str, undo: &Undo) -> Result<()> {
        if self.steps.iter().any(|i| i.step == step && !i.undone) {
            return Ok(());
        }
        self.append(&Entry::Intend { step: step.into(), undo: undo.clone() })?;
        self.steps.push(Intended { step: step.into(), undo: undo.clone(), done: false, undone: false });
        Ok(())
    }

    /// The step was begun by a run that did not come to its end.
    pub fn is_half_done(&self, step: &str) -> bool {
        self.steps.iter().any(|i| i.step == step && !i.done && !i.undone)
    }

    pub fn done(&mut self, step: &str) -> Result<()> {
        self.append(&Entry::Done { step: step.into() })?;
        self.mark(step, |i| i.done = true);
        Ok(())
    }

    pub fn undone(&mut self, step: &str) -> Result<()> {
        self.append(&Entry::Undone { step: step.into() })?;
        self.mark(step, |i| i.undone = true);
        Ok(())
    }

    pub fn end(&mut self, outcome: Outcome) -> Result<()> {
        self.append(&Entry::End { outcome, at: Timestamp::now() })?;
        self.outcome = Some(outcome);
        Ok(())
    }
}

/// Receipt files by number.
fn list() -> Result<BTreeMap<u32, PathBuf>> {
    let dir = Path::new(paths::RECEIPTS);
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else { return Ok(found) };
    for path in entries.flatten().map(|e| e.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(n) =
            name.split('-').next().and_then(|n| n.parse().ok()).filter(|_| name.ends_with(".jsonl"))
        {
            found.insert(n, path);
        }
    }
    Ok(found)
}

/// All receipts, oldest first.
pub fn all() -> Result<Vec<Receipt>> {
    let mut receipts = Vec::new();
    for path in list()?.values() {
        receipts.extend(Receipt::read(path)?);
    }
    Ok(receipts)
}

/// The receipt that has no end: an interrupted plan. There is at most one.
pub fn unfinished() -> Result<Option<Receipt>> {
    Ok(all()?.into_iter().rev().find(|r| r.outcome.is_none()))
}

/// Refuses to go on over an interrupted plan.
pub fn refuse_unfinished() -> Result<()> {
    resumed(|_| false).map(drop)
}

/// The interrupted plan where it is the `same` as what is asked for, which then goes on with it. Any other stands in
/// the way.
pub fn resumed(same: impl Fn(&Header) -> bool) -> Result<Option<Receipt>> {
    match unfinished()? {
        Some(Receipt { header, .. }) if !same(&header) => Err(Code::Unfinished
            .err(format!("an interrupted {} of {} stands in the way", header.verb, header.about))
            .cure(format!("run the same `zd {}` again to finish it, or `zd undo` to go back", header.verb))),
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Lock;
    use crate::host::config::HostConfig;
    use crate::service::state::State;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    #[test]
    fn files_of_earlier_versions_are_read() {
        let receipt = Receipt::read(&fixture("before-upgrade/receipt.jsonl")).unwrap().unwrap();
        assert_eq!((receipt.steps.len(), receipt.outcome), (21, Some(Outcome::Applied)));
        let unknown = receipt.steps.iter().find(|i| i.undo == Undo::Unknown || !i.done);
        assert!(unknown.is_none(), "{unknown:?}");
        let text = |name: &str| fs::read_to_string(fixture(name)).unwrap();
        let state: State = serde_json::from_str(&text("before-upgrade/state.json")).unwrap();
        assert_eq!(state.slots.len(), 1);
        let host: HostConfig = toml::from_str(&text("before-upgrade/host.toml")).unwrap();
        assert_eq!(host.generation, 1);
        assert_eq!((host.node().as_str(), host.registries().count()), ("node-10-4-0-17", 1));
        let lock = Lock::parse(text("before-upgrade/zd-lock.json").as_bytes()).unwrap();
        assert_eq!(lock.releases.len(), 3);

        let receipt = Receipt::read(&fixture("reconfigured/receipt.jsonl")).unwrap().unwrap();
        assert_eq!((receipt.steps.len(), receipt.outcome), (8, Some(Outcome::Applied)));
        assert!(receipt.steps.iter().all(|i| i.undo != Undo::Unknown && i.done));
        let host: HostConfig = toml::from_str(&text("reconfigured/host.toml")).unwrap();
        assert_eq!((host.node().as_str(), host.registries().count()), ("node-10-4-0-17", 2));
    }

    /// After the way back from an upgrade, the zd before reads receipts of the one after.
    #[test]
    fn a_finished_receipt_of_a_newer_zd_is_read() {
        let receipt = Receipt::read(&fixture("newer-receipt.jsonl")).unwrap().unwrap();
        assert_eq!((receipt.steps[0].undo.clone(), receipt.outcome), (Undo::Unknown, Some(Outcome::Applied)));
    }
}
