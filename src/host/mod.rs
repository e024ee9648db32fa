//! The only code that touches the machine.

pub mod api;
pub mod config;
pub mod consul;
pub mod docker;
pub mod exec;
pub mod firewall;
pub mod fs;
pub mod generation;
pub mod http;
pub mod jobs;
pub mod journal;
pub mod lock;
pub mod nginx;
pub mod nginx_requests;
pub mod nomad;
pub mod operators;
pub mod packages;
pub mod paths;
pub mod registry;
#[cfg(test)]
mod replay;
pub mod secrets;
pub mod signing;
pub mod sock_diag;
pub mod stores;
pub mod systemd;
pub mod trust;

use std::io::Read;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use self::config::Installed;
use crate::backup::Backup;
use crate::bundle::Bundle;
use crate::bundle::lock::{Image, MAX_LOCK};
use crate::error::{At, Code, Result};
use crate::ids::Digest;
use crate::service::watch::Watch;
use crate::ui::Ui;

/// A switch has one open file for each request that it holds; a shell's usual limit is 1024. Not as many as the kernel
/// gives: there are programs that close each number up to their limit.
const OPEN_FILES: u64 = 65_536;

/// Raises this process's limit of open files as far as it may.
pub fn raise_open_files() {
    let now = getrlimit(Resource::Nofile);
    let most = now.maximum.unwrap_or(u64::MAX);
    let wanted = OPEN_FILES.max(now.current.unwrap_or(u64::MAX));
    let to = |current, maximum| Rlimit { current: Some(current), maximum };
    // The hard limit is root's to raise, with CAP_SYS_RESOURCE.
    let raised = match most < wanted {
        true => setrlimit(Resource::Nofile, to(wanted, Some(wanted))),
        false => setrlimit(Resource::Nofile, to(wanted, now.maximum)),
    };
    if raised.is_err() {
        let _ = setrlimit(Resource::Nofile, to(most, now.maximum));
    }
}

/// What carrying out a step needs besides the step itself.
pub struct Host<'a> {
    pub ui: &'a Ui,
    /// What switches that a step makes are recorded as.
    pub verb: &'static str,
    /// Present while a bundle is being applied.
    pub bundle: Option<&'a Bundle>,
    /// Present while a backup is being put back.
    pub backup: Option<&'a Backup>,
    /// Sees what clients see while a plan is applied to services at work.
    pub watch: Option<&'a Watch>,
    /// As it will be, where that is written down only at the end of the plan.
    pub coming: Option<&'a Installed>,
}

impl<'a> Host<'a> {
    pub fn new(ui: &'a Ui) -> Self {
        Self { ui, verb: "restore", bundle: None, backup: None, watch: None, coming: None }
    }

    /// An image that is carried, by `name:version`, or by `name@digest` where another has that version.
    pub fn image(&self, named: &str) -> Option<&'a Image> {
        let images = self.bundle.iter().flat_map(|b| &b.lock.images);
        let saved = self.backup.iter().flat_map(|b| &b.index.images);
        let mut by_version = images.chain(saved.clone()).filter(|i| i.reference.to_string() == named);
        let by_digest = || saved.clone().find(|i| format!("{}@{}", i.reference.name, i.manifest) == named);
        by_version.next().or_else(by_digest)
    }

    /// The bytes of a blob that is carried, and how many they are.
    pub fn blob(&self, digest: &Digest) -> Result<(Box<dyn Read + Send>, u64)> {
        if let Some(backup) = self.backup
            && let Some((from, size)) = backup.blob(digest)?
        {
            return Ok((Box::new(from), size));
        }
        match self.bundle {
            Some(bundle) => Ok((Box::new(bundle.blob(digest)?), bundle.lock.size_of(digest))),
            None => Err(Code::Bundle
                .err(format!("blob {digest} is not in the backup, for the installed bundle has it"))
                .cure("zd install with the bundle that is installed, from its stick; then the same command again")),
        }
    }

    /// A small blob, whole and checked.
    pub fn small_blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let (mut from, size) = self.blob(digest)?;
        let mut bytes = Vec::new();
        from.by_ref().take(size.min(MAX_LOCK)).read_to_end(&mut bytes).at(digest.as_str())?;
        match Digest::of(&bytes) == *digest {
            true => Ok(bytes),
            false => Err(Code::Bundle.err(format!("blob {digest} does not have the bytes its name says"))),
        }
    }
}

/// Asks every so often until it goes well; after `limit` the last error stands.
pub async fn until<T>(
    limit: Duration,
    every: Duration,
    mut ask: impl AsyncFnMut() -> Result<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        match ask().await {
            Err(_) if start.elapsed() < limit => tokio::time::sleep(every).await,
            other => return other,
        }
    }
}
