//! The files in which Consul and Nomad keep their state, and whether they can be read. A power cut may leave such a file
//! empty, cut short or full of other bytes; its agent then does not start, or begins as if it had never run.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{consul as consul_api, fs, nomad as nomad_api, paths};
use crate::bundle::manifest::{Engine, Product};
use crate::error::{At, Result};
use crate::host::config::Installed;

/// Of a bbolt file's two first pages (bbolt, `internal/common`: `Page` and `Meta`).
const PAGE_HEADER: usize = 16;
const BOLT_MAGIC: u32 = 0xED0C_DAED;
const BOLT_VERSION: u32 = 2;
/// Bytes of a meta that its checksum, which follows them, covers.
const BOLT_SUMMED: usize = 56;
/// A single server that was started knows in this time what it knew before.
const SETTLES: Duration = Duration::from_secs(8);
const EVERY: Duration = Duration::from_millis(250);
/// Names of the files by which Nomad's servers know a client again.
pub const NOMAD_IDS: [&str; 2] = ["client-id", "secret-id"];

/// A store that its agent cannot use.
#[derive(Debug, PartialEq)]
pub struct Broken {
    pub product: Product,
    /// The file.
    pub path: PathBuf,
    pub why: String,
}

impl Broken {
    pub fn what(&self) -> String {
        format!("{} of {} {}", self.path.display(), self.product, self.why)
    }

    pub fn cure(&self) -> String {
        "zd repair begins it anew from what zd knows, while the services serve".into()
    }

    /// Only the client of Nomad wrote it. Its server has all that is needed to write it again.
    pub fn is_of_nomads_client(&self) -> bool {
        self.path.starts_with(nomad_client())
    }
}

pub fn nomad_client() -> PathBuf {
    Path::new(paths::NOMAD_DATA).join("client")
}

/// Every store of the installed engine that cannot be read.
pub fn broken(installed: &Installed) -> Result<Vec<Broken>> {
    match installed.lock.engine {
        Engine::Docker => Ok(Vec::new()),
        Engine::Nomad => {
            let mut found = consul(Path::new(paths::CONSUL_DATA))?;
            let data = Path::new(paths::NOMAD_DATA);
            found.extend(nomad(data)?);
            found.extend(lost_keys(data, installed)?);
            Ok(found)
        }
    }
}

/// As [`broken`], and the stores that their agents have begun anew by themselves, without what zd had put there.
pub async fn diagnose(installed: &Installed) -> Result<Vec<Broken>> {
    let mut found = broken(installed)?;
    if installed.lock.engine == Engine::Docker {
        return Ok(found);
    }
    let consul = Path::new(paths::CONSUL_DATA).join("raft/raft.db");
    let nomad = Path::new(paths::NOMAD_DATA).join("server/raft/raft.db");
    for (product, path, api) in
        [(Product::Consul, consul, consul_api::zd()), (Product::Nomad, nomad, nomad_api::connect())]
    {
        // Without a token there was never an install that came so far.
        let (false, Ok(api)) = (found.iter().any(|b| b.product == product), api) else { continue };
        let leads = settled(async || api.has_leader().await).await;
        let knows = settled(async || match product {
            Product::Consul => consul_api::knows_tokens().await,
            _ => nomad_api::knows_token().await,
        });
        let why = match leads {
            Ok(false) => "elects no leader",
            Ok(true) if matches!(knows.await, Ok(false)) => {
                "was begun anew: it does not know the tokens of zd"
            }
            _ => continue,
        };
        found.push(Broken { product, path, why: why.into() });
    }
    Ok(found)
}

/// The answer of a server that may just have been started: false counts only after the time that it takes to elect itself
/// and to replay its log.
async fn settled(mut ask: impl AsyncFnMut() -> Result<bool>) -> Result<bool> {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(false) if start.elapsed() < SETTLES => tokio::time::sleep(EVERY).await,
            other => return other,
        }
    }
}

pub fn consul(data: &Path) -> Result<Vec<Broken>> {
    let mut found = Found { product: Product::Consul, broken: Vec::new() };
    let raft = data.join("raft/raft.db");
    found.bolt(&raft)?;
    for json in ["server_metadata.json", "serf/local.keyring", "acl-tokens.json"] {
        found.json(&data.join(json))?;
    }
    // Raft knows the server by its id: with another one there is never a leader.
    if !is_empty(&raft)? {
        found.id(&data.join("node-id"))?;
    }
    Ok(found.broken)
}

/// Beside what cannot be read: a server or a node that begins anew, beside a client that remembers its allocations. Such
/// a server has never heard of them, and such a client stops all of them.
pub fn nomad(data: &Path) -> Result<Vec<Broken>> {
    // Before zd has seen it run there is nothing that it could stop.
    nomad_of(data, Path::new(paths::NOMAD_IDS).is_dir())
}

