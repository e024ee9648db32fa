//! A server for tests that stands in for Consul or Nomad: it gives the answers they once gave
//! (tests/recorded), in order, each to exactly the request that it was the answer to.

use std::collections::VecDeque;
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

/// Dropped at the end of a test, it fails the test if anything else was asked, or less.
pub struct Replay {
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
    answer: Vec<u8>,
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

impl Replay {
    pub async fn of(recordings: &[&str]) -> Self {
        let expected = recordings.iter().flat_map(|name| read(name)).collect();
        let state = Arc::new(Mutex::new(State { expected, surprises: Vec::new() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap()).leak();
        tokio::spawn(serve(listener, Arc::clone(&state)));
        Self { base, state }
    }

    pub fn api(&self, server: Server, token: Option<Token>) -> Api {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Api::replayed(server, self.base, token.map(secret)).unwrap()
    }

    /// The body of the request that is expected next.
    pub fn next_body(&self) -> Value {
        self.state.lock().unwrap().expected[0].request.body.clone().unwrap()
    }

    /// The same where it is no JSON.
    pub fn next_bytes(&self) -> Vec<u8> {
        BASE64.decode(self.next_body().as_str().unwrap()).unwrap()
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
fn read(name: &str) -> Vec<Exchange> {
    let path = format!("{}/tests/recorded/{name}.http", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
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
        Exchange { request, answer: [head.into_bytes(), given].concat() }
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
        return state.expected.pop_front().unwrap().answer;
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
