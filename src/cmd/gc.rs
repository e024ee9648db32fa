//! `zd gc`: what no kept generation and no slot names any more goes: images of the registry and of Docker.

use std::collections::BTreeSet;

use serde::Serialize;

use super::ChangeArgs;
use super::deploy::settle_interrupted;
use crate::audit::{self, Event};
use crate::bundle::Lock;
use crate::bundle::manifest::ImageRef;
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::docker::Docker;
use crate::host::lock::HostLock;
use crate::host::registry::{self, Registry};
use crate::host::{Host, generation};
use crate::ids::Digest;
use crate::service::state::State;
use crate::ui::Ui;

/// Free the disk of images that no kept generation and no slot names
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd gc --dry-run\n  zd gc")]
pub struct Args {
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    /// `name:version`, gone from the registry.
    images: Vec<ImageRef>,
    /// Images that Docker had pulled.
    pulled: usize,
    /// Generations that are kept.
    kept: usize,
    dry_run: bool,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("gc", ui)?) };
    if !args.change.dry_run {
        settle_interrupted(&Host::new(ui)).await?;
    }
    let installed = Installed::require()?;
    let locks = generation::locks()?;
    let kept = locks.len();
    let keep = named(&installed, locks)?;
    let reading = Registry::connect(&installed.host).await?;
    let mut gone = Vec::new();
    for name in reading.repositories().await? {
        for version in reading.versions(&name).await? {
            let image = ImageRef { name: name.clone(), version };
            match reading.digest(&image).await? {
                Some(digest) if !keep.contains(&digest) => gone.push((image, digest)),
                _ => {}
            }
        }
    }
    let images: Vec<ImageRef> = gone.iter().map(|(image, _)| image.clone()).collect();
    let mut report = Report { images, pulled: 0, kept, dry_run: args.change.dry_run };
    if !args.change.dry_run {
        let question = format!("remove {} images that nothing names any more?", gone.len());
        if !gone.is_empty() {
            ui.confirm(&question, args.change.yes)?;
            let removed = remove(&gone).await;
            registry::close().await?;
            removed?;
            let wait = ui.wait("freeing what nothing names".to_owned());
            registry::collect_garbage().await?;
            wait.finish_and_clear();
        }
        let docker = Docker::connect().await?;
        for registry in installed.host.registries() {
            report.pulled += docker.remove_images(&registry, &keep).await?;
        }
        if !gone.is_empty() || report.pulled > 0 {
            let detail: Vec<String> =
                gone.iter().map(|(image, digest)| format!("{image} {digest}")).collect();
            let (reason, detail) = (args.change.reason.as_str(), detail.join(", "));
            audit::append(Event { verb: "gc", outcome: "done", reason, detail, ..Event::default() })?;
        }
    }
    ui.report(&report, text);
    Ok(())
}

fn text(r: &Report) -> String {
    let does = if r.dry_run { "would remove" } else { "removed" };
    let images: Vec<String> = r.images.iter().map(ToString::to_string).collect();
    match images.as_slice() {
        [] if r.pulled == 0 => {
            format!("nothing to free: {} generations and the slots name every image", r.kept)
        }
        _ => format!(
            "{does} {} images from the registry ({}), {} from Docker",
            images.len(),
            images.join(", "),
            r.pulled
        ),
    }
}

async fn remove(gone: &[(ImageRef, Digest)]) -> Result<()> {
    let registry = Registry::open().await?;
    for (image, digest) in gone {
        registry.remove(&image.name, digest).await?;
    }
    Ok(())
}

/// What kept generations brought, what the slots hold, and where a rollback would go.
fn named(installed: &Installed, locks: Vec<(u32, Lock, Digest)>) -> Result<BTreeSet<Digest>> {
    let images = locks.into_iter().flat_map(|(_, lock, _)| lock.images);
    let mut keep: BTreeSet<Digest> = images.map(|image| image.manifest).collect();
    for service in &installed.lock.services {
        let state = State::read(&service.name)?;
        keep.extend(state.slots.into_values().map(|filled| filled.digest));
        keep.extend(state.previous.map(|release| release.digest));
    }
    Ok(keep)
}
