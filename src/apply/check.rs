//! What is there now, for each step: satisfied, or what would put it back. Changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use super::Check;
use crate::backup::Backup;
use crate::bundle::manifest::Product;
use crate::bundle::sources::cache::hash_file;
use crate::error::{At, Code, OrCode, Result};
use crate::host::config::{HostConfig, Installed};
use crate::host::docker::Docker;
use crate::host::registry::Registry;
use crate::host::secrets::Token;
use crate::host::{Host, consul, fs as hostfs, jobs, nginx, nomad, packages, paths, systemd, until};
use crate::ids::{Digest, Name, Slot};
use crate::plan::slot::{named_as, same_content};
use crate::plan::{DataCopy, Moved, Standing, Step, Text, Undo};
use crate::service::state::{self, State};
use crate::service::{health, pointer, renew, switch};

/// How long a Consul or Nomad that has just started may take to elect its leader.
const TELLS: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(200);

pub async fn check(step: &Step, host: &Host<'_>) -> Result<Check> {
    let needed_unless =
        |satisfied: bool, undo: Undo| if satisfied { Check::Satisfied } else { Check::Needed(undo) };
    Ok(match step {
        Step::Dir { path, mode, owner, keep } => dir(path, *mode, owner.as_deref(), *keep)?,
        Step::File(text) => file(text)?,
        Step::Files { path, files, .. } => {
            let (mut all, mut new) = (true, Vec::new());
            for (name, digest) in files {
                let file = path.join(name);
                if !file.exists() {
                    new.push(file);
                } else {
                    all = all && hash_file(&file)?.0 == *digest;
                }
            }
            needed_unless(all && new.is_empty(), Undo::RemoveFiles { paths: new })
        }
        Step::Tool => tool()?,
        Step::Link { path, target } => match fs::read_link(path) {
            Ok(found) if found == *target => Check::Satisfied,
            Ok(found) => Check::Needed(Undo::RestoreLink { path: path.clone(), target: found }),
            // An earlier zd had the program itself there.
            Err(_) if path.is_file() && path.starts_with(paths::GENERATIONS) => Check::Satisfied,
            Err(_) if path.exists() => {
                return Err(Code::Preflight
                    .err(format!("{} is there and is no link of zd's", path.display()))
                    .cure("move it away, then run the same command again"));
            }
            Err(_) => Check::Needed(remove([path.clone()])),
        },
        Step::Secret(secret) => match secret.found() {
            None => Check::Needed(Undo::RemoveFiles { paths: secret.files() }),
            Some(found) => needed_unless(found == *secret, Undo::Remake { secret: found }),
        },
        Step::TrustCa { path } => {
            let same = match (hostfs::read_if_any(path)?, hostfs::read_if_any(Path::new(paths::CA))?) {
                (Some(here), Some(ca)) => here == ca,
                _ => false,
            };
            needed_unless(same, remove([path.clone()]))
        }
        Step::UntrustCa { path } => needed_unless(!path.exists(), Undo::TrustCa { path: path.clone() }),
        Step::User { name, .. } => {
            needed_unless(hostfs::ids(Some(name)).is_ok(), Undo::RemoveUser { name: name.clone() })
        }
        Step::Mask { unit, package } => {
            // A package that is here already runs for somebody: not ours to stop.
            let settled = systemd::is_masked(unit).await? || packages::is_installed(package).await?;
            needed_unless(settled, Undo::Unmask { unit: unit.clone() })
        }
        Step::Upgrade { before, packages, .. } => {
            let mut moved = true;
            for package in packages {
                moved &= packages::version_of(&package.name).await?.as_ref() == Some(&package.to);
            }
            let back = |p: &Moved| Moved { name: p.name.clone(), from: p.to.clone(), to: p.from.clone() };
            let packages = packages.iter().map(back).collect();
            needed_unless(moved, Undo::PutBackPackages { repository: before.clone(), packages })
        }
        Step::Renew(process) => needed_unless(!renew::is_stale(process).await?, Undo::Nothing),
        Step::Untouched { containers } => needed_unless(untouched(containers).await.is_ok(), Undo::Nothing),
        Step::Packages { repository, wanted } => packages_step(repository, wanted).await?,
        Step::Unit { name } => {
            let (was_enabled, was_active) =
                (systemd::is_enabled(name).await?, systemd::is_active(name).await?);
            needed_unless(
                was_enabled && was_active,
                Undo::StopUnit { name: name.clone(), was_enabled, was_active },
            )
        }
        Step::Daemon { unit, files, data, .. } => {
            let mut undos = Vec::new();
            for text in files {
                if let Check::Needed(undo) = file(text)? {
                    undos.push(undo);
                }
            }
            let (was_enabled, was_active) =
                (systemd::is_enabled(unit).await?, systemd::is_active(unit).await?);
            let same = undos.is_empty() && was_enabled && was_active;
            let (unit, data) = (unit.clone(), data.clone());
            needed_unless(same, Undo::PutBackDaemon { unit, files: undos, was_enabled, was_active, data })
        }
        Step::Enabled { name } => {
            let (was_enabled, was_active) = (systemd::is_enabled(name).await?, true);
            let undo = Undo::StopUnit { name: name.clone(), was_enabled, was_active };
            needed_unless(was_enabled, undo)
        }
        Step::Consul { .. } => needed_unless(consul::is_ready().await, Undo::Nothing),
        Step::Nomad => {
            let token = Token::NomadManagement.path();
            // The token that this step takes goes with it: a Nomad without data makes another. One that is there is of a
            // Nomad that has only been restarted.
            let undo = if token.exists() { Undo::Nothing } else { remove([token]) };
            needed_unless(nomad::version().await.is_ok(), undo)
        }
        Step::Pools { service } => {
            let loaded = paths::nginx_pools(service);
            needed_unless(loaded.exists(), remove([loaded]))
        }
        Step::LoadPools { service } => {
            let installed = coming(host)?;
            let service = installed.service(Some(service))?;
            let loaded = nginx::servers(&paths::nginx_pools(&service.name))?;
            needed_unless(loaded == nginx::servers_of(&installed, service), Undo::Nothing)
        }
        Step::Gate { service, text } => {
            let path = paths::nginx_conf(service);
            match hostfs::read_if_any(&path)? {
                None => Check::Needed(remove([path])),
                Some(found) => {
                    let found = String::from_utf8(found).or_code(Code::Io, path.display())?;
                    needed_unless(found == *text, Undo::PutBackGate { service: service.clone(), text: found })
                }
            }
        }
        Step::Instances { service, instances } => {
            needed_unless(State::read(service)?.instances == Some(*instances), state_undo(service)?)
        }
        Step::Resize { service, slot, job } => {
            let (service, slot) = (service.clone(), *slot);
            match registered(&service, slot, job, host).await? {
                Some((differs, before)) => {
                    needed_unless(!differs, Undo::ResizeBack { service, slot, job: before })
                }
                None => Check::Needed(Undo::RemoveJob { service, slot }),
            }
        }
        Step::Key { key, value } => {
            // Before an install there is no Consul to ask.
            let found = match consul::zd() {
                Ok(api) => consul::read(&api, key).await.map_or(Value::Null, |(found, _)| found),
                Err(_) => Value::Null,
            };
            let undo = match found {
                Value::Null => Undo::Nothing,
                ref found => Undo::PutBackKey { key: key.clone(), value: found.clone() },
            };
            needed_unless(found == *value, undo)
        }
        Step::Job { service, slot, job, keep } => {
            let (service, slot) = (service.clone(), *slot);
            match registered(&service, slot, job, host).await {
                Ok(Some((_, before))) if *keep && same_content(&before, job) => {
                    let undo = Undo::PutBackJob { service: service.clone(), slot, job: before };
                    needed_unless(!others_run(&service, slot, job, host).await, undo)
                }
                Ok(Some((differs, before))) => {
                    needed_unless(!differs, Undo::PutBackJob { service, slot, job: before })
                }
                Ok(None) => Check::Needed(Undo::RemoveJob { service, slot }),
                // Before an install there is no Nomad to ask. Later its silence is no word that there is no job.
                Err(_) if Installed::read()?.is_none() => Check::Needed(Undo::RemoveJob { service, slot }),
                Err(e) => return Err(e),
            }
        }
        Step::RegistryReady => {
            let ready = async { registry(host).await?.reads_only().await };
            needed_unless(ready.await.unwrap_or(false), Undo::Nothing)
        }
        Step::Push { image } => needed_unless(is_pushed(image, host).await, Undo::Nothing),
        Step::Network { subnet } => match docker(|d| async move { d.network().await }).await {
            Some(Some(found)) if found == *subnet => Check::Satisfied,
            Some(Some(found)) => {
                return Err(Code::Docker
                    .err(format!("Docker has a network named zd with {found}, expected {subnet}"))
                    .cure("docker network rm zd, then run the same command again"));
            }
            _ => Check::Needed(Undo::RemoveNetwork),
        },
        Step::Container(wanted) => {
            let name = wanted.name.clone();
            match docker(|d| async move { d.find(&name).await }).await.flatten() {
                Some(found) if found.is(wanted) => Check::Satisfied,
                Some(_) => Check::Needed(Undo::PutBack { name: wanted.name.clone() }),
                None => Check::Needed(Undo::RemoveContainer { name: wanted.name.clone() }),
            }
        }
        Step::Healthy { service, slot } => {
            let installed = coming(host)?;
            let service = installed.service(Some(service))?;
            let healthy = match Docker::connect().await {
                Ok(docker) => health::is_healthy(&installed, service, *slot, &docker).await.unwrap_or(false),
                Err(_) => false,
            };
            needed_unless(healthy, Undo::Nothing)
        }
        Step::Pointer { service, .. } => {
            let link = pointer::link(service);
            needed_unless(link.is_symlink(), remove([link]))
        }
        Step::Serving { service, .. } => {
            // After the first install another slot may be the active one.
            let active = pointer::read(service).map(|p| p.slot());
            let installed = at_work(host, service)?;
            let serving = match active {
                Ok(slot) => switch::serves(installed.service(Some(service))?, slot).await.is_ok(),
                Err(_) => false,
            };
            needed_unless(serving, Undo::Nothing)
        }
        Step::Retire { containers } => {
            let mut any = false;
            for name in containers.clone() {
                any |= docker(|d| async move { d.find(&name).await }).await.flatten().is_some();
            }
            needed_unless(!any, Undo::FinishRemoving { containers: containers.clone() })
        }
        Step::Drop { services } => {
            let any = services.iter().any(|service| paths::service(service).exists());
            needed_unless(!any, Undo::FinishDropping { services: services.clone() })
        }
        Step::Record { service, slot, version, digest } => {
            let state = State::read(service)?;
            let same = state.slots.get(slot).is_some_and(|f| f.version == *version && f.digest == *digest);
            needed_unless(same, state_undo(service)?)
        }
        Step::Restored(restored) => {
            let (mut same, mut files, mut new) = (true, Vec::new(), Vec::new());
            for entry in &restored.files {
                let path = entry.place();
                match hostfs::read_if_any(&path)? {
                    None => new.push(path),
                    Some(bytes) => {
                        let ids = hostfs::ids(entry.owner.as_deref());
                        same &= Digest::of(&bytes) == entry.digest
                            && ids.is_ok_and(|ids| hostfs::looks_like(&path, entry.mode, ids));
                        files.push(path);
                    }
                }
            }
            let unit = restored.unit.clone();
            needed_unless(same && new.is_empty(), Undo::PutBackFiles { files, new, unit })
        }
        // It has no undo: what was there could not be read.
        Step::Rebuild { product, aside, .. } => {
            let done = aside.is_dir()
                && match product {
                    Product::Nomad => knows(nomad::UNIT, nomad::knows_token).await?,
                    _ => knows(consul::UNIT, consul::knows_tokens).await?,
                };
            needed_unless(done, Undo::Nothing)
        }
        Step::Snapshot { product: Product::Consul } => {
            let undo = Undo::PutBackDaemon {
                unit: consul::UNIT.into(),
                files: Vec::new(),
                was_enabled: true,
                was_active: true,
                data: Some(consul_data()),
            };
            needed_unless(knows(consul::UNIT, consul::knows_tokens).await?, undo)
        }
        Step::Snapshot { .. } => needed_unless(knows(nomad::UNIT, nomad::knows_token).await?, Undo::Nothing),
        Step::RestoredLog => {
            let log = Path::new(paths::AUDIT);
            let (found, saved) = (hostfs::read_if_any(log)?, backup(host)?.file(log).unwrap_or_default());
            let new: Vec<PathBuf> = [log, Path::new(paths::AUDIT_HEAD)].map(Into::into).into();
            match found {
                None => {
                    needed_unless(saved.is_empty(), Undo::PutBackFiles { files: Vec::new(), new, unit: None })
                }
                Some(found) => needed_unless(
                    !saved.starts_with(&found) || found == saved,
                    Undo::PutBackFiles { files: new, new: Vec::new(), unit: None },
                ),
            }
        }
        Step::Switched { service, slot } => {
            let active = pointer::read(service).map(|p| p.slot());
            match active {
                Ok(active) if active == *slot => Check::Satisfied,
                Ok(active) => Check::Needed(Undo::SwitchBack { service: service.clone(), slot: active }),
                Err(e) => return Err(e),
            }
        }
        Step::Firewall { kind, port, open } => {
            let (kind, port) = (*kind, *port);
            let undo =
                if *open { Undo::CloseFirewall { kind, port } } else { Undo::OpenFirewall { kind, port } };
            needed_unless(kind.is_open(port).await? == *open, undo)
        }
    })
}

