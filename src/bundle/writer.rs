//! Writing a bundle: one pass, hashing what it writes; complete under a temporary name, then renamed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

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
    // The kernel copies while the other reads back and hashes what stands in the bundle, which is in memory still.
    let (digest, len) = std::thread::scope(|scope| {
        let (laid, parts) = mpsc::channel();
        let written = temp.reopen().at(path)?;
        let checked = scope.spawn(move || check(written, parts, path, blobs));
        let done = lay.write(temp.as_file(), laid, tick);
        let checked = checked.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        // What the check says is the reason where both fail: it ends the other.
        let checked = checked?;
        done.map(|()| checked)
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

/// Bytes that were just written, in their order.
enum Part<'a> {
    Frame(u64),
    Piece(u64),
    /// The pieces before it are this blob, whole.
    Blob(&'a Digest),
}

impl<'a> Lay<'a> {
    fn write(&self, mut out: &File, laid: mpsc::Sender<Part<'a>>, tick: impl Fn(u64)) -> Result<()> {
        let path = self.bundle;
        // Nobody listens any more where a blob was found to be another: that is said there.
        let say = |part| laid.send(part).map_err(|_| Code::Source.err("what was written did not hold"));
        for (name, content) in HEAD.into_iter().zip(self.head) {
            let size = content.len() as u64;
            out.write_all(&layout::header(name, size)).at(path)?;
            out.write_all(content).at(path)?;
            pad(&mut out, size).at(path)?;
            say(Part::Frame(layout::BLOCK + size + layout::padding(size)))?;
        }
        for (blob, (name, size)) in self.lock.blobs.iter().zip(layout::blob_members(self.lock)) {
            out.write_all(&layout::header(&name, size)).at(path)?;
            say(Part::Frame(layout::BLOCK))?;
            let from = &self.blobs[&blob.digest];
            let file = File::open(from).at(from)?;
            if file.metadata().at(from)?.len() != size {
                return Err(changed(from));
            }
            let mut left = size;
            while left > 0 {
                // Between two files this is copy_file_range(2).
                match io::copy(&mut (&file).take(left.min(PIECE)), &mut out).at(path)? {
                    0 => return Err(changed(from)),
                    n => {
                        left -= n;
                        say(Part::Piece(n))?;
                        tick(n);
                    }
                }
            }
            say(Part::Blob(&blob.digest))?;
            pad(&mut out, size).at(path)?;
            say(Part::Frame(layout::padding(size)))?;
        }
        out.write_all(&[0; layout::END as usize]).at(path)?;
        say(Part::Frame(layout::END))
    }
}

/// Reads what was written: each blob has the bytes that the signed lock says, whatever became of its source after that
/// was hashed. Returns digest and size of the whole.
fn check(
    written: File,
    parts: mpsc::Receiver<Part>,
    bundle: &Path,
    blobs: &HashMap<Digest, PathBuf>,
) -> Result<(Digest, u64)> {
    let mut whole = Hashing::new(io::sink());
    let mut blob = Hashing::new(io::sink());
    let mut buf = vec![0; 1 << 20];
    for part in parts {
        let (size, of_blob) = match part {
            Part::Frame(size) => (size, false),
            Part::Piece(size) => (size, true),
            Part::Blob(wanted) => {
                let (_, found, _) = std::mem::replace(&mut blob, Hashing::new(io::sink())).finish();
                if found != *wanted {
                    return Err(changed(&blobs[wanted]));
                }
                continue;
            }
        };
        let mut left = size;
        while left > 0 {
            let piece = &mut buf[..left.min(1 << 20) as usize];
            (&written).read_exact(piece).at(bundle)?;
            whole.write_all(piece).at(bundle)?;
            if of_blob {
                blob.write_all(piece).at(bundle)?;
            }
            left -= piece.len() as u64;
        }
    }
    let (_, digest, len) = whole.finish();
    Ok((digest, len))
}

fn changed(from: &Path) -> Error {
    Code::Source
        .err(format!("{} changed while it was packed", from.display()))
        .cure("run `zd pack` again while nothing writes to it")
}

fn pad(out: &mut impl Write, size: u64) -> io::Result<()> {
    out.write_all(&[0; 512][..layout::padding(size) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_that_was_written_with_other_bytes_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle");
        std::fs::write(&path, b"headblob").unwrap();
        let look = |wanted: &Digest| {
            let (say, parts) = mpsc::channel();
            for part in [Part::Frame(4), Part::Piece(3), Part::Piece(1), Part::Blob(wanted)] {
                say.send(part).unwrap();
            }
            drop(say);
            check(File::open(&path).unwrap(), parts, &path, &HashMap::from([(wanted.clone(), path.clone())]))
        };
        assert_eq!(look(&Digest::of(b"blob")).unwrap(), (Digest::of(b"headblob"), 8));
        assert_eq!(look(&Digest::of(b"blub")).unwrap_err().code, Code::Source);
    }
}
