//! What the tests that drive zd from outside share; each test program uses a part of it.
#![allow(dead_code)]

pub mod forge;
pub mod image;
pub mod openpgp;
pub mod registry;
pub mod server;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use assert_cmd::Command;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

pub const ZD: &str = env!("CARGO_BIN_EXE_zd");

/// Exit code and stable name, as README's table has them.
pub type Code = (i32, &'static str);
pub const USAGE: Code = (2, "usage");
pub const MANIFEST: Code = (3, "manifest");
pub const SOURCE: Code = (3, "source");
pub const BUNDLE: Code = (4, "bundle");
pub const SIGNATURE: Code = (4, "signature");
pub const TARGET: Code = (4, "target");
pub const PREFLIGHT: Code = (5, "preflight");
pub const IO: Code = (6, "io");
pub const DISK_FULL: Code = (6, "disk-full");
pub const NOT_INSTALLED: Code = (10, "not-installed");

/// A program that sees nothing of this machine's settings (proxies, caches, terminals).
pub fn isolated(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.timeout(Duration::from_secs(120));
    command
}

pub fn zd(args: &[&str]) -> Outcome {
    Outcome::of(isolated(ZD).args(args))
}

/// What a run of zd left.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    pub fn of(command: &mut Command) -> Self {
        let out = command.output().expect("the program starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
        Self { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
    }

    #[track_caller]
    pub fn good(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// It was refused with this code, and the texts are said.
    #[track_caller]
    pub fn refused(self, code: Code, texts: &[&str]) -> Self {
        if let Some(wrong) = self.not_refused(code, texts) {
            panic!("{wrong}");
        }
        self
    }

    /// What is wrong about the refusal, for tables that show all that is wrong at once.
    pub fn not_refused(&self, (exit, name): Code, texts: &[&str]) -> Option<String> {
        let mark = format!("error[{name}]: ");
        let silent = [&[mark.as_str()], texts].concat().into_iter().find(|text| !self.stderr.contains(text));
        // Bytes of a file somebody else made must not reach the terminal as they are.
        let raw = self.stderr.chars().any(|c| (c.is_control() && c != '\n') || c == '\u{fffd}');
        let why = match silent {
            _ if self.code != Some(exit) => format!("exit code {:?}, expected {exit}", self.code),
            Some(text) => format!("{text:?} is not said"),
            None if raw => "raw bytes are shown".into(),
            None => return None,
        };
        Some(format!("{why}:\n{}{}", self.stdout, self.stderr))
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("stdout is no JSON: {e}\n{}", self.stdout))
    }
}

/// A folder with a key pair, a cache and what a test puts there; zd runs in it.
pub struct Site {
    dir: TempDir,
}

/// The head of every manifest here; what is packed follows.
pub const HEAD: &str =
    "schema = 1\nname = \"demo\"\nversion = \"1\"\n[target]\nos = \"debian\"\nrelease = \"12\"\n";

impl Site {
    pub fn new() -> Self {
        let site = Self { dir: TempDir::with_prefix("zd-test-").expect("a temporary folder") };
        // Tests run zd as nobody too.
        fs::set_permissions(site.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        site.zd(&["keygen"]).good();
        site
    }

    /// With the bundle `stick/demo-1.zd.tar`: a docker-archive image, an OCI layout, three files.
    pub fn packed() -> Self {
        let site = Self::new();
        site.sources();
        site.pack(SOURCES, &[]).good();
        site
    }

    /// What `SOURCES` names.
    pub fn sources(&self) {
        image::docker_archive(&self.path("hello.tar"), "amd64", &[image::layer(1, 9000)]);
        image::oci_layout(&self.path("layout"), "world:v2", "amd64", &[image::gzip(&image::layer(2, 5000))]);
        self.write("recipe.bin", &noise(3, 20_000));
        self.write("block.bin", &noise(4, 512));
        self.write("empty.bin", b"");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a temporary path is UTF-8").to_owned()
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    pub fn bundle(&self) -> PathBuf {
        self.path("stick/demo-1.zd.tar")
    }

    pub fn command(&self) -> Command {
        let mut command = isolated(ZD);
        command.current_dir(self.dir.path()).env("ZD_CACHE_DIR", self.path("cache"));
        command
    }

    pub fn zd(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command().args(args))
    }

    /// Packs `HEAD` and `body` into the folder `stick`.
    pub fn pack(&self, body: &str, more: &[&str]) -> Outcome {
        self.write("demo.toml", format!("{HEAD}{body}").as_bytes());
        self.zd(&[&["pack", "demo.toml", "--out", "stick"], more].concat())
    }

    /// Verifies a file with this site's key.
    pub fn verify(&self, bundle: &Path) -> Outcome {
        self.zd(&["verify", bundle.to_str().unwrap(), "--key", "zd.pub"])
    }

    /// `zd verify` of each altered copy, on two threads; returns what was not refused with exit code 4.
    pub fn not_refused<T: Sync>(
        &self,
        cases: &[T],
        alter: impl Fn(&T, &mut Vec<u8>) -> String + Sync,
    ) -> Vec<String> {
        let good = fs::read(self.bundle()).unwrap();
        let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (good, next, wrong, alter) = (&good, &next, &wrong, &alter);
                scope.spawn(move || {
                    let name = format!("altered-{thread}.zd.tar");
                    while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let mut bytes = good.clone();
                        let what = alter(case, &mut bytes);
                        let path = self.write(&name, &bytes);
                        let mut zd = std::process::Command::new(ZD);
                        zd.arg("verify").arg(path).arg("--key").arg(self.path("zd.pub")).stdin(Stdio::null());
                        let out = zd.output().unwrap();
                        let said = String::from_utf8_lossy(&out.stderr);
                        let named = said.contains("error[bundle]: ") || said.contains("error[signature]: ");
                        if out.status.code() != Some(4) || !named || !out.stdout.is_empty() {
                            wrong.lock().unwrap().push(format!("{what}: {} {said}", out.status));
                        }
                    }
                });
            }
        });
        wrong.into_inner().unwrap()
    }

    pub fn lock(&self) -> Value {
        self.zd(&["inspect", "stick/demo-1.zd.tar", "--json"]).good().json()["lock"].take()
    }

    /// Every file and folder here with what would change if it were touched.
    pub fn snapshot(&self) -> Snapshot {
        snapshot(self.dir.path())
    }
}

