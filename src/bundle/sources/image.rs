//! Images: from the Docker daemon, from a `docker save` tar, from an OCI layout (tar or folder).
//!
//! Every form is a set of named files with either an `index.json` (OCI image layout) or a
//! `manifest.json` (docker save). Files are spooled once, then read by name. Layers that come
//! compressed keep their bytes and thereby their digest; plain ones are gzipped.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use bollard::Docker;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Blobs;
use super::cache::{Cache, hash, hash_file};
use crate::bundle::gzip;
use crate::bundle::lock::{Image, Role};
use crate::bundle::manifest::ImageSource;
use crate::error::{At, Code, Error, OrCode, Result, source_file};
use crate::ids::Digest;
use crate::ui::Ui;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
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
    let files = match source {
        ImageSource { docker: Some(name), .. } => from_daemon(name, cache, ui).await?,
        ImageSource { oci: Some(path), .. } | ImageSource { docker_archive: Some(path), .. } => {
            Files::open(path, cache).map_err(named)?
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
    Files::open(temp.path(), cache)
}

/// Files by name, wherever they were.
struct Files {
    paths: HashMap<String, PathBuf>,
    /// Keeps spooled files until they are in the cache.
    _spool: Option<TempDir>,
}

impl Files {
    fn open(path: &Path, cache: &Cache) -> Result<Self> {
        if path.is_dir() {
            let mut paths = HashMap::new();
            for name in ["index.json", "oci-layout"] {
                paths.insert(name.to_owned(), path.join(name));
            }
            let blobs = path.join("blobs/sha256");
            for entry in std::fs::read_dir(&blobs).map_err(|e| source_file(&blobs, e))? {
                let name = entry.at(&blobs)?.file_name().to_string_lossy().into_owned();
                paths.insert(format!("blobs/sha256/{name}"), blobs.join(name));
            }
            return Ok(Self { paths, _spool: None });
        }
        let file = File::open(path).map_err(|e| source_file(path, e))?;
        let spool_root = cache.dir("tmp")?;
        let spool = TempDir::new_in(&spool_root).at(&spool_root)?;
        let mut paths = HashMap::new();
        let mut links = Vec::new();
        let bad = |e: std::io::Error| {
            let e = Code::Source.err(format!(
                "{}: not an image archive: {}",
                path.display(),
                e.to_string().escape_default()
            ));
            e.cure(
                "expected a tar as `docker save` or `skopeo copy … oci-archive:` writes it, not compressed",
            )
        };
        let mut archive = tar::Archive::new(file);
        for entry in archive.entries().map_err(bad)? {
            let mut entry = entry.map_err(bad)?;
            let name = entry.path().map_err(bad)?.to_string_lossy().trim_start_matches("./").to_owned();
            match entry.header().entry_type() {
                // The name in the archive is only a key; the file's own name is a number.
                tar::EntryType::Regular => {
                    let to = spool.path().join(paths.len().to_string());
                    let mut out = File::create(&to).at(&to)?;
                    std::io::copy(&mut entry, &mut out).at(&to)?;
                    paths.insert(name, to);
                }
                // docker save names a layer that two images share by a link.
                tar::EntryType::Symlink | tar::EntryType::Link => {
                    let to =
                        entry.link_name().map_err(bad)?.unwrap_or_default().to_string_lossy().into_owned();
                    links.push((name, to));
                }
                _ => {}
            }
        }
        for (name, to) in links {
            let to = to.trim_start_matches("../");
            if let Some(file) = paths.get(to).cloned() {
                paths.insert(name, file);
            }
        }
        Ok(Self { paths, _spool: Some(spool) })
    }

    fn path(&self, name: &str) -> Result<&PathBuf> {
        self.paths.get(name).ok_or_else(|| damaged(format!("{name} is missing in the archive")))
    }

    fn json(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name)?;
        let mut bytes = Vec::new();
        File::open(path).at(path)?.take(MAX_JSON).read_to_end(&mut bytes).at(path)?;
        Ok(bytes)
    }
}

