//! gzip on all cores, for layers that come uncompressed. The same bytes in give the same bytes out, whatever the number
//! of cores: blocks of a fixed size become members of their own, and members on end are one gzip file (RFC 1952, 2.2).

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};

use libdeflater::{CompressionLvl, Compressor};

/// Layers come out as small as with level 6 of zlib, in less than half the time (benches/README.md).
const LEVEL: i32 = 3;
/// What is lost with smaller ones: each begins without what could be repeated.
const BLOCK: usize = 512 << 10;
/// Blocks of one file that are under way; bounds memory.
const WINDOW: usize = 6;

struct Job {
    plain: Vec<u8>,
    done: SyncSender<io::Result<Vec<u8>>>,
}

/// One thread for each core, for all files that are compressed at the same time. They end with it.
pub struct Pool {
    jobs: Sender<Job>,
}

impl Pool {
    pub fn new() -> Self {
        let (jobs, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            let queue = queue.clone();
            std::thread::spawn(move || work(&queue));
        }
        Self { jobs }
    }

    pub fn compress<W: Write>(&self, to: W) -> Gzip<'_, W> {
        Gzip { pool: self, block: Vec::with_capacity(BLOCK), pending: VecDeque::new(), begun: false, to }
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    let level = CompressionLvl::new(LEVEL).expect("the level is a constant");
    let mut compressor = Compressor::new(level);
    loop {
        let job = queue.lock().unwrap_or_else(|e| e.into_inner()).recv();
        let Ok(Job { plain, done }) = job else { return };
        let mut member = vec![0; compressor.gzip_compress_bound(plain.len())];
        let result = compressor.gzip_compress(&plain, &mut member).map_err(io::Error::other);
        // Who does not wait any more has failed elsewhere.
        let _ = done.send(result.map(|size| {
            member.truncate(size);
            member
        }));
    }
}

/// A writer; what it writes is whole only after `finish`.
pub struct Gzip<'a, W> {
    pool: &'a Pool,
    block: Vec<u8>,
    pending: VecDeque<Receiver<io::Result<Vec<u8>>>>,
    begun: bool,
    to: W,
}

impl<W: Write> Gzip<'_, W> {
    fn submit(&mut self) -> io::Result<()> {
        let (done, result) = sync_channel(1);
        let plain = std::mem::replace(&mut self.block, Vec::with_capacity(BLOCK));
        self.pool.jobs.send(Job { plain, done }).map_err(io::Error::other)?;
        self.pending.push_back(result);
        self.begun = true;
        self.write_down_to(WINDOW)
    }

    /// Writes what is compressed, in order, until no more than `left` blocks are under way.
    fn write_down_to(&mut self, left: usize) -> io::Result<()> {
        while self.pending.len() > left {
            let Some(next) = self.pending.pop_front() else { break };
            self.to.write_all(&next.recv().map_err(io::Error::other)??)?;
        }
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<W> {
        // No bytes at all are one empty member.
        if !self.block.is_empty() || !self.begun {
            self.submit()?;
        }
        self.write_down_to(0)?;
        Ok(self.to)
    }
}

impl<W: Write> Write for Gzip<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..n]);
        if self.block.len() == BLOCK {
            self.submit()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::MultiGzDecoder;

    use super::*;

    #[test]
    fn every_size_comes_back() {
        let pool = Pool::new();
        let all: Vec<u8> = (0..(WINDOW + 2) * BLOCK).map(|i| (i / 7 * i) as u8).collect();
        for size in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, all.len()] {
            let mut gzip = pool.compress(Vec::new());
            gzip.write_all(&all[..size]).unwrap();
            let mut back = Vec::new();
            MultiGzDecoder::new(&*gzip.finish().unwrap()).read_to_end(&mut back).unwrap();
            assert!(back == all[..size], "{size} bytes");
        }
    }
}
