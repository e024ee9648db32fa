//! The sample service: a small HTTP/1.1 server that says which version it is.
//!
//! One thread per connection, std only. Each connection reads requests one after the other out of
//! one buffer, so pipelined and partial reads need no special case; each answer is one write.
//! What it does wrong, it does on request: see [`Config`]. Besides /hello and /health it has what stays open for
//! long: /poll, the same as /hello; /events, an answer without an end; /ws, which changes to another protocol.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Enough for the few frames of a connection; thousands of idle ones stay cheap.
const STACK: usize = 64 * 1024;
/// Also the longest request head that is read.
const BUFFER: usize = 16 * 1024;
/// Longer than the 60..75 s after which proxies drop an idle connection: the client closes first.
const IDLE: Duration = Duration::from_secs(120);
/// A peer that takes nothing for this long is gone.
const STALLED: Duration = Duration::from_secs(30);
const MAX_DELAY_MS: u64 = 60_000;

fn main() -> ExitCode {
    sys::die_on_signals();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("hello: {what}");
            ExitCode::from(2)
        }
    }
}

fn serve() -> Result<(), String> {
    let config = Config::from_env()?;
    let at = (Ipv4Addr::UNSPECIFIED, config.port);
    let listener = TcpListener::bind(at).map_err(|e| format!("0.0.0.0:{}: {e}", config.port))?;
    sys::deepen_backlog(&listener);
    println!("hello {} listens on 0.0.0.0:{}", config.version, config.port);
    if let Some(after) = config.exit_after {
        thread::spawn(move || {
            thread::sleep(after);
            eprintln!("hello: exits as HELLO_EXIT_MS asks");
            std::process::exit(1);
        });
    }
    if let Some(port) = config.tcp {
        listen_for_lines(port, config.version.clone())?;
    }
    let service = Arc::new(Service { config, started: Instant::now(), hellos: AtomicU64::new(0) });
    for stream in listener.incoming() {
        let accepted = stream.and_then(|stream| {
            let service = Arc::clone(&service);
            let serve = move || {
                // Whatever ended the connection, the other side knows; nothing is left to do.
                let _ = Connection::new(stream).and_then(|c| c.serve(&service));
            };
            thread::Builder::new().stack_size(STACK).spawn(serve)
        });
        if let Err(e) = accepted {
            eprintln!("hello: a connection was not taken: {e}");
            // Out of files or threads: without a pause this loop would spin.
            thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// The other kind of service: sessions that stay open. Each line is answered with the version.
fn listen_for_lines(port: u16, version: String) -> Result<(), String> {
    let listener =
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(|e| format!("0.0.0.0:{port}: {e}"))?;
    sys::deepen_backlog(&listener);
    println!("hello {version} listens for lines on 0.0.0.0:{port}");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = format!("{version}\n");
            let serve = move || -> io::Result<()> {
                let mut lines = BufReader::new(stream.try_clone()?);
                while lines.skip_until(b'\n')? > 0 {
                    (&stream).write_all(answer.as_bytes())?;
                }
                Ok(())
            };
            if let Err(e) = thread::Builder::new().stack_size(STACK).spawn(serve) {
                eprintln!("hello: a session was not taken: {e}");
            }
        }
    });
    Ok(())
}

/// What the environment asks for.
struct Config {
    /// PORT
    port: u16,
    /// HELLO_VERSION
    version: String,
    /// HELLO_START_MS: how long it listens but is not ready
    start: Duration,
    /// HELLO_DELAY_MS: how long each /hello takes
    delay_ms: u64,
    /// HELLO_FAIL_PERCENT: the share of /hello that is answered 500
    fail_percent: u64,
    /// HELLO_UNHEALTHY=1: /health never says ok
    unhealthy: bool,
    /// HELLO_EXIT_MS: dies after this long
    exit_after: Option<Duration>,
    /// HELLO_TCP: listens here for lines as well; HELLO_DEAF=1: all the same not
    tcp: Option<u16>,
}

