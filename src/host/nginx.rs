//! The nginx of a service: its gate configuration, rendered from one place and checked by nginx itself, and
//! what the running one says.

use std::path::Path;

use serde_json::{Value, json};

use super::config::Installed;
use super::{exec, http, paths};
use crate::assets;
use crate::bundle::manifest::{Engine, Service};
use crate::error::{At, Code, Error, OrCode, Result};
use crate::ids::{Name, Slot};

/// Idle connections kept to each pool, per worker.
const KEEPALIVE: u32 = 256;

/// Both pools of a service: the address and weight of each instance.
pub fn pools(installed: &Installed, service: &Service) -> Value {
    let pool = |slot: Slot| -> Vec<Value> {
        let weight = |i: usize| service.weights.get(i).copied().unwrap_or(1);
        let addresses = installed.addresses(service, slot).into_iter().enumerate();
        addresses.map(|(i, at)| json!({ "address": at.to_string(), "weight": weight(i) })).collect()
    };
    json!({ "blue": pool(Slot::Blue), "green": pool(Slot::Green) })
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

/// nginx's own word on its configuration, as the user it runs as.
pub async fn check(service: &Name) -> Result<()> {
    let conf = paths::nginx_conf(service);
    let conf = conf.to_string_lossy();
    exec::run(&["runuser", "-u", paths::NGINX_USER, "--", "nginx", "-q", "-t", "-c", conf.as_ref()])
        .await
        .map(drop)
}

/// Sends HUP: new workers with the configuration on disk, and the old ones finish what they have.
pub async fn hang_up(service: &Name) -> Result<()> {
    let unit = paths::nginx_unit(service);
    exec::run(&["systemctl", "kill", "--kill-who=main", "-s", "HUP", &unit]).await.map(drop)
}

/// Workers that take new connections.
pub fn workers(service: &Name) -> Result<Vec<u32>> {
    let path = paths::run(service).join("nginx.pid");
    let pid =
        std::fs::read_to_string(&path).at(&path)?.trim().parse().or_code(Code::Nginx, path.display())?;
    let children = procfs::process::Process::new(pid)
        .and_then(|master| master.task_main_thread()?.children())
        .or_code(Code::Nginx, format!("the workers of {}", paths::nginx_unit(service)))?;
    // The title of one that only finishes what it has ends so.
    let finishing = |pid: &u32| {
        let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        title.is_empty() || String::from_utf8_lossy(&title).contains("shutting down")
    };
    Ok(children.into_iter().filter(|pid| !finishing(pid)).collect())
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