/// Whether a daemon knows zd's tokens, when it says so: one that has just started does not, nor says that it does not.
async fn knows(unit: &str, ask: impl AsyncFnMut() -> Result<bool>) -> Result<bool> {
    Ok(systemd::is_active(unit).await? && until(TELLS, EVERY, ask).await.unwrap_or(false))
}

/// What Consul wrote before a snapshot is put back.
pub fn consul_data() -> DataCopy {
    let copy = Path::new(paths::BEFORE).join(Product::Consul.as_str());
    DataCopy { folders: vec![paths::CONSUL_DATA.into()], copy }
}

pub fn backup<'a>(host: &Host<'a>) -> Result<&'a Backup> {
    host.backup.ok_or_else(|| Code::Bug.err("a step needs a backup and there is none"))
}

fn remove<const N: usize>(paths: [PathBuf; N]) -> Undo {
    Undo::RemoveFiles { paths: paths.into() }
}

/// They are at work, and were not stopped or started since.
pub async fn untouched(containers: &[Standing]) -> Result<()> {
    let docker = Docker::connect().await?;
    for before in containers {
        let now = docker.find(&before.id).await?;
        if !now.is_some_and(|now| now.running && now.started_at == before.started_at) {
            return Err(Code::Docker
                .err(format!("container {} was stopped or started again, which nobody meant to", before.name))
                .cure("see `zd logs docker` and, with that engine, `zd logs nomad`"));
        }
    }
    Ok(())
}

