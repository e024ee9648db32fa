//! Is the host fit? All findings at once; each bad one with its cure. "Could not look" is a note.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;

use bytesize::ByteSize;
use serde::Serialize;

use crate::bundle::Lock;
use crate::bundle::manifest::Engine;
use crate::error::{Code, Error, Result};
use crate::facts::{Cgroup, Facts, space};
use crate::host::paths;

/// Ports of the full stack, all on loopback.
const STACK_PORTS: [(u16, &str); 6] = [
    (8300, "servers of Consul"),
    (8301, "gossip of Consul"),
    (8500, "HTTP of Consul"),
    (4646, "HTTP of Nomad"),
    (4647, "RPC of Nomad"),
    (4648, "gossip of Nomad"),
];
/// Memory that dockerd, the registry and nginx need beside the services.
const MEMORY_MIN: u64 = 768 << 20;
/// Cure of a clock that is wrong.
pub const SET_CLOCK: &str = "set the clock: timedatectl set-time 'YYYY-MM-DD hh:mm:ss'";
/// Left free on every file system after an install, for logs and the host itself.
const DISK_SPARE: u64 = 256 << 20;

#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub name: &'static str,
    /// None: worth knowing, but no reason to stop.
    pub good: Option<bool>,
    pub what: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cure: String,
}

impl Finding {
    pub fn ok(name: &'static str, what: impl Into<String>) -> Self {
        Self { name, good: Some(true), what: what.into(), cure: String::new() }
    }
    pub fn note(name: &'static str, what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, good: None, what: what.into(), cure: cure.into() }
    }
    pub fn bad(name: &'static str, what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, good: Some(false), what: what.into(), cure: cure.into() }
    }
}

/// Stops with everything that is bad, if anything is.
pub fn refuse(findings: &[Finding]) -> Result<()> {
    let bad: Vec<&Finding> = findings.iter().filter(|f| f.good == Some(false)).collect();
    if bad.is_empty() {
        return Ok(());
    }
    let list: Vec<String> =
        bad.iter().map(|f| format!("\n  - {}: {}\n    do: {}", f.name, f.what, f.cure)).collect();
    Err(Error {
        code: Code::Preflight,
        what: format!("this host is not ready; nothing was changed. {} to mend:{}", bad.len(), list.concat()),
        cure: Some("mend these, then run the same command again; `zd doctor` looks again".into()),
    })
}

/// What does not depend on a bundle.
pub fn host(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    found.push(if facts.root {
        Finding::ok("root", "running as root")
    } else {
        Finding::bad("root", "not running as root", "sudo zd …")
    });
    found.push(if facts.systemd {
        Finding::ok("systemd", "systemd runs this host")
    } else {
        Finding::bad("systemd", "systemd does not run this host", "use a host booted with systemd")
    });
    found.push(match facts.cgroup {
        Cgroup::None => {
            Finding::bad("cgroups", "no cgroup file system at /sys/fs/cgroup", "boot with cgroups (v2)")
        }
        which => Finding::ok("cgroups", format!("{which:?}")),
    });
    let memory = ByteSize(facts.memory_bytes);
    found.push(if facts.memory_bytes >= MEMORY_MIN {
        Finding::ok("memory", memory.to_string())
    } else {
        let need = ByteSize(MEMORY_MIN);
        Finding::bad("memory", format!("{memory}, {need} needed"), "use a host with more memory")
    });
    found.push(match &facts.package_lock {
        None => Finding::ok("package manager", "not busy"),
        Some(who) => Finding::bad(
            "package manager",
            format!("busy: {who}"),
            "wait until it has finished (unattended-upgrades may take minutes)",
        ),
    });
    found
}

/// What a bundle needs of this host.
pub struct Wants<'a> {
    pub lock: &'a Lock,
    pub ip: Ipv4Addr,
    pub registry_port: u16,
    /// Bytes that the packages take when installed.
    pub packages_installed: u64,
    pub foreign_docker: bool,
    /// Nothing of this bundle is here yet: space has to be there for all of it.
    pub fresh: bool,
}

pub fn bundle(facts: &Facts, wants: &Wants) -> Result<Vec<Finding>> {
    let lock = wants.lock;
    let mut found = Vec::new();
    found.push(if lock.target == facts.target {
        Finding::ok("target", facts.target.to_string())
    } else {
        Finding::bad(
            "target",
            format!("the bundle is for {}, this host is {}", lock.target, facts.target),
            format!("bring a bundle packed for it: zd pack … --target {}", facts.target),
        )
    });
    found.push(if facts.has_ip(wants.ip) {
        Finding::ok("address", wants.ip.to_string())
    } else {
        let have: Vec<String> = facts.interfaces.iter().map(|i| i.ip.to_string()).collect();
        Finding::bad(
            "address",
            format!("{} is not an address of this host", wants.ip),
            format!("use one of: {}", have.join(", ")),
        )
    });
    found.push(if facts.now >= lock.created {
        Finding::ok("clock", facts.now.strftime("%F %T UTC").to_string())
    } else {
        Finding::bad(
            "clock",
            format!("this host says {}, but the bundle was packed {}", facts.now, lock.created),
            SET_CLOCK,
        )
    });
    ports(facts, wants, &mut found);
    programs(facts, wants, &mut found);
    if wants.fresh {
        disks(wants, &mut found)?;
    }
    firewall(facts, lock, &mut found);
    Ok(found)
}

