//! The Docker daemon: network, images by digest, a slot's containers. bollard over the local socket.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::net::Ipv4Addr;
use std::time::Duration;

use bollard::auth::DockerCredentials;
use bollard::container::LogOutput;
use bollard::errors::Error as BollardError;
use bollard::models::{
    ContainerCreateBody, EndpointIpamConfig, EndpointSettings, HostConfig as ContainerHostConfig,
    HostConfigLogConfig, Ipam, IpamConfig, NetworkCreateRequest, NetworkingConfig, RestartPolicy,
    RestartPolicyNameEnum,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, ListContainersOptionsBuilder,
    ListImagesOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder, RemoveImageOptions,
    RenameContainerOptionsBuilder, StopContainerOptionsBuilder,
};
use futures_util::{Stream, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::config::HostConfig;
use super::{paths, secrets};
use crate::error::{Code, Error, Result};
use crate::ids::{Digest, Name, Slot, Version};
use crate::plan::Standing;

/// The network that all containers of services are on.
pub const NETWORK: &str = "zd";
const PARKED: &str = "-parked";
/// What is kept of a container's own output (Docker's json-file driver).
const LOG_LIMITS: [(&str, &str); 2] = [("max-size", "32m"), ("max-file", "4")];
/// Processes and threads a container may have at a time.
pub const PIDS_LIMIT: i64 = 4096;
/// No set-uid program in a container gives its caller more than it had.
pub const NO_NEW_PRIVILEGES: &str = "no-new-privileges";
/// Seconds a container has to stop by itself.
const STOP_S: i32 = 10;
/// bollard's own limit is 2 minutes; a pull of a large image on a slow disk takes longer.
const TIMEOUT_S: u64 = 600;

/// One container of a slot, as it shall be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub name: String,
    pub service: Name,
    pub slot: Slot,
    pub instance: u8,
    pub version: Version,
    /// Full name by digest in the private registry.
    pub image: String,
    pub digest: Digest,
    pub ip: Ipv4Addr,
    pub env: Vec<String>,
    /// Bytes; 0 is no limit.
    pub memory: i64,
    /// Those that it gets back of all that were taken from it.
    pub capabilities: Vec<String>,
    pub read_only: bool,
    pub user: Option<String>,
}

/// A container as it is.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    pub name: String,
    pub id: String,
    pub instance: u8,
    pub running: bool,
    pub started_at: String,
    pub restarts: i64,
    pub version: String,
    pub digest: String,
    pub ip: String,
    /// The allocation of Nomad that it is of; empty where Nomad did not start it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub allocation: String,
}

impl Found {
    pub fn is(&self, wanted: &Container) -> bool {
        self.running
            && self.digest == wanted.digest.as_str()
            && self.version == wanted.version.as_str()
            && self.ip == wanted.ip.to_string()
    }
}

/// One instance among a slot's containers: the one that runs, where Nomad has not yet cleared away those
/// before it.
pub fn instance(slot: &[Found], instance: u8) -> Option<&Found> {
    slot.iter().filter(|c| c.instance == instance).max_by_key(|c| c.running)
}

pub struct Docker(bollard::Docker);

fn failed(e: BollardError) -> Error {
    let said = e.to_string();
    let cure = if said.contains("No chain/target/match") {
        "a firewall that was started after Docker threw its rules away: systemctl restart docker (what runs goes on), \
         then run the same command again"
    } else {
        "see `systemctl status docker` and `journalctl -u docker`, then run the same command again"
    };
    Code::Docker.err(format!("Docker: {said}")).cure(cure)
}

fn missing(e: &BollardError) -> bool {
    matches!(e, BollardError::DockerResponseServerError { status_code: 404, .. })
}

/// Removing what is gone, starting what runs: good.
fn unless_missing(result: Result<(), BollardError>) -> Result<()> {
    match result {
        Err(e) if missing(&e) => Ok(()),
        Err(BollardError::DockerResponseServerError { status_code: 304, .. }) => Ok(()),
        other => other.map_err(failed),
    }
}

