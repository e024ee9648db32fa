//! Carrying out one undo. Each is idempotent and content with what is gone already.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::Way;
use super::act::{
    aside, drop_services, load_gate, name_aside, place_job, remove_job, resize_job, switch_to, trust_ca,
};
use super::daemon::take_up;
use crate::error::{At, Code, OrCode, Result};
use crate::facts;
use crate::host::config::{HostConfig, Installed};
use crate::host::docker::{Docker, parked};
use crate::host::registry::Registry;
use crate::host::secrets::Secret;
use crate::host::{Host, consul, exec, fs as hostfs, packages, paths, systemd};
use crate::plan::{DataCopy, Keep, Undo};
use crate::receipt::Receipt;
use crate::service::renew;

pub async fn revert(undo: &Undo, host: &Host<'_>, way: Way) -> Result<()> {
    let purge = way == Way::Purge;
    match undo {
        Undo::Nothing => Ok(()),
        Undo::RemoveFiles { .. } | Undo::RestoreFile { .. } => {
            if revert_file(undo).await? {
                systemd::daemon_reload().await?;
            }
            Ok(())
        }
        Undo::RemoveDir { path, keep } => match keep {
            Keep::Data if !purge => Ok(()),
            // Where data below stays, so do the folders above it.
            Keep::Ours if holds_data(path) && !purge => Ok(()),
            Keep::Ours | Keep::Data => hostfs::remove_tree(path),
            Keep::Shared => hostfs::remove_empty(path),
        },
        // Their files go with the undo of the install.
        Undo::Remake { .. } | Undo::TrustCa { .. } if way != Way::Back => Ok(()),
        Undo::Remake { secret } => remake(secret).await,
        Undo::TrustCa { path } => {
            path.parent().map_or(Ok(()), |dir| hostfs::make_dir(dir, 0o755, None))?;
            trust_ca(path)
        }
        Undo::RestoreLink { path, target } => hostfs::set_link(path, target),
        Undo::RestoreMode { path, mode, uid, gid } => {
            let _ = hostfs::own_dir(path, *mode, (*uid, *gid));
            Ok(())
        }
        Undo::RemoveUser { name } => {
            if hostfs::ids(Some(name)).is_ok() {
                exec::run(&["userdel", name]).await?;
            }
            Ok(())
        }
        Undo::Unmask { unit } => systemd::unmask(unit).await,
        Undo::Purge { packages, leftovers } => purge_packages(packages, leftovers, host, purge).await,
        // Those that zd brought are purged by the undo that says so.
        Undo::PutBackPackages { .. } if way != Way::Back => Ok(()),
        Undo::PutBackPackages { repository, packages } => {
            packages::upgrade(repository, packages).await?;
            let Some(installed) = Installed::read()? else { return Ok(()) };
            for process in renew::all(&installed) {
                if renew::is_stale(&process).await? {
                    renew::renew(&process, &installed).await?;
                }
            }
            Ok(())
        }
        Undo::StopUnit { name, was_enabled, was_active } => {
            if !was_active {
                systemd::stop(name).await?;
            }
            if !was_enabled {
                systemd::disable(name).await?;
            }
            let _ = exec::try_run(&["systemctl", "reset-failed", name]).await?;
            Ok(())
        }
        Undo::PutBackDaemon { unit, files, was_enabled, was_active, data } => {
            if way != Way::Back || !was_active {
                systemd::stop(unit).await?;
            }
            if way == Way::Back
                && let Some(data) = data
            {
                put_back_data(unit, data).await?;
            }
            if !was_enabled {
                systemd::disable(unit).await?;
            }
            for file in files {
                revert_file(file).await?;
            }
            systemd::daemon_reload().await?;
            if way == Way::Back && *was_active {
                take_up(unit).await?;
                return remove_stray_pools();
            }
            let _ = exec::try_run(&["systemctl", "reset-failed", unit]).await?;
            Ok(())
        }
        // Without a daemon there is nothing to take away from it.
        Undo::RemoveNetwork => match Docker::connect().await {
            Ok(docker) => docker.remove_network().await,
            Err(_) => Ok(()),
        },
        Undo::PutBack { name } if way == Way::Back => Docker::connect().await?.put_back(name).await,
        Undo::RemoveContainer { name } | Undo::PutBack { name } => match Docker::connect().await {
            Ok(docker) => {
                docker.remove(&parked(name)).await?;
                docker.remove(name).await
            }
            Err(_) => Ok(()),
        },
        Undo::RemoveJob { service, slot } => remove_job(service, *slot).await,
        Undo::PutBackJob { .. }
        | Undo::ResizeBack { .. }
        | Undo::PutBackGate { .. }
        | Undo::PutBackKey { .. }
            if way != Way::Back =>
        {
            Ok(())
        }
        Undo::PutBackJob { service, slot, job } => place_job(service, *slot, job).await,
        Undo::ResizeBack { service, slot, job } => resize_job(service, *slot, job).await,
        // An uninstall takes Consul away with all that is in it.
        Undo::PutBackKey { key, value } => match consul::zd() {
            Ok(api) if consul::version().await.is_ok() => consul::set(&api, key, value).await,
            _ => Ok(()),
        },
        Undo::PutBackGate { service, text } => load_gate(service, text).await,
        Undo::FinishRemoving { containers } => {
            let docker = match Docker::connect().await {
                Err(_) if way != Way::Back => return Ok(()),
                docker => docker?,
            };
            for name in containers {
                docker.remove(name).await?;
            }
            Ok(())
        }
        // Their other steps take them away.
        Undo::FinishDropping { .. } if way != Way::Back => Ok(()),
        Undo::FinishDropping { services } => drop_services(services).await,
        // Its folder goes, or is gone with its service.
        Undo::RestoreState { .. } if way != Way::Back => Ok(()),
        Undo::RestoreState { service, text } => {
            hostfs::write(&crate::service::state::path(service), text.as_bytes(), 0o644, None)
        }
        Undo::CloseFirewall { kind, port } => kind.close(*port).await,
        Undo::OpenFirewall { kind, port } if way == Way::Back => kind.open(*port).await,
        Undo::OpenFirewall { .. } => Ok(()),
        Undo::PutBackFiles { files, new, unit } => {
            new.iter().try_for_each(|path| hostfs::remove_file(path))?;
            if way != Way::Back {
                return Ok(());
            }
            files.iter().try_for_each(|path| put_back_file(path))?;
            match unit {
                Some(unit) if systemd::is_active(unit).await? => systemd::restart(unit).await,
                _ => Ok(()),
            }
        }
        Undo::SwitchBack { .. } if way != Way::Back => Ok(()),
        Undo::SwitchBack { service, slot } => switch_to(service, *slot, host).await,
        Undo::Unknown => Err(Code::Unfinished
            .err("this receipt was written by a newer zd")
            .cure("use the newer zd, from the stick it came on")),
    }
}

