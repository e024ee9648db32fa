//! The audit log: append-only JSON lines, each with the SHA-256 of the line before. The last line's
//! number and hash stand apart as well, so that a log cut short is noticed; there they are signed by the host.
//! Each record goes to the host's journal as well, where a forwarder of the site finds it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::bundle::signature::{self, Fault, Key, OF_HOST};
use crate::error::{At, Code, Error, OrCode, Result};
use crate::host::signing::{self, Signed};
use crate::host::{fs as hostfs, journal, paths};
use crate::ids::{Digest, Name, Slot, Version};
use crate::ui::Ui;
use crate::who::Who;

/// What stands before the first line.
const GENESIS: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

const REFUSED: &str = "refused";
const KEY_GIVEN: &str = "key-given";
/// What is refused can be tried again and again: so many in a row within an hour go into the log, the journal gets all.
const REFUSALS: usize = 20;
/// Of what was refused; it may quote what somebody else wrote.
const LONGEST: usize = 1000;
/// Verbs whose refusal, or key, is no record: they change nothing, or units run them, and their own records say what came of it.
const READS_OR_OF_UNITS: [&str; 15] = [
    "keygen",
    "pack",
    "inspect",
    "doctor",
    "generations",
    "status",
    "history",
    "logs",
    "loadtest",
    "check-stores",
    "publish",
    "reload",
    "settle",
    "completions",
    "man",
];
/// This run has said itself how it ended.
static SPOKEN: AtomicBool = AtomicBool::new(false);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub schema: u32,
    pub seq: u64,
    pub at: Timestamp,
    pub by: String,
    /// What `by` is from, and what else there was. None in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    pub verb: String,
    /// `begun`, `done`, `failed`, `undone`, `finished`, `recovered`, `refused`, `key-given`.
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
    /// Of the two above, see [`signed_bytes`]. None where the host had no key, as with earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signature: Option<String>,
}

/// A record in its place.
pub struct Written {
    pub record: Record,
    /// Of its line.
    pub hash: Digest,
    /// Of its number and hash.
    pub signed: Option<Signed>,
}

/// Appends, with fsync. Call it while holding the lock.
pub fn append(event: Event) -> Result<()> {
    write(event).map(drop)
}

/// As [`append`]; for those who speak of the record.
pub fn write(event: Event) -> Result<Written> {
    SPOKEN.store(true, Ordering::Relaxed);
    for dir in [paths::LOG, paths::VAR] {
        fs::create_dir_all(dir).at(dir)?;
    }
    let (log, head) = (Path::new(paths::AUDIT), Path::new(paths::AUDIT_HEAD));
    let written = write_at(log, head, event, Timestamp::now(), false)?;
    written.ok_or_else(|| Code::Bug.err("a record that is not a refusal was left out"))
}

/// A run that ends with an error and has not written down why itself. Only root's, and only where zd is installed: others
/// cannot change anything, and shall not fill the log.
pub fn refused(verb: &str, error: &Error, ui: &Ui) {
    if SPOKEN.load(Ordering::Relaxed) {
        return;
    }
    note(verb, REFUSED, format!("{}: {}", error.code.name(), error.what), ui);
}

/// A key that the operator names decides over the one that this host trusts.
pub fn key_given(verb: &str, key: &str, ui: &Ui) {
    note(verb, KEY_GIVEN, format!("--key {key}"), ui);
}

fn note(verb: &str, outcome: &str, detail: String, ui: &Ui) {
    let is_host = rustix::process::geteuid().is_root() && Path::new(paths::CURRENT).is_symlink();
    if !is_host || READS_OR_OF_UNITS.contains(&verb) {
        return;
    }
    let detail = detail.chars().take(LONGEST).collect();
    let event = Event { verb, outcome, detail, ..Event::default() };
    let written =
        write_at(Path::new(paths::AUDIT), Path::new(paths::AUDIT_HEAD), event, Timestamp::now(), true);
    if let Err(e) = written {
        ui.warn(format!("this was not written into the audit log: {}", e.what));
    }
}

