//! The gate: a server on a unix socket inside `zd switch`. While the pointer is held, nginx asks here
//! about each new request (auth_request, before it reads a body); the answer waits until the release
//! says which slot it goes to (X-Accel-Redirect to `@blue` or `@green`).
//!
//! Plain sockets and one thread, no HTTP library: nginx always sends the same few bytes over HTTP/1.0,
//! and the count of held requests must be exact at a moment of our choosing, straight from the kernel.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::net::RecvFlags;
use rustix::process::umask;

use crate::error::{At, Code, Result};
use crate::host::{fs, paths};
use crate::ids::{Name, Slot};

/// Connections that may wait to be accepted; past it nginx follows the pointer, which is safe too.
const BACKLOG: i32 = 4096;
/// nginx sends its request right after it has connected.
const REQUEST: Duration = Duration::from_millis(200);

pub struct Gate {
    shared: Arc<Mutex<Shared>>,
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// In order of arrival; only the release empties it.
    held: Vec<(UnixStream, Instant)>,
    released: Option<Slot>,
    closing: bool,
    /// How long each held request waited.
    waits: Vec<Duration>,
}

impl Gate {
    /// Opens the gate's socket; nothing comes to it before the pointer is held.
    pub fn open(service: &Name) -> Result<Self> {
        let socket = paths::gate(service);
        is_asked(service, &socket)?;
        // The group of the folder is that of the sockets in it (inode(7), S_ISGID).
        let nginx = format!("{}{}", fs::ROOT_AND, paths::NGINX_USER);
        fs::make_dir(Path::new(paths::GATES), 0o2750, Some(&nginx))?;
        Self::at(socket)
    }

    fn at(socket: PathBuf) -> Result<Self> {
        fs::remove_file(&socket)?;
        // To connect takes the right to write. What other threads make meanwhile is only closed more.
        let before = umask(Mode::from_raw_mode(0o117));
        let bound = UnixListener::bind(&socket);
        umask(before);
        let listener = bound.at(&socket)?;
        rustix::net::listen(&listener, BACKLOG).map_err(|e| crate::error::io(&socket, e.into()))?;
        let shared = Arc::new(Mutex::new(Shared::default()));
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || accept(&listener, &theirs));
        Ok(Self { shared, socket, thread: Some(thread) })
    }

    /// Requests that have arrived so far.
    pub fn arrived(&self) -> usize {
        lock(&self.shared).held.len()
    }

    /// Of the first `n` that arrived, those whose client still waits. nginx closes its connection to
    /// the gate before it counts a vanished request out, so asking after its count never hides one.
    pub fn waiting_of(&self, n: usize) -> usize {
        lock(&self.shared).held.iter().take(n).filter(|(stream, _)| is_open(stream)).count()
    }

    /// Clients of the requests that are held, as nginx names them.
    pub fn clients(&self) -> BTreeSet<SocketAddr> {
        lock(&self.shared).held.iter().filter_map(|(stream, _)| client(stream)).collect()
    }

    /// Lets all go to `slot`, also those still on their way here.
    pub fn release(&self, slot: Slot) {
        let mut shared = lock(&self.shared);
        shared.released = Some(slot);
        let held = std::mem::take(&mut shared.held);
        for (stream, since) in held {
            if answer(stream, slot).is_ok() {
                shared.waits.push(since.elapsed());
            }
        }
    }

    /// How long each held request waited, so far.
    pub fn waits(&self) -> Vec<Duration> {
        lock(&self.shared).waits.clone()
    }
}

