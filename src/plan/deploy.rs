//! The plan of a deploy: the standby slot gets a version; the active one is not in the plan at all.

use super::{Plan, slot as slots};
use crate::bundle::manifest::{ImageRef, Service};
use crate::error::Result;
use crate::host::config::Installed;
use crate::ids::{Digest, Slot};

pub fn plan(
    installed: &Installed,
    service: &Service,
    slot: Slot,
    reference: &ImageRef,
    digest: &Digest,
) -> Result<Plan> {
    let mut steps = slots::fill(installed, service, slot, reference, digest, false)?;
    steps.extend(slots::retire(installed, service, slot));
    Ok(Plan { verb: "deploy", about: format!("{} {} to {slot}", service.name, reference.version), steps })
}
