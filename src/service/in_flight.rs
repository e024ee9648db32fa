//! Long-lived requests in flight. `stub_status` counts them with all others, so a switch has to know how many they are,
//! and never more than they are: each one too many would hide an ordinary request that has no answer yet.
//!
//! nginx has one connection to the socket of its path and slot for each such request. It connects after it has
//! counted the request in, and closes before it counts it out (ngx_http_free_request() runs the cleanup first). So
//! a connection that was there before `stub_status` was read and still is there afterwards belongs to a request that was
//! counted. Only connections of the nginx that counts are known: one that was replaced may live on with its own
//! sessions, and counts them for itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::bundle::manifest::{Door, Service};
use crate::error::{Code, OrCode, Result};
use crate::host::nginx::Masters;
use crate::host::{paths, sock_diag};
use crate::ids::Slot;

pub struct InFlight {
    /// None where there is no long-lived path, or no nginx.
    masters: Option<Masters>,
    sockets: BTreeSet<PathBuf>,
    /// Connections by inode, seen so far; whether they are of the nginx that counts.
    seen: BTreeMap<u64, bool>,
    /// Why none can be told from other requests.
    pub trouble: Option<String>,
}

impl InFlight {
    pub async fn new(service: &Service) -> Self {
        let doors = service.long_lived.iter().map(|l| Door::Path(l.path.clone()));
        let name = &service.name;
        let sockets: BTreeSet<PathBuf> =
            doors.flat_map(|door| Slot::BOTH.map(|slot| paths::socket(name, slot, &door))).collect();
        let masters = if service.long_lived.is_empty() { None } else { Masters::of(name).await.ok() };
        let mut all = Self { masters, sockets, seen: BTreeMap::new(), trouble: None };
        all.of(1);
        all
    }

    /// Of so many requests that nginx has just counted, those that are known to be long-lived. Where that leaves some,
    /// the connections that have come since become known, for the next time.
    pub fn of(&mut self, counted: u64) -> u64 {
        if counted == 0 || self.sockets.is_empty() {
            return 0;
        }
        let known = self.look(counted);
        self.trouble = known.as_ref().err().map(|e| e.what.clone());
        known.unwrap_or(0)
    }

    fn look(&mut self, counted: u64) -> Result<u64> {
        let open =
            sock_diag::connected_to(&self.sockets).or_code(Code::Io, "open unix sockets (unix_diag)")?;
        let known = open.iter().filter(|inode| self.seen.get(inode) == Some(&true)).count() as u64;
        let new: BTreeSet<u64> = open.into_iter().filter(|inode| !self.seen.contains_key(inode)).collect();
        if known < counted && !new.is_empty() {
            let masters = self.masters.as_ref().ok_or_else(|| Code::Nginx.err("nginx did not run"))?;
            if masters.is_being_replaced()? {
                return Err(Code::Nginx.err("two nginx take requests, and which of them counts is not known"));
            }
            let ours = masters.held_by_workers(&new)?;
            self.seen.extend(new.into_iter().map(|inode| (inode, ours.contains(&inode))));
        }
        Ok(known.min(counted))
    }
}