fn nomad_of(data: &Path, was_set_up: bool) -> Result<Vec<Broken>> {
    let mut found = Found { product: Product::Nomad, broken: Vec::new() };
    let (raft, client) = (data.join("server/raft/raft.db"), data.join("client/state.db"));
    found.bolt(&raft)?;
    found.bolt(&client)?;
    for key in std::fs::read_dir(data.join("server/keystore")).into_iter().flatten() {
        found.json(&key.at(data)?.path())?;
    }
    if was_set_up && !is_empty(&client)? {
        if is_empty(&raft)? {
            found.push(&raft, "is empty or gone".into());
        }
        for id in NOMAD_IDS {
            found.id(&data.join("client").join(id))?;
        }
    }
    Ok(found.broken)
}

/// Nomad places nothing without its root key. From 1.4 to 1.8 that is a file; later it is in the store of Raft.
fn lost_keys(data: &Path, installed: &Installed) -> Result<Option<Broken>> {
    let nomad = installed.lock.release(Product::Nomad).map(|release| release.version.numbers());
    let in_files = nomad.is_some_and(|(major, minor, _)| major == 1 && (4..=8).contains(&minor));
    let keys = data.join("server/keystore");
    let any = std::fs::read_dir(&keys).is_ok_and(|mut keys| keys.next().is_some());
    if !in_files || any || is_empty(&data.join("server/raft/raft.db"))? {
        return Ok(None);
    }
    Ok(Some(Broken { product: Product::Nomad, path: keys, why: "is empty or gone".into() }))
}

struct Found {
    product: Product,
    broken: Vec<Broken>,
}

impl Found {
    fn push(&mut self, path: &Path, why: String) {
        self.broken.push(Broken { product: self.product, path: path.into(), why });
    }

    /// A file of bbolt. One that is empty or gone is begun anew by its agent.
    fn bolt(&mut self, path: &Path) -> Result<()> {
        if !is_empty(path)?
            && let Some(why) = bolt_damage(path)?
        {
            self.push(path, why.into());
        }
        Ok(())
    }

    /// A file that is JSON where it is there.
    fn json(&mut self, path: &Path) -> Result<()> {
        if path.exists() {
            let bytes = fs::read(path)?;
            if serde_json::from_slice::<Value>(&bytes).is_err() {
                self.push(path, format!("is no JSON ({} bytes)", bytes.len()));
            }
        }
        Ok(())
    }

    /// A file that holds the UUID of a node.
    fn id(&mut self, path: &Path) -> Result<()> {
        if !path.exists() || !is_id(&fs::read(path)?) {
            self.push(path, "holds no node id".into());
        }
        Ok(())
    }
}

/// 8-4-4-4-12 hexadecimal digits (RFC 9562).
pub fn is_id(bytes: &[u8]) -> bool {
    let text = bytes.trim_ascii();
    let dash = |at: usize| [8, 13, 18, 23].contains(&at);
    text.len() == 36
        && text.iter().enumerate().all(|(at, b)| if dash(at) { *b == b'-' } else { b.is_ascii_hexdigit() })
}

fn is_empty(path: &Path) -> Result<bool> {
    match path.metadata() {
        Ok(meta) => Ok(meta.len() == 0),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e).at(path),
    }
}

/// What is wrong with a bbolt file, as far as its two metas and its size tell: one meta at least must be whole, and the
/// pages that it counts must be there. bbolt itself checks no more when it opens a file.
fn bolt_damage(path: &Path) -> Result<Option<&'static str>> {
    let file = fs::open(path)?;
    let size = file.metadata().at(path)?.len();
    let mut start = Vec::new();
    // Two pages of the largest size that a page has.
    file.take(2 << 16).read_to_end(&mut start).at(path)?;
    let metas = [4096, 8192, 16384, 65536].into_iter().chain([0]).filter_map(|at| Meta::read(&start, at));
    Ok(match metas.max_by_key(|meta| meta.transaction) {
        None => Some("is no database"),
        Some(meta) if meta.pages.saturating_mul(meta.page_size) > size => Some("is cut short"),
        Some(_) => None,
    })
}

struct Meta {
    page_size: u64,
    /// Pages that are in use, from the file's first byte on.
    pages: u64,
    transaction: u64,
}

