//! Takes a bundle apart and puts it together otherwise, as somebody who means harm would.

use std::fs;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use serde_json::Value;
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

    pub fn signature(&self) -> String {
        String::from_utf8(self.0[SIG].body.clone()).unwrap()
    }
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
