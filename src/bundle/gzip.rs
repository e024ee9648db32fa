//! gzip on all cores, for layers that come uncompressed. The same bytes in give the same bytes out,
//! whatever the number of cores: gzp cuts its input into blocks of a fixed size.

use std::io::{Read, Write};

use gzp::deflate::Gzip;
use gzp::par::compress::ParCompressBuilder;
use gzp::{Compression, ZWriter};

/// Level 6, as Docker and BuildKit use it.
pub fn compress(mut from: impl Read, to: impl Write + Send + 'static) -> std::io::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut gzip = ParCompressBuilder::<Gzip>::new()
        .num_threads(threads)
        .map_err(std::io::Error::other)?
        .compression_level(Compression::new(6))
        .from_writer(to);
    std::io::copy(&mut from, &mut gzip)?;
    gzip.finish().map(drop).map_err(std::io::Error::other)
}
