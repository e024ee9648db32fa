//! Sockets as the kernel lists them over netlink (sock_diag(7), Linux 3.3): unix sockets with their other side, where
//! /proc/net/unix has only the side that was bound, which lives on for a while when the other one has closed; and TCP
//! connections with what has not been sent and when something last came.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{self, ExtensionFlags, InetRequest, InetResponse, SocketId};
use netlink_packet_sock_diag::unix::nlas::UnixDiagName;
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// The kernel fills at most 32 KiB at a time (netlink_dump()).
const PART: usize = 32 << 10;
/// Of tcpi_last_data_recv in struct tcp_info, which only grows at its end.
const LAST_DATA_RECV: usize = 52;

/// A TCP connection to a port of this host.
#[derive(Clone, Debug)]
pub struct Tcp {
    pub inode: u64,
    pub port: u16,
    pub client: SocketAddr,
    /// Bytes that the client has not acknowledged.
    pub unread: u32,
    /// Since the client last sent something.
    pub silent: Duration,
}

/// Inodes of the connections to these sockets, each that of the side that connected, for as long as neither side
/// has begun to close it. Those that wait to be accepted are left out.
pub fn connected_to(sockets: &BTreeSet<PathBuf>) -> io::Result<BTreeSet<u64>> {
    let request = UnixRequest {
        state_flags: StateFlags::ESTABLISHED,
        inode: 0,
        // SHUTDOWN is always in the answer.
        show_flags: ShowFlags::NAME | ShowFlags::PEER,
        cookie: [0xff; 8],
    };
    let mut found = BTreeSet::new();
    dump(SockDiagMessage::UnixRequest(request), |answer| {
        if let SockDiagMessage::UnixResponse(socket) = answer {
            found.extend(other_side(&socket, sockets));
        }
    })?;
    Ok(found)
}

/// IPv4 connections to a port of this host that a process has.
pub fn tcp_to(port: u16) -> io::Result<Vec<Tcp>> {
    use inet::StateFlags as S;
    let request = InetRequest {
        family: AF_INET,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::INFO,
        states: S::ESTABLISHED | S::CLOSE_WAIT | S::FIN_WAIT1 | S::FIN_WAIT2 | S::CLOSING | S::LAST_ACK,
        socket_id: SocketId { source_port: port, ..SocketId::new_v4() },
    };
    let mut found = Vec::new();
    dump(SockDiagMessage::InetRequest(request), |answer| {
        if let SockDiagMessage::InetResponse(socket) = answer {
            found.extend(tcp(&socket).filter(|tcp| tcp.port == port && tcp.inode != 0));
        }
    })?;
    Ok(found)
}

fn tcp(socket: &InetResponse) -> Option<Tcp> {
    let (id, header) = (&socket.header.socket_id, &socket.header);
    let info = socket.nlas.iter().find_map(|nla| match nla {
        Nla::TcpInfo(info) => info.get(LAST_DATA_RECV..LAST_DATA_RECV + 4)?.try_into().ok(),
        _ => None,
    })?;
    Some(Tcp {
        inode: header.inode.into(),
        port: id.source_port,
        client: (id.destination_address, id.destination_port).into(),
        unread: header.send_queue,
        silent: Duration::from_millis(u32::from_ne_bytes(info).into()),
    })
}

fn dump(request: SockDiagMessage, mut each: impl FnMut(SockDiagMessage)) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let kernel =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
    rustix::net::send(&kernel, &message(request), SendFlags::empty())?;
    let mut part = vec![0; PART];
    loop {
        let (got, _) = rustix::net::recv(&kernel, &mut part[..], RecvFlags::empty())?;
        let mut rest = &part[..got];
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
            match message.payload {
                NetlinkPayload::InnerMessage(answer) => each(answer),
                NetlinkPayload::Error(e) => return Err(e.to_io()),
                NetlinkPayload::Done(_) => return Ok(()),
                _ => {}
            }
            let length = message.header.length.next_multiple_of(4) as usize;
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn message(request: SockDiagMessage) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, request.into());
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

    #[test]
    fn tcp_clients_with_what_they_have_not_taken() {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert_eq!(tcp_to(port).unwrap().len(), 0, "not accepted: nobody has it");
        let mut ours = listener.accept().unwrap().0;
        client.write_all(b"x").unwrap();
        ours.read_exact(&mut [0]).unwrap();
        ours.set_nonblocking(true).unwrap();
        while ours.write(&[0; 65536]).is_ok() {}
        std::thread::sleep(Duration::from_millis(50));
        let found = tcp_to(port).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].client, client.local_addr().unwrap());
        assert_eq!(found[0].inode, rustix::fs::fstat(&ours).unwrap().st_ino);
        assert!(found[0].unread > 0 && found[0].silent >= Duration::from_millis(40), "{found:?}");
        drop(client);
    }
}
