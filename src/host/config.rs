//! host.toml: what was decided about this host at install; every rendered file follows from it and
//! the lock. And the lock of the installed generation.

use std::net::Ipv4Addr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::paths;
use crate::bundle::Lock;
use crate::bundle::manifest::Service;
use crate::error::{At, Code, OrCode, Result};
use crate::ids::{Digest, Name, Slot};
use crate::service::state::State;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    pub schema: u32,
    /// The address other machines know this host by.
    pub ip: Ipv4Addr,
    /// What it is called among the nodes of Consul and Nomad, where that does not follow from its address: a node
    /// keeps the name it was installed with, for what runs there is Nomad's under that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// First two octets of the containers' /16: `172.31` stands for 172.31.0.0/16.
    pub subnet: String,
    pub registry_port: u16,
    /// What the registry was called before: containers and Docker's images may still be named by it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former_registries: Vec<String>,
    pub generation: u32,
    /// Digest of the lock of the installed bundle.
    pub bundle: Digest,
}

impl HostConfig {
    /// None before an install has written it.
    pub fn read() -> Result<Option<Self>> {
        let Some(bytes) = super::fs::read_if_any(Path::new(paths::HOST_TOML))? else { return Ok(None) };
        toml::from_slice(&bytes).map(Some).or_code(Code::Io, paths::HOST_TOML)
    }

    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).or_code(Code::Bug, "writing host.toml")
    }

    /// `address:port` of the private registry.
    pub fn registry(&self) -> String {
        format!("{}:{}", self.ip, self.registry_port)
    }

    /// All that it is or was called by.
    pub fn registries(&self) -> impl Iterator<Item = String> {
        self.former_registries.iter().cloned().chain([self.registry()])
    }

    /// What this host is called among the nodes of Consul and Nomad.
    pub fn node(&self) -> String {
        self.node.clone().unwrap_or_else(|| format!("node-{}", self.ip.to_string().replace('.', "-")))
    }

    /// The same host at another address, or with its registry on another port.
    pub fn moved(&self, ip: Ipv4Addr, registry_port: u16) -> Self {
        let mut moved = Self { ip, registry_port, node: Some(self.node()), ..self.clone() };
        if moved.registry() == self.registry() {
            return self.clone();
        }
        moved.former_registries.push(self.registry());
        let now = moved.registry();
        moved.former_registries.retain(|former| *former != now);
        moved
    }

    /// The address is one of zd's own network of containers.
    pub fn is_container(&self, ip: Ipv4Addr) -> bool {
        ip.octets()[..2] == self.address(0, Slot::Blue, 1).octets()[..2]
    }

    /// Name of a repository's image by digest in the private registry.
    pub fn image(&self, repository: &Name, digest: &Digest) -> String {
        format!("{}/{repository}@{digest}", self.registry())
    }

    /// All addresses of containers.
    pub fn network(&self) -> String {
        format!("{}.0.0/16", self.subnet)
    }

    /// This host's own address among them.
    pub fn gateway(&self) -> String {
        format!("{}.0.1", self.subnet)
    }

    /// Address of one container: third octet is the service, blue from .11, green from .21.
    pub fn address(&self, service: usize, slot: Slot, instance: u8) -> Ipv4Addr {
        let base = match slot {
            Slot::Blue => 10,
            Slot::Green => 20,
        };
        let mut octets = self.subnet.split('.').map(|o| o.parse().unwrap_or(0));
        let (a, b) = (octets.next().unwrap_or(172), octets.next().unwrap_or(31));
        Ipv4Addr::new(a, b, service as u8 + 1, base + instance)
    }
}

/// What is installed: decisions and contents together.
#[derive(Clone, Debug)]
pub struct Installed {
    pub host: HostConfig,
    pub lock: Lock,
}

impl Installed {
    /// None where nothing is installed (or an install has not come to its end).
    pub fn read() -> Result<Option<Self>> {
        if !Path::new(paths::CURRENT).try_exists().at(paths::CURRENT)? {
            return Ok(None);
        }
        let host = HostConfig::read()?
            .ok_or_else(|| Code::Io.err(format!("{} is gone", paths::HOST_TOML)).cure("install again"))?;
        let path = Path::new(paths::CURRENT).join(paths::LOCK_FILE);
        let lock = Lock::parse(&std::fs::read(&path).at(&path)?)?;
        Self::new(host, lock).map(Some)
    }

    /// What the lock says, with as many containers as the services were scaled to.
    pub fn new(host: HostConfig, mut lock: Lock) -> Result<Self> {
        for service in &mut lock.services {
            service.instances = State::read(&service.name)?.instances.unwrap_or(service.instances);
        }
        Ok(Self { host, lock })
    }

    pub fn set_instances(&mut self, service: &Name, instances: u8) {
        for service in self.lock.services.iter_mut().filter(|s| s.name == *service) {
            service.instances = instances;
        }
    }

    pub fn require() -> Result<Self> {
        Self::read()?.ok_or_else(|| {
            Code::NotInstalled
                .err("zd is not installed on this host")
                .cure("run `zd install --ip auto` from the stick; after a broken install run it again, or `zd undo`")
        })
    }

    /// The named service, or the only one.
    pub fn service(&self, name: Option<&Name>) -> Result<&Service> {
        let all = || self.lock.services.iter().map(|s| s.name.to_string()).collect::<Vec<_>>().join(", ");
        match (name, self.lock.services.as_slice()) {
            (Some(name), _) => self.lock.service(name).ok_or_else(|| {
                Code::NotInstalled
                    .err(format!("there is no service {name} on this host"))
                    .cure(format!("use one of: {}", all()))
            }),
            (None, [only]) => Ok(only),
            (None, []) => Err(Code::NotInstalled.err("no service is installed on this host")),
            (None, _) => Err(Code::Usage
                .err("more than one service is installed")
                .cure(format!("name one: {}", all()))),
        }
    }

    /// Where clients find the services.
    pub fn urls(&self) -> Vec<String> {
        let ip = self.host.ip;
        let of = |s: &Service| {
            let tcp = s.tcp.iter().map(|t| format!("tcp://{ip}:{}", t.listen()));
            std::iter::once(format!("http://{ip}:{}/", s.listen)).chain(tcp).collect::<Vec<_>>()
        };
        self.lock.services.iter().flat_map(of).collect()
    }

    pub fn index(&self, service: &Name) -> usize {
        self.lock.services.iter().position(|s| s.name == *service).unwrap_or(0)
    }

    /// Addresses of a slot's containers, where they serve HTTP.
    pub fn addresses(&self, service: &Service, slot: Slot) -> Vec<std::net::SocketAddr> {
        self.addresses_at(service, slot, service.port)
    }

    /// The same with another port of theirs.
    pub fn addresses_at(&self, service: &Service, slot: Slot, port: u16) -> Vec<std::net::SocketAddr> {
        let index = self.index(&service.name);
        (1..=service.instances).map(|i| (self.host.address(index, slot, i), port).into()).collect()
    }
}
