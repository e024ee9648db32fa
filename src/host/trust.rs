//! Whose bundles this host takes: the keys in /etc/zd/trust, and beside them what has been learned since: keys that are
//! revoked, for good, and when the newest bundle was packed that was installed here.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{fs, paths};
use crate::audit::{self, Event};
use crate::bundle::signature::Key;
use crate::bundle::{Lock, medium};
use crate::error::{At, Code, Error, OrCode, Result};

/// What has been learned.
const LEARNED: &str = "trust.toml";
/// The key that the first install pinned.
pub const FIRST: &str = "first.pub";

pub struct Trust {
    folder: PathBuf,
    /// Sorted by their files; none of them is revoked.
    keys: Vec<(PathBuf, Key)>,
    learned: Learned,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Learned {
    schema: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    newest: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    revoked: Vec<Revoked>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoked {
    pub key: Key,
    pub at: Timestamp,
    /// Who did it, or the bundle that said so.
    pub by: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl Learned {
    /// A file that cannot be read stops all: what is revoked would count again.
    fn parse(bytes: Option<&[u8]>) -> Result<Self> {
        let Some(bytes) = bytes else {
            return Ok(Self { schema: 1, newest: None, revoked: Vec::new() });
        };
        let damaged =
            |e: Error| e.during(LEARNED).cure("put it back from a backup; it says which keys are revoked");
        let learned: Self = toml::from_slice(bytes).or_code(Code::Io, "trusted keys").map_err(damaged)?;
        match learned.schema {
            1 => Ok(learned),
            other => Err(damaged(Code::Io.err(format!("schema {other}, this zd reads schema 1")))),
        }
    }
}

/// Keys that bundles were signed with which a backup names: those that count, and those that did once. For a bundle
/// whose digest is known already.
pub fn of_backup<'a>(files: impl Iterator<Item = (&'a Path, &'a [u8])>) -> Result<Vec<Key>> {
    let mut keys = Vec::new();
    for (path, bytes) in files {
        match path.extension() {
            Some(kind) if kind == "pub" => keys.push(Key::parse(&String::from_utf8_lossy(bytes))?),
            _ if path.ends_with(LEARNED) => {
                keys.extend(Learned::parse(Some(bytes))?.revoked.into_iter().map(|revoked| revoked.key));
            }
            _ => {}
        }
    }
    Ok(keys)
}

impl Trust {
    pub fn read() -> Result<Self> {
        Self::read_at(Path::new(paths::TRUST))
    }

    fn read_at(folder: &Path) -> Result<Self> {
        let learned = Learned::parse(fs::read_if_any(&folder.join(LEARNED))?.as_deref())?;
        let mut trust = Self { folder: folder.into(), keys: Vec::new(), learned };
        let Ok(found) = std::fs::read_dir(folder) else { return Ok(trust) };
        for path in found.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "pub")) {
            let key = Key::read(&path)?;
            if trust.revoked_entry(&key).is_none() {
                trust.keys.push((path, key));
            }
        }
        trust.keys.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(trust)
    }

    /// Those whose bundles are taken.
    pub fn keys(&self) -> Vec<Key> {
        self.keys.iter().map(|(_, key)| key.clone()).collect()
    }

    pub fn revoked(&self) -> &[Revoked] {
        &self.learned.revoked
    }

    pub fn newest(&self) -> Option<Timestamp> {
        self.learned.newest
    }

    fn revoked_entry(&self, key: &Key) -> Option<&Revoked> {
        self.learned.revoked.iter().find(|revoked| revoked.key == *key)
    }

    pub fn refuse_revoked(&self, key: &Key) -> Result<()> {
        let Some(revoked) = self.revoked_entry(key) else { return Ok(()) };
        Err(Code::Signature
            .err(format!("key {} was revoked on this host, {}, by {}", key.id(), revoked.at, revoked.by))
            .cure("a revoked key never counts again: have the bundle packed with another one"))
    }

    /// `--key` says which of the keys of this host counts; it never adds one.
    pub fn refuse_other(&self, key: &Key) -> Result<()> {
        if self.keys.is_empty() || self.keys.iter().any(|(_, known)| known == key) {
            return Ok(());
        }
        Err(Code::Signature
            .err(format!(
                "key {} ({}) is not trusted on this host, which trusts {}; --key does not add one",
                key.id(),
                key.fingerprint(),
                self.ids()
            ))
            .cure("compare the fingerprint with whoever packed it, then: zd trust add FILE --reason TEXT"))
    }

