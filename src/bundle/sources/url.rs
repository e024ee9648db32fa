//! Files from a URL or a mirror. A large one comes with its SHA-256: resumed after a break, retried,
//! cached, checked. A small one is bounded and read whole.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use reqwest::{StatusCode, Url, header};

use super::cache::{Cache, Partial, hash};
use super::place::Place;
use crate::error::{At, Code, Error, Result, io};
use crate::ids::Digest;
use crate::ui::Ui;

const TRIES: u32 = 5;
/// How long a server may take to answer, and to go on.
pub const CONNECT: Duration = Duration::from_secs(20);
pub const SILENCE: Duration = Duration::from_secs(60);

/// A file that must have this sum, for `says` (the manifest, a list of sums) says so.
pub struct Wanted<'a> {
    pub name: &'a str,
    pub sum: &'a Digest,
    pub says: &'a str,
}

/// What a server gives of a file: all from `start` on, in `len` bytes where it says so.
pub struct Rest {
    pub start: u64,
    pub len: Option<u64>,
    pub chunks: BoxStream<'static, Result<Bytes, Failure>>,
}

/// Fetches into the cache unless it is there; one in a folder stays where it is. Returns size and path.
pub async fn fetch(wanted: Wanted<'_>, place: &Place, cache: &Cache, ui: &Ui) -> Result<(u64, PathBuf)> {
    let name = wanted.name;
    match place {
        Place::Server(url) => {
            let client = client(name, place)?;
            download(wanted, place, cache, ui, async |have| request(name, &client, url, have).await).await
        }
        Place::Folder(path) => {
            if let Some((path, size)) = cache.get(wanted.sum)? {
                return Ok((size, path));
            }
            let file = File::open(path).map_err(|e| missing(name, place, e))?;
            let bar = ui.bytes(name, file.metadata().map_or(0, |m| m.len()));
            let (found, size) = hash(bar.wrap_read(file)).at(path)?;
            bar.finish_and_clear();
            wanted.check(place, &found)?;
            Ok((size, path.clone()))
        }
    }
}

/// Fetches into the cache unless it is there. `request` asks for what follows on so many bytes; it answers None where
/// nothing does.
pub async fn download(
    wanted: Wanted<'_>,
    place: &dyn Display,
    cache: &Cache,
    ui: &Ui,
    request: impl AsyncFn(u64) -> Result<Option<Rest>, Failure>,
) -> Result<(u64, PathBuf)> {
    let Wanted { name, sum, .. } = wanted;
    if let Some((path, size)) = cache.get(sum)? {
        return Ok((size, path));
    }
    let mut partial = cache.partial(sum)?;
    persevere(name, place, ui, async || {
        let Some(rest) = request(partial.len()).await? else { return Ok(()) };
        receive(name, rest, &mut partial, ui).await
    })
    .await?;
    let (file, found, size) = partial.finish();
    if let Err(e) = wanted.check(place, &found) {
        fs::remove_file(&file).at(&file)?;
        return Err(e);
    }
    Ok((size, cache.adopt(&file, &found)?))
}

impl Wanted<'_> {
    fn check(&self, place: &dyn Display, found: &Digest) -> Result<()> {
        if found == self.sum {
            return Ok(());
        }
        let (name, sum, says) = (self.name, self.sum.hex(), self.says);
        Err(Code::Source.err(format!("{name}: {place} has sha256 {}, {says} says {sum}", found.hex())).cure(
            format!("find out which is right before you change {says}: the file may have been altered"),
        ))
    }
}

/// A file of at most `most` bytes; None where it is not there.
pub async fn small(name: &str, place: &Place, most: u64, ui: &Ui) -> Result<Option<Vec<u8>>> {
    let bytes = match place {
        Place::Folder(path) => match File::open(path) {
            Err(e) if is_missing(&e) => return Ok(None),
            file => {
                let mut bytes = Vec::new();
                file.and_then(|f| f.take(most + 1).read_to_end(&mut bytes)).at(path)?;
                bytes
            }
        },
        Place::Server(url) => {
            let client = client(name, place)?;
            let got = persevere(name, place, ui, async || attempt_small(name, &client, url, most).await);
            match got.await? {
                None => return Ok(None),
                Some(bytes) => bytes,
            }
        }
    };
    if bytes.len() as u64 > most {
        return Err(source(name, place, &format!("expected at most {most} bytes")));
    }
    Ok(Some(bytes))
}

