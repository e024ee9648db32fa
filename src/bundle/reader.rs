//! Reading a bundle in place: signature, lock, then a comparison of every header. Nothing is
//! extracted to be read, and nothing is believed that the signed lock does not say.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::layout::{self, BLOCK, HEAD, MAX_SIGNATURE, OCI_LAYOUT};
use super::lock::{Lock, MAX_LOCK};
use super::medium::Medium;
use super::parallel::try_each;
use super::signature::{self, Key};
use crate::error::{At, Code, Error, Result};
use crate::ids::Digest;

/// An opened bundle: signature, lock and layout hold. `verify` checks the blobs as well.
pub struct Bundle {
    pub lock: Lock,
    /// Digest of the lock: names this bundle in receipts and the audit log.
    pub id: Digest,
    /// The key that signed it.
    pub key: Key,
    pub path: PathBuf,
    medium: Medium,
    at: HashMap<Digest, (u64, u64)>,
}

/// A damaged bundle: always the same cure.
fn damaged(what: impl Into<String>) -> Error {
    Code::Bundle.err(what).cure("do not use this bundle; copy it again from its source, then `zd verify`")
}

impl Bundle {
    /// Opens and checks everything but the blobs' bytes.
    pub fn open(path: &Path, trusted: &[Key]) -> Result<Self> {
        let medium = Medium::open(path).at(path)?;
        let mut head = HeadReader { medium: medium.clone(), path };
        if head.member(0, OCI_LAYOUT.len() as u64)? != OCI_LAYOUT {
            return Err(damaged("member oci-layout is not what zd writes"));
        }
        let index = head.member(1, MAX_LOCK)?;
        let lock_bytes = head.member(2, MAX_LOCK)?;
        let signature = head.member(3, MAX_SIGNATURE)?;
        let signature = String::from_utf8(signature).map_err(|_| {
            Code::Signature
                .err("the bundle's signature is not text: it was altered")
                .cure("do not use this bundle; copy it again from its source")
        })?;
        let key = signature::verify(&lock_bytes, &signature, trusted)?.clone();

        let lock = Lock::parse(&lock_bytes)?;
        if lock.revoked_keys.contains(&key) {
            return Err(Code::Signature
                .err(format!("the bundle revokes the key {} that it is signed with", key.id()))
                .cure("do not use this bundle; have it packed with another key"));
        }
        if index != layout::index_json(&lock) {
            return Err(damaged("member index.json does not fit the lock"));
        }
        let head_sizes =
            [OCI_LAYOUT.len() as u64, index.len() as u64, lock_bytes.len() as u64, signature.len() as u64];
        let at = Self::check_headers(&lock, head_sizes, &mut head)?;
        Ok(Self { id: Digest::of(&lock_bytes), lock, key, path: path.to_owned(), medium, at })
    }

    /// Compares every blob's header with the only one that can stand there, and the end.
    fn check_headers(
        lock: &Lock,
        head_sizes: [u64; 4],
        head: &mut HeadReader,
    ) -> Result<HashMap<Digest, (u64, u64)>> {
        let total = layout::total(head_sizes, lock)?;
        let names: HashSet<String> = layout::blob_members(lock).map(|(name, _)| name).collect();
        let known = |name: &str| names.contains(name) || HEAD.contains(&name);
        let mut at = HashMap::with_capacity(lock.blobs.len());
        for (blob, (name, size)) in lock.blobs.iter().zip(layout::blob_members(lock)) {
            head.expect_header(&name, size, &known)?;
            let offset = head.medium.stream_position().at(head.path)?;
            at.insert(blob.digest.clone(), (offset, size));
            head.medium.seek(SeekFrom::Start(offset + size)).at(head.path)?;
            if head.medium.len() < offset + size {
                return Err(damaged(format!(
                    "the bundle is cut off: {} bytes, {total} expected; blob {} is not whole",
                    head.medium.len(),
                    blob.digest.short()
                )));
            }
            head.zeros(layout::padding(size))?;
        }
        let mut end = [0u8; layout::END as usize];
        head.read(&mut end)?;
        if let Some(block) = end.chunks_exact(512).find(|b| b.iter().any(|x| *x != 0)) {
            return Err(layout::explain(block.try_into().expect("a block"), "(end of the bundle)", known));
        }
        if head.medium.len() != total {
            return Err(damaged(format!(
                "the bundle has {} bytes, {total} expected: something was added behind its end",
                head.medium.len()
            )));
        }
        Ok(at)
    }

