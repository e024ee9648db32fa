//! A writer that knows the SHA-256 of what went through it.

use std::io::{self, Write};

use sha2::{Digest as _, Sha256};

use crate::ids::Digest;

pub struct Hashing<W> {
    to: W,
    sha: Sha256,
    len: u64,
}

impl<W> Hashing<W> {
    pub fn new(to: W) -> Self {
        Self { to, sha: Sha256::new(), len: 0 }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Digest and size of what was written, and where to.
    pub fn finish(self) -> (W, Digest, u64) {
        (self.to, Digest::from_hash(self.sha.finalize().as_slice()), self.len)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.to.write(bytes)?;
        self.sha.update(&bytes[..n]);
        self.len += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
