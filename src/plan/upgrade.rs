//! The plan of an upgrade, and of the way back to a generation: from what is installed to another lock, in
//! the order in which the parts bear each other: packages, registry, Consul, Docker, Nomad, the standby slots,
//! consul-template, nginx. The link to the generation comes last.

use super::install::{Builder, Inputs, repository};
use super::preflight::Finding;
use super::{Moved, Plan, Process, Standing, Step, slot};
use crate::bundle::Lock;
use crate::bundle::manifest::{Engine, Service, Tcp};
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::paths;
use crate::ids::{Name, Slot, numbers};

/// What stands in the way of an upgrade only.
pub const SEQUENCE: &str = "sequence";
pub const DROPPED: &str = "dropped service";

/// What there is to know beside what an install has to know.
pub struct Change<'a> {
    pub verb: &'static str,
    /// As it is now.
    pub from: &'a Installed,
    pub packages: Vec<Moved>,
    /// There is a bundle with the images; on the way back the registry has them.
    pub carried: bool,
    /// Services whose standby gets another version.
    pub filled: Vec<(&'a Service, Slot)>,
    /// Services that the generation gone back to does not have.
    pub dropped: Vec<Name>,
    /// Ports that zd has opened in the firewall, and that clients have no more use for.
    pub shut: Vec<u16>,
    /// Containers that are to be the same ones afterwards.
    pub standing: Vec<Standing>,
}

pub fn plan(inputs: &Inputs, change: Change) -> Result<Plan> {
    let installed = inputs.installed;
    let lock = &installed.lock;
    let nomad = lock.engine == Engine::Nomad;
    let mut plan = Builder { before: Some(&change.from.lock), ..Builder::default() };
    plan.base(inputs);
    plan.carried(installed);
    if nomad {
        plan.programs(installed);
    }
    if !change.packages.is_empty() {
        let (before, repository) = (repository(change.from), repository(installed));
        plan.push(Step::Upgrade { before, repository, packages: change.packages });
    }
    plan.packages(inputs);
    plan.push(Step::Renew(Process::Registry));
    plan.registry(&installed.host)?;
    if change.carried {
        plan.images(lock);
    }
    plan.docker(installed);
    if nomad {
        plan.consul(installed)?;
    }
    plan.push(Step::Renew(Process::Docker));
    if nomad {
        plan.nomad(installed)?;
    }
    for service in &lock.services {
        plan.slots(inputs, service)?;
    }
    // What stays in its slot was made for the settings before: it may know nothing of a health path that is new.
    let stays = |name: &Name, slot: Slot| {
        change.from.lock.service(name).is_some()
            && !change.filled.iter().any(|(filled, to)| filled.name == *name && *to == slot)
    };
    plan.steps.retain(|step| !matches!(step, Step::Healthy { service, slot } if stays(service, *slot)));
    if nomad {
        plan.consul_template(installed)?;
    }
    for service in &lock.services {
        plan.push(Step::Renew(Process::Nginx { service: service.name.clone() }));
        plan.front(installed, service)?;
    }
    if !lock.services.is_empty() {
        plan.log_rotation(lock)?;
        plan.firewall(inputs, &change.shut)?;
    }
    plan.backups(inputs)?;
    if !change.standing.is_empty() {
        plan.push(Step::Untouched { containers: change.standing });
    }
    plan.file(paths::HOST_TOML, installed.host.to_toml()?);
    plan.current(installed);
    if !change.dropped.is_empty() {
        plan.push(Step::Drop { services: change.dropped });
    }
    plan.steps
        .extend(change.filled.iter().filter_map(|(service, slot)| slot::retire(installed, service, *slot)));
    let about = format!("{} to {}", change.from.lock.title(), lock.title());
    Ok(Plan { verb: change.verb, about, steps: plan.steps })
}