    fn ids(&self) -> String {
        self.keys.iter().map(|(_, key)| key.id()).collect::<Vec<_>>().join(", ")
    }

    /// False where it is there already.
    pub fn add(&mut self, key: &Key) -> Result<bool> {
        self.refuse_revoked(key)?;
        if self.keys.iter().any(|(_, known)| known == key) {
            return Ok(false);
        }
        if self.keys.iter().any(|(_, known)| known.id() == key.id()) {
            return Err(Code::Signature
                .err(format!("another key with the id {} is trusted here already", key.id()))
                .cure("an id is made by chance, so this one was chosen: find out who made the key"));
        }
        let path = self.folder.join(format!("{}.pub", key.id()));
        fs::make_dir(&self.folder, 0o755, None)?;
        fs::write(&path, key.file_text().as_bytes(), 0o644, None)?;
        self.keys.push((path, key.clone()));
        Ok(true)
    }

    /// For good. False where it was so already.
    pub fn revoke(&mut self, key: &Key, by: &str, reason: &str) -> Result<bool> {
        if self.keys.iter().all(|(_, known)| known == key) && !self.keys.is_empty() {
            return Err(Code::Usage
                .err(format!("{} is the only key that this host trusts", key.id()))
                .cure("add the one that comes after it first: zd trust add FILE"));
        }
        let new = self.revoked_entry(key).is_none();
        if new {
            let (key, at) = (key.clone(), Timestamp::now());
            self.learned.revoked.push(Revoked { key, at, by: by.into(), reason: reason.into() });
            self.write()?;
        }
        // The file last: without it the list still says that it is revoked.
        for (path, _) in self.keys.extract_if(.., |(_, known)| *known == *key) {
            fs::remove_file(&path)?;
        }
        Ok(new)
    }

    fn write(&self) -> Result<()> {
        let text = toml::to_string(&self.learned).or_code(Code::Bug, LEARNED)?;
        fs::make_dir(&self.folder, 0o755, None)?;
        fs::write(&self.folder.join(LEARNED), text.as_bytes(), 0o644, None)
    }

    /// What a bundle teaches that was installed: its revocations, and that no older one is expected any more.
    pub fn learn(lock: &Lock) -> Result<()> {
        let mut trust = Self::read()?;
        let by = format!("bundle {}", lock.title());
        for key in trust.learn_from(lock, &by)? {
            let detail = format!("{} ({}), said by {by}", key.id(), key.fingerprint());
            audit::append(Event { verb: "trust revoke", outcome: "done", detail, ..Event::default() })?;
        }
        Ok(())
    }

    /// Keys that were not revoked before.
    fn learn_from(&mut self, lock: &Lock, by: &str) -> Result<Vec<Key>> {
        let mut new = Vec::new();
        for key in &lock.revoked_keys {
            if self.revoke(key, by, "")? {
                new.push(key.clone());
            }
        }
        if self.learned.newest.is_none_or(|newest| newest < lock.created) {
            self.learned.newest = Some(lock.created);
            self.write()?;
        }
        Ok(new)
    }

    /// The one of the trusted keys that is meant: by its id, its file or its line.
    pub fn named(&self, text: &str) -> Result<Key> {
        match self.keys.iter().find(|(_, key)| key.id().eq_ignore_ascii_case(text)) {
            Some((_, key)) => Ok(key.clone()),
            None => Key::given("key", text).map_err(|e| {
                e.cure(format!(
                    "give an id of `zd trust list` ({}), a .pub file, or the line in it",
                    self.ids()
                ))
            }),
        }
    }

    /// The key in a file, if a trusted one has signed it: `FILE.minisig`, as `zd keygen --follows` writes it.
    pub fn successor(&self, path: &Path) -> Result<(Key, Key)> {
        use crate::bundle::signature::{Fault, OF_SUCCESSOR, check, trusted_comment};
        let text = medium::text(path).at(path)?;
        let key = Key::parse(&text).map_err(|e| e.during(path.display()))?;
        let beside = PathBuf::from(format!("{}.minisig", path.display()));
        let signature = medium::text(&beside).at(&beside)?;
        let refused = |what: String| {
            Code::Signature.err(format!("{}: {what}; nothing was changed", beside.display())).cure(
                "sign it with a key that this host trusts: zd keygen --follows OLD.key; or zd trust add FILE",
            )
        };
        let keys = self.keys();
        let by = check(text.as_bytes(), &signature, OF_SUCCESSOR, &keys).map_err(|fault| match fault {
            Fault::Key(id) => refused(format!("signed with key {id}, trusted are {}", self.ids())),
            Fault::Bytes => refused("it is of another key, or was altered".into()),
            Fault::Form | Fault::Unreadable => refused("it cannot be read".into()),
        })?;
        if trusted_comment(&signature) != Some(succession(&key, by)) {
            return Err(refused("it is of something else".into()));
        }
        Ok((key, by.clone()))
    }
}

