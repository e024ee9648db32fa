//! A booted host, and a folder for the stick made once for all tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Between one connection and the next of a client that opens new ones all the time; at most four such clients at once.
/// A closed connection keeps its local port for a minute, and there are 28,232 for each port of a host: 470 a second.
pub const APART: Duration = Duration::from_millis(10);

pub struct Host {
    pub name: String,
    pub ip: String,
    /// The words before a command that is to run on it; others after each boot.
    way: Mutex<Vec<String>>,
    booted: Instant,
}

/// What a command of the host said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "expected success\nstdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    /// Fails as the code's name and exit code say, and tells of each part.
    #[track_caller]
    pub fn fails(self, exit: i32, code: &str, parts: &[&str]) -> Self {
        assert_eq!(self.code, exit, "{self:?}");
        assert!(self.err.contains(&format!("error[{code}]")), "expected error[{code}]: {}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "expected {part:?} in: {}", self.err);
        }
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|e| panic!("{e}\nstdout: {}\nstderr: {}", self.out, self.err))
    }
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fab(args: &[&str]) -> String {
    let out = Command::new(root().join("tests/fab/fab")).args(args).output().expect("tests/fab/fab runs");
    assert!(out.status.success(), "fab {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

fn way(name: &str) -> Vec<String> {
    fab(&["way", name]).lines().map(str::to_owned).collect()
}

fn said(out: Output) -> Said {
    Said {
        code: out.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&out.stdout).into_owned(),
        err: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// The service's section of a manifest, for tests that want it otherwise.
pub const SERVICE: &str = r#"
[[service]]
name = "hello"
image = "hello"
version = "v1"
port = 8080
listen = 80
standby-listen = 8081
instances = 2
health-timeout = 8
"#;

/// Another one beside it.
pub const SECOND: &str = r#"
[[service]]
name = "second"
image = "hello"
version = "v1"
port = 8080
listen = 82
standby-listen = 8083
instances = 1
"#;

/// A folder for the stick with all sample images.
#[derive(Default)]
pub struct Pack<'a> {
    /// The folder, and the manifest's name where that is not given.
    pub folder: &'a str,
    pub name: Option<&'a str>,
    pub version: Option<&'a str>,
    /// The manifest's service section.
    pub service: &'a str,
    /// More OS packages.
    pub extra: &'a [&'a str],
    /// Packages in a later version (tests/fab/newer), and one among them that does not start.
    pub newer: &'a [&'a str],
    pub broken: &'a str,
    /// Packages as this machine's archives have them, to the byte.
    pub plain: bool,
    /// A version of the sample image that is left out.
    pub without: &'a str,
    /// On the nomad engine, with its programs from here (`zd_stack`, `next_stack`).
    pub releases: Option<(String, PathBuf)>,
    /// As bundles were before Consul could be asked from elsewhere.
    pub loopback_only: bool,
}

pub fn pack(folder: &str, service: &str) -> PathBuf {
    Pack { folder, service, ..Pack::default() }.make()
}

/// For the nomad engine. None, and loudly so, where its three programs are not to be had.
pub fn pack_nomad(folder: &str, service: &str) -> Option<PathBuf> {
    let releases = Some(zd_stack()?);
    Some(Pack { folder, service, releases, ..Pack::default() }.make())
}

/// The nomad engine's programs as sections of a manifest, and the folder they are in.
pub fn zd_stack() -> Option<(String, PathBuf)> {
    static STACK: OnceLock<Result<(String, PathBuf), String>> = OnceLock::new();
    let found =
        STACK.get_or_init(|| stack_in(Command::new(root().join("tests/fab/need")), "--stack", "binaries"));
    found.clone().inspect_err(|why| eprintln!("\n!!! SKIPPED: everything on the nomad engine: {why}")).ok()
}

pub const PROGRAMS: [&str; 3] = ["nomad", "consul", "consul-template"];

