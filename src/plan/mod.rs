//! Plans: what will be done, as plain data, made from facts and a lock without side effects.

pub mod backup;
pub mod deploy;
pub mod install;
pub mod preflight;
pub mod reconfigure;
pub mod repair;
pub mod restore;
pub mod scale;
pub mod slot;
pub mod stack;
pub mod upgrade;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::backup::index::Entry;
use crate::bundle::manifest::Product;
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
    File(Text),
    /// Blobs of the bundle as files of a folder: packages with their index, or what the site carries along.
    Files {
        path: PathBuf,
        files: Vec<(String, Digest)>,
        mode: u32,
    },
    /// This very zd is the one that is called `zd` on this host.
    Tool,
    Link {
        path: PathBuf,
        target: PathBuf,
    },
    Secret(Secret),
    /// The CA's certificate where Docker looks for it.
    TrustCa {
        path: PathBuf,
    },
    /// The CA's certificate no longer where Docker looked for it, when the registry was called otherwise.
    UntrustCa {
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
    /// Packages that zd brought, in other versions. What runs goes on with the programs it has.
    Upgrade {
        /// Where the present versions are, for the way back.
        before: PathBuf,
        repository: PathBuf,
        packages: Vec<Moved>,
    },
    /// A process of packages runs what is installed now.
    Renew(Process),
    /// Containers that nobody meant to touch: id and start time by name.
    Untouched {
        containers: Vec<Standing>,
    },
    /// Enabled and running.
    Unit {
        name: String,
    },
    /// A unit of ours, enabled, and running with exactly these files: where one differs, it is restarted.
    Daemon {
        unit: String,
        files: Vec<Text>,
        /// Versions to run before that, one after the other: it is too far from the present one.
        via: Vec<Stone>,
        /// Where its program changes: what it wrote, copied before, for the way back.
        data: Option<DataCopy>,
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
        /// A job that holds the same image stays as it is: what serves is not replaced by an install.
        keep: bool,
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
    /// Services that are no longer installed, with all that they run and are told by; their logs stay. After this there
    /// is no way back.
    Drop {
        services: Vec<Name>,
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
        open: bool,
    },
    /// Stores of Consul or Nomad put aside and begun anew, with the tokens and the node id that there were. Once the
    /// folder `aside` is there, all of them are in it.
    Rebuild {
        product: Product,
        stores: Vec<PathBuf>,
        aside: PathBuf,
    },
    /// What Consul or Nomad held, out of its snapshot in a backup, where it does not know the tokens of then.
    Snapshot {
        product: Product,
    },
    /// Files as they are in a backup; what reads them is restarted where it runs.
    Restored(Restored),
    /// The audit log of a backup, where there is none, or only the beginning of it. One that goes on stays.
    RestoredLog,
    /// All traffic of a service goes to this slot, without a client noticing.
    Switched {
        service: Name,
        slot: Slot,
    },
}

/// Files of a backup that belong together. Their bytes stay there: some are secrets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restored {
    /// For people.
    pub what: String,
    pub files: Vec<Entry>,
    pub unit: Option<String>,
}

/// A small file as it shall be. Owner None is root.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Text {
    pub path: PathBuf,
    pub text: String,
    pub mode: u32,
    pub owner: Option<String>,
}

/// A version of a daemon that an upgrade goes through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stone {
    pub version: Version,
    /// Its unit is the last: the one on disk says how far a run came that was killed.
    pub files: Vec<Text>,
}

/// A package in another version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    pub name: String,
    pub from: String,
    pub to: String,
}

/// What runs programs out of packages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "process", rename_all = "kebab-case")]
pub enum Process {
    Registry,
    /// dockerd and containerd; containers run on without them.
    Docker,
    Nginx {
        service: Name,
    },
}

/// A container at work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    pub id: String,
    pub name: String,
    pub started_at: String,
}

