//! The plan of a scale: new containers first, then nginx learns of them; or nginx forgets those that are
//! too many, and then they go. Containers that stay are touched by no step.

use super::{Plan, Step, slot as slots};
use crate::bundle::manifest::{Engine, ImageRef, Service};
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::{nginx, paths};
use crate::service::state::State;

/// `installed` and `service` as they shall be; `before` is the number of instances until now.
pub fn plan(installed: &Installed, service: &Service, before: u8, state: &State) -> Result<Plan> {
    let (name, instances) = (&service.name, service.instances);
    let mut containers = Vec::new();
    let mut healthy = Vec::new();
    let mut gone = Vec::new();
    for (slot, filled) in &state.slots {
        let reference = ImageRef { name: service.image.clone(), version: filled.version.clone() };
        match installed.lock.engine {
            Engine::Docker => {
                let all = slots::containers(installed, service, *slot, &reference, &filled.digest);
                containers.extend(all.map(Step::Container));
                gone.extend((instances + 1..=before).map(|i| paths::container(name, *slot, i)));
            }
            Engine::Nomad => {
                let job = slots::job(installed, service, *slot, &reference, &filled.digest)?;
                containers.push(Step::Resize { service: name.clone(), slot: *slot, job });
            }
        }
        healthy.push(Step::Healthy { service: name.clone(), slot: *slot });
    }
    let gate = || -> Result<Step> {
        Ok(Step::Gate { service: name.clone(), text: nginx::render(installed, service)? })
    };
    let pools = match installed.lock.engine {
        Engine::Docker => vec![gate()?],
        Engine::Nomad => {
            let mut pools =
                vec![slots::pools_key(installed, service), Step::LoadPools { service: name.clone() }];
            // consul-template renders the pools of HTTP; those of sessions stand in the gate configuration.
            if !service.inlets().is_empty() {
                pools.push(gate()?);
            }
            pools
        }
    };
    let mut steps = vec![Step::Instances { service: name.clone(), instances }];
    if instances > before {
        steps.extend(containers.into_iter().chain(healthy).chain(pools));
    } else {
        steps.extend(pools.into_iter().chain(containers));
    }
    if !gone.is_empty() {
        steps.push(Step::Retire { containers: gone });
    }
    Ok(Plan { verb: "scale", about: format!("{name} to {instances}"), steps })
}