/// The same with `newer` in other bytes: later versions where $ZD_STACK_NEXT_DIR has them, else with one byte more
/// behind their end; `broken` does not start.
pub fn next_stack(folder: &str, newer: &[&str], broken: &str) -> Option<(String, PathBuf)> {
    let (_, now) = zd_stack()?;
    let later = std::env::var_os("ZD_STACK_NEXT_DIR").map(PathBuf::from);
    let from = root().join("target/fab").join(format!("{folder}-from"));
    let _ = std::fs::remove_dir_all(&from);
    std::fs::create_dir_all(&from).expect("a folder");
    for product in PROGRAMS {
        let later = later.as_ref().map(|folder| folder.join(product)).filter(|path| path.is_file());
        let present = || std::fs::read(now.join(product)).expect(product);
        let bytes = match (newer.contains(&product), later) {
            (false, _) => present(),
            (true, Some(later)) => std::fs::read(later).expect(product),
            (true, None) => [present().as_slice(), b"x"].concat(),
        };
        std::fs::write(from.join(product), bytes).expect(product);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(from.join(product), mode).expect(product);
    }
    let mut need = Command::new(root().join("tests/fab/need"));
    need.env("ZD_STACK_DIR", &from);
    let (sections, mirror) = stack_in(need, "--stack", folder).expect("as it was for zd_stack");
    if !broken.is_empty() {
        std::fs::write(mirror.join(broken), "#!/bin/sh\necho broken on purpose >&2\nexit 1\n").expect(broken);
    }
    Some((sections, mirror))
}

/// The same in later versions, with those that an upgrade to them goes through. None, and loudly so, without these.
pub fn stepping_stack(folder: &str) -> Option<(String, PathBuf)> {
    zd_stack()?;
    let found = stack_in(Command::new(root().join("tests/fab/need")), "--stack-via", folder);
    found.inspect_err(|why| eprintln!("\n!!! SKIPPED: upgrades that go through other versions: {why}")).ok()
}

fn stack_in(mut need: Command, how: &str, folder: &str) -> Result<(String, PathBuf), String> {
    let mirror = root().join("target/fab").join(folder);
    let found = said(need.arg(how).arg(&mirror).output().expect("tests/fab/need runs"));
    if found.code == 0 { Ok((found.out, mirror)) } else { Err(found.err) }
}

impl Pack<'_> {
    pub fn make(&self) -> PathBuf {
        let work = root().join("target/fab");
        std::fs::create_dir_all(&work).expect("target/fab");
        let zd = env!("CARGO_BIN_EXE_zd");
        static KEY: OnceLock<PathBuf> = OnceLock::new();
        let key = KEY.get_or_init(|| {
            let key = work.join("zd.key");
            if !key.exists() {
                let made = Command::new(zd).args(["-q", "keygen", "--out"]).arg(work.join("zd")).status();
                assert!(made.expect("zd").success());
            }
            key
        });
        let path = work.join(format!("{}.toml", self.folder));
        std::fs::write(&path, self.manifest(&work)).expect("manifest");
        let folder = work.join(self.folder);
        let _ = std::fs::remove_dir_all(&folder);
        let mut pack = Command::new(zd);
        pack.args(["-q", "pack"]).arg(&path).arg("--key").arg(key).arg("--out").arg(&folder);
        if let Some((_, mirror)) = &self.releases {
            pack.arg("--mirror").arg(mirror);
        }
        said(pack.output().expect("zd pack")).ok();
        folder
    }

    fn manifest(&self, work: &Path) -> String {
        let release = std::fs::read_to_string("/etc/os-release").expect("os-release");
        let field = |key: &str| {
            let line = release.lines().find_map(|l| l.strip_prefix(&format!("{key}="))).expect("field");
            line.trim_matches('"').to_owned()
        };
        let (name, version) = (self.name.unwrap_or(self.folder), self.version.unwrap_or("1"));
        let engine = if self.releases.is_some() { "nomad" } else { "docker" };
        let https = if engine == "nomad" && !self.loopback_only { "consul-https = 8501\n" } else { "" };
        let sources = match self.plain {
            true => String::new(),
            false => {
                let sources = packages(work, self.newer, self.broken);
                format!("sources = {sources:?}\nunsigned-packages = true\n")
            }
        };
        let tcp = ["[[service.tcp]]", "[[service.long-lived]]"].iter().any(|s| self.service.contains(s));
        let stream = if tcp { ", \"libnginx-mod-stream\"" } else { "" };
        let mut manifest = format!(
            "schema = 1\nname = \"{name}\"\nversion = \"{version}\"\nengine = \"{engine}\"\n{https}\
             [target]\nos = \"{}\"\nrelease = \"{}\"\n\
             [packages]\ndocker = [\"docker.io\", \"apparmor\"]\nregistry = [\"docker-registry\"]\nnginx = [\"nginx-light\"{stream}]\n\
             logrotate = [\"logrotate\"]\nextra = {:?}\n{sources}",
            field("ID"),
            field("VERSION_ID"),
            self.extra,
        );
        for tag in ["v1", "v2", "v3", "slow200", "slow3000", "lazy", "wrong", "sick", "dies", "deaf"] {
            if tag == self.without {
                continue;
            }
            manifest.push_str(&format!("[[image]]\nref = \"hello:{tag}\"\ndocker = \"hello:{tag}\"\n"));
        }
        if let Some((releases, _)) = &self.releases {
            manifest.push_str(releases);
        }
        manifest + self.service
    }
}

