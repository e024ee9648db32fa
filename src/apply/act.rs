//! Carrying out one step. Every action may find half of itself done by a run that was killed.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use serde_json::Value;

use super::check::{coming, registry};
use crate::audit;
use crate::bundle::Bundle;
use crate::error::{At, Code, Result};
use crate::host::config::Installed;
use crate::host::docker::{Docker, Found};
use crate::host::registry::Registry;
use crate::host::{Host, consul, exec, fs as hostfs, nginx, nomad, packages, paths, systemd, until};
use crate::ids::{Digest, Name, Slot};
use crate::plan::Step;
use crate::service::pointer::{self, Pointer};
use crate::service::state::{Filled, State};
use crate::service::{health, reload, switch};

/// Name of a file whose bytes are not checked yet.
const UNFINISHED: &str = ".zd-unfinished";
/// How long a job's containers may take to stop.
const STOPPED: Duration = Duration::from_secs(30);
/// How long the registry, consul-template and nginx may take to answer after their units have started.
const READY: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(50);

pub async fn act(step: &Step, host: &Host<'_>) -> Result<()> {
    match step {
        Step::Dir { path, mode, owner, .. } => {
            let was_there = path.is_dir();
            hostfs::make_dir(path, *mode, owner.as_deref())?;
            match owner {
                // Data that an uninstall left belongs to the number its user had then.
                Some(owner) if was_there => {
                    let (owner, path) = (format!("{owner}:{owner}"), path.to_string_lossy());
                    exec::run(&["chown", "-R", "--no-dereference", &owner, "--", path.as_ref()])
                        .await
                        .map(drop)
                }
                _ => Ok(()),
            }
        }
        Step::File { path, text, mode, owner } => {
            hostfs::write(path, text.as_bytes(), *mode, owner.as_deref())
        }
        Step::Files { path, files, mode } => {
            let bar = host.ui.count("files", files.len() as u64);
            let dir = Dir::open_ambient_dir(path, cap_std::ambient_authority()).at(path)?;
            for (name, digest) in files {
                extract(bundle(host)?, digest, &dir, path, name, *mode)?;
                bar.inc(1);
            }
            hostfs::sync_dir(path)?;
            bar.finish_and_clear();
            Ok(())
        }
        Step::Tool { path } => copy_tool(path),
        Step::Link { path, target } => hostfs::set_link(path, target),
        Step::Secret(secret) => secret.make(),
        Step::TrustCa { path } => hostfs::write(path, &std::fs::read(paths::CA).at(paths::CA)?, 0o644, None),
        Step::User { name, home } => {
            let home = home.to_string_lossy();
            let shell = "/usr/sbin/nologin";
            exec::run(&[
                "useradd",
                "--system",
                "--user-group",
                "--no-create-home",
                "--home-dir",
                home.as_ref(),
                "--shell",
                shell,
                name,
            ])
            .await
            .map(drop)
        }
        Step::Mask { unit, .. } => systemd::mask(unit).await,
        Step::Packages { repository, wanted } => packages::install(repository, wanted).await,
        Step::Unit { name } => {
            systemd::daemon_reload().await?;
            systemd::enable(name).await?;
            systemd::start(name).await
        }
        Step::Enabled { name } => {
            systemd::daemon_reload().await?;
            systemd::enable(name).await
        }
        Step::Consul { node } => consul::set_up(node).await,
        Step::Nomad => nomad::set_up().await,
        Step::Pools { service } => {
            let path = paths::pools(service);
            rendered(&path).await?;
            hostfs::write(&paths::nginx_pools(service), &std::fs::read(&path).at(&path)?, 0o644, None)
        }
        Step::LoadPools { service } => load_pools(&coming(host)?, service).await,
        Step::Gate { service, text } => load_gate(service, text).await,
        Step::Instances { service, instances } => {
            let mut state = State::read(service)?;
            state.instances = Some(*instances);
            state.write(service)
        }
        Step::Resize { service, slot, job } => resize_job(service, *slot, job).await,
        Step::Key { key, value } => consul::set(&consul::zd()?, key, value).await,
        Step::Job { service, slot, job } => place_job(service, *slot, job).await,
        Step::RegistryReady => Registry::ready(&coming(host)?.host, READY).await,
        Step::Push { image } => push(host, image).await,
        Step::Network { subnet } => Docker::connect().await?.create_network(subnet).await,
        Step::Container(container) => Docker::connect().await?.place(container, &coming(host)?.host).await,
        Step::Healthy { service, slot } => {
            let installed = coming(host)?;
            let service = installed.service(Some(service))?;
            health::wait(&installed, service, *slot, &Docker::connect().await?).await
        }
        Step::Pointer { service, slot } => pointer::set(service, Pointer::Active(*slot)),
        Step::Serving { service, .. } => {
            let installed = coming(host)?;
            let slot = pointer::read(service)?.slot();
            serving(installed.service(Some(service))?, slot).await
        }
        Step::Retire { containers } => {
            let docker = Docker::connect().await?;
            for name in containers {
                docker.remove(name).await?;
            }
            Ok(())
        }
        Step::Record { service, slot, version, digest } => {
            let mut state = State::read(service)?;
            let filled = Filled {
                version: version.clone(),
                digest: digest.clone(),
                since: jiff::Timestamp::now(),
                by: audit::actor(),
            };
            state.slots.insert(*slot, filled);
            state.write(service)
        }
        Step::Firewall { kind, port } => kind.open(*port).await,
    }
}

