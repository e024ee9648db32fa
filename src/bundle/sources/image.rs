//! Images: from the Docker daemon, from a `docker save` tar, from an OCI layout (tar or folder), from a registry
//! (its own file).
//!
//! Every other form is a set of named files with either an `index.json` (OCI image layout) or a
//! `manifest.json` (docker save), read where they are. Layers that come compressed keep their bytes and
//! thereby their digest; plain ones are gzipped, several at a time, each in one pass.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use bollard::Docker;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::cache::Cache;
use super::{Blobs, registry};
use crate::bundle::gzip;
use crate::bundle::hashing::Hashing;
use crate::bundle::lock::{Image, Role};
use crate::bundle::manifest::ImageSource;
use crate::bundle::medium::Medium;
use crate::bundle::parallel::try_each;
use crate::error::{At, Code, Error, OrCode, Result, source_file};
use crate::ids::Digest;
use crate::ui::Ui;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Largest manifest, index or config that is read (registries refuse manifests over 4 MiB).
const MAX_JSON: u64 = 8 << 20;

pub async fn resolve(
    source: &ImageSource,
    arch: &str,
    cache: &Cache,
    blobs: &mut Blobs,
    ui: &Ui,
) -> Result<Image> {
    let named =
        |e: Error| if e.code == Code::Source { e.during(format!("image {}", source.reference)) } else { e };
    if let Some(from) = &source.registry {
        return registry::resolve(source, from, arch, cache, blobs, ui).await.map_err(named);
    }
    let files = match source {
        ImageSource { docker: Some(name), .. } => from_daemon(name, cache, ui).await?,
        ImageSource { oci: Some(path), .. } | ImageSource { docker_archive: Some(path), .. } => {
            Files::open(path).map_err(named)?
        }
        _ => return Err(Code::Bug.err("an image source was not checked")),
    };
    let image = Resolve { source, arch, files, cache, blobs, ui };
    image.run().map_err(named)
}

async fn from_daemon(name: &str, cache: &Cache, ui: &Ui) -> Result<Files> {
    let unreachable = |e: bollard::errors::Error| {
        Code::Docker
            .err(format!("image {name}: the Docker daemon does not give it: {e}"))
            .cure("check `docker image ls` and that dockerd runs; DOCKER_HOST says where zd looks")
    };
    let docker = Docker::connect_with_defaults().map_err(unreachable)?;
    docker.inspect_image(name).await.map_err(unreachable)?;
    let bar = ui.wait(format!("docker save {name}"));
    let temp = cache.temp()?;
    let mut file = temp.as_file();
    let mut stream = docker.export_image(name);
    while let Some(chunk) = stream.next().await {
        file.write_all(&chunk.map_err(unreachable)?).at(temp.path())?;
    }
    bar.finish_and_clear();
    let files = Files::open(temp.path())?;
    Ok(Files { _saved: Some(temp), ..files })
}

/// Where the bytes of a file are: in an archive, or in a file of their own.
#[derive(Clone)]
struct Part {
    path: PathBuf,
    offset: u64,
    size: u64,
}

impl Part {
    fn open(&self) -> Result<impl Read> {
        Ok(Medium::open(&self.path).at(&self.path)?.slice(self.offset, self.size))
    }

    fn start(&self, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open()?.take(most).read_to_end(&mut bytes).at(&self.path)?;
        Ok(bytes)
    }
}

/// Files by name, wherever they are.
struct Files {
    parts: HashMap<String, Part>,
    /// What Docker saved goes when all is in the cache.
    _saved: Option<NamedTempFile>,
}

impl Files {
    fn open(path: &Path) -> Result<Self> {
        let parts = if path.is_dir() { layout(path)? } else { archive(path)? };
        Ok(Self { parts, _saved: None })
    }

    fn part(&self, name: &str) -> Result<&Part> {
        self.parts.get(name).ok_or_else(|| damaged(format!("{name} is missing in the archive")))
    }

    fn json(&self, name: &str) -> Result<Vec<u8>> {
        self.part(name)?.start(MAX_JSON)
    }
}

