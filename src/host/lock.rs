//! The one lock of a host: whoever changes it holds it; whoever does not get it learns who does.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::paths;
use crate::audit;
use crate::error::{At, Code, Result};

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
    pub fn take(verb: &str) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(Code::Preflight
                .err(format!("zd {verb} changes this host and needs root"))
                .cure(format!("sudo zd {verb} …")));
        }
        fs::create_dir_all(paths::RUN).at(paths::RUN)?;
        let path = Path::new(paths::LOCK);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path).at(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(&mut file)),
            Err(TryLockError::Error(e)) => return Err(crate::error::io(path, e)),
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
}

fn held(file: &mut File) -> crate::error::Error {
    let mut text = String::new();
    let _ = file.read_to_string(&mut text);
    let who = match serde_json::from_str::<Holder>(&text) {
        Ok(h) => format!("zd {} (process {}) of {} holds it since {}", h.verb, h.pid, h.by, h.since),
        Err(_) => "another zd holds it".into(),
    };
    Code::Locked
        .err(format!("this host's lock is taken: {who}"))
        .cure("wait until it has finished, then try again")
}
