//! `zd support`: one small archive with what somebody elsewhere needs to understand this host, and no
//! secret in it. Works at any time, also where nothing was ever installed.

use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;

use crate::error::{At, Code, OrCode, Result};
use crate::facts::Facts;
use crate::host::config::Installed;
use crate::host::secrets::private_config;
use crate::host::{exec, fs, paths, systemd};
use crate::ui::Ui;

/// Of each file and each command's output, the last this many bytes. Some 60 of them: the archive stays
/// far below 50 MB.
const MOST: u64 = 512 << 10;
/// Values shorter than this are no secrets, and would blot out ordinary text.
const SHORTEST_SECRET: usize = 8;
const REDACTED: &str = "[redacted]";

/// Write an archive for those who help: reports, logs, configuration; no secrets
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  sudo zd support\n  sudo zd support --out /media/stick/line4.tar.gz")]
pub struct Args {
    /// The archive; zd-support-TIME.tar.gz where not given
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    file: PathBuf,
    bytes: u64,
    entries: usize,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let now = jiff::Timestamp::now();
    let file =
        args.out.unwrap_or_else(|| format!("zd-support-{}.tar.gz", now.strftime("%Y%m%d-%H%M%S")).into());
    let secrets = secrets();
    let mut options = OpenOptions::new();
    let out = options.write(true).create(true).truncate(true).mode(0o600).open(&file).at(&file)?;
    let mut archive = tar::Builder::new(GzEncoder::new(out, Compression::default()));
    let mut entries = 0;
    let bar = ui.wait("collecting");
    for (name, text) in collect().await {
        let text = redact(text, &secrets);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now.as_second() as u64);
        archive.append_data(&mut header, format!("zd-support/{name}"), text.as_bytes()).at(&file)?;
        entries += 1;
    }
    bar.finish_and_clear();
    let mut out = archive.into_inner().and_then(GzEncoder::finish).at(&file)?;
    out.flush().and_then(|()| out.sync_all()).at(&file)?;
    let bytes = out.metadata().at(&file)?.len();
    ui.report(&Report { file, bytes, entries }, |r| {
        format!(
            "{} ({}, {} entries; secrets are blotted out, look through it all the same)",
            r.file.display(),
            bytesize::ByteSize(r.bytes),
            r.entries
        )
    });
    Ok(())
}

