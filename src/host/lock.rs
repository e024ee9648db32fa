//! The one lock of a host: whoever changes it holds it; whoever does not get it learns who does.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{fs as hostfs, paths};
use crate::audit;
use crate::error::{At, Code, FREE_SOME, Result};
use crate::facts;
use crate::ui::Ui;

/// Verbs that free space, go back, or are run by units: they begin on a full disk as well.
const ON_A_FULL_DISK: [&str; 6] = ["undo", "uninstall", "gc", "settle", "publish", "reload"];
/// For the records of one command: audit log, receipt, state, report.
const RECORDS: ByteSize = ByteSize::mib(1);
/// Verbs that units run and nobody has asked for: who meets one waits, at most so long.
const OF_UNITS: [&str; 2] = ["publish", "reload"];
const PATIENCE: Duration = Duration::from_secs(30);
/// Who waits for longer than this is told.
const MOMENT: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_millis(50);

/// Held until dropped; the kernel releases it when zd dies.
pub struct HostLock {
    _file: File,
}

#[derive(Serialize, Deserialize)]
struct Holder {
    pid: u32,
    by: String,
    verb: String,
    since: Timestamp,
}

impl HostLock {
    pub fn take(verb: &str, ui: &Ui) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(Code::Preflight
                .err(format!("zd {verb} changes this host and needs root"))
                .cure(format!("sudo zd {verb} …")));
        }
        if !Path::new(paths::RUN).is_dir() {
            hostfs::make_dir(Path::new(paths::RUN), 0o755, None)?;
        }
        let lock = Self::take_at(Path::new(paths::LOCK), verb, PATIENCE, ui)?;
        if !ON_A_FULL_DISK.contains(&verb) {
            room_for_records(verb)?;
        }
        Ok(lock)
    }

    fn take_at(path: &Path, verb: &str, patience: Duration, ui: &Ui) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        // Whoever may open it may lock it (flock(2)).
        let mut file = options.mode(0o600).open(path).at(path)?;
        file.set_permissions(fs::Permissions::from_mode(0o600)).at(path)?;
        let start = Instant::now();
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(e)) => return Err(crate::error::io(path, e)),
            }
            let holder = Holder::read(&mut file);
            if start.elapsed() >= patience || !holder.as_ref().is_none_or(Holder::is_passing) {
                return Err(held(holder));
            }
            if let Some(holder) = holder.filter(|_| !told && start.elapsed() > MOMENT) {
                ui.say(format!("waiting for zd {} (process {}) to end", holder.verb, holder.pid));
                told = true;
            }
            std::thread::sleep(EVERY);
        }
        let holder = Holder {
            pid: std::process::id(),
            by: audit::actor(),
            verb: verb.into(),
            since: Timestamp::now(),
        };
        let text = serde_json::to_vec(&holder).unwrap_or_default();
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).at(path)?;
        file.write_all(&text).at(path)?;
        Ok(Self { _file: file })
    }

    /// Some zd is at work. Looking keeps another one out for that moment, so it is for rare cases.
    pub fn is_held() -> bool {
        File::open(paths::LOCK).is_ok_and(|f| matches!(f.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }
}

/// What is done must be able to be written down.
fn room_for_records(verb: &str) -> Result<()> {
    for dir in [paths::VAR, paths::LOG] {
        let (_, free) = facts::space(Path::new(dir))?;
        if free < RECORDS.as_u64() {
            let free = ByteSize(free);
            return Err(Code::DiskFull
                .err(format!("{dir} has {free} free, and zd {verb} needs {RECORDS} for its records; nothing was changed"))
                .cure(format!("free some: {FREE_SOME}")));
        }
    }
    Ok(())
}

impl Holder {
    /// None where it has not written itself down yet.
    fn read(file: &mut File) -> Option<Self> {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// It lets go by itself soon. One whose process is gone is of before: the lock was just taken again.
    fn is_passing(&self) -> bool {
        OF_UNITS.contains(&self.verb.as_str()) || !Path::new("/proc").join(self.pid.to_string()).exists()
    }
}

fn held(holder: Option<Holder>) -> crate::error::Error {
    let who = match holder {
        Some(h) => format!("zd {} (process {}) of {} holds it since {}", h.verb, h.pid, h.by, h.since),
        None => "another zd holds it".into(),
    };
    Code::Locked
        .err(format!("this host's lock is taken: {who}"))
        .cure("wait until it has finished, then try again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_waited_for_and_a_person_is_not() {
        let (dir, ui) = (tempfile::tempdir().unwrap(), Ui::new(false, true));
        let path = dir.path().join("lock");
        let take =
            |verb: &str, patience| HostLock::take_at(&path, verb, Duration::from_millis(patience), &ui);
        let of_person = take("switch", 0).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let start = Instant::now();
        let e = take("deploy", 60_000).err().unwrap();
        assert_eq!(e.code, Code::Locked);
        assert!(e.what.contains("zd switch (process ") && start.elapsed() < Duration::from_secs(10));
        drop(of_person);

        let of_unit = take("reload", 0).unwrap();
        let e = take("deploy", 100).err().unwrap();
        assert!(e.what.contains("zd reload (process "), "{}", e.what);
        let letting_go = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(of_unit);
        });
        let _mine = take("deploy", 60_000).unwrap();
        letting_go.join().unwrap();
        assert!(take("switch", 0).err().unwrap().what.contains("zd deploy (process "));
    }
}
