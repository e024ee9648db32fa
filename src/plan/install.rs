//! The plan of an install: facts + lock -> steps, in the order that each can rely
//! on those before it. The link to the generation comes last: it is what makes it installed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{DataCopy, Keep, Plan, Restored, Step, Text, slot};
use crate::assets;
use crate::backup::index::Entry;
use crate::backup::{Index, Settings};
use crate::bundle::Lock;
use crate::bundle::manifest::{Door, Engine, ImageRef, Service, Tcp};
use crate::bundle::signature::Key;
use crate::error::{Code, OrCode, Result};
use crate::host::config::{HostConfig, Installed};
use crate::host::firewall::{self, Firewall};
use crate::host::fs::ROOT_AND;
use crate::host::paths::{self, NGINX_USER, REGISTRY_USER};
use crate::host::secrets::Secret;
use crate::host::{docker, nginx, trust};
use crate::ids::{Name, Slot};
use crate::service::pointer::Pointer;
use crate::service::state::State;

/// What an install depends on besides the lock.
pub struct Inputs<'a> {
    /// As it will be when the install is done.
    pub installed: &'a Installed,
    /// The key to trust from now on. None where this host trusts some already: no plan changes those.
    pub pin: Option<&'a Key>,
    pub lock_bytes: String,
    /// Docker was here before us: its daemon.json is not ours to write.
    pub foreign_docker: bool,
    /// What each slot holds by now: an install that runs again keeps it.
    pub states: BTreeMap<Name, State>,
    /// Opens the services' ports in this firewall.
    pub open_firewall: Option<Firewall>,
    /// How this host is backed up.
    pub backup: Option<Settings>,
    /// Where secrets, pointers and the like come from, instead of being made.
    pub restored: Option<&'a Index>,
}

/// What a backup has of the folder of that name; the start of that step's title.
pub const TRUSTED_KEYS: &str = "trusted keys";

/// Carried packages whose own units must not start: ours are others.
const MASKED: [(&str, &str); 3] = [
    ("nginx.service", "nginx"),
    ("docker-registry.service", "docker-registry"),
    ("logrotate.timer", "logrotate"),
];

pub fn plan(inputs: &Inputs) -> Result<Plan> {
    let installed = inputs.installed;
    let lock = &installed.lock;
    let restored = inputs.restored;
    let mut plan = Builder { restored, secrets: restored, signing: restored, ..Builder::default() };
    plan.base(inputs);
    plan.records(None);
    plan.private_file(paths::HOST_TOML, installed.host.to_toml()?);
    plan.carried(installed);
    plan.packages(inputs);
    plan.registry(&installed.host)?;
    plan.images(lock);
    plan.saved_images(lock);
    plan.docker(installed)?;
    if lock.engine == Engine::Nomad {
        plan.programs(installed);
        plan.consul(installed)?;
        plan.nomad(installed)?;
    }
    for service in &lock.services {
        plan.slots(inputs, service)?;
    }
    if lock.engine == Engine::Nomad {
        plan.consul_template(installed)?;
    }
    for service in &lock.services {
        plan.front(installed, service)?;
    }
    if !lock.services.is_empty() {
        plan.log_rotation(lock)?;
        plan.firewall(inputs, &[])?;
    }
    plan.backups(inputs)?;
    plan.current(installed);
    let verb = if inputs.restored.is_some() { "restore" } else { "install" };
    Ok(Plan { verb, about: lock.title(), steps: plan.steps })
}

#[derive(Default)]
pub(super) struct Builder<'a> {
    pub(super) steps: Vec<Step>,
    /// What is installed now, where that is something else.
    pub(super) before: Option<&'a Lock>,
    /// The backup that state comes from.
    pub(super) restored: Option<&'a Index>,
    /// The one that secrets come from, too; and the one for the key that this host signs with, which fits no other
    /// secret and so comes by itself.
    pub(super) secrets: Option<&'a Index>,
    pub(super) signing: Option<&'a Index>,
}

