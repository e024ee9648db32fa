//! Steps of the full stack: Consul, Nomad and consul-template beneath the services of the nomad engine.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::install::{Builder, text_file, unit_file};
use super::{DataCopy, Keep, Step, Stone, Text};
use crate::assets;
use crate::bundle::Lock;
use crate::bundle::lock::Release;
use crate::bundle::manifest::{CAPABILITIES, Product};
use crate::bundle::versions;
use crate::error::{Code, Result};
use crate::host::config::{HostConfig, Installed};
use crate::host::paths::{self, CONSUL_TEMPLATE_USER, CONSUL_USER};
use crate::host::secrets::{Secret, Token};
use crate::host::{consul, nginx, nomad};
use crate::ids::{Slot, Version};

impl Builder<'_> {
    pub(super) fn programs(&mut self, installed: &Installed) {
        let releases = &installed.lock.releases;
        let carried = releases.iter().flat_map(|release| self.stones(release).into_iter().chain([release]));
        let programs = carried.map(|r| (paths::program(r.product.as_str(), &r.digest), r.digest.clone()));
        self.push(Step::Files { path: paths::PROGRAMS.into(), files: programs.collect(), mode: 0o755 });
        let bin = paths::generation(installed.host.generation).join("bin");
        self.dir(&bin, 0o755);
        for release in releases {
            let (path, target) = (bin.join(release.product.as_str()), program(release));
            self.push(Step::Link { path, target });
        }
        self.dir(paths::SECRETS, 0o700);
    }

    /// Consul with a leader. Only its HTTPS follows from the host's address.
    pub(super) fn consul(&mut self, installed: &Installed) -> Result<()> {
        let etc = paths::CONSUL_ETC;
        self.push(Step::User { name: CONSUL_USER.into(), home: paths::CONSUL_DATA.into() });
        self.owned_dir(paths::CONSUL_DATA, 0o750, CONSUL_USER, Keep::Ours);
        self.dir_for(etc, CONSUL_USER);
        for token in Token::CONSUL {
            self.secret(Secret::Token(token), consul::UNIT);
        }
        self.secret(Secret::ConsulPrivate { management: management(&installed.lock)? }, consul::UNIT);
        let node = installed.host.node();
        if installed.lock.consul_https.is_some() {
            self.secret(Secret::ConsulCertificate { ip: installed.host.ip.into() }, consul::UNIT);
        }
        self.stack_daemon(installed, Product::Consul, assets::CONSUL_UNIT, |version| {
            Ok(vec![consul_config(installed, version)?])
        })?;
        if self.restored.is_some() {
            self.push(Step::Snapshot { product: Product::Consul });
        }
        self.push(Step::Consul { node });
        self.unit_file("zd-publish.service", assets::PUBLISH_UNIT);
        self.push(Step::Enabled { name: "zd-publish.service".into() });
        Ok(())
    }

    /// Nomad with a healthy docker driver.
    pub(super) fn nomad(&mut self, installed: &Installed) -> Result<()> {
        let etc = paths::NOMAD_ETC;
        self.dir(paths::NOMAD_DATA, 0o700);
        if self.restored.is_some() {
            // By its ids Nomad knows the node, and what runs on it, again.
            let client = Path::new(paths::NOMAD_DATA).join("client");
            self.dir(&client, 0o700);
            self.saved_files("ids of Nomad's client", &client, Some(nomad::UNIT));
            self.secret(Secret::Token(Token::NomadManagement), nomad::UNIT);
        }
        self.dir(etc, 0o700);
        self.secret(Secret::NomadCertificate, nomad::UNIT);
        self.pulls(&installed.host);
        self.secret(Secret::NomadPrivate, nomad::UNIT);
        self.drop_in("docker.service", "zd-nomad.conf", assets::DOCKER_BEFORE_NOMAD);
        self.stack_daemon(installed, Product::Nomad, assets::NOMAD_UNIT, |version| {
            Ok(vec![nomad_config(installed, version)?])
        })?;
        if self.restored.is_some() {
            self.push(Step::Snapshot { product: Product::Nomad });
        }
        self.push(Step::Nomad);
        Ok(())
    }

    /// The account that Nomad pulls with; read at each pull.
    pub(super) fn pulls(&mut self, host: &HostConfig) {
        self.secret(Secret::DockerAuth { registry: host.registry() }, nomad::UNIT);
    }

    /// After the services' slots are known to Consul: their pools, as nginx reads them.
    pub(super) fn consul_template(&mut self, installed: &Installed) -> Result<()> {
        let etc = paths::CONSUL_TEMPLATE_ETC;
        self.push(Step::User { name: CONSUL_TEMPLATE_USER.into(), home: paths::POOLS.into() });
        self.dir_for(etc, CONSUL_TEMPLATE_USER);
        // Not below its configuration: it reads every file there as one.
        let templates = paths::TEMPLATES;
        self.dir_for(templates, CONSUL_TEMPLATE_USER);
        self.owned_dir(paths::POOLS, 0o750, CONSUL_TEMPLATE_USER, Keep::Ours);
        self.secret(Secret::ConsulTemplatePrivate, "consul-template.service");
        let services = &installed.lock.services;
        let mut files = Vec::new();
        for service in services {
            let text = assets::render("pools.ctmpl", assets::POOLS_TEMPLATE, nginx::pool_settings(service))?;
            files.push(text_file(paths::template(&service.name), text));
        }
        let names: Vec<_> = services.iter().map(|s| &s.name).collect();
        let variables = json!({ "services": names, "templates": templates, "pools": paths::POOLS });
        let config = assets::json("consul-template.json", assets::CONSUL_TEMPLATE_CONF, variables)?;
        files.push(text_file(Path::new(etc).join("consul-template.json"), format!("{config:#}\n")));
        self.stack_daemon(installed, Product::ConsulTemplate, assets::CONSUL_TEMPLATE_UNIT, |_| {
            Ok(files.clone())
        })?;
        self.unit_file("zd-pools@.service", assets::POOLS_UNIT);
        self.unit_file("zd-pools@.path", assets::POOLS_PATH);
        for service in services {
            self.push(Step::Pools { service: service.name.clone() });
        }
        Ok(())
    }

    /// Only where the program becomes another one.
    fn data_copy(&self, installed: &Installed, product: Product) -> Result<Option<DataCopy>> {
        let Some(before) = self.before else { return Ok(None) };
        let (before, now) = (release(before, product)?, release(&installed.lock, product)?);
        let folders = data_of(product, &installed.lock);
        let copy = Path::new(paths::BEFORE).join(product.as_str());
        Ok((before.digest != now.digest && !folders.is_empty()).then_some(DataCopy { folders, copy }))
    }

    /// A daemon that runs a program of the bundle, with the configuration of its version.
    fn stack_daemon(
        &mut self,
        installed: &Installed,
        product: Product,
        template: &str,
        config: impl Fn(&Version) -> Result<Vec<Text>>,
    ) -> Result<()> {
        let unit = format!("{product}.service");
        let files = |release: &Release| -> Result<Vec<Text>> {
            let mut files = config(&release.version)?;
            let text = assets::render(&unit, template, json!({ "program": program(release) }))?;
            files.push(unit_file(&unit, text));
            Ok(files)
        };
        let release = release(&installed.lock, product)?;
        let stone = |stone: &Release| Ok(Stone { version: stone.version.clone(), files: files(stone)? });
        let via = self.stones(release).into_iter().map(stone).collect::<Result<_>>()?;
        let (files, data) = (files(release)?, self.data_copy(installed, product)?);
        self.push(Step::Daemon { unit, files, via, data });
        Ok(())
    }

    /// The versions that this host has to run before the release's own, of those that are carried with it.
    fn stones<'r>(&self, release: &'r Release) -> Vec<&'r Release> {
        let Some(before) = self.before.and_then(|lock| lock.release(release.product)) else {
            return Vec::new();
        };
        let carried = release.via.iter().map(|stone| &stone.version);
        let route = versions::rules(release.product).route(&before.version, &release.version, carried);
        let via = route.unwrap_or_default().via;
        release.via.iter().filter(|stone| via.contains(&&stone.version)).collect()
    }
}

