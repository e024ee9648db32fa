//! Takes a bundle apart and puts it together otherwise, as somebody who means harm would.

use std::fs;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tar::EntryType;

pub const LOCK: usize = 2;
pub const SIG: usize = 3;
/// The first blob's place.
pub const BLOBS: usize = 4;

#[derive(Clone, Debug)]
pub struct Member {
    pub name: String,
    pub kind: EntryType,
    pub body: Vec<u8>,
}

impl Member {
    pub fn new(name: &str, kind: EntryType, body: &[u8]) -> Self {
        Self { name: name.into(), kind, body: body.into() }
    }

    pub fn file(name: &str, body: &[u8]) -> Self {
        Self::new(name, EntryType::Regular, body)
    }

    /// As zd writes it, but with any name and kind.
    fn header(&self) -> [u8; 512] {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..self.name.len()].copy_from_slice(self.name.as_bytes());
        header.set_size(self.body.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(self.kind);
        if self.kind.is_symlink() || self.kind.is_hard_link() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        *header.as_bytes()
    }
}

fn padding(len: usize) -> usize {
    len.next_multiple_of(512) - len
}

#[derive(Clone)]
pub struct Parts(pub Vec<Member>);

impl Parts {
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let mut archive = tar::Archive::new(Cursor::new(&bytes));
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut body = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut body).unwrap();
            Member::file(entry.path().unwrap().to_str().unwrap(), &body)
        });
        let parts = Self(entries.collect());
        assert_eq!(parts.bytes(), bytes, "a bundle is nothing but its members");
        parts
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for member in &self.0 {
            out.extend(member.header());
            out.extend(&member.body);
            out.resize(out.len() + padding(member.body.len()), 0);
        }
        out.resize(out.len() + 1024, 0);
        out
    }

    /// Header, body and padding of each member, and the end: where they lie.
    pub fn regions(&self) -> Vec<(String, Range<usize>)> {
        let mut at = 0;
        let mut out = Vec::new();
        let mut push = |what: String, len: usize| {
            out.push((what, at..at + len));
            at += len;
        };
        for member in &self.0 {
            push(format!("header of {}", member.name), 512);
            push(format!("body of {}", member.name), member.body.len());
            push(format!("padding of {}", member.name), padding(member.body.len()));
        }
        push("end".into(), 1024);
        out.retain(|(_, range)| !range.is_empty());
        out
    }

    pub fn lock(&self) -> Value {
        serde_json::from_slice(&self.0[LOCK].body).unwrap()
    }

    /// Another lock, signed as zd signs: only its own checks are left to refuse it.
    pub fn with_lock(&self, lock: &[u8], secret_key: &Path) -> Self {
        let mut parts = self.clone();
        parts.0[LOCK].body = lock.into();
        parts.0[SIG].body = sign(lock, secret_key).into_bytes();
        parts
    }

    pub fn with_signature(&self, text: &[u8]) -> Self {
        let mut parts = self.clone();
        parts.0[SIG].body = text.into();
        parts
    }

    /// Signatures that somebody without the secret key could put there: what is wrong, and the text.
    pub fn hostile_signatures(&self, key: &Path, other_key: &Path) -> Vec<(&'static str, Vec<u8>)> {
        let good = String::from_utf8(self.0[SIG].body.clone()).unwrap();
        let lines: Vec<&str> = good.lines().collect();
        let signed_by = |lock: &[u8], key: &Path| self.with_lock(lock, key).0[SIG].body.clone();
        // The last line signs the first one and the trusted comment.
        let of_comment = BASE64.decode(lines[3]).unwrap();
        let with_last =
            |bytes: &[u8]| [&lines[..3], &[&BASE64.encode(bytes), ""]].concat().join("\n").into_bytes();
        let replaced = |from: &str, to: &str| good.replace(from, to).into_bytes();
        vec![
            ("nothing", vec![]),
            ("not text", vec![0xff; 300]),
            ("empty lines", b"\n\n\n\n".to_vec()),
            ("one letter", vec![b'a'; 4096]),
            ("longer than any", vec![b'a'; 4097]),
            ("by another key", signed_by(&self.0[LOCK].body, other_key)),
            ("of another lock", signed_by(b"{}", key)),
            ("three lines", lines[..3].join("\n").into_bytes()),
            ("a line more", format!("{good}more\n").into_bytes()),
            ("no newline at its end", good.trim_end().into()),
            ("other newlines", replaced("\n", "\r\n")),
            ("comment changed", replaced("signature of", "approved by")),
            ("trusted comment changed", replaced("zd bundle demo-1", "zd bundle demo-2")),
            ("comment's signature empty", with_last(&[])),
            ("comment's signature short", with_last(&of_comment[..40])),
            ("comment's signature long", with_last(&[of_comment.as_slice(), &[0]].concat())),
            ("comment's signature twice as long", with_last(&[of_comment.as_slice(), &[7; 64]].concat())),
        ]
    }
}