impl Builder<'_> {
    pub(super) fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    pub(super) fn dir(&mut self, path: impl Into<PathBuf>, mode: u32) {
        self.push(Step::Dir { path: path.into(), mode, owner: None, keep: Keep::Ours });
    }

    pub(super) fn owned_dir(&mut self, path: impl Into<PathBuf>, mode: u32, owner: &str, keep: Keep) {
        self.push(Step::Dir { path: path.into(), mode, owner: Some(owner.into()), keep });
    }

    pub(super) fn file(&mut self, path: impl Into<PathBuf>, text: impl Into<String>) {
        self.push(Step::File(text_file(path, text)));
    }

    pub(super) fn private_file(&mut self, path: impl Into<PathBuf>, text: impl Into<String>) {
        self.push(Step::File(Text { mode: 0o600, ..text_file(path, text) }));
    }

    /// A folder that a daemon reads: nobody else does, and what root writes there is under names that only root changes.
    pub(super) fn dir_for(&mut self, path: impl Into<PathBuf>, user: &str) {
        self.owned_dir(path, 0o750, &format!("{ROOT_AND}{user}"), Keep::Ours);
    }

    pub(super) fn base(&mut self, inputs: &Inputs) {
        let installed = inputs.installed;
        let generation = paths::generation(installed.host.generation);
        for path in [paths::OPT, "/opt/zd/bin", paths::PROGRAMS] {
            self.dir(path, 0o755);
        }
        // A lock has the environment of services.
        self.dir(paths::GENERATIONS, 0o700);
        self.dir(&generation, 0o755);
        self.dir(paths::ETC, 0o711);
        // `zd verify` is for everybody.
        self.dir(paths::TRUST, 0o755);
        self.dir("/etc/zd/tls", 0o700);
        self.dir(paths::SIGNING, 0o711);
        self.push(secret_from(self.signing, Secret::SigningKey, None));
        for (path, mode) in [(paths::VAR, 0o711), (paths::LOG, 0o755), (paths::SERVICES, 0o711)] {
            self.push(Step::Dir { path: path.into(), mode, owner: None, keep: Keep::Data });
        }
        self.push(Step::Tool);
        self.push(Step::Link { path: paths::TOOL_LINK.into(), target: paths::TOOL.into() });
        match (inputs.pin, inputs.restored) {
            (None, _) => {}
            (Some(_), Some(_)) => self.saved_files(TRUSTED_KEYS, Path::new(paths::TRUST), None),
            (Some(key), None) => self.file(Path::new(paths::TRUST).join(trust::FIRST), key.file_text()),
        }
        self.private_file(generation.join(paths::LOCK_FILE), inputs.lock_bytes.clone());
        // Before the first unit that writes to it.
        self.file(paths::JOURNAL_CONF, assets::JOURNAL_CONF);
        self.unit_file("zd-settle.service", assets::SETTLE_UNIT);
        self.push(Step::Enabled { name: "zd-settle.service".into() });
    }

    /// Packages and files that the bundle brings, in the generation's folder.
    pub(super) fn carried(&mut self, installed: &Installed) {
        let (lock, generation) = (&installed.lock, paths::generation(installed.host.generation));
        if let Some(index) = &lock.apt_index {
            let path = repository(installed);
            self.dir(&path, 0o755);
            let mut files: Vec<_> = lock.debs.iter().map(|d| (d.file.clone(), d.digest.clone())).collect();
            files.push(("Packages".into(), index.clone()));
            self.push(Step::Files { path, files, mode: 0o644 });
        }
        if !lock.files.is_empty() {
            let path = generation.join("files");
            self.dir(&path, 0o755);
            let files = lock.files.iter().map(|f| (f.name.to_string(), f.digest.clone())).collect();
            self.push(Step::Files { path, files, mode: 0o644 });
        }
    }

    /// Makes this generation the installed one.
    pub(super) fn current(&mut self, installed: &Installed) {
        let target = installed.host.generation.to_string().into();
        self.push(Step::Link { path: paths::CURRENT.into(), target });
    }

    /// A secret, as the backup has it or else made; `unit` reads it.
    pub(super) fn secret(&mut self, secret: Secret, unit: &str) {
        self.push(secret_from(self.secrets, secret, Some(unit)));
    }

    /// The audit log and the reports of a backup; of the reports only those that are `missing`, where that is known.
    pub(super) fn records(&mut self, missing: Option<&[String]>) {
        let Some(index) = self.restored else { return };
        self.push(Step::RestoredLog);
        let prefix = &paths::REPORTS[1..];
        let wanted = |e: &&Entry| missing.is_none_or(|m| m.contains(&e.path));
        let files = index.files.iter().filter(|e| e.path.starts_with(prefix)).filter(wanted);
        let files: Vec<Entry> = files.cloned().collect();
        if !files.is_empty() {
            self.push(Step::Dir { path: paths::REPORTS.into(), mode: 0o755, owner: None, keep: Keep::Data });
            let what = format!("{} files of reports", files.len());
            self.push(Step::Restored(Restored { what, files, unit: None }));
        }
    }

    /// All files that a backup has in a folder; `unit` reads them.
    pub(super) fn saved_files(&mut self, what: &str, folder: &Path, unit: Option<&str>) {
        let Some(index) = self.restored else { return };
        let files: Vec<Entry> = index.beneath(folder).cloned().collect();
        if !files.is_empty() {
            let unit = unit.map(str::to_owned);
            self.push(Step::Restored(Restored { what: what.into(), files, unit }));
        }
    }

    /// One file, if the backup has it.
    pub(super) fn saved_file(&mut self, what: &str, path: &Path) {
        let named = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
        if let Some(entry) = self.restored.and_then(|index| index.entry(&named)) {
            let (what, files) = (what.into(), vec![entry.clone()]);
            self.push(Step::Restored(Restored { what, files, unit: None }));
        }
    }

    /// Images that slots held and no bundle brings. Where the bundle has another under the same version, by digest.
    pub(super) fn saved_images(&mut self, lock: &Lock) {
        let Some(index) = self.restored else { return };
        for image in &index.images {
            let named = match lock.image(&image.reference) {
                None => image.reference.to_string(),
                Some(_) => format!("{}@{}", image.reference.name, image.manifest),
            };
            self.push(Step::Push { image: named });
        }
    }

    /// Timed backups. Where they were set on the host and not by its bundle, that is restored as well.
    pub(super) fn backups(&mut self, inputs: &Inputs) -> Result<()> {
        self.saved_file("settings of backups", Path::new(paths::BACKUP_TOML));
        inputs.backup.as_ref().map_or(Ok(()), |settings| self.timed_backups(settings))
    }

    pub(super) fn images(&mut self, lock: &Lock) {
        self.steps.extend(lock.images.iter().map(|image| Step::Push { image: image.reference.to_string() }));
    }

    pub(super) fn docker(&mut self, installed: &Installed) -> Result<()> {
        let services = installed.lock.services.len();
        if services > 0 {
            // What an upgrade drops serves until then.
            self.bridge(installed, services.max(self.before.map_or(0, |lock| lock.services.len())))?;
            self.push(Step::Unit { name: "docker.service".into() });
            self.push(Step::Network { subnet: installed.host.network() });
        }
        Ok(())
    }

    /// Who may send what over the containers' bridge, for so many services.
    pub(super) fn bridge(&mut self, installed: &Installed, services: usize) -> Result<()> {
        let host = &installed.host;
        let slots = (0..services).flat_map(|service| Slot::BOTH.map(|slot| (service, slot)));
        // As many as a slot can be scaled to.
        let addresses = slots
            .flat_map(|(service, slot)| (1..=9).map(move |instance| host.address(service, slot, instance)))
            .map(|ip| json!({ "ip": ip, "mac": docker::mac(ip) }));
        let variables = json!({
            "subnet": host.network(),
            "gateway": host.gateway(),
            "addresses": addresses.collect::<Vec<_>>(),
        });
        let etc = Path::new(paths::BRIDGE_ETC);
        self.dir(etc, 0o700);
        let mut files = Vec::new();
        for (name, template) in [("ip.rules", assets::BRIDGE_IP), ("frames.rules", assets::BRIDGE_FRAMES)] {
            files.push(text_file(etc.join(name), assets::render(name, template, &variables)?));
        }
        files.push(unit_file(firewall::BRIDGE_UNIT, assets::BRIDGE_UNIT));
        self.daemon(firewall::BRIDGE_UNIT, files, None);
        Ok(())
    }

    /// Packages that are not there yet.
    pub(super) fn packages(&mut self, inputs: &Inputs) {
        if inputs.installed.lock.apt_index.is_none() {
            return;
        }
        let all = &inputs.installed.lock.packages;
        // A Docker that was here before stays what it is, whatever package it came from.
        let wanted = all.all().filter(|p| !(inputs.foreign_docker && all.docker.contains(p)));
        let wanted: Vec<String> = wanted.cloned().collect();
        for (unit, package) in MASKED {
            self.push(Step::Mask { unit: unit.into(), package: package.into() });
        }
        if !inputs.foreign_docker && !inputs.installed.lock.packages.docker.is_empty() {
            self.push(Step::Dir { path: "/etc/docker".into(), mode: 0o755, owner: None, keep: Keep::Shared });
            // live-restore: containers outlive a stopped daemon. Logs are bounded.
            let daemon = json!({
                "live-restore": true,
                "log-driver": "json-file",
                "log-opts": { "max-size": "10m", "max-file": "3" },
            });
            self.file("/etc/docker/daemon.json", format!("{daemon:#}\n"));
            for unit in ["docker.service", "containerd.service"] {
                self.drop_in(unit, "zd.conf", assets::UNLIMITED_STARTS);
            }
        }
        self.push(Step::Packages { repository: repository(inputs.installed), wanted });
    }

    pub(super) fn registry(&mut self, host: &HostConfig) -> Result<()> {
        self.push(Step::User { name: REGISTRY_USER.into(), home: paths::REGISTRY_DATA.into() });
        self.push(Step::User { name: NGINX_USER.into(), home: paths::SERVICES.into() });
        self.owned_dir(paths::REGISTRY_DATA, 0o750, REGISTRY_USER, Keep::Data);
        self.dir_for(paths::REGISTRY_ETC, REGISTRY_USER);
        self.dir_for("/etc/zd/nginx", NGINX_USER);
        let unit = "zd-registry.service";
        self.secret(Secret::Ca, unit);
        self.secret(Secret::RegistryCertificate { ip: host.ip.into() }, unit);
        self.secret(Secret::RegistryPassword, unit);
        self.secret(Secret::Htpasswd, unit);
        for dir in ["/etc/docker", "/etc/docker/certs.d"] {
            if dir == "/etc/docker" && self.has_dir(dir) {
                continue;
            }
            self.push(Step::Dir { path: dir.into(), mode: 0o755, owner: None, keep: Keep::Shared });
        }
        let ca = paths::docker_ca(&host.registry());
        self.dir(ca.parent().unwrap_or(&ca), 0o755);
        self.push(Step::TrustCa { path: ca });
        let etc = paths::REGISTRY_ETC;
        // JSON is YAML: nothing to escape (distribution's configuration reference).
        let config = |reads_only: bool, http: Value| {
            json!({
                "version": 0.1,
                "log": { "level": "warn", "accesslog": { "disabled": true } },
                "storage": {
                    "filesystem": { "rootdirectory": paths::REGISTRY_DATA },
                    // No cache of descriptors: what was just pushed is there for the one that reads.
                    "maintenance": {
                        "readonly": { "enabled": reads_only },
                        "uploadpurging": { "enabled": false },
                    },
                },
                "http": http,
            })
        };
        let tls = json!({ "certificate": format!("{etc}/tls.crt"), "key": format!("{etc}/tls.key") });
        let mut reading = config(true, json!({ "addr": host.registry(), "tls": tls }));
        reading["auth"] = json!({ "htpasswd": { "realm": "zd", "path": format!("{etc}/htpasswd") } });
        let mut pushed_to =
            config(false, json!({ "net": "unix", "addr": paths::REGISTRY_SOCKET, "relativeurls": true }));
        pushed_to["storage"]["delete"] = json!({ "enabled": true });
        let mut files = Vec::new();
        for (name, config) in [("config.json", reading), ("push.json", pushed_to)] {
            files.push(Text {
                path: format!("{etc}/{name}").into(),
                text: format!("{config:#}\n"),
                mode: 0o640,
                owner: Some(REGISTRY_USER.into()),
            });
        }
        self.unit_file("zd-registry-push.service", assets::REGISTRY_PUSH_UNIT);
        files.push(unit_file("zd-registry.service", assets::REGISTRY_UNIT));
        self.daemon(unit, files, None);
        self.push(Step::RegistryReady);
        Ok(())
    }

    fn has_dir(&self, dir: impl AsRef<Path>) -> bool {
        self.steps.iter().any(|s| matches!(s, Step::Dir { path, .. } if path == dir.as_ref()))
    }

    /// Folders of a service that the pointer can name, and what lies beside them.
    pub(super) fn folders(&mut self, service: &Service) {
        let name = &service.name;
        let base = paths::service(name);
        self.dir_for(&base, NGINX_USER);
        self.owned_dir(base.join("tmp"), 0o700, NGINX_USER, Keep::Ours);
        for slot in Slot::BOTH {
            let held = format!("held-{slot}");
            self.marks(base.join(slot.as_str()), &[slot.as_str()]);
            self.marks(base.join(format!("hold-{slot}")), &[&held]);
            self.marks(base.join(format!("close-{slot}")), &[&held, "closing"]);
            for port in service.tcp.iter().map(Tcp::listen) {
                for pointer in [Pointer::Active(slot), Pointer::Held(slot), Pointer::Closing(slot)] {
                    let path = base.join(pointer.folder()).join(format!("{port}.sock"));
                    self.push(Step::Link { path, target: paths::socket(name, slot, &Door::Listen(port)) });
                }
            }
        }
    }

    /// Both slots of a service, each with what it holds by now or else what the manifest starts with.
    pub(super) fn slots(&mut self, inputs: &Inputs, service: &Service) -> Result<()> {
        let installed = inputs.installed;
        let name = &service.name;
        self.folders(service);
        let saved = inputs.restored.and_then(|index| index.service(name));
        // Beside its state the jobs as they were registered.
        self.saved_files(&format!("state of {name}"), &paths::service(name), None);
        self.push(Step::Pointer { service: name.clone(), slot: saved.map_or(Slot::Blue, |s| s.active) });
        let reference = ImageRef { name: service.image.clone(), version: service.version.clone() };
        let image = installed.lock.image(&reference).ok_or_else(|| {
            Code::Bundle.err(format!("service {name}: image {reference} is not in the bundle"))
        })?;
        for slot in Slot::BOTH {
            let deployed = inputs.states.get(name).and_then(|s| s.slots.get(&slot));
            let (version, digest) = match deployed {
                Some(filled) => (filled.version.clone(), filled.digest.clone()),
                None => (service.version.clone(), image.manifest.clone()),
            };
            let reference = ImageRef { name: service.image.clone(), version };
            self.steps.extend(slot::fill(installed, service, slot, &reference, &digest, true)?);
        }
        if installed.lock.engine == Engine::Nomad {
            self.push(slot::pools_key(installed, service));
        }
        Ok(())
    }

    /// A folder that the pointer can name, and the empty files that nginx looks for there.
    fn marks(&mut self, dir: PathBuf, files: &[&str]) {
        self.dir(&dir, 0o755);
        for file in files {
            self.file(dir.join(file), "");
        }
    }

    /// nginx before the slots.
    pub(super) fn front(&mut self, installed: &Installed, service: &Service) -> Result<()> {
        let name = &service.name;
        self.owned_dir(paths::log(name), 0o755, NGINX_USER, Keep::Data);
        self.push(Step::Gate { service: name.clone(), text: nginx::render(installed, service)? });
        if installed.index(name) == 0 {
            self.unit_file("zd-nginx@.service", assets::NGINX_UNIT);
        }
        self.push(Step::Unit { name: paths::nginx_unit(name) });
        if installed.lock.engine == Engine::Nomad {
            self.push(Step::Unit { name: format!("zd-pools@{name}.path") });
        }
        self.push(Step::Serving { service: name.clone(), slot: Slot::Blue });
        Ok(())
    }

    pub(super) fn log_rotation(&mut self, lock: &Lock) -> Result<()> {
        let services: Vec<&Name> = lock.services.iter().map(|s| &s.name).collect();
        let variables = json!({ "services": services, "log": paths::LOG, "run": paths::RUN });
        let conf = assets::render("logrotate.conf", assets::LOGROTATE_CONF, variables)?;
        self.file(paths::LOGROTATE_CONF, conf);
        self.unit_file("zd-logrotate.service", assets::LOGROTATE_UNIT);
        self.unit_file("zd-logrotate.timer", assets::LOGROTATE_TIMER);
        self.push(Step::Unit { name: "zd-logrotate.timer".into() });
        Ok(())
    }

    /// A manager's ports that are `shut` are those of a bundle before; nftables' unit has no others than it says.
    pub(super) fn firewall(&mut self, inputs: &Inputs, shut: &[u16]) -> Result<()> {
        let ports = inputs.installed.lock.client_ports();
        match &inputs.open_firewall {
            None => {}
            Some(Firewall::Nftables { chain }) => {
                let variables = json!({ "chain": chain, "ports": ports.collect::<Vec<_>>() });
                let unit = assets::render(firewall::UNIT, assets::FIREWALL_UNIT, variables)?;
                self.daemon(firewall::UNIT, vec![unit_file(firewall::UNIT, unit)], None);
            }
            Some(Firewall::Manager(manager)) => {
                let step = |port, open| Step::Firewall { kind: *manager, port, open };
                self.steps.extend(ports.map(|port| step(port, true)));
                self.steps.extend(shut.iter().map(|port| step(*port, false)));
            }
        }
        Ok(())
    }

    /// A file beside a unit that is not zd's (systemd.unit(5), "drop-in").
    pub(super) fn drop_in(&mut self, unit: &str, name: &str, text: &str) {
        let folder = Path::new(paths::UNITS).join(format!("{unit}.d"));
        if !self.has_dir(&folder) {
            self.push(Step::Dir { path: folder.clone(), mode: 0o755, owner: None, keep: Keep::Shared });
        }
        self.file(folder.join(name), text);
    }

    pub(super) fn unit_file(&mut self, name: &str, text: impl Into<String>) {
        self.push(Step::File(unit_file(name, text)));
    }

    pub(super) fn daemon(&mut self, unit: &str, files: Vec<Text>, data: Option<DataCopy>) {
        self.push(Step::Daemon { unit: unit.into(), files, via: Vec::new(), data });
    }
}

