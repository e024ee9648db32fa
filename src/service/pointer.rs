//! The pointer: one symlink that nginx looks at for every request. It points to the folder of the
//! active slot, or, while a switch holds new requests, to a folder that remembers the slot held for.

use std::path::{Path, PathBuf};

use crate::error::{At, Code, Result};
use crate::host::{fs, paths};
use crate::ids::{Name, Slot};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pointer {
    Active(Slot),
    /// New requests go to the gate; if the gate is gone, to this slot.
    Held(Slot),
    /// This slot serves, and each answer closes its connection.
    Closing(Slot),
}

impl Pointer {
    /// Name of the folder it stands for.
    pub fn folder(self) -> String {
        match self {
            Pointer::Active(slot) => slot.to_string(),
            Pointer::Held(slot) => format!("hold-{slot}"),
            Pointer::Closing(slot) => format!("close-{slot}"),
        }
    }

    /// The slot that serves.
    pub fn slot(self) -> Slot {
        match self {
            Pointer::Active(slot) | Pointer::Held(slot) | Pointer::Closing(slot) => slot,
        }
    }
}

pub fn link(service: &Name) -> PathBuf {
    paths::service(service).join("active")
}

pub fn read(service: &Name) -> Result<Pointer> {
    let path = link(service);
    let target = std::fs::read_link(&path).at(&path)?;
    let all =
        Slot::BOTH.into_iter().flat_map(|s| [Pointer::Active(s), Pointer::Held(s), Pointer::Closing(s)]);
    all.into_iter().find(|p| target == Path::new(&p.folder())).ok_or_else(|| {
        Code::Nginx.err(format!("{} points to {}, which is no slot", path.display(), target.display())).cure(
            format!(
                "set it back: cd {} && ln -s blue back && mv -T back active",
                path.parent().unwrap_or(&path).display()
            ),
        )
    })
}

/// One rename; then on disk.
pub fn set(service: &Name, pointer: Pointer) -> Result<()> {
    fs::set_link(&link(service), Path::new(&pointer.folder()))
}

/// One rename, not yet forced to disk.
pub fn swap(service: &Name, pointer: Pointer) -> Result<()> {
    fs::swap_link(&link(service), Path::new(&pointer.folder()))
}

/// A zd that was killed while it held requests, or had connections closed, leaves that behind: its slot
/// serves on through nginx's way out, a little slower. Call it while holding the lock. Tells whether there was one.
pub fn release_stale_hold(service: &Name) -> Result<bool> {
    match read(service)? {
        Pointer::Active(_) => Ok(false),
        Pointer::Held(slot) | Pointer::Closing(slot) => set(service, Pointer::Active(slot)).map(|()| true),
    }
}