/// Names and texts. What cannot be had is told in its place.
async fn collect() -> Vec<(String, String)> {
    let mut found = vec![("zd.txt".to_owned(), format!("zd {}\n", env!("CARGO_PKG_VERSION")))];
    found.push(("facts.json".into(), told(Facts::gather().await)));
    let installed = Installed::read().ok().flatten();
    if let Some(installed) = &installed {
        found.push(("status.json".into(), told(super::status::gather(installed).await)));
    }
    for file in files() {
        let name = format!("files{}", file.display());
        found.push((name, tail(&file).unwrap_or_else(|e| e.what)));
    }
    for (name, argv) in commands() {
        let text = match exec::try_run(&argv).await {
            Ok(out) => format!("{}{}", out.stdout, out.stderr),
            Err(e) => e.what,
        };
        let from = text.len().saturating_sub(MOST as usize);
        let from = (from..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        found.push((format!("commands/{name}.txt"), text[from..].to_owned()));
    }
    found
}

fn told(report: Result<impl Serialize>) -> String {
    let text = report.and_then(|r| serde_json::to_string_pretty(&r).or_code(Code::Bug, "a report"));
    text.unwrap_or_else(|e| e.what)
}

/// Configuration, receipts and logs. Folders that hold secrets are left out as a whole.
fn files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/os-release"), "/etc/docker/daemon.json".into()];
    let mut folders: Vec<PathBuf> = [paths::ETC, paths::RECEIPTS, paths::SERVICES, paths::LOG, paths::POOLS]
        .map(PathBuf::from)
        .into_iter()
        .chain(Path::new(paths::CURRENT).canonicalize().ok())
        .collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else { continue };
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if kind.is_dir() {
                let private = ["secrets", "tls", "tmp", "packages", "bin", "files"].contains(&name.as_ref());
                folders.extend((!private).then_some(path));
            } else if kind.is_file() && is_text(&name) {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

fn is_text(name: &str) -> bool {
    let private = ["private.json", "password", "htpasswd"].contains(&name) || name.ends_with(".key");
    let text =
        [".json", ".jsonl", ".toml", ".conf", ".log", ".ctmpl", ".pub"].iter().any(|e| name.ends_with(e));
    text && !private
}

fn commands() -> Vec<(String, Vec<String>)> {
    let mut all: Vec<(String, Vec<String>)> = Vec::new();
    let mut add = |name: &str, line: &str| {
        all.push((name.to_owned(), line.split_whitespace().map(str::to_owned).collect()));
    };
    add("df", "df -h");
    add("memory", "cat /proc/meminfo");
    add("mounts", "cat /proc/mounts");
    add("addresses", "ip addr");
    add("routes", "ip route");
    add("sockets", "ss -ltnp");
    add("processes", "ps -eo pid,ppid,user,etime,rss,comm");
    add("packages", "dpkg-query -W");
    add("clock", "timedatectl");
    add("failed-units", "systemctl --failed --no-pager");
    add("containers", "docker ps -a --no-trunc");
    add("docker-info", "docker info");
    add("kernel", "journalctl -k -n 300 --no-pager");
    for unit in ["docker", "zd-registry", "zd-nginx@*", "consul", "nomad", "consul-template", "zd-*"] {
        add(&format!("status-{unit}"), &format!("systemctl status --no-pager --full {unit}"));
        add(
            &format!("journal-{unit}"),
            &format!("journalctl {} -u {unit} -n 1000 --no-pager", systemd::JOURNALS),
        );
    }
    all
}

/// The end of a file, as text. Logs are in folders of the daemons that write them.
fn tail(path: &Path) -> Result<String> {
    let mut file = fs::open(path)?;
    let size = file.metadata().at(path)?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(MOST))).at(path)?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes).at(path)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Every secret of this host, and what services are given as such: to be found again in any text.
fn secrets() -> Vec<String> {
    let mut found = Vec::new();
    for folder in [paths::SECRETS, paths::REGISTRY_ETC, "/etc/zd/tls", paths::SIGNING] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if ["config.json", "push.json", "ca.crt", "tls.crt", "nomad.crt", "host.pub"]
                .iter()
                .any(|n| entry.file_name() == *n)
            {
                continue;
            }
            let text = fs::read(&entry.path()).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            strings(&serde_json::from_str(&text).unwrap_or_default(), &mut found);
            found.extend(text.lines().map(|l| l.trim().to_owned()));
        }
    }
    let key = std::fs::read_to_string(paths::CONSUL_KEY).unwrap_or_default();
    found.extend(key.lines().map(|l| l.trim().to_owned()));
    for folder in [paths::CONSUL_ETC, paths::NOMAD_ETC, paths::CONSUL_TEMPLATE_ETC] {
        strings(&private_config(folder).unwrap_or_default(), &mut found);
    }
    if let Ok(Some(installed)) = Installed::read() {
        let env = installed.lock.services.into_iter().flat_map(|s| s.env);
        let is_secret = |key: &str| {
            let key = key.to_ascii_uppercase();
            ["PASS", "SECRET", "TOKEN", "KEY", "CREDENTIAL"].iter().any(|word| key.contains(word))
        };
        found.extend(env.filter(|(key, _)| is_secret(key)).map(|(_, value)| value));
    }
    found.retain(|secret| secret.len() >= SHORTEST_SECRET);
    // Longest first: a secret may hold another.
    found.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    found
}

fn strings(value: &serde_json::Value, found: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => found.push(text.clone()),
        serde_json::Value::Array(items) => items.iter().for_each(|v| strings(v, found)),
        serde_json::Value::Object(map) => map.values().for_each(|v| strings(v, found)),
        _ => {}
    }
}

fn redact(mut text: String, secrets: &[String]) -> String {
    for secret in secrets {
        if text.contains(secret.as_str()) {
            text = text.replace(secret.as_str(), REDACTED);
        }
    }
    text
}
