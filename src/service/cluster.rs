//! What Consul is told of the pointer, for those who watch it there. The pointer itself is the truth:
//! a switch never waits for Consul, and what it missed is told when it is back.

use serde_json::{Value, json};

use super::pointer;
use super::state::State;
use crate::audit;
use crate::bundle::manifest::{Engine, Service};
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::{consul, nginx};
use crate::ids::Name;
use crate::ui::Ui;

fn key(service: &Name) -> String {
    format!("zd/services/{service}/pointer")
}

/// What stands in Consul when all is well.
fn wanted(service: &Name) -> Result<Value> {
    let active = pointer::read(service)?.slot();
    let state = State::read(service)?;
    Ok(json!({
        "active": active,
        "release": state.release(active),
        "since": state.active_since,
        "by": state.active_by,
    }))
}

/// The pointer and the record of its last change, both or neither (check-and-set in one transaction).
async fn publish(service: &Name) -> Result<()> {
    let api = consul::zd()?;
    let key = key(service);
    let wanted = wanted(service)?;
    let (found, index) = consul::read(&api, &key).await?;
    if found != wanted {
        let mut entries = vec![(key.clone(), wanted, index)];
        let mut records = audit::read()?.into_iter().rev();
        if let Some(record) = records.find(|r| r.service.as_ref() == Some(service)) {
            let key = format!("zd/audit/{service}/{:08}", record.seq);
            let (_, index) = consul::read(&api, &key).await?;
            entries.push((key, json!(record), index));
        }
        if !consul::write(&api, &entries).await? {
            return Err(Code::Stack.err(format!("Consul key {key} was changed by somebody else meanwhile")));
        }
    }
    let mut state = State::read(service)?;
    if state.unpublished {
        state.unpublished = false;
        state.write(service)?;
    }
    Ok(())
}

/// Tells Consul; where it does not listen, notes that it is to be told later, and says so.
pub async fn tell(installed: &Installed, service: &Name, ui: &Ui) -> Result<()> {
    if installed.lock.engine != Engine::Nomad {
        return Ok(());
    }
    if let Err(e) = publish(service).await {
        let mut state = State::read(service)?;
        state.unpublished = true;
        state.write(service)?;
        ui.warn(format!("Consul does not know of it yet ({}); it is told when it is back", e.what));
    }
    Ok(())
}

/// As [`tell`], of every service.
pub async fn tell_all(installed: &Installed, ui: &Ui) -> Result<()> {
    for service in &installed.lock.services {
        tell(installed, &service.name, ui).await?;
    }
    Ok(())
}

/// Whether Consul has missed something that this host did.
pub fn is_behind(service: &Name) -> Result<bool> {
    Ok(State::read(service)?.unpublished)
}

/// How Consul's word differs from what this host serves, if it does; with the cure.
pub async fn difference(installed: &Installed, service: &Service) -> Result<Option<(String, String)>> {
    let api = consul::zd()?;
    let name = &service.name;
    let pools = nginx::pools_key(name);
    if consul::read(&api, &pools).await?.0 != nginx::pools(installed, service) {
        let what = format!("Consul key {pools} is not what this host was installed with");
        return Ok(Some((
            what,
            "somebody changed it by hand: zd install of the same bundle sets it right".into(),
        )));
    }
    let service = name;
    let (found, _) = consul::read(&api, &key(service)).await?;
    let wanted = wanted(service)?;
    if found == wanted {
        return Ok(None);
    }
    let (active, said) = (&wanted["active"], &found["active"]);
    let active = active.as_str().unwrap_or_default();
    let what = format!(
        "Consul key {} says {}, this host serves {active}",
        key(service),
        said.as_str().unwrap_or("nothing")
    );
    let cure = if is_behind(name)? {
        "it was away then and is told when it is back: systemctl start zd-publish".into()
    } else if found.is_null() {
        format!("zd switch --to {active} tells it; no traffic moves")
    } else {
        format!("somebody changed it by hand: zd switch --to {active} sets it right")
    };
    Ok(Some((what, cure)))
}