impl Config {
    fn from_env() -> Result<Config, String> {
        let version = std::env::var("HELLO_VERSION").unwrap_or_else(|_| "v0".to_owned());
        if version.is_empty() || !version.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(format!("HELLO_VERSION={version:?}: must be printable ASCII without spaces"));
        }
        let port = number("PORT")?.unwrap_or(8080);
        let fail_percent = number("HELLO_FAIL_PERCENT")?.unwrap_or(0);
        if fail_percent > 100 {
            return Err(format!("HELLO_FAIL_PERCENT={fail_percent}: must be 0 to 100"));
        }
        Ok(Config {
            port: port_of("PORT", port)?,
            tcp: match (number("HELLO_TCP")?, number("HELLO_DEAF")?) {
                (Some(port), None) => Some(port_of("HELLO_TCP", port)?),
                _ => None,
            },
            version,
            start: Duration::from_millis(number("HELLO_START_MS")?.unwrap_or(0)),
            delay_ms: number("HELLO_DELAY_MS")?.unwrap_or(0),
            fail_percent,
            unhealthy: number("HELLO_UNHEALTHY")? == Some(1),
            exit_after: number("HELLO_EXIT_MS")?.map(Duration::from_millis),
        })
    }
}

fn port_of(name: &str, number: u64) -> Result<u16, String> {
    u16::try_from(number).map_err(|_| format!("{name}={number}: must be 1 to 65535"))
}

/// A number out of the environment; unset and empty mean the same.
fn number(name: &str) -> Result<Option<u64>, String> {
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => {
            text.parse().map(Some).map_err(|_| format!("{name}={text}: must be a number"))
        }
        _ => Ok(None),
    }
}

/// What all connections share.
struct Service {
    config: Config,
    started: Instant,
    hellos: AtomicU64,
}

impl Service {
    fn answer(&self, request: &Head, body: Option<u64>) -> Answer {
        let version = &self.config.version;
        let began = now_us();
        let ready = self.started.elapsed() >= self.config.start;
        let (status, text) = match request.path() {
            "/hello" | "/poll" if !ready => ("503 Service Unavailable", "starting\n".to_owned()),
            "/hello" | "/poll" => {
                thread::sleep(Duration::from_millis(request.delay_ms().unwrap_or(self.config.delay_ms)));
                if self.this_one_fails() {
                    ("500 Internal Server Error", format!("failure from {version}\n"))
                } else {
                    ("200 OK", format!("hello from {version}\n"))
                }
            }
            "/health" if !ready => ("503 Service Unavailable", "starting\n".to_owned()),
            "/health" if self.config.unhealthy => ("503 Service Unavailable", "unhealthy\n".to_owned()),
            "/health" => ("200 OK", "ok\n".to_owned()),
            _ => ("404 Not Found", "not found\n".to_owned()),
        };
        let mut head = format!("X-Version: {version}\r\nX-Method: {}\r\n", request.method);
        // All slots of a host have the same clock: whether two answers overlapped is exact, whoever asks.
        if request.delay_ms().is_some() {
            head.push_str(&format!("X-Began-Us: {began}\r\nX-Ended-Us: {}\r\n", now_us()));
        }
        if let Some(bytes) = body {
            head.push_str(&format!("X-Body-Bytes: {bytes}\r\n"));
        }
        Answer { status, head, text }
    }

    /// Spreads the failures evenly: exactly `fail_percent` of each hundred.
    fn this_one_fails(&self) -> bool {
        let n = self.hellos.fetch_add(1, Ordering::Relaxed) % 100;
        let share = self.config.fail_percent;
        n * share / 100 != (n + 1) * share / 100
    }
}

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros())
}

struct Answer {
    status: &'static str,
    head: String,
    text: String,
}

impl Answer {
    /// The whole answer as the bytes of one write. An answer to HEAD only names its body's length.
    fn bytes(&self, request: &Head) -> Vec<u8> {
        let Answer { status, head, text } = self;
        let connection = if request.keep_alive { "keep-alive" } else { "close" };
        let body = if request.method == "HEAD" { "" } else { text };
        let length = text.len();
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\
             Connection: {connection}\r\n{head}\r\n{body}"
        )
        .into_bytes()
    }
}

/// How the length of a request's body is told.
#[derive(Clone, Copy, PartialEq)]
enum Body {
    None,
    Length(u64),
    Chunked,
}