fn damaged(what: impl Into<String>) -> Error {
    Code::Source.err(what).cure("save the image again (docker save, skopeo copy) and check its source")
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    annotations: HashMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
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

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
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
        if self.files.paths.contains_key("manifest.json") { self.saved() } else { self.oci() }
    }

    /// A docker save archive becomes an OCI image manifest over gzipped layers.
    fn saved(&mut self) -> Result<Image> {
        let list: Vec<Saved> = serde_json::from_slice(&self.files.json("manifest.json")?)
            .or_code(Code::Source, "manifest.json of the archive")?;
        let [saved] = list.as_slice() else {
            return Err(damaged(format!("the archive holds {} images, expected one", list.len())));
        };
        let config = self.files.json(&saved.config)?;
        let (os, arch) = platform(&config)?;
        self.check_platform(&os, &arch)?;
        let mut layers = Vec::new();
        let mut unpacked = 0;
        for name in &saved.layers {
            let path = self.files.path(name)?.clone();
            let (digest, size, path, media_type, plain) = self.layer(&path)?;
            unpacked += plain;
            layers.push(json!({ "mediaType": media_type, "digest": digest, "size": size }));
            self.blobs.add(digest, size, Role::ImageLayer, path);
        }
        let (config_digest, config_size, config_path) = self.cache.put(&config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": { "mediaType": OCI_CONFIG, "digest": config_digest, "size": config_size },
            "layers": layers,
        });
        let bytes = serde_json::to_vec(&manifest).expect("a manifest is plain data");
        let (manifest_digest, size, path) = self.cache.put(&bytes)?;
        self.blobs.add(config_digest.clone(), config_size, Role::ImageConfig, config_path);
        self.blobs.add(manifest_digest.clone(), size, Role::ImageManifest, path);
        let layers = layers.iter().filter_map(|l| l["digest"].as_str()?.parse().ok()).collect();
        Ok(Image {
            reference: self.source.reference.clone(),
            media_type: OCI_MANIFEST.into(),
            manifest: manifest_digest,
            config: config_digest,
            layers,
            unpacked,
        })
    }

    /// One layer of a docker save archive: kept when compressed, else gzipped (once, see the cache).
    fn layer(&self, path: &Path) -> Result<(Digest, u64, PathBuf, &'static str, u64)> {
        let mut magic = [0u8; 4];
        let n = File::open(path).at(path)?.read(&mut magic).at(path)?;
        let kept = match &magic[..n] {
            [0x1f, 0x8b, ..] => Some(OCI_LAYER_GZIP),
            [0x28, 0xb5, 0x2f, 0xfd] => Some(OCI_LAYER_ZSTD),
            _ => None,
        };
        let (plain, plain_size) = hash_file(path)?;
        if let Some(media_type) = kept {
            let (digest, size, path) = self.keep_copy(path)?;
            return Ok((digest, size, path, media_type, 3 * plain_size));
        }
        if let Some((digest, size, path)) = self.cache.gzipped(&plain)? {
            return Ok((digest, size, path, OCI_LAYER_GZIP, plain_size));
        }
        let bar = self.ui.bytes(format!("gzip {}", self.source.reference), plain_size);
        let temp = self.cache.temp()?;
        let out = temp.as_file().try_clone().at(temp.path())?;
        gzip::compress(bar.wrap_read(File::open(path).at(path)?), std::io::BufWriter::new(out))
            .at(temp.path())?;
        bar.finish_and_clear();
        let (digest, size, path) = self.cache.keep(temp)?;
        self.cache.note_gzipped(&plain, &digest)?;
        Ok((digest, size, path, OCI_LAYER_GZIP, plain_size))
    }

    fn keep_copy(&self, path: &Path) -> Result<(Digest, u64, PathBuf)> {
        let mut temp = self.cache.temp()?;
        std::io::copy(&mut File::open(path).at(path)?, &mut temp).at(path)?;
        self.cache.keep(temp)
    }

    /// An OCI layout keeps every byte.
    fn oci(&mut self) -> Result<Image> {
        let index: Index =
            serde_json::from_slice(&self.files.json("index.json")?).or_code(Code::Source, "index.json")?;
        let descriptor = self.choose(index)?;
        let bytes = self.files.json(&blob_name(&descriptor.digest))?;
        let manifest: OciManifest =
            serde_json::from_slice(&bytes).or_code(Code::Source, "the image manifest")?;
        let config = self.files.json(&blob_name(&manifest.config.digest))?;
        let (os, arch) = platform(&config)?;
        self.check_platform(&os, &arch)?;
        let mut unpacked = 0;
        let all = [(&descriptor.digest, Role::ImageManifest), (&manifest.config.digest, Role::ImageConfig)];
        let layers = manifest.layers.iter().map(|l| (&l.digest, Role::ImageLayer));
        for (digest, role) in all.into_iter().chain(layers) {
            let from = self.files.path(&blob_name(digest))?;
            let (path, size) = match self.cache.get(digest)? {
                Some(found) => found,
                None => {
                    let (found, _) = hash(File::open(from).at(from)?).at(from)?;
                    if found != *digest {
                        return Err(damaged(format!("blob {digest} has other bytes than its name says")));
                    }
                    let (_, size, path) = self.keep_copy(from)?;
                    (path, size)
                }
            };
            if role == Role::ImageLayer {
                unpacked += 3 * size;
            }
            self.blobs.add(digest.clone(), size, role, path);
        }
        Ok(Image {
            reference: self.source.reference.clone(),
            media_type: if descriptor.media_type.is_empty() {
                OCI_MANIFEST.into()
            } else {
                descriptor.media_type
            },
            manifest: descriptor.digest,
            config: manifest.config.digest,
            layers: manifest.layers.into_iter().map(|l| l.digest).collect(),
            unpacked,
        })
    }

    /// The manifest for our platform: by platform through nested indexes, by name among several.
    fn choose(&self, index: Index) -> Result<Descriptor> {
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
            return self.choose(serde_json::from_slice(&nested).or_code(Code::Source, "the nested index")?);
        }
        Ok(descriptor)
    }

    fn check_platform(&self, os: &str, arch: &str) -> Result<()> {
        if os == "linux" && arch == self.arch {
            return Ok(());
        }
        Err(Code::Source
            .err(format!("the image is for {os}/{arch}, the bundle's target needs linux/{}", self.arch))
            .cure("pull or build the image for that platform"))
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn platform(config: &[u8]) -> Result<(String, String)> {
    let config: Value = serde_json::from_slice(config).or_code(Code::Source, "the image config")?;
    let text = |key: &str| config[key].as_str().unwrap_or_default().to_owned();
    Ok((text("os"), text("architecture")))
}