/// Undoes a step that made or changed files. Tells whether one was a unit's.
async fn revert_file(undo: &Undo) -> Result<bool> {
    let is_unit = |path: &Path| path.starts_with(paths::UNITS);
    match undo {
        Undo::RemoveFiles { paths } => {
            let units = || paths.iter().filter(|p| is_unit(p));
            // One that was started for a while, and whose zd was killed, ends with its file. What is still
            // starting may be zd-settle, and so this very run.
            for unit in units().filter_map(|p| p.file_name()?.to_str()) {
                if systemd::is_active(unit).await? {
                    systemd::stop(unit).await?;
                }
            }
            for path in paths {
                hostfs::remove_file(path)?;
            }
            Ok(units().next().is_some())
        }
        Undo::RestoreFile { path, bytes, mode, uid, gid } => {
            let bytes = BASE64.decode(bytes).or_code(Code::Bug, "a receipt's bytes")?;
            hostfs::write_owned(path, &bytes, *mode, (*uid, *gid))?;
            Ok(is_unit(path))
        }
        other => Err(Code::Bug.err(format!("{other:?} is no undo of a file"))),
    }
}

/// Without a copy the file was not touched yet.
fn put_back_file(path: &Path) -> Result<()> {
    let copy = aside(path);
    if !copy.exists() {
        return Ok(());
    }
    let (bytes, meta) = (hostfs::read(&copy)?, std::fs::metadata(&copy).at(&copy)?);
    hostfs::write_owned(path, &bytes, meta.mode() & 0o7777, (meta.uid(), meta.gid()))
}

