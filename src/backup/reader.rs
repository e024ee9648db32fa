//! Reading a backup: its index counts only with a host's signature, and all of it is decrypted, hashed and compared
//! with the index before anything else happens. Small files stay in memory, so that no secret is unpacked anywhere;
//! blobs are read again, in place, when they are wanted.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use age::stream::StreamReader;
use age::x25519::Identity;
use age::{DecryptError, Decryptor};

use super::index::{INDEX, Index, LOCK, MAX_INDEX, SIGNATURE};
use crate::bundle::layout::MAX_SIGNATURE;
use crate::bundle::signature::{self, Fault, Key, OF_HOST};
use crate::bundle::{Lock, medium};
use crate::error::{At, Code, Error, Result};
use crate::host::config::Installed;
use crate::ids::Digest;

type Plain = StreamReader<BufReader<File>>;

pub struct Backup {
    pub index: Index,
    /// Of the bundle that was installed.
    pub lock: Lock,
    pub path: PathBuf,
    /// Of the host that made it.
    pub signed_by: Key,
    identity: Identity,
    files: HashMap<String, Vec<u8>>,
    /// Where each blob lies in the plain tar, and its size.
    blobs: HashMap<Digest, (u64, u64)>,
}

fn damaged(path: &Path, what: impl std::fmt::Display) -> Error {
    Code::Bundle
        .err(format!("backup {}: {what}", path.display()))
        .cure("copy it again from where it was written to, or take an earlier backup")
}

fn decrypt(path: &Path, identity: &Identity) -> Result<Plain> {
    let file = BufReader::new(medium::open(path).at(path)?);
    let no_backup = |e: DecryptError| {
        match e {
        DecryptError::NoMatchingKeys => Code::Signature
            .err(format!("backup {} was not encrypted to this key", path.display()))
            .cure("give the secret key that belongs to the public key of the host's `zd status`: --identity FILE"),
        e => damaged(path, e),
    }
    };
    let decryptor = Decryptor::new_buffered(file).map_err(no_backup)?;
    decryptor.decrypt(std::iter::once(identity as &dyn age::Identity)).map_err(no_backup)
}

impl Backup {
    /// Reads and checks every byte; `signers` are the hosts' keys that count.
    pub fn open(path: &Path, identity: Identity, signers: &[Key], tick: impl Fn(u64)) -> Result<Self> {
        let broken = |e: std::io::Error| damaged(path, e);
        let wrong = |what: String| damaged(path, what);
        let mut archive = tar::Archive::new(decrypt(path, &identity)?);
        let mut files = HashMap::new();
        let mut blobs = HashMap::new();
        let mut entries = archive.entries().map_err(broken)?;
        let bytes = head(&mut entries, INDEX, MAX_INDEX).map_err(broken)?;
        let bytes = bytes.ok_or_else(|| wrong(format!("{INDEX} does not come first")))?;
        let signature = head(&mut entries, SIGNATURE, MAX_SIGNATURE).map_err(broken)?;
        let signature = signature.and_then(|text| String::from_utf8(text).ok());
        let (index, signed_by) = signed_index(path, &bytes, signature.as_deref(), signers)?;
        let mut wanted = members(&index).into_iter();
        for entry in entries {
            let mut entry = entry.map_err(broken)?;
            let name = entry.path_bytes().into_owned();
            let name = String::from_utf8(name).map_err(|e| wrong(e.to_string()))?;
            let plain = entry.header().entry_type() == tar::EntryType::Regular;
            let size = entry.header().size().map_err(broken)?;
            let expected = wanted.next();
            let Some((_, digest, blob)) = expected.as_ref().filter(|(n, ..)| *n == name).filter(|_| plain)
            else {
                return Err(wrong(format!("member {name:?} is not what its index names here")));
            };
            let at = entry.raw_file_position();
            let mut bytes = Vec::new();
            let (found, _) = Digest::of_reader(&mut entry, |piece| {
                tick(piece.len() as u64);
                if !blob {
                    bytes.extend_from_slice(piece);
                }
                Ok(())
            })
            .map_err(broken)?;
            if found != *digest {
                return Err(wrong(format!("member {name} does not have the bytes that its index says")));
            }
            if *blob {
                blobs.insert(found, (at, size));
            } else {
                files.insert(name, bytes);
            }
        }
        // To the end: only there does age know that nothing was cut off.
        std::io::copy(&mut archive.into_inner(), &mut std::io::sink()).map_err(broken)?;
        if let Some((name, ..)) = wanted.next() {
            return Err(wrong(format!("member {name} is not there")));
        }
        let lock = files.get(LOCK).ok_or_else(|| wrong(format!("{LOCK} is not in it")))?;
        if Digest::of(lock) != index.host.bundle {
            return Err(wrong(format!("{LOCK} is not the one of the installed bundle")));
        }
        let lock = Lock::parse(lock).map_err(|e| e.during(path.display()))?;
        if let Some(service) = lock.services.iter().find(|s| index.service(&s.name).is_none()) {
            return Err(wrong(format!("it says nothing of service {}", service.name)));
        }
        Ok(Self { index, lock, path: path.to_owned(), signed_by, identity, files, blobs })
    }

