//! Unix sockets with their other side, asked of the kernel over netlink (sock_diag(7), Linux 3.3). /proc/net/unix has
//! only the side that was bound, which lives on for a while when the other one has closed.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::nlas::UnixDiagName;
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// The kernel fills at most 32 KiB at a time (netlink_dump()).
const PART: usize = 32 << 10;

/// Inodes of the connections to these sockets, each that of the side that connected, for as long as neither side
/// has begun to close it. Those that wait to be accepted are left out.
pub fn connected_to(sockets: &BTreeSet<PathBuf>) -> io::Result<BTreeSet<u64>> {
    let flags = SocketFlags::CLOEXEC;
    let kernel =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
    rustix::net::send(&kernel, &request(), SendFlags::empty())?;
    let (mut found, mut part) = (BTreeSet::new(), vec![0; PART]);
    loop {
        let (got, _) = rustix::net::recv(&kernel, &mut part[..], RecvFlags::empty())?;
        let mut rest = &part[..got];
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(socket)) => {
                    found.extend(other_side(&socket, sockets));
                }
                NetlinkPayload::Error(e) => return Err(e.to_io()),
                NetlinkPayload::Done(_) => return Ok(found),
                _ => {}
            }
            let length = message.header.length.next_multiple_of(4) as usize;
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn request() -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let all = UnixRequest {
        state_flags: StateFlags::ESTABLISHED,
        inode: 0,
        // SHUTDOWN is always in the answer.
        show_flags: ShowFlags::NAME | ShowFlags::PEER,
        cookie: [0xff; 8],
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(all).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// close(2) of one side marks the other as shut down before it returns (unix_release_sock() in the kernel).
fn other_side(socket: &UnixResponse, sockets: &BTreeSet<PathBuf>) -> Option<u64> {
    let Some(UnixDiagName::Pathname(name)) = socket.name() else { return None };
    let open = socket.shutdown_state() == Some(0) && sockets.contains(Path::new(name));
    socket.peer().filter(|peer| open && *peer != 0).map(u64::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn open_on_both_sides_or_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let sockets = BTreeSet::from([path.clone()]);
        let inode = |stream: &UnixStream| rustix::fs::fstat(stream).unwrap().st_ino;
        // More than fit into one part.
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..300 {
            theirs.push(UnixStream::connect(&path).unwrap());
            let before = connected_to(&sockets).unwrap();
            assert_eq!(before, ours.iter().zip(&theirs).map(|(_, t)| inode(t)).collect(), "not accepted");
            ours.push(listener.accept().unwrap().0);
        }
        assert_eq!(connected_to(&sockets).unwrap(), theirs.iter().map(inode).collect());
        assert_eq!(connected_to(&BTreeSet::from([dir.path().join("b.sock")])).unwrap(), BTreeSet::new());
        // Closed by the side that connected: gone at once, though the other side has not noticed.
        theirs.truncate(299);
        assert_eq!(connected_to(&sockets).unwrap(), theirs.iter().map(inode).collect());
        ours.remove(0);
        assert_eq!(connected_to(&sockets).unwrap(), theirs[1..].iter().map(inode).collect());
    }
}
