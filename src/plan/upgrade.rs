//! The plan of an upgrade, and of the way back to a generation: from what is installed to another lock, in
//! the order in which the parts bear each other: packages, registry, Consul, Docker, Nomad, the standby slots,
//! consul-template, nginx. The link to the generation comes last.

use std::time::Duration;

use jiff::Timestamp;

use super::install::{Builder, Inputs, repository};
use super::preflight::Finding;
use super::{Moved, Plan, Process, Standing, Step, slot};
use crate::bundle::Lock;
use crate::bundle::lock::Release;
use crate::bundle::manifest::{Engine, Service, Tcp};
use crate::bundle::versions::{self, OneWay, Route};
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::paths;
use crate::ids::{Name, Slot, Version, numbers};

/// What stands in the way of an upgrade only.
pub const SEQUENCE: &str = "sequence";
pub const DROPPED: &str = "dropped service";
/// Findings about data that an earlier version has to read.
const DATA: &str = "data";

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
    plan.docker(installed)?;
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
    plan.private_file(paths::HOST_TOML, installed.host.to_toml()?);
    plan.current(installed);
    if !change.dropped.is_empty() {
        plan.push(Step::Drop { services: change.dropped });
        plan.bridge(installed, lock.services.len())?;
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
            let via = before.and_then(|before| route(before, release)).unwrap_or_default().via;
            let before = before.map_or("-", |b| b.version.as_str());
            let steps: Vec<&str> = via.into_iter().chain([&release.version]).map(Version::as_str).collect();
            lines.push(format!(
                "{} {before} -> {} (restarted; traffic does not need it)",
                release.product,
                steps.join(" -> ")
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

/// The time of packing orders bundles: one that was packed before one which was here already may have holes that
/// were closed since.
pub fn older(newest: Timestamp, to: &Lock) -> Option<Finding> {
    (to.created < newest).then(|| {
        let what = format!("the bundle was packed {}, the newest that was installed here {newest}", to.created);
        let cure = "bring a newer one; go back with zd generations and zd rollback --generation N; or, with a reason, \
                    --allow-older --reason TEXT";
        Finding::bad(SEQUENCE, what, cure)
    })
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
        if release.version.numbers() < before.version.numbers() {
            let what = format!(
                "{} {} is installed, the bundle brings {}",
                release.product, before.version, release.version
            );
            bad(SEQUENCE, what, "data does not go back by a bundle: zd rollback --generation N");
        }
    }
    found.extend(from.releases.iter().filter_map(|before| missing(before, to.release(before.product)?)));
    found
}

/// The way from one release of a program to another by those that are carried with it.
fn route<'a>(from: &Release, to: &'a Release) -> Option<Route<'a>> {
    let carried = to.via.iter().map(|stone| &stone.version);
    versions::rules(to.product).route(&from.version, &to.version, carried)
}

/// Versions that are needed between and not carried.
fn missing(from: &Release, to: &Release) -> Option<Finding> {
    let way = format!("{} {} to {}", to.product, from.version, to.version);
    let rules = versions::rules(to.product);
    let pages = rules.pages(&from.version, &to.version);
    let Some(route) = route(from, to) else {
        let what = format!("{way}: this zd does not know whether the one may follow the other");
        return Some(Finding::bad(SEQUENCE, what, format!("pack the bundle with a newer zd; see {pages}")));
    };
    if route.missing.is_empty() {
        return None;
    }
    let carried: Vec<&str> = to.via.iter().map(|stone| stone.version.as_str()).collect();
    let carried = if carried.is_empty() { "none".into() } else { carried.join(", ") };
    let missing = route.missing.join(", ");
    let what = format!("{way} needs {missing} between; this bundle carries {carried}");
    let cure = format!(
        "add the last release of each to via of {} in the manifest, and pack again; see {pages}",
        to.product
    );
    Some(Finding::bad(SEQUENCE, what, cure))
}

/// Ways back that an upgrade closes.
pub fn closes(from: &Lock, to: &Lock) -> Vec<Finding> {
    let pairs = from.releases.iter().filter_map(|before| Some((before, to.release(before.product)?)));
    let closed = |(before, now): (&Release, &Release)| {
        let one_ways = versions::rules(now.product).one_ways(&now.version, &before.version);
        let note = |change: &OneWay| {
            let what = format!(
                "{} {}: zd rollback --generation leads back to {} for {} minutes only; {}",
                now.product,
                now.version,
                before.version,
                change.after().as_secs() / 60,
                change.why
            );
            Finding::note(DATA, what, change.page.clone())
        };
        one_ways.map(note).collect::<Vec<_>>()
    };
    pairs.flat_map(closed).collect()
}

