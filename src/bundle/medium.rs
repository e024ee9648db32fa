//! What came from elsewhere, on a stick or by mail, is opened here. What a bundle is read from: `Read + Seek` cursors over
//! one shared, unmoved file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

/// A cursor. Clones share the file but not the position, so many threads can read at once.
#[derive(Clone)]
pub struct Medium {
    file: Arc<File>,
    len: u64,
    pos: u64,
}

/// Opens what came from elsewhere. A FIFO, which would be waited for, a device and a folder are an error.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// A key or another small text that came from elsewhere, of at most 64 KiB.
pub fn text(path: &Path) -> io::Result<String> {
    const MOST: u64 = 64 << 10;
    let mut text = String::new();
    if open(path)?.take(MOST + 1).read_to_string(&mut text)? as u64 > MOST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "over 64 KiB, which no such file has"));
    }
    Ok(text)
}

impl Medium {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), len, pos: 0 })
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
