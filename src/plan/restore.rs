//! The plan that puts an installed host back to what a backup says. A bare host gets the plan of an install, with
//! secrets and state out of the backup (`install::plan`); here something serves, and goes on serving: a slot
//! is filled only while it is the standby, and the pointer moves by the gate.

use std::collections::{BTreeMap, BTreeSet};

use super::install::{Builder, Inputs};
use super::{Plan, Step, scale, slot as slots};
use crate::bundle::manifest::{Engine, ImageRef, Service};
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::docker::{Found, instance, parked};
use crate::host::paths;
use crate::ids::{Name, Slot};
use crate::service::state::{self, Filled, State};

/// What is on the host now, beside what every install looks at.
pub struct Present {
    pub services: BTreeMap<Name, Serving>,
    /// Secrets that the backup has and the host has not. The backup's fit each other, so it is all of them or none.
    pub secrets_lost: bool,
    /// The key that this host signs with is not there. One that was made since stays.
    pub signing_key_lost: bool,
    /// Reports that the backup has and the host has not.
    pub reports_lost: Vec<String>,
}

pub struct Serving {
    /// Slots whose containers the engine knows as its own.
    pub adopted: BTreeSet<Slot>,
    /// None where the pointer is gone.
    pub active: Option<Slot>,
    pub state: State,
    pub containers: BTreeMap<Slot, Vec<Found>>,
}

pub fn plan(inputs: &Inputs, present: &Present) -> Result<Plan> {
    let installed = inputs.installed;
    let lock = &installed.lock;
    let index = inputs.restored.ok_or_else(|| Code::Bug.err("a restore without a backup"))?;
    let secrets = inputs.restored.filter(|_| present.secrets_lost);
    let signing = inputs.restored.filter(|_| present.signing_key_lost);
    let mut plan = Builder { restored: inputs.restored, secrets, signing, ..Builder::default() };
    plan.base(inputs);
    plan.records(Some(&present.reports_lost));
    plan.private_file(paths::HOST_TOML, installed.host.to_toml()?);
    plan.registry(&inputs.installed.host)?;
    plan.saved_images(lock);
    plan.docker(installed)?;
    let nomad = lock.engine == Engine::Nomad;
    if nomad {
        plan.dir(paths::SECRETS, 0o700);
        plan.consul(installed)?;
        plan.nomad(installed)?;
    }
    let mut gone = Vec::new();
    for service in &lock.services {
        let saved = index.service(&service.name).zip(present.services.get(&service.name));
        let (saved, now) = saved.ok_or_else(|| Code::Bug.err("a service that nobody looked at"))?;
        plan.folders(service);
        plan.push(Step::Pointer { service: service.name.clone(), slot: saved.active });
        let mut way = Way { installed, service, now, steps: Vec::new() };
        way.go(saved.active, &saved.state)?;
        plan.steps.append(&mut way.steps);
        gone.extend(way.left_over());
        if nomad {
            plan.push(slots::pools_key(installed, service));
        }
    }
    if nomad {
        plan.consul_template(installed)?;
    }
    for service in &lock.services {
        if nomad {
            plan.push(Step::LoadPools { service: service.name.clone() });
        }
        plan.front(installed, service)?;
        // Not the jobs: those of slots that are filled here are registered anew.
        let name = &service.name;
        plan.saved_file(&format!("state of {name}"), &state::path(name));
    }
    if !lock.services.is_empty() {
        plan.log_rotation(lock)?;
    }
    plan.backups(inputs)?;
    // Last: until here there is a way back.
    if !gone.is_empty() {
        plan.push(Step::Retire { containers: gone });
    }
    Ok(Plan { verb: "restore", about: lock.title(), steps: plan.steps })
}

/// From what a service's slots hold to what they shall hold.
pub(super) struct Way<'a> {
    pub(super) installed: &'a Installed,
    pub(super) service: &'a Service,
    pub(super) now: &'a Serving,
    pub(super) steps: Vec<Step>,
}

