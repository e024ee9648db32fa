//! The plan of a deploy: the standby slot gets a version; the active one is not in the plan at all.

use super::install::containers;
use super::{Plan, Step};
use crate::bundle::manifest::{ImageRef, Service};
use crate::host::config::Installed;
use crate::host::docker::parked;
use crate::ids::{Digest, Slot};

pub fn plan(
    installed: &Installed,
    service: &Service,
    slot: Slot,
    reference: &ImageRef,
    digest: &Digest,
) -> Plan {
    let containers: Vec<_> = containers(installed, service, slot, reference, digest).collect();
    let kept = containers.iter().map(|c| parked(&c.name)).collect();
    let mut steps: Vec<Step> = containers.into_iter().map(Step::Container).collect();
    steps.push(Step::Healthy { service: service.name.clone(), slot });
    steps.push(Step::Record {
        service: service.name.clone(),
        slot,
        version: reference.version.clone(),
        digest: digest.clone(),
    });
    steps.push(Step::Retire { containers: kept });
    Plan { verb: "deploy", about: format!("{} {} to {slot}", service.name, reference.version), steps }
}
