//! `zd verify`: is every byte of a bundle the one that was signed?

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use crate::bundle::Bundle;
use crate::bundle::signature::Key;
use crate::bundle::target::Target;
use crate::error::{At, Code, Result};
use crate::host::trust;
use crate::ids::Digest;
use crate::ui::Ui;

/// Check a bundle's signature and every byte of it
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  ./zd verify                        the bundle beside zd\n  \
                        zd verify demo-1 --key zd.pub       the bundle in a folder")]
pub struct Args {
    #[command(flatten)]
    pub bundle: BundleArgs,
}

/// Which bundle, and whose signature counts.
#[derive(clap::Args, Clone, Default)]
pub struct BundleArgs {
    /// The bundle: its file, or the folder that holds it; the one beside zd where not given
    pub bundle: Option<PathBuf>,
    /// Public key to check with: a file, or the key's line. Else those that this host trusts (zd trust list), else
    /// zd.pub beside the bundle. A host that trusts keys installs nothing that is signed with another
    #[arg(long, value_name = "FILE|KEY")]
    pub key: Option<String>,
}

/// How a bundle's key came to be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trust {
    Given,
    Pinned,
    /// The key beside the bundle, on a host that trusts none yet. Whoever could swap it could swap zd
    /// beside it too, so it is as good as the stick; from the first install on it is pinned.
    FirstUse,
}

impl BundleArgs {
    /// To read it: `--key` may be any that is not revoked here.
    pub fn open(&self) -> Result<(Bundle, Trust)> {
        let path = self.path()?;
        let (keys, trust) = self.keys(&path, &trust::Trust::read()?)?;
        Ok((Bundle::open(&path, &keys)?, trust))
    }

    /// To put it onto this host: where that trusts keys already, `--key` can only be one of them.
    pub fn open_for_host(&self) -> Result<(Bundle, Trust)> {
        let path = self.path()?;
        let host = trust::Trust::read()?;
        let (keys, trust) = self.keys(&path, &host)?;
        keys.iter().try_for_each(|key| host.refuse_other(key))?;
        Ok((Bundle::open(&path, &keys)?, trust))
    }

    /// One whose digest is known from elsewhere: these keys count and no others.
    pub fn open_with(&self, keys: &[Key]) -> Result<Bundle> {
        Bundle::open(&self.path()?, keys)
    }

    fn path(&self) -> Result<PathBuf> {
        match &self.bundle {
            Some(path) if path.is_dir() => only_bundle(path),
            Some(path) => Ok(path.clone()),
            None => {
                let zd = std::env::current_exe().at("the running zd")?;
                only_bundle(zd.parent().unwrap_or(Path::new("/")))
            }
        }
    }

    fn keys(&self, bundle: &Path, host: &trust::Trust) -> Result<(Vec<Key>, Trust)> {
        if let Some(given) = &self.key {
            let key = Key::given("--key", given)?;
            host.refuse_revoked(&key)?;
            return Ok((vec![key], Trust::Given));
        }
        let pinned = host.keys();
        if !pinned.is_empty() {
            return Ok((pinned, Trust::Pinned));
        }
        let beside = bundle.parent().unwrap_or(Path::new("")).join("zd.pub");
        if beside.exists() {
            let key = Key::read(&beside)?;
            host.refuse_revoked(&key)?;
            return Ok((vec![key], Trust::FirstUse));
        }
        Err(Code::Signature
            .err("there is no public key to check the signature with")
            .cure("give it: --key zd.pub"))
    }
}

/// The bundle in a folder that `pack` wrote.
fn only_bundle(folder: &Path) -> Result<PathBuf> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // macOS leaves `._NAME` beside each file on a stick.
        if name.ends_with(".zd.tar") && !name.starts_with('.') && entry.path().is_file() {
            names.push(name);
        }
    }
    names.sort();
    let dir = folder.display();
    match names.as_slice() {
        [one] => Ok(folder.join(one)),
        [] => Err(Code::Usage
            .err(format!("no bundle (*.zd.tar) in {dir}"))
            .cure("name the bundle's file, or the folder that `zd pack` wrote")),
        many => Err(Code::Usage
            .err(format!("{} bundles in {dir}: {}", many.len(), many.join(", ")))
            .cure("name the file of the one that is meant")),
    }
}

/// Hashes all blobs behind a progress bar.
pub fn verify_blobs(bundle: &Bundle, ui: &Ui) -> Result<()> {
    let bar = ui.bytes("verify", bundle.len());
    let result = bundle.verify(|n| bar.inc(n));
    bar.finish_and_clear();
    result
}

/// A bundle must be for hosts like this one.
pub fn check_target(bundle: &Bundle, here: &Target) -> Result<()> {
    let there = &bundle.lock.target;
    if there == here {
        return Ok(());
    }
    Err(Code::Target
        .err(format!("the bundle is for {there}, this host is {here}"))
        .cure(format!("bring a bundle packed for it: zd pack … --target {here}")))
}

#[derive(Serialize)]
struct Report {
    bundle: PathBuf,
    id: Digest,
    title: String,
    target: Target,
    bytes: u64,
    blobs: usize,
    fingerprint: String,
    trust: Trust,
    seconds: f64,
}

pub fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    let (bundle, trust) = args.bundle.open()?;
    verify_blobs(&bundle, ui)?;
    let report = Report {
        id: bundle.id.clone(),
        title: bundle.lock.title(),
        target: bundle.lock.target.clone(),
        bytes: bundle.len(),
        blobs: bundle.lock.blobs.len(),
        fingerprint: bundle.key.fingerprint(),
        trust,
        seconds: start.elapsed().as_secs_f64(),
        bundle: bundle.path.clone(),
    };
    ui.report(&report, |r| {
        format!(
            "good: {} for {}, {} in {} blobs, checked in {:.1} s\nsigned by    {} ({})",
            r.title,
            r.target,
            bytesize::ByteSize(r.bytes),
            r.blobs,
            r.seconds,
            r.fingerprint,
            match r.trust {
                Trust::Given => "the key you gave",
                Trust::Pinned => "trusted on this host",
                Trust::FirstUse => "the key beside the bundle: compare it with the one you were given",
            }
        )
    });
    Ok(())
}