/// What is to be known of a way back to an earlier lock. `later` are the bundles that were installed since then, each
/// with its age: what their programs wrote is what the earlier ones have to read.
pub fn way_back(from: &Lock, to: &Lock, later: &[(Lock, Duration)]) -> Vec<Finding> {
    let mut found = Vec::new();
    for (before, now) in from.releases.iter().filter_map(|before| Some((before, to.release(before.product)?)))
    {
        if now.version.numbers() >= before.version.numbers() {
            continue;
        }
        let rules = versions::rules(now.product);
        let way = format!("{} {} back to {}", now.product, before.version, now.version);
        let age = |change: &OneWay| {
            let past = later.iter().filter(|(lock, _)| {
                lock.release(now.product).is_some_and(|release| change.is_past(&release.version))
            });
            past.map(|(_, age)| *age).max().unwrap_or_default()
        };
        let closed =
            rules.one_ways(&before.version, &now.version).find(|change| age(change) >= change.after());
        match closed {
            Some(change) => found.push(Finding::bad(
                DATA,
                format!("{way}: {} ({})", change.why, change.page),
                "stay with this generation; the earlier bundle needs a planned stop: zd uninstall, then zd install from its stick",
            )),
            None => found.extend(rules.back.as_ref().map(|back| Finding::note(DATA, format!("{way}: {back}"), rules.page.clone()))),
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
    use crate::ids::Digest;

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
    fn an_older_bundle_is_told() {
        let to = lock();
        let later = to.created + std::time::Duration::from_secs(60);
        assert!(older(to.created, &to).is_none());
        assert!(older(later, &to).unwrap().what.contains("the newest that was installed here"));
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        type Change = fn(&mut Lock);
        let cases: [(Change, &str); 8] = [
            (|l| l.name = "other".parse().unwrap(), "bundle: stack is installed"),
            (|l| l.engine = Engine::Docker, "engine: engine nomad is installed"),
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
                "this zd does not know whether the one may follow the other",
            ),
        ];
        for (change, says) in cases {
            let mut to = lock();
            change(&mut to);
            let found = found(&to, &[]);
            assert!(found.iter().any(|f| f.contains(says)), "{says}: {found:?}");
        }
    }

    /// A lock whose Nomad is this version and goes through these; the lock has no other program.
    fn nomad(version: &str, via: &[&str]) -> Lock {
        let mut lock = lock();
        lock.releases.retain(|release| release.product == Product::Nomad);
        let nomad = lock.releases[0].clone();
        let of = |version: &&str| Release { version: version.parse().unwrap(), ..nomad.clone() };
        lock.releases = vec![Release {
            via: via.iter().map(of).collect(),
            digest: Digest::of(version.as_bytes()),
            ..of(&version)
        }];
        lock
    }

    #[test]
    fn versions_that_are_needed_between_are_named() {
        let said = |from: &Lock, to: &Lock| -> Vec<String> {
            let found = obstacles(from, to, &[]);
            found.into_iter().map(|f| format!("{}; {}", f.what, f.cure)).collect()
        };
        let cases: [(&str, &str, &[&str], &str); 5] = [
            (
                "1.6.1",
                "2.0.5",
                &[],
                "nomad 1.6.1 to 2.0.5 needs 1.8.x, 1.10.x, 1.11.x between; this bundle carries none;",
            ),
            (
                "1.6.1",
                "2.0.5",
                &["1.8.4", "1.11.3"],
                "needs 1.10.x between; this bundle carries 1.8.4, 1.11.3;",
            ),
            ("1.6.1", "2.0.5", &["1.8.4", "1.10.5", "1.11.3"], ""),
            ("1.11.3", "2.0.5", &[], ""),
            ("1.6.1", "1.6.14", &[], ""),
        ];
        for (from, to, via, expected) in cases {
            let found = said(&nomad(from, &[]), &nomad(to, via));
            match expected {
                "" => assert_eq!(found, [""; 0], "{from} to {to}"),
                _ => assert!(found.len() == 1 && found[0].contains(expected), "{found:?}"),
            }
        }
        let found = said(&nomad("1.6.1", &[]), &nomad("2.0.5", &[])).concat();
        assert!(found.contains("via of nomad in the manifest") && found.contains("https://"), "{found}");
        let lines = differences(&nomad("1.9.0", &[]), &nomad("2.0.5", &["1.8.4", "1.10.5", "1.11.3"]), &[]);
        assert!(lines[0].starts_with("nomad 1.9.0 -> 1.11.3 -> 2.0.5 (restarted"), "{lines:?}");
    }

    #[test]
    fn a_way_back_that_the_data_forbids_is_known_before() {
        let (old, new) = (nomad("1.6.1", &[]), nomad("2.0.5", &[]));
        let said = |later: &[(Lock, Duration)]| {
            let found = way_back(&new, &old, later).remove(0);
            (found.good, found.what)
        };
        let minutes = |n: u64| Duration::from_secs(n * 60);
        let (good, what) = said(&[(new.clone(), minutes(9))]);
        assert!(good.is_none() && what.contains("HashiCorp supports no way back"), "{what}");
        let (good, what) = said(&[(new.clone(), minutes(10))]);
        assert!(
            good == Some(false) && what.starts_with("nomad 2.0.5 back to 1.6.1: 1.9 and later move"),
            "{what}"
        );
        // An earlier bundle wrote it, or one of a version that does not.
        assert_eq!(said(&[(nomad("1.9.7", &[]), minutes(99)), (new.clone(), minutes(1))]).0, Some(false));
        assert_eq!(said(&[(nomad("1.8.4", &[]), minutes(99)), (new.clone(), minutes(1))]).0, None);
        assert!(way_back(&old, &new, &[]).is_empty() && way_back(&new, &new, &[]).is_empty());
        assert_eq!(closes(&old, &new).len(), 1);
        assert!(closes(&old, &nomad("1.8.4", &[])).is_empty());
    }

    #[test]
    fn numbers_of_versions() {
        assert_eq!(numbers("1.8.7"), (1, 8, 7));
        assert_eq!(major("20.10.24+dfsg1-1+deb12u1"), 20);
        assert_eq!(major("5:24.0.7-1~debian.12~bookworm"), 24);
    }
}