fn client(name: &str, place: &Place) -> Result<reqwest::Client> {
    reqwest::Client::builder()
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .build()
        .map_err(|e| source(name, place, &chain(&e)))
}

pub enum Failure {
    /// The connection broke or the server is busy: worth another try.
    Broken(String),
    Final(Error),
}

/// Tries again, with longer and longer waits, until it is done or will never be.
pub async fn persevere<T>(
    name: &str,
    place: &dyn Display,
    ui: &Ui,
    mut attempt: impl AsyncFnMut() -> Result<T, Failure>,
) -> Result<T> {
    let mut wait = Duration::from_millis(300);
    let mut tries = 1;
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(Failure::Final(e)) => return Err(e),
            Err(Failure::Broken(why)) if tries < TRIES => {
                ui.warn(format!("{name}: {why}; going on in {:.1} s", wait.as_secs_f32()));
                tokio::time::sleep(wait).await;
                wait *= 3;
                tries += 1;
            }
            Err(Failure::Broken(why)) => return Err(source(name, place, &format!("{why}, {TRIES} times"))),
        }
    }
}

async fn request(
    name: &str,
    client: &reqwest::Client,
    url: &Url,
    have: u64,
) -> Result<Option<Rest>, Failure> {
    let mut request = client.get(url.clone());
    if have > 0 {
        request = request.header(header::RANGE, format!("bytes={have}-"));
    }
    let answer = request.send().await.map_err(broken)?;
    let start = match answer.status() {
        StatusCode::PARTIAL_CONTENT => have,
        StatusCode::OK => 0,
        // Everything was there already, or the file changed: the sum decides.
        StatusCode::RANGE_NOT_SATISFIABLE => return Ok(None),
        status => return Err(refused(name, url, status)),
    };
    let len = answer.content_length();
    Ok(Some(Rest { start, len, chunks: answer.bytes_stream().map_err(broken).boxed() }))
}

async fn receive(name: &str, mut rest: Rest, partial: &mut Partial, ui: &Ui) -> Result<(), Failure> {
    if rest.start == 0 {
        partial.restart().map_err(Failure::Final)?;
    }
    let bar = ui.bytes(name, rest.len.map_or(0, |n| n + rest.start));
    bar.set_position(rest.start);
    while let Some(chunk) = rest.chunks.next().await {
        let chunk = chunk?;
        partial.add(&chunk).map_err(Failure::Final)?;
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Stops reading as soon as there is more than `most`.
async fn attempt_small(
    name: &str,
    client: &reqwest::Client,
    url: &Url,
    most: u64,
) -> Result<Option<Vec<u8>>, Failure> {
    let answer = client.get(url.clone()).send().await.map_err(broken)?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Ok(None),
        status => return Err(refused(name, url, status)),
    }
    let mut bytes = Vec::new();
    let mut body = answer.bytes_stream();
    while let Some(chunk) = body.next().await {
        bytes.extend_from_slice(&chunk.map_err(broken)?);
        if bytes.len() as u64 > most {
            break;
        }
    }
    Ok(Some(bytes))
}

fn broken(e: reqwest::Error) -> Failure {
    Failure::Broken(chain(&e))
}

fn refused(name: &str, url: &Url, status: StatusCode) -> Failure {
    let why = format!("the server answers {status}");
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return Failure::Broken(why);
    }
    Failure::Final(source(name, &Place::Server(url.clone()), &why))
}

fn source(name: &str, place: &dyn Display, why: &str) -> Error {
    Code::Source
        .err(format!("{name}: {place}: {why}"))
        .cure("check the address (manifest, --mirror) and this machine's network; what was fetched is kept")
}

/// A file stands where a folder of the path should be: also missing.
fn is_missing(e: &std::io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn missing(name: &str, place: &Place, e: std::io::Error) -> Error {
    if !is_missing(&e) {
        return io(place.to_string(), e);
    }
    Code::Source
        .err(format!("{name}: {place}: there is no such file"))
        .cure("put it there, or correct --mirror: a mirror has each file at the path of its URL")
}

/// A library's error with its causes, which its own text leaves out.
pub fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        text.push_str(&format!(": {e}"));
        next = e.source();
    }
    text
}