/// A request without its body.
struct Head {
    method: String,
    target: String,
    body: Body,
    keep_alive: bool,
    expects_continue: bool,
    upgrade: bool,
}

impl Head {
    /// Reads a request head (without its final empty line). The error is the answer's status.
    fn parse(bytes: &[u8]) -> Result<Head, &'static str> {
        const BAD: &str = "400 Bad Request";
        let text = std::str::from_utf8(bytes).map_err(|_| BAD)?;
        let mut lines = text.split("\r\n");
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (Some(method), Some(target), Some(protocol), None) =
            (first.next(), first.next(), first.next(), first.next())
        else {
            return Err(BAD);
        };
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_alphabetic()) {
            return Err(BAD);
        }
        let mut head = Head {
            method: method.to_owned(),
            target: target.to_owned(),
            body: Body::None,
            keep_alive: match protocol {
                "HTTP/1.1" => true,
                "HTTP/1.0" => false,
                _ => return Err("505 HTTP Version Not Supported"),
            },
            expects_continue: false,
            upgrade: false,
        };
        for line in lines {
            let (name, value) = line.split_once(':').ok_or(BAD)?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                let length = Body::Length(value.parse().map_err(|_| BAD)?);
                // Two lengths that differ, or a length beside chunks: somebody is smuggling.
                if head.body != Body::None && head.body != length {
                    return Err(BAD);
                }
                head.body = length;
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                if head.body != Body::None || !value.eq_ignore_ascii_case("chunked") {
                    return Err(BAD);
                }
                head.body = Body::Chunked;
            } else if name.eq_ignore_ascii_case("connection") {
                for token in value.split(',').map(str::trim) {
                    if token.eq_ignore_ascii_case("close") {
                        head.keep_alive = false;
                    } else if token.eq_ignore_ascii_case("keep-alive") {
                        head.keep_alive = true;
                    }
                }
            } else if name.eq_ignore_ascii_case("upgrade") {
                head.upgrade = true;
            } else if name.eq_ignore_ascii_case("expect") {
                head.expects_continue = value.eq_ignore_ascii_case("100-continue");
            }
        }
        Ok(head)
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The query's `delay_ms`, if it has one.
    fn delay_ms(&self) -> Option<u64> {
        let (_, query) = self.target.split_once('?')?;
        let value = query.split('&').find_map(|pair| pair.strip_prefix("delay_ms="))?;
        value.parse().ok().map(|ms: u64| ms.min(MAX_DELAY_MS))
    }
}

