//! What fills a slot: here the engines differ. Beside it there is only what the full stack has more of.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Step;
use crate::assets;
use crate::bundle::manifest::{Engine, ImageRef, Service};
use crate::error::Result;
use crate::host::config::{HostConfig, Installed};
use crate::host::docker::{Container, NO_NEW_PRIVILEGES, PIDS_LIMIT, mac, parked};
use crate::host::{nginx, paths};
use crate::ids::{Digest, Slot};

/// Megabytes that Nomad counts for a container where the manifest sets no limit, and a limit that is none.
pub const MEMORY_MB: u32 = 256;
const NO_LIMIT_MB: u32 = 1 << 20;

/// Steps that make a slot run one image and record it. `keep`: what runs this image already stays as it is,
/// also where it was started with other settings.
pub fn fill(
    installed: &Installed,
    service: &Service,
    slot: Slot,
    reference: &ImageRef,
    digest: &Digest,
    keep: bool,
) -> Result<Vec<Step>> {
    let name = &service.name;
    let mut steps: Vec<Step> = match installed.lock.engine {
        Engine::Docker => {
            containers(installed, service, slot, reference, digest).map(Step::Container).collect()
        }
        Engine::Nomad => {
            let job = job(installed, service, slot, reference, digest)?;
            vec![Step::Job { service: name.clone(), slot, job, keep }]
        }
    };
    steps.push(Step::Healthy { service: name.clone(), slot });
    steps.push(Step::Record {
        service: name.clone(),
        slot,
        version: reference.version.clone(),
        digest: digest.clone(),
    });
    Ok(steps)
}

/// What is kept of the content before until the new one is healthy; Nomad keeps nothing beside a job.
pub fn retire(installed: &Installed, service: &Service, slot: Slot) -> Option<Step> {
    let parked = |i| parked(&paths::container(&service.name, slot, i));
    match installed.lock.engine {
        Engine::Docker => Some(Step::Retire { containers: (1..=service.instances).map(parked).collect() }),
        Engine::Nomad => None,
    }
}

pub fn containers(
    installed: &Installed,
    service: &Service,
    slot: Slot,
    reference: &ImageRef,
    digest: &Digest,
) -> impl Iterator<Item = Container> {
    let index = installed.index(&service.name);
    (1..=service.instances).map(move |instance| Container {
        name: paths::container(&service.name, slot, instance),
        service: service.name.clone(),
        slot,
        instance,
        version: reference.version.clone(),
        image: installed.host.image(&reference.name, digest),
        digest: digest.clone(),
        ip: installed.host.address(index, slot, instance),
        env: service.env.iter().map(|(k, v)| format!("{k}={v}")).collect(),
        memory: i64::from(service.memory_mb) << 20,
        capabilities: service.capabilities.iter().cloned().collect(),
        read_only: service.read_only,
        user: service.user.clone(),
    })
}

/// A slot's job, with one group for each instance: each has an address of its own.
pub fn job(
    installed: &Installed,
    service: &Service,
    slot: Slot,
    reference: &ImageRef,
    digest: &Digest,
) -> Result<Value> {
    let index = installed.index(&service.name);
    let instances = (1..=service.instances)
        .map(|number| (number, installed.host.address(index, slot, number)))
        .map(|(number, ip)| json!({ "number": number, "ip": ip, "mac": mac(ip) }));
    let variables = json!({
        "id": paths::job(&service.name, slot),
        "service": service.name,
        "slot": slot,
        "version": reference.version,
        "digest": digest,
        "generation": installed.host.generation,
        "image": installed.host.image(&reference.name, digest),
        "instances": instances.collect::<Vec<_>>(),
        "env": service.env,
        "capabilities": service.capabilities,
        "read_only": service.read_only,
        "user": service.user,
        "pids_limit": PIDS_LIMIT,
        "no_new_privileges": NO_NEW_PRIVILEGES,
        "port": service.port,
        "health": service.health,
        "memory_mb": if service.memory_mb == 0 { MEMORY_MB } else { service.memory_mb },
        "memory_limit_mb": if service.memory_mb == 0 { NO_LIMIT_MB } else { service.memory_mb },
    });
    assets::json("job.json", assets::JOB, variables)
}

/// Whether a job holds the image that another would, in as many containers.
pub fn same_content(found: &Value, wanted: &Value) -> bool {
    let groups = |job: &Value| job["TaskGroups"].as_array().map(Vec::len);
    found["Meta"] == wanted["Meta"] && groups(found) == groups(wanted)
}

/// The job with its images called as those of another job, where they are the same but for an earlier address of
/// this host's registry: that changes nothing of what runs.
pub fn named_as(job: &Value, other: &Value, host: &HostConfig) -> Value {
    let registries: Vec<String> = host.registries().collect();
    let content = |name: &str| {
        let (registry, content) = name.split_once('/')?;
        registries.iter().any(|known| known == registry).then(|| content.to_owned())
    };
    let known = images(other);
    let mut named = job.clone();
    for image in images_mut(&mut named) {
        let Some(wanted) = image.as_str().and_then(content) else { continue };
        if let Some(known) = known.iter().find(|known| content(known).as_ref() == Some(&wanted)) {
            *image = json!(known);
        }
    }
    named
}

/// Image of each task of a job.
pub fn images(job: &Value) -> BTreeSet<String> {
    images_mut(&mut job.clone()).filter_map(|image| image.as_str().map(str::to_owned)).collect()
}

fn images_mut(job: &mut Value) -> impl Iterator<Item = &mut Value> {
    fn parts<'a>(of: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
        of.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
    }
    let tasks = parts(job, "TaskGroups").flat_map(|group| parts(group, "Tasks"));
    tasks.filter_map(|task| task.get_mut("Config")?.get_mut("image"))
}

/// What Consul is told of both pools, for consul-template.
pub fn pools_key(installed: &Installed, service: &Service) -> Step {
    Step::Key { key: nginx::pools_key(&service.name), value: nginx::pools(installed, service) }
}
