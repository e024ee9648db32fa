//! Steps of the full stack: Consul, Nomad and consul-template beneath the services of the nomad engine.

use std::path::Path;

use serde_json::json;

use super::install::{Builder, Inputs};
use super::{Keep, Step};
use crate::assets;
use crate::bundle::Lock;
use crate::bundle::manifest::Product;
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::nginx;
use crate::host::paths::{self, CONSUL_TEMPLATE_USER, CONSUL_USER};
use crate::host::secrets::{Secret, Token};

impl Builder {
    /// Consul with a leader, Nomad with a healthy docker driver.
    pub(super) fn stack(&mut self, inputs: &Inputs) -> Result<()> {
        let installed = inputs.installed;
        let bin = paths::generation(installed.host.generation).join("bin");
        self.dir(&bin, 0o755);
        let binaries = installed.lock.releases.iter().map(|r| (r.product.to_string(), r.digest.clone()));
        self.push(Step::Files { path: bin, files: binaries.collect(), mode: 0o755 });
        self.dir(paths::SECRETS, 0o700);
        self.consul(installed)?;
        self.nomad(installed)
    }

    fn consul(&mut self, installed: &Installed) -> Result<()> {
        let etc = paths::CONSUL_ETC;
        self.push(Step::User { name: CONSUL_USER.into(), home: paths::CONSUL_DATA.into() });
        self.owned_dir(paths::CONSUL_DATA, 0o750, CONSUL_USER, Keep::Ours);
        self.owned_dir(etc, 0o750, CONSUL_USER, Keep::Ours);
        for token in Token::CONSUL {
            self.push(Step::Secret(Secret::Token(token)));
        }
        self.push(Step::Secret(Secret::ConsulPrivate { management: management(&installed.lock)? }));
        let node = installed.host.node();
        let variables = json!({ "node": node, "data": paths::CONSUL_DATA });
        let mut config = assets::json("consul.json", assets::CONSUL_CONF, variables)?;
        if consul_version(&installed.lock)? >= (1, 14) {
            // A port more since then; older ones refuse a key that they do not know.
            config["ports"]["grpc_tls"] = json!(-1);
        }
        self.file(Path::new(etc).join("consul.json"), format!("{config:#}\n"));
        self.stack_unit(installed, "consul.service", assets::CONSUL_UNIT)?;
        self.push(Step::Consul { node });
        self.unit_file("zd-publish.service", assets::PUBLISH_UNIT);
        self.push(Step::Enabled { name: "zd-publish.service".into() });
        Ok(())
    }

    fn nomad(&mut self, installed: &Installed) -> Result<()> {
        let etc = paths::NOMAD_ETC;
        self.dir(paths::NOMAD_DATA, 0o700);
        self.dir(etc, 0o700);
        self.push(Step::Secret(Secret::NomadCertificate));
        self.push(Step::Secret(Secret::DockerAuth { registry: installed.host.registry() }));
        self.push(Step::Secret(Secret::NomadPrivate));
        let variables = json!({
            "node": installed.host.node(),
            "data": paths::NOMAD_DATA,
            "docker_auth": paths::DOCKER_AUTH,
            "ca": paths::CA,
            "cert": paths::NOMAD_CERT,
            "key": paths::NOMAD_KEY,
        });
        let config = assets::json("nomad.json", assets::NOMAD_CONF, variables)?;
        self.file(Path::new(etc).join("nomad.json"), format!("{config:#}\n"));
        self.stack_unit(installed, "nomad.service", assets::NOMAD_UNIT)?;
        self.push(Step::Nomad);
        Ok(())
    }

    /// After the services' slots are known to Consul: their pools, as nginx reads them.
    pub(super) fn consul_template(&mut self, installed: &Installed) -> Result<()> {
        let etc = paths::CONSUL_TEMPLATE_ETC;
        self.push(Step::User { name: CONSUL_TEMPLATE_USER.into(), home: paths::POOLS.into() });
        self.owned_dir(etc, 0o750, CONSUL_TEMPLATE_USER, Keep::Ours);
        // Not below its configuration: it reads every file there as one.
        let templates = paths::TEMPLATES;
        self.dir(templates, 0o755);
        self.owned_dir(paths::POOLS, 0o755, CONSUL_TEMPLATE_USER, Keep::Ours);
        self.push(Step::Secret(Secret::ConsulTemplatePrivate));
        let services = &installed.lock.services;
        for service in services {
            let text = assets::render("pools.ctmpl", assets::POOLS_TEMPLATE, nginx::pool_settings(service))?;
            self.file(format!("{templates}/{}.ctmpl", service.name), text);
        }
        let names: Vec<_> = services.iter().map(|s| &s.name).collect();
        let variables = json!({ "services": names, "templates": templates, "pools": paths::POOLS });
        let config = assets::json("consul-template.json", assets::CONSUL_TEMPLATE_CONF, variables)?;
        self.file(Path::new(etc).join("consul-template.json"), format!("{config:#}\n"));
        self.stack_unit(installed, "consul-template.service", assets::CONSUL_TEMPLATE_UNIT)?;
        self.unit_file("zd-pools@.service", assets::POOLS_UNIT);
        self.unit_file("zd-pools@.path", assets::POOLS_PATH);
        for service in services {
            self.push(Step::Pools { service: service.name.clone() });
        }
        Ok(())
    }

    fn stack_unit(&mut self, installed: &Installed, name: &str, template: &str) -> Result<()> {
        let bin = paths::generation(installed.host.generation).join("bin");
        self.unit_file(name, assets::render(name, template, json!({ "bin": bin }))?);
        self.push(Step::Unit { name: name.into() });
        Ok(())
    }
}

/// What the version of Consul in the bundle calls its first token: `initial_management` since 1.11.
pub fn management(lock: &Lock) -> Result<String> {
    Ok(if consul_version(lock)? >= (1, 11) { "initial_management" } else { "master" }.into())
}

fn consul_version(lock: &Lock) -> Result<(u32, u32)> {
    let release = lock.releases.iter().find(|r| r.product == Product::Consul);
    let release = release.ok_or_else(|| Code::Bundle.err("the bundle carries no Consul"))?;
    let mut numbers = release.version.as_str().split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    Ok((numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)))
}
