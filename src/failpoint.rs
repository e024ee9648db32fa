//! For the tests that kill zd at a chosen moment: `ZD_FAILPOINT=journal:7` dies, as by `kill -9`, right
//! after the seventh journal entry, `ZD_FAILPOINT=switch:held` in the middle of a hold. Without the
//! variable nothing happens.

use std::sync::atomic::{AtomicU32, Ordering};

pub fn reach(name: &str) {
    if std::env::var("ZD_FAILPOINT").is_ok_and(|wanted| wanted == name) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// One journal entry more is on disk.
pub fn journal_entry() {
    static WRITTEN: AtomicU32 = AtomicU32::new(0);
    reach(&format!("journal:{}", WRITTEN.fetch_add(1, Ordering::Relaxed) + 1));
}