/// What consul-template has made from templates that are gone again.
fn remove_stray_pools() -> Result<()> {
    for found in std::fs::read_dir(paths::POOLS).into_iter().flatten() {
        let path = found.at(paths::POOLS)?.path();
        let service = path.file_stem().and_then(|name| name.to_str()?.parse().ok());
        if service.is_some_and(|service| !paths::template(&service).exists()) {
            hostfs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// A newer program may have written what the one before cannot read. Without a copy it never ran.
async fn put_back_data(unit: &str, data: &DataCopy) -> Result<()> {
    if !data.copy.exists() {
        return Ok(());
    }
    systemd::stop(unit).await?;
    for folder in &data.folders {
        let copy = data.copy.join(name_aside(folder));
        hostfs::remove_tree(folder)?;
        if copy.exists() {
            hostfs::copy_tree(&copy, folder).await?;
        }
    }
    Ok(())
}

/// A certificate is read when its daemon starts. Where the address before is gone, there is nobody to wait for.
async fn remake(secret: &Secret) -> Result<()> {
    secret.make()?;
    let unit = match secret {
        Secret::RegistryCertificate { .. } => "zd-registry.service",
        Secret::ConsulCertificate { .. } => consul::UNIT,
        _ => return Ok(()),
    };
    if !systemd::is_active(unit).await? {
        return Ok(());
    }
    systemd::restart(unit).await?;
    match HostConfig::read()?.filter(|host| facts::is_here(host.ip)) {
        Some(host) if unit == consul::UNIT => consul::set_up(&host.node()).await,
        Some(host) => Registry::ready(&host).await,
        None => Ok(()),
    }
}

fn holds_data(path: &Path) -> bool {
    [paths::REGISTRY_DATA, paths::RECEIPTS, paths::LOG].iter().any(|data| Path::new(data).starts_with(path))
}

async fn purge_packages(
    names: &[String],
    leftovers: &packages::Leftovers,
    host: &Host<'_>,
    purge: bool,
) -> Result<()> {
    let had_docker = names.iter().any(|n| n.starts_with("docker"));
    if had_docker {
        for unit in ["docker.socket", "docker.service", "containerd.service"] {
            systemd::stop(unit).await?;
        }
    }
    let left = packages::purge(names).await?;
    if !left.is_empty() {
        host.ui.warn(format!("left, because something else needs them by now: {}", left.join(" ")));
        return Ok(());
    }
    if had_docker {
        let _ = exec::try_run(&["ip", "link", "delete", "docker0"]).await;
    }
    leftovers.remove(purge).await
}

/// What the daemons of packages left that an earlier uninstall took away without their data. Whoever has
/// installed one of them again since then keeps it.
pub async fn purge_leftovers(journals: &[Receipt]) -> Result<()> {
    for undo in journals.iter().flat_map(|j| &j.steps).map(|i| &i.undo) {
        if let Undo::Purge { packages, leftovers } = undo
            && packages::missing(packages).await?.len() == packages.len()
        {
            leftovers.remove(true).await?;
        }
    }
    Ok(())
}

/// After the last undo: the journal, and with purge all that is zd's by its name, also what an earlier uninstall left.
pub async fn sweep(purge: bool) -> Result<()> {
    systemd::end_journal(purge).await?;
    if purge {
        // systemd.timer(5), Persistent.
        hostfs::remove_file(Path::new("/var/lib/systemd/timers/stamp-zd-backup.timer"))?;
    }
    hostfs::remove_tree(Path::new(paths::GATES))?;
    for tree in [paths::VAR, paths::LOG, paths::RUN].iter().filter(|_| purge) {
        hostfs::remove_tree(Path::new(tree))?;
    }
    Ok(())
}
