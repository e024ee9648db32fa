//! Is the host fit? All findings at once; each bad one with its cure. "Could not look" is a note.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use bytesize::ByteSize;
use serde::Serialize;

use crate::bundle::Lock;
use crate::bundle::lock::{Blob, Image};
use crate::bundle::manifest::{CONSUL_HTTPS, Engine, Service};
use crate::error::{Code, Error, Result};
use crate::facts::{Cgroup, Facts, Listener, space};
use crate::host::config::Installed;
use crate::host::{paths, stores};
use crate::plan::slot;

/// Memory that dockerd, the registry and nginx need beside the services.
const MEMORY_MIN: u64 = 768 << 20;
/// What Consul, Nomad and consul-template take beside that, and what Nomad and containerd keep running for each
/// container (measured: 134 MB, and 50 MB of which most is shared).
const STACK_MEMORY: u64 = 256 << 20;
const CONTAINER_MEMORY: u64 = 16 << 20;
/// Cure of a clock that is wrong.
pub const SET_CLOCK: &str = "set the clock: timedatectl set-time 'YYYY-MM-DD hh:mm:ss'";
const SERVICE_PORT: &str = "stop it, or give the service another port in the manifest";
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

/// Stores of the installed engine that are broken: an install or an upgrade would wait for an agent that cannot start.
pub async fn stores(installed: &Installed) -> Result<Vec<Finding>> {
    let broken = stores::diagnose(installed).await?;
    Ok(broken.iter().map(|broken| Finding::bad("store", broken.what(), broken.cure())).collect())
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
    found.push(address(facts, wants.ip, wants.fresh));
    found.push(if facts.now >= lock.created {
        Finding::ok("clock", facts.now.strftime("%F %T UTC").to_string())
    } else {
        Finding::bad(
            "clock",
            format!("this host says {}, but the bundle was packed {}", facts.now, lock.created),
            SET_CLOCK,
        )
    });
    found.push(memory(facts.memory_bytes, lock));
    ports(facts, lock, wants.registry_port, wants.fresh, &mut found);
    programs(facts, wants, &mut found);
    if wants.fresh {
        disks(lock, None, wants.packages_installed, &mut found)?;
    }
    found.extend(firewall(facts, lock));
    Ok(found)
}

/// Where the registry listens has to be this host's own address.
pub fn address(facts: &Facts, ip: Ipv4Addr, fresh: bool) -> Finding {
    if facts.has_ip(ip) {
        return Finding::ok("address", ip.to_string());
    }
    let have: Vec<String> = facts.plausible().map(|i| i.ip.to_string()).collect();
    let have = have.join(", ");
    let cure = if fresh {
        format!("use one of: {have}; or add it first: ip address add {ip}/PREFIX dev INTERFACE")
    } else {
        format!("zd reconfigure --ip with one of: {have}; or give it back to an interface")
    };
    Finding::bad("address", format!("{ip} is not an address of this host"), cure)
}

/// What another address, or another port of the registry, needs of an installed host.
pub fn moved(facts: &Facts, to: &Installed) -> Vec<Finding> {
    let (ip, port) = (to.host.ip, to.host.registry_port);
    let mut found = vec![address(facts, ip, true)];
    if to.host.is_container(ip) {
        let what = format!("{ip} is in {}.0.0/16, the network of zd's own containers", to.host.subnet);
        found.push(Finding::bad("address", what, "use an address that other machines reach this host by"));
    }
    found.extend(registry_port(&to.lock, port));
    found.extend(consul_https(facts, to));
    let cure = "stop it, or take another: --registry-port PORT";
    found.push(port_on(facts, ip, port, "private registry", cure));
    found
}

/// What another bundle needs of a host that serves one already. What a generation gone back to has in its manifest is
/// not placed anew: the slots stay as they are.
pub fn another(facts: &Facts, to: &Installed, placed: bool) -> Vec<Finding> {
    let mut found: Vec<Finding> = placed.then(|| memory(facts.memory_bytes, &to.lock)).into_iter().collect();
    found.extend(registry_port(&to.lock, to.host.registry_port));
    found.extend(consul_https(facts, to));
    for (port, what) in to.lock.services.iter().flat_map(Service::ports) {
        found.push(free(facts, port, what, SERVICE_PORT, Listener::is_zds));
    }
    found
}