/// Whether a slot's containers run another image than its job, which a restored Nomad knows from its snapshot. It does
/// not know them, and would not get their addresses.
async fn others_run(service: &Name, slot: Slot, job: &Value, host: &Host<'_>) -> bool {
    let found = docker(|d| async move { d.of_slot(service, slot).await }).await.unwrap_or_default();
    host.backup.is_some() && found.iter().any(|c| job["Meta"]["zd_digest"] != *c.digest)
}

/// The slot's job as Nomad has it, and whether `wanted` would change it; None where there is none.
async fn registered(
    service: &Name,
    slot: Slot,
    wanted: &Value,
    host: &Host<'_>,
) -> Result<Option<(bool, Value)>> {
    let Some(before) = jobs::job(&nomad::connect()?, &paths::job(service, slot)).await? else {
        return Ok(None);
    };
    let wanted = named_as(wanted, &before, &coming(host)?.host);
    let same = match jobs::record(service, slot)? {
        // Also where what was submitted had a field that is no longer wanted.
        Some(record) => jobs::covers(&before, &record) && jobs::is_record_of(&record, &wanted),
        None => jobs::covers(&before, &wanted),
    };
    Ok(Some((!same, before)))
}

/// Settings as they will be: what the plan leads to where that is known, else what is installed, or what the running
/// install has written so far.
pub fn coming(host: &Host<'_>) -> Result<Installed> {
    if let Some(coming) = host.coming {
        return Ok(coming.clone());
    }
    if let Some(backup) = host.backup {
        return Ok(backup.installed());
    }
    match (Installed::read()?, host.bundle) {
        (Some(installed), _) => Ok(installed),
        (None, Some(bundle)) => {
            let host = HostConfig::read()?.unwrap_or(HostConfig {
                schema: 1,
                ip: std::net::Ipv4Addr::LOCALHOST,
                node: None,
                subnet: "0.0".into(),
                registry_port: 0,
                former_registries: Vec::new(),
                generation: 0,
                bundle: bundle.id.clone(),
            });
            Installed::new(host, bundle.lock.clone())
        }
        (None, None) => Installed::require(),
    }
}