fn consul_config(installed: &Installed, version: &Version) -> Result<Text> {
    let variables = json!({
        "node": installed.host.node(),
        "data": paths::CONSUL_DATA,
        "ip": installed.host.ip,
        "https": installed.lock.consul_https,
        "cert": paths::CONSUL_CERT,
        "key": paths::CONSUL_KEY,
    });
    let mut config = assets::json("consul.json", assets::CONSUL_CONF, variables)?;
    if version.numbers() >= (1, 14, 0) {
        // A port more since then; older ones refuse a key that they do not know.
        config["ports"]["grpc_tls"] = json!(-1);
    }
    Ok(text_file(Path::new(paths::CONSUL_ETC).join("consul.json"), format!("{config:#}\n")))
}

fn nomad_config(installed: &Installed, version: &Version) -> Result<Text> {
    let variables = json!({
        "node": installed.host.node(),
        "data": paths::NOMAD_DATA,
        "docker_auth": paths::DOCKER_AUTH,
        "capabilities": CAPABILITIES,
        "ca": paths::CA,
        "cert": paths::NOMAD_CERT,
        "key": paths::NOMAD_KEY,
    });
    let mut config = assets::json("nomad.json", assets::NOMAD_CONF, variables)?;
    if version.numbers() >= (1, 8, 0) {
        // Known since then, and else beside its data, where its unit cannot write.
        config["client"]["alloc_mounts_dir"] = json!(Path::new(paths::NOMAD_DATA).join("alloc_mounts"));
    }
    Ok(text_file(Path::new(paths::NOMAD_ETC).join("nomad.json"), format!("{config:#}\n")))
}

/// What a newer program may write in a way that the one before cannot read, and the records of the jobs in it. A task's
/// folders are not among it.
fn data_of(product: Product, lock: &Lock) -> Vec<PathBuf> {
    let nomad = Path::new(paths::NOMAD_DATA);
    let records = lock.services.iter().flat_map(|s| Slot::BOTH.map(|slot| paths::placed_job(&s.name, slot)));
    match product {
        Product::Consul => vec![paths::CONSUL_DATA.into()],
        Product::Nomad => [nomad.join("server"), nomad.join("client")].into_iter().chain(records).collect(),
        Product::ConsulTemplate => Vec::new(),
    }
}

fn program(release: &Release) -> PathBuf {
    Path::new(paths::PROGRAMS).join(paths::program(release.product.as_str(), &release.digest))
}

fn release(lock: &Lock, product: Product) -> Result<&Release> {
    lock.release(product).ok_or_else(|| Code::Bundle.err(format!("the bundle carries no {product}")))
}

/// What the version of Consul in the bundle calls its first token: `initial_management` since 1.11.
pub fn management(lock: &Lock) -> Result<String> {
    let version = release(lock, Product::Consul)?.version.numbers();
    Ok(if version >= (1, 11, 0) { "initial_management" } else { "master" }.into())
}