pub const SOURCES: &str = r#"
[[image]]
ref = "hello:v1"
docker-archive = "hello.tar"
[[image]]
ref = "world:v2"
oci = "layout"
[[file]]
name = "recipe.bin"
path = "recipe.bin"
[[file]]
name = "block.bin"
path = "block.bin"
[[file]]
name = "empty.bin"
path = "empty.bin"
"#;

pub type Snapshot = BTreeMap<PathBuf, (u64, i64, i64, u32)>;

/// A folder that is not there has nothing in it.
pub fn snapshot(root: &Path) -> Snapshot {
    let mut found = Snapshot::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        found.insert(path, (meta.len(), meta.mtime(), meta.mtime_nsec(), meta.mode()));
    }
    found
}

/// What zd could change on this machine, had it not been told to keep its hands off.
pub fn host_snapshot() -> Vec<Snapshot> {
    ["/opt/zd", "/etc/zd", "/var/lib/zd", "/var/log/zd", "/run/zd"].map(|p| snapshot(Path::new(p))).into()
}

/// This machine as `--target` takes it, where zd knows packages for it.
pub fn this_host() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let field = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    let (os, release) = (field("ID")?, field("VERSION_ID")?);
    let known = ["debian-11", "debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04"];
    known
        .contains(&format!("{os}-{release}").as_str())
        .then(|| format!("{os}-{release}-{}", std::env::consts::ARCH))
}

/// Names in a folder, sorted; none where it is not there.
pub fn entries(dir: &Path) -> Vec<String> {
    let found = fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<String> = found.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

pub fn has(program: &str) -> bool {
    ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].iter().any(|d| Path::new(d).join(program).exists())
}

/// Said where the harness does not swallow it: a skipped test is not a passed one.
pub fn skipped(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {what}: {why} ***");
}

/// Bytes that do not compress, the same in every run (splitmix64).
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| (random.next() >> 32) as u8).collect()
}

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
