//! What each slot of a service holds and since when: `state.json` beside the pointer. The pointer says
//! which slot is active; this says what was put there, and what was active before.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::audit::Release;
use crate::error::{Code, OrCode, Result};
use crate::host::{fs, paths};
use crate::ids::{Digest, Name, Slot, Version};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    pub schema: u32,
    pub slots: BTreeMap<Slot, Filled>,
    /// The slot that the last finished switch made active; blue from the install on.
    #[serde(default = "blue")]
    pub active: Slot,
    pub active_since: Option<Timestamp>,
    pub active_by: Option<String>,
    /// Consul was away when this was recorded, and has to be told.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unpublished: bool,
    /// Containers of each slot since the last scale; the manifest's number before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instances: Option<u8>,
    /// Where `rollback` goes.
    pub previous: Option<Release>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    pub version: Version,
    pub digest: Digest,
    pub since: Timestamp,
    pub by: String,
}

impl Default for State {
    fn default() -> Self {
        Self {
            schema: 1,
            slots: BTreeMap::new(),
            active: blue(),
            active_since: None,
            active_by: None,
            unpublished: false,
            instances: None,
            previous: None,
        }
    }
}

fn blue() -> Slot {
    Slot::Blue
}

pub fn path(service: &Name) -> PathBuf {
    paths::service(service).join("state.json")
}

impl State {
    /// Empty where nothing was recorded yet.
    pub fn read(service: &Name) -> Result<Self> {
        let path = path(service);
        match fs::read_if_any(&path)? {
            None => Ok(Self::default()),
            Some(bytes) => {
                let state: Self = serde_json::from_slice(&bytes).or_code(Code::Io, path.display())?;
                if state.schema != 1 {
                    return Err(Code::Io
                        .err(format!("{}: schema {}, this zd reads 1", path.display(), state.schema))
                        .cure("use the newer zd that wrote it: /opt/zd/bin/zd"));
                }
                Ok(state)
            }
        }
    }

    pub fn write(&self, service: &Name) -> Result<()> {
        let mut bytes = serde_json::to_vec_pretty(self).or_code(Code::Bug, "writing a service's state")?;
        bytes.push(b'\n');
        fs::write(&path(service), &bytes, 0o644, None)
    }

    /// From now on `slot` is active, and what was active is where a rollback goes.
    pub fn activate(&mut self, slot: Slot) {
        self.previous = self.release(slot.other());
        self.active = slot;
        self.active_since = Some(Timestamp::now());
        self.active_by = Some(crate::audit::actor());
    }

    /// What a slot holds, as a release.
    pub fn release(&self, slot: Slot) -> Option<Release> {
        let filled = self.slots.get(&slot)?;
        Some(Release { slot, version: filled.version.clone(), digest: filled.digest.clone() })
    }
}