fn secret_from(backup: Option<&Index>, secret: Secret, unit: Option<&str>) -> Step {
    let files = secret.files();
    let saved = |path: &PathBuf| backup?.entry(path.strip_prefix("/").ok()?.to_str()?).cloned();
    // The first is written last, here as in the making.
    let saved: Option<Vec<Entry>> = files.iter().rev().map(saved).collect();
    match saved {
        Some(saved) => {
            let what = format!("secret {}", files[0].display());
            Step::Restored(Restored { what, files: saved, unit: unit.map(str::to_owned) })
        }
        None => Step::Secret(secret),
    }
}

/// The packages that a generation's bundle brought, as apt reads them.
pub(super) fn repository(installed: &Installed) -> PathBuf {
    paths::generation(installed.host.generation).join("packages")
}

/// A file that everybody may read.
pub(super) fn text_file(path: impl Into<PathBuf>, text: impl Into<String>) -> Text {
    Text { path: path.into(), text: text.into(), mode: 0o644, owner: None }
}

pub(super) fn unit_file(name: &str, text: impl Into<String>) -> Text {
    text_file(Path::new(paths::UNITS).join(name), text)
}

/// The lock's bytes as text, as they stand in the bundle.
pub fn lock_text(lock: &Lock) -> Result<String> {
    String::from_utf8(lock.to_bytes()).or_code(Code::Bug, "the lock is not text")
}
