//! A process that runs what is installed now. Packages replace programs on disk under processes that go on
//! with those they have; each changes over in its own way, so that no client notices.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use super::{reload, switch};
use crate::bundle::manifest::{Engine, Service};
use crate::bundle::sources::cache::hash_file;
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::docker::Docker;
use crate::host::nginx::{Masters, Status, signal};
use crate::host::registry::Registry;
use crate::host::{nginx, nomad, paths, systemd, until};
use crate::ids::Name;
use crate::plan::Process;

const READY: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(50);
/// How long the new nginx is watched before the one before it goes for good.
const SOAK: u32 = 20;

/// Every process of packages on this host.
pub fn all(installed: &Installed) -> impl Iterator<Item = Process> {
    let services = installed.lock.services.iter().map(|s| Process::Nginx { service: s.name.clone() });
    [Process::Registry, Process::Docker].into_iter().chain(services)
}

/// Whether it runs other bytes than those on disk, or not at all though it should.
pub async fn is_stale(process: &Process) -> Result<bool> {
    match process {
        Process::Registry => is_unit_stale("zd-registry.service").await,
        Process::Docker => {
            Ok(is_unit_stale("docker.service").await? || is_unit_stale("containerd.service").await?)
        }
        Process::Nginx { service } => {
            let Ok(masters) = Masters::of(service).await else { return Ok(false) };
            Ok(masters.is_being_replaced()? || is_pid_stale(masters.current()?)?)
        }
    }
}

async fn is_unit_stale(unit: &str) -> Result<bool> {
    match systemd::main_pid(unit).await? {
        Some(pid) => is_pid_stale(pid),
        None => systemd::is_enabled(unit).await,
    }
}

/// dpkg replaces by rename, so the program of a running process is then a deleted file (proc(5), exe), and so
/// are its libraries (maps).
fn is_pid_stale(pid: u32) -> Result<bool> {
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    let Ok(link) = fs::read_link(&exe) else { return Ok(false) };
    if let Some(path) = link.to_string_lossy().strip_suffix(" (deleted)") {
        let installed = Path::new(path);
        // Where packages put programs; what lies elsewhere may be anything.
        if !installed.starts_with("/usr") {
            return Ok(true);
        }
        return Ok(!installed.exists() || hash_file(&exe)?.0 != hash_file(installed)?.0);
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let library =
        |line: &str| line.ends_with(" (deleted)") && (line.contains(" /usr/lib/") || line.contains(" /lib/"));
    Ok(maps.lines().any(library))
}

pub async fn renew(process: &Process, installed: &Installed) -> Result<()> {
    match process {
        Process::Registry => {
            systemd::restart("zd-registry.service").await?;
            Registry::ready(&installed.host).await
        }
        Process::Docker => docker(installed.lock.engine).await,
        Process::Nginx { service } => nginx_swap(installed.service(Some(service))?).await,
    }
}

/// Containers live on under their shims (live-restore). Nomad stops and starts with dockerd, as its unit says.
async fn docker(engine: Engine) -> Result<()> {
    for unit in ["containerd.service", "docker.service"] {
        if is_unit_stale(unit).await? {
            systemd::restart(unit).await?;
        }
    }
    until(READY, EVERY, async || Docker::connect().await.map(drop)).await?;
    if engine == Engine::Nomad { nomad::set_up().await } else { Ok(()) }
}

/// nginx(8), "Upgrading an executable on the fly": USR2 starts the new one beside the old, WINCH retires the
/// old one's workers, QUIT ends it; until then HUP brings it back.
async fn nginx_swap(service: &Service) -> Result<()> {
    let name = &service.name;
    nginx::check(name).await?;
    let Ok(masters) = Masters::of(name).await else { return Ok(()) };
    if let Some(before) = masters.before()?
        && nginx::workers_of(before)?.is_empty()
    {
        signal(name, before, Signal::QUIT).await?;
        until(READY, EVERY, async || gone(name).await).await?;
    }
    // A swap that was broken off: whichever runs what is installed stays.
    let masters = Masters::of(name).await?;
    if masters.before()?.is_some() {
        if !is_pid_stale(masters.current()?)? {
            return finish(service, Status::open(name).await?).await;
        }
        back(name).await?;
    }
    let old = Masters::of(name).await?.current()?;
    if !is_pid_stale(old)? {
        return Ok(());
    }
    // From here on a connection may reach either; this one stays with the old one's workers.
    let status = Status::open(name).await?;
    signal(name, old, Signal::USR2).await?;
    let begun = async || {
        let masters = Masters::of(name).await?;
        match masters.current()? != old && !masters.workers()?.is_empty() {
            true => Ok(()),
            false => Err(Code::Nginx
                .err(format!("the new nginx of {name} does not start beside the old one"))
                .cure("the old one serves on; see `zd logs nginx`")),
        }
    };
    until(READY, EVERY, begun).await?;
    finish(service, status).await
}

/// Takes the work from the old master's workers, looks whether the new one's do it, and lets the old one go.
async fn finish(service: &Service, status: Status) -> Result<()> {
    let name = &service.name;
    let Some(old) = Masters::of(name).await?.before()? else { return Ok(()) };
    reload::closing(name, status, async || {
        signal(name, old, Signal::WINCH).await?;
        let retired = async || match nginx::workers_of(old)?.len() {
            0 => Ok(()),
            n => {
                Err(Code::Nginx.err(format!("{n} workers of the old nginx of {name} still take connections")))
            }
        };
        until(READY, EVERY, retired).await
    })
    .await?;
    let active = super::pointer::read(name)?.slot();
    for _ in 0..SOAK {
        if let Err(why) = switch::serves(service, active).await {
            back(name).await?;
            return Err(Code::Nginx
                .err(format!("the new nginx of {name} gives {why}; the old one serves again"))
                .cure("see `zd logs nginx`"));
        }
        tokio::time::sleep(EVERY).await;
    }
    signal(name, old, Signal::QUIT).await?;
    // It waits for answers that are still on their way, and may do so for as long as they take.
    let _ = until(READY, EVERY, async || gone(name).await).await;
    Ok(())
}

/// The old master's workers serve again, and the new one goes.
async fn back(name: &Name) -> Result<()> {
    let masters = Masters::of(name).await?;
    let (Some(old), new) = (masters.before()?, masters.current()?) else { return Ok(()) };
    signal(name, old, Signal::HUP).await?;
    let serving = async || match nginx::workers_of(old)?.len() {
        0 => Err(Code::Nginx.err(format!("the old nginx of {name} does not come back"))),
        _ => Ok(()),
    };
    until(READY, EVERY, serving).await?;
    let status = Status::open(name).await?;
    reload::closing(name, status, async || signal(name, new, Signal::QUIT).await).await?;
    until(READY, EVERY, async || gone(name).await).await
}

/// One of the two masters has ended: it does when its last answers and sessions have.
async fn gone(name: &Name) -> Result<()> {
    match Masters::of(name).await?.before()? {
        None => Ok(()),
        Some(_) => Err(Code::Nginx
            .err(format!("an nginx of {name} that was replaced still has answers or sessions"))
            .cure(format!(
                "see `systemctl status {}`; they end by themselves, at the latest with the next deploy to their slot",
                paths::nginx_unit(name)
            ))),
    }
}