/// An apt sources file, with these packages in later versions; made once for all bundles that bring the same.
fn packages(work: &Path, newer: &[&str], broken: &str) -> PathBuf {
    static MADE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let folder = work.join(format!("packages-{}-{broken}", newer.join("-")));
    let path = folder.join("apt.sources");
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if !made.contains(&path) {
        let mut make = Command::new(root().join("tests/fab/newer"));
        make.env("BROKEN", broken).arg(&folder).args(newer);
        let sources = said(make.output().expect("newer runs")).ok().out;
        std::fs::write(&path, sources).expect("sources");
        made.insert(path.clone());
    }
    path
}

/// The folder that most tests install from.
pub fn stick() -> &'static Path {
    static STICK: OnceLock<PathBuf> = OnceLock::new();
    STICK.get_or_init(|| pack("fab", SERVICE))
}

/// The same on the nomad engine.
pub fn stack() -> Option<&'static Path> {
    static STICK: OnceLock<PathBuf> = OnceLock::new();
    zd_stack()?;
    Some(STICK.get_or_init(|| pack_nomad("stack", SERVICE).expect("as it was for zd_stack")))
}

impl Host {
    /// A freshly booted bare host.
    pub fn booted(name: &str) -> Self {
        Self::up(name, &[])
    }

    /// The same with the folder at /stick.
    pub fn bare(name: &str, stick: &Path) -> Self {
        Self::up(name, &[stick.to_str().expect("text")])
    }

    fn up(name: &str, stick: &[&str]) -> Self {
        let name = format!("zd-fab-{name}");
        fab(&["down", &name]);
        let ip = fab(&[&["up", &name], stick].concat()).trim().to_owned();
        let host = Host { way: Mutex::new(way(&name)), name, ip, booted: Instant::now() };
        // As on a server: Docker lets everybody take low ports.
        host.sh("echo 1024 >/proc/sys/net/ipv4/ip_unprivileged_port_start");
        host
    }

    /// As [`Host::bare`], and installed.
    pub fn installed(name: &str) -> Self {
        Self::installed_from(name, stick())
    }

    pub fn installed_from(name: &str, stick: &Path) -> Self {
        let host = Self::bare(name, stick);
        host.run(&["/stick/zd", "-q", "install", "--ip", "auto"]).ok();
        host
    }

    /// Every service unit that zd has written, these among them, has an exposure of at most 4.0 of 10 (systemd-analyze(1)).
    pub fn is_hardened(&self, among: &[&str]) {
        let said = self.sh(
            "for unit in $(find /etc/systemd/system -maxdepth 1 -type f -name '*.service' ! -name 'fab-*' -printf '%f\\n' \
             | sed 's/@[.]/@hello./'); do systemd-analyze security --no-pager $unit | tail -1; done",
        );
        let exposures: BTreeMap<&str, f32> = said
            .lines()
            .filter_map(|line| {
                let mut words = line.split("level for ").nth(1)?.split(' ');
                Some((words.next()?.strip_suffix(".service:")?, words.next()?.parse().ok()?))
            })
            .collect();
        println!("exposures: {exposures:?}");
        assert!(among.iter().all(|unit| exposures.contains_key(unit)), "{among:?} in {said}");
        assert!(exposures.values().all(|exposure| *exposure <= 4.0), "{said}");
    }

    pub fn copy_in(&self, from: &Path, to: &str) {
        fab(&["put", &self.name, &from.display().to_string(), to]);
    }

    pub fn copy_out(&self, from: &str, to: &Path) {
        fab(&["get", &self.name, from, &to.display().to_string()]);
    }

    fn command(&self, env: &[(&str, &str)], argv: &[&str]) -> Command {
        let way = self.way.lock().expect("no panic");
        let mut command = Command::new(&way[0]);
        let env = env.iter().map(|(key, value)| format!("{key}={value}"));
        command.args(&way[1..]).args(env).args(argv).stdin(Stdio::null());
        command
    }

    pub fn run(&self, argv: &[&str]) -> Said {
        said(self.command(&[], argv).output().expect("nsenter"))
    }

    /// Failpoints count here (src/failpoint.rs).
    pub fn run_env(&self, env: &[(&str, &str)], argv: &[&str]) -> Said {
        self.sh("mkdir -p /run/zd-test");
        said(self.command(env, argv).output().expect("nsenter"))
    }

