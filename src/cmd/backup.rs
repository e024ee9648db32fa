//! `zd backup`: all that makes this host this host, in one file encrypted to a key whose secret half is elsewhere.
//! Nothing that serves is touched.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::ChangeArgs;
use crate::apply;
use crate::audit::{self, Event};
use crate::backup::index::{self, Blob, Entry, Index, Service};
use crate::backup::key::Recipient;
use crate::backup::settings::{self, Every};
use crate::backup::writer::{self, Writer, Written};
use crate::backup::{Settings, reader};
use crate::bundle::lock::Image;
use crate::bundle::manifest::{Engine, ImageRef};
use crate::bundle::signature::{Key, Signer};
use crate::error::{At, Code, Error, OrCode, Result};
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::registry::Registry;
use crate::host::{Host, consul, fs, generation, nomad, paths, signing};
use crate::ids::Digest;
use crate::plan::backup as planner;
use crate::receipt;
use crate::service::pointer;
use crate::service::state::State;
use crate::ui::Ui;

/// Behind the name of the host and the time.
const SUFFIX: &str = ".tar.age";
/// Folders whose files are saved, and single files.
const FOLDERS: [&str; 4] = [paths::ETC, paths::SERVICES, paths::REPORTS, paths::RECEIPTS];
/// By the last three Consul and Nomad know this node again.
const FILES: [&str; 5] = [
    paths::AUDIT,
    paths::AUDIT_HEAD,
    "/var/lib/zd/consul/node-id",
    "/var/lib/zd/nomad/client/client-id",
    "/var/lib/zd/nomad/client/secret-id",
];

/// Back this host up into one encrypted file: secrets, state, pointers, audit, what no bundle has
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd backup --recipient zd-backup.pub     once: sets the key and the timer, and takes the first\n  \
                        zd backup                               another one, to the folder that was set\n  \
                        zd backup --to /media/stick             another one, elsewhere\n\n\
                        The pair of keys is made elsewhere: zd keygen --backup. Its secret half belongs on no host."
)]
pub struct Args {
    /// Public key to encrypt to, or its file. Remembered with --to, --keep and --every; sets the timer
    #[arg(long, value_name = "AGE1…|FILE")]
    recipient: Option<String>,
    /// Folder of the backups; without --recipient for this one only
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// How many of this host's backups stay in the folder; without --recipient for this one only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// How often the timer takes one
    #[arg(long, value_name = "WHAT", requires = "recipient")]
    every: Option<Every>,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
pub struct Report {
    pub file: PathBuf,
    bytes: u64,
    digest: Digest,
    files: usize,
    /// The key of this host, which has signed it.
    host_key: Key,
    /// Images that no bundle has.
    images: Vec<ImageRef>,
    /// Backups that were too many.
    removed: Vec<PathBuf>,
    seconds: f64,
}

#[derive(Serialize)]
struct DryRun {
    settings: Settings,
    #[serde(flatten)]
    plan: apply::Preview,
}

/// The last one that came to its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Last {
    schema: u32,
    pub at: Timestamp,
    pub file: PathBuf,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take("backup", ui)?) };
    receipt::resumed(|header| header.verb == "backup" && args.recipient.is_some())?;
    let installed = Installed::require()?;
    let known = Settings::read(&installed.lock)?;
    let settings = wanted(&args, known)?;
    let plan = planner::plan(&settings)?;
    let host = Host::new(ui);
    if args.change.dry_run {
        let plan = match args.recipient {
            Some(_) => apply::preview(&plan, &host).await?,
            None => apply::Preview { verb: plan.verb.into(), about: plan.about.clone(), steps: Vec::new() },
        };
        ui.report(&DryRun { settings, plan }, |d| {
            format!("{}back up to {}, keep {}", d.plan.text(), d.settings.to.display(), d.settings.keep)
        });
        return Ok(());
    }
    if args.recipient.is_some() {
        check_folder(&settings.to)?;
        let question = format!("back this host up every {} to {}?", settings.every, settings.to.display());
        ui.confirm(&question, args.change.yes)?;
        if !apply::apply_or_back(&plan, &host, None).await?.done.is_empty() {
            let detail = format!("set to every {}, for {}", settings.every, settings.recipient);
            event("set", &args.change.reason, detail)?;
        }
    }
    let report = take(&installed, &settings, &args.change.reason, ui).await?;
    ui.report(&report, text);
    Ok(())
}

