//! Carrying out one step. Every action may find half of itself done by a run that was killed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use serde_json::Value;

use super::check::{at_work, backup, coming, tag, tool_program, untouched};
use super::daemon::{as_node_of, copy_data, pass_stones, rebuild, run_with};
use crate::audit;
use crate::backup::Backup;
use crate::backup::index::{CONSUL_SNAPSHOT, Entry, NOMAD_SNAPSHOT};
use crate::bundle::Bundle;
use crate::bundle::manifest::{Engine, Product, Service};
use crate::bundle::sources::cache::hash_file;
use crate::error::{At, Code, Result};
use crate::host::config::Installed;
use crate::host::docker::{Docker, Found};
use crate::host::fs::UNFINISHED;
use crate::host::registry::Registry;
use crate::host::{
    Host, consul, exec, fs as hostfs, generation, jobs, nginx, nomad, packages, paths, systemd, until,
};
use crate::ids::{Digest, Name, Slot};
use crate::plan::slot::{images, named_as};
use crate::plan::{Keep, Process, Restored, Step, Text};
use crate::service::pointer::{self, Pointer};
use crate::service::state::{Filled, State};
use crate::service::{health, reload, renew, switch};

/// How long a job's containers may take to stop.
const STOPPED: Duration = Duration::from_secs(30);
/// And for how long it clears away what has ended.
const CLEARED: Duration = Duration::from_secs(5);
/// How long consul-template and nginx may take to answer after their units have started.
const READY: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(50);

pub async fn act(step: &Step, host: &Host<'_>) -> Result<()> {
    match step {
        Step::Dir { path, mode, owner, keep } => {
            let was_there = path.is_dir();
            hostfs::make_dir(path, *mode, owner.as_deref())?;
            // Data that an uninstall left belongs to the number its user had then.
            match owner {
                Some(owner) if was_there && *keep == Keep::Data => {
                    hostfs::own_tree(path, hostfs::ids(Some(owner))?)
                }
                _ => Ok(()),
            }
        }
        Step::File(text) => {
            // A new unit is read when it is enabled; a changed one, or one with a new drop-in, is not.
            let of_units = text.path.strip_prefix(paths::UNITS);
            let known_unit = of_units.is_ok_and(|unit| text.path.exists() || unit.components().count() > 1);
            write(text)?;
            if known_unit { systemd::daemon_reload().await } else { Ok(()) }
        }
        Step::Files { path, files, mode } => {
            let bar = host.ui.count("files", files.len() as u64);
            let dir = Dir::open_ambient_dir(path, cap_std::ambient_authority()).at(path)?;
            for (name, digest) in files {
                let kept = if host.bundle.is_none() { generation::program(digest)? } else { None };
                match kept {
                    Some(kept) => extract(File::open(&kept).at(&kept)?, digest, &dir, path, name, *mode)?,
                    None => extract(bundle(host)?.blob(digest)?, digest, &dir, path, name, *mode)?,
                }
                bar.inc(1);
            }
            hostfs::sync_dir(path)?;
            bar.finish_and_clear();
            Ok(())
        }
        Step::Tool => put_tool(),
        Step::Link { path, target } => hostfs::set_link(path, target),
        Step::Secret(secret) => secret.make(),
        Step::TrustCa { path } => trust_ca(path),
        Step::UntrustCa { path } => {
            hostfs::remove_file(path)?;
            // What the site has put beside it stays.
            path.parent().map_or(Ok(()), hostfs::remove_empty)
        }
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
        Step::Upgrade { repository, packages, .. } => packages::upgrade(repository, packages).await,
        Step::Renew(process @ Process::Nginx { service }) => {
            renew::renew(process, &at_work(host, service)?).await
        }
        Step::Renew(process) => renew::renew(process, &coming(host)?).await,
        Step::Untouched { containers } => untouched(containers).await,
        Step::Packages { repository, wanted } => packages::install(repository, wanted).await,
        Step::Unit { name } => {
            systemd::enable(name).await?;
            systemd::start(name).await
        }
        Step::Daemon { unit, files, via, data } => {
            if let Some(data) = data {
                copy_data(unit, data).await?;
            }
            pass_stones(unit, files, via, host).await?;
            run_with(unit, files).await
        }
        Step::Enabled { name } => systemd::enable(name).await,
        Step::Consul { node } => consul::set_up(node).await,
        Step::Nomad => nomad::set_up().await,
        Step::Pools { service } => {
            let path = paths::pools(service);
            rendered(&path).await?;
            hostfs::write(&paths::nginx_pools(service), &hostfs::read(&path)?, 0o644, None)
        }
        Step::LoadPools { service } => load_pools(&coming(host)?, service).await,
        Step::Gate { service, text } => load_gate(service, text).await,
        Step::Instances { service, instances } => {
            let mut state = State::read(service)?;
            state.instances = Some(*instances);
            state.write(service)
        }
        Step::Resize { service, slot, job } => {
            let before = jobs::job(&nomad::connect()?, &paths::job(service, *slot)).await?;
            resize_job(service, *slot, &named_as(job, &before.unwrap_or_default(), &coming(host)?.host)).await
        }
        Step::Key { key, value } => consul::set(&consul::zd()?, key, value).await,
        Step::Job { service, slot, job, .. } => {
            pull(images(job), &coming(host)?).await?;
            place_job(service, *slot, job).await
        }
        Step::RegistryReady => Registry::ready(&coming(host)?.host).await,
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
            let installed = at_work(host, service)?;
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
        Step::Drop { services } => drop_services(services).await,
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
        Step::Firewall { kind, port, open: true } => kind.open(*port).await,
        Step::Firewall { kind, port, .. } => kind.close(*port).await,
        Step::Restored(restored) => restore(host, restored).await,
        Step::Rebuild { product, stores, aside } => rebuild(*product, stores, aside, &coming(host)?).await,
        Step::Snapshot { product: Product::Consul } => {
            as_node_of(backup(host)?).await?;
            consul::restore(snapshot(host, CONSUL_SNAPSHOT)?).await
        }
        Step::Snapshot { .. } => {
            let installed = coming(host)?;
            pull(saved_images(backup(host)?, &installed), &installed).await?;
            nomad::restore(snapshot(host, NOMAD_SNAPSHOT)?).await?;
            saved_jobs(backup(host)?, &installed)
        }
        Step::RestoredLog => {
            for path in [paths::AUDIT, paths::AUDIT_HEAD].map(Path::new) {
                put_aside(path).await?;
                let bytes = backup(host)?.file(path).unwrap_or_default();
                hostfs::write(path, bytes, 0o644, None)?;
            }
            Ok(())
        }
        Step::Switched { service, slot } => switch_to(service, *slot, host).await,
    }
}