/// Folders and files of a stopped daemon, and the folder that they are copied to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataCopy {
    pub folders: Vec<PathBuf>,
    pub copy: PathBuf,
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
            Step::File(Text { path, .. }) => format!("file {}", path.display()),
            Step::Files { path, files, .. } => format!("{} files in {}", files.len(), path.display()),
            Step::Tool => format!("zd itself as {}", paths::TOOL),
            Step::Link { path, target } => format!("link {} -> {}", path.display(), target.display()),
            Step::Secret(secret) => format!("secret {}", secret.files()[0].display()),
            Step::TrustCa { path } => format!("private CA trusted in {}", path.display()),
            Step::UntrustCa { path } => format!("private CA no longer trusted in {}", path.display()),
            Step::User { name, .. } => format!("user {name}"),
            Step::Mask { unit, .. } => format!("{unit} kept from starting"),
            Step::Packages { wanted, .. } => format!("packages {}", wanted.join(" ")),
            Step::Upgrade { packages, .. } => {
                let packages: Vec<_> =
                    packages.iter().map(|p| format!("{} {} -> {}", p.name, p.from, p.to)).collect();
                format!("packages {}", packages.join(", "))
            }
            Step::Renew(Process::Registry) => "registry runs its installed program".into(),
            Step::Renew(Process::Docker) => "Docker runs its installed programs".into(),
            Step::Renew(Process::Nginx { service }) => {
                format!("nginx of {service} runs its installed program")
            }
            Step::Untouched { containers } => {
                format!("{} containers are the same as before", containers.len())
            }
            Step::Unit { name } => format!("{name} enabled and running"),
            Step::Daemon { unit, .. } => format!("{unit} running as configured"),
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
            Step::Job { service, slot, job, .. } => {
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
            Step::Drop { services } => {
                let names: Vec<&str> = services.iter().map(Name::as_str).collect();
                format!("services no longer installed: {}", names.join(" "))
            }
            Step::Record { service, slot, version, .. } => format!("{service} {slot} recorded as {version}"),
            Step::Firewall { kind, port, open: true } => format!("{} lets tcp {port} in", kind.name()),
            Step::Firewall { kind, port, .. } => format!("{} no longer lets tcp {port} in", kind.name()),
            Step::Restored(restored) => format!("{} from the backup", restored.what),
            Step::Rebuild { product, .. } => format!("stores of {product} begun anew"),
            Step::Snapshot { product } => format!("state of {product} from the backup"),
            Step::RestoredLog => "audit log from the backup".into(),
            Step::Switched { service, slot } => format!("all traffic of {service} goes to {slot}"),
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
    /// A secret made anew for the address that it was for before.
    Remake {
        secret: Secret,
    },
    /// The CA's certificate where Docker looked for it.
    TrustCa {
        path: PathBuf,
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
    /// Packages in the versions before, and what runs them.
    PutBackPackages {
        repository: PathBuf,
        packages: Vec<Moved>,
    },
    StopUnit {
        name: String,
        was_enabled: bool,
        was_active: bool,
    },
    /// A unit with its files, and where its program changed its data, as it was.
    PutBackDaemon {
        unit: String,
        /// Of files only: [`Undo::RemoveFiles`] and [`Undo::RestoreFile`].
        files: Vec<Undo>,
        was_enabled: bool,
        was_active: bool,
        data: Option<DataCopy>,
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
    /// As [`Undo::FinishRemoving`].
    FinishDropping {
        services: Vec<Name>,
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
    OpenFirewall {
        kind: Manager,
        port: u16,
    },
    /// Files as they were: copies were put aside, for a receipt holds no secret. New ones go.
    PutBackFiles {
        files: Vec<PathBuf>,
        new: Vec<PathBuf>,
        unit: Option<String>,
    },
    /// All traffic goes back to this slot.
    SwitchBack {
        service: Name,
        slot: Slot,
    },
    /// Written by a newer zd, in a receipt that has ended.
    #[serde(other)]
    Unknown,
}

impl Undo {
    /// There is no way back from its step.
    pub fn is_finish(&self) -> bool {
        matches!(self, Self::FinishRemoving { .. } | Self::FinishDropping { .. })
    }
}

/// Steps in order. The title of each is unique within its plan.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub verb: &'static str,
    /// What it is about: `demo-1`, `hello v2`.
    pub about: String,
    pub steps: Vec<Step>,
}
