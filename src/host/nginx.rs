//! The nginx of a service: its gate configuration, rendered from one place and checked by nginx itself, and
//! what the running one says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use procfs::process::FDTarget;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use serde_json::{Value, json};

use super::config::Installed;
use super::paths::NGINX_USER;
use super::{exec, fs, http, paths};
use crate::assets;
use crate::bundle::manifest::{Door, Engine, LongLived, Service, Tcp};
use crate::error::{At, Code, Error, OrCode, Result};
use crate::ids::{Name, Slot};

/// Idle connections kept to each pool, per worker.
const KEEPALIVE: u32 = 256;

/// Both pools of a service: the address and weight of each instance.
pub fn pools(installed: &Installed, service: &Service) -> Value {
    json!({
        "blue": pool(installed, service, Slot::Blue, service.port),
        "green": pool(installed, service, Slot::Green, service.port),
    })
}

fn pool(installed: &Installed, service: &Service, slot: Slot, port: u16) -> Vec<Value> {
    let weight = |i: usize| service.weights.get(i).copied().unwrap_or(1);
    let addresses = installed.addresses_at(service, slot, port).into_iter().enumerate();
    addresses.map(|(i, at)| json!({ "address": at.to_string(), "weight": weight(i) })).collect()
}

/// The sockets of one inlet, and the pools behind them. These never come from Consul: zd gives every container its address, with
/// either engine, and consul-template could write only the ports of HTTP into the file it has.
fn slots(installed: &Installed, service: &Service, door: &Door, port: u16) -> [Value; 2] {
    Slot::BOTH.map(|slot| {
        json!({
            "name": slot,
            "socket": paths::socket(&service.name, slot, door),
            "pool": pool(installed, service, slot, port),
        })
    })
}

fn tcp(installed: &Installed, service: &Service) -> Vec<Value> {
    let port = |tcp: &Tcp| {
        let listen = tcp.listen();
        json!({ "listen": listen, "slots": slots(installed, service, &Door::Listen(listen), tcp.port) })
    };
    service.tcp.iter().map(port).collect()
}

fn long_lived(installed: &Installed, service: &Service) -> Vec<Value> {
    let path = |LongLived { path, .. }: &LongLived| {
        let slots = slots(installed, service, &Door::Path(path.clone()), service.port);
        json!({ "path": path, "key": paths::key(path), "slots": slots })
    };
    service.long_lived.iter().map(path).collect()
}

/// Where Consul keeps them.
pub fn pools_key(service: &Name) -> String {
    format!("zd/services/{service}/pools")
}

/// How nginx treats the servers of a pool.
pub fn pool_settings(service: &Service) -> Value {
    json!({
        "service": service.name,
        "max_fails": service.max_fails,
        "fail_timeout_s": service.fail_timeout,
        "keepalive": KEEPALIVE,
    })
}

pub fn render(installed: &Installed, service: &Service) -> Result<String> {
    let name = &service.name;
    // With Consul, the pools are what consul-template makes of it.
    let pools_file = (installed.lock.engine == Engine::Nomad).then(|| paths::nginx_pools(name));
    assets::render(
        "nginx.conf",
        assets::NGINX_CONF,
        json!({
            "service": name,
            "run_dir": paths::run(name),
            "pointer_dir": paths::service(name),
            "log_dir": paths::log(name),
            "listen": service.listen,
            "standby_listen": service.standby_listen,
            "standby_allow": service.standby_allow,
            "paths": service.paths,
            "health": service.health,
            "server_names": service.server_names,
            "pools_file": pools_file,
            "pools": pools(installed, service),
            "max_fails": service.max_fails,
            "fail_timeout_s": service.fail_timeout,
            "keepalive": KEEPALIVE,
            "read_timeout_s": service.read_timeout,
            "max_body": "0",
            "tcp": tcp(installed, service),
            "long_lived": long_lived(installed, service),
        }),
    )
}

