//! Plans: what will be done, as plain data, made from facts and a lock without side effects.

pub mod deploy;
pub mod install;
pub mod preflight;
pub mod scale;
pub mod slot;
pub mod stack;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::host::docker::Container;
use crate::host::firewall::Manager;
use crate::host::packages::Leftovers;
use crate::host::paths;
use crate::host::secrets::Secret;
use crate::ids::{Digest, Name, Slot, Version};

/// One thing to bring about. Closed: dry run, check, undo and receipt all come from the same value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    Dir {
        path: PathBuf,
        mode: u32,
        owner: Option<String>,
        keep: Keep,
    },
    File {
        path: PathBuf,
        text: String,
        mode: u32,
        owner: Option<String>,
    },
    /// Blobs of the bundle as files of a folder: packages with their index, or what the site carries along.
    Files {
        path: PathBuf,
        files: Vec<(String, Digest)>,
        mode: u32,
    },
    /// This very zd.
    Tool {
        path: PathBuf,
    },
    Link {
        path: PathBuf,
        target: PathBuf,
    },
    Secret(Secret),
    /// The CA's certificate where Docker looks for it.
    TrustCa {
        path: PathBuf,
    },
    User {
        name: String,
        home: PathBuf,
    },
    /// A unit that a package brings and that must not start.
    Mask {
        unit: String,
        package: String,
    },
    Packages {
        repository: PathBuf,
        wanted: Vec<String>,
    },
    /// Enabled and running.
    Unit {
        name: String,
    },
    /// Enabled, to be started by what it belongs to.
    Enabled {
        name: String,
    },
    RegistryReady,
    /// Consul has a leader and its ACL.
    Consul {
        node: String,
    },
    /// Nomad has a leader, its ACL, and a node that runs containers.
    Nomad,
    /// The first pools that consul-template writes, where nginx includes them.
    Pools {
        service: Name,
    },
    /// Pools that consul-template has written anew, loaded without a client noticing.
    LoadPools {
        service: Name,
    },
    /// The gate configuration, where it carries the pools itself; loaded without a client noticing.
    Gate {
        service: Name,
        text: String,
    },
    /// Containers of each slot, in the service's state.
    Instances {
        service: Name,
        instances: u8,
    },
    /// A key of Consul's store.
    Key {
        key: String,
        value: Value,
    },
    Push {
        image: String,
    },
    Network {
        subnet: String,
    },
    Container(Container),
    /// A slot's job in Nomad.
    Job {
        service: Name,
        slot: Slot,
        job: Value,
    },
    /// A slot's job with another number of groups: those that are in both are not touched.
    Resize {
        service: Name,
        slot: Slot,
        job: Value,
    },
    /// All containers of the slot answer their health path.
    Healthy {
        service: Name,
        slot: Slot,
    },
    /// The first pointer of a service.
    Pointer {
        service: Name,
        slot: Slot,
    },
    /// Clients get healthy answers from this slot through nginx.
    Serving {
        service: Name,
        slot: Slot,
    },
    /// Containers that are no longer needed: after this there is no way back.
    Retire {
        containers: Vec<String>,
    },
    /// What the slot holds, in the service's state.
    Record {
        service: Name,
        slot: Slot,
        version: Version,
        digest: Digest,
    },
    Firewall {
        kind: Manager,
        port: u16,
    },
}

/// Whether uninstall leaves a folder unless it is told to purge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// Ours alone: goes with uninstall.
    Ours,
    /// The site's data: goes only with purge.
    Data,
    /// Shared with others: goes only when empty.
    Shared,
}