/// As [`coming`], but for what serves already: that is asked as it was installed.
pub fn at_work(host: &Host<'_>, service: &Name) -> Result<Installed> {
    let installed = if host.coming.is_some() { Installed::read()? } else { None };
    match installed.filter(|installed| installed.lock.service(service).is_some()) {
        Some(installed) => Ok(installed),
        None => coming(host),
    }
}

async fn registry(host: &Host<'_>) -> Result<Registry> {
    Registry::connect(&coming(host)?.host).await
}

async fn is_pushed(image: &str, host: &Host<'_>) -> bool {
    let (Some(wanted), Ok(registry)) = (host.image(image), registry(host).await) else { return false };
    let found = registry.digest_of(&wanted.reference.name, tag(image)).await;
    found.ok().flatten().as_ref() == Some(&wanted.manifest)
}

/// What an image goes by in its repository: `name:version` or `name@digest`.
pub fn tag(image: &str) -> &str {
    image.split_once(['@', ':']).map_or(image, |(_, tag)| tag)
}

/// Asks Docker; no answer is no finding (before an install there is no Docker to ask).
async fn docker<T, F: Future<Output = Result<T>>>(ask: impl FnOnce(Docker) -> F) -> Option<T> {
    ask(Docker::connect().await.ok()?).await.ok()
}

