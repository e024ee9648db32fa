//! Where everything lives on a host (DESIGN: host layout). One place, so that uninstall finds it all.

use std::path::PathBuf;

use crate::ids::{Name, Slot};

pub const OPT: &str = "/opt/zd";
pub const TOOL: &str = "/opt/zd/bin/zd";
pub const TOOL_LINK: &str = "/usr/local/bin/zd";
pub const GENERATIONS: &str = "/opt/zd/generations";
pub const CURRENT: &str = "/opt/zd/generations/current";
pub const LOCK_FILE: &str = "zd-lock.json";

pub const ETC: &str = "/etc/zd";
pub const HOST_TOML: &str = "/etc/zd/host.toml";
pub const TRUST: &str = "/etc/zd/trust";
pub const CA: &str = "/etc/zd/tls/ca.crt";
pub const CA_KEY: &str = "/etc/zd/tls/ca.key";
pub const REGISTRY_ETC: &str = "/etc/zd/registry";
pub const REGISTRY_PASSWORD: &str = "/etc/zd/registry/password";

pub const VAR: &str = "/var/lib/zd";
pub const REGISTRY_DATA: &str = "/var/lib/zd/registry";
pub const SERVICES: &str = "/var/lib/zd/services";
pub const RECEIPTS: &str = "/var/lib/zd/receipts";
pub const LOG: &str = "/var/log/zd";
pub const AUDIT: &str = "/var/log/zd/audit.jsonl";
pub const AUDIT_HEAD: &str = "/var/lib/zd/audit.head";
pub const RUN: &str = "/run/zd";
pub const LOCK: &str = "/run/zd/lock";

pub const UNITS: &str = "/etc/systemd/system";
pub const DOCKER_SOCKET: &str = "/var/run/docker.sock";

/// Users that services run as.
pub const REGISTRY_USER: &str = "zd-registry";
pub const NGINX_USER: &str = "zd-nginx";

pub fn generation(n: u32) -> PathBuf {
    format!("{GENERATIONS}/{n}").into()
}

/// Folder of a service's pointer and state.
pub fn service(name: &Name) -> PathBuf {
    format!("{SERVICES}/{name}").into()
}

pub fn run(name: &Name) -> PathBuf {
    format!("{RUN}/{name}").into()
}

pub fn log(name: &Name) -> PathBuf {
    format!("{LOG}/{name}").into()
}

pub fn nginx_conf(name: &Name) -> PathBuf {
    format!("{ETC}/nginx/{name}.conf").into()
}

pub fn nginx_unit(name: &Name) -> String {
    format!("zd-nginx@{name}.service")
}

pub fn container(service: &Name, slot: Slot, instance: u8) -> String {
    format!("zd-{service}-{slot}-{instance}")
}
