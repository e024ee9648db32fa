//! A file from a URL with its SHA-256: resumed after a break, retried, cached, checked.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::{StatusCode, header};

use super::cache::{Cache, hash_file};
use crate::error::{At, Code, Error, Result};
use crate::ids::Digest;
use crate::ui::Ui;

const TRIES: u32 = 5;

/// Fetches into the cache unless it is there; returns size and path.
pub async fn fetch(
    name: &str,
    url: &str,
    sum: &Digest,
    cache: &Cache,
    ui: &Ui,
) -> Result<(u64, std::path::PathBuf)> {
    if let Some((path, size)) = cache.get(sum)? {
        return Ok((size, path));
    }
    let partial = cache.dir("partial")?.join(sum.hex());
    let client = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(20))
        .read_timeout(Duration::from_secs(60))
        .build()
        .map_err(|e| source(name, url, &chain(&e)))?;
    let mut wait = Duration::from_millis(300);
    for attempt in 1.. {
        match attempt_once(name, &client, url, &partial, ui).await {
            Ok(()) => break,
            Err(Failure::Final(e)) => return Err(e),
            Err(Failure::Broken(why)) if attempt < TRIES => {
                ui.warn(format!("{name}: {why}; going on in {:.1} s", wait.as_secs_f32()));
                tokio::time::sleep(wait).await;
                wait *= 3;
            }
            Err(Failure::Broken(why)) => return Err(source(name, url, &format!("{why}, {TRIES} times"))),
        }
    }
    let (found, _) = hash_file(&partial)?;
    if found != *sum {
        fs::remove_file(&partial).at(&partial)?;
        return Err(Code::Source
            .err(format!("{name}: {url} has sha256 {}, the manifest says {}", found.hex(), sum.hex()))
            .cure("find out which is right before you change the manifest: the file may have been altered"));
    }
    let mut temp = cache.temp()?;
    std::io::copy(&mut fs::File::open(&partial).at(&partial)?, &mut temp).at(&partial)?;
    let (_, size, path) = cache.keep(temp)?;
    fs::remove_file(&partial).at(&partial)?;
    Ok((size, path))
}

enum Failure {
    /// The connection broke or the server is busy: worth another try.
    Broken(String),
    Final(Error),
}

async fn attempt_once(
    name: &str,
    client: &reqwest::Client,
    url: &str,
    partial: &std::path::Path,
    ui: &Ui,
) -> Result<(), Failure> {
    let broken = |e: reqwest::Error| Failure::Broken(chain(&e));
    let local = |e: std::io::Error| Failure::Final(crate::error::io(partial, e));
    let have = fs::metadata(partial).map_or(0, |m| m.len());
    let mut request = client.get(url);
    if have > 0 {
        request = request.header(header::RANGE, format!("bytes={have}-"));
    }
    let answer = request.send().await.map_err(broken)?;
    let resumed = match answer.status() {
        StatusCode::PARTIAL_CONTENT => true,
        StatusCode::OK => false,
        // Everything was there already, or the file changed: the sum decides.
        StatusCode::RANGE_NOT_SATISFIABLE => return Ok(()),
        s if s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS => {
            return Err(Failure::Broken(format!("the server answers {s}")));
        }
        s => return Err(Failure::Final(source(name, url, &format!("the server answers {s}")))),
    };
    let mut options = OpenOptions::new();
    let options = options.create(true).write(true).append(resumed).truncate(!resumed);
    let mut file = options.open(partial).map_err(local)?;
    let start = if resumed { have } else { 0 };
    let bar = ui.bytes(name, answer.content_length().map_or(0, |n| n + start));
    bar.set_position(start);
    let mut body = answer.bytes_stream();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(broken)?;
        file.write_all(&chunk).map_err(local)?;
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

fn source(name: &str, url: &str, why: &str) -> Error {
    Code::Source
        .err(format!("{name}: {url}: {why}"))
        .cure("check the URL in the manifest and this machine's network; what was fetched is kept")
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
