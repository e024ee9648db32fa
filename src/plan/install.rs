//! The plan of an install: facts + lock -> steps, in the order that each can rely
//! on those before it. The link to the generation comes last: it is what makes it installed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Keep, Plan, Step, slot};
use crate::assets;
use crate::bundle::Lock;
use crate::bundle::manifest::{Engine, ImageRef, Service};
use crate::bundle::signature::Key;
use crate::error::{Code, OrCode, Result};
use crate::host::config::Installed;
use crate::host::firewall::Firewall;
use crate::host::nginx;
use crate::host::paths::{self, NGINX_USER, REGISTRY_USER};
use crate::host::secrets::Secret;
use crate::ids::{Name, Slot};
use crate::service::state::State;

/// What an install depends on besides the lock.
pub struct Inputs<'a> {
    /// As it will be when the install is done.
    pub installed: &'a Installed,
    pub key: &'a Key,
    pub lock_bytes: String,
    /// Docker was here before us: its daemon.json is not ours to write.
    pub foreign_docker: bool,
    /// What each slot holds by now: an install that runs again keeps it.
    pub states: BTreeMap<Name, State>,
    /// Opens the services' ports in this firewall.
    pub open_firewall: Option<Firewall>,
}

/// Carried packages whose own units must not start: ours are others.
const MASKED: [(&str, &str); 3] = [
    ("nginx.service", "nginx"),
    ("docker-registry.service", "docker-registry"),
    ("logrotate.timer", "logrotate"),
];

pub fn plan(inputs: &Inputs) -> Result<Plan> {
    let installed = inputs.installed;
    let lock = &installed.lock;
    let mut plan = Builder { steps: Vec::new() };
    plan.base(inputs)?;
    if let Some(index) = &lock.apt_index {
        let generation = paths::generation(installed.host.generation);
        let repository = generation.join("packages");
        plan.dir(&repository, 0o755);
        let mut files: Vec<_> = lock.debs.iter().map(|d| (d.file.clone(), d.digest.clone())).collect();
        files.push(("Packages".into(), index.clone()));
        plan.push(Step::Files { path: repository.clone(), files, mode: 0o644 });
        plan.packages(inputs, repository);
    }
    if !lock.files.is_empty() {
        let path = paths::generation(installed.host.generation).join("files");
        plan.dir(&path, 0o755);
        let files = lock.files.iter().map(|f| (f.name.to_string(), f.digest.clone())).collect();
        plan.push(Step::Files { path, files, mode: 0o644 });
    }
    plan.registry(inputs)?;
    for image in &lock.images {
        plan.push(Step::Push { image: image.reference.to_string() });
    }
    if !lock.services.is_empty() {
        plan.push(Step::Unit { name: "docker.service".into() });
        plan.push(Step::Network { subnet: format!("{}.0.0/16", installed.host.subnet) });
    }
    if lock.engine == Engine::Nomad {
        plan.stack(inputs)?;
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
        plan.firewall(inputs)?;
    }
    plan.push(Step::Link {
        path: paths::CURRENT.into(),
        target: installed.host.generation.to_string().into(),
    });
    Ok(Plan { verb: "install", about: lock.title(), steps: plan.steps })
}

pub(super) struct Builder {
    steps: Vec<Step>,
}

