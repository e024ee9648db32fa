//! The lock: a bundle's exact table of contents. The signature covers its bytes; it covers all else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::manifest::{CONSUL_HTTPS, Engine, ImageRef, Packages, Product, STACK_PORTS, Service};
use super::signature::Key;
use super::target::Target;
use crate::backup::Settings;
use crate::error::{Code, Result};
use crate::ids::{Digest, Fingerprint, Name, Version};

/// Largest lock that is read: some 100,000 blobs.
pub const MAX_LOCK: u64 = 16 << 20;
/// Largest blob that is believed: 1 TiB. More is a damaged or hostile lock.
pub const MAX_BLOB: u64 = 1 << 40;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Lock {
    pub schema: u32,
    pub name: Name,
    pub version: Version,
    pub created: Timestamp,
    /// Version of the zd that packed it.
    pub packed_by: String,
    pub engine: Engine,
    /// Left out where there is none, as in locks from before there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consul_https: Option<u16>,
    pub target: Target,
    /// Packages asked for, by role.
    pub packages: Packages,
    /// The apt index (a `Packages` file) over `debs`; absent where no package is carried.
    pub apt_index: Option<Digest>,
    pub debs: Vec<Deb>,
    pub images: Vec<Image>,
    pub files: Vec<File>,
    /// Left out where there is none, as in locks from before there were releases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub releases: Vec<Release>,
    pub services: Vec<Service>,
    /// Left out where there is none, as in locks from before there were backups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<Settings>,
    /// Keys that no host that takes this bundle is to trust any more. Left out where there is none, as in locks from
    /// before there were revocations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revoked_keys: Vec<Key>,
    /// Every blob, once, in the order it stands in the bundle.
    pub blobs: Vec<Blob>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Deb {
    pub name: String,
    pub version: String,
    /// File name in the apt index.
    pub file: String,
    pub digest: Digest,
    /// Keys that signed the archive it comes from; an empty list where nobody did, which the manifest allowed. Left out
    /// in locks from before it was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<Vec<Fingerprint>>,
}

/// One image; its manifest, config and layers are blobs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Image {
    #[serde(rename = "ref")]
    pub reference: ImageRef,
    /// Media type of the manifest.
    pub media_type: String,
    pub manifest: Digest,
    pub config: Digest,
    pub layers: Vec<Digest>,
    /// The index that the manifest was taken out of, for one of its platforms; left out where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Digest>,
    /// Bytes of the layers when unpacked by the engine.
    pub unpacked: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub name: Version,
    pub digest: Digest,
}

/// A program that HashiCorp releases, and who vouched for its bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Release {
    pub product: Product,
    pub version: Version,
    /// The manifest took it without a signature; then `version` is what the manifest says, unproven.
    pub unsigned: bool,
    /// The zip that it came in; not carried. Absent where a plain binary was taken.
    pub archive: Option<Digest>,
    /// The key or subkey that signed the sums; absent where `unsigned`.
    pub signed_by: Option<Fingerprint>,
    /// The binary.
    pub digest: Digest,
    /// Earlier versions that an upgrade goes through, oldest first, each a release of its own. Left out where there is
    /// none, as in locks from before there were any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub via: Vec<Release>,
}