/// Where the head cannot be written (a full disk), the log is again what it was before. None where the log has enough of
/// the kind; the journal has it.
fn write_at(
    path: &Path,
    head_path: &Path,
    event: Event,
    now: Timestamp,
    bounded: bool,
) -> Result<Option<Written>> {
    // The host's lock does not do: who does not get it is recorded. Its own file, for the log can be read by all.
    let lock = path.with_extension("lock");
    let mut options = OpenOptions::new();
    let locked = options.write(true).create(true).truncate(false).mode(0o600).open(&lock).at(&lock)?;
    locked.lock().at(&lock)?;
    let bytes = hostfs::read_if_any(path)?.unwrap_or_default();
    let before = whole(&bytes);
    let text = std::str::from_utf8(before).or_code(Code::Audit, "the audit log")?;
    let (seq, prev) = place(text.lines().last(), read_head(head_path)?)?;
    let who = Who::now();
    let record = Record {
        schema: 1,
        seq,
        at: now,
        by: who.name(),
        who: Some(who),
        verb: event.verb.into(),
        outcome: event.outcome.into(),
        reason: event.reason.into(),
        service: event.service.cloned(),
        from: event.from,
        to: event.to,
        detail: event.detail,
        prev,
    };
    if bounded && enough_of_the_kind(text, now) {
        tell(&record, None);
        return Ok(None);
    }
    let line = serde_json::to_string(&record).or_code(Code::Bug, "writing the audit log")?;
    let hash = Digest::of(line.as_bytes());
    let what = format!("record {seq} of the audit log, {}", record.at);
    let signed = signing::sign(signed_bytes(seq, &hash).as_bytes(), &what);
    let signature = signed.as_ref().map(|signed| signed.text.clone());
    let head = Head { seq, hash: hash.clone(), signature };
    let head = serde_json::to_vec(&head).or_code(Code::Bug, "writing the audit head")?;
    let mut file = OpenOptions::new().create(true).append(true).open(path).at(path)?;
    let newline = if before.last().is_none_or(|b| *b == b'\n') { "" } else { "\n" };
    let appended = file
        .set_len(before.len() as u64)
        .and_then(|()| file.write_all(format!("{newline}{line}\n").as_bytes()))
        .and_then(|()| file.sync_data())
        .at(path)
        .and_then(|()| hostfs::write(head_path, &head, 0o644, None));
    if let Err(e) = appended {
        file.set_len(before.len() as u64).and_then(|()| file.sync_data()).at(path)?;
        return Err(e);
    }
    tell(&record, Some(&hash));
    Ok(Some(Written { record, hash, signed }))
}

/// The last records are refusals, and the first of these is young.
fn enough_of_the_kind(log: &str, now: Timestamp) -> bool {
    let last: Vec<Record> =
        log.lines().rev().take(REFUSALS).map_while(|l| serde_json::from_str(l).ok()).collect();
    let of_the_kind = last.iter().take_while(|r| [REFUSED, KEY_GIVEN].contains(&r.outcome.as_str())).count();
    of_the_kind == REFUSALS && last.last().is_some_and(|r| now.duration_since(r.at).as_secs() < 3600)
}

fn tell(record: &Record, hash: Option<&Digest>) {
    // The journal of the machine that the unit tests run on has no use for theirs.
    if cfg!(not(test)) {
        journal::send(&fields(record, hash));
    }
}

