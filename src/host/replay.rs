//! A server for tests that stands in for a version of Consul or Nomad: it gives the answers this once gave
//! (tests/recorded), in order, each to exactly the request that it was the answer to.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, TcpStream};

use super::api::{Api, Server};
use super::secrets::Token;

/// A token that none of the recorded servers knew.
pub const UNKNOWN: &str = "00000000-0000-4000-8000-000000000099";

/// The token as it stands in the recordings.
pub fn secret(token: Token) -> String {
    format!("00000000-0000-4000-8000-{:012}", token as u8 + 1)
}

/// The folder of a version whose answers are recorded.
pub struct Recorded {
    server: Server,
    folder: PathBuf,
    pub version: String,
}

/// Every version that is recorded: each test runs with all of them.
pub fn versions(server: Server) -> Vec<Recorded> {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded");
    let mut versions = Vec::new();
    for entry in std::fs::read_dir(&folders).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap();
        if let Some((product, version)) = name.split_once('-')
            && product == server.unit
        {
            versions.push(Recorded { server, version: version.to_owned(), folder });
        }
    }
    assert!(!versions.is_empty(), "no recording of {} in {}", server.unit, folders.display());
    versions
}

/// Dropped at the end of a test, it fails the test if anything else was asked, or less.
pub struct Replay {
    server: Server,
    base: &'static str,
    state: Arc<Mutex<State>>,
}

struct State {
    expected: VecDeque<Exchange>,
    /// What should not have been asked.
    surprises: Vec<String>,
}

struct Exchange {
    request: Request,
    /// Of the answer.
    head: String,
    body: Vec<u8>,
}

/// What of a request has to be as it was recorded.
#[derive(Debug, PartialEq)]
struct Request {
    /// Method and path with its query.
    line: String,
    /// Header that carries a token.
    token: Option<(String, String)>,
    /// JSON; other bytes as a string, in base64.
    body: Option<Value>,
}

impl Recorded {
    pub async fn replay(&self, recordings: &[&str]) -> Replay {
        // Shown where the test fails.
        println!("{}: {recordings:?}", self.folder.display());
        let expected =
            recordings.iter().flat_map(|name| read(&self.folder.join(format!("{name}.http")))).collect();
        let state = Arc::new(Mutex::new(State { expected, surprises: Vec::new() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap()).leak();
        tokio::spawn(serve(listener, Arc::clone(&state)));
        Replay { server: self.server, base, state }
    }

    /// As [`Recorded::replay`], asked with one token.
    pub async fn asked(&self, recordings: &[&str], token: Token) -> (Replay, Api) {
        let replay = self.replay(recordings).await;
        let api = replay.api(Some(token));
        (replay, api)
    }
}

impl Replay {
    pub fn api(&self, token: Option<Token>) -> Api {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Api::replayed(self.server, self.base, token.map(secret)).unwrap()
    }

    /// The body of the request that is expected next.
    pub fn next_body(&self) -> Value {
        self.state.lock().unwrap().expected[0].request.body.clone().unwrap()
    }

    /// The same where it is no JSON.
    pub fn next_bytes(&self) -> Vec<u8> {
        BASE64.decode(self.next_body().as_str().unwrap()).unwrap()
    }

    /// The body of the answer that is given next.
    pub fn next_answer(&self) -> String {
        String::from_utf8(self.state.lock().unwrap().expected[0].body.clone()).unwrap()
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let state = self.state.lock().unwrap();
            assert!(state.surprises.is_empty(), "{}", state.surprises.join("\n"));
            let left: Vec<_> = state.expected.iter().map(|e| &e.request.line).collect();
            assert!(left.is_empty(), "never asked: {left:?}");
        }
    }
}

impl Request {
    fn parse(head: &str, body: &[u8]) -> Self {
        let (line, headers) = head.split_once('\n').unwrap_or((head, ""));
        let token = headers
            .lines()
            .filter_map(|header| header.trim().split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .find(|(name, _)| name.ends_with("-token"));
        let json = |body| serde_json::from_slice(body).unwrap_or_else(|_| BASE64.encode(body).into());
        Self {
            line: line.trim().trim_end_matches(" HTTP/1.1").to_owned(),
            token,
            body: (!body.is_empty()).then(|| json(body)),
        }
    }
}

/// A body as it was: what is no text stands in base64 there.
fn body(text: &str) -> Vec<u8> {
    match text.strip_prefix("base64:") {
        Some(encoded) => BASE64.decode(encoded.split_whitespace().collect::<String>()).unwrap(),
        None => text.into(),
    }
}

/// The exchanges in a file: request, a line with the time it took, answer.
fn read(path: &Path) -> Vec<Exchange> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let exchange = |text: &str| {
        let (asked, answered) = text.split_once("\n===== response after ").unwrap();
        let (head, sent) = asked.split_once("\n\n").unwrap();
        let request = Request::parse(head, &body(sent.trim()));
        let (head, given) = answered.split_once("\n\n").unwrap();
        // A newline at the end is the recording's own.
        let given = body(given.strip_suffix('\n').unwrap());
        let of_body = |header: &&str| header.starts_with("Content-Length") || header.starts_with("Transfer-");
        let head: Vec<&str> = head.lines().skip(1).filter(|header| !of_body(header)).collect();
        let head = head.join("\r\n");
        let length = given.len();
        let head = format!("{head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        Exchange { request, head, body: given }
    };
    text.split("===== next request\n").map(exchange).collect()
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufStream::new(stream);
        let request = receive(&mut stream).await;
        let answer = answer(&mut state.lock().unwrap(), request);
        stream.write_all(&answer).await.unwrap();
        stream.shutdown().await.unwrap();
    }
}

fn answer(state: &mut State, request: Request) -> Vec<u8> {
    if state.expected.front().is_some_and(|next| next.request == request) {
        let exchange = state.expected.pop_front().unwrap();
        return [exchange.head.into_bytes(), exchange.body].concat();
    }
    let expected = state.expected.front().map(|next| &next.request);
    let surprise = format!("asked {request:?}, expected {expected:?}");
    let length = surprise.len();
    let head = format!("HTTP/1.1 501 Not Implemented\r\nContent-Length: {length}\r\nConnection: close");
    let answer = format!("{head}\r\n\r\n{surprise}").into_bytes();
    state.surprises.push(surprise);
    answer
}

async fn receive(stream: &mut BufStream<TcpStream>) -> Request {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(stream.read_line(&mut head).await.unwrap(), 0, "a request without an end: {head}");
    }
    let length = head.lines().find_map(|header| header.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.unwrap();
    Request::parse(&head, &body)
}
