//! Writing a backup: under another name first, the index before the members that it names, every member compared
//! with the index while it is written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use age::Encryptor;
use age::stream::StreamWriter;
use jiff::Timestamp;
use reqwest::Response;
use sha2::{Digest as _, Sha256};

use super::index::{INDEX, Index, SIGNATURE};
use super::key::Recipient;
use crate::bundle::hashing::Hashing;
use crate::bundle::signature::{OF_HOST, Signer};
use crate::bundle::sources::url::chain;
use crate::error::{At, Code, OrCode, Result};
use crate::host::fs as hostfs;
use crate::ids::Digest;

const BLOCK: usize = 512;

/// Where a backup stands until it is whole. One name for all that were broken off: the next run takes it away.
pub fn partial(folder: &Path, index: &Index) -> PathBuf {
    folder.join(format!(".zd-{}.partial", index.host.node()))
}

pub struct Writer {
    out: StreamWriter<Hashing<BufWriter<File>>>,
    at: Timestamp,
    partial: PathBuf,
    path: PathBuf,
}

/// What was written.
pub struct Written {
    pub path: PathBuf,
    pub bytes: u64,
    pub digest: Digest,
}

impl Writer {
    /// Begins with the index and its signature.
    pub fn begin(
        folder: &Path,
        name: &str,
        recipient: &Recipient,
        signer: &Signer,
        index: &Index,
    ) -> Result<Self> {
        let path = folder.join(name);
        let partial = partial(folder, index);
        hostfs::remove_file(&partial)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial).at(&partial)?;
        let key = recipient.key()?;
        let encryptor = Encryptor::with_recipients(std::iter::once(&key as &dyn age::Recipient))
            .or_code(Code::Bug, "encrypting")?;
        let hashed = Hashing::new(BufWriter::new(file));
        let out = encryptor.wrap_output(hashed).at(&partial)?;
        let mut writer = Self { out, at: index.at, partial, path };
        let bytes = serde_json::to_vec_pretty(index).or_code(Code::Bug, "the index of a backup")?;
        let signature = signer.sign(&bytes, OF_HOST, &index.signed_as());
        for (name, bytes) in [(INDEX, bytes), (SIGNATURE, signature.into_bytes())] {
            writer.header(name, bytes.len() as u64)?;
            writer.write(&bytes)?;
            writer.pad(bytes.len() as u64)?;
        }
        Ok(writer)
    }

    fn header(&mut self, name: &str, size: u64) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).at(&self.path)?;
        header.set_size(size);
        header.set_mode(0o600);
        header.set_mtime(self.at.as_second().max(0) as u64);
        header.set_cksum();
        self.write(header.as_bytes())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).at(&self.partial)
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let rest = (BLOCK - (size % BLOCK as u64) as usize) % BLOCK;
        self.write(&[0; BLOCK][..rest])
    }

    /// A member, which must be as its index says.
    pub fn member(&mut self, name: &str, digest: &Digest, size: u64, from: impl Read) -> Result<()> {
        self.header(name, size)?;
        let mut written = 0;
        let (found, _) = Digest::of_reader(from.take(size), |piece| {
            written += piece.len() as u64;
            self.out.write_all(piece)
        })
        .at(&self.partial)?;
        if found != *digest || written != size {
            return Err(Code::Io
                .err(format!("{name} changed, or was damaged, while it was being backed up"))
                .cure("run the same command again"));
        }
        self.pad(size)
    }

    /// As [`Writer::member`], of bytes that come over a connection.
    pub async fn download(
        &mut self,
        name: &str,
        digest: &Digest,
        size: u64,
        mut from: Response,
    ) -> Result<()> {
        self.header(name, size)?;
        let (mut hash, mut written) = (Sha256::new(), 0u64);
        let broken = |e: reqwest::Error| Code::Registry.err(format!("{name}: {}", chain(&e.without_url())));
        while let Some(piece) = from.chunk().await.map_err(broken)? {
            hash.update(&piece);
            written += piece.len() as u64;
            self.write(&piece)?;
        }
        if Digest::from_hash(&hash.finalize()) != *digest || written != size {
            return Err(Code::Registry
                .err(format!("the private registry gives {name} with other bytes than its name says"))
                .cure("its disk may be failing: see `zd logs registry`; zd install with the bundle pushes it again"));
        }
        self.pad(size)
    }

    /// Ends the file, forces it to disk and gives it its name.
    pub fn finish(mut self) -> Result<Written> {
        self.write(&[0; 2 * BLOCK])?;
        let (file, digest, bytes) = self.out.finish().at(&self.partial)?.finish();
        let file = file.into_inner().map_err(io::IntoInnerError::into_error).at(&self.partial)?;
        file.sync_all().at(&self.partial)?;
        fs::rename(&self.partial, &self.path).at(&self.path)?;
        hostfs::sync_dir(self.path.parent().unwrap_or(Path::new("/")))?;
        Ok(Written { path: self.path, bytes, digest })
    }
}
