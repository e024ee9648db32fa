//! The plan of another address: what zd rendered from the one before is rendered anew. The slots are not in it:
//! what they hold is the same under either name of the registry, and Docker has it under the one before. The
//! settings come last: until then the host is known by the address that it has.

use super::install::Builder;
use super::{Plan, Standing, Step};
use crate::bundle::manifest::Engine;
use crate::error::Result;
use crate::host::config::{HostConfig, Installed};
use crate::host::paths;

/// From what is installed to the same with other settings of the host. `standing`: containers that are to be the
/// same ones afterwards.
pub fn plan(from: &HostConfig, to: &Installed, about: String, standing: Vec<Standing>) -> Result<Plan> {
    let host = &to.host;
    let mut plan = Builder::default();
    plan.registry(host)?;
    if to.lock.engine == Engine::Nomad {
        plan.pulls(host);
        if to.lock.consul_https.is_some() {
            plan.consul(to)?;
        }
    }
    if !standing.is_empty() {
        plan.push(Step::Untouched { containers: standing });
    }
    if from.registry() != host.registry() {
        plan.push(Step::UntrustCa { path: paths::docker_ca(&from.registry()) });
    }
    plan.private_file(paths::HOST_TOML, host.to_toml()?);
    Ok(Plan { verb: "reconfigure", about, steps: plan.steps })
}

/// One line for each setting that becomes another.
pub fn differences(from: &HostConfig, to: &HostConfig) -> Vec<String> {
    let mut lines = Vec::new();
    if from.ip != to.ip {
        lines.push(format!("address {} -> {} (the node stays {})", from.ip, to.ip, to.node()));
    }
    if from.registry() != to.registry() {
        lines.push(format!("private registry {} -> {}", from.registry(), to.registry()));
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bundle::Lock;
    use crate::bundle::signature;
    use crate::plan::install;
    use crate::plan::slot;

    fn installed(engine: Engine) -> Installed {
        let mut lock =
            Lock::parse(include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json")).unwrap();
        lock.engine = engine;
        lock.consul_https = (engine == Engine::Nomad).then_some(8501);
        let host = toml::from_str(include_str!("../../tests/fixtures/before-upgrade/host.toml")).unwrap();
        Installed { host, lock }
    }

    fn moved(installed: &Installed) -> Installed {
        Installed { host: installed.host.moved([10, 4, 0, 18].into(), 5444), lock: installed.lock.clone() }
    }

    fn install_steps(installed: &Installed) -> Vec<Step> {
        let (_, key) = signature::generate(None).unwrap();
        let inputs = install::Inputs {
            installed,
            pin: Some(&key),
            lock_bytes: String::new(),
            foreign_docker: false,
            states: BTreeMap::new(),
            open_firewall: None,
            backup: None,
            restored: None,
        };
        let steps = install::plan(&inputs).unwrap().steps;
        let key = paths::TRUST;
        steps.into_iter().filter(|s| !matches!(s, Step::File(text) if text.path.starts_with(key))).collect()
    }

    /// What an install would render otherwise is in the plan, or names an image in a slot.
    #[test]
    fn all_that_follows_from_the_address_is_in_the_plan() {
        for engine in [Engine::Docker, Engine::Nomad] {
            let from = installed(engine);
            let to = moved(&from);
            let plan = plan(&from.host, &to, String::new(), Vec::new()).unwrap();
            let before = install_steps(&from);
            let other: Vec<Step> = install_steps(&to).into_iter().filter(|s| !before.contains(s)).collect();
            let (slots, rest): (Vec<Step>, Vec<Step>) =
                other.into_iter().partition(|s| matches!(s, Step::Container(_) | Step::Job { .. }));
            assert!(!slots.is_empty() && !rest.is_empty(), "{engine}");
            let missing: Vec<String> =
                rest.iter().filter(|s| !plan.steps.contains(s)).map(Step::title).collect();
            assert_eq!(missing, [""; 0], "{engine}");
        }
    }

    #[test]
    fn a_job_keeps_the_name_of_its_image_and_nothing_else() {
        let from = installed(Engine::Nomad);
        let to = moved(&from);
        let service = &from.lock.services[0];
        let image = |n: usize| &from.lock.images[n];
        let job = |installed: &Installed, n: usize| {
            let (reference, digest) = (&image(n).reference, &image(n).manifest);
            slot::job(installed, service, crate::ids::Slot::Blue, reference, digest).unwrap()
        };
        let (before, now) = (job(&from, 0), job(&to, 0));
        assert_ne!(before, now);
        assert_eq!(slot::named_as(&now, &before, &to.host), before);
        // Other content, or a registry that is not this host's.
        assert_eq!(slot::named_as(&job(&to, 1), &before, &to.host), job(&to, 1));
        let text = before.to_string().replace("10.4.0.17", "10.9.9.9");
        let foreign = serde_json::from_str(&text).unwrap();
        assert_eq!(slot::named_as(&now, &foreign, &to.host), now);
    }

    #[test]
    fn a_host_that_moves_keeps_its_name_and_knows_what_it_was_called() {
        let from = installed(Engine::Nomad).host;
        assert_eq!(from.moved(from.ip, from.registry_port), from);
        assert!(!from.to_toml().unwrap().contains("node"), "earlier versions read it");
        let there = from.moved([10, 4, 0, 18].into(), 5443);
        assert_eq!((there.node(), there.registry()), ("node-10-4-0-17".into(), "10.4.0.18:5443".into()));
        assert_eq!(there.former_registries, ["10.4.0.17:5443"]);
        let back = there.moved(from.ip, 5443);
        assert_eq!(
            (back.node(), back.former_registries.as_slice()),
            (from.node(), ["10.4.0.18:5443".into()].as_slice())
        );
        assert_eq!(toml::from_str::<HostConfig>(&back.to_toml().unwrap()).unwrap(), back);
        assert!(from.is_container([172, 31, 0, 1].into()) && !from.is_container([172, 30, 0, 1].into()));
    }
}