fn dir(path: &Path, mode: u32, owner: Option<&str>, keep: crate::plan::Keep) -> Result<Check> {
    let Ok(meta) = fs::metadata(path) else {
        return Ok(Check::Needed(Undo::RemoveDir { path: path.into(), keep }));
    };
    if !meta.is_dir() {
        return Err(Code::Preflight
            .err(format!("{} is there and is no folder", path.display()))
            .cure("move it away, then run the same command again"));
    }
    let wanted = hostfs::ids(owner).ok();
    if keep == crate::plan::Keep::Shared || wanted.is_some_and(|ids| hostfs::looks_like(path, mode, ids)) {
        return Ok(Check::Satisfied);
    }
    Ok(Check::Needed(Undo::RestoreMode {
        path: path.into(),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
    }))
}

fn file(Text { path, text, mode, owner }: &Text) -> Result<Check> {
    let Some(found) = hostfs::read_if_any(path)? else { return Ok(Check::Needed(remove([path.into()]))) };
    let ids = hostfs::ids(owner.as_deref());
    if found == text.as_bytes() && ids.is_ok_and(|ids| hostfs::looks_like(path, *mode, ids)) {
        return Ok(Check::Satisfied);
    }
    restore(path, &found).map(Check::Needed)
}

fn restore(path: &Path, found: &[u8]) -> Result<Undo> {
    let meta = fs::metadata(path).at(path)?;
    Ok(Undo::RestoreFile {
        path: path.into(),
        bytes: BASE64.encode(found),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
    })
}

fn state_undo(service: &Name) -> Result<Undo> {
    let path = state::path(service);
    Ok(match hostfs::read_if_any(&path)? {
        Some(text) => Undo::RestoreState {
            service: service.clone(),
            text: String::from_utf8(text).map_err(|e| Code::Io.err(format!("{}: {e}", path.display())))?,
        },
        None => remove([path]),
    })
}

async fn packages_step(repository: &Path, wanted: &[String]) -> Result<Check> {
    if packages::missing(wanted).await?.is_empty() {
        return Ok(Check::Satisfied);
    }
    if !repository.join("Packages").exists() {
        // A dry run: the packages are still in the bundle.
        return Ok(Check::Needed(Undo::Nothing));
    }
    let change = packages::simulate(repository, wanted).await?;
    Ok(Check::Needed(Undo::Purge { packages: change.new, leftovers: packages::Leftovers::look()? }))
}

/// The running zd, by its bytes.
fn tool() -> Result<Check> {
    let (own, path) = (std::env::current_exe().at("the running zd")?, Path::new(paths::TOOL));
    if !path.exists() {
        return Ok(Check::Needed(remove([path.into()])));
    }
    let found = hash_file(path)?.0;
    if own == path.canonicalize().at(path)? || hash_file(&own)?.0 == found {
        return Ok(Check::Satisfied);
    }
    Ok(Check::Needed(Undo::RestoreLink { path: path.into(), target: tool_program(&found) }))
}

/// Where a zd of these bytes is kept.
pub fn tool_program(digest: &Digest) -> PathBuf {
    Path::new(paths::PROGRAMS).join(paths::program("zd", digest))
}