/// One line for each part that becomes another, as `name before -> after`.
pub fn differences(from: &Lock, to: &Lock, packages: &[Moved]) -> Vec<String> {
    let gone = from.services.iter().filter(|before| to.service(&before.name).is_none());
    let mut lines: Vec<String> = gone
        .map(|before| format!("service {} goes, and port {} with it", before.name, before.listen))
        .collect();
    for release in &to.releases {
        let before = from.release(release.product);
        if before.is_none_or(|b| b.digest != release.digest) {
            let before = before.map_or("-", |b| b.version.as_str());
            lines.push(format!(
                "{} {before} -> {} (restarted; traffic does not need it)",
                release.product, release.version
            ));
        }
    }
    if from.consul_https != to.consul_https {
        let shown = |port: Option<u16>| port.map_or("-".into(), |port| port.to_string());
        let (before, now) = (shown(from.consul_https), shown(to.consul_https));
        lines.push(format!("consul-https {before} -> {now} (Consul restarted; traffic does not need it)"));
    }
    lines.extend(packages.iter().map(|p| format!("package {} {} -> {}", p.name, p.from, p.to)));
    for image in &to.images {
        if from.image(&image.reference).is_none_or(|b| b.manifest != image.manifest) {
            lines.push(format!("image {} {} comes to the registry", image.reference, image.manifest.short()));
        }
    }
    for service in &to.services {
        match from.service(&service.name) {
            None => lines.push(format!("service {} is new", service.name)),
            Some(before) if before != service => {
                lines.push(format!("service {}: other settings in the manifest", service.name));
            }
            Some(_) => {}
        }
    }
    lines
}

/// What stands in the way from one lock to another. Empty is a way.
pub fn obstacles(from: &Lock, to: &Lock, packages: &[Moved]) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut bad = |name, what: String, cure: &str| found.push(Finding::bad(name, what, cure));
    if from.name != to.name {
        let what = format!("{} is installed, this is a bundle of {}", from.name, to.name);
        bad("bundle", what, "bring the next bundle of the same name");
    }
    if from.engine != to.engine {
        let what = format!("engine {} is installed, the bundle says {}", from.engine, to.engine);
        bad("engine", what, "keep the engine; another one needs zd uninstall and zd install");
    }
    if to.created < from.created {
        let what = format!("the bundle was packed {}, the installed one {}", to.created, from.created);
        bad(SEQUENCE, what, "an older bundle is gone back to: zd generations, zd rollback --generation N");
    }
    for (place, before) in from.services.iter().enumerate() {
        let name = &before.name;
        match to.services.iter().position(|s| s.name == *name) {
            None => match to.services.get(place) {
                Some(other) => {
                    let what = format!("{name} is not there, and {} has its place", other.name);
                    bad(
                        "service",
                        what,
                        "keep both; on the way back, go to a generation without either first",
                    );
                }
                None => bad(DROPPED, format!("{name} is not in the bundle"), "keep it in the manifest"),
            },
            Some(now) if now != place => {
                let what = format!("{name} is service {} here and {} in the bundle", place + 1, now + 1);
                bad(
                    "service",
                    what,
                    "keep the order of the services: their addresses follow from it; add new ones last",
                );
            }
            Some(now) if to.services[now].port != before.port => {
                let what =
                    format!("{name} listens on {}, in the bundle on {}", before.port, to.services[now].port);
                bad("service", what, "keep the port: both slots must have the same one");
            }
            Some(now) if to.services[now].listen != before.listen => {
                let what = format!(
                    "{name} serves clients on {}, in the bundle on {}",
                    before.listen, to.services[now].listen
                );
                bad("service", what, "keep the port: clients come to it");
            }
            Some(now) => {
                let now = &to.services[now].tcp;
                let same = |t: &&Tcp| now.iter().any(|n| n.listen() == t.listen() && n.port == t.port);
                if let Some(tcp) = before.tcp.iter().find(|t| !same(t)) {
                    let what = format!(
                        "{name} serves tcp {} from port {}, in the bundle not",
                        tcp.listen(),
                        tcp.port
                    );
                    bad(
                        "service",
                        what,
                        "keep it: both slots must have the same ports, and equipment uses them",
                    );
                }
            }
        }
    }
    for package in packages.iter().filter(|p| ["docker.io", "docker-ce"].contains(&p.name.as_str())) {
        let (before, now) = (major(&package.from), major(&package.to));
        if before != now {
            let what = format!(
                "{} {} to {}: containers do not outlive another major release",
                package.name, package.from, package.to
            );
            bad(
                "docker",
                what,
                "carry patch releases of the Docker that is here; a major one needs a planned stop",
            );
        }
    }
    for release in &to.releases {
        let Some(before) = from.release(release.product) else { continue };
        let (was, now) = (before.version.numbers(), release.version.numbers());
        let name = release.product;
        if now < was {
            let what =
                format!("{name} {} is installed, the bundle brings {}", before.version, release.version);
            bad(SEQUENCE, what, "data does not go back by a bundle: zd rollback --generation N");
        } else if now.0 != was.0 || now.1 > was.1 + 2 {
            let what =
                format!("{name} {} to {} leaves out versions between", before.version, release.version);
            bad(SEQUENCE, what, "go in steps of at most two minor versions, as HashiCorp supports it");
        }
    }
    found
}