impl Way<'_> {
    pub(super) fn go(&mut self, active: Slot, saved: &State) -> Result<()> {
        let name = &self.service.name;
        let of = |slot| {
            saved
                .slots
                .get(&slot)
                .ok_or_else(|| Code::Bundle.err(format!("{name} {slot}: the backup names no version")))
        };
        let (serving, standing_by) = (of(active)?, of(active.other())?);
        if let Some(instances) = saved.instances.filter(|n| self.now.state.instances != Some(*n)) {
            self.steps.push(Step::Instances { service: name.clone(), instances });
        }
        if self.service.instances != self.before() && self.installed.lock.engine == Engine::Nomad {
            // What is in the jobs before and after is not touched.
            let held = if self.now.state.slots.is_empty() { saved } else { &self.now.state };
            let scaled = scale::plan(self.installed, self.service, self.before(), held)?;
            self.steps.extend(scaled.steps.into_iter().filter(|s| !matches!(s, Step::Instances { .. })));
        }
        // Without a pointer nothing serves: the plan has set it already.
        let mut at = self.now.active.unwrap_or(active);
        if !self.now.state.slots.contains_key(&at) {
            // Lost; a switch asks what it goes away from.
            let held = self.now.containers.get(&at).and_then(|found| filled(found.first()?));
            self.record(at, &held.unwrap_or_else(|| of(at).cloned().unwrap_or_else(|_| serving.clone())));
        }
        // Where nothing runs there is nothing to keep serving.
        if at == active && self.runs(active) && !self.holds(active, serving) {
            self.fill(active.other(), serving)?;
            at = active.other();
            self.steps.push(Step::Switched { service: name.clone(), slot: at });
        }
        self.fill(active, serving)?;
        if at != active {
            self.steps.push(Step::Switched { service: name.clone(), slot: active });
        }
        self.fill(active.other(), standing_by)
    }

    /// Containers of each slot until now.
    fn before(&self) -> u8 {
        let counted = self.now.containers.values().flatten().map(|c| c.instance).max();
        self.now.state.instances.or(counted).unwrap_or(self.service.instances)
    }

    fn runs(&self, slot: Slot) -> bool {
        self.now.containers.get(&slot).is_some_and(|found| found.iter().any(|c| c.running))
    }

    /// Those that are there now, as many as shall be, run this.
    fn holds(&self, slot: Slot, wanted: &Filled) -> bool {
        let found = self.now.containers.get(&slot).map_or(&[][..], Vec::as_slice);
        let reference = ImageRef { name: self.service.image.clone(), version: wanted.version.clone() };
        let mut all = slots::containers(self.installed, self.service, slot, &reference, &wanted.digest)
            .take(usize::from(self.before()));
        self.now.adopted.contains(&slot)
            && all.all(|wanted| instance(found, wanted.instance).is_some_and(|c| c.is(&wanted)))
    }

    fn fill(&mut self, slot: Slot, wanted: &Filled) -> Result<()> {
        let reference = ImageRef { name: self.service.image.clone(), version: wanted.version.clone() };
        let steps = slots::fill(self.installed, self.service, slot, &reference, &wanted.digest, true)?;
        self.steps.extend(steps);
        Ok(())
    }

    fn record(&mut self, slot: Slot, held: &Filled) {
        self.steps.push(Step::Record {
            service: self.service.name.clone(),
            slot,
            version: held.version.clone(),
            digest: held.digest.clone(),
        });
    }

    /// Containers that stay parked, and those that are too many.
    fn left_over(&self) -> Vec<String> {
        if self.installed.lock.engine != Engine::Docker {
            return Vec::new();
        }
        let name = |slot, i| paths::container(&self.service.name, slot, i);
        let most = self.before().max(self.service.instances);
        let both = || Slot::BOTH.into_iter();
        let parked = both().flat_map(|slot| (1..=most).map(move |i| parked(&name(slot, i))));
        let many = both().flat_map(|slot| (self.service.instances + 1..=most).map(move |i| name(slot, i)));
        parked.chain(many).collect()
    }
}

