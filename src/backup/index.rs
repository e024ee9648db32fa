//! What a backup says of itself; its first member. It names every other member with size and SHA-256, so
//! nothing in the file counts that is not named here, and no name leads anywhere but where zd keeps its own.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::bundle::lock::{Image, MAX_BLOB};
use crate::bundle::manifest::Engine;
use crate::error::{Code, Result};
use crate::host::config::HostConfig;
use crate::ids::{Digest, Name, Slot};
use crate::service::state::State;

/// Name of the index in the tar.
pub const INDEX: &str = "zd-backup.json";
/// The host's signature over the index, right behind it.
pub const SIGNATURE: &str = "zd-backup.json.minisig";
/// 1 is of backups that were not signed.
pub const SCHEMA: u32 = 2;
/// Member that holds the lock of the installed bundle.
pub const LOCK: &str = "zd-lock.json";
/// Largest index that is read, and all files but blobs together.
pub const MAX_INDEX: u64 = 16 << 20;
pub const MAX_FILES: u64 = 1 << 30;

/// Where files of a backup may come from and go to, without the leading slash.
const FOLDERS: [&str; 5] =
    ["etc/zd", "var/lib/zd/services", "var/lib/zd/reports", "var/lib/zd/receipts", "var/log/zd"];
const FILES: [&str; 4] = [
    "var/lib/zd/audit.head",
    "var/lib/zd/consul/node-id",
    "var/lib/zd/nomad/client/client-id",
    "var/lib/zd/nomad/client/secret-id",
];
/// Members that are no files of the host.
pub const CONSUL_SNAPSHOT: &str = "consul.snap";
pub const NOMAD_SNAPSHOT: &str = "nomad.snap";
const OTHERS: [&str; 3] = [LOCK, CONSUL_SNAPSHOT, NOMAD_SNAPSHOT];

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Index {
    pub schema: u32,
    pub at: Timestamp,
    pub by: String,
    /// Version of the zd that wrote it.
    pub zd: String,
    pub hostname: String,
    pub host: HostConfig,
    /// Name and version of the installed bundle.
    pub bundle: String,
    pub engine: Engine,
    pub services: Vec<Service>,
    /// In the order of the members.
    pub files: Vec<Entry>,
    /// Images that a slot holds, or a rollback would go to, and the bundle does not carry.
    pub images: Vec<Image>,
    /// Their blobs that the bundle lacks, in the order of the members.
    pub blobs: Vec<Blob>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    pub name: Name,
    pub active: Slot,
    pub state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// As on the host, without the leading slash.
    pub path: String,
    pub digest: Digest,
    pub size: u64,
    pub mode: u32,
    /// None is root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
}

impl Index {
    /// Parses and checks that it hangs together.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bad =
            |what: String| Code::Bundle.err(what).cure("take another backup: this one was not made by zd");
        #[derive(Deserialize)]
        struct Form {
            schema: u32,
        }
        let unreadable = |e| bad(format!("{INDEX} cannot be read: {e}"));
        // First: a newer schema has keys that this zd does not know.
        let Form { schema } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if !(1..=SCHEMA).contains(&schema) {
            return Err(Code::Bundle
                .err(format!("the backup has schema {schema}, this zd reads up to {SCHEMA}"))
                .cure("use the zd of the bundle that was installed when it was made, or a newer one"));
        }
        let index: Index = serde_json::from_slice(bytes).map_err(unreadable)?;
        let (mut total, mut paths) = (0u64, BTreeSet::new());
        for entry in &index.files {
            if !is_allowed(&entry.path) {
                return Err(bad(format!("{:?} is no place that a backup of zd has files of", entry.path)));
            }
            if !paths.insert(&entry.path) {
                return Err(bad(format!("{} is listed twice", entry.path)));
            }
            if entry.mode & !0o777 != 0 {
                return Err(bad(format!("{}: mode {:o} is none of a plain file", entry.path, entry.mode)));
            }
            total = total.saturating_add(entry.size);
        }
        if total > MAX_FILES || index.blobs.iter().any(|b| b.size > MAX_BLOB) {
            return Err(bad("the sizes in it cannot be right".into()));
        }
        Ok(index)
    }

    /// What the signature says beside the index, so that nothing else that the host signs passes for one.
    pub fn signed_as(&self) -> String {
        format!("backup of {}, taken {}", self.host.node(), self.at)
    }

    pub fn entry(&self, path: &str) -> Option<&Entry> {
        self.files.iter().find(|e| e.path == path)
    }

    /// Files that lie in a folder of the host.
    pub fn beneath(&self, folder: &Path) -> impl Iterator<Item = &Entry> {
        self.files.iter().filter(move |e| e.place().parent() == Some(folder))
    }

    pub fn service(&self, name: &Name) -> Option<&Service> {
        self.services.iter().find(|s| s.name == *name)
    }
}

impl Entry {
    /// Where it is on a host.
    pub fn place(&self) -> PathBuf {
        Path::new("/").join(&self.path)
    }
}

/// A place of zd's own, written in the one plain way.
fn is_allowed(path: &str) -> bool {
    let plain = Path::new(path);
    let normal = plain.components().all(|c| matches!(c, Component::Normal(_)));
    let again: Vec<_> = plain.components().map(|c| c.as_os_str().to_string_lossy()).collect();
    let control = path.chars().any(char::is_control);
    normal
        && !control
        && again.join("/") == path
        && (FILES.contains(&path)
            || OTHERS.contains(&path)
            || FOLDERS.iter().any(|f| path.strip_prefix(f).is_some_and(|rest| rest.starts_with('/'))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_of_an_earlier_version_is_read() {
        let bytes = include_bytes!("../../tests/fixtures/backup/index.json");
        let index = Index::parse(bytes).unwrap();
        let hello = index.service(&"hello".parse().unwrap()).unwrap();
        assert_eq!((index.files.len(), hello.state.instances), (3, Some(3)));
        assert_eq!(index.entry("etc/zd/registry/tls.key").unwrap().owner.as_deref(), Some("zd-registry"));
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        for (from, to, says) in [
            ("\"schema\": 1,\n  \"at\"", "\"schema\": 3,\n  \"at\"", "schema 3"),
            ("etc/zd/registry/tls.key", "etc/shadow", "is no place"),
            ("consul.snap", "zd-lock.json", "listed twice"),
            ("\"mode\": 384,\n      \"owner\"", "\"mode\": 2541,\n      \"owner\"", "none of a plain file"),
            ("\"size\": 9021", "\"size\": 18446744073709551615", "sizes in it cannot be right"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            let e = Index::parse(changed.as_bytes()).unwrap_err();
            assert!(e.what.contains(says), "{}", e.what);
        }
    }

    #[test]
    fn names_lead_nowhere_else() {
        for good in
            ["etc/zd/tls/ca.key", "var/lib/zd/services/hello/state.json", "zd-lock.json", "consul.snap"]
        {
            assert!(is_allowed(good), "{good}");
        }
        for bad in [
            "/etc/zd/x",
            "etc/zd/../passwd",
            "etc/zd/./x",
            "etc/zd//x",
            "etc/zd/x/",
            "etc/zd",
            "etc/zdx/y",
            "etc/passwd",
            "var/lib/zd/registry/x",
            "../etc/zd/x",
            "etc/zd/a\nb",
            "",
        ] {
            assert!(!is_allowed(bad), "{bad:?}");
        }
    }
}