/// The port of Consul's that others reach, on a host that has zd.
fn consul_https(facts: &Facts, to: &Installed) -> Option<Finding> {
    let cure = "stop it, or give consul-https another port in the manifest";
    to.lock.consul_https.map(|port| port_on(facts, to.host.ip, port, CONSUL_HTTPS, cure))
}

/// Whether a port of an address is free, or zd's.
fn port_on(facts: &Facts, ip: Ipv4Addr, port: u16, what: &str, cure: &str) -> Finding {
    let meets = |other: IpAddr| other.is_unspecified() || other.to_canonical() == IpAddr::V4(ip);
    match facts.listeners.iter().find(|l| l.port == port && !l.is_zds() && meets(l.ip)) {
        None => Finding::ok("port", format!("{port} for the {what} is free on {ip}")),
        Some(l) => {
            Finding::bad("port", format!("{port} for the {what} is taken on {ip} by {}", l.owner), cure)
        }
    }
}

/// Another part of zd has, or will have, the port that is wanted for the registry: on loopback, too.
fn registry_port(lock: &Lock, wanted: u16) -> Option<Finding> {
    let services = lock.services.iter();
    let services =
        services.flat_map(|s| s.ports().map(move |(port, what)| (port, format!("{what} of {}", s.name))));
    let mut all = services.chain(lock.stack_ports().map(|(port, what)| (port, what.to_owned())));
    let (port, owner) = all.find(|(port, _)| *port == wanted)?;
    let what = format!("{port} is wanted for the private registry and for the {owner}");
    Some(Finding::bad(
        "port",
        what,
        "take another for the registry: --registry-port PORT of zd install or zd reconfigure",
    ))
}

/// What the containers of both slots may take. Nomad places only what it has room for by their memory-mb; to Docker
/// that is a limit, which not all have to reach at once.
fn memory(has: u64, lock: &Lock) -> Finding {
    let nomad = lock.engine == Engine::Nomad;
    let unset = if nomad { slot::MEMORY_MB } else { 0 };
    let (mut containers, mut claimed) = (0, 0u64);
    for service in &lock.services {
        let both = 2 * u64::from(service.instances);
        let each = if service.memory_mb == 0 { unset } else { service.memory_mb };
        containers += both;
        claimed = claimed.saturating_add(both * (u64::from(each) << 20));
    }
    let stack = MEMORY_MIN + if nomad { STACK_MEMORY } else { 0 } + containers * CONTAINER_MEMORY;
    let needed = claimed.saturating_add(stack);
    let what = format!(
        "{} for {containers} containers of both slots and {} for what runs them; this host has {}",
        ByteSize(claimed),
        ByteSize(stack),
        ByteSize(has)
    );
    let cure = "a smaller memory-mb or fewer instances in the manifest, or more memory for this host";
    if nomad && claimed > has {
        Finding::bad("memory", format!("{what}: Nomad cannot place them all"), cure)
    } else if needed > has {
        Finding::note("memory", what, cure)
    } else {
        Finding::ok("memory", what)
    }
}

/// Whether every port is free, or zd's; on a `fresh` host: was zd's before.
fn ports(facts: &Facts, lock: &Lock, registry: u16, fresh: bool, found: &mut Vec<Finding>) {
    let services = lock.services.iter();
    let wanted = services.flat_map(Service::ports).map(|(port, what)| (port, what, SERVICE_PORT));
    // Between the others the manifest has seen to it.
    found.extend(registry_port(lock, registry));
    let registry = (registry, "private registry", "stop it, or take another: --registry-port PORT");
    let ours = |l: &Listener| if fresh { l.ours } else { l.is_zds() };
    // Where there is a stack, others may have its ports on other addresses than loopback.
    let stack = lock.stack_ports().filter(|(port, _)| fresh || Some(*port) == lock.consul_https);
    let stack = stack.map(|(port, what)| (port, what, "stop it"));
    for (port, what, cure) in wanted.chain([registry]).chain(stack) {
        found.push(free(facts, port, what, cure, ours));
    }
}