/// What counts for this run.
fn wanted(args: &Args, known: Option<Settings>) -> Result<Settings> {
    let mut settings = match (&args.recipient, known) {
        (Some(given), _) => Settings {
            recipient: Recipient::given(given)?,
            to: settings::folder(),
            keep: settings::keep(),
            every: args.every.unwrap_or_default(),
        },
        (None, Some(known)) => known,
        (None, None) => return Err(no_key()),
    };
    settings.to = args.to.clone().unwrap_or(settings.to);
    settings.keep = args.keep.unwrap_or(settings.keep);
    let problems = if args.recipient.is_some() { settings.problems() } else { Vec::new() };
    match problems.first() {
        None => Ok(settings),
        Some(problem) => Err(Code::Usage.err(problem).cure("correct it; nothing was changed")),
    }
}

pub fn no_key() -> Error {
    Code::Usage.err("no key is set on this host that backups are encrypted to").cure(
        "make a pair on another machine (zd keygen --backup), keep zd-backup.key there, and set the other half here, \
         once: zd backup --recipient zd-backup.pub",
    )
}

fn text(r: &Report) -> String {
    let images: Vec<String> = r.images.iter().map(ToString::to_string).collect();
    let images = if images.is_empty() { String::new() } else { format!(", images {}", images.join(", ")) };
    let removed =
        if r.removed.is_empty() { String::new() } else { format!("; {} older removed", r.removed.len()) };
    format!(
        "backup {} ({}, {} files{images}, {:.1} s{removed})\nsigned  by this host; a bare host takes it with --host-key {}",
        r.file.display(),
        bytesize::ByteSize(r.bytes),
        r.files,
        r.seconds,
        r.host_key.line
    )
}

fn check_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() || folder == Path::new(settings::FOLDER) {
        return Ok(());
    }
    Err(Code::Io
        .err(format!("{}: there is no such folder to write backups to", folder.display()))
        .cure("mount the stick or make the folder, then run the same command again; or --to another one"))
}

