//! A booted host, and a folder for the stick made once for all tests.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

pub struct Host {
    pub name: String,
    pub ip: String,
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

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fab(args: &[&str]) -> String {
    let out = Command::new(root().join("tests/fab/fab")).args(args).output().expect("tests/fab/fab runs");
    assert!(out.status.success(), "fab {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
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

/// Packs all sample images; `service` is the manifest's service section. Returns the folder.
pub fn pack(name: &str, service: &str) -> PathBuf {
    pack_with(name, &[], service)
}

/// As [`pack`], with more OS packages.
pub fn pack_with(name: &str, extra: &[&str], service: &str) -> PathBuf {
    pack_manifest(name, extra, "", service, &[])
}

/// As [`pack`], for the nomad engine. None, and loudly so, where its three programs are not to be had.
pub fn pack_nomad(name: &str, service: &str) -> Option<PathBuf> {
    let mirror = root().join("target/fab/binaries");
    let found = Command::new(root().join("tests/fab/need")).arg("--stack").arg(&mirror).output();
    let found = said(found.expect("tests/fab/need runs"));
    if found.code != 0 {
        eprintln!("\n!!! SKIPPED: everything on the nomad engine: {}", found.err);
        return None;
    }
    let releases = found.out;
    let mirror = mirror.to_str().expect("text");
    Some(pack_manifest(name, &[], "engine = \"nomad\"\n", &(releases + service), &["--mirror", mirror]))
}

fn pack_manifest(name: &str, extra: &[&str], top: &str, sections: &str, options: &[&str]) -> PathBuf {
    let work = root().join("target/fab");
    std::fs::create_dir_all(&work).expect("target/fab");
    let zd = env!("CARGO_BIN_EXE_zd");
    let key = work.join("zd.key");
    if !key.exists() {
        assert!(
            Command::new(zd)
                .args(["-q", "keygen", "--out"])
                .arg(work.join("zd"))
                .status()
                .expect("zd")
                .success()
        );
    }
    let release = std::fs::read_to_string("/etc/os-release").expect("os-release");
    let field = |key: &str| {
        let line = release.lines().find_map(|l| l.strip_prefix(&format!("{key}="))).expect("field");
        line.trim_matches('"').to_owned()
    };
    let mut manifest = format!(
        "schema = 1\nname = \"{name}\"\nversion = \"1\"\n{top}[target]\nos = \"{}\"\nrelease = \"{}\"\n\
         [packages]\ndocker = [\"docker.io\"]\nregistry = [\"docker-registry\"]\nnginx = [\"nginx-light\"]\n\
         logrotate = [\"logrotate\"]\nextra = {extra:?}\n",
        field("ID"),
        field("VERSION_ID")
    );
    for tag in ["v1", "v2", "v3", "slow200", "slow3000", "lazy", "wrong", "sick", "dies"] {
        manifest.push_str(&format!("[[image]]\nref = \"hello:{tag}\"\ndocker = \"hello:{tag}\"\n"));
    }
    manifest.push_str(sections);
    let path = work.join(format!("{name}.toml"));
    std::fs::write(&path, manifest).expect("manifest");
    let folder = work.join(name);
    let _ = std::fs::remove_dir_all(&folder);
    let out = Command::new(zd)
        .args(["-q", "pack"])
        .args(options)
        .arg(&path)
        .arg("--key")
        .arg(&key)
        .arg("--out")
        .arg(&folder)
        .output();
    said(out.expect("zd pack")).ok();
    folder
}

/// The folder that most tests install from.
pub fn stick() -> &'static Path {
    static STICK: OnceLock<PathBuf> = OnceLock::new();
    STICK.get_or_init(|| pack("fab", SERVICE))
}

impl Host {
    /// A freshly booted bare host with the folder at /stick.
    pub fn bare(name: &str, stick: &Path) -> Self {
        let name = format!("zd-fab-{name}");
        fab(&["down", &name]);
        let ip = fab(&["up", &name]).trim().to_owned();
        let host = Host { name, ip };
        host.copy_in(stick, "/stick");
        host
    }

    /// As [`Host::bare`], and installed.
    pub fn installed(name: &str) -> Self {
        let host = Self::bare(name, stick());
        host.run(&["/stick/zd", "-q", "install", "--ip", "auto"]).ok();
        host
    }

    pub fn copy_in(&self, from: &Path, to: &str) {
        let to = format!("{}:{to}", self.name);
        said(Command::new("docker").arg("cp").arg(from).arg(&to).output().expect("docker cp")).ok();
    }

    fn command(&self, env: &[(&str, &str)], argv: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("exec");
        for (key, value) in env {
            command.arg("-e").arg(format!("{key}={value}"));
        }
        command.arg(&self.name).args(argv).stdin(Stdio::null());
        command
    }

    pub fn run(&self, argv: &[&str]) -> Said {
        said(self.command(&[], argv).output().expect("docker exec"))
    }

    pub fn run_env(&self, env: &[(&str, &str)], argv: &[&str]) -> Said {
        said(self.command(env, argv).output().expect("docker exec"))
    }

    /// A shell line, for looking.
    pub fn sh(&self, line: &str) -> String {
        self.run(&["sh", "-c", line]).ok().out
    }

    pub fn zd(&self, args: &[&str]) -> Said {
        self.run(&[&["zd"], args].concat())
    }

    pub fn spawn(&self, argv: &[&str]) -> Running {
        let mut command = self.command(&[], argv);
        Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("docker exec"))
    }

    /// A load on the service from inside the host; no retries anywhere.
    pub fn load(&self, rate: u32, seconds: u32, changes: usize, more: &[&str]) -> Running {
        let (rate, time, changes) = (rate.to_string(), format!("{seconds}s"), changes.to_string());
        let url = format!("http://{}/hello", self.ip);
        let mut argv = vec!["zd", "-q", "loadtest", &url, "--rate", &rate, "--duration", &time];
        argv.extend(["--expect-changes", &changes, "--json"]);
        argv.extend(more);
        self.spawn(&argv)
    }

    /// Every file of the host, and more; see tests/fab/README.md.
    pub fn picture(&self) -> String {
        fab(&["picture", &self.name])
    }

    pub fn restart(&self) {
        fab(&["restart", &self.name]);
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
pub fn clean(load: Running) -> Value {
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