impl Docker {
    /// Connects and agrees on an API version, so that the daemon is known to answer.
    pub async fn connect() -> Result<Self> {
        let docker =
            bollard::Docker::connect_with_unix(paths::DOCKER_SOCKET, TIMEOUT_S, bollard::API_DEFAULT_VERSION)
                .map_err(failed)?;
        let limit = Duration::from_secs(10);
        match tokio::time::timeout(limit, docker.negotiate_version()).await {
            Ok(docker) => docker.map(Self).map_err(failed),
            Err(_) => Err(Code::Docker
                .err(format!("Docker does not answer within {} s", limit.as_secs()))
                .cure("see `systemctl status docker`; what already runs goes on serving without it")),
        }
    }

    /// The network's subnet, if the network is there.
    pub async fn network(&self) -> Result<Option<String>> {
        match self.0.inspect_network(NETWORK, None).await {
            Ok(network) => {
                let configs = network.ipam.and_then(|i| i.config).unwrap_or_default();
                Ok(Some(configs.into_iter().find_map(|c| c.subnet).unwrap_or_default()))
            }
            Err(e) if missing(&e) => Ok(None),
            Err(e) => Err(failed(e)),
        }
    }

    pub async fn create_network(&self, subnet: &str) -> Result<()> {
        let range = IpamConfig { subnet: Some(subnet.into()), ..Default::default() };
        let request = NetworkCreateRequest {
            name: NETWORK.into(),
            driver: Some("bridge".into()),
            ipam: Some(Ipam { config: Some(vec![range]), ..Default::default() }),
            // A name that says whose bridge it is in `ip link`.
            options: Some(HashMap::from([("com.docker.network.bridge.name".into(), "zd0".into())])),
            labels: Some(HashMap::from([("zd".into(), "1".into())])),
            ..Default::default()
        };
        self.0.create_network(request).await.map(drop).map_err(failed)
    }

    /// With all of ours that is on it: a scale may have made more than an install knows of.
    pub async fn remove_network(&self) -> Result<()> {
        let options = ListContainersOptionsBuilder::default()
            .all(true)
            .filters(&HashMap::from([("label", vec!["zd.service"])]))
            .build();
        for container in self.0.list_containers(Some(options)).await.map_err(failed)? {
            self.remove(&container.id.unwrap_or_default()).await?;
        }
        unless_missing(self.0.remove_network(NETWORK).await)
    }

