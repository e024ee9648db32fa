//! What is read off the host before anything is decided. Read-only.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use procfs::Current;
use serde::Serialize;

use crate::bundle::target::Target;
use crate::error::{At, Code, Result};
use crate::host::firewall::Firewall;

#[derive(Debug, Serialize)]
pub struct Facts {
    pub target: Target,
    pub root: bool,
    pub systemd: bool,
    pub memory_bytes: u64,
    pub cgroup: Cgroup,
    pub now: Timestamp,
    pub interfaces: Vec<Interface>,
    /// Interface of the default route.
    pub way_out: Option<String>,
    /// IPv4 networks this host has a route to: address and prefix length.
    pub routes: Vec<(Ipv4Addr, u8)>,
    pub listeners: Vec<Listener>,
    pub firewall: Option<Firewall>,
    /// Programs of the stack that are here already.
    pub programs: BTreeMap<String, PathBuf>,
    pub docker_answers: bool,
    /// Process that holds a package manager's lock.
    pub package_lock: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cgroup {
    V2,
    V1,
    None,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    pub name: String,
    pub ip: Ipv4Addr,
}

#[derive(Debug, Serialize)]
pub struct Listener {
    pub ip: IpAddr,
    pub port: u16,
    /// `nginx (process 812, zd-nginx@hello.service)`.
    pub owner: String,
    /// Its unit; empty where it has none.
    pub unit: String,
    /// The listener belongs to a unit that is zd's by its name.
    pub ours: bool,
}

impl Listener {
    /// It is zd's on a host that has zd: units of the stack do not say so in their names. Not Docker's: the site may
    /// publish ports of its own there.
    pub fn is_zds(&self) -> bool {
        self.ours
            || ["consul.service", "nomad.service", "consul-template.service"].contains(&self.unit.as_str())
    }
}

impl Facts {
    pub async fn gather() -> Result<Self> {
        let programs = ["dockerd", "nginx", "docker-registry", "consul", "nomad", "consul-template"];
        let programs: BTreeMap<String, PathBuf> =
            programs.into_iter().filter_map(|p| Some((p.to_owned(), which::which(p).ok()?))).collect();
        let docker_answers = crate::host::docker::Docker::connect().await.is_ok();
        Ok(Self {
            target: target()?,
            root: rustix::process::geteuid().is_root(),
            systemd: Path::new("/run/systemd/system").exists(),
            memory_bytes: procfs::Meminfo::current().map_or(0, |m| m.mem_total),
            cgroup: cgroup(),
            now: Timestamp::now(),
            interfaces: interfaces(),
            way_out: way_out(),
            routes: routes(),
            listeners: listeners(),
            firewall: Firewall::active().await?,
            docker_answers,
            programs,
            package_lock: package_lock(),
        })
    }

    /// The address for `--ip auto`: of the way out, else the only plausible one.
    pub fn auto_ip(&self) -> Result<&Interface> {
        let plausible: Vec<&Interface> = self.plausible().collect();
        if let Some(found) = plausible.iter().find(|i| Some(&i.name) == self.way_out.as_ref()) {
            return Ok(found);
        }
        match plausible.as_slice() {
            [one] => Ok(one),
            [] => Err(Code::Preflight.err("this host has no network address that others could reach").cure(
                "connect it and give it an address (ip address), then run again, or name one: --ip ADDRESS",
            )),
            many => {
                let list: Vec<String> = many.iter().map(|i| format!("{} ({})", i.ip, i.name)).collect();
                Err(Code::Preflight
                    .err(format!(
                        "several addresses are plausible and no route leads out: {}",
                        list.join(", ")
                    ))
                    .cure(format!("say which one clients use: --ip {}", many[0].ip)))
            }
        }
    }

    /// Those that other machines may reach.
    pub fn plausible(&self) -> impl Iterator<Item = &Interface> {
        self.interfaces.iter().filter(|i| is_plausible(&i.name))
    }

    pub fn has_ip(&self, ip: Ipv4Addr) -> bool {
        self.interfaces.iter().any(|i| i.ip == ip)
    }
}

/// Not a bridge or an end of a container's cable.
fn is_plausible(name: &str) -> bool {
    let virtual_ones = ["docker", "br-", "veth", "virbr", "zd0", "cni", "flannel", "nomad", "tap", "lo"];
    !virtual_ones.iter().any(|v| name.starts_with(v))
        && !Path::new("/sys/class/net").join(name).join("bridge").exists()
}

/// This host in the words of os-release(5) and uname(2).
pub fn target() -> Result<Target> {
    let text = fs::read_to_string("/etc/os-release").at("/etc/os-release")?;
    let fields: HashMap<&str, &str> =
        text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k, v.trim_matches('"'))).collect();
    let field = |key: &str| fields.get(key).copied().unwrap_or("unknown").to_owned();
    let arch = rustix::system::uname().machine().to_string_lossy().into_owned();
    Ok(Target { os: field("ID"), release: field("VERSION_ID"), arch })
}

