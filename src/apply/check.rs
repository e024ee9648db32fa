//! What is there now, for each step: satisfied, or what would put it back. Changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use super::Check;
use crate::bundle::sources::cache::hash_file;
use crate::error::{At, Code, Result};
use crate::host::config::{HostConfig, Installed};
use crate::host::docker::Docker;
use crate::host::registry::Registry;
use crate::host::secrets::Token;
use crate::host::{Host, consul, fs as hostfs, nginx, nomad, packages, paths, systemd};
use crate::ids::{Digest, Name};
use crate::plan::{Step, Undo};
use crate::service::state::{self, State};
use crate::service::{health, pointer, switch};

pub async fn check(step: &Step, host: &Host<'_>) -> Result<Check> {
    let needed_unless =
        |satisfied: bool, undo: Undo| if satisfied { Check::Satisfied } else { Check::Needed(undo) };
    Ok(match step {
        Step::Dir { path, mode, owner, keep } => dir(path, *mode, owner.as_deref(), *keep)?,
        Step::File { path, text, mode, owner } => file(path, text.as_bytes(), *mode, owner.as_deref())?,
        Step::Files { path, files, .. } => {
            let mut all = true;
            for (name, digest) in files {
                let file = path.join(name);
                all = all && file.exists() && hash_file(&file)?.0 == *digest;
            }
            let paths = files.iter().map(|(name, _)| path.join(name)).collect();
            needed_unless(all, Undo::RemoveFiles { paths })
        }
        Step::Tool { path } => needed_unless(is_this_tool(path)?, remove([path.clone()])),
        Step::Link { path, target } => match fs::read_link(path) {
            Ok(found) if found == *target => Check::Satisfied,
            Ok(found) => Check::Needed(Undo::RestoreLink { path: path.clone(), target: found }),
            Err(_) if path.exists() => {
                return Err(Code::Preflight
                    .err(format!("{} is there and is no link of zd's", path.display()))
                    .cure("move it away, then run the same command again"));
            }
            Err(_) => Check::Needed(remove([path.clone()])),
        },
        Step::Secret(secret) => {
            let files = secret.files();
            needed_unless(files[0].exists(), Undo::RemoveFiles { paths: files })
        }
        Step::TrustCa { path } => {
            let same = match (hostfs::read_if_any(path)?, hostfs::read_if_any(Path::new(paths::CA))?) {
                (Some(here), Some(ca)) => here == ca,
                _ => false,
            };
            needed_unless(same, remove([path.clone()]))
        }
        Step::User { name, .. } => {
            needed_unless(hostfs::ids(Some(name)).is_ok(), Undo::RemoveUser { name: name.clone() })
        }
        Step::Mask { unit, package } => {
            // A package that is here already runs for somebody: not ours to stop.
            let settled = systemd::is_masked(unit).await? || packages::is_installed(package).await?;
            needed_unless(settled, Undo::Unmask { unit: unit.clone() })
        }
        Step::Packages { repository, wanted } => packages_step(repository, wanted).await?,
        Step::Unit { name } => {
            let (was_enabled, was_active) =
                (systemd::is_enabled(name).await?, systemd::is_active(name).await?);
            needed_unless(
                was_enabled && was_active,
                Undo::StopUnit { name: name.clone(), was_enabled, was_active },
            )
        }
        Step::Enabled { name } => {
            let (was_enabled, was_active) = (systemd::is_enabled(name).await?, true);
            let undo = Undo::StopUnit { name: name.clone(), was_enabled, was_active };
            needed_unless(was_enabled, undo)
        }
        Step::Consul { .. } => needed_unless(consul::is_ready().await?, Undo::Nothing),
        // The first token goes with it: a Nomad without data makes another.
        Step::Nomad => needed_unless(nomad::version().await.is_ok(), remove([Token::NomadManagement.path()])),
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
            let found = fs::read_to_string(&path).at(&path)?;
            needed_unless(found == *text, Undo::PutBackGate { service: service.clone(), text: found })
        }
        Step::Instances { service, instances } => {
            needed_unless(State::read(service)?.instances == Some(*instances), state_undo(service)?)
        }
        Step::Resize { service, slot, job } => {
            let (service, slot) = (service.clone(), *slot);
            match registered(&paths::job(&service, slot), job).await? {
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
        Step::Job { service, slot, job } => {
            let (service, slot) = (service.clone(), *slot);
            match registered(&paths::job(&service, slot), job).await {
                Ok(Some((differs, before))) => {
                    needed_unless(!differs, Undo::PutBackJob { service, slot, job: before })
                }
                Ok(None) => Check::Needed(Undo::RemoveJob { service, slot }),
                // Before an install there is no Nomad to ask. Later its silence is no word that there is no job.
                Err(_) if Installed::read()?.is_none() => Check::Needed(Undo::RemoveJob { service, slot }),
                Err(e) => return Err(e),
            }
        }
        Step::RegistryReady => needed_unless(registry().await.is_ok(), Undo::Nothing),
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
            let installed = coming(host)?;
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
        Step::Record { service, slot, version, digest } => {
            let state = State::read(service)?;
            let same = state.slots.get(slot).is_some_and(|f| f.version == *version && f.digest == *digest);
            needed_unless(same, state_undo(service)?)
        }
        Step::Firewall { kind, port } => {
            needed_unless(kind.is_open(*port).await?, Undo::CloseFirewall { kind: *kind, port: *port })
        }
    })
}

fn remove<const N: usize>(paths: [PathBuf; N]) -> Undo {
    Undo::RemoveFiles { paths: paths.into() }
}

/// The job as Nomad has it, and whether `wanted` would change it; None where there is none.
async fn registered(id: &str, wanted: &Value) -> Result<Option<(bool, Value)>> {
    let api = nomad::connect()?;
    let Some(before) = nomad::job(&api, id).await? else { return Ok(None) };
    Ok(Some((nomad::differs(&api, id, wanted).await?, before)))
}

/// Settings as they will be: what is installed, or what the running install has written so far.
pub fn coming(host: &Host<'_>) -> Result<Installed> {
    match (Installed::read()?, host.bundle) {
        (Some(installed), _) => Ok(installed),
        (None, Some(bundle)) => {
            let host = HostConfig::read()?.unwrap_or(HostConfig {
                schema: 1,
                ip: std::net::Ipv4Addr::LOCALHOST,
                subnet: "0.0".into(),
                registry_port: 0,
                generation: 0,
                bundle: bundle.id.clone(),
            });
            Installed::new(host, bundle.lock.clone())
        }
        (None, None) => Installed::require(),
    }
}

pub async fn registry() -> Result<Registry> {
    let config =
        HostConfig::read()?.ok_or_else(|| Code::NotInstalled.err("this host has no settings yet"))?;
    Registry::connect(&config).await
}

async fn is_pushed(image: &str, host: &Host<'_>) -> bool {
    let wanted = host.bundle.and_then(|b| b.lock.images.iter().find(|i| i.reference.to_string() == image));
    let (Some(wanted), Ok(registry)) = (wanted, registry().await) else { return false };
    registry.digest(&wanted.reference).await.ok().flatten().as_ref() == Some(&wanted.manifest)
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

fn file(path: &Path, bytes: &[u8], mode: u32, owner: Option<&str>) -> Result<Check> {
    let Some(found) = hostfs::read_if_any(path)? else { return Ok(Check::Needed(remove([path.into()]))) };
    if found == bytes && hostfs::ids(owner).is_ok_and(|ids| hostfs::looks_like(path, mode, ids)) {
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

fn is_this_tool(path: &Path) -> Result<bool> {
    let own = std::env::current_exe().at("the running zd")?;
    let digest = |p: &Path| -> Result<Digest> { Ok(hash_file(p)?.0) };
    Ok(path.exists() && (own == path || digest(&own)? == digest(path)?))
}
