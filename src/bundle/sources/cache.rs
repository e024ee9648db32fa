//! The pack machine's cache: blobs by digest, and a note per uncompressed layer of what it became.
//! A file gets its name only after its hash is known; a second `pack` finds everything here.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::bundle::hashing::Hashing;
use crate::error::{At, Code, Result};
use crate::ids::Digest;

/// Notes of what plain layers became. Another folder whenever they become something else: a cache that an earlier zd
/// filled must not change a bundle.
const GZIPPED: &str = "gzip-2";

#[derive(Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$ZD_CACHE_DIR`, else `$XDG_CACHE_HOME/zd`, else `~/.cache/zd`.
    pub fn open() -> Result<Self> {
        let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = var("ZD_CACHE_DIR")
            .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("zd")))
            .or_else(|| var("HOME").map(|d| d.join(".cache/zd")))
            .ok_or_else(|| Code::Usage.err("no cache folder: HOME is not set").cure("set ZD_CACHE_DIR"))?;
        let cache = Self { root };
        for dir in ["blobs/sha256", GZIPPED, "tmp"] {
            let dir = cache.root.join(dir);
            fs::create_dir_all(&dir).at(&dir)?;
        }
        Ok(cache)
    }

    /// A folder of its own for one source (apt's state, partial downloads).
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).at(&dir)?;
        Ok(dir)
    }

    pub fn temp(&self) -> Result<NamedTempFile> {
        let dir = self.root.join("tmp");
        NamedTempFile::new_in(&dir).at(&dir)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// The blob, if it is here whole: its bytes are hashed again, disks forget.
    pub fn get(&self, digest: &Digest) -> Result<Option<(PathBuf, u64)>> {
        let path = self.path(digest);
        match File::open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(crate::error::io(&path, e)),
            Ok(file) => {
                let (found, size) = hash(file).at(&path)?;
                if found == *digest {
                    return Ok(Some((path, size)));
                }
                fs::remove_file(&path).at(&path)?;
                Ok(None)
            }
        }
    }

    /// A copy of what a reader gives, with its digest and size; for `keep`.
    pub fn copy(&self, from: impl Read) -> Result<(NamedTempFile, Digest, u64)> {
        let mut temp = self.temp()?;
        let (digest, size) =
            Digest::of_reader(from, |piece| temp.write_all(piece)).at(self.root.join("tmp"))?;
        Ok((temp, digest, size))
    }

    /// Keeps a finished temporary file under the digest that it has.
    pub fn keep(&self, temp: NamedTempFile, digest: &Digest) -> Result<PathBuf> {
        let path = self.path(digest);
        temp.persist(&path).map_err(|e| crate::error::io(&path, e.error))?;
        Ok(path)
    }

    /// What an interrupted download of a blob left, or an empty one.
    pub fn partial(&self, digest: &Digest) -> Result<Partial> {
        let path = self.dir("partial")?.join(digest.hex());
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path).at(&path)?;
        let mut seen = Hashing::new(io::sink());
        io::copy(&mut file, &mut seen).at(&path)?;
        Ok(Partial { path, file, seen })
    }

    /// Takes in a file of this cache's folder that was hashed while it was written.
    pub fn adopt(&self, file: &Path, digest: &Digest) -> Result<PathBuf> {
        let path = self.path(digest);
        fs::rename(file, &path).at(&path)?;
        Ok(path)
    }

    pub fn put(&self, bytes: &[u8]) -> Result<(Digest, u64, PathBuf)> {
        let (temp, digest, size) = self.copy(bytes)?;
        let path = self.keep(temp, &digest)?;
        Ok((digest, size, path))
    }

    /// The compressed layer that an uncompressed one became earlier.
    pub fn gzipped(&self, plain: &Digest) -> Result<Option<(Digest, u64, PathBuf)>> {
        let note = self.root.join(GZIPPED).join(plain.hex());
        let Ok(text) = fs::read_to_string(&note) else { return Ok(None) };
        let Ok(digest) = text.trim().parse::<Digest>() else { return Ok(None) };
        Ok(self.get(&digest)?.map(|(path, size)| (digest, size, path)))
    }

    pub fn note_gzipped(&self, plain: &Digest, gzipped: &Digest) -> Result<()> {
        let mut temp = self.temp()?;
        temp.write_all(gzipped.as_str().as_bytes()).at(temp.path())?;
        let note = self.root.join(GZIPPED).join(plain.hex());
        temp.persist(&note).map_err(|e| crate::error::io(&note, e.error))?;
        Ok(())
    }
}

/// A download that goes on where the last one broke off; hashed as it grows.
pub struct Partial {
    path: PathBuf,
    file: File,
    seen: Hashing<io::Sink>,
}

impl Partial {
    pub fn len(&self) -> u64 {
        self.seen.len()
    }

    pub fn restart(&mut self) -> Result<()> {
        self.seen = Hashing::new(io::sink());
        self.file.set_len(0).at(&self.path)
    }

    pub fn add(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).and_then(|()| self.seen.write_all(bytes)).at(&self.path)
    }

    /// The file with the digest and size of all that is in it.
    pub fn finish(self) -> (PathBuf, Digest, u64) {
        let (_, digest, size) = self.seen.finish();
        (self.path, digest, size)
    }
}

/// Digest and size of what a reader gives.
pub fn hash(from: impl Read) -> std::io::Result<(Digest, u64)> {
    Digest::of_reader(from, |_| Ok(()))
}

/// Digest and size of a local file.
pub fn hash_file(path: &Path) -> Result<(Digest, u64)> {
    hash(File::open(path).at(path)?).at(path)
}
