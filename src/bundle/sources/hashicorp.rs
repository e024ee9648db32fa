//! HashiCorp releases: SHA256SUMS by its signature, the zip by its sum, and the one binary out of it.

use std::fs::File;
use std::io::{ErrorKind, Read, copy};
use std::path::{Path, PathBuf};

use zip::ZipArchive;

use super::Blobs;
use super::cache::{Cache, hash_file};
use super::openpgp::PublicKey;
use super::place::Place;
use super::url::{self, Wanted};
use crate::bundle::hashing::Hashing;
use crate::bundle::lock::{self, Role};
use crate::bundle::manifest::Release;
use crate::error::{At, Code, Error, Result, io};
use crate::ids::{Digest, Fingerprint, Version};
use crate::ui::Ui;

const ORIGIN: &str = "https://releases.hashicorp.com";
/// Real ones have some 2 KiB.
const MAX_SUMS: u64 = 1 << 20;
/// Real ones have some 600 bytes.
const MAX_SIGNATURE: u64 = 64 << 10;
/// Real binaries have up to some 200 MiB; more than this is a zip that means harm.
const MAX_BINARY: u64 = 1 << 30;

/// A release, and those that an upgrade goes through before it.
pub async fn resolve(
    release: &Release,
    arch: &str,
    mirror: Option<&Place>,
    cache: &Cache,
    blobs: &mut Blobs,
    ui: &Ui,
) -> Result<lock::Release> {
    let mut via = Vec::new();
    for version in &release.via {
        let source = Source::new(release, version, arch, mirror, cache, ui);
        via.push(one(&source, blobs).await?);
    }
    let source = Source::new(release, &release.version, arch, mirror, cache, ui);
    Ok(lock::Release { via, ..one(&source, blobs).await? })
}

async fn one(source: &Source<'_>, blobs: &mut Blobs) -> Result<lock::Release> {
    let release = source.release;
    let (archive, signed_by, binary) = match source.plain() {
        Some(path) if release.unsigned => {
            let file = File::open(&path).at(&path)?;
            let size = file.metadata().at(&path)?.len();
            (None, None, source.keep(&path.display().to_string(), size, file)?)
        }
        _ => {
            let (sums, signed_by) = source.sums().await?;
            let (sum, zip) = source.archive(sums).await?;
            (Some(sum), signed_by, source.unzip(&zip)?)
        }
    };
    let (digest, size, path) = binary;
    blobs.add(digest.clone(), size, Role::Binary, path);
    let found = lock::Release {
        product: release.product,
        version: source.version.clone(),
        unsigned: release.unsigned,
        archive,
        signed_by,
        digest,
        via: Vec::new(),
    };
    source.ui.done(format!("{found}"));
    Ok(found)
}

struct Source<'a> {
    release: &'a Release,
    /// The release's own, or one of those before it.
    version: &'a Version,
    /// `nomad 1.6.1`, for people.
    title: String,
    /// Names of the files at the origin.
    sums_file: String,
    zip_file: String,
    mirror: Option<&'a Place>,
    cache: &'a Cache,
    ui: &'a Ui,
}

impl<'a> Source<'a> {
    fn new(
        release: &'a Release,
        version: &'a Version,
        arch: &str,
        mirror: Option<&'a Place>,
        cache: &'a Cache,
        ui: &'a Ui,
    ) -> Self {
        let product = release.product;
        Self {
            release,
            version,
            title: format!("{product} {version}"),
            sums_file: format!("{product}_{version}_SHA256SUMS"),
            zip_file: format!("{product}_{version}_linux_{arch}.zip"),
            mirror,
            cache,
            ui,
        }
    }

    fn place(&self, file: &str) -> Result<Place> {
        let (product, version) = (self.release.product, self.version);
        Place::of(&format!("{ORIGIN}/{product}/{version}/{file}"), self.mirror)
    }

    /// A binary that somebody built, in a folder of such.
    fn plain(&self) -> Option<PathBuf> {
        let Some(Place::Folder(dir)) = self.mirror else { return None };
        self.plain_paths(dir).into_iter().find(|path| path.is_file())
    }

    /// Where that may be: in a folder of its version or, where there is one version only, by its name alone.
    fn plain_paths(&self, dir: &Path) -> Vec<PathBuf> {
        let name = self.release.product.as_str();
        let of_version = dir.join(name).join(self.version.as_str()).join(name);
        if self.release.via.is_empty() { vec![of_version, dir.join(name)] } else { vec![of_version] }
    }

    /// The sums, and who signed them. None only where they are neither there nor needed.
    async fn sums(&self) -> Result<(Option<String>, Option<Fingerprint>)> {
        let place = self.place(&self.sums_file)?;
        let Some(sums) = url::small(&self.title, &place, MAX_SUMS, self.ui).await? else {
            // Without a sum, a broken transfer could not be told from a whole one; a folder has none.
            return match place {
                Place::Folder(_) if self.release.unsigned => Ok((None, None)),
                _ => Err(self.missing(&place)),
            };
        };
        let signed_by = if self.release.unsigned { None } else { Some(self.check(&place, &sums).await?) };
        let sums = String::from_utf8(sums)
            .map_err(|_| Code::Source.err(format!("{}: {place} is not text", self.title)))?;
        Ok((Some(sums), signed_by))
    }

