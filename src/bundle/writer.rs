//! Writing a bundle: one pass, hashing what it writes; complete under a temporary name, then renamed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::hashing::Hashing;
use super::layout::{self, HEAD, OCI_LAYOUT};
use super::lock::Lock;
use super::signature::{OF_LOCK, Signer};
use crate::error::{At, Code, Error, Result};
use crate::ids::Digest;

/// How often a large blob shows that it goes on.
const PIECE: u64 = 16 << 20;

/// Writes the bundle of `lock` to `path`; `blobs` says where each blob's bytes are.
/// Returns the digest of the whole file and its size.
pub fn write(
    path: &Path,
    lock: &Lock,
    signer: &Signer,
    blobs: &HashMap<Digest, PathBuf>,
    tick: impl Fn(u64),
) -> Result<(Digest, u64)> {
    let lock_bytes = lock.to_bytes();
    Lock::parse(&lock_bytes).map_err(|e| Code::Bug.err(format!("zd made a lock it would not read: {e}")))?;
    let trusted = format!("zd bundle {} for {}", lock.title(), lock.target);
    let signature = signer.sign(&lock_bytes, OF_LOCK, &trusted);
    let index = layout::index_json(lock);
    let head: [&[u8]; 4] = [OCI_LAYOUT, &index, &lock_bytes, signature.as_bytes()];

    let dir = path.parent().unwrap_or(Path::new("."));
    let temp = tempfile::NamedTempFile::new_in(dir).at(dir)?;
    let lay = Lay { lock, head, blobs, bundle: path };
    // Two readers of what is in memory anyway: the kernel copies while the other hashes.
    let (_, digest, len) = std::thread::scope(|scope| {
        let hashed = scope.spawn(|| {
            let mut out = Hashing::new(io::sink());
            lay.write(&mut out, |_| {}).map(|()| out.finish())
        });
        lay.write(temp.as_file(), tick)?;
        hashed.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
    })?;
    temp.as_file().sync_all().at(path)?;
    set_mode(temp.as_file(), 0o644).at(path)?;
    temp.persist(path).map_err(|e| crate::error::io(path, e.error))?;
    File::open(dir).and_then(|d| d.sync_all()).at(dir)?;
    Ok((digest, len))
}

fn set_mode(file: &File, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

/// What is written, member by member.
struct Lay<'a> {
    lock: &'a Lock,
    head: [&'a [u8]; 4],
    blobs: &'a HashMap<Digest, PathBuf>,
    bundle: &'a Path,
}

impl Lay<'_> {
    fn write(&self, mut out: impl Write, tick: impl Fn(u64)) -> Result<()> {
        let path = self.bundle;
        for (name, content) in HEAD.into_iter().zip(self.head) {
            out.write_all(&layout::header(name, content.len() as u64)).at(path)?;
            out.write_all(content).at(path)?;
            pad(&mut out, content.len() as u64).at(path)?;
        }
        for (blob, (name, size)) in self.lock.blobs.iter().zip(layout::blob_members(self.lock)) {
            out.write_all(&layout::header(&name, size)).at(path)?;
            let from = &self.blobs[&blob.digest];
            let file = File::open(from).at(from)?;
            if file.metadata().at(from)?.len() != size {
                return Err(changed(from, size));
            }
            let mut left = size;
            while left > 0 {
                // Between two files this is copy_file_range(2).
                match io::copy(&mut (&file).take(left.min(PIECE)), &mut out).at(path)? {
                    0 => return Err(changed(from, size)),
                    n => {
                        left -= n;
                        tick(n);
                    }
                }
            }
            pad(&mut out, size).at(path)?;
        }
        out.write_all(&[0; layout::END as usize]).at(path)
    }
}

fn changed(from: &Path, size: u64) -> Error {
    Code::Source
        .err(format!("{} changed while it was packed: {size} bytes expected", from.display()))
        .cure("run `zd pack` again")
}

fn pad(out: &mut impl Write, size: u64) -> io::Result<()> {
    out.write_all(&[0; 512][..layout::padding(size) as usize])
}