/// A folder in OCI image layout.
fn layout(dir: &Path) -> Result<HashMap<String, Part>> {
    let mut parts = HashMap::new();
    let blobs = dir.join("blobs/sha256");
    let entries = std::fs::read_dir(&blobs).map_err(|e| source_file(&blobs, e))?;
    let names = entries.map(|e| Ok(format!("blobs/sha256/{}", e.at(&blobs)?.file_name().to_string_lossy())));
    for name in names.chain(["index.json"].map(|n| Ok(n.to_owned()))) {
        let name = name?;
        let path = dir.join(&name);
        if let Ok(meta) = path.metadata() {
            parts.insert(name, Part { path, offset: 0, size: meta.len() });
        }
    }
    Ok(parts)
}

fn archive(path: &Path) -> Result<HashMap<String, Part>> {
    let file = File::open(path).map_err(|e| source_file(path, e))?;
    let len = file.metadata().at(path)?.len();
    let bad = |e: std::io::Error| {
        let e = Code::Source.err(format!(
            "{}: not an image archive: {}",
            path.display(),
            e.to_string().escape_default()
        ));
        e.cure("expected a tar as `docker save` or `skopeo copy … oci-archive:` writes it, not compressed")
    };
    let (mut parts, mut links) = (HashMap::new(), Vec::new());
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries_with_seek().map_err(bad)? {
        let entry = entry.map_err(bad)?;
        let name = entry.path().map_err(bad)?.to_string_lossy().trim_start_matches("./").to_owned();
        match entry.header().entry_type() {
            tar::EntryType::Regular => {
                let (offset, size) = (entry.raw_file_position(), entry.size());
                if offset.checked_add(size).is_none_or(|end| end > len) {
                    return Err(bad(ErrorKind::UnexpectedEof.into()));
                }
                parts.insert(name, Part { path: path.to_owned(), offset, size });
            }
            // docker save names a layer that two images share by a link.
            tar::EntryType::Symlink | tar::EntryType::Link => {
                let to = entry.link_name().map_err(bad)?.unwrap_or_default().to_string_lossy().into_owned();
                links.push((name, to));
            }
            _ => {}
        }
    }
    for (name, to) in links {
        if let Some(part) = parts.get(to.trim_start_matches("../")).cloned() {
            parts.insert(name, part);
        }
    }
    Ok(parts)
}

pub(super) fn damaged(what: impl Into<String>) -> Error {
    Code::Source.err(what).cure("save the image again (docker save, skopeo copy) and check its source")
}

#[derive(Deserialize)]
pub(super) struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub media_type: String,
    pub digest: Digest,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    annotations: HashMap<String, String>,
    pub platform: Option<Platform>,
    #[serde(default)]
    urls: Vec<String>,
}

#[derive(Deserialize)]
pub(super) struct Platform {
    pub architecture: String,
    pub os: String,
    pub variant: Option<String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct OciManifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// An image of which every byte is kept.
pub(super) struct OciImage {
    /// Digest and media type of its manifest.
    digest: Digest,
    media_type: String,
    /// The index that the manifest is out of.
    index: Option<Digest>,
    manifest: OciManifest,
}

impl OciImage {
    pub fn parse(digest: Digest, media_type: String, index: Option<Digest>, bytes: &[u8]) -> Result<Self> {
        let manifest: OciManifest =
            serde_json::from_slice(bytes).or_code(Code::Source, "the image manifest")?;
        // Foreign layers of Docker, non-distributable ones of OCI.
        let elsewhere =
            |l: &&Descriptor| ["nondistributable", "foreign"].iter().any(|w| l.media_type.contains(w));
        if let Some(layer) = manifest.layers.iter().find(elsewhere) {
            let urls = layer.urls.join(", ").escape_default().to_string();
            return Err(Code::Source
                .err(format!(
                    "layer {} is non-distributable: its bytes are not with the image ({urls})",
                    layer.digest
                ))
                .cure("build the image on a base whose layers may be passed on"));
        }
        Ok(Self { digest, media_type, index, manifest })
    }

    pub fn config(&self) -> &Digest {
        &self.manifest.config.digest
    }

    /// Config and layers with their sizes, each once.
    pub fn blobs(&self) -> BTreeMap<&Digest, u64> {
        self.manifest.layers.iter().chain([&self.manifest.config]).map(|d| (&d.digest, d.size)).collect()
    }

