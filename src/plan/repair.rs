//! The plan that begins broken stores of Consul and Nomad anew and brings back what belongs in them. zd knows all of it:
//! tokens, keys, jobs, pools, pointers. What serves stays where Nomad takes it over again; else each slot is filled anew
//! while the other serves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::install::Builder;
use super::restore::{Serving, Way};
use super::{Keep, Plan, Standing, Step, slot as slots};
use crate::bundle::manifest::Product;
use crate::error::{Code, OrCode, Result};
use crate::host::config::Installed;
use crate::host::paths;
use crate::host::stores::Broken;
use crate::ids::{Name, Slot};
use crate::service::state::State;

/// What is begun anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rebuild {
    Consul,
    /// What Nomad's client remembers; its server tells it all of that again.
    NomadClient,
    /// Nomad's server, and with it its client: allocations have other ids afterwards.
    Nomad,
}

impl Rebuild {
    pub fn of(broken: &Broken) -> Self {
        match broken.product {
            Product::Nomad if broken.is_of_nomads_client() => Self::NomadClient,
            Product::Nomad => Self::Nomad,
            Product::Consul | Product::ConsulTemplate => Self::Consul,
        }
    }

    pub fn product(self) -> Product {
        match self {
            Self::Consul => Product::Consul,
            Self::NomadClient | Self::Nomad => Product::Nomad,
        }
    }

    /// Files and folders that are put aside. Not the ids of nodes, nor the services that Consul's agent registers again
    /// by itself.
    fn stores(self) -> Vec<PathBuf> {
        let (folder, names): (&str, &[&str]) = match self {
            Self::Consul => {
                (paths::CONSUL_DATA, &["raft", "serf", "server_metadata.json", "acl-tokens.json"])
            }
            Self::NomadClient => (paths::NOMAD_DATA, &["client/state.db"]),
            Self::Nomad => (paths::NOMAD_DATA, &["server", "client/state.db", "alloc", "alloc_mounts"]),
        };
        names.iter().map(|name| Path::new(folder).join(name)).collect()
    }
}

/// What a service is to come back to: a run that is gone on with finds other slots filled, and another one active.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Goal {
    pub active: Slot,
    pub state: State,
}

/// What a repair leads to, and when it was begun: folders aside are named by that.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Goals {
    pub begun: Timestamp,
    pub services: BTreeMap<Name, Goal>,
}

/// Where the goals stand while a repair goes on.
pub fn goals_file() -> PathBuf {
    Path::new(paths::ASIDE).join("goals.json")
}

/// `broken` are put aside beside what [`Rebuild`] says.
pub fn plan(
    installed: &Installed,
    rebuild: &[Rebuild],
    broken: &[Broken],
    goals: &Goals,
    serving: &BTreeMap<Name, Serving>,
    standing: Vec<Standing>,
) -> Result<Plan> {
    let mut plan = Builder::default();
    plan.push(Step::Dir { path: paths::ASIDE.into(), mode: 0o700, owner: None, keep: Keep::Ours });
    let text = serde_json::to_string_pretty(goals).or_code(Code::Bug, "writing goals")?;
    plan.file(goals_file(), format!("{text}\n"));
    for rebuild in rebuild {
        let product = rebuild.product();
        let mut stores = rebuild.stores();
        for broken in broken.iter().filter(|b| b.product == product) {
            if !stores.iter().any(|store| broken.path.starts_with(store)) {
                stores.push(broken.path.clone());
            }
        }
        // One that is broken once more, by a further power cut, needs another place.
        let again = broken.iter().any(|b| b.product == product);
        let since = if again { Timestamp::now() } else { goals.begun };
        let aside = Path::new(paths::ASIDE).join(format!("{product}-{}", since.strftime("%Y%m%dT%H%M%SZ")));
        plan.push(Step::Rebuild { product, stores, aside });
    }
    for service in &installed.lock.services {
        let name = &service.name;
        if rebuild.contains(&Rebuild::Nomad) {
            let both = serving.get(name).zip(goals.services.get(name));
            let (now, goal) = both.ok_or_else(|| Code::Bug.err(format!("nobody looked at {name}")))?;
            let mut way = Way { installed, service, now, steps: Vec::new() };
            way.go(goal.active, &goal.state)?;
            plan.steps.append(&mut way.steps);
        }
        if rebuild.contains(&Rebuild::Consul) {
            plan.push(slots::pools_key(installed, service));
        }
    }
    if !rebuild.contains(&Rebuild::Nomad) && !standing.is_empty() {
        plan.push(Step::Untouched { containers: standing });
    }
    let products: Vec<_> = rebuild.iter().map(|rebuild| rebuild.product().as_str()).collect();
    Ok(Plan { verb: "repair", about: products.join(" and "), steps: plan.steps })
}
