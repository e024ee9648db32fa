//! Where blobs come from. Each source puts checked files into the cache and names them by digest.

pub mod apt;
mod archive;
pub mod cache;
mod credentials;
pub mod hashicorp;
pub mod image;
pub mod openpgp;
pub mod place;
mod registry;
pub mod url;

use std::collections::HashMap;
use std::path::PathBuf;

use super::lock::{Blob, Role, sort_blobs};
use crate::ids::Digest;

/// Everything resolved so far: each blob once, with the file that holds it.
#[derive(Default)]
pub struct Blobs {
    pub list: Vec<Blob>,
    pub paths: HashMap<Digest, PathBuf>,
}

impl Blobs {
    pub fn add(&mut self, digest: Digest, size: u64, role: Role, path: PathBuf) {
        if !self.paths.contains_key(&digest) {
            self.list.push(Blob { digest: digest.clone(), size, role });
            self.paths.insert(digest, path);
        }
    }

    pub fn extend(&mut self, more: Blobs) {
        let Blobs { list, mut paths } = more;
        for Blob { digest, size, role } in list {
            if let Some(path) = paths.remove(&digest) {
                self.add(digest, size, role, path);
            }
        }
    }

    pub fn into_sorted(mut self) -> (Vec<Blob>, HashMap<Digest, PathBuf>) {
        sort_blobs(&mut self.list);
        (self.list, self.paths)
    }
}
