//! Daemons of the bundle: their files and programs, the versions between, and data that is copied or begun anew.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::act::{name_aside, put, write};
use super::check::{coming, consul_data, untouched};
use crate::backup::Backup;
use crate::bundle::manifest::Product;
use crate::error::{At, Error, Result};
use crate::failpoint;
use crate::host::config::Installed;
use crate::host::docker::Docker;
use crate::host::{Host, consul, firewall, fs as hostfs, jobs, nomad, paths, systemd};
use crate::ids::Slot;
use crate::plan::{DataCopy, Standing, Stone, Text};
use crate::service::watch::Watch;

/// Once: a copy that is there is of before the program changed.
pub async fn copy_data(unit: &str, data: &DataCopy) -> Result<()> {
    if data.copy.exists() {
        return Ok(());
    }
    systemd::stop(unit).await?;
    hostfs::make_dir(Path::new(paths::BEFORE), 0o700, None)?;
    let partial = data.copy.with_extension("partial");
    hostfs::remove_tree(&partial)?;
    hostfs::make_dir(&partial, 0o700, None)?;
    for folder in data.folders.iter().filter(|f| f.exists()) {
        hostfs::copy_tree(folder, &partial.join(name_aside(folder))).await?;
    }
    std::fs::rename(&partial, &data.copy).at(&data.copy)
}

pub async fn run_with(unit: &str, files: &[Text]) -> Result<()> {
    files.iter().try_for_each(write)?;
    systemd::enable(unit).await?;
    take_up(unit).await
}

/// Runs the versions between, each until it serves as the one before did. A run that was killed goes on with the one
/// whose unit is on disk: the data may be that one's already.
pub async fn pass_stones(unit: &str, files: &[Text], via: &[Stone], host: &Host<'_>) -> Result<()> {
    let is_on_disk = |files: &[Text]| {
        files
            .last()
            .is_some_and(|unit| std::fs::read_to_string(&unit.path).is_ok_and(|found| found == unit.text))
    };
    if via.is_empty() || is_on_disk(files) {
        return Ok(());
    }
    let reached = via.iter().position(|stone| is_on_disk(&stone.files)).unwrap_or(0);
    let installed = coming(host)?;
    let containers = running(&installed).await?;
    for Stone { version, files } in &via[reached..] {
        let start = Instant::now();
        let pass = async {
            run_with(unit, files).await?;
            failpoint::reach(&format!("stone:{version}"));
            match unit {
                consul::UNIT => consul::set_up(&installed.host.node()).await?,
                _ => {
                    nomad::set_up().await?;
                    jobs::still_runs(&containers).await?;
                }
            }
            untouched(&containers).await?;
            host.watch.map_or(Ok(()), Watch::verdict)
        };
        pass.await.map_err(|e: Error| e.during(version))?;
        host.ui.done(format!("{unit} serves with {version} ({:.1} s)", start.elapsed().as_secs_f64()));
    }
    Ok(())
}

/// Containers of all slots.
async fn running(installed: &Installed) -> Result<Vec<Standing>> {
    let docker = Docker::connect().await?;
    let mut running = Vec::new();
    for (service, slot) in installed.lock.services.iter().flat_map(|s| Slot::BOTH.map(|slot| (s, slot))) {
        running.extend(docker.standing(&service.name, slot).await?);
    }
    Ok(running)
}

/// A daemon takes up its files. Those of rules have no process: a reload shuts no port and opens no way meanwhile.
pub async fn take_up(unit: &str) -> Result<()> {
    match [firewall::UNIT, firewall::BRIDGE_UNIT].contains(&unit) {
        true => systemd::reload(unit).await,
        false => systemd::restart(unit).await,
    }
}

/// Consul begins again with the node id of the backup. Its raft knows a server by that: what was written under another
/// id, or cannot be read, elects no leader.
pub async fn as_node_of(backup: &Backup) -> Result<()> {
    copy_data(consul::UNIT, &consul_data()).await?;
    systemd::stop(consul::UNIT).await?;
    let folder = Path::new(paths::CONSUL_DATA);
    hostfs::remove_tree(folder)?;
    hostfs::make_dir(folder, 0o750, Some(paths::CONSUL_USER))?;
    for entry in backup.index.beneath(folder) {
        put(backup, entry)?;
    }
    systemd::start(consul::UNIT).await
}

/// All or half of the stores may have been moved already, by a run that was killed.
pub async fn rebuild(
    product: Product,
    stores: &[PathBuf],
    aside: &Path,
    installed: &Installed,
) -> Result<()> {
    let unit = format!("{product}.service");
    if !aside.is_dir() {
        // An agent that cannot read its store may take its whole time to stop, and has nothing to save.
        systemd::kill(&unit).await?;
        systemd::stop(&unit).await?;
        let partial = aside.with_extension("partial");
        hostfs::make_dir(&partial, 0o700, None)?;
        for store in stores.iter().filter(|store| store.exists()) {
            hostfs::unmount_beneath(store).await?;
            let to = partial.join(store.file_name().unwrap_or_default());
            std::fs::rename(store, &to).at(store)?;
            store.parent().map_or(Ok(()), hostfs::sync_dir)?;
        }
        hostfs::sync_dir(&partial)?;
        std::fs::rename(&partial, aside).at(aside)?;
        hostfs::sync_dir(Path::new(paths::ASIDE))?;
    }
    systemd::start(&unit).await?;
    match product {
        Product::Nomad => nomad::begin_anew().await,
        Product::Consul | Product::ConsulTemplate => consul::set_up(&installed.host.node()).await,
    }
}