    pub fn len(&self) -> u64 {
        self.medium.len()
    }

    /// The bytes of a blob as they stand in the bundle, unchecked: whoever keeps them checks them.
    pub fn blob(&self, digest: &Digest) -> Result<std::io::Take<Medium>> {
        let (offset, size) =
            self.at.get(digest).ok_or_else(|| Code::Bundle.err(format!("{digest} is not in the bundle")))?;
        Ok(self.medium.slice(*offset, *size))
    }

    /// A small blob, whole and checked.
    pub fn small_blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.blob(digest)?.take(MAX_LOCK).read_to_end(&mut bytes).at(&self.path)?;
        if Digest::of(&bytes) != *digest {
            return Err(damaged(format!("blob {digest} does not have the bytes its name says")));
        }
        Ok(bytes)
    }

    /// Hashes every blob, several at a time. `tick` gets the bytes done, from many threads.
    pub fn verify(&self, tick: impl Fn(u64) + Sync) -> Result<()> {
        // Largest first, so that no thread is left alone with a big one at the end.
        let queue: Vec<_> = self.lock.blobs.iter().rev().collect();
        try_each(&queue, |blob| {
            let count = |piece: &[u8]| {
                tick(piece.len() as u64);
                Ok(())
            };
            let (found, _) = Digest::of_reader(self.blob(&blob.digest)?, count).at(&self.path)?;
            (found == blob.digest)
                .then_some(())
                .ok_or_else(|| damaged(format!("blob {} does not have the bytes its name says", blob.digest)))
        })
        .map(drop)
    }
}

/// Reads members strictly in order.
struct HeadReader<'p> {
    medium: Medium,
    path: &'p Path,
}

impl HeadReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        self.medium.read_exact(buf).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                damaged(format!("the bundle is cut off at {} bytes", self.medium.len()))
            }
            _ => crate::error::io(self.path, e),
        })
    }

    fn zeros(&mut self, n: u64) -> Result<()> {
        let mut pad = [0u8; BLOCK as usize];
        self.read(&mut pad[..n as usize])?;
        if pad.iter().any(|b| *b != 0) {
            return Err(damaged("there are bytes between two members: the bundle was altered"));
        }
        Ok(())
    }

    /// Header and content of head member `i`, whose size only its header says.
    fn member(&mut self, i: usize, most: u64) -> Result<Vec<u8>> {
        let name = HEAD[i];
        let mut found = [0u8; 512];
        self.read(&mut found).map_err(|e| e.during(format!("looking for {name}")))?;
        let size = tar::Header::from_byte_slice(&found).entry_size().unwrap_or(u64::MAX);
        if size > most || found != layout::header(name, size) {
            let e = layout::explain(&found, name, |n| HEAD.contains(&n) || n.starts_with("blobs/sha256/"));
            if name.ends_with(".minisig") {
                return Err(Code::Signature
                    .err(format!("the bundle is not signed: {}", e.what))
                    .cure("do not use it; `zd pack` signs every bundle: have it packed again"));
            }
            if i == 0 {
                return Err(damaged(format!("{} is no zd bundle ({})", self.path.display(), e.what)));
            }
            return Err(e);
        }
        let mut content = vec![0u8; size as usize];
        self.read(&mut content)?;
        self.zeros(layout::padding(size))?;
        Ok(content)
    }

    fn expect_header(&mut self, name: &str, size: u64, known: &impl Fn(&str) -> bool) -> Result<()> {
        let mut found = [0u8; 512];
        self.read(&mut found).map_err(|e| e.during(format!("looking for {name}")))?;
        if found == layout::header(name, size) { Ok(()) } else { Err(layout::explain(&found, name, known)) }
    }
}