fn bundle<'a>(host: &Host<'a>) -> Result<&'a Bundle> {
    host.bundle.ok_or_else(|| Code::Bug.err("a step needs a bundle and there is none"))
}

/// A blob becomes a file only after its bytes were found to be the named ones. The name comes from the
/// bundle: it is looked up beneath the folder's handle and can lead nowhere else.
fn extract(
    bundle: &Bundle,
    digest: &Digest,
    dir: &Dir,
    dir_path: &Path,
    name: &str,
    mode: u32,
) -> Result<()> {
    // What a killed run left.
    let _ = dir.remove_file(UNFINISHED);
    let mut options = OpenOptions::new();
    let options = options.write(true).create_new(true).mode(mode);
    let path = dir_path.join(name);
    let mut file = dir.open_with(UNFINISHED, options).at(&path)?;
    let (found, _) = Digest::of_reader(bundle.blob(digest)?, |piece| file.write_all(piece)).at(&path)?;
    if found != *digest {
        return Err(Code::Bundle
            .err(format!("blob {digest} changed since the bundle was verified"))
            .cure("the stick is failing or was exchanged: copy the bundle again"));
    }
    file.sync_all().at(&path)?;
    dir.rename(UNFINISHED, dir, name).at(&path)
}

fn copy_tool(path: &Path) -> Result<()> {
    let own = std::env::current_exe().at("the running zd")?;
    let mut temp = hostfs::temp_beside(path)?;
    std::io::copy(&mut File::open(&own).at(&own)?, &mut temp).at(path)?;
    hostfs::keep(temp, path, 0o755, (0, 0))
}

/// Registers a slot's job when the one before has made room.
pub async fn place_job(service: &Name, slot: Slot, job: &Value) -> Result<()> {
    clear_job(service, slot).await?;
    nomad::register(&nomad::connect()?, job).await
}

/// Registers a job over itself and waits until the containers that are too many are gone.
pub async fn resize_job(service: &Name, slot: Slot, job: &Value) -> Result<()> {
    nomad::register(&nomad::connect()?, job).await?;
    let groups = job["TaskGroups"].as_array().map_or(0, Vec::len);
    gone(service, slot, |container| usize::from(container.instance) > groups).await
}

/// Stops a slot's job and waits until its containers, and so their addresses, are free.
pub async fn clear_job(service: &Name, slot: Slot) -> Result<()> {
    nomad::purge(&nomad::connect()?, &paths::job(service, slot)).await?;
    gone(service, slot, |_| true).await
}

/// Waits until Nomad has stopped such containers of a slot; those it does not get rid of are removed.
async fn gone(service: &Name, slot: Slot, such: impl Fn(&Found) -> bool) -> Result<()> {
    let docker = Docker::connect().await?;
    let start = Instant::now();
    loop {
        let left: Vec<Found> = docker.of_slot(service, slot).await?.into_iter().filter(&such).collect();
        if left.is_empty() {
            return Ok(());
        }
        if start.elapsed() > STOPPED {
            for container in left {
                docker.remove(&container.name).await?;
            }
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn rendered(path: &Path) -> Result<()> {
    let missing = || {
        Code::Stack
            .err(format!("consul-template has not written {} after {READY:?}", path.display()))
            .cure("see `journalctl -u consul-template`, then run the same command again")
    };
    until(READY, EVERY, async || path.exists().then_some(()).ok_or_else(missing)).await
}

/// The gate configuration, checked by nginx, loaded; what nginx refuses is taken back.
pub async fn load_gate(service: &Name, text: &str) -> Result<()> {
    reload::with(service, &paths::nginx_conf(service), text.as_bytes()).await
}

async fn load_pools(installed: &Installed, service: &Name) -> Result<()> {
    let service = installed.service(Some(service))?;
    let (rendered, wanted) = (paths::pools(&service.name), nginx::servers_of(installed, service));
    let behind = || {
        Code::Stack
            .err(format!("consul-template has not written the new pools of {} after {READY:?}", service.name))
            .cure("see `zd logs consul-template`, then run the same command again")
    };
    let written = async || if nginx::servers(&rendered)? == wanted { Ok(()) } else { Err(behind()) };
    until(READY, EVERY, written).await?;
    let text = std::fs::read(&rendered).at(&rendered)?;
    reload::with(&service.name, &paths::nginx_pools(&service.name), &text).await
}

async fn push(host: &Host<'_>, reference: &str) -> Result<()> {
    let bundle = bundle(host)?;
    let image = bundle.lock.images.iter().find(|i| i.reference.to_string() == reference);
    let image = image.ok_or_else(|| Code::Bug.err(format!("image {reference} is not in the lock")))?;
    let total = image.layers.iter().chain([&image.config]).map(|d| bundle.lock.size_of(d)).sum();
    let bar = host.ui.bytes(format!("push {reference}"), total);
    let result = registry().await?.push(bundle, image, &bar).await;
    bar.finish_and_clear();
    result
}

async fn serving(service: &crate::bundle::manifest::Service, slot: Slot) -> Result<()> {
    let wrong = |why| {
        Code::Nginx
            .err(format!("port {} of this host gives {why}, expected 200 from {slot}", service.listen))
            .cure(format!("see `systemctl status {}`", paths::nginx_unit(&service.name)))
    };
    until(READY, EVERY, async || switch::serves(service, slot).await.map_err(wrong)).await
}
