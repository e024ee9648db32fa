//! Generations: what was installed, each with its lock and packages in a folder of its own. Programs and
//! images are kept by content and shared.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::{fs, paths};
use crate::bundle::Lock;
use crate::error::{At, Code, Result};
use crate::ids::Digest;

/// How many are kept, the current one among them.
const KEPT: usize = 3;

#[derive(Clone, Debug, Serialize)]
pub struct Generation {
    pub number: u32,
    /// Name and version of its bundle.
    pub bundle: String,
    /// Digest of its lock.
    pub id: Digest,
    pub packed: Timestamp,
    pub current: bool,
}

/// Numbers and locks of all that are there, oldest first, each with the digest of its lock. A folder without a lock
/// is of an upgrade that was broken off.
pub fn locks() -> Result<Vec<(u32, Lock, Digest)>> {
    let mut found = Vec::new();
    for number in numbers()? {
        if let Some(bytes) = fs::read_if_any(&lock_file(number))? {
            found.push((number, Lock::parse(&bytes)?, Digest::of(&bytes)));
        }
    }
    Ok(found)
}

pub fn all() -> Result<Vec<Generation>> {
    let current = current();
    let generation = |(number, lock, id): (u32, Lock, Digest)| Generation {
        number,
        bundle: lock.title(),
        id,
        packed: lock.created,
        current: current == Some(number),
    };
    Ok(locks()?.into_iter().map(generation).collect())
}

/// Those that were installed after this one, each with the time since then.
pub fn later(number: u32) -> Result<Vec<(Lock, Duration)>> {
    let mut found = Vec::new();
    for (later, lock, _) in locks()?.into_iter().filter(|(n, ..)| *n > number) {
        let path = lock_file(later);
        let written = std::fs::metadata(&path).and_then(|meta| meta.modified()).at(&path)?;
        // By a clock that was set back since then nobody knows.
        found.push((lock, written.elapsed().unwrap_or(Duration::MAX)));
    }
    Ok(found)
}

/// The lock of one generation, as its bundle had it.
pub fn lock_bytes(number: u32) -> Result<Vec<u8>> {
    fs::read_if_any(&lock_file(number))?.ok_or_else(|| {
        let known = numbers().unwrap_or_default();
        let known: Vec<String> = known.iter().map(u32::to_string).collect();
        Code::NotInstalled
            .err(format!("there is no generation {number} on this host"))
            .cure(format!("zd generations lists them: {}", known.join(", ")))
    })
}

/// A program that an earlier zd kept in the folder of its generation; now all are in one folder, by content.
pub fn program(digest: &Digest) -> Result<Option<PathBuf>> {
    for (number, lock, _) in locks()? {
        for release in lock.releases.iter().filter(|release| release.digest == *digest) {
            let path = paths::generation(number).join("bin").join(release.product.as_str());
            if path.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
                return Ok(Some(path));
            }
        }
    }
    Ok(None)
}

/// Number for a bundle that is to be installed; the one it has already where that was broken off.
pub fn next(bundle: &Digest) -> Result<u32> {
    let Some(last) = numbers()?.last().copied() else { return Ok(1) };
    let begun = match fs::read_if_any(&lock_file(last))? {
        None => true,
        Some(bytes) => Digest::of(&bytes) == *bundle,
    };
    Ok(if begun { last } else { last + 1 })
}

/// Keeps the current one, the one `before` it, which is where a way back leads first, and the newest of the others;
/// removes the rest, and the programs that only those had or that an upgrade only went through.
pub fn prune(before: u32) -> Result<Vec<u32>> {
    let (locks, current) = (locks()?, current());
    let needed = |n: &u32| current == Some(*n) || before == *n;
    let others: Vec<u32> = locks.iter().map(|(n, ..)| *n).filter(|n| !needed(n)).collect();
    let gone = others[..others.len().saturating_sub(KEPT - 2)].to_vec();
    for number in &gone {
        fs::remove_tree(&paths::generation(*number))?;
    }
    let mut used = BTreeSet::new();
    for (_, lock, _) in locks.iter().filter(|(n, ..)| !gone.contains(n)) {
        used.extend(lock.releases.iter().map(|r| paths::program(r.product.as_str(), &r.digest)));
    }
    let tool = std::fs::read_link(paths::TOOL).unwrap_or_default();
    used.extend(tool.file_name().map(|name| name.to_string_lossy().into_owned()));
    let dir = Path::new(paths::PROGRAMS);
    for entry in std::fs::read_dir(dir).at(dir)? {
        let entry = entry.at(dir)?;
        if !used.contains(entry.file_name().to_string_lossy().as_ref()) {
            fs::remove_file(&entry.path())?;
        }
    }
    Ok(gone)
}

fn current() -> Option<u32> {
    std::fs::read_link(paths::CURRENT).ok()?.to_str()?.parse().ok()
}

fn lock_file(number: u32) -> PathBuf {
    paths::generation(number).join(paths::LOCK_FILE)
}

fn numbers() -> Result<BTreeSet<u32>> {
    let entries = match std::fs::read_dir(paths::GENERATIONS) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries.at(paths::GENERATIONS)?,
    };
    Ok(entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}