    /// Enters it into the lock; `kept` says where each of its blobs is, the manifest among them.
    pub fn enter(
        self,
        source: &ImageSource,
        kept: &HashMap<Digest, (u64, PathBuf)>,
        blobs: &mut Blobs,
    ) -> Image {
        let Self { digest, media_type, index, manifest } = self;
        let layers: Vec<Digest> = manifest.layers.into_iter().map(|l| l.digest).collect();
        let config = manifest.config.digest;
        let all = [(&digest, Role::ImageManifest), (&config, Role::ImageConfig)];
        for (digest, role) in all.into_iter().chain(layers.iter().map(|l| (l, Role::ImageLayer))) {
            let (size, path) = kept[digest].clone();
            blobs.add(digest.clone(), size, role, path);
        }
        let unpacked = layers.iter().map(|l| 3 * kept[l].0).sum();
        Image {
            reference: source.reference.clone(),
            media_type,
            manifest: digest,
            config,
            layers,
            index,
            unpacked,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

/// Of an image's config, what its layers are when plain.
#[derive(Deserialize)]
struct Ids {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// A layer as it goes into the bundle.
struct Layer {
    digest: Digest,
    size: u64,
    path: PathBuf,
    media_type: &'static str,
    unpacked: u64,
}

struct Resolve<'a> {
    source: &'a ImageSource,
    arch: &'a str,
    files: Files,
    cache: &'a Cache,
    blobs: &'a mut Blobs,
    ui: &'a Ui,
}

impl Resolve<'_> {
    fn run(mut self) -> Result<Image> {
        // Docker 25 and later write both; its OCI side may hold plain layers, so its own list is used.
        if self.files.parts.contains_key("manifest.json") { self.saved() } else { self.oci() }
    }

    /// A docker save archive becomes an OCI image manifest over gzipped layers.
    fn saved(&mut self) -> Result<Image> {
        let list: Vec<Saved> = serde_json::from_slice(&self.files.json("manifest.json")?)
            .or_code(Code::Source, "manifest.json of the archive")?;
        let [saved] = list.as_slice() else {
            return Err(damaged(format!("the archive holds {} images, expected one", list.len())));
        };
        let config = self.files.json(&saved.config)?;
        check_platform(&config, self.arch)?;
        let ids: Ids = serde_json::from_slice(&config).or_code(Code::Source, &saved.config)?;
        let ids = ids.rootfs.diff_ids;
        if ids.len() != saved.layers.len() {
            let (named, there) = (ids.len(), saved.layers.len());
            return Err(damaged(format!("the image's config names {named} layers, the archive has {there}")));
        }
        let layers: Vec<_> = saved.layers.iter().zip(&ids).collect();
        let pool = gzip::Pool::new();
        let layers = try_each(&layers, |(name, id)| self.layer(name, id, &pool))?;
        let (config_digest, config_size, config_path) = self.cache.put(&config)?;
        let list: Vec<Value> = layers
            .iter()
            .map(|l| json!({ "mediaType": l.media_type, "digest": l.digest, "size": l.size }))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": { "mediaType": OCI_CONFIG, "digest": config_digest, "size": config_size },
            "layers": list,
        });
        let bytes = serde_json::to_vec(&manifest).expect("a manifest is plain data");
        let (manifest_digest, size, path) = self.cache.put(&bytes)?;
        self.blobs.add(config_digest.clone(), config_size, Role::ImageConfig, config_path);
        self.blobs.add(manifest_digest.clone(), size, Role::ImageManifest, path);
        let unpacked = layers.iter().map(|l| l.unpacked).sum();
        let mut digests = Vec::new();
        for Layer { digest, size, path, .. } in layers {
            digests.push(digest.clone());
            self.blobs.add(digest, size, Role::ImageLayer, path);
        }
        Ok(Image {
            reference: self.source.reference.clone(),
            media_type: OCI_MANIFEST.into(),
            manifest: manifest_digest,
            config: config_digest,
            layers: digests,
            index: None,
            unpacked,
        })
    }

