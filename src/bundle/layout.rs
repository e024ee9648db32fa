//! Where everything lies in a bundle. The layout follows from the lock alone, byte for byte, so a
//! reader never believes a tar header: it compares each with the only one that can stand there.

use serde_json::json;

use super::lock::Lock;
use crate::error::{Code, Result};

pub const BLOCK: u64 = 512;
/// Two zero blocks end an archive (POSIX.1-1988 ustar).
pub const END: u64 = 2 * BLOCK;
pub const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// The four members before the blobs, in order.
pub const HEAD: [&str; 4] = ["oci-layout", "index.json", "zd-lock.json", "zd-lock.json.minisig"];
/// Largest signature file that is read; a real one has some 300 bytes.
pub const MAX_SIGNATURE: u64 = 4096;

/// The one tar header that a member of this name and size has.
pub fn header(name: &str, size: u64) -> [u8; 512] {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).expect("member names are short and relative");
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    *header.as_bytes()
}

pub fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK) - size
}

pub fn blob_name(hex: &str) -> String {
    format!("blobs/sha256/{hex}")
}

/// The OCI image index of a lock's images (OCI image spec 1.1, "Image Index").
pub fn index_json(lock: &Lock) -> Vec<u8> {
    let manifests: Vec<_> = lock
        .images
        .iter()
        .map(|image| {
            json!({
                "mediaType": image.media_type,
                "digest": image.manifest,
                "size": lock.size_of(&image.manifest),
                "annotations": {
                    "org.opencontainers.image.ref.name": image.reference,
                    "io.containerd.image.name": image.reference,
                }
            })
        })
        .collect();
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    serde_json::to_vec_pretty(&index).expect("an index is plain data")
}

/// Says what a header that is not the expected one is instead: the most telling thing first.
pub fn explain(found: &[u8; 512], expected: &str, known: impl Fn(&str) -> bool) -> crate::error::Error {
    let bad = |what: String| {
        Code::Bundle.err(what).cure("do not use this bundle; copy it again from its source, then `zd verify`")
    };
    let header = tar::Header::from_byte_slice(found);
    if found.iter().all(|b| *b == 0) {
        return bad(format!("the bundle ends early: member {expected} is missing"));
    }
    let name = String::from_utf8_lossy(&header.path_bytes()).into_owned();
    let sum: u32 =
        found.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
    if header.cksum().ok() != Some(sum) {
        return bad(format!("the header of member {expected} is damaged"));
    }
    let kind = header.entry_type();
    if name.starts_with('/') || name.split('/').any(|part| part == "..") {
        bad(format!("member {name:?} points outside the bundle"))
    } else if !kind.is_file() {
        bad(format!("member {name:?} is a {kind:?}; a bundle holds regular files only"))
    } else if name == expected {
        bad(format!("the header of member {expected} is not the one that zd writes (size, owner or time)"))
    } else if known(&name) {
        bad(format!("member {name} stands where {expected} belongs: one is missing, twice there, or moved"))
    } else {
        bad(format!("member {name:?} is not in the lock"))
    }
}

/// A name and size per member after the head, in order.
pub fn blob_members(lock: &Lock) -> impl Iterator<Item = (String, u64)> + '_ {
    lock.blobs.iter().map(|b| (blob_name(b.digest.hex()), b.size))
}

/// Bytes of the whole bundle.
pub fn total(head_sizes: [u64; 4], lock: &Lock) -> Result<u64> {
    let sizes = head_sizes.into_iter().chain(lock.blobs.iter().map(|b| b.size));
    let sum = sizes.into_iter().try_fold(END, |sum: u64, size| sum.checked_add(BLOCK + size + padding(size)));
    sum.ok_or_else(|| Code::Bundle.err("the sizes in the lock cannot be right"))
}