/// What a container's labels say.
fn filled(found: &Found) -> Option<Filled> {
    let (version, digest) = (found.version.parse().ok()?, found.digest.parse().ok()?);
    Some(Filled { version, digest, since: jiff::Timestamp::now(), by: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Lock;
    use crate::ids::Digest;

    const SAVED: [(Slot, &str); 2] = [(Slot::Blue, "v1"), (Slot::Green, "v2")];

    fn held(version: &str) -> Filled {
        let (version, digest) = (version.parse().unwrap(), Digest::of(version.as_bytes()));
        Filled { version, digest, since: jiff::Timestamp::UNIX_EPOCH, by: "kim".into() }
    }

    fn state(slots: &[(Slot, &str)]) -> State {
        State { slots: slots.iter().map(|(slot, v)| (*slot, held(v))).collect(), ..State::default() }
    }

    fn installed() -> Installed {
        let mut lock =
            Lock::parse(include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json")).unwrap();
        lock.engine = Engine::Docker;
        let host = toml::from_str(include_str!("../../tests/fixtures/before-upgrade/host.toml")).unwrap();
        Installed { host, lock }
    }

    /// Steps of the way back to blue v1 and green v2, blue active; without those that look at health.
    fn way(active: Slot, holds: [(Slot, &str); 2], known: &[(Slot, &str)]) -> Vec<String> {
        let installed = installed();
        let service = &installed.lock.services[0];
        let found = |slot: Slot, version: &str| {
            let reference = ImageRef { name: service.image.clone(), version: version.parse().unwrap() };
            let digest = Digest::of(version.as_bytes());
            let all = slots::containers(&installed, service, slot, &reference, &digest);
            all.map(|c| Found {
                name: c.name,
                id: "x".into(),
                instance: c.instance,
                running: true,
                started_at: String::new(),
                restarts: 0,
                version: c.version.to_string(),
                digest: c.digest.to_string(),
                ip: c.ip.to_string(),
                allocation: String::new(),
            })
            .collect()
        };
        let containers = holds.iter().map(|(slot, v)| (*slot, found(*slot, v))).collect();
        let now =
            Serving { adopted: Slot::BOTH.into(), active: Some(active), state: state(known), containers };
        let mut way = Way { installed: &installed, service, now: &now, steps: Vec::new() };
        way.go(Slot::Blue, &state(&SAVED)).unwrap();
        let title = |s: &Step| match s {
            Step::Healthy { .. } => None,
            Step::Container(c) if c.instance > 1 => None,
            Step::Container(c) => Some(format!("{} {}", c.slot, c.version)),
            Step::Switched { slot, .. } => Some(format!("to {slot}")),
            Step::Record { slot, version, .. } => Some(format!("note {slot} {version}")),
            other => Some(other.title()),
        };
        way.steps.iter().filter_map(title).collect()
    }

    #[test]
    fn what_serves_rightly_is_not_moved() {
        let steps = way(Slot::Blue, SAVED, &SAVED);
        assert_eq!(steps, ["blue v1", "note blue v1", "green v2", "note green v2"]);
        let steps = way(Slot::Blue, [(Slot::Blue, "v1"), (Slot::Green, "v3")], &SAVED);
        assert!(!steps.iter().any(|s| s.starts_with("to ")), "{steps:?}");
    }

    #[test]
    fn a_pointer_that_moved_comes_back_by_the_gate() {
        let steps = way(Slot::Green, SAVED, &SAVED);
        assert_eq!(steps, ["blue v1", "note blue v1", "to blue", "green v2", "note green v2"]);
        // With its state lost: what the active slot holds is noted first, for the switch asks.
        let steps = way(Slot::Green, [(Slot::Blue, "v1"), (Slot::Green, "v7")], &[]);
        assert_eq!(steps[..4], ["note green v7", "blue v1", "note blue v1", "to blue"]);
    }

    #[test]
    fn an_active_slot_is_filled_while_the_other_serves() {
        let now = [(Slot::Blue, "v4"), (Slot::Green, "v3")];
        let steps = way(Slot::Blue, now, &now);
        let expected = [
            "green v1",
            "note green v1",
            "to green",
            "blue v1",
            "note blue v1",
            "to blue",
            "green v2",
            "note green v2",
        ];
        assert_eq!(steps, expected);
    }
}