impl Step {
    /// For people, and the step's identity in its receipt.
    pub fn title(&self) -> String {
        match self {
            Step::Dir { path, .. } => format!("folder {}", path.display()),
            Step::File { path, .. } => format!("file {}", path.display()),
            Step::Files { path, files, .. } => format!("{} files in {}", files.len(), path.display()),
            Step::Tool { path } => format!("zd itself as {}", path.display()),
            Step::Link { path, target } => format!("link {} -> {}", path.display(), target.display()),
            Step::Secret(secret) => format!("secret {}", secret.files()[0].display()),
            Step::TrustCa { path } => format!("private CA trusted in {}", path.display()),
            Step::User { name, .. } => format!("user {name}"),
            Step::Mask { unit, .. } => format!("{unit} kept from starting"),
            Step::Packages { wanted, .. } => format!("packages {}", wanted.join(" ")),
            Step::Unit { name } => format!("{name} enabled and running"),
            Step::Enabled { name } => format!("{name} enabled"),
            Step::Consul { .. } => "Consul has a leader and its ACL".into(),
            Step::Nomad => "Nomad has a leader, its ACL and a healthy docker driver".into(),
            Step::Pools { service } => format!("pools of {service} from consul-template"),
            Step::LoadPools { service } => format!("nginx of {service} has loaded its new pools"),
            Step::Gate { service, .. } => format!("nginx of {service} has loaded its new configuration"),
            Step::Instances { service, instances } => format!("{service} recorded with {instances} per slot"),
            Step::Resize { service, slot, job } => {
                let groups = job["TaskGroups"].as_array().map_or(0, Vec::len);
                format!("Nomad job {} with {groups} groups", paths::job(service, *slot))
            }
            Step::Key { key, .. } => format!("Consul key {key}"),
            Step::Job { service, slot, job } => {
                let version = job["Meta"]["zd_version"].as_str().unwrap_or("?");
                format!("Nomad job {} {version}", paths::job(service, *slot))
            }
            Step::RegistryReady => "registry answers".into(),
            Step::Push { image } => format!("image {image} in the registry"),
            Step::Network { subnet } => format!("docker network zd {subnet}"),
            Step::Container(c) => format!("container {} {} at {}", c.name, c.version, c.ip),
            Step::Healthy { service, slot } => format!("{service} {slot} healthy"),
            Step::Pointer { service, slot } => format!("{service} points to {slot}"),
            Step::Serving { service, slot } => format!("{service} serves from {slot}"),
            Step::Retire { containers } => {
                format!("containers no longer kept: {}", containers.join(" "))
            }
            Step::Record { service, slot, version, .. } => format!("{service} {slot} recorded as {version}"),
            Step::Firewall { kind, port } => format!("{} lets tcp {port} in", kind.name()),
        }
    }
}

/// What would put back what is there now. Written down, with fsync, before the step acts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "undo", rename_all = "kebab-case")]
pub enum Undo {
    /// The step leaves nothing behind that another undo does not take away.
    Nothing,
    RemoveFiles {
        paths: Vec<PathBuf>,
    },
    RemoveDir {
        path: PathBuf,
        keep: Keep,
    },
    /// A small file as it was; bytes in base64.
    RestoreFile {
        path: PathBuf,
        bytes: String,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    RestoreLink {
        path: PathBuf,
        target: PathBuf,
    },
    /// A folder's mode and owner as they were.
    RestoreMode {
        path: PathBuf,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    RemoveUser {
        name: String,
    },
    Unmask {
        unit: String,
    },
    Purge {
        packages: Vec<String>,
        leftovers: Leftovers,
    },
    StopUnit {
        name: String,
        was_enabled: bool,
        was_active: bool,
    },
    RemoveNetwork,
    RemoveContainer {
        name: String,
    },
    RemoveJob {
        service: Name,
        slot: Slot,
    },
    /// The job as it was registered before.
    PutBackJob {
        service: Name,
        slot: Slot,
        job: Value,
    },
    /// The job as it was, registered over the present one: what is in both is not touched.
    ResizeBack {
        service: Name,
        slot: Slot,
        job: Value,
    },
    /// A key of Consul's store as it was.
    PutBackKey {
        key: String,
        value: Value,
    },
    /// The gate configuration as it was, loaded.
    PutBackGate {
        service: Name,
        text: String,
    },
    /// No way back from here: an interrupted plan that came this far is finished instead.
    FinishRemoving {
        containers: Vec<String>,
    },
    /// The parked container stands and runs again.
    PutBack {
        name: String,
    },
    /// The service's state file as it was.
    RestoreState {
        service: Name,
        text: String,
    },
    CloseFirewall {
        kind: Manager,
        port: u16,
    },
}

/// Steps in order. The title of each is unique within its plan.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub verb: &'static str,
    /// What it is about: `demo-1`, `hello v2`.
    pub about: String,
    pub steps: Vec<Step>,
}