/// What the signature of a successor says beside the key.
pub fn succession(key: &Key, before: &Key) -> String {
    format!("key {} follows key {}", key.id(), before.id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::signature::{OF_LOCK, OF_SUCCESSOR, Signer, generate};

    fn signer(dir: &Path) -> Signer {
        let path = dir.join("a.key");
        std::fs::write(&path, generate(None).unwrap().0).unwrap();
        Signer::read(&path, || unreachable!()).unwrap()
    }

    fn trusting(dir: &Path, key: &Key) -> Trust {
        let folder = dir.join("trust");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join(FIRST), key.file_text()).unwrap();
        Trust::read_at(&folder).unwrap()
    }

    fn lock() -> Lock {
        Lock::parse(include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json")).unwrap()
    }

    #[test]
    fn a_revoked_key_never_counts_again() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, three] = [(); 3].map(|()| signer(dir.path()).key);
        let mut trust = trusting(dir.path(), &one);
        assert!(trust.refuse_other(&two).unwrap_err().what.contains("--key does not add one"));
        assert!(trust.revoke(&one, "kim", "").unwrap_err().what.contains("only key"));
        assert!(trust.add(&two).unwrap() && !trust.add(&two).unwrap());
        assert!(trust.revoke(&one, "kim", "lost").unwrap());
        let again = |trust: &Trust| Trust::read_at(&trust.folder).unwrap();
        // Also where somebody puts its file back.
        std::fs::write(trust.folder.join(FIRST), one.file_text()).unwrap();
        trust = again(&trust);
        assert!(trust.keys() == [two.clone()]);
        assert!(trust.add(&one).unwrap_err().what.contains("was revoked on this host"));
        assert!(trust.refuse_revoked(&one).is_err() && trust.refuse_revoked(&two).is_ok());

        // A bundle says so of another, and that is remembered.
        let mut lock = lock();
        lock.revoked_keys = vec![three.clone()];
        assert!(trust.learn_from(&lock, "bundle x").unwrap() == [three.clone()]);
        assert!(trust.learn_from(&lock, "bundle x").unwrap().is_empty());
        lock.created -= std::time::Duration::from_secs(60);
        trust.learn_from(&lock, "bundle y").unwrap();
        trust = again(&trust);
        assert!(trust.add(&three).is_err());
        assert!(trust.newest() > Some(lock.created));
        std::fs::write(trust.folder.join(LEARNED), "schema = 2").unwrap();
        assert!(Trust::read_at(&trust.folder).is_err());
    }

    #[test]
    fn a_successor_counts_only_with_its_predecessors_signature() {
        let dir = tempfile::tempdir().unwrap();
        let [old, other, new] = [(); 3].map(|()| signer(dir.path()));
        let trust = trusting(dir.path(), &old.key);
        let path = dir.path().join("new.pub");
        std::fs::write(&path, new.key.file_text()).unwrap();
        let text = new.key.file_text();
        let said = succession(&new.key, &old.key);
        let by = |signature: String| {
            std::fs::write(dir.path().join("new.pub.minisig"), signature).unwrap();
            trust.successor(&path)
        };
        assert!(trust.successor(&path).is_err());
        assert!(
            by(old.sign(text.as_bytes(), OF_SUCCESSOR, &said)).unwrap() == (new.key.clone(), old.key.clone())
        );
        for bad in [
            other.sign(text.as_bytes(), OF_SUCCESSOR, &succession(&new.key, &other.key)),
            new.sign(text.as_bytes(), OF_SUCCESSOR, &said),
            old.sign(other.key.file_text().as_bytes(), OF_SUCCESSOR, &said),
            old.sign(text.as_bytes(), OF_LOCK, &said),
            old.sign(text.as_bytes(), OF_SUCCESSOR, "zd bundle demo-1 for debian-12-x86_64"),
        ] {
            assert_eq!(by(bad).unwrap_err().code, Code::Signature);
        }
    }
}
