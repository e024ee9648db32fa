//! Writing a bundle: one pass, hashing what it writes; complete under a temporary name, then renamed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::hashing::Hashing;
use super::layout::{self, HEAD, OCI_LAYOUT};
use super::lock::Lock;
use super::signature::{OF_LOCK, Signer};
use crate::error::{At, Code, Result};
use crate::ids::Digest;

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
    let file = temp.as_file().try_clone().at(dir)?;
    let mut out = Hashing::new(BufWriter::with_capacity(1 << 20, file));
    for (name, content) in HEAD.into_iter().zip(head) {
        out.write_all(&layout::header(name, content.len() as u64)).at(path)?;
        out.write_all(content).at(path)?;
        pad(&mut out, content.len() as u64).at(path)?;
    }
    let mut buf = vec![0u8; 1 << 20];
    for (blob, (name, size)) in lock.blobs.iter().zip(layout::blob_members(lock)) {
        out.write_all(&layout::header(&name, size)).at(path)?;
        let from = &blobs[&blob.digest];
        let mut file = File::open(from).at(from)?.take(size + 1);
        let mut copied = 0;
        loop {
            let n = file.read(&mut buf).at(from)?;
            if n == 0 {
                break;
            }
            copied += n as u64;
            out.write_all(&buf[..n]).at(path)?;
            tick(n as u64);
        }
        if copied != size {
            return Err(Code::Source
                .err(format!("{} changed while it was packed: {size} bytes expected", from.display()))
                .cure("run `zd pack` again"));
        }
        pad(&mut out, size).at(path)?;
    }
    out.write_all(&[0; layout::END as usize]).at(path)?;
    out.flush().at(path)?;
    let (_, digest, len) = out.finish();
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

fn pad(out: &mut impl Write, size: u64) -> io::Result<()> {
    out.write_all(&[0; 512][..layout::padding(size) as usize])
}