fn cgroup() -> Cgroup {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Cgroup::V2
    } else if Path::new("/sys/fs/cgroup/memory").exists() {
        Cgroup::V1
    } else {
        Cgroup::None
    }
}

/// Whether an interface of this host has the address now.
pub fn is_here(ip: Ipv4Addr) -> bool {
    interfaces().iter().any(|i| i.ip == ip)
}

fn interfaces() -> Vec<Interface> {
    let mut found: Vec<Interface> = if_addrs::get_if_addrs()
        .unwrap_or_default()
        .into_iter()
        .filter_map(|i| match i.ip() {
            IpAddr::V4(ip) if !ip.is_loopback() && !ip.is_link_local() => {
                Some(Interface { name: i.name, ip })
            }
            _ => None,
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn route_table() -> Vec<procfs::net::RouteEntry> {
    procfs::net::route().unwrap_or_default()
}

fn way_out() -> Option<String> {
    let defaults =
        route_table().into_iter().filter(|r| r.destination.is_unspecified() && r.mask.is_unspecified());
    defaults.min_by_key(|r| r.metrics).map(|r| r.iface)
}

fn routes() -> Vec<(Ipv4Addr, u8)> {
    let all = route_table().into_iter().map(|r| (r.destination, u32::from(r.mask).count_ones() as u8));
    all.filter(|(_, bits)| *bits > 0).collect()
}

fn listeners() -> Vec<Listener> {
    let entries = [procfs::net::tcp(), procfs::net::tcp6()].into_iter().flatten().flatten();
    let listening: Vec<_> = entries.filter(|e| e.state == procfs::net::TcpState::Listen).collect();
    let mut owners: HashMap<u64, (String, String)> = HashMap::new();
    for process in procfs::process::all_processes().into_iter().flatten().flatten() {
        let Ok(fds) = process.fd() else { continue };
        for fd in fds.flatten() {
            if let procfs::process::FDTarget::Socket(inode) = fd.target {
                owners.entry(inode).or_insert_with(|| describe(&process));
            }
        }
    }
    listening
        .into_iter()
        .map(|e| {
            let (owner, unit) =
                owners.get(&e.inode).cloned().unwrap_or_else(|| ("unknown process".into(), String::new()));
            let ours = unit.starts_with("zd-");
            Listener { ip: e.local_address.ip(), port: e.local_address.port(), owner, unit, ours }
        })
        .collect()
}

/// For people, and the unit.
fn describe(process: &procfs::process::Process) -> (String, String) {
    let name = process.stat().map_or_else(|_| "?".into(), |s| s.comm);
    let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
    let unit = cgroups.split(['/', '\n']).rfind(|part| part.ends_with(".service")).unwrap_or_default();
    let shown = if unit.is_empty() { "no unit" } else { unit };
    (format!("{name} (process {}, {shown})", process.pid), unit.to_owned())
}

/// dpkg(1) and apt hold fcntl(2) locks while they work; names who does.
fn package_lock() -> Option<String> {
    use rustix::fs::{FlockOperation, fcntl_lock};
    for path in ["/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock"] {
        // Not there, or not ours to open: then it cannot be looked at, which is not bad.
        let Ok(file) = fs::OpenOptions::new().read(true).write(true).open(path) else { continue };
        if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let holder = processes_with(Path::new(path)).next().unwrap_or_else(|| "another process".into());
            return Some(format!("{holder} holds {path}"));
        }
    }
    None
}

fn processes_with(path: &Path) -> impl Iterator<Item = String> {
    let own = std::process::id();
    let all = procfs::process::all_processes().into_iter().flatten().flatten();
    let others = all.filter(move |p| p.pid as u32 != own);
    others.filter_map(move |process| {
        let mut fds = process.fd().ok()?.flatten();
        let has = fds.any(|fd| matches!(&fd.target, procfs::process::FDTarget::Path(p) if p == path));
        has.then(|| describe(&process).0)
    })
}

/// Free and total bytes of the file system that holds (or will hold) `path`, and which one it is.
pub fn space(path: &Path) -> Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing).map_err(|e| crate::error::io(existing, e.into()))?;
    let device = fs::metadata(existing).at(existing)?.dev();
    Ok((device, stat.f_bavail * stat.f_frsize))
}
