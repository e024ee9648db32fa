//! Where everything lives on a host (DESIGN: host layout). One place, so that uninstall finds it all.

use std::path::PathBuf;

use crate::bundle::manifest::Door;
use crate::ids::{Digest, Name, Slot};

pub const OPT: &str = "/opt/zd";
pub const TOOL: &str = "/opt/zd/bin/zd";
pub const TOOL_LINK: &str = "/usr/local/bin/zd";
/// Programs by name and content, whichever generations use them: a unit whose program stays the same does not change.
pub const PROGRAMS: &str = "/opt/zd/programs";
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
/// Of the registry's process that takes pushes; its folder is the runtime folder of its unit.
pub const REGISTRY_SOCKET: &str = "/run/zd-registry-push/socket";
/// Rules of the containers' bridge.
pub const BRIDGE_ETC: &str = "/etc/zd/bridge";
pub const SECRETS: &str = "/etc/zd/secrets";
/// The pair that this host signs its audit log and its reports with.
pub const SIGNING: &str = "/etc/zd/signing";
pub const SIGNING_KEY: &str = "/etc/zd/signing/host.key";
pub const SIGNING_PUB: &str = "/etc/zd/signing/host.pub";
pub const DOCKER_AUTH: &str = "/etc/zd/secrets/docker-auth.json";
/// Copies of the ids by which Nomad's servers know this host's client.
pub const NOMAD_IDS: &str = "/etc/zd/nomad-ids";
pub const NOMAD_CERT: &str = "/etc/zd/tls/nomad.crt";
pub const NOMAD_KEY: &str = "/etc/zd/tls/nomad.key";
pub const CONSUL_ETC: &str = "/etc/zd/consul.d";
pub const CONSUL_CERT: &str = "/etc/zd/consul.d/tls.crt";
pub const CONSUL_KEY: &str = "/etc/zd/consul.d/tls.key";
pub const NOMAD_ETC: &str = "/etc/zd/nomad.d";
pub const CONSUL_TEMPLATE_ETC: &str = "/etc/zd/consul-template.d";
pub const TEMPLATES: &str = "/etc/zd/templates";
/// How this host is backed up, where that was said here.
pub const BACKUP_TOML: &str = "/etc/zd/backup.toml";
pub const LOGROTATE_CONF: &str = "/etc/zd/logrotate.conf";

pub const VAR: &str = "/var/lib/zd";
pub const REGISTRY_DATA: &str = "/var/lib/zd/registry";
pub const CONSUL_DATA: &str = "/var/lib/zd/consul";
pub const NOMAD_DATA: &str = "/var/lib/zd/nomad";
/// What consul-template writes; nginx reads a copy that it has checked.
pub const POOLS: &str = "/var/lib/zd/pools";
pub const SERVICES: &str = "/var/lib/zd/services";
/// Data of daemons from before an upgrade, for as long as it may still go back.
pub const BEFORE: &str = "/var/lib/zd/before";
/// Stores that were broken and begun anew, as they were.
pub const ASIDE: &str = "/var/lib/zd/aside";
/// The last backup that came to its end.
pub const LAST_BACKUP: &str = "/var/lib/zd/last-backup.json";
pub const RECEIPTS: &str = "/var/lib/zd/receipts";
/// What was changed, as pages to print.
pub const REPORTS: &str = "/var/lib/zd/reports";
pub const LOG: &str = "/var/log/zd";
pub const AUDIT: &str = "/var/log/zd/audit.jsonl";
pub const AUDIT_HEAD: &str = "/var/lib/zd/audit.head";
pub const RUN: &str = "/run/zd";
pub const LOCK: &str = "/run/zd/lock";
/// Sockets of `zd switch`. A folder of root's that nginx's account may enter: /run/zd/NAME is that account's own.
pub const GATES: &str = "/run/zd-gate";

pub const DOCKER_DATA: &str = "/var/lib/docker";
/// Limits of the journal that zd's units have for themselves.
pub const JOURNAL_CONF: &str = "/etc/systemd/journald@zd.conf";
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

/// File name of a program below [`PROGRAMS`].
pub fn program(name: &str, digest: &Digest) -> String {
    format!("{name}-{}", &digest.hex()[..12])
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

pub fn gate(name: &Name) -> PathBuf {
    format!("{GATES}/{name}.sock").into()
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

/// The socket that nginx serves the sessions of one slot on.
pub fn socket(service: &Name, slot: Slot, door: &Door) -> PathBuf {
    run(service).join(match door {
        Door::Listen(port) => format!("{slot}-{port}.sock"),
        Door::Path(path) => format!("{slot}-path-{}.sock", key(path)),
    })
}

/// Stands for a path of HTTP in names. It does not follow from the path's place in the manifest, for old workers of
/// nginx serve on what an earlier bundle called so.
pub fn key(path: &str) -> String {
    Digest::of(path.as_bytes()).short().to_owned()
}

/// The Nomad job of a slot.
pub fn job(service: &Name, slot: Slot) -> String {
    format!("{service}-{slot}")
}

/// A slot's job as zd registered it last.
pub fn placed_job(name: &Name, slot: Slot) -> PathBuf {
    service(name).join(format!("{slot}.job.json"))
}

/// What consul-template makes them from.
pub fn template(service: &Name) -> PathBuf {
    format!("{TEMPLATES}/{service}.ctmpl").into()
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