impl Release {
    fn problem(&self) -> Option<String> {
        let Release { product, version, .. } = self;
        let signed = self.signed_by.is_some();
        if signed == self.unsigned || (signed && self.archive.is_none()) {
            return Some(format!(
                "release {product} {version}: expected a signed archive, or the mark unsigned"
            ));
        }
        let mut before = None;
        for stone in &self.via {
            let numbers = Some(stone.version.numbers());
            if stone.product != *product || !stone.via.is_empty() {
                return Some(format!(
                    "release {product} {version}: via holds more than earlier versions of it"
                ));
            }
            if numbers <= before || numbers >= Some(version.numbers()) {
                return Some(format!("release {product} {version}: via {} is not in order", stone.version));
            }
            before = numbers;
        }
        self.via.iter().find_map(Self::problem)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "release {} {}: ", self.product, self.version)?;
        match &self.signed_by {
            Some(key) => write!(f, "signed by {key}"),
            None => f.write_str("UNSIGNED: only the manifest's word for it"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
    pub role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    ImageManifest,
    ImageConfig,
    ImageLayer,
    AptIndex,
    Deb,
    File,
    Binary,
}

impl Lock {
    /// Parses and checks that the lock hangs together. Call it on signed bytes only.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bad = |what: String| {
            Code::Bundle.err(what).cure("the bundle was not made by a working `zd pack`; pack it again")
        };
        #[derive(Deserialize)]
        struct Form {
            schema: u32,
        }
        let unreadable = |e| bad(format!("zd-lock.json cannot be read: {e}"));
        // First: a newer schema has keys that this zd does not know.
        let Form { schema } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if schema != 1 {
            return Err(Code::Bundle
                .err(format!("the lock has schema {schema}, this zd reads schema 1"))
                .cure("use the zd that lies beside the bundle"));
        }
        let lock: Lock = serde_json::from_slice(bytes).map_err(unreadable)?;
        let mut sizes = BTreeMap::new();
        let mut total: u64 = 0;
        for blob in &lock.blobs {
            if blob.size > MAX_BLOB {
                return Err(bad(format!("{}: a size of {} bytes cannot be right", blob.digest, blob.size)));
            }
            // At most 2^40 each and some 10^5 of them: cannot overflow, but the lock is not trusted to be short.
            total = total
                .checked_add(blob.size)
                .ok_or_else(|| bad("the sizes of all blobs together cannot be right".into()))?;
            if sizes.insert(&blob.digest, blob.size).is_some() {
                return Err(bad(format!("{} is listed twice", blob.digest)));
            }
        }
        if let Some(image) = lock.images.iter().find(|i| i.unpacked > MAX_BLOB) {
            let (what, size) = (&image.reference, image.unpacked);
            return Err(bad(format!("image {what}: an unpacked size of {size} bytes cannot be right")));
        }
        let mut order = lock.blobs.clone();
        sort_blobs(&mut order);
        if order != lock.blobs {
            return Err(bad("the blobs are not in order (small first)".into()));
        }
        let named: BTreeSet<&Digest> = lock.named().collect();
        if let Some(missing) = named.iter().find(|d| !sizes.contains_key(**d)) {
            return Err(bad(format!("{missing} is used but not listed among the blobs")));
        }
        if let Some(extra) = sizes.keys().find(|d| !named.contains(**d)) {
            return Err(bad(format!("{extra} is listed but used by nothing")));
        }
        for deb in &lock.debs {
            let plain = !deb.file.contains('/') && deb.file.ends_with(".deb") && !deb.file.starts_with('.');
            if !plain {
                return Err(bad(format!("package file name {:?} is not a plain .deb name", deb.file)));
            }
        }
        let mut products = BTreeSet::new();
        for release in &lock.releases {
            let product = release.product;
            if !products.insert(product) {
                return Err(bad(format!("release {product} is listed twice")));
            }
            if let Some(problem) = release.problem() {
                return Err(bad(problem));
            }
        }
        Ok(lock)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a lock is plain data");
        bytes.push(b'\n');
        bytes
    }

    /// Every digest that a component names.
    fn named(&self) -> impl Iterator<Item = &Digest> {
        let images = self.images.iter().flat_map(|i| [&i.manifest, &i.config].into_iter().chain(&i.layers));
        let debs = self.debs.iter().map(|d| &d.digest);
        let files = self.files.iter().map(|f| &f.digest);
        let releases = self.programs().map(|r| &r.digest);
        images.chain(debs).chain(files).chain(releases).chain(&self.apt_index)
    }

    pub fn size_of(&self, digest: &Digest) -> u64 {
        self.blobs.iter().find(|b| b.digest == *digest).map_or(0, |b| b.size)
    }

    pub fn image(&self, reference: &ImageRef) -> Option<&Image> {
        self.images.iter().find(|i| i.reference == *reference)
    }

    /// Every release that is carried, those that an upgrade goes through before the one that they lead to.
    pub fn programs(&self) -> impl Iterator<Item = &Release> {
        self.releases.iter().flat_map(|release| release.via.iter().chain([release]))
    }

    pub fn release(&self, product: Product) -> Option<&Release> {
        self.releases.iter().find(|r| r.product == product)
    }

    /// Ports of what runs beneath the services, and whose they are.
    pub fn stack_ports(&self) -> impl Iterator<Item = (u16, &'static str)> {
        let stack = STACK_PORTS.into_iter().filter(|_| self.engine == Engine::Nomad);
        stack.chain(self.consul_https.map(|port| (port, CONSUL_HTTPS)))
    }

    /// Ports that others than this host use.
    pub fn client_ports(&self) -> impl Iterator<Item = u16> {
        self.services.iter().flat_map(Service::client_ports).chain(self.consul_https)
    }

    pub fn service(&self, name: &Name) -> Option<&Service> {
        self.services.iter().find(|s| s.name == *name)
    }

    /// `name-version`, for file names and people.
    pub fn title(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }
}

/// Small first, so that what is read first lies first; equal sizes by digest.
pub fn sort_blobs(blobs: &mut [Blob]) {
    blobs.sort_by(|a, b| (a.size, &a.digest).cmp(&(b.size, &b.digest)));
}