impl Builder {
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
        self.push(Step::File { path: path.into(), text: text.into(), mode: 0o644, owner: None });
    }

    fn base(&mut self, inputs: &Inputs) -> Result<()> {
        let installed = inputs.installed;
        let generation = paths::generation(installed.host.generation);
        for path in [paths::OPT, "/opt/zd/bin", paths::GENERATIONS] {
            self.dir(path, 0o755);
        }
        self.dir(&generation, 0o755);
        for path in [paths::ETC, paths::TRUST, "/etc/zd/nginx"] {
            self.dir(path, 0o755);
        }
        self.dir("/etc/zd/tls", 0o700);
        for path in [paths::VAR, paths::LOG] {
            self.push(Step::Dir { path: path.into(), mode: 0o755, owner: None, keep: Keep::Data });
        }
        self.push(Step::Dir { path: paths::SERVICES.into(), mode: 0o755, owner: None, keep: Keep::Data });
        self.push(Step::Tool { path: paths::TOOL.into() });
        self.push(Step::Link { path: paths::TOOL_LINK.into(), target: paths::TOOL.into() });
        self.file(Path::new(paths::TRUST).join("first.pub"), inputs.key.file_text());
        self.file(generation.join(paths::LOCK_FILE), inputs.lock_bytes.clone());
        self.file(paths::HOST_TOML, installed.host.to_toml()?);
        Ok(())
    }

    fn packages(&mut self, inputs: &Inputs, repository: PathBuf) {
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
            let daemon = serde_json::json!({
                "live-restore": true,
                "log-driver": "json-file",
                "log-opts": { "max-size": "10m", "max-file": "3" },
            });
            self.file("/etc/docker/daemon.json", format!("{daemon:#}\n"));
        }
        self.push(Step::Packages { repository, wanted });
    }

    fn registry(&mut self, inputs: &Inputs) -> Result<()> {
        let host = &inputs.installed.host;
        self.push(Step::User { name: REGISTRY_USER.into(), home: paths::REGISTRY_DATA.into() });
        self.push(Step::User { name: NGINX_USER.into(), home: paths::SERVICES.into() });
        self.owned_dir(paths::REGISTRY_DATA, 0o750, REGISTRY_USER, Keep::Data);
        self.owned_dir(paths::REGISTRY_ETC, 0o750, REGISTRY_USER, Keep::Ours);
        self.push(Step::Secret(Secret::Ca));
        self.push(Step::Secret(Secret::RegistryCertificate { ip: host.ip.into() }));
        self.push(Step::Secret(Secret::RegistryPassword));
        self.push(Step::Secret(Secret::Htpasswd));
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
        let config = serde_json::json!({
            "version": 0.1,
            "log": { "level": "warn", "accesslog": { "disabled": true } },
            "storage": {
                "filesystem": { "rootdirectory": paths::REGISTRY_DATA },
                "delete": { "enabled": true },
            },
            "http": {
                "addr": host.registry(),
                "tls": { "certificate": format!("{etc}/tls.crt"), "key": format!("{etc}/tls.key") },
            },
            "auth": { "htpasswd": { "realm": "zd", "path": format!("{etc}/htpasswd") } },
        });
        self.push(Step::File {
            path: format!("{etc}/config.json").into(),
            text: format!("{config:#}\n"),
            mode: 0o640,
            owner: Some(REGISTRY_USER.into()),
        });
        self.unit_file("zd-registry.service", assets::REGISTRY_UNIT);
        self.push(Step::Unit { name: "zd-registry.service".into() });
        self.push(Step::RegistryReady);
        Ok(())
    }

    fn has_dir(&self, dir: &str) -> bool {
        self.steps.iter().any(|s| matches!(s, Step::Dir { path, .. } if path == Path::new(dir)))
    }

    /// Both slots of a service, each with what it holds by now or else what the manifest starts with.
    fn slots(&mut self, inputs: &Inputs, service: &Service) -> Result<()> {
        let installed = inputs.installed;
        let name = &service.name;
        let base = paths::service(name);
        self.dir(&base, 0o755);
        self.owned_dir(base.join("tmp"), 0o700, NGINX_USER, Keep::Ours);
        for slot in Slot::BOTH {
            let held = format!("held-{slot}");
            self.marks(base.join(slot.as_str()), &[slot.as_str()]);
            self.marks(base.join(format!("hold-{slot}")), &[&held]);
            self.marks(base.join(format!("close-{slot}")), &[&held, "closing"]);
        }
        self.push(Step::Pointer { service: name.clone(), slot: Slot::Blue });
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
            self.steps.extend(slot::fill(installed, service, slot, &reference, &digest)?);
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
    fn front(&mut self, installed: &Installed, service: &Service) -> Result<()> {
        let name = &service.name;
        self.owned_dir(paths::log(name), 0o755, NGINX_USER, Keep::Data);
        self.file(paths::nginx_conf(name), nginx::render(installed, service)?);
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

    fn log_rotation(&mut self, lock: &Lock) -> Result<()> {
        let services: Vec<&Name> = lock.services.iter().map(|s| &s.name).collect();
        let variables = serde_json::json!({ "services": services, "log": paths::LOG, "run": paths::RUN });
        let conf = assets::render("logrotate.conf", assets::LOGROTATE_CONF, variables)?;
        self.file(paths::LOGROTATE_CONF, conf);
        self.unit_file("zd-logrotate.service", assets::LOGROTATE_UNIT);
        self.unit_file("zd-logrotate.timer", assets::LOGROTATE_TIMER);
        self.push(Step::Unit { name: "zd-logrotate.timer".into() });
        Ok(())
    }

    fn firewall(&mut self, inputs: &Inputs) -> Result<()> {
        let ports = inputs.installed.lock.services.iter().map(|s| s.listen);
        match &inputs.open_firewall {
            None => {}
            Some(Firewall::Nftables { chain }) => {
                let variables = serde_json::json!({ "chain": chain, "ports": ports.collect::<Vec<_>>() });
                let unit = assets::render("zd-firewall.service", assets::FIREWALL_UNIT, variables)?;
                self.unit_file("zd-firewall.service", unit);
                self.push(Step::Unit { name: "zd-firewall.service".into() });
            }
            Some(Firewall::Manager(manager)) => {
                self.steps.extend(ports.map(|port| Step::Firewall { kind: *manager, port }));
            }
        }
        Ok(())
    }

    pub(super) fn unit_file(&mut self, name: &str, text: impl Into<String>) {
        self.file(Path::new(paths::UNITS).join(name), text);
    }
}

/// The lock's bytes as text, as they stand in the bundle.
pub fn lock_text(lock: &Lock) -> Result<String> {
    String::from_utf8(lock.to_bytes()).or_code(Code::Bug, "the lock is not text")
}
