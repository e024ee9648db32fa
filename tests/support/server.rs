//! A web server that fails on purpose, and remembers what it was asked.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// How one request is answered. When the list is used up, all is `Good`.
#[derive(Clone, Copy)]
pub enum Answer {
    /// The file, or the part that Range asks for.
    Good,
    /// Announces it all, sends so many bytes, hangs up.
    Break(usize),
    /// All of it, whatever Range says.
    Deaf,
    Status(u16),
}

#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub range: Option<String>,
    /// Bytes of the file that were sent.
    pub sent: usize,
}

pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    /// Serves one file.
    pub fn start(file: Vec<u8>, answers: &[Answer]) -> Self {
        Self::tree(BTreeMap::from([("recipe.bin".into(), file)]), answers)
    }

    /// Serves files by their paths; any other is a 404.
    pub fn tree(files: BTreeMap<String, Vec<u8>>, answers: &[Answer]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, answers) = (seen.clone(), answers.to_vec());
        // Ends with the test program.
        std::thread::spawn(move || {
            for (i, stream) in listener.incoming().enumerate() {
                serve(stream.unwrap(), &files, answers.get(i).copied().unwrap_or(Answer::Good), &log);
            }
        });
        Self { address, seen }
    }

    pub fn origin(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn url(&self) -> String {
        format!("{}/recipe.bin", self.origin())
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, answer: Answer, log: &Mutex<Vec<Seen>>) {
    let (mut path, mut range) = (String::new(), None);
    for line in BufReader::new(&stream).lines() {
        let line = line.unwrap();
        if let Some(rest) = line.strip_prefix("GET /") {
            path = rest.split(' ').next().unwrap_or_default().to_owned();
        }
        let line = line.to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("range:") {
            range = Some(value.trim().to_owned());
        }
        if line.is_empty() {
            break;
        }
    }
    let found = files.get(&path);
    let (file, answer) = found.map_or((&[][..], Answer::Status(404)), |file| (file, answer));
    let start = range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let (status, from, most) = match (answer, start) {
        (Answer::Status(code), _) => (code, file.len(), 0),
        (Answer::Good, Some(n)) if n >= file.len() => (416, file.len(), 0),
        (Answer::Good, Some(n)) => (206, n, usize::MAX),
        (Answer::Good | Answer::Deaf, _) => (200, 0, usize::MAX),
        (Answer::Break(n), _) => (200, 0, n),
    };
    let rest = &file[from..];
    let body = &rest[..rest.len().min(most)];
    log.lock().unwrap().push(Seen { path, range, sent: body.len() });
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n", rest.len());
    let part = format!("Content-Range: bytes {from}-{}/{}\r\n", file.len() - 1, file.len());
    let part = if status == 206 { part.as_str() } else { "" };
    // Whoever hung up early has what it wanted.
    let _ = stream.write_all(format!("{head}{part}\r\n").as_bytes()).and_then(|()| stream.write_all(body));
}