/// One client's connection: the bytes read and not yet used are `buffer[from..to]`.
struct Connection {
    stream: TcpStream,
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Connection {
    fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(STALLED))?;
        Ok(Connection { stream, buffer: vec![0; BUFFER].into_boxed_slice(), from: 0, to: 0 })
    }

    /// Answers requests until either side closes.
    fn serve(mut self, service: &Service) -> io::Result<()> {
        while let Some(bytes) = self.until(b"\r\n\r\n")? {
            let head = match Head::parse(&bytes) {
                Ok(head) => head,
                Err(status) => return self.refuse(status),
            };
            if head.expects_continue && self.from == self.to && head.body != Body::None {
                self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            let body = match head.body {
                Body::None => None,
                Body::Length(n) => Some(self.skip(n)?),
                Body::Chunked => Some(self.skip_chunks()?),
            };
            match head.path() {
                "/events" => return self.tell(&head, service),
                "/ws" if head.upgrade => return self.lines(service),
                _ => {}
            }
            let answer = service.answer(&head, body).bytes(&head);
            self.stream.write_all(&answer)?;
            if !head.keep_alive {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Says its version every `delay_ms`, by default each second, until the client has enough.
    fn tell(mut self, head: &Head, service: &Service) -> io::Result<()> {
        let version = &service.config.version;
        let every = Duration::from_millis(head.delay_ms().unwrap_or(1000));
        let start = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Version: {version}\r\n\r\n");
        self.stream.write_all(start.as_bytes())?;
        loop {
            self.stream.write_all(format!("{:x}\r\n{version}\n\r\n", version.len() + 1).as_bytes())?;
            thread::sleep(every);
        }
    }

    /// Another protocol from here on, as a WebSocket is: each line is answered with the version.
    fn lines(mut self, service: &Service) -> io::Result<()> {
        let version = &service.config.version;
        let switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: lines\r\n";
        self.stream.write_all(format!("{switched}X-Version: {version}\r\n\r\n").as_bytes())?;
        self.stream.set_read_timeout(None)?;
        while self.until(b"\n")?.is_some() {
            self.stream.write_all(format!("{version}\n").as_bytes())?;
        }
        Ok(())
    }

    fn refuse(&mut self, status: &str) -> io::Result<()> {
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        self.stream.write_all(answer.as_bytes())
    }

    /// The bytes up to `end`, which is used up too; nothing when the client has closed in between.
    fn until(&mut self, end: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut searched = self.from;
        loop {
            let found = self.buffer[searched..self.to].windows(end.len()).position(|w| w == end);
            if let Some(at) = found {
                let at = searched + at;
                let bytes = self.buffer[self.from..at].to_vec();
                self.from = at + end.len();
                return Ok(Some(bytes));
            }
            // The end may be cut in two by this read and the next.
            let keep = (self.to - self.from).saturating_sub(end.len() - 1);
            if self.fill()? == 0 {
                return if self.from == self.to {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
            searched = self.from + keep;
        }
    }

    /// Reads more behind what is there; 0 is the client's end.
    fn fill(&mut self) -> io::Result<usize> {
        if self.from > 0 {
            self.buffer.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
        }
        if self.to == self.buffer.len() {
            self.refuse("431 Request Header Fields Too Large")?;
            return Err(io::ErrorKind::InvalidData.into());
        }
        loop {
            match self.stream.read(&mut self.buffer[self.to..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
                Ok(n) => {
                    self.to += n;
                    return Ok(n);
                }
            }
        }
    }

    /// Uses up `n` bytes of body, and says how many that were.
    fn skip(&mut self, n: u64) -> io::Result<u64> {
        let mut left = n;
        loop {
            let here = usize::try_from(left).unwrap_or(usize::MAX).min(self.to - self.from);
            self.from += here;
            left -= here as u64;
            if left == 0 {
                return Ok(n);
            }
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Uses up a chunked body with its trailers, and says how many bytes of data it had.
    fn skip_chunks(&mut self) -> io::Result<u64> {
        let mut total = 0u64;
        loop {
            let size = self.line()?;
            let digits = size.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(digits, 16).map_err(|_| io::ErrorKind::InvalidData)?;
            if size == 0 {
                while !self.line()?.is_empty() {}
                return Ok(total);
            }
            total = total.saturating_add(self.skip(size)?);
            if !self.line()?.is_empty() {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let bytes = self.until(b"\r\n")?.ok_or(io::ErrorKind::UnexpectedEof)?;
        String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

/// The calls that std does not have; all unsafe code is here.
mod sys {
    use std::ffi::c_int;
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    const SIGINT: c_int = 2;
    const SIGTERM: c_int = 15;

    unsafe extern "C" {
        fn signal(signum: c_int, handler: extern "C" fn(c_int)) -> usize;
        fn _exit(status: c_int) -> !;
        fn listen(socket: c_int, backlog: c_int) -> c_int;
    }

    extern "C" fn die(_: c_int) {
        // SAFETY: `_exit` is async-signal-safe; the kernel closes the sockets.
        unsafe { _exit(0) }
    }

    /// As PID 1 of a container the default action of these signals is to do nothing.
    pub fn die_on_signals() {
        // SAFETY: the handler has the type that `signal` asks for and only calls `_exit`.
        unsafe {
            signal(SIGTERM, die);
            signal(SIGINT, die);
        }
    }

    /// std listens with room for 128 waiting clients; a burst of more would cost them a second.
    pub fn deepen_backlog(listener: &TcpListener) {
        // SAFETY: the descriptor is open and listening; calling `listen` again only sets the backlog.
        // A failure leaves the old one, which works too.
        unsafe { listen(listener.as_raw_fd(), 4096) };
    }
}