/// Takes a backup. Call it while holding the lock: nothing changes meanwhile.
pub async fn take(installed: &Installed, settings: &Settings, reason: &str, ui: &Ui) -> Result<Report> {
    let start = Instant::now();
    let bar = ui.wait("backup");
    let written = async {
        let signer = signing::required()?;
        write(installed, settings, &signer).await.map(|(index, written)| (index, written, signer.key))
    };
    let written = written.await;
    bar.finish_and_clear();
    let (index, written, host_key) = match written {
        Ok(written) => written,
        Err(e) => {
            event("failed", reason, e.what.clone())?;
            return Err(e);
        }
    };
    let Written { path: file, bytes, digest } = written;
    let removed = prune(&settings.to, &index.host.node(), settings.keep, &file)?;
    let last = Last { schema: 1, at: index.at, file: file.clone() };
    let last = serde_json::to_vec(&last).or_code(Code::Bug, "a note of the last backup")?;
    fs::write(Path::new(paths::LAST_BACKUP), &last, 0o600, None)?;
    event("done", reason, format!("{} {digest}", file.display()))?;
    Ok(Report {
        file,
        bytes,
        digest,
        files: index.files.len(),
        host_key,
        images: index.images.into_iter().map(|image| image.reference).collect(),
        removed,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn event(outcome: &str, reason: &str, detail: String) -> Result<()> {
    audit::append(Event { verb: "backup", outcome, reason, detail, ..Event::default() })
}

/// None before the first.
pub fn last() -> Result<Option<Last>> {
    let Some(bytes) = fs::read_if_any(Path::new(paths::LAST_BACKUP))? else { return Ok(None) };
    Ok(serde_json::from_slice(&bytes).ok())
}

async fn write(installed: &Installed, settings: &Settings, signer: &Signer) -> Result<(Index, Written)> {
    check_folder(&settings.to)?;
    if !settings.to.is_dir() {
        fs::make_dir(&settings.to, 0o700, None)?;
    }
    let lock = generation::lock_bytes(installed.host.generation)?;
    let mut made = vec![(index::LOCK, lock)];
    if installed.lock.engine == Engine::Nomad {
        made.push((index::CONSUL_SNAPSHOT, consul::snapshot().await?));
        made.push((index::NOMAD_SNAPSHOT, nomad::snapshot().await?));
    }
    let of = |(name, bytes): &(&str, Vec<u8>)| entry((*name).into(), bytes, 0o600, None);
    let mut files: Vec<Entry> = made.iter().map(of).collect();
    for path in paths_to_save()? {
        files.push(look(&path)?);
    }
    let registry = Registry::connect(&installed.host).await?;
    let (images, blobs) = images(installed, &registry).await?;
    let index = Index {
        schema: index::SCHEMA,
        at: Timestamp::now(),
        by: audit::actor(),
        zd: env!("CARGO_PKG_VERSION").into(),
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        host: installed.host.clone(),
        bundle: installed.lock.title(),
        engine: installed.lock.engine,
        services: services(installed)?,
        files,
        images,
        blobs: blobs.iter().map(|(blob, _)| blob.clone()).collect(),
    };
    let written = write_members(settings, signer, &index, &made, &blobs, &registry).await;
    if written.is_err() {
        // A full disk shall not stay full.
        fs::remove_file(&writer::partial(&settings.to, &index))?;
    }
    Ok((index, written?))
}

async fn write_members(
    settings: &Settings,
    signer: &Signer,
    index: &Index,
    made: &[(&str, Vec<u8>)],
    blobs: &[(Blob, usize)],
    registry: &Registry,
) -> Result<Written> {
    let name = format!("zd-{}-{}{SUFFIX}", index.host.node(), index.at.strftime("%Y%m%dT%H%M%SZ"));
    let mut writer = Writer::begin(&settings.to, &name, &settings.recipient, signer, index)?;
    for entry in &index.files {
        match made.iter().find(|(name, _)| *name == entry.path) {
            Some((_, bytes)) => writer.member(&entry.path, &entry.digest, entry.size, bytes.as_slice())?,
            None => {
                let path = entry.place();
                let file = fs::open(&path)?;
                writer.member(&entry.path, &entry.digest, entry.size, file)?;
            }
        }
    }
    for (blob, of) in blobs {
        let from = registry.download(&index.images[*of], &blob.digest).await?;
        writer.download(&reader::blob_name(&blob.digest), &blob.digest, blob.size, from).await?;
    }
    writer.finish()
}

fn services(installed: &Installed) -> Result<Vec<Service>> {
    let of = |name: &crate::ids::Name| {
        Ok(Service { name: name.clone(), active: pointer::read(name)?.slot(), state: State::read(name)? })
    };
    installed.lock.services.iter().map(|s| of(&s.name)).collect()
}

/// Files of zd's own that are there, sorted. Links are left out: what they say is in the index.
fn paths_to_save() -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = FILES.map(PathBuf::from).into_iter().filter(|p| p.exists()).collect();
    let mut folders: Vec<PathBuf> = FOLDERS.map(PathBuf::from).into_iter().filter(|p| p.is_dir()).collect();
    while let Some(folder) = folders.pop() {
        for found in std::fs::read_dir(&folder).at(&folder)? {
            let found = found.at(&folder)?;
            let (path, kind) = (found.path(), found.file_type().at(&folder)?);
            // nginx's spool of bodies is beside the pointer.
            if kind.is_dir() && !(folder.starts_with(paths::SERVICES) && found.file_name() == "tmp") {
                folders.push(path);
            } else if kind.is_file() {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn look(path: &Path) -> Result<Entry> {
    let bytes = fs::read(path)?;
    let meta = std::fs::symlink_metadata(path).at(path)?;
    let owner = fs::user(meta.uid())?;
    let name = path.to_string_lossy().trim_start_matches('/').to_owned();
    Ok(entry(name, &bytes, meta.permissions().mode() & 0o777, owner))
}

fn entry(path: String, bytes: &[u8], mode: u32, owner: Option<String>) -> Entry {
    Entry { path, digest: Digest::of(bytes), size: bytes.len() as u64, mode, owner }
}

/// Images that slots hold, or a rollback would go to, and the installed bundle does not carry; and of their blobs
/// those that it lacks, each with the place of its image.
async fn images(installed: &Installed, registry: &Registry) -> Result<(Vec<Image>, Vec<(Blob, usize)>)> {
    let lock = &installed.lock;
    let (mut images, mut wanted): (Vec<Image>, Vec<(Blob, usize)>) = (Vec::new(), Vec::new());
    for service in &lock.services {
        let state = State::read(&service.name)?;
        let held = state.slots.into_values().map(|filled| (filled.version, filled.digest));
        for (version, digest) in held.chain(state.previous.map(|before| (before.version, before.digest))) {
            let known = lock.images.iter().chain(&images).any(|image| image.manifest == digest);
            let reference = ImageRef { name: service.image.clone(), version };
            if known {
                continue;
            }
            let Some((image, blobs)) = registry.image(&reference, &digest).await? else {
                return Err(Code::Registry
                    .err(format!(
                        "the registry of this host has lost {reference} ({digest}), which a slot holds"
                    ))
                    .cure("zd deploy a version that it has, then run the same command again"));
            };
            for blob in blobs {
                let carried = lock.blobs.iter().any(|b| b.digest == blob.digest);
                if !carried && wanted.iter().all(|(b, _)| b.digest != blob.digest) {
                    wanted.push((blob, images.len()));
                }
            }
            images.push(image);
        }
    }
    Ok((images, wanted))
}

/// Removes this host's oldest backups; never the one that was just written, and nothing that has another name.
fn prune(folder: &Path, node: &str, keep: u32, newest: &Path) -> Result<Vec<PathBuf>> {
    let mut own = Vec::new();
    for found in std::fs::read_dir(folder).at(folder)? {
        let found = found.at(folder)?;
        let name = found.file_name();
        if is_own(&name.to_string_lossy(), node) && found.file_type().at(folder)?.is_file() {
            own.push(found.path());
        }
    }
    own.sort();
    own.retain(|path| path != newest);
    let gone = own[..own.len().saturating_sub(keep.saturating_sub(1) as usize)].to_vec();
    gone.iter().try_for_each(|path| fs::remove_file(path))?;
    Ok(gone)
}

/// A name that zd gives to a backup of this host.
fn is_own(name: &str, node: &str) -> bool {
    let time = name.strip_prefix("zd-").and_then(|n| n.strip_prefix(node)).and_then(|n| n.strip_prefix('-'));
    let time = time.and_then(|n| n.strip_suffix(SUFFIX)).unwrap_or_default();
    let form = "00000000T000000Z";
    time.len() == form.len()
        && time.bytes().zip(form.bytes()).all(|(b, f)| if f == b'0' { b.is_ascii_digit() } else { b == f })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_hosts_own_backups_go_and_never_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let own = |day: u32| format!("zd-node-10-4-0-17-202601{day:02}T000000Z.tar.age");
        let others = [
            "zd-node-10-4-0-1-20200101T000000Z.tar.age",
            "zd-node-10-4-0-17-20200101T000000Z.tar.age.bak",
            "zd-node-10-4-0-17-20200101T00000.tar.age",
            "zd-node-10-4-0-17-x.tar.age",
            "recipes.tar.age",
        ];
        for name in others.iter().map(|n| (*n).to_owned()).chain((1..=5).map(own)) {
            std::fs::write(path(&name), "x").unwrap();
        }
        // The clock was set back: the newest is not the last by its name.
        let gone = prune(dir.path(), "node-10-4-0-17", 2, &path(&own(3))).unwrap();
        assert_eq!(gone, [1, 2, 4].map(|day| path(&own(day))));
        for name in others.iter().map(|n| (*n).to_owned()).chain([3, 5].map(own)) {
            assert!(path(&name).exists(), "{name}");
        }
    }
}
