//! The host's own key pair. It signs the head of the audit log and the reports of changes, so that a plant's change
//! control can check them elsewhere with plain minisign. The public keys that reports were signed with stand beside
//! them, each under its id, also when the pair became another.

use std::path::Path;

use super::trust::succession;
use super::{fs, paths};
use crate::bundle::signature::{self, Key, OF_HOST, Signer};
use crate::error::{At, Code, Result};

/// A signature, and the key that checks it.
pub struct Signed {
    pub key: Key,
    /// What minisign takes as its `.minisig` file.
    pub text: String,
}

/// Signs; `what` is signed as well, and shown by minisign. None where the host has no key, or one that is spoilt: no
/// change fails for want of a signature, `zd history` and `zd doctor` say that it is missing.
pub fn sign(bytes: &[u8], what: &str) -> Option<Signed> {
    let signer = signer().ok()??;
    let text = signer.sign(bytes, OF_HOST, what);
    Some(Signed { key: signer.key, text })
}

/// The public key of this host; None before it has one.
pub fn key() -> Option<Key> {
    Key::read(Path::new(paths::SIGNING_PUB)).ok()
}

/// All keys that this host has, or had, and has kept.
pub fn keys() -> Vec<Key> {
    let beside = std::fs::read_dir(paths::REPORTS).into_iter().flatten().flatten().map(|entry| entry.path());
    let kept = beside.filter(|path| path.extension().is_some_and(|kind| kind == "pub"));
    key().into_iter().chain(kept.filter_map(|path| Key::read(&path).ok())).collect()
}

/// Makes the pair. The secret half is written last: until then it is not there, or the one before counts.
pub fn make() -> Result<()> {
    let (secret, key) = signature::generate(None)?;
    write(&secret, &key)
}

/// Puts another pair in its place; the ids before and after. The one before signs the public key of the new one, for
/// those who have only the old.
pub fn rotate() -> Result<(Option<String>, String)> {
    let before = signer()?;
    let (secret, key) = signature::generate(None)?;
    if let Some(before) = &before {
        keep(&before.key)?;
        keep(&key)?;
        let signed = before.sign(key.file_text().as_bytes(), OF_HOST, &succession(&key, &before.key));
        fs::write(Path::new(&format!("{}.minisig", beside(&key))), signed.as_bytes(), 0o644, None)?;
    }
    write(&secret, &key)?;
    Ok((before.map(|signer| signer.key.id()), key.id()))
}

/// Puts a public key beside the reports.
pub fn keep(key: &Key) -> Result<()> {
    fs::make_dir(Path::new(paths::REPORTS), 0o755, None)?;
    let path = beside(key);
    if Path::new(&path).exists() {
        return Ok(());
    }
    fs::write(Path::new(&path), key.file_text().as_bytes(), 0o644, None)
}

fn beside(key: &Key) -> String {
    format!("{}/{}.pub", paths::REPORTS, key.id())
}

fn write(secret: &str, key: &Key) -> Result<()> {
    if let Some(before) = self::key() {
        // Backups that it has signed are this host's all the same.
        keep(&before)?;
    }
    fs::make_dir(Path::new(paths::SIGNING), 0o711, None)?;
    fs::write(Path::new(paths::SIGNING_PUB), key.file_text().as_bytes(), 0o644, None)?;
    fs::write(Path::new(paths::SIGNING_KEY), secret.as_bytes(), 0o600, None)
}

/// For a backup, which is worth nothing unsigned. A host of an earlier zd gets its key here.
pub fn required() -> Result<Signer> {
    let damaged = |e: crate::error::Error| {
        let what = format!("{} is damaged, and a backup has to be signed: {}", paths::SIGNING_KEY, e.what);
        Code::Signature.err(what).cure("zd secrets rotate makes another one; tell change control")
    };
    if let Some(signer) = signer().map_err(damaged)? {
        return Ok(signer);
    }
    make()?;
    signer()?.ok_or_else(|| Code::Bug.err("the key that was just made is not there"))
}

fn signer() -> Result<Option<Signer>> {
    let path = Path::new(paths::SIGNING_KEY);
    if !path.try_exists().at(path)? {
        return Ok(None);
    }
    let password = || Err(Code::Signature.err("it is encrypted, which zd never does with it"));
    Signer::read(path, password).map(Some)
}
