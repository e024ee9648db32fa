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
pub const SECRETS: &str = "/etc/zd/secrets";
pub const DOCKER_AUTH: &str = "/etc/zd/secrets/docker-auth.json";
pub const NOMAD_CERT: &str = "/etc/zd/tls/nomad.crt";
pub const NOMAD_KEY: &str = "/etc/zd/tls/nomad.key";
pub const CONSUL_ETC: &str = "/etc/zd/consul.d";
pub const NOMAD_ETC: &str = "/etc/zd/nomad.d";
pub const CONSUL_TEMPLATE_ETC: &str = "/etc/zd/consul-template.d";
pub const TEMPLATES: &str = "/etc/zd/templates";
pub const LOGROTATE_CONF: &str = "/etc/zd/logrotate.conf";

pub const VAR: &str = "/var/lib/zd";
pub const REGISTRY_DATA: &str = "/var/lib/zd/registry";
pub const CONSUL_DATA: &str = "/var/lib/zd/consul";
pub const NOMAD_DATA: &str = "/var/lib/zd/nomad";
/// What consul-template writes; nginx reads a copy that it has checked.
pub const POOLS: &str = "/var/lib/zd/pools";
pub const SERVICES: &str = "/var/lib/zd/services";
pub const RECEIPTS: &str = "/var/lib/zd/receipts";
pub const LOG: &str = "/var/log/zd";
pub const AUDIT: &str = "/var/log/zd/audit.jsonl";
pub const AUDIT_HEAD: &str = "/var/lib/zd/audit.head";
pub const RUN: &str = "/run/zd";
pub const LOCK: &str = "/run/zd/lock";

pub const DOCKER_DATA: &str = "/var/lib/docker";
pub const UNITS: &str = "/etc/systemd/system";
pub const DOCKER_SOCKET: &str = "/var/run/docker.sock";

/// Users that services run as.
pub const REGISTRY_USER: &str = "zd-registry";
pub const NGINX_USER: &str = "zd-nginx";
pub const CONSUL_USER: &str = "zd-consul";
pub const CONSUL_TEMPLATE_USER: &str = "zd-consul-template";

/// Where Docker looks for the CA of a registry (dockerd(8), certs.d).
pub fn docker_ca(registry: &str) -> PathBuf {
    format!("/etc/docker/certs.d/{registry}/ca.crt").into()
}

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

/// The Nomad job of a slot.
pub fn job(service: &Name, slot: Slot) -> String {
    format!("{service}-{slot}")
}

/// Upstreams of a service, as consul-template writes them.
pub fn pools(service: &Name) -> PathBuf {
    format!("{POOLS}/{service}.conf").into()
}

/// The upstreams that nginx includes.
pub fn nginx_pools(service: &Name) -> PathBuf {
    format!("{ETC}/nginx/{service}.pools").into()
}

pub fn container(service: &Name, slot: Slot, instance: u8) -> String {
    format!("zd-{service}-{slot}-{instance}")
}