/// Images that Nomad is about to start. It would pull them itself, and the time that takes would be taken from that in
/// which a slot must become healthy.
async fn pull(images: impl IntoIterator<Item = String>, installed: &Installed) -> Result<()> {
    let docker = Docker::connect().await?;
    for image in images {
        docker.ensure_image(&image, &installed.host).await?;
    }
    Ok(())
}

/// What the slots of a backup hold.
fn saved_images(backup: &Backup, installed: &Installed) -> BTreeSet<String> {
    let services = installed.lock.services.iter();
    let saved = services.filter_map(|service| Some((service, backup.index.service(&service.name)?)));
    let image = |service: &Service, held: &Filled| installed.host.image(&service.image, &held.digest);
    saved
        .flat_map(|(service, saved)| saved.state.slots.values().map(move |held| image(service, held)))
        .collect()
}

/// Nomad has the jobs of then again: it is those that somebody may change by hand.
fn saved_jobs(backup: &Backup, installed: &Installed) -> Result<()> {
    for service in &installed.lock.services {
        for path in Slot::BOTH.map(|slot| paths::placed_job(&service.name, slot)) {
            if let Some(bytes) = backup.file(&path).filter(|_| paths::service(&service.name).is_dir()) {
                hostfs::write(&path, bytes, 0o600, None)?;
            }
        }
    }
    Ok(())
}

fn snapshot<'a>(host: &Host<'a>, name: &str) -> Result<&'a [u8]> {
    let missing = || Code::Bundle.err(format!("the backup has no {name}")).cure("take another backup");
    backup(host)?.member(name).ok_or_else(missing)
}

async fn restore(host: &Host<'_>, restored: &Restored) -> Result<()> {
    for entry in &restored.files {
        put_aside(&entry.place()).await?;
        put(backup(host)?, entry)?;
    }
    match &restored.unit {
        Some(unit) if systemd::is_active(unit).await? => systemd::restart(unit).await,
        _ => Ok(()),
    }
}