    pub async fn find(&self, name: &str) -> Result<Option<Found>> {
        let info = match self.0.inspect_container(name, None).await {
            Ok(info) => info,
            Err(e) if missing(&e) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let state = info.state.unwrap_or_default();
        let labels = info.config.and_then(|c| c.labels).unwrap_or_default();
        let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
        let networks = info.network_settings.and_then(|n| n.networks).unwrap_or_default();
        let endpoint = networks.get(NETWORK).cloned().unwrap_or_default();
        let wanted = endpoint.ipam_config.and_then(|c| c.ipv4_address);
        Ok(Some(Found {
            name: info.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            id: info.id.unwrap_or_default(),
            instance: label("zd.instance").parse().unwrap_or(0),
            running: state.running == Some(true),
            started_at: state.started_at.map(|t| t.to_string()).unwrap_or_default(),
            restarts: info.restart_count.unwrap_or(0),
            version: label("zd.version"),
            digest: label("zd.digest"),
            allocation: label("com.hashicorp.nomad.alloc_id"),
            ip: wanted.or(endpoint.ip_address).unwrap_or_default(),
        }))
    }

    /// Containers of a slot, whichever engine started them; without the parked ones.
    pub async fn of_slot(&self, service: &Name, slot: Slot) -> Result<Vec<Found>> {
        let labels = vec![format!("zd.service={service}"), format!("zd.slot={slot}")];
        let options = ListContainersOptionsBuilder::default()
            .all(true)
            .filters(&HashMap::from([("label", labels)]))
            .build();
        let mut found = Vec::new();
        for summary in self.0.list_containers(Some(options)).await.map_err(failed)? {
            let Some(id) = summary.id else { continue };
            found.extend(self.find(&id).await?.filter(|c| !c.name.ends_with(PARKED)));
        }
        Ok(found)
    }

    /// What runs in a slot now.
    pub async fn standing(&self, service: &Name, slot: Slot) -> Result<Vec<Standing>> {
        let running = self.of_slot(service, slot).await?.into_iter().filter(|c| c.running);
        Ok(running.map(|c| Standing { id: c.id, name: c.name, started_at: c.started_at }).collect())
    }

    /// Removes all that is left of a slot.
    pub async fn clear_slot(&self, service: &Name, slot: Slot) -> Result<()> {
        for container in self.of_slot(service, slot).await? {
            self.remove(&container.name).await?;
        }
        Ok(())
    }

    /// Pulls an image that Docker has not.
    pub async fn ensure_image(&self, image: &str, host: &HostConfig) -> Result<()> {
        if self.0.inspect_image(image).await.is_ok() {
            return Ok(());
        }
        let credentials = DockerCredentials {
            username: Some(secrets::REGISTRY_ACCOUNT.into()),
            password: Some(secrets::registry_password()?),
            serveraddress: Some(host.registry()),
            ..Default::default()
        };
        let options = CreateImageOptionsBuilder::default().from_image(image).build();
        let mut pull = self.0.create_image(Some(options), None, Some(credentials));
        // Errors arrive inside the answer as well.
        while let Some(info) =
            pull.try_next().await.map_err(|e| failed(e).during(format!("pulling {image}")))?
        {
            if let Some(detail) = info.error_detail {
                let why = detail.message.unwrap_or_default();
                return Err(Code::Docker
                    .err(format!("pulling {image}: {why}"))
                    .cure("see `systemctl status zd-registry docker`, then run the same command again"));
            }
        }
        Ok(())
    }

    /// Puts a container in its place. One of the same name is stopped and parked, not removed, so
    /// that a failed deploy can put it back.
    pub async fn place(&self, wanted: &Container, host: &HostConfig) -> Result<()> {
        self.ensure_image(&wanted.image, host).await?;
        if self.find(&wanted.name).await?.is_some() {
            if self.find(&parked(&wanted.name)).await?.is_some() {
                // Ours of an attempt that broke; what was there before it is parked already.
                self.remove(&wanted.name).await?;
            } else {
                self.stop(&wanted.name).await?;
                self.rename(&wanted.name, &parked(&wanted.name)).await?;
            }
        }
        self.create(wanted).await?;
        unless_missing(self.0.start_container(&wanted.name, None).await)
    }

    async fn create(&self, wanted: &Container) -> Result<()> {
        let labels = [
            ("zd.service", wanted.service.to_string()),
            ("zd.slot", wanted.slot.to_string()),
            ("zd.instance", wanted.instance.to_string()),
            ("zd.version", wanted.version.to_string()),
            ("zd.digest", wanted.digest.to_string()),
        ];
        let address = EndpointIpamConfig { ipv4_address: Some(wanted.ip.to_string()), ..Default::default() };
        let mac_address = Some(mac(wanted.ip));
        let endpoint = EndpointSettings { ipam_config: Some(address), mac_address, ..Default::default() };
        let body = ContainerCreateBody {
            image: Some(wanted.image.clone()),
            env: Some(wanted.env.clone()),
            user: wanted.user.clone(),
            labels: Some(labels.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
            host_config: Some(ContainerHostConfig {
                restart_policy: Some(RestartPolicy {
                    name: Some(RestartPolicyNameEnum::UNLESS_STOPPED),
                    maximum_retry_count: None,
                }),
                network_mode: Some(NETWORK.into()),
                // As Nomad has it; Docker by itself keeps all that a container ever wrote.
                log_config: Some(HostConfigLogConfig {
                    typ: Some("json-file".into()),
                    config: Some(LOG_LIMITS.map(|(key, value)| (key.into(), value.into())).into()),
                }),
                memory: (wanted.memory > 0).then_some(wanted.memory),
                cap_drop: Some(vec!["ALL".into()]),
                cap_add: Some(wanted.capabilities.clone()),
                security_opt: Some(vec![NO_NEW_PRIVILEGES.into()]),
                pids_limit: Some(PIDS_LIMIT),
                readonly_rootfs: Some(wanted.read_only),
                ..Default::default()
            }),
            networking_config: Some(NetworkingConfig {
                endpoints_config: Some(HashMap::from([(NETWORK.to_owned(), endpoint)])),
            }),
            ..Default::default()
        };
        let options = CreateContainerOptionsBuilder::default().name(&wanted.name).build();
        self.0.create_container(Some(options), body).await.map(drop).map_err(failed)
    }

    /// Removes images that were pulled from a registry and are not to be kept; those in use stay. Tells how many.
    pub async fn remove_images(&self, registry: &str, keep: &BTreeSet<Digest>) -> Result<usize> {
        let mut removed = 0;
        let options = ListImagesOptionsBuilder::default().digests(true).build();
        for image in self.0.list_images(Some(options)).await.map_err(failed)? {
            for name in image.repo_digests.iter().filter(|name| name.starts_with(&format!("{registry}/"))) {
                let digest = name.split_once('@').and_then(|(_, digest)| digest.parse().ok());
                if digest.is_some_and(|digest| keep.contains(&digest)) {
                    continue;
                }
                match self.0.remove_image(name, None::<RemoveImageOptions>, None).await {
                    Ok(_) => removed += 1,
                    // In use, or gone.
                    Err(BollardError::DockerResponseServerError { status_code: 404 | 409, .. }) => {}
                    Err(e) => return Err(failed(e)),
                }
            }
        }
        Ok(removed)
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        let options = RenameContainerOptionsBuilder::default().name(to).build();
        unless_missing(self.0.rename_container(from, options).await)
    }

    async fn stop(&self, name: &str) -> Result<()> {
        let options = StopContainerOptionsBuilder::default().t(STOP_S).build();
        unless_missing(self.0.stop_container(name, Some(options)).await)
    }

    pub async fn start(&self, name: &str) -> Result<()> {
        self.0.start_container(name, None).await.map_err(failed)
    }

    pub async fn remove(&self, name: &str) -> Result<()> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        unless_missing(self.0.remove_container(name, Some(options)).await)
    }

    /// The way back from [`Docker::place`]: what was parked stands and runs again.
    pub async fn put_back(&self, name: &str) -> Result<()> {
        if self.find(&parked(name)).await?.is_some() {
            self.remove(name).await?;
            self.rename(&parked(name), name).await?;
        }
        match self.find(name).await? {
            Some(found) if !found.running => self.start(name).await,
            _ => Ok(()),
        }
    }

    /// What a container wrote: its last lines, and with `follow` what it writes from now on.
    fn logs(
        &self,
        name: &str,
        lines: u32,
        follow: bool,
    ) -> impl Stream<Item = std::result::Result<LogOutput, BollardError>> + use<> {
        let both = LogsOptionsBuilder::default().stdout(true).stderr(true);
        self.0.logs(name, Some(both.follow(follow).tail(&lines.to_string()).build()))
    }

    /// The last lines a container wrote.
    pub async fn log_tail(&self, name: &str, lines: u32) -> String {
        let mut text = String::new();
        let mut logs = std::pin::pin!(self.logs(name, lines, false));
        while let Some(Ok(line)) = logs.next().await {
            text.push_str(&line.to_string());
        }
        text
    }

    /// Prints what containers wrote, each line behind the container's name.
    pub async fn print_logs(&self, containers: &[Found], lines: u32, follow: bool) -> Result<()> {
        let logs = containers.iter().map(|container| {
            let name = container.name.as_str();
            self.logs(name, lines, follow).map_ok(move |line| (name, line)).boxed()
        });
        let mut logs = futures_util::stream::select_all(logs);
        while let Some((name, line)) = logs.try_next().await.map_err(failed)? {
            let text = line.to_string();
            for line in text.lines() {
                // A closed pipe (`zd logs blue | head`) is the end, not an error.
                if writeln!(std::io::stdout(), "{name}  {line}").is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// The MAC address that goes with an address. Docker before 28 gives this one by itself.
pub fn mac(ip: Ipv4Addr) -> String {
    let [a, b, c, d] = ip.octets();
    format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Name under which the container before is kept until the new one is healthy.
pub fn parked(name: &str) -> String {
    format!("{name}{PARKED}")
}