/// Whether a port is free on every address, or ours.
fn free(facts: &Facts, port: u16, what: &str, cure: &str, ours: impl Fn(&Listener) -> bool) -> Finding {
    match facts.listeners.iter().find(|l| l.port == port && !ours(l)) {
        None => Finding::ok("port", format!("{port} for the {what} is free")),
        Some(l) => Finding::bad("port", format!("{port} for the {what} is taken by {}", l.owner), cure),
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

/// Whether a further generation fits beside the present one.
pub fn room(lock: &Lock, present: Option<&Lock>) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    disks(lock, present, 0, &mut found)?;
    Ok(found)
}

/// Exact needs, added up per file system; of images only what `present` has not brought.
fn disks(
    lock: &Lock,
    present: Option<&Lock>,
    packages_installed: u64,
    found: &mut Vec<Finding>,
) -> Result<()> {
    use crate::bundle::lock::Role;
    let kept =
        |role| matches!(role, Role::ImageLayer | Role::ImageConfig | Role::ImageManifest | Role::Binary);
    let here = |b: &Blob| kept(b.role) && present.is_some_and(|lock| lock.blobs.contains(b));
    let sizes = |role| lock.blobs.iter().filter(|b| b.role == role && !here(b)).map(|b| b.size).sum::<u64>();
    let images: u64 = sizes(Role::ImageLayer) + sizes(Role::ImageConfig) + sizes(Role::ImageManifest);
    let new = |i: &&Image| present.is_none_or(|lock| lock.images.iter().all(|p| p.manifest != i.manifest));
    let unpacked: u64 = lock.images.iter().filter(new).fold(0, |sum: u64, i| sum.saturating_add(i.unpacked));
    let needs = [
        (paths::OPT, sizes(Role::Deb) + sizes(Role::AptIndex) + sizes(Role::Binary) + (64 << 20)),
        ("/usr", packages_installed),
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

/// What clients need of an active firewall.
pub fn firewall(facts: &Facts, lock: &Lock) -> Option<Finding> {
    let name = facts.firewall.as_ref()?.name();
    let ports: Vec<String> = lock.client_ports().map(|port| format!("tcp {port}")).collect();
    let what = format!("{name} is active; clients need {}", ports.join(", "));
    Some(Finding::note("firewall", what, "zd install --open-firewall opens them"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Interface;

    fn installed(engine: Engine, registry_port: u16) -> Installed {
        let mut lock =
            Lock::parse(include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json")).unwrap();
        lock.engine = engine;
        lock.services[0].tcp = vec![toml::from_str("port = 5000\nlisten = 5001").unwrap()];
        let mut host: crate::host::config::HostConfig =
            toml::from_str(include_str!("../../tests/fixtures/before-upgrade/host.toml")).unwrap();
        host.registry_port = registry_port;
        Installed { host, lock }
    }

    /// Nothing listens: what is asked is who will.
    fn facts(to: &Installed) -> Facts {
        Facts {
            target: to.lock.target.clone(),
            root: true,
            systemd: true,
            memory_bytes: 8 << 30,
            cgroup: Cgroup::V2,
            now: to.lock.created,
            interfaces: vec![Interface { name: "eth0".into(), ip: to.host.ip }],
            way_out: None,
            routes: Vec::new(),
            listeners: Vec::new(),
            firewall: None,
            programs: BTreeMap::new(),
            docker_answers: true,
            package_lock: None,
        }
    }

    #[test]
    fn the_registry_takes_no_port_of_another_part() {
        for (engine, port, owner) in [
            (Engine::Nomad, 8500, "HTTP of Consul"),
            (Engine::Nomad, 4648, "gossip of Nomad"),
            (Engine::Nomad, 80, "service of hello"),
            (Engine::Docker, 8081, "standby entry of hello"),
            (Engine::Docker, 5001, "TCP service of hello"),
        ] {
            let to = installed(engine, port);
            let said = format!("{port} is wanted for the private registry and for the {owner}");
            let e = refuse(&moved(&facts(&to), &to)).unwrap_err();
            assert!(e.code == Code::Preflight && e.what.contains(&said), "{}", e.what);
            let mut found = Vec::new();
            ports(&facts(&to), &to.lock, port, true, &mut found);
            assert!(found.iter().any(|f| f.good == Some(false) && f.what == said), "{found:?}");
        }
        for (engine, port) in [(Engine::Nomad, 5444), (Engine::Docker, 8500)] {
            let to = installed(engine, port);
            refuse(&moved(&facts(&to), &to)).unwrap();
        }
    }
}