pub fn put(backup: &Backup, entry: &Entry) -> Result<()> {
    let missing = || Code::Bug.err(format!("{} is not in the backup", entry.path));
    let bytes = backup.member(&entry.path).ok_or_else(missing)?;
    hostfs::write_beneath(&entry.place(), bytes, entry.mode, entry.owner.as_deref())
}

/// Keeps a copy of a file as it was. Once: a copy that is there is of before.
async fn put_aside(path: &Path) -> Result<()> {
    let copy = aside(path);
    if !path.exists() || copy.exists() {
        return Ok(());
    }
    for dir in [paths::VAR, paths::BEFORE] {
        if !Path::new(dir).is_dir() {
            hostfs::make_dir(Path::new(dir), 0o700, None)?;
        }
    }
    hostfs::copy_tree(path, &copy).await
}

/// Where the copy of a file is.
pub fn aside(path: &Path) -> PathBuf {
    Path::new(paths::BEFORE).join(name_aside(path))
}

/// What a copy of a path is called.
pub fn name_aside(path: &Path) -> String {
    path.to_string_lossy().replace('/', "+")
}

pub async fn switch_to(service: &Name, slot: Slot, host: &Host<'_>) -> Result<()> {
    let installed = Installed::require()?;
    let service = installed.service(Some(service))?;
    let request = switch::Request { verb: host.verb, reason: "", cut: false };
    switch::run(&installed, service, slot, &request).await.map(drop)
}

fn bundle<'a>(host: &Host<'a>) -> Result<&'a Bundle> {
    host.bundle.ok_or_else(|| Code::Bug.err("a step needs a bundle and there is none"))
}

/// A blob becomes a file only after its bytes were found to be the named ones. The name comes from the
/// bundle: it is looked up beneath the folder's handle and can lead nowhere else.
fn extract(
    from: impl Read,
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
    let (found, _) = Digest::of_reader(from, |piece| file.write_all(piece)).at(&path)?;
    if found != *digest {
        return Err(Code::Bundle
            .err(format!("blob {digest} changed since the bundle was verified"))
            .cure("the stick is failing or was exchanged: copy the bundle again"));
    }
    file.sync_all().at(&path)?;
    dir.rename(UNFINISHED, dir, name).at(&path)
}

pub fn write(Text { path, text, mode, owner }: &Text) -> Result<()> {
    hostfs::write(path, text.as_bytes(), *mode, owner.as_deref())
}

pub fn trust_ca(path: &Path) -> Result<()> {
    hostfs::write(path, &std::fs::read(paths::CA).at(paths::CA)?, 0o644, None)
}

/// Keeps this zd, and the one before, by their bytes, and makes this one the one that is called.
fn put_tool() -> Result<()> {
    let own = std::env::current_exe().at("the running zd")?;
    let path = Path::new(paths::TOOL);
    if path.exists() {
        keep_tool(path)?;
    }
    hostfs::set_link(path, &keep_tool(&own)?)
}

fn keep_tool(path: &Path) -> Result<PathBuf> {
    let kept = tool_program(&hash_file(path)?.0);
    if !kept.exists() {
        let mut temp = hostfs::temp_beside(&kept)?;
        std::io::copy(&mut File::open(path).at(path)?, &mut temp).at(&kept)?;
        hostfs::keep(temp, &kept, 0o755, (0, 0))?;
    }
    Ok(kept)
}

/// Registers a slot's job when the one before has made room.
pub async fn place_job(service: &Name, slot: Slot, job: &Value) -> Result<()> {
    clear_job(service, slot).await?;
    register(service, slot, job).await
}

/// Registers a job and keeps its record: a job that no longer covers it was changed by somebody else.
async fn register(service: &Name, slot: Slot, job: &Value) -> Result<()> {
    let record = jobs::register(&nomad::connect()?, &paths::job(service, slot), job).await?;
    hostfs::write(&paths::placed_job(service, slot), format!("{record:#}\n").as_bytes(), 0o600, None)
}