/// What journald and syslog forwarders get; no hash where the log does not have the record.
fn fields(record: &Record, hash: Option<&Digest>) -> Vec<(&'static str, String)> {
    let who = record.who.clone().unwrap_or_default();
    let side = |release: &Option<Release>| {
        release.as_ref().map(|r| format!("{} {} {}", r.slot, r.version, r.digest)).unwrap_or_default()
    };
    let good = !["failed", REFUSED].contains(&record.outcome.as_str());
    let about = [&record.reason, &record.detail].map(|text| text.lines().next().unwrap_or_default());
    let about = about.into_iter().filter(|text| !text.is_empty()).map(|text| format!("; {text}"));
    let about: String = about.collect();
    vec![
        ("MESSAGE", format!("zd {} {} by {}{about}", record.verb, record.outcome, record.by)),
        // Notice or warning, of facility authpriv (syslog(3)).
        ("PRIORITY", if good { "5" } else { "4" }.into()),
        ("SYSLOG_FACILITY", "10".into()),
        ("SYSLOG_IDENTIFIER", "zd".into()),
        ("ZD_SEQ", hash.map(|_| record.seq.to_string()).unwrap_or_default()),
        ("ZD_HASH", hash.map(ToString::to_string).unwrap_or_default()),
        ("ZD_BY", record.by.clone()),
        ("ZD_LOGINUID", who.loginuid.map(|uid| uid.to_string()).unwrap_or_default()),
        ("ZD_UID", who.uid.to_string()),
        ("ZD_SUDO_USER", who.sudo_user.unwrap_or_default()),
        ("ZD_TTY", who.tty.unwrap_or_default()),
        ("ZD_SSH_CONNECTION", who.ssh_connection.unwrap_or_default()),
        ("ZD_VERB", record.verb.clone()),
        ("ZD_OUTCOME", record.outcome.clone()),
        ("ZD_REASON", record.reason.clone()),
        ("ZD_SERVICE", record.service.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("ZD_FROM", side(&record.from)),
        ("ZD_TO", side(&record.to)),
        ("ZD_DETAIL", record.detail.clone()),
    ]
}

/// The log without the piece of a line that a power cut left at its end: that never became a record.
fn whole(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let is_record = serde_json::from_slice::<Record>(&bytes[end..]).is_ok();
    if is_record { bytes } else { &bytes[..end] }
}

/// What the signature of a head is of: the head as it would be without one.
pub fn signed_bytes(seq: u64, hash: &Digest) -> String {
    format!(r#"{{"seq":{seq},"hash":"{hash}"}}"#)
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

fn read_head(path: &Path) -> Result<Option<Head>> {
    let head = hostfs::read_if_any(path)?;
    Ok(head.and_then(|h| serde_json::from_slice(&h).ok()))
}

/// Reads the whole log and checks every link; names the first that does not hold.
pub fn read() -> Result<Vec<Record>> {
    let bytes = hostfs::read_if_any(Path::new(paths::AUDIT))?.unwrap_or_default();
    let text = std::str::from_utf8(whole(&bytes)).or_code(Code::Audit, "the audit log")?;
    check(text, read_head(Path::new(paths::AUDIT_HEAD))?.as_ref())
}

/// The id of the key that the head is signed with; None where this host has no key yet.
pub fn signed_by() -> Result<Option<String>> {
    let must_be = Path::new(paths::SIGNING_PUB).exists();
    check_signature(read_head(Path::new(paths::AUDIT_HEAD))?.as_ref(), &signing::keys(), must_be)
}

fn check_signature(head: Option<&Head>, keys: &[Key], must_be: bool) -> Result<Option<String>> {
    let Some(head) = head else { return Ok(None) };
    let bad = |why: String, cure: &str| {
        let keep = format!("keep {} and {} as they are", paths::AUDIT, paths::AUDIT_HEAD);
        let what = format!("the signature of the audit log, at record {}, {why}", head.seq);
        Err(Code::Audit.err(what).cure(format!("{keep}; {cure}")))
    };
    let Some(signature) = &head.signature else {
        let cure = format!(
            "an earlier zd, or somebody else, wrote the last record, or {} is damaged. The next record that zd writes \
             is signed again; a key that is gone is made anew by zd install with the installed bundle",
            paths::SIGNING_KEY
        );
        return if must_be { bad("is missing".into(), &cure) } else { Ok(None) };
    };
    let bytes = signed_bytes(head.seq, &head.hash);
    let who = "find out who changed them";
    match signature::check(bytes.as_bytes(), signature, OF_HOST, keys) {
        Ok(key) => Ok(Some(key.id())),
        Err(Fault::Key(id)) => {
            let cure = format!("compare {id} with the key that change control has of this host");
            bad(format!("was made with key {id}, which this host never had"), &cure)
        }
        Err(Fault::Bytes) => bad("is of another record".into(), who),
        Err(Fault::Form | Fault::Unreadable) => bad("cannot be read".into(), who),
    }
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

/// Who is acting, as the records say it.
pub fn actor() -> String {
    Who::now().name()
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
                who: None,
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
        (text, Head { seq: n, hash: prev, signature: None })
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
        let (seq, prev) =
            place(Some(lines[2]), Some(Head { seq: 5, hash: head.hash.clone(), signature: None })).unwrap();
        assert_eq!((seq, prev), (6, head.hash.clone()));
        let last_changed = text.replace("\"seq\":5,", "\"seq\":5, ");
        assert!(check(&last_changed, Some(&head)).is_err());
    }

    #[test]
    fn what_could_not_be_written_down_whole_was_not() {
        let dir = tempfile::tempdir().unwrap();
        let (log, head) = (dir.path().join("log"), dir.path().join("heads/head"));
        let write = |reason| {
            let event = Event { verb: "switch", reason, ..Event::default() };
            write_at(&log, &head, event, Timestamp::now(), false)
        };
        let read = || {
            let bytes = fs::read(&log).unwrap();
            check(std::str::from_utf8(whole(&bytes)).unwrap(), read_head(&head).unwrap().as_ref())
        };
        fs::create_dir(dir.path().join("heads")).unwrap();
        write("one").unwrap();
        // No place for the head, as on a full disk.
        let before = fs::read(&log).unwrap();
        let saved = fs::read(&head).unwrap();
        fs::remove_dir_all(dir.path().join("heads")).unwrap();
        for _ in 0..3 {
            assert!(write("lost").is_err());
        }
        assert_eq!(fs::read(&log).unwrap(), before);
        fs::create_dir(dir.path().join("heads")).unwrap();
        fs::write(&head, saved).unwrap();
        // A power cut in the middle of a line, of a letter even.
        fs::write(&log, [before.as_slice(), &"{\"schema\":1,\"reason\":\"ä".as_bytes()[..23]].concat())
            .unwrap();
        assert_eq!(read().unwrap().len(), 1);
        write("two").unwrap();
        assert_eq!(read().unwrap().len(), 2);
        // An editor that takes the last line break away.
        let bytes = fs::read(&log).unwrap();
        fs::write(&log, &bytes[..bytes.len() - 1]).unwrap();
        write("three").unwrap();
        let reasons: Vec<String> = read().unwrap().into_iter().map(|r| r.reason).collect();
        assert_eq!(reasons, ["one", "two", "three"]);
    }

    #[test]
    fn refusals_do_not_fill_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let (log, head) = (dir.path().join("log"), dir.path().join("head"));
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let write = |outcome, after: i64| {
            let event = Event { verb: "switch", outcome, ..Event::default() };
            let now = start + jiff::SignedDuration::from_secs(after);
            write_at(&log, &head, event, now, outcome != "done").unwrap().is_some()
        };
        let written = (0..100).filter(|after| write(REFUSED, *after)).count();
        assert_eq!(written, REFUSALS);
        assert!(!write(KEY_GIVEN, 101) && !write(REFUSED, 3599));
        assert!(write(REFUSED, 3601), "an hour later");
        assert!(write("done", 3602), "what is done is always written");
        assert!(write(REFUSED, 3603));
        let text = fs::read_to_string(&log).unwrap();
        assert_eq!(check(&text, read_head(&head).unwrap().as_ref()).unwrap().len(), REFUSALS + 3);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(dir.path().join("log.lock")).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600, "nobody else can hold it");
    }

    #[test]
    fn two_that_write_at_once_do_not_break_the_chain() {
        let dir = tempfile::tempdir().unwrap();
        let (log, head) = (dir.path().join("log"), dir.path().join("head"));
        let write = || {
            for _ in 0..20 {
                write_at(&log, &head, Event { verb: "switch", ..Event::default() }, Timestamp::now(), false)
                    .unwrap();
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(write))));
        let text = fs::read_to_string(&log).unwrap();
        assert_eq!(check(&text, read_head(&head).unwrap().as_ref()).unwrap().len(), 80);
    }

    #[test]
    fn the_journal_gets_what_the_record_says() {
        let (text, _) = chain(1);
        let mut record: Record = serde_json::from_str(text.trim()).unwrap();
        record.who = Some(Who { loginuid: Some(1001), sudo_user: Some("lee".into()), ..Who::default() });
        (record.outcome, record.detail) = (REFUSED.into(), "signature: not so\nsecond line".into());
        let fields: std::collections::BTreeMap<_, _> = fields(&record, None).into_iter().collect();
        assert_eq!(fields["MESSAGE"], "zd switch refused by kim; signature: not so");
        assert_eq!([&fields["SYSLOG_FACILITY"], &fields["PRIORITY"], &fields["ZD_SEQ"]], ["10", "4", ""]);
        assert_eq!(
            [&fields["ZD_LOGINUID"], &fields["ZD_UID"], &fields["ZD_SUDO_USER"]],
            ["1001", "0", "lee"]
        );
    }

    #[test]
    fn a_head_is_signed_by_its_host_or_says_why_not() {
        let dir = tempfile::tempdir().unwrap();
        let pair = || {
            let (secret, key) = signature::generate(None).unwrap();
            let path = dir.path().join("key");
            fs::write(&path, secret).unwrap();
            (signature::Signer::read(&path, || unreachable!()).unwrap(), key)
        };
        let ((signer, key), (other, _)) = (pair(), pair());
        let (_, mut head) = chain(3);
        let bytes = signed_bytes(head.seq, &head.hash);
        assert_eq!(bytes, serde_json::to_string(&head).unwrap(), "what a head of earlier versions is");
        let keys = [key];
        assert_eq!(check_signature(Some(&head), &keys, false).unwrap(), None);
        let said = |head: &Head| check_signature(Some(head), &keys, true).unwrap_err().what;
        assert!(said(&head).ends_with("at record 3, is missing"), "{}", said(&head));

        head.signature = Some(signer.sign(bytes.as_bytes(), OF_HOST, "record 3"));
        let again: Head = serde_json::from_slice(&serde_json::to_vec(&head).unwrap()).unwrap();
        assert_eq!(check_signature(Some(&again), &keys, true).unwrap(), Some(keys[0].id()));
        head.seq = 4;
        assert!(said(&head).contains("is of another record"), "{}", said(&head));
        head.signature = Some(other.sign(bytes.as_bytes(), OF_HOST, "record 3"));
        assert!(said(&head).contains(&other.key.id()), "{}", said(&head));
        // What the same key says of something else is no signature of a head.
        head.signature = Some(signer.sign(bytes.as_bytes(), signature::OF_LOCK, "a lock"));
        assert!(said(&head).contains("cannot be read"), "{}", said(&head));
        assert_eq!(check_signature(None, &[], true).unwrap(), None);
    }
}