    /// A shell line, for looking.
    pub fn sh(&self, line: &str) -> String {
        self.run(&["sh", "-c", line]).ok().out
    }

    /// Waits until this shell line is true.
    #[track_caller]
    pub fn comes(&self, line: &str) {
        let start = Instant::now();
        while self.run(&["sh", "-c", line]).code != 0 {
            assert!(start.elapsed().as_secs() < 30, "does not come: {line}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub fn zd(&self, args: &[&str]) -> Said {
        self.run(&[&["zd"], args].concat())
    }

    pub fn spawn(&self, argv: &[&str]) -> Running {
        let mut command = self.command(&[], argv);
        Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("nsenter"))
    }

    /// A load on the service from inside the host until [`Host::clean`]; no retries anywhere.
    pub fn load(&self, rate: u32, changes: usize, more: &[&str]) -> Running {
        let (rate, time, changes) = (rate.to_string(), "20m", changes.to_string());
        let url = format!("http://{}/hello", self.ip);
        let mut argv = vec!["zd", "-q", "loadtest", &url, "--rate", &rate, "--duration", time];
        argv.extend(["--expect-changes", &changes, "--json"]);
        argv.extend(more);
        self.spawn(&argv)
    }

    /// Ends a load a second after what it was to cover: nothing failed in it and no versions mixed. Its report.
    #[track_caller]
    pub fn clean(&self, load: Running) -> Value {
        std::thread::sleep(Duration::from_secs(1));
        self.sh("pkill -INT -f '^zd -q loadtest'");
        clean(load)
    }

    /// All is well with clients for a while.
    #[track_caller]
    pub fn serves(&self) -> Value {
        let load = self.load(100, 0, &[]);
        std::thread::sleep(Duration::from_secs(1));
        self.clean(load)
    }

    /// Every file of the host, and more; see tests/fab/README.md.
    pub fn picture(&self) -> String {
        fab(&["picture", &self.name])
    }

    pub fn restart(&self) {
        fab(&["restart", &self.name]);
        *self.way.lock().expect("no panic") = way(&self.name);
    }

    /// What `zd status` finds other than recorded.
    pub fn drift(&self) -> Value {
        self.zd(&["status", "--json"]).ok().json()["drift"].clone()
    }

    /// Waits until everything is as recorded, and not for a moment only: containers count as healthy to zd
    /// when they have lived for a second.
    #[track_caller]
    pub fn settles(&self) {
        let (start, mut good) = (Instant::now(), 0);
        while good < 2 {
            let drift = self.drift();
            good = if drift == serde_json::json!([]) { good + 1 } else { 0 };
            assert!(start.elapsed().as_secs() < 90, "{drift}");
            std::thread::sleep(Duration::from_millis(1200) * u32::from(good < 2));
        }
    }

    /// Containers of the service: name, id and start time.
    pub fn containers(&self) -> String {
        self.sh(
            "docker ps -q --no-trunc | xargs -r docker inspect -f '{{.Name}} {{.Id}} {{.State.StartedAt}}' | sort",
        )
    }

    pub fn active(&self) -> String {
        self.zd(&["status", "--json"]).json()["services"][0]["active"].as_str().expect("active").to_owned()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A failed test leaves its host to be looked at; `fab clean` takes it away.
        if !std::thread::panicking() {
            println!("{}: {:.0} s", self.name, self.booted.elapsed().as_secs_f32());
            fab(&["down", &self.name]);
        }
    }
}

pub struct Running(Child);

impl Running {
    pub fn wait(self) -> Said {
        said(self.0.wait_with_output().expect("a child"))
    }
}

/// The report of a load in which nothing failed and no versions mixed.
#[track_caller]
fn clean(load: Running) -> Value {
    let said = load.wait();
    let report = said.json();
    let brief = format!(
        "failed {} {} mixed {} not sent {} changes {} samples {}",
        report["failed"],
        report["failures"],
        report["mixed"],
        report["not_sent"],
        report["changes"],
        report["samples"]
    );
    assert_eq!(said.code, 0, "{brief}\n{}", said.err);
    assert_eq!(report["failed"], 0, "{brief}");
    assert_eq!(report["mixed"], 0, "{brief}");
    report
}

/// Lines that differ, for a readable failure.
pub fn differences(before: &str, after: &str) -> String {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    let (before, after) = (lines(before), lines(after));
    let gone = before.difference(&after).map(|l| format!("- {l}\n"));
    let new = after.difference(&before).map(|l| format!("+ {l}\n"));
    gone.chain(new).take(60).collect()
}