/// The first number of a package's upstream version (deb-version(7)).
fn major(version: &str) -> u32 {
    numbers(version.split_once(':').map_or(version, |(_, rest)| rest)).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::manifest::Product;

    fn lock() -> Lock {
        Lock::parse(include_bytes!("../../tests/fixtures/before-upgrade/zd-lock.json")).unwrap()
    }

    fn found(to: &Lock, packages: &[Moved]) -> Vec<String> {
        obstacles(&lock(), to, packages).into_iter().map(|f| format!("{}: {}", f.name, f.what)).collect()
    }

    #[test]
    fn the_next_bundle_has_a_way() {
        let mut to = lock();
        to.created += std::time::Duration::from_secs(90 * 86400);
        to.services[0].version = "v2".parse().unwrap();
        let consul = to.releases.iter_mut().find(|r| r.product == Product::Consul).unwrap();
        consul.version = "1.10.12".parse().unwrap();
        let moved =
            |name: &str, from: &str, to: &str| Moved { name: name.into(), from: from.into(), to: to.into() };
        let packages =
            [moved("docker.io", "20.10.24+dfsg1-1", "20.10.25+dfsg1-1"), moved("nginx", "1.22.1", "1.30.0")];
        assert_eq!(found(&to, &packages), [""; 0]);
        let lines = differences(&lock(), &to, &packages);
        assert!(lines.iter().any(|l| l == "package nginx 1.22.1 -> 1.30.0"), "{lines:?}");
        let packages = [moved("docker.io", "20.10.24", "26.1.5")];
        assert!(found(&to, &packages)[0].contains("do not outlive another major release"));
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        type Change = fn(&mut Lock);
        let cases: [(Change, &str); 9] = [
            (|l| l.name = "other".parse().unwrap(), "bundle: stack is installed"),
            (|l| l.engine = Engine::Docker, "engine: engine nomad is installed"),
            (|l| l.created -= std::time::Duration::from_secs(60), "sequence: the bundle was packed"),
            (|l| l.services.clear(), "service: hello is not in the bundle"),
            (
                |l| l.services[0].name = "other".parse().unwrap(),
                "hello is not there, and other has its place",
            ),
            (|l| l.services[0].listen = 8088, "hello serves clients on 80, in the bundle on 8088"),
            (|l| l.services[0].port = 9000, "service: hello listens on 8080, in the bundle on 9000"),
            (|l| l.releases.iter_mut().for_each(|r| r.version = "0.1.0".parse().unwrap()), "sequence: "),
            (
                |l| l.releases.iter_mut().for_each(|r| r.version = "9.1.0".parse().unwrap()),
                "leaves out versions",
            ),
        ];
        for (change, says) in cases {
            let mut to = lock();
            change(&mut to);
            let found = found(&to, &[]);
            assert!(found.iter().any(|f| f.contains(says)), "{says}: {found:?}");
        }
    }

    #[test]
    fn numbers_of_versions() {
        assert_eq!(numbers("1.8.7"), (1, 8, 7));
        assert_eq!(major("20.10.24+dfsg1-1+deb12u1"), 20);
        assert_eq!(major("5:24.0.7-1~debian.12~bookworm"), 24);
    }
}