    /// One layer of a docker save archive: kept when compressed, else gzipped (once, see the cache). `id` is the digest
    /// that it has plain, as the image's config says.
    fn layer(&self, name: &str, id: &Digest, pool: &gzip::Pool) -> Result<Layer> {
        let part = self.files.part(name)?;
        let kept = match part.start(4)?.as_slice() {
            [0x1f, 0x8b, ..] => Some(OCI_LAYER_GZIP),
            [0x28, 0xb5, 0x2f, 0xfd] => Some(OCI_LAYER_ZSTD),
            _ => None,
        };
        if let Some(media_type) = kept {
            let (temp, digest, size) = self.cache.copy(part.open()?)?;
            let path = self.cache.keep(temp, &digest)?;
            return Ok(Layer { digest, size, path, media_type, unpacked: 3 * size });
        }
        let (media_type, unpacked) = (OCI_LAYER_GZIP, part.size);
        if let Some((digest, size, path)) = self.cache.gzipped(id)? {
            return Ok(Layer { digest, size, path, media_type, unpacked });
        }
        let bar = self.ui.bytes(format!("gzip {}", self.source.reference), part.size);
        let temp = self.cache.temp()?;
        let tmp = temp.path().to_owned();
        let mut gzip = pool.compress(Hashing::new(temp));
        let (found, _) =
            Digest::of_reader(bar.wrap_read(part.open()?), |piece| gzip.write_all(piece)).at(&tmp)?;
        let (temp, digest, size) = gzip.finish().at(&tmp)?.finish();
        bar.finish_and_clear();
        if found != *id {
            return Err(damaged(format!(
                "layer {name} has {found}, the image's config (rootfs.diff_ids) says {id}"
            )));
        }
        let path = self.cache.keep(temp, &digest)?;
        self.cache.note_gzipped(id, &digest)?;
        Ok(Layer { digest, size, path, media_type, unpacked })
    }

    /// An OCI layout keeps every byte.
    fn oci(&mut self) -> Result<Image> {
        let index: Index =
            serde_json::from_slice(&self.files.json("index.json")?).or_code(Code::Source, "index.json")?;
        let (Descriptor { digest, media_type, .. }, index) = self.choose(index)?;
        let media_type = if media_type.is_empty() { OCI_MANIFEST.into() } else { media_type };
        let bytes = self.files.json(&blob_name(&digest))?;
        let image = OciImage::parse(digest.clone(), media_type, index, &bytes)?;
        check_platform(&self.files.json(&blob_name(image.config()))?, self.arch)?;
        let wanted: Vec<Digest> = image.blobs().into_keys().chain([&digest]).cloned().collect();
        let kept = try_each(&wanted, |digest| self.keep(digest))?;
        let kept: HashMap<_, _> = wanted.into_iter().zip(kept).collect();
        Ok(image.enter(self.source, &kept, self.blobs))
    }

    /// Into the cache, unless it is there.
    fn keep(&self, digest: &Digest) -> Result<(u64, PathBuf)> {
        let from = self.files.part(&blob_name(digest))?;
        if let Some((path, size)) = self.cache.get(digest)? {
            return Ok((size, path));
        }
        let (temp, found, size) = self.cache.copy(from.open()?)?;
        if found != *digest {
            return Err(damaged(format!("blob {digest} has other bytes than its name says")));
        }
        Ok((size, self.cache.keep(temp, digest)?))
    }

    /// The manifest for our platform: by platform through nested indexes, by name among several.
    fn choose(&self, index: Index) -> Result<(Descriptor, Option<Digest>)> {
        let name = self.source.reference.to_string();
        let fits = |d: &Descriptor| {
            d.platform.as_ref().is_none_or(|p| p.os == "linux" && p.architecture == self.arch)
        };
        let mut found: Vec<Descriptor> = index.manifests.into_iter().filter(fits).collect();
        if found.len() > 1 {
            found.retain(|d| {
                ["org.opencontainers.image.ref.name", "io.containerd.image.name"].iter().any(|key| {
                    d.annotations.get(*key).is_some_and(|v| *v == name || v.ends_with(&format!("/{name}")))
                })
            });
        }
        let (Some(descriptor), true) = (found.pop(), found.is_empty()) else {
            return Err(damaged(format!("index.json names no single image {name} for linux/{}", self.arch)));
        };
        if descriptor.media_type.contains("index") || descriptor.media_type.contains("manifest.list") {
            let nested = self.files.json(&blob_name(&descriptor.digest))?;
            let nested = serde_json::from_slice(&nested).or_code(Code::Source, "the nested index")?;
            return Ok((self.choose(nested)?.0, Some(descriptor.digest)));
        }
        Ok((descriptor, None))
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// By an image's config.
pub(super) fn check_platform(config: &[u8], target: &str) -> Result<()> {
    let config: Value = serde_json::from_slice(config).or_code(Code::Source, "the image config")?;
    let text = |key: &str| config[key].as_str().unwrap_or_default();
    let (os, arch) = (text("os"), text("architecture"));
    if os == "linux" && arch == target {
        return Ok(());
    }
    Err(Code::Source
        .err(format!("the image is for {os}/{arch}, the bundle's target needs linux/{target}"))
        .cure("pull or build the image for that platform"))
}