/// Registers a job over itself and waits until the containers that are too many are gone.
pub async fn resize_job(service: &Name, slot: Slot, job: &Value) -> Result<()> {
    register(service, slot, job).await?;
    let groups = job["TaskGroups"].as_array().map_or(0, Vec::len);
    gone(service, slot, |container| usize::from(container.instance) > groups).await
}

/// Stops a slot's job and waits until its containers, and so their addresses, are free.
pub async fn clear_job(service: &Name, slot: Slot) -> Result<()> {
    jobs::purge(&nomad::connect()?, &paths::job(service, slot)).await?;
    gone(service, slot, |_| true).await
}

/// With Nomad gone its containers are still there: they are removed as well.
pub async fn remove_job(service: &Name, slot: Slot) -> Result<()> {
    if nomad::version().await.is_ok() {
        clear_job(service, slot).await?;
        return jobs::collect_garbage(&nomad::connect()?).await;
    }
    let Ok(docker) = Docker::connect().await else { return Ok(()) };
    docker.clear_slot(service, slot).await
}

/// Content with what is gone already, not with silence: after a boot whoever knows of it may come later. The folder goes
/// last: by it the service is known.
pub async fn drop_services(services: &[Name]) -> Result<()> {
    until(READY, EVERY, async || Docker::connect().await.map(drop)).await?;
    let stack = Installed::require()?.lock.engine == Engine::Nomad;
    if stack {
        until(READY, EVERY, async || nomad::version().await.map(drop)).await?;
        until(READY, EVERY, async || consul::version().await.map(drop)).await?;
    }
    for service in services {
        for unit in [format!("zd-pools@{service}.path"), paths::nginx_unit(service)] {
            systemd::stop(&unit).await?;
            systemd::disable(&unit).await?;
            let _ = exec::try_run(&["systemctl", "reset-failed", &unit]).await?;
        }
        for slot in Slot::BOTH {
            remove_job(service, slot).await?;
        }
        if stack {
            consul::forget(&consul::zd()?, service).await?;
        }
        let told = [
            paths::nginx_conf(service),
            paths::nginx_pools(service),
            paths::pools(service),
            paths::template(service),
        ];
        told.iter().try_for_each(|path| hostfs::remove_file(path))?;
        hostfs::remove_tree(&paths::service(service))?;
    }
    Ok(())
}

/// Waits until Nomad has stopped such containers of a slot; those it does not get rid of are removed.
async fn gone(service: &Name, slot: Slot, such: impl Fn(&Found) -> bool) -> Result<()> {
    let (docker, api, job) = (Docker::connect().await?, nomad::connect()?, paths::job(service, slot));
    let (start, mut ended) = (Instant::now(), None);
    loop {
        let left: Vec<Found> = docker.of_slot(service, slot).await?.into_iter().filter(&such).collect();
        if left.is_empty() {
            return Ok(());
        }
        if ended.is_none() && jobs::has_ended(&api, &job).await.unwrap_or(false) {
            ended = Some(Instant::now());
        }
        if start.elapsed() > STOPPED || ended.is_some_and(|at| at.elapsed() > CLEARED) {
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
            .cure("see `zd logs consul-template`, then run the same command again")
    };
    systemd::until_serving("consul-template.service", READY, EVERY, async || {
        path.exists().then_some(()).ok_or_else(missing)
    })
    .await
}

/// The gate configuration. Where nginx runs, it is checked and loaded; what nginx refuses is taken back.
pub async fn load_gate(service: &Name, text: &str) -> Result<()> {
    let path = paths::nginx_conf(service);
    if systemd::is_active(&paths::nginx_unit(service)).await? {
        return reload::with(service, &path, text.as_bytes()).await;
    }
    hostfs::write(&path, text.as_bytes(), 0o644, None)
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
    let text = hostfs::read(&rendered)?;
    reload::with(&service.name, &paths::nginx_pools(&service.name), &text).await
}

async fn push(host: &Host<'_>, reference: &str) -> Result<()> {
    let image = host.image(reference);
    let image = image.ok_or_else(|| Code::Bug.err(format!("image {reference} is not in the lock")))?;
    let mut total = 0;
    for digest in image.layers.iter().chain([&image.config]) {
        total += host.blob(digest).map_or(0, |(_, size)| size);
    }
    let bar = host.ui.bytes(format!("push {reference}"), total);
    let result = Registry::open().await?.push(host, image, tag(reference), &bar).await;
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