impl Meta {
    /// The meta in the page at this offset, if it is whole. Integers are in the byte order of the machine.
    fn read(bytes: &[u8], at: usize) -> Option<Self> {
        let meta = bytes.get(at + PAGE_HEADER..at + PAGE_HEADER + BOLT_SUMMED + 8)?;
        let u32_at = |at: usize| Some(u32::from_ne_bytes(meta.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_ne_bytes(meta.get(at..at + 8)?.try_into().ok()?));
        let whole = u32_at(0)? == BOLT_MAGIC
            && u32_at(4)? == BOLT_VERSION
            && u64_at(BOLT_SUMMED)? == fnv1a(&meta[..BOLT_SUMMED]);
        let meta = Self { page_size: u32_at(8)?.into(), pages: u64_at(40)?, transaction: u64_at(48)? };
        whole.then_some(meta)
    }
}

/// FNV-1a of 64 bits (RFC 9923), the checksum of a meta.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two empty pages behind the metas, as bbolt writes a new file.
    fn bolt() -> Vec<u8> {
        let mut file = vec![0; 4 * 4096];
        for (page, transaction) in [(0_usize, 0_u64), (1, 1)] {
            let mut meta = Vec::new();
            meta.extend(BOLT_MAGIC.to_ne_bytes());
            meta.extend(BOLT_VERSION.to_ne_bytes());
            meta.extend(4096_u32.to_ne_bytes());
            meta.extend(0_u32.to_ne_bytes());
            for number in [3, 0, 2, 4, transaction] {
                meta.extend(u64::to_ne_bytes(number));
            }
            meta.extend(fnv1a(&meta).to_ne_bytes());
            let at = page * 4096 + PAGE_HEADER;
            file[at..at + meta.len()].copy_from_slice(&meta);
        }
        file
    }

    fn write(path: &Path, bytes: &[u8]) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    const ID: &[u8] = b"2f8a2c1e-7a35-4f53-9d2a-0d9ad12f8a2c";

    fn of_nomad() -> tempfile::TempDir {
        let data = tempfile::tempdir().unwrap();
        for store in ["server/raft/raft.db", "client/state.db"] {
            write(&data.path().join(store), &bolt());
        }
        for id in NOMAD_IDS {
            write(&data.path().join("client").join(id), ID);
        }
        write(&data.path().join("server/keystore/a.nks.json"), b"{}");
        data
    }

    fn names(found: Vec<Broken>, data: &Path) -> Vec<String> {
        found.iter().map(|b| format!("{} {}", b.path.strip_prefix(data).unwrap().display(), b.why)).collect()
    }

    #[test]
    fn a_whole_store_is_not_broken() {
        let data = of_nomad();
        assert_eq!(nomad_of(data.path(), true).unwrap(), []);
        // Before its first start there is nothing.
        assert_eq!(nomad_of(Path::new("/nowhere"), true).unwrap(), []);
        assert_eq!(consul(Path::new("/nowhere")).unwrap(), []);
    }

    #[test]
    fn a_damaged_database_is_named() {
        for (bytes, why) in [
            (vec![0x5a; 40000], "is no database"),
            (bolt()[..60].to_vec(), "is no database"),
            (bolt()[..8192].to_vec(), "is cut short"),
        ] {
            for store in ["server/raft/raft.db", "client/state.db"] {
                let data = of_nomad();
                write(&data.path().join(store), &bytes);
                assert_eq!(
                    names(nomad_of(data.path(), true).unwrap(), data.path()),
                    [format!("{store} {why}")]
                );
            }
        }
        // One meta is enough.
        let data = of_nomad();
        let mut half = bolt();
        half[..4096].fill(0);
        write(&data.path().join("client/state.db"), &half);
        assert_eq!(nomad_of(data.path(), true).unwrap(), []);
    }

    #[test]
    fn a_client_does_not_meet_a_server_or_a_name_that_begins_anew() {
        let data = of_nomad();
        std::fs::remove_file(data.path().join("server/raft/raft.db")).unwrap();
        write(&data.path().join("client/client-id"), b"");
        let found = names(nomad_of(data.path(), true).unwrap(), data.path());
        assert_eq!(found, ["server/raft/raft.db is empty or gone", "client/client-id holds no node id"]);
        // One that zd has never seen run has nothing to stop.
        assert_eq!(nomad_of(data.path(), false).unwrap(), []);
        // Without its own memory it takes what the server says.
        write(&data.path().join("client/state.db"), b"");
        assert_eq!(nomad_of(data.path(), true).unwrap(), []);
    }

    #[test]
    fn files_of_consul() {
        let data = tempfile::tempdir().unwrap();
        let at = |name: &str| data.path().join(name);
        write(&at("raft/raft.db"), &bolt());
        write(&at("node-id"), ID);
        write(&at("server_metadata.json"), b"{\"last_seen_unix\":1}");
        assert_eq!(consul(data.path()).unwrap(), []);
        write(&at("server_metadata.json"), b"");
        write(&at("serf/local.keyring"), b"\0\0\0");
        write(&at("node-id"), b"\n");
        let found = names(consul(data.path()).unwrap(), data.path());
        let expected = [
            "server_metadata.json is no JSON (0 bytes)",
            "serf/local.keyring is no JSON (3 bytes)",
            "node-id holds no node id",
        ];
        assert_eq!(found, expected);
    }
}