/// Addresses of all servers of both pools, sorted.
pub fn servers_of(installed: &Installed, service: &Service) -> Vec<String> {
    let all = Slot::BOTH.into_iter().flat_map(|slot| installed.addresses(service, slot));
    let mut all: Vec<_> = all.map(|address| address.to_string()).collect();
    all.sort();
    all
}

/// Addresses of all servers that a file of pools names, sorted.
pub fn servers(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).at(path)?;
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("server ")?.split(' ').next());
    let mut all: Vec<_> = servers.map(str::to_owned).collect();
    all.sort();
    Ok(all)
}

/// nginx's own word on its configuration, as the user it runs as; it tries to bind, so it has to be allowed the
/// low ports as its unit is.
pub async fn check(service: &Name) -> Result<()> {
    let conf = paths::nginx_conf(service);
    let (reuid, regid) = (format!("--reuid={NGINX_USER}"), format!("--regid={NGINX_USER}"));
    exec::run(&[
        "setpriv",
        &reuid,
        &regid,
        "--clear-groups",
        "--inh-caps=+net_bind_service",
        "--ambient-caps=+net_bind_service",
        "--",
        "nginx",
        "-q",
        "-t",
        "-c",
        conf.to_string_lossy().as_ref(),
    ])
    .await
    .map(drop)
}

/// Sends HUP: new workers with the configuration on disk, and the old ones finish what they have.
pub async fn hang_up(service: &Name) -> Result<()> {
    let unit = paths::nginx_unit(service);
    exec::run(&["systemctl", "kill", "--kill-who=main", "-s", "HUP", &unit]).await.map(drop)
}

/// The master process, by its pid file.
pub fn master(service: &Name) -> Option<u32> {
    read_pid(service, "nginx.pid")
}

/// The master that another binary is taking over from, for as long as both are there (nginx(8)).
pub fn master_before(service: &Name) -> Option<u32> {
    read_pid(service, "nginx.pid.oldbin")
}

/// Both masters take requests: the other binary has started, and the one before has not been retired.
pub fn is_being_replaced(service: &Name) -> Result<bool> {
    match master_before(service) {
        // One that only waits for sessions to end takes no work any more.
        Some(before) => Ok(!workers_of(before)?.is_empty()),
        None => Ok(false),
    }
}

fn read_pid(service: &Name, file: &str) -> Option<u32> {
    let pid = std::fs::read_to_string(paths::run(service).join(file)).ok()?.trim().parse().ok()?;
    Path::new(&format!("/proc/{pid}/exe")).exists().then_some(pid)
}

/// Removes sockets of nginx's that nobody listens on: a killed nginx, or a reload that failed half way, left
/// them, and nginx does not bind where a file is.
pub fn remove_stale_sockets(service: &Name) -> Result<()> {
    let dir = paths::run(service);
    let used: BTreeSet<PathBuf> = unix_sockets()?.into_iter().filter_map(|s| s.path).collect();
    for entry in std::fs::read_dir(&dir).at(&dir)? {
        let path = entry.at(&dir)?.path();
        if path.extension().is_some_and(|e| e == "sock") && !used.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Unix sockets of this host, those that wait to be accepted included: they have inode 0.
pub fn unix_sockets() -> Result<Vec<procfs::net::UnixNetEntry>> {
    procfs::net::unix().or_code(Code::Io, "/proc/net/unix")
}

/// Ends connections that an nginx has, named by the inodes of their sockets, as if the other side had closed
/// them. The sockets are taken from it by pidfd_getfd(2), which needs root and Linux 5.6. Workers that only finish
/// what they have, and those of a master before, are found as well.
pub fn hang_up_on(inodes: &BTreeSet<u64>) -> Result<()> {
    let all = procfs::process::all_processes().or_code(Code::Io, "/proc")?;
    // A process may end while it is looked at; its connections end with it.
    for process in all.flatten().filter(|p| p.stat().is_ok_and(|s| s.comm == "nginx")) {
        for fd in process.fd().into_iter().flatten().flatten() {
            match fd.target {
                FDTarget::Socket(inode) if inodes.contains(&inode) => shut(process.pid, fd.fd, inode)
                    .or_code(Code::Nginx, format!("a session of nginx (process {})", process.pid))?,
                _ => {}
            }
        }
    }
    Ok(())
}

fn shut(pid: i32, fd: i32, inode: u64) -> std::io::Result<()> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    let socket = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .and_then(|process| rustix::process::pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()));
    let socket = match socket {
        Err(Errno::BADF | Errno::SRCH) => return Ok(()),
        socket => socket?,
    };
    // The number may stand for another socket by now.
    if rustix::fs::fstat(&socket)?.st_ino != inode {
        return Ok(());
    }
    match rustix::net::shutdown(&socket, rustix::net::Shutdown::Both) {
        Err(Errno::NOTCONN) => Ok(()),
        done => Ok(done?),
    }
}

