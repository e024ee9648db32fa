//! For the tests that kill zd at a chosen moment: `ZD_FAILPOINT=journal:7` dies, as by `kill -9`, right
//! after the seventh journal entry, `ZD_FAILPOINT=switch:held` in the middle of a hold.
//!
//! Only on a host of tests: one where root has made the folder [`HOST_OF_TESTS`]. It is no feature of the build, for what
//! is tested is then not what is carried. And it takes nothing but root, who can kill zd anyway: the environment alone,
//! which a sudo rule may let through, does nothing.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU32, Ordering};

const HOST_OF_TESTS: &str = "/run/zd-test";

pub fn reach(name: &str) {
    if std::env::var("ZD_FAILPOINT").is_ok_and(|wanted| wanted == name) && is_host_of_tests() {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

fn is_host_of_tests() -> bool {
    let found = std::fs::symlink_metadata(HOST_OF_TESTS);
    found.is_ok_and(|meta| meta.is_dir() && meta.uid() == 0)
}

/// One journal entry more is on disk.
pub fn journal_entry() {
    static WRITTEN: AtomicU32 = AtomicU32::new(0);
    reach(&format!("journal:{}", WRITTEN.fetch_add(1, Ordering::Relaxed) + 1));
}
