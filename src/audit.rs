//! The audit log: append-only JSON lines, each with the SHA-256 of the line before. The last line's
//! number and hash stand apart as well, so that a log cut short is noticed.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{At, Code, OrCode, Result};
use crate::host::{fs as hostfs, paths};
use crate::ids::{Digest, Name, Slot, Version};

/// What stands before the first line.
const GENESIS: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub schema: u32,
    pub seq: u64,
    pub at: Timestamp,
    pub by: String,
    pub verb: String,
    /// `begun`, `done`, `failed`, `undone`, `recovered`.
    pub outcome: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Release>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Release>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    pub prev: Digest,
}

/// What ran where: the bytes by digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    pub slot: Slot,
    pub version: Version,
    pub digest: Digest,
}

/// A record before it gets its place in the chain.
#[derive(Clone, Debug, Default)]
pub struct Event<'a> {
    pub verb: &'a str,
    pub outcome: &'a str,
    pub reason: &'a str,
    pub service: Option<&'a Name>,
    pub from: Option<Release>,
    pub to: Option<Release>,
    pub detail: String,
}

#[derive(Serialize, Deserialize)]
struct Head {
    seq: u64,
    hash: Digest,
}

/// Appends, with fsync. Call it while holding the lock.
pub fn append(event: Event) -> Result<()> {
    let path = Path::new(paths::AUDIT);
    for dir in [paths::LOG, paths::VAR] {
        fs::create_dir_all(dir).at(dir)?;
    }
    let (seq, prev) = place(last_line(path)?.as_deref(), read_head()?)?;
    let record = Record {
        schema: 1,
        seq,
        at: Timestamp::now(),
        by: actor(),
        verb: event.verb.into(),
        outcome: event.outcome.into(),
        reason: event.reason.into(),
        service: event.service.cloned(),
        from: event.from,
        to: event.to,
        detail: event.detail,
        prev,
    };
    let line = serde_json::to_string(&record).or_code(Code::Bug, "writing the audit log")?;
    let mut file = OpenOptions::new().create(true).append(true).open(path).at(path)?;
    file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data()).at(path)?;
    let head = Head { seq, hash: Digest::of(line.as_bytes()) };
    let head = serde_json::to_vec(&head).or_code(Code::Bug, "writing the audit head")?;
    hostfs::write(Path::new(paths::AUDIT_HEAD), &head, 0o644, None)
}

/// Number and link of the next record. The head decides where the log does not agree with it: work goes
/// on at night, and the chain stays visibly broken at the place where somebody cut or altered it.
fn place(last: Option<&str>, head: Option<Head>) -> Result<(u64, Digest)> {
    let record = last.and_then(|l| Some((serde_json::from_str::<Record>(l).ok()?, Digest::of(l.as_bytes()))));
    let genesis = || GENESIS.parse().map_err(|e: String| Code::Bug.err(e));
    Ok(match (record, head) {
        // A crash between line and head leaves the head one behind.
        (Some((last, hash)), Some(head)) if hash == head.hash || last.prev == head.hash => {
            (last.seq + 1, hash)
        }
        (_, Some(head)) => (head.seq + 1, head.hash),
        (Some((last, hash)), None) => (last.seq + 1, hash),
        (None, None) => (1, genesis()?),
    })
}

fn read_head() -> Result<Option<Head>> {
    let head = hostfs::read_if_any(Path::new(paths::AUDIT_HEAD))?;
    Ok(head.and_then(|h| serde_json::from_slice(&h).ok()))
}

fn last_line(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = hostfs::read_if_any(path)? else { return Ok(None) };
    let text = String::from_utf8(bytes).or_code(Code::Audit, "the audit log")?;
    Ok(text.lines().last().map(str::to_owned))
}

/// Reads the whole log and checks every link; names the first that does not hold.
pub fn read() -> Result<Vec<Record>> {
    let path = Path::new(paths::AUDIT);
    let text = hostfs::read_if_any(path)?.unwrap_or_default();
    let text = String::from_utf8(text).or_code(Code::Audit, "the audit log")?;
    check(&text, read_head()?.as_ref())
}

