//! The nginx of a service: its gate configuration, rendered from one place and checked by nginx itself, and
//! what the running one says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use procfs::process::{FDTarget, Process};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};
use serde_json::{Value, json};

use super::config::Installed;
use super::paths::NGINX_USER;
use super::{exec, fs, http, paths, systemd};
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
            "gate": paths::gate(name),
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
            "clients": service.clients,
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
    let text = fs::read(path)?;
    let text = String::from_utf8_lossy(&text);
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
    let (unit, masters) = (paths::nginx_unit(service), Masters::of(service).await?);
    match masters.before()? {
        // By systemd: `zd reload` runs in a sandbox that lets it signal nobody.
        None => {
            let argv = ["systemctl", "kill", "--kill-who=main", "-s", "HUP", &unit];
            exec::run(&argv).await.map(drop)
        }
        // To systemd that one is the main process.
        Some(_) => signal(service, masters.current()?, Signal::HUP).await,
    }
}

/// The master processes of a service, from the one that systemd knows. nginx's own files of process ids are in a folder
/// of its account, and whoever has that account could name anybody there.
pub struct Masters {
    main: u32,
}

impl Masters {
    pub async fn of(service: &Name) -> Result<Self> {
        let unit = paths::nginx_unit(service);
        let main = systemd::main_pid(&unit).await?;
        main.map(|main| Self { main }).ok_or_else(|| Code::Nginx.err(format!("{unit} does not run")))
    }

    /// The one whose workers take requests: where there are two, the newer.
    pub fn current(&self) -> Result<u32> {
        self.both().map(|(_, current)| current)
    }

    /// The one that another binary is taking over from, for as long as both are there (nginx(8)).
    pub fn before(&self) -> Result<Option<u32>> {
        self.both().map(|(before, _)| before)
    }

    /// A new binary's master is a child of the one before, and systemd's main process is the older until that ends.
    fn both(&self) -> Result<(Option<u32>, u32)> {
        let is_master = |pid: &u32| title(*pid).starts_with("nginx: master");
        if let Some(newer) = children(self.main)?.into_iter().find(is_master) {
            return Ok((Some(self.main), newer));
        }
        let parent = process(self.main)?.stat().map(|stat| stat.ppid as u32);
        let parent = parent.or_code(Code::Nginx, format!("nginx {}", self.main))?;
        Ok((Some(parent).filter(is_master), self.main))
    }

    /// Both take requests: the other binary has started, and the one before has not been retired.
    pub fn is_being_replaced(&self) -> Result<bool> {
        match self.before()? {
            // One that only waits for sessions to end takes no work any more.
            Some(before) => Ok(!workers_of(before)?.is_empty()),
            None => Ok(false),
        }
    }

    /// Workers that take new connections.
    pub fn workers(&self) -> Result<Vec<u32>> {
        workers_of(self.current()?)
    }

    /// All processes of the current master's, workers that only finish what they have included.
    pub fn processes(&self) -> Result<Vec<u32>> {
        children(self.current()?)
    }

    /// Of these sockets those that the current master's workers have, also workers that only finish what they have: the
    /// requests of all these are in its `stub_status`. Those of a master before it are not.
    pub fn held_by_workers(&self, inodes: &BTreeSet<u64>) -> Result<BTreeSet<u64>> {
        let mut held = BTreeSet::new();
        for pid in self.processes()? {
            // One that has just ended has none. Some 4 µs each, so no further than needed.
            for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                if held.len() == inodes.len() {
                    return Ok(held);
                }
                let link = std::fs::read_link(fd.path()).unwrap_or_default();
                let inode = link.to_str().and_then(socket_inode);
                held.extend(inode.filter(|inode| inodes.contains(inode)));
            }
        }
        Ok(held)
    }
}

/// What a link in /proc/PID/fd says of a socket: `socket:[INODE]` (proc_pid_fd(5)).
pub fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Signals a process of a service's unit, and never another that has its number.
pub async fn signal(service: &Name, pid: u32, signal: Signal) -> Result<()> {
    let unit = paths::nginx_unit(service);
    let what = || format!("a signal to process {pid} of {unit}");
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| Code::Bug.err(what()))?;
    let handle = rustix::process::pidfd_open(number, PidfdFlags::empty()).or_code(Code::Nginx, what())?;
    // After the handle: where the number was given to another since then, the handle leads to nobody.
    if !systemd::is_in(pid, &systemd::cgroup(&unit).await?) {
        return Err(Code::Nginx.err(format!("process {pid} is none of {unit}, and gets no signal from zd")));
    }
    rustix::process::pidfd_send_signal(&handle, signal).or_code(Code::Nginx, what())
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

/// Workers of one master that take new connections.
pub fn workers_of(master: u32) -> Result<Vec<u32>> {
    // The title of one that only finishes what it has ends so; another master is a child as well.
    let works = |title: String| title.starts_with("nginx: worker") && !title.contains("shutting down");
    Ok(children(master)?.into_iter().filter(|pid| works(title(*pid))).collect())
}

fn title(pid: u32) -> String {
    let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&title).into_owned()
}

fn process(pid: u32) -> Result<Process> {
    let pid = i32::try_from(pid).or_code(Code::Bug, "a process id")?;
    Process::new(pid).or_code(Code::Nginx, format!("nginx {pid}"))
}

fn children(master: u32) -> Result<Vec<u32>> {
    let children = process(master)?.task_main_thread().and_then(|main| main.children());
    children.or_code(Code::Nginx, format!("the workers of nginx {master}"))
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
        // By a handle: nginx's account could put another's socket under this name.
        let path = paths::run(service).join("status.sock");
        let (_handle, socket) = fs::socket(&path).map_err(|e| no_status(service, &e.what))?;
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
