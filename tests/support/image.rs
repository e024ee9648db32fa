//! Small images as `docker save` and OCI tools write them.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::{noise, sha256};

/// A plain layer: a tar with one file of `size` bytes.
pub fn layer(seed: u64, size: usize) -> Vec<u8> {
    tar_of(&[("data.bin", &noise(seed, size))])
}

pub fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    // Not the level zd uses: bytes made again would differ.
    let mut out = GzEncoder::new(Vec::new(), Compression::new(1));
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

pub fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    MultiGzDecoder::new(bytes).read_to_end(&mut out).expect("gzip");
    out
}

fn plain(layer: &[u8]) -> Vec<u8> {
    if layer.starts_with(&[0x1f, 0x8b]) { gunzip(layer) } else { layer.to_owned() }
}

pub fn config(arch: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|l| format!("sha256:{}", sha256(&plain(l)))).collect();
    let config = json!({
        "architecture": arch, "os": "linux", "config": { "Cmd": ["/data.bin"] },
        "rootfs": { "type": "layers", "diff_ids": ids },
    });
    serde_json::to_vec(&config).unwrap()
}

/// As `docker save` of the classic form: a config, a folder per layer, manifest.json last.
pub fn docker_archive(to: &Path, arch: &str, layers: &[Vec<u8>]) {
    let config = config(arch, layers);
    let config_name = format!("{}.json", sha256(&config));
    let names: Vec<String> = layers.iter().map(|l| format!("{}/layer.tar", sha256(l))).collect();
    let manifest = json!([{ "Config": config_name, "RepoTags": ["any:thing"], "Layers": names }]);
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let mut files = vec![(config_name.as_str(), config.as_slice())];
    files.extend(names.iter().map(String::as_str).zip(layers.iter().map(Vec::as_slice)));
    files.push(("manifest.json", &manifest));
    fs::write(to, tar_of(&files)).unwrap();
}

/// A folder in OCI image layout.
pub fn oci_layout(dir: &Path, reference: &str, arch: &str, layers: &[Vec<u8>]) {
    write_layout(dir, reference, oci_image(dir, arch, layers));
}

/// The same of an index with one image for each platform.
pub fn oci_index(dir: &Path, reference: &str, platforms: &[(&str, Vec<Vec<u8>>)]) {
    let images: Vec<Value> = platforms
        .iter()
        .map(|(arch, layers)| {
            let mut entry = oci_image(dir, arch, layers);
            entry["platform"] = json!({ "os": "linux", "architecture": arch });
            entry
        })
        .collect();
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": images,
    });
    write_layout(dir, reference, oci_blob(dir, "index.v1+json", &serde_json::to_vec(&index).unwrap()));
}

/// Writes a blob into a layout and returns its descriptor.
pub fn oci_blob(dir: &Path, kind: &str, bytes: &[u8]) -> Value {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(sha256(bytes)), bytes).unwrap();
    json!({
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": format!("sha256:{}", sha256(bytes)), "size": bytes.len(),
    })
}

fn oci_image(dir: &Path, arch: &str, layers: &[Vec<u8>]) -> Value {
    let layer_kind =
        |l: &[u8]| if l.starts_with(&[0x1f, 0x8b]) { "layer.v1.tar+gzip" } else { "layer.v1.tar" };
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": oci_blob(dir, "config.v1+json", &config(arch, layers)),
        "layers": layers.iter().map(|l| oci_blob(dir, layer_kind(l), l)).collect::<Vec<_>>(),
    });
    oci_blob(dir, "manifest.v1+json", &serde_json::to_vec(&manifest).unwrap())
}

fn write_layout(dir: &Path, reference: &str, mut entry: Value) {
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": reference });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// The same layout as one tar.
pub fn oci_archive(dir: &Path, to: &Path) {
    let mut tar = tar::Builder::new(fs::File::create(to).unwrap());
    tar.append_dir_all(".", dir).unwrap();
    tar.finish().unwrap();
}