/// Workers that take new connections.
pub fn workers(service: &Name) -> Result<Vec<u32>> {
    let unit = paths::nginx_unit(service);
    workers_of(master(service).ok_or_else(|| Code::Nginx.err(format!("{unit} does not run")))?)
}

/// Of these sockets those that the running master's workers have, also workers that only finish what they have: the
/// requests of all these are in its `stub_status`. Those of a master before it are not.
pub fn held_by_workers(service: &Name, inodes: &BTreeSet<u64>) -> Result<BTreeSet<u64>> {
    let unit = paths::nginx_unit(service);
    let master = master(service).ok_or_else(|| Code::Nginx.err(format!("{unit} does not run")))?;
    let mut held = BTreeSet::new();
    for pid in children(master)? {
        // One that has just ended has none. Some 4 µs each, so no further than needed.
        for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            if held.len() == inodes.len() {
                return Ok(held);
            }
            let link = std::fs::read_link(fd.path()).unwrap_or_default();
            let inode =
                link.to_str().and_then(|l| l.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            held.extend(inode.filter(|inode| inodes.contains(inode)));
        }
    }
    Ok(held)
}

/// Those of one master.
pub fn workers_of(master: u32) -> Result<Vec<u32>> {
    let children = children(master)?;
    let title = |pid: &u32| {
        let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&title).into_owned()
    };
    // The title of one that only finishes what it has ends so; another master is a child as well.
    let works = |title: String| title.starts_with("nginx: worker") && !title.contains("shutting down");
    Ok(children.into_iter().filter(|pid| works(title(pid))).collect())
}

fn children(master: u32) -> Result<Vec<u32>> {
    let pid = i32::try_from(master).or_code(Code::Bug, "a process id")?;
    procfs::process::Process::new(pid)
        .and_then(|master| master.task_main_thread()?.children())
        .or_code(Code::Nginx, format!("the workers of nginx {master}"))
}

/// stub_status of a running nginx, over one connection.
pub struct Status {
    connection: http::Connection,
    service: Name,
}

/// Connections by what they are at.
pub struct Connections {
    /// Requests from before the first look at the pointer until the last byte is out, the one that asks included.
    pub writing: u64,
    /// Open, and no request on them.
    pub waiting: u64,
}

impl Status {
    pub async fn open(service: &Name) -> Result<Self> {
        let socket = paths::run(service).join("status.sock");
        let connection = http::Connection::unix(&socket).await.map_err(|why| no_status(service, &why))?;
        Ok(Self { connection, service: service.clone() })
    }

    pub async fn read(&mut self) -> Result<Connections> {
        let answer =
            self.connection.get("localhost", "/").await.map_err(|why| no_status(&self.service, &why))?;
        let number = |label: &str| -> Option<u64> {
            answer.body.split(label).nth(1)?.split_whitespace().next()?.parse().ok()
        };
        match (number("Writing:"), number("Waiting:")) {
            (Some(writing), Some(waiting)) => Ok(Connections { writing, waiting }),
            _ => Err(no_status(&self.service, "its status page is not as expected")),
        }
    }
}

fn no_status(service: &Name, why: &str) -> Error {
    Code::Nginx
        .err(format!("nginx of {service} does not say how many requests it serves: {why}"))
        .cure(format!("see `systemctl status {}`", paths::nginx_unit(service)))
}
