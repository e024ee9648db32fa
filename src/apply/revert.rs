//! Carrying out one undo. Each is idempotent and content with what is gone already.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::act::{clear_job, load_gate, place_job, resize_job};
use crate::error::{Code, OrCode, Result};
use crate::host::docker::{Docker, parked};
use crate::host::{Host, consul, exec, fs as hostfs, nomad, packages, paths, systemd};
use crate::ids::{Name, Slot};
use crate::plan::{Keep, Undo};
use crate::receipt::Receipt;

pub async fn revert(undo: &Undo, host: &Host<'_>, purge: bool) -> Result<()> {
    match undo {
        Undo::Nothing => Ok(()),
        Undo::RemoveFiles { paths } => {
            for path in paths {
                hostfs::remove_file(path)?;
            }
            if paths.iter().any(|p| p.starts_with(paths::UNITS)) {
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
        Undo::RestoreFile { path, bytes, mode, uid, gid } => {
            let bytes = BASE64.decode(bytes).or_code(Code::Bug, "a receipt's bytes")?;
            hostfs::write_owned(path, &bytes, *mode, (*uid, *gid))
        }
        Undo::RestoreLink { path, target } => hostfs::set_link(path, target),
        Undo::RestoreMode { path, mode, uid, gid } => {
            use std::os::unix::fs::{PermissionsExt, chown};
            let _ = chown(path, Some(*uid), Some(*gid));
            let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(*mode));
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
        // Without a daemon there is nothing to take away from it.
        Undo::RemoveNetwork => match Docker::connect().await {
            Ok(docker) => docker.remove_network().await,
            Err(_) => Ok(()),
        },
        Undo::RemoveContainer { name } => match Docker::connect().await {
            Ok(docker) => {
                docker.remove(&parked(name)).await?;
                docker.remove(name).await
            }
            Err(_) => Ok(()),
        },
        Undo::RemoveJob { service, slot } => remove_job(service, *slot).await,
        Undo::PutBackJob { service, slot, job } => place_job(service, *slot, job).await,
        Undo::ResizeBack { service, slot, job } => resize_job(service, *slot, job).await,
        // An uninstall takes Consul away with all that is in it.
        Undo::PutBackKey { key, value } => match consul::zd() {
            Ok(api) if consul::version().await.is_ok() => consul::set(&api, key, value).await,
            _ => Ok(()),
        },
        Undo::PutBackGate { service, text } => load_gate(service, text).await,
        Undo::FinishRemoving { containers } => {
            let docker = Docker::connect().await?;
            for name in containers {
                docker.remove(name).await?;
            }
            Ok(())
        }
        Undo::PutBack { name } => Docker::connect().await?.put_back(name).await,
        Undo::RestoreState { service, text } => {
            hostfs::write(&crate::service::state::path(service), text.as_bytes(), 0o644, None)
        }
        Undo::CloseFirewall { kind, port } => kind.close(*port).await,
    }
}

/// With Nomad gone its containers are still there: they are removed as well.
async fn remove_job(service: &Name, slot: Slot) -> Result<()> {
    if nomad::version().await.is_ok() {
        clear_job(service, slot).await?;
        return nomad::collect_garbage(&nomad::connect()?).await;
    }
    let Ok(docker) = Docker::connect().await else { return Ok(()) };
    docker.clear_slot(service, slot).await
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

/// After the last undo with purge: all that is zd's by its name, also what an earlier uninstall left.
pub fn sweep() -> Result<()> {
    for tree in [paths::VAR, paths::LOG, paths::RUN] {
        hostfs::remove_tree(Path::new(tree))?;
    }
    Ok(())
}