fn check(text: &str, head: Option<&Head>) -> Result<Vec<Record>> {
    let broken = |n: u64, why: &str| {
        Code::Audit
            .err(format!("the audit log is broken at line {n}: {why}"))
            .cure(format!("keep {} as it is and find out who changed it; earlier lines hold", paths::AUDIT))
    };
    let mut records: Vec<Record> = Vec::new();
    let mut prev = GENESIS.to_owned();
    for (i, line) in text.lines().enumerate() {
        let n = i as u64 + 1;
        let record: Record = serde_json::from_str(line).map_err(|e| broken(n, &e.to_string()))?;
        if record.prev.as_str() != prev {
            return Err(broken(n, "it does not follow the line before"));
        }
        if record.seq != n {
            return Err(broken(n, "its number is wrong"));
        }
        prev = Digest::of(line.as_bytes()).as_str().to_owned();
        records.push(record);
    }
    // A crash between line and head leaves the head one behind.
    if let Some(head) = head {
        let at_head = text.lines().nth(head.seq.saturating_sub(1) as usize);
        if at_head.is_none_or(|l| Digest::of(l.as_bytes()) != head.hash) {
            return Err(broken(head.seq, "it was there once, and is gone or altered"));
        }
    }
    Ok(records)
}

/// Who is acting: the login behind sudo, else the login, with the user id.
pub fn actor() -> String {
    let var = |name| std::env::var(name).ok().filter(|v: &String| !v.is_empty());
    let uid = rustix::process::getuid().as_raw();
    // The kernel's login uid survives su and sudo (proc_pid_loginuid).
    let login = fs::read_to_string("/proc/self/loginuid").ok().and_then(|t| t.trim().parse::<u32>().ok());
    let login = login.filter(|l| *l != u32::MAX);
    let name =
        var("SUDO_USER").or_else(|| user_name(login.unwrap_or(uid))).unwrap_or_else(|| format!("uid {uid}"));
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

fn user_name(uid: u32) -> Option<String> {
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let of = |l: &str| {
        let mut fields = l.split(':');
        let name = fields.next()?.to_owned();
        (fields.nth(1)? == uid.to_string()).then_some(name)
    };
    passwd.lines().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(n: u64) -> (String, Head) {
        let (mut text, mut prev) = (String::new(), GENESIS.parse().unwrap());
        for seq in 1..=n {
            let record = Record {
                schema: 1,
                seq,
                at: Timestamp::UNIX_EPOCH,
                by: "kim".into(),
                verb: "switch".into(),
                outcome: "done".into(),
                reason: String::new(),
                service: None,
                from: None,
                to: None,
                detail: String::new(),
                prev,
            };
            let line = serde_json::to_string(&record).unwrap();
            prev = Digest::of(line.as_bytes());
            text.push_str(&line);
            text.push('\n');
        }
        (text, Head { seq: n, hash: prev })
    }

    #[test]
    fn a_changed_removed_or_cut_line_is_named() {
        let (text, head) = chain(5);
        assert_eq!(check(&text, Some(&head)).unwrap().len(), 5);
        let changed = text.replacen("kim", "lee", 2);
        assert!(check(&changed, Some(&head)).unwrap_err().what.contains("line 2"));
        let lines: Vec<&str> = text.lines().collect();
        let removed = [&lines[..2], &lines[3..]].concat().join("\n");
        assert!(check(&removed, Some(&head)).unwrap_err().what.contains("line 3"));
        let cut = lines[..3].join("\n");
        assert!(check(&cut, Some(&head)).unwrap_err().what.contains("line 5"));
        // Cut, and written on: the cut still shows.
        let (seq, prev) = place(Some(lines[2]), Some(Head { seq: 5, hash: head.hash.clone() })).unwrap();
        assert_eq!((seq, prev), (6, head.hash.clone()));
        let last_changed = text.replace("\"seq\":5,", "\"seq\":5, ");
        assert!(check(&last_changed, Some(&head)).is_err());
    }
}