impl Drop for Gate {
    /// Who is still held finds the slot without us: nginx looks at the pointer when the gate closes.
    fn drop(&mut self) {
        lock(&self.shared).closing = true;
        // Wakes the thread out of accept().
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(|e| e.into_inner())
}

fn accept(listener: &UnixListener, shared: &Mutex<Shared>) {
    for stream in listener.incoming() {
        let mut shared = lock(shared);
        if shared.closing {
            return;
        }
        // An accept that fails (no files left) is nginx's 502, and thereby the pointer.
        let Ok(stream) = stream else { continue };
        match shared.released {
            None => shared.held.push((stream, Instant::now())),
            Some(slot) => {
                let since = Instant::now();
                if answer(stream, slot).is_ok() {
                    shared.waits.push(since.elapsed());
                }
            }
        }
    }
}

/// nginx has not closed its end. Its request may lie there unread.
fn is_open(stream: &UnixStream) -> bool {
    let mut byte = [0u8; 1];
    let asked = rustix::net::recv(stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
    let more_than_closed = |events: rustix::event::PollFlags| !events.contains(rustix::event::PollFlags::HUP);
    match asked {
        Ok((0, _)) => false,
        // With the request unread a closed end does not show in recv(2), but in poll(2).
        _ => {
            let mut fds = [rustix::event::PollFd::new(stream, rustix::event::PollFlags::IN)];
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            rustix::event::poll(&mut fds, Some(&now)).is_ok() && more_than_closed(fds[0].revents())
        }
    }
}

/// The request is left to be read.
fn client(stream: &UnixStream) -> Option<SocketAddr> {
    let mut request = [0; 512];
    let (got, _) = rustix::net::recv(stream, &mut request, RecvFlags::PEEK | RecvFlags::DONTWAIT).ok()?;
    let text = std::str::from_utf8(&request[..got]).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Client: ")?.parse().ok())
}

/// Reads the request to its blank line and sends it to a slot.
fn answer(mut stream: UnixStream, slot: Slot) -> std::io::Result<()> {
    stream.set_read_timeout(Some(REQUEST))?;
    let (mut request, mut buf) = (Vec::new(), [0u8; 512]);
    while !request.ends_with(b"\r\n\r\n") && request.len() < 4096 {
        match stream.read(&mut buf)? {
            0 => break,
            n => request.extend_from_slice(&buf[..n]),
        }
    }
    write!(stream, "HTTP/1.0 200 OK\r\nX-Accel-Redirect: @{slot}\r\nContent-Length: 0\r\n\r\n")
}

/// An nginx that was set up by an earlier zd looks for the gate elsewhere: it would hold nobody.
fn is_asked(service: &Name, socket: &Path) -> Result<()> {
    let path = paths::nginx_conf(service);
    let conf = std::fs::read_to_string(&path).at(&path)?;
    if conf.contains(&format!("unix:{}:", socket.display())) {
        return Ok(());
    }
    Err(Code::Nginx
        .err(format!("{} does not lead to {}", path.display(), socket.display()))
        .cure("it is of another zd: zd install with the installed bundle, or zd upgrade, renders it anew"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(gate: &Gate) -> UnixStream {
        let mut stream = UnixStream::connect(&gate.socket).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\nHost: gate\r\nClient: 10.0.0.7:4711\r\n\r\n").unwrap();
        stream
    }

    fn arrived(gate: &Gate, n: usize) {
        while gate.arrived() < n {
            std::thread::yield_now();
        }
    }

    #[test]
    fn held_until_the_release_and_counted_exactly() {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::at(dir.path().join("gate.sock")).unwrap();
        let mut streams: Vec<UnixStream> = (0..5).map(|_| ask(&gate)).collect();
        arrived(&gate, 5);
        assert_eq!(gate.waiting_of(5), 5);
        assert_eq!(gate.waiting_of(3), 3);
        assert_eq!(gate.clients(), BTreeSet::from([([10, 0, 0, 7], 4711).into()]));
        // A client that gives up is not counted, though it arrived and its request lies unread.
        drop(streams.remove(0));
        assert_eq!(gate.waiting_of(5), 4);
        gate.release(Slot::Green);
        for mut stream in streams {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(
                text.starts_with("HTTP/1.0 200") && text.contains("X-Accel-Redirect: @green\r\n"),
                "{text}"
            );
        }
        // One that comes late is let through at once.
        let mut text = String::new();
        ask(&gate).read_to_string(&mut text).unwrap();
        assert!(text.contains("@green"));
        assert!(gate.waits().len() >= 5);
    }

    #[test]
    fn closed_without_a_word_ends_every_connection() {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::at(dir.path().join("gate.sock")).unwrap();
        let mut stream = ask(&gate);
        arrived(&gate, 1);
        drop(gate);
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        assert_eq!(text, "");
    }
}
