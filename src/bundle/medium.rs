//! What a bundle is read from: `Read + Seek` cursors over one shared, unmoved file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// A cursor. Clones share the file but not the position, so many threads can read at once.
#[derive(Clone)]
pub struct Medium {
    file: Arc<File>,
    len: u64,
    pos: u64,
}

impl Medium {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self { file: Arc::new(file), len: meta.len(), pos: 0 })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// A reader over `size` bytes from `offset`.
    pub fn slice(&self, offset: u64, size: u64) -> io::Take<Medium> {
        Medium { pos: offset, ..self.clone() }.take(size)
    }
}

impl Read for Medium {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.pos)?;
        self.pos += n as u64;
        Ok(n)
    }
}

impl Seek for Medium {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let pos = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.len.checked_add_signed(n),
            SeekFrom::Current(n) => self.pos.checked_add_signed(n),
        };
        self.pos = pos.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.pos)
    }
}