/// Values that no working zd writes into a lock: where, what, and what has to be said about it.
pub fn hostile_values() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("/blobs/1/size", json!(u64::MAX), "cannot be right"),
        ("/blobs/1/size", json!(1u64 << 63), "cannot be right"),
        ("/blobs/1/size", json!((1u64 << 40) + 1), "cannot be right"),
        ("/blobs/8/size", json!(1u64 << 40), "size, owner or time"),
        ("/blobs/1/size", json!(-1), "cannot be read"),
        ("/blobs/1/size", json!(512.0), "cannot be read"),
        ("/blobs/1/size", json!("512"), "cannot be read"),
        ("/blobs/1/size", json!(1.9e19), "cannot be read"),
        ("/images/0/unpacked", json!(u64::MAX), "cannot be right"),
        ("/blobs/1/role", json!("script"), "unknown variant"),
        ("/blobs/1/digest", json!(format!("sha256:{}", "AB".repeat(32))), "is not a digest"),
        ("/blobs/1/digest", json!("sha256:../../../../etc/passwd"), "is not a digest"),
        ("/blobs/1/digest", json!(format!("sha512:{}", "ab".repeat(64))), "is not a digest"),
        ("/images/0/layers/0", json!(format!("sha256:{}", "00".repeat(32))), "not listed among the blobs"),
        ("/images/0/ref", json!("../etc:v1"), "is not a name"),
        ("/images/0/ref", json!("Hello:v1"), "is not a name"),
        ("/images/0/ref", json!("hello"), "is not name:version"),
        ("/images/0/ref", json!("hello:"), "is not a version"),
        ("/images/0/ref", json!("hello:v1/../v2"), "is not a version"),
        ("/images/0/ref", json!("hello:-v1"), "is not a version"),
        ("/files/0/name", json!("../../etc/cron.d/x"), "is not a version"),
        ("/name", json!("a/b"), "is not a name"),
        ("/version", json!(".."), "is not a version"),
        ("/created", json!("yesterday"), "cannot be read"),
        ("/engine", json!("shell"), "unknown variant"),
        ("/schema", json!(2), "schema 2"),
        ("/schema", json!(0), "schema 0"),
        ("/schema", json!(-1), "cannot be read"),
        ("/schema", json!("1"), "cannot be read"),
        ("/files", json!([]), "used by nothing"),
        ("/files", json!(null), "cannot be read"),
    ]
}

fn sign(bytes: &[u8], secret_key: &Path) -> String {
    let text = fs::read_to_string(secret_key).unwrap();
    let boxed = minisign::SecretKeyBox::from_string(&text).unwrap();
    let key = boxed.into_unencrypted_secret_key().unwrap();
    let comment = "signature of a zd bundle's lock";
    let trusted = "zd bundle demo-1 for debian-12-x86_64";
    let signed = minisign::sign(None, &key, Cursor::new(bytes), Some(trusted), Some(comment));
    signed.unwrap().into_string()
}