    async fn check(&self, sums_place: &Place, sums: &[u8]) -> Result<Fingerprint> {
        let title = &self.title;
        let key = match &self.release.key {
            Some(path) => PublicKey::read(path).map_err(|e| e.during(title))?,
            None => PublicKey::hashicorp()?,
        };
        let place = self.place(&format!("{}.sig", self.sums_file))?;
        let Some(signature) = url::small(title, &place, MAX_SIGNATURE, self.ui).await? else {
            return Err(Code::Signature
                .err(format!("{title}: {place} is not there, so {sums_place} is not signed"))
                .cure("put it there from where the release came; only unsigned = true in the manifest does without"));
        };
        key.verify(&signature, sums).map_err(|e| e.during(format!("{title}: {place}")))
    }

    /// The zip with its sum: the one that the sums say, else the one that it has.
    async fn archive(&self, sums: Option<String>) -> Result<(Digest, PathBuf)> {
        let place = self.place(&self.zip_file)?;
        match (sums, &place) {
            (Some(sums), _) => {
                let sum = sum_of(&sums, &self.zip_file).map_err(|e| e.during(&self.title))?;
                let wanted = Wanted { name: &self.title, sum: &sum, says: &self.sums_file };
                let (_, path) = url::fetch(wanted, &place, self.cache, self.ui).await?;
                Ok((sum, path))
            }
            (None, Place::Folder(path)) if path.is_file() => Ok((hash_file(path)?.0, path.clone())),
            (None, _) => Err(self.missing(&place)),
        }
    }

    fn missing(&self, place: &Place) -> Error {
        let e = Code::Source.err(format!("{}: {place} is not there", self.title));
        match self.mirror {
            None => e.cure("check the version in the manifest: the origin does not have this one"),
            Some(Place::Folder(dir)) if self.release.unsigned => {
                let paths = self.plain_paths(dir);
                let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
                e.cure(format!("put the binary itself at {}, or the zip at that path", paths.join(" or ")))
            }
            Some(_) if self.plain().is_some() => {
                e.cure("a binary without a signed zip is only taken with unsigned = true in the manifest")
            }
            Some(_) => e.cure("put the release there: a mirror has each file at the path of its URL"),
        }
    }

    /// The regular file that is named exactly as the product; nothing else is looked at.
    fn unzip(&self, path: &Path) -> Result<(Digest, u64, PathBuf)> {
        let (title, file, name) = (&self.title, &self.zip_file, self.release.product.as_str());
        let bad = |why: String| {
            Code::Source
                .err(format!("{title}: {file}: {why}"))
                .cure("expected a zip with the one binary, as HashiCorp releases it")
        };
        let mut zip = ZipArchive::new(File::open(path).at(path)?).map_err(|e| bad(e.to_string()))?;
        if zip.has_duplicate_names() {
            return Err(bad("it holds two files of one name".into()));
        }
        let entry = zip.by_name(name).map_err(|e| bad(format!("{name}: {e}")))?;
        if !entry.is_file() {
            return Err(bad(format!("{name} is not a regular file")));
        }
        self.keep(file, entry.size(), entry)
    }

    /// Into the cache, as long as it is believable.
    fn keep(&self, from: &str, size: u64, binary: impl Read) -> Result<(Digest, u64, PathBuf)> {
        let mut copied = Hashing::new(self.cache.temp()?);
        let bar = self.ui.bytes(&self.title, size);
        copy(&mut bar.wrap_read(binary).take(MAX_BINARY + 1), &mut copied).map_err(|e| match e.kind() {
            // What a bent zip gives; all else is the disk.
            ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof => {
                Code::Source.err(format!("{}: {from}: {e}", self.title)).cure("fetch it again: it is damaged")
            }
            _ => io(from, e),
        })?;
        bar.finish_and_clear();
        let (temp, digest, size) = copied.finish();
        if size > MAX_BINARY {
            return Err(Code::Source
                .err(format!("{}: {from}: the binary has over {MAX_BINARY} bytes", self.title))
                .cure("check where it came from: no release is that large"));
        }
        let path = self.cache.keep(temp, &digest)?;
        Ok((digest, size, path))
    }
}

/// The sum of the one line `HEX  NAME` for this name (sha256sum(1)).
fn sum_of(sums: &str, name: &str) -> Result<Digest> {
    let mut lines = sums.lines().filter_map(|l| l.split_once("  ")).filter(|(_, n)| *n == name);
    match (lines.next(), lines.next()) {
        (Some((hex, _)), None) => {
            format!("sha256:{hex}").parse().map_err(|e| Code::Source.err(format!("SHA256SUMS: {name}: {e}")))
        }
        (None, _) => Err(Code::Source
            .err(format!("SHA256SUMS has no line for {name}"))
            .cure("choose a version that is released for this architecture")),
        (Some(_), Some(_)) => Err(Code::Source
            .err(format!("SHA256SUMS has more than one line for {name}"))
            .cure("do not use it; fetch it again from where the release came")),
    }
}