fn ports(facts: &Facts, wants: &Wants, found: &mut Vec<Finding>) {
    let services = wants.lock.services.iter();
    let manifest = "stop it, or give the service another port in the manifest";
    let wanted = services
        .flat_map(|s| [(s.listen, "service", manifest), (s.standby_listen, "standby entry", manifest)]);
    let registry =
        (wants.registry_port, "private registry", "stop it, or take another: --registry-port PORT");
    // Of the stack, only before there is one: its units are ours and do not look it.
    let stack = STACK_PORTS.into_iter().filter(|_| wants.fresh && wants.lock.engine == Engine::Nomad);
    let stack = stack.map(|(port, what)| (port, what, "stop it"));
    for (port, what, cure) in wanted.chain([registry]).chain(stack) {
        match facts.listeners.iter().find(|l| l.port == port && !l.ours) {
            None => found.push(Finding::ok("port", format!("{port} for the {what} is free"))),
            Some(l) => found.push(Finding::bad(
                "port",
                format!("{port} for the {what} is taken by {}", l.owner),
                cure,
            )),
        }
    }
}

fn programs(facts: &Facts, wants: &Wants, found: &mut Vec<Finding>) {
    if wants.foreign_docker {
        found.push(if facts.docker_answers {
            Finding::note(
                "docker",
                "was here before zd: it is used as it is and left at uninstall",
                "set \"live-restore\": true in /etc/docker/daemon.json at the next occasion",
            )
        } else {
            Finding::bad("docker", "is installed and does not answer", "systemctl start docker, or remove it")
        });
    }
    for name in ["consul", "nomad", "consul-template"] {
        let Some(path) = facts.programs.get(name) else { continue };
        found.push(if wants.fresh && wants.lock.engine == Engine::Nomad {
            let what = format!("{} was here before zd, which brings its own", path.display());
            Finding::bad(name_of(name), what, "remove it, or pack with engine = \"docker\"")
        } else {
            let what = format!("{} was here before zd; this engine does not use it", path.display());
            Finding::note(name_of(name), what, "nothing: zd leaves it alone")
        });
    }
}

fn name_of(program: &str) -> &'static str {
    match program {
        "consul" => "consul",
        "nomad" => "nomad",
        _ => "consul-template",
    }
}

/// Exact needs, added up per file system.
fn disks(wants: &Wants, found: &mut Vec<Finding>) -> Result<()> {
    let lock = wants.lock;
    let sizes = |role| lock.blobs.iter().filter(|b| b.role == role).map(|b| b.size).sum::<u64>();
    use crate::bundle::lock::Role;
    let images: u64 = sizes(Role::ImageLayer) + sizes(Role::ImageConfig) + sizes(Role::ImageManifest);
    let unpacked: u64 = lock.images.iter().fold(0, |sum: u64, i| sum.saturating_add(i.unpacked));
    let needs = [
        (paths::OPT, sizes(Role::Deb) + sizes(Role::AptIndex) + sizes(Role::Binary) + (64 << 20)),
        ("/usr", wants.packages_installed),
        (paths::VAR, images),
        (paths::DOCKER_DATA, unpacked),
    ];
    let mut by_device: BTreeMap<u64, (u64, u64, Vec<&str>)> = BTreeMap::new();
    for (path, need) in needs {
        let (device, free) = space(Path::new(path))?;
        let entry = by_device.entry(device).or_insert((0, free, Vec::new()));
        entry.0 = entry.0.saturating_add(need);
        entry.2.push(path);
    }
    for (need, free, on) in by_device.into_values() {
        let need = need.saturating_add(DISK_SPARE);
        let on = on.join(", ");
        let what = format!("{} needed, {} free for {on}", ByteSize(need), ByteSize(free));
        found.push(if need <= free {
            Finding::ok("disk", what)
        } else {
            Finding::bad("disk", what, format!("free {} there", ByteSize(need - free)))
        });
    }
    Ok(())
}

fn firewall(facts: &Facts, lock: &Lock, found: &mut Vec<Finding>) {
    let Some(kind) = &facts.firewall else { return };
    let ports: Vec<String> = lock.services.iter().map(|s| format!("tcp {}", s.listen)).collect();
    found.push(Finding::note(
        "firewall",
        format!("{} is active; clients need {}", kind.name(), ports.join(", ")),
        "--open-firewall opens them",
    ));
}