    /// The host as it was, with as many containers as its services had.
    pub fn installed(&self) -> Installed {
        let mut installed = Installed { host: self.index.host.clone(), lock: self.lock.clone() };
        for service in &self.index.services {
            if let Some(instances) = service.state.instances {
                installed.set_instances(&service.name, instances);
            }
        }
        installed
    }

    /// A file's bytes by its path on the host.
    pub fn file(&self, path: &Path) -> Option<&[u8]> {
        self.member(&path.to_string_lossy()[1..])
    }

    pub fn member(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// A blob's bytes, if it is here; the size with them.
    pub fn blob(&self, digest: &Digest) -> Result<Option<(std::io::Take<Plain>, u64)>> {
        let Some((at, size)) = self.blobs.get(digest) else { return Ok(None) };
        let mut plain = decrypt(&self.path, &self.identity)?;
        plain.seek(SeekFrom::Start(*at)).map_err(|e| damaged(&self.path, e))?;
        Ok(Some((plain.take(*size), *size)))
    }
}

/// The next member, where it is a plain file of this name and not larger than that.
fn head<R: Read>(entries: &mut tar::Entries<R>, name: &str, most: u64) -> std::io::Result<Option<Vec<u8>>> {
    let Some(mut entry) = entries.next().transpose()? else { return Ok(None) };
    let header = entry.header();
    let plain = header.entry_type() == tar::EntryType::Regular && header.size()? <= most;
    if !plain || *entry.path_bytes() != *name.as_bytes() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// The index, if one of these keys has signed it. It is not even parsed before.
fn signed_index(path: &Path, bytes: &[u8], signature: Option<&str>, signers: &[Key]) -> Result<(Index, Key)> {
    let refused = |what: String, cure: &str| {
        Code::Signature.err(format!("backup {}: {what}; nothing was changed", path.display())).cure(cure)
    };
    let altered = "do not use it; find out who changed it, and take another backup";
    let Some(signature) = signature else {
        let cure = "do not use it unless you know who made it; one that an earlier zd made is put back by the zd on the \
                    stick of its bundle";
        return Err(refused("it is not signed by any host".into(), cure));
    };
    let key = signature::check(bytes, signature, OF_HOST, signers).map_err(|fault| match fault {
        Fault::Key(id) => {
            let known: Vec<String> = signers.iter().map(Key::id).collect();
            let what = format!("it is signed with key {id}, and may be with {} only", known.join(", "));
            let cure = "take a backup of this host; for a bare host name the key of the host that was backed up, as \
                        it was taken from there: --host-key FILE|KEY";
            refused(what, cure)
        }
        Fault::Bytes => refused("its signature does not hold: it was altered".into(), altered),
        Fault::Form | Fault::Unreadable => refused("its signature cannot be read".into(), altered),
    })?;
    let index = Index::parse(bytes).map_err(|e| e.during(path.display()))?;
    if signature::trusted_comment(signature) != Some(index.signed_as()) {
        return Err(refused("its signature is of something else that the host signed".into(), altered));
    }
    Ok((index, key.clone()))
}

/// Members behind the index and its signature: name, digest, and whether it is a blob.
pub fn members(index: &Index) -> Vec<(String, Digest, bool)> {
    let files = index.files.iter().map(|e| (e.path.clone(), e.digest.clone(), false));
    let blobs = index.blobs.iter().map(|b| (blob_name(&b.digest), b.digest.clone(), true));
    files.chain(blobs).collect()
}

/// As in an OCI image layout.
pub fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

#[cfg(test)]
mod tests {
    use super::super::index::{Blob, Entry, Service};
    use super::super::key;
    use super::super::writer::Writer;
    use super::*;
    use crate::bundle::signature::Signer;
    use crate::ids::Slot;
    use crate::service::state::State;

    /// A host's key.
    fn signer(dir: &Path) -> Signer {
        let (secret, _) = signature::generate(None).unwrap();
        std::fs::write(dir.join("host.key"), secret).unwrap();
        Signer::read(&dir.join("host.key"), || unreachable!()).unwrap()
    }

    const LAYER: &[u8] = b"a layer of an image";
    const SECRET: &[u8] = b"a secret that is not to be seen";

    fn entry(path: &str, bytes: &[u8]) -> Entry {
        Entry {
            path: path.into(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            mode: 0o600,
            owner: None,
        }
    }

    fn index(files: Vec<Entry>, lock: &[u8]) -> Index {
        let bundle = Digest::of(lock);
        let parsed = Lock::parse(lock).unwrap();
        let of = |name: &crate::ids::Name| Service {
            name: name.clone(),
            active: Slot::Green,
            state: State::default(),
        };
        let host = toml::from_str(&format!(
            "schema = 1\nip = \"10.4.0.17\"\nsubnet = \"172.31\"\nregistry_port = 5443\ngeneration = 2\nbundle = \"{bundle}\""
        ));
        Index {
            schema: 1,
            at: jiff::Timestamp::UNIX_EPOCH,
            by: "kim".into(),
            zd: "0".into(),
            hostname: "line4".into(),
            host: host.unwrap(),
            bundle: parsed.title(),
            engine: parsed.engine,
            services: parsed.services.iter().map(|s| of(&s.name)).collect(),
            files,
            images: Vec::new(),
            blobs: vec![Blob { digest: Digest::of(LAYER), size: LAYER.len() as u64 }],
        }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let lock = include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json");
        let dir = tempfile::tempdir().unwrap();
        let (secret, recipient) = key::generate().unwrap();
        let key_file = dir.path().join("key");
        std::fs::write(&key_file, secret).unwrap();
        let index = index(vec![entry(LOCK, lock), entry("etc/zd/secrets/x", SECRET)], lock);
        let host = signer(dir.path());
        let mut writer = Writer::begin(dir.path(), "backup", &recipient, &host, &index).unwrap();
        for (entry, bytes) in index.files.iter().zip([&lock[..], SECRET]) {
            writer.member(&entry.path, &entry.digest, entry.size, bytes).unwrap();
        }
        writer
            .member(&blob_name(&index.blobs[0].digest), &index.blobs[0].digest, index.blobs[0].size, LAYER)
            .unwrap();
        let written = writer.finish().unwrap();
        let bytes = std::fs::read(&written.path).unwrap();
        assert_eq!((Digest::of(&bytes), bytes.len() as u64), (written.digest, written.bytes));
        let plain = |part: &[u8]| bytes.windows(part.len()).any(|w| w == part);
        assert!(!plain(SECRET) && !plain(b"etc/zd"));

        let by = |path: &Path, signers: &[Key]| {
            Backup::open(path, key::read_identity(&key_file).unwrap(), signers, |_| {})
        };
        let hosts = [signer(dir.path()).key, host.key.clone()];
        let open = |path: &Path| by(path, &hosts);
        let backup = open(&written.path).unwrap();
        assert!(backup.signed_by == host.key);
        for others in [&hosts[..1], &[]] {
            let e = by(&written.path, others).err().unwrap();
            assert!(e.code == Code::Signature && e.what.contains("it is signed with key"), "{}", e.what);
        }
        assert_eq!(backup.file(Path::new("/etc/zd/secrets/x")).unwrap(), SECRET);
        let (mut from, size) = backup.blob(&Digest::of(LAYER)).unwrap().unwrap();
        let mut layer = Vec::new();
        from.read_to_end(&mut layer).unwrap();
        assert_eq!((layer.as_slice(), size), (LAYER, LAYER.len() as u64));
        assert!(backup.blob(&Digest::of(b"another")).unwrap().is_none());

        // Any byte that is another one, and any end that is missing, is noticed.
        let broken = dir.path().join("broken");
        for place in (0..bytes.len()).step_by(61) {
            let mut changed = bytes.clone();
            changed[place] ^= 0x40;
            std::fs::write(&broken, changed).unwrap();
            assert!(open(&broken).is_err(), "byte {place}");
        }
        for length in (0..bytes.len()).step_by(97) {
            std::fs::write(&broken, &bytes[..length]).unwrap();
            assert!(open(&broken).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn an_index_without_its_hosts_signature_is_refused() {
        let lock = include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json");
        let dir = tempfile::tempdir().unwrap();
        let (host, other) = (signer(dir.path()), signer(dir.path()));
        let index = index(vec![entry(LOCK, lock)], lock);
        let bytes = serde_json::to_vec(&index).unwrap();
        let good = host.sign(&bytes, OF_HOST, &index.signed_as());
        let keys = [host.key.clone()];
        assert!(signed_index(dir.path(), &bytes, Some(&good), &keys).unwrap().1 == host.key);
        let mut changed = bytes.clone();
        changed[20] ^= 1;
        for (bytes, signature, says) in [
            (&bytes, None, "not signed by any host"),
            (&bytes, Some(other.sign(&bytes, OF_HOST, &index.signed_as())), "it is signed with key"),
            (&changed, Some(good.clone()), "it was altered"),
            (&bytes, Some(good.replace("taken", "given")), "it was altered"),
            (&bytes, Some(host.sign(&bytes, OF_HOST, "report x of node-y")), "something else"),
            (&bytes, Some(String::new()), "cannot be read"),
        ] {
            let e = signed_index(dir.path(), bytes, signature.as_deref(), &keys).err().unwrap();
            assert!(e.code == Code::Signature && e.what.contains(says), "{says}: {}", e.what);
        }
    }

    #[test]
    fn a_member_that_is_not_as_its_index_says_is_not_written() {
        let lock = include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json");
        let dir = tempfile::tempdir().unwrap();
        let (_, recipient) = key::generate().unwrap();
        let index = index(vec![entry(LOCK, lock)], lock);
        let (entry, host) = (&index.files[0], signer(dir.path()));
        for bytes in [&lock[..10], b"other", &[lock.as_slice(), b"more"].concat()[1..]] {
            let mut writer = Writer::begin(dir.path(), "backup", &recipient, &host, &index).unwrap();
            let e = writer.member(&entry.path, &entry.digest, entry.size, bytes).unwrap_err();
            assert!(e.what.contains("changed, or was damaged"), "{}", e.what);
            assert!(!dir.path().join("backup").exists());
        }
    }
}
