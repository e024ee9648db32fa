//! Which client connections of a running nginx have a request on them, and its first line. nginx lists neither, so both
//! are read out of its workers' memory (ptrace(2) must be allowed, as for pidfd_getfd(2)).
//!
//! A worker's epoll(7) has, for each connection, the address of nginx's record of it. That record begins with the
//! address of the request (ngx_http_request_s), which begins with a signature and the address of the connection. Both are
//! checked, so an nginx whose records have another form shows no request at all, and never a wrong one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::nginx::{Masters, socket_inode};
use crate::error::{Code, OrCode, Result};

/// NGX_HTTP_MODULE
const SIGNATURE: &[u8] = b"HTTP";
/// In ngx_http_request_s of 64 bits: `connection`, and `header_in`, the buffer of the header.
const CONNECTION: usize = 8;
const HEADER_IN: usize = 96;
/// In ngx_buf_t: `pos`, `start`.
const POS: usize = 0;
const START: usize = 32;
/// A buffer of a header is at most 8 KiB, and its first line is what counts.
const HEADER: u64 = 8 << 10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Its header is not all here: nginx has not begun with it.
    HalfSent,
    /// With its first line, where that is known.
    Begun(Option<String>),
}

/// Requests on these connections, named by the inodes of their sockets.
pub fn on(masters: &Masters, inodes: &BTreeSet<u64>) -> Result<BTreeMap<u64, Request>> {
    let mut found = BTreeMap::new();
    for pid in masters.processes()? {
        found.extend(
            of_worker(pid, inodes).or_code(Code::Nginx, format!("requests of nginx (process {pid})"))?,
        );
    }
    Ok(found)
}

fn of_worker(pid: u32, inodes: &BTreeSet<u64>) -> io::Result<Vec<(u64, Request)>> {
    let (mut sockets, mut polls) = (BTreeMap::new(), Vec::new());
    // A worker may end while it is looked at; its connections end with it.
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let link = std::fs::read_link(fd.path()).unwrap_or_default();
        let (Some(link), Some(fd)) = (link.to_str(), fd.file_name().to_str().map(str::to_owned)) else {
            continue;
        };
        if link == "anon_inode:[eventpoll]" {
            polls.push(fd);
        } else if let Some(inode) = socket_inode(link).filter(|inode| inodes.contains(inode)) {
            sockets.insert(fd, inode);
        }
    }
    if sockets.is_empty() {
        return Ok(Vec::new());
    }
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut found = Vec::new();
    for poll in polls {
        let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{poll}")) else { continue };
        for (fd, connection) in text.lines().filter_map(watched) {
            let request = sockets.get(fd).and_then(|inode| Some((*inode, read(&memory, connection)?)));
            found.extend(request);
        }
    }
    Ok(found)
}

/// `tfd: 12 events: 80002019 data: 7f0000001211 …` (proc(5)). nginx keeps a flag in the lowest bit of the address.
fn watched(line: &str) -> Option<(&str, u64)> {
    let mut words = line.split_ascii_whitespace();
    let fd = (words.next()? == "tfd:").then(|| words.next())??;
    let data = words.skip_while(|word| *word != "data:").nth(1)?;
    Some((fd, u64::from_str_radix(data, 16).ok()? & !1))
}

fn read(memory: &File, connection: u64) -> Option<Request> {
    let request = word(&bytes(memory, connection, 8)?, 0);
    let request = bytes(memory, request, HEADER_IN as u64 + 8)?;
    if !request.starts_with(SIGNATURE) || word(&request, CONNECTION) != connection {
        return None;
    }
    let header = || {
        let buffer = bytes(memory, word(&request, HEADER_IN), START as u64 + 8)?;
        let (start, pos) = (word(&buffer, START), word(&buffer, POS));
        bytes(memory, start, pos.checked_sub(start)?.min(HEADER))
    };
    Some(header().map_or(Request::Begun(None), |header| request_of(&header)))
}

/// What nginx has read of a header. It puts a zero in place of each colon and carriage return of a field.
fn request_of(header: &[u8]) -> Request {
    if !header.windows(3).any(|three| three == b"\n\r\n") {
        return Request::HalfSent;
    }
    let line = header.split(|b| b"\r\n\0".contains(b)).next().unwrap_or_default();
    let line = line.iter().take(200).map(|b| if (b' '..=b'~').contains(b) { *b as char } else { '?' });
    // Of a header that did not fit into the first buffer, the second begins with a later line.
    Request::Begun(Some(line.collect()).filter(|line: &String| line.contains(" HTTP/1.")))
}

fn bytes(memory: &File, at: u64, length: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    memory.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_what_a_worker_watches() {
        let line = "tfd:       12 events: 80002019 data:     7fe2a80011f1  pos:0 ino:2f3a sdev:8";
        assert_eq!(watched(line), Some(("12", 0x7fe2_a800_11f0)));
        assert_eq!(watched("pos:\t0"), None);
        assert_eq!(watched("tfd: 12 events: 19"), None);
    }

    #[test]
    fn a_request_is_one_when_its_header_is_whole() {
        let begun = |line: &str| Request::Begun(Some(line.to_owned()));
        assert_eq!(request_of(b"GET / HTTP/1.0\r\n\r\n"), begun("GET / HTTP/1.0"));
        assert_eq!(request_of(b"POST /x?y HTTP/1.1\r\nHost\0 a\0\n\r\nbody"), begun("POST /x?y HTTP/1.1"));
        assert_eq!(request_of(b"GET /\x1b[2J HTTP/1.1\r\nHost\0 a\0\n\r\n"), begun("GET /?[2J HTTP/1.1"));
        assert_eq!(request_of(b"Cookie\0 long\0\n\r\n"), Request::Begun(None));
        for half in [&b""[..], b"GET / HT", b"GET / HTTP/1.1\r\nHost\0 a\0\n"] {
            assert_eq!(request_of(half), Request::HalfSent, "{half:?}");
        }
    }

    /// What is there has neither signature nor connection; and it may be no memory at all.
    #[test]
    fn other_memory_is_no_request() {
        let memory = File::open("/proc/self/mem").unwrap();
        let wrong = [0u64; 32];
        assert_eq!(read(&memory, wrong.as_ptr() as u64), None);
        assert_eq!(read(&memory, 8), None);
        // One of the form that nginx has: a connection, its request, the buffer of the header.
        let text = b"GET /a HTTP/1.1\r\n\r\n";
        let start = text.as_ptr() as u64;
        let buffer = [start + text.len() as u64, 0, 0, 0, start];
        let mut request = [0u64; 13];
        let connection = [request.as_ptr() as u64];
        request[0] = u64::from(u32::from_le_bytes(*b"HTTP"));
        request[1] = connection.as_ptr() as u64;
        request[12] = buffer.as_ptr() as u64;
        std::hint::black_box((&request, &buffer, &connection));
        assert_eq!(
            read(&memory, connection.as_ptr() as u64),
            Some(Request::Begun(Some("GET /a HTTP/1.1".into())))
        );
        request[1] = 0;
        std::hint::black_box(&request);
        assert_eq!(read(&memory, connection.as_ptr() as u64), None);
    }
}
