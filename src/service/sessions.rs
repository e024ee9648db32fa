//! Open sessions of a slot, TCP connections and long-lived requests, and what becomes of them once a switch has moved
//! the pointer.
//!
//! nginx serves each slot on a unix socket, so a session of a slot is a connection to that socket, and the
//! kernel's list of them (/proc/net/unix) has each from its connect(2) on. So after the pointer has moved no session
//! can come to the old slot unseen.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use procfs::net::{UnixNetEntry, UnixState};
use serde::Serialize;

use crate::bundle::manifest::{Door, Inlet, Service, Sessions};
use crate::error::{Code, Result};
use crate::host::{nginx, paths};
use crate::ids::{Name, Slot};

/// How long nginx may take to close what it was told to close.
const CLOSED: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_millis(5);
const POLL: Duration = Duration::from_millis(50);

/// What a switch found and left of the sessions of one inlet.
#[derive(Debug, Serialize)]
pub struct Moved {
    #[serde(flatten)]
    pub door: Door,
    pub sessions: Sessions,
    /// Sessions of the old slot when the pointer had moved.
    pub open: usize,
    /// Those still open at the end of the command.
    pub left: usize,
    /// Why they could not be closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// Sessions of a slot.
pub fn open(service: &Name, slot: Slot, door: &Door) -> Result<Vec<UnixNetEntry>> {
    let socket = paths::socket(service, slot, door);
    let mut all = nginx::unix_sockets()?;
    all.retain(|s| is_session(s) && s.path.as_ref() == Some(&socket));
    Ok(all)
}

/// Open, or waiting to be accepted; not nginx's own that listens.
fn is_session(socket: &UnixNetEntry) -> bool {
    matches!(socket.state, UnixState::CONNECTED | UnixState::CONNECTING)
}

/// Right after the pointer has left `old`: counts its sessions, and closes those that are to be cut. Never fails:
/// the switch is done.
pub async fn leave(service: &Service, old: Slot) -> Vec<Moved> {
    let mut all = Vec::new();
    for Inlet { door, sessions, .. } in service.inlets() {
        let mut count = 0;
        let looked = match sessions {
            Sessions::Drain => open(&service.name, old, &door).map(|open| count = open.len()),
            Sessions::Cut => cut(&service.name, old, &door, &mut count).await,
        };
        let trouble = looked.err().map(|e| e.what);
        let left = open(&service.name, old, &door).map_or(count, |open| open.len());
        all.push(Moved { door, sessions, open: count, left, trouble });
    }
    all
}

/// Closes sessions until there is none twice in a row, and tells how many there were.
async fn cut(service: &Name, slot: Slot, door: &Door, cut: &mut usize) -> Result<()> {
    let start = Instant::now();
    let (mut seen, mut quiet) = (BTreeSet::<u64>::new(), 0);
    while quiet < 2 {
        let open = open(service, slot, door)?;
        quiet = if open.is_empty() { quiet + 1 } else { 0 };
        // One without an inode waits to be accepted, and has one the next time.
        let inodes: BTreeSet<u64> = open.iter().map(|s| s.inode).filter(|inode| *inode != 0).collect();
        seen.extend(&inodes);
        *cut = seen.len();
        if start.elapsed() > CLOSED {
            return Err(Code::Nginx.err(format!("nginx has not closed {} of them in {CLOSED:?}", open.len())));
        }
        if !inodes.is_empty() {
            nginx::hang_up_on(&inodes)?;
        }
        tokio::time::sleep(EVERY).await;
    }
    Ok(())
}

/// Waits for sessions that may end by themselves, with each inlet as long as its policy says.
pub async fn wait(service: &Service, old: Slot, moved: &mut [Moved]) {
    let start = Instant::now();
    for (inlet, moved) in service.inlets().iter().zip(moved).filter(|(i, _)| i.sessions == Sessions::Drain) {
        while moved.left > 0 && start.elapsed() < inlet.drain() {
            tokio::time::sleep(POLL).await;
            moved.left = open(&service.name, old, &inlet.door).map_or(moved.left, |open| open.len());
        }
    }
}

impl Moved {
    /// For people and the audit log; nothing where there was nothing to tell.
    pub fn text(&self, old: Slot) -> Option<String> {
        let Moved { door, open, left, .. } = self;
        if let Some(why) = &self.trouble {
            return Some(format!("{door}: {left} sessions stay with {old}, they could not be closed: {why}"));
        }
        match (self.sessions, open, left) {
            (_, 0, 0) => None,
            (Sessions::Cut, _, _) => Some(format!("{door}: {open} sessions of {old} closed")),
            (Sessions::Drain, _, 0) => Some(format!("{door}: {open} sessions of {old} have ended")),
            (Sessions::Drain, _, _) => Some(format!(
                "{door}: {left} sessions stay with {old} until they end, at the latest with the next deploy to it"
            )),
        }
    }
}
