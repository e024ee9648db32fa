//! `zd pack`: manifest -> resolve sources -> lock -> sign -> write a folder for the stick.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;

use crate::assets;
use crate::bundle::lock::{self, Deb, Image, Lock, Role};
use crate::bundle::manifest::{FileSource, Manifest, Packages, Product, Service};
use crate::bundle::signature::{Key, Signer};
use crate::bundle::sources::cache::{Cache, hash, hash_file};
use crate::bundle::sources::place::Place;
use crate::bundle::sources::url::{self, Wanted};
use crate::bundle::sources::{Blobs, apt, hashicorp, image};
use crate::bundle::target::Target;
use crate::bundle::versions::{self, Series};
use crate::bundle::writer;
use crate::error::{At, Code, OrCode, Result, source_file};
use crate::ids::{Digest, Version};
use crate::ui::Ui;

/// Make a signed bundle and a folder ready for the stick (on a machine with a network)
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd pack manifests/demo.toml --key zd.key\n  \
                        zd pack manifests/demo.toml --key zd.key --out /media/stick/demo\n  \
                        zd pack manifests/hello.toml --key zd.key --mirror http://mirror.example")]
pub struct Args {
    /// The manifest
    manifest: PathBuf,
    /// The secret key that signs the bundle (`zd keygen` makes one)
    #[arg(long, value_name = "FILE", default_value = "zd.key")]
    key: PathBuf,
    /// The folder to write; NAME-VERSION where not given
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Pack for another target than the manifest's, such as ubuntu-24.04
    #[arg(long)]
    target: Option<Target>,
    /// Take what comes from a URL (files, releases) from here, at the path of its URL
    #[arg(long, value_name = "DIR|URL")]
    mirror: Option<Place>,
}

#[derive(Serialize)]
struct Report {
    folder: PathBuf,
    bundle: PathBuf,
    /// Digest of the lock, which names the bundle.
    id: Digest,
    bytes: u64,
    images: usize,
    packages: usize,
    releases: usize,
    /// From which versions of HashiCorp's programs this bundle upgrades a host.
    upgrades: Vec<Upgrades>,
    fingerprint: String,
    seconds: f64,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = std::time::Instant::now();
    let created = created()?;
    let manifest = read_manifest(&args)?;
    let signer =
        Signer::read(&args.key, || super::keygen::ask_password(false)).map_err(|e| match e.code {
            Code::Io if !args.key.exists() => e.cure("make one with `zd keygen`, or name it with --key"),
            _ => e,
        })?;
    if manifest.revoked_keys.contains(&signer.key) {
        return Err(Code::Manifest
            .err(format!("revoked-keys has the key {} that would sign the bundle", signer.key.id()))
            .cure("sign with the key that comes after it: --key FILE"));
    }
    let folder = args.out.unwrap_or_else(|| format!("{}-{}", manifest.name, manifest.version).into());

    let cache = Cache::open()?;
    let mut blobs = Blobs::default();
    let target = &manifest.target;
    let (packages, images) = tokio::try_join!(
        resolve_packages(&manifest, &cache, ui),
        resolve_images(&manifest, &cache, &mut blobs, ui)
    )?;
    let (apt_index, debs, more) = packages;
    blobs.extend(more);
    let mut files = Vec::new();
    for source in &manifest.files {
        files.push(resolve_file(source, args.mirror.as_ref(), &cache, &mut blobs, ui).await?);
        ui.done(format!("file {}", source.name));
    }
    let mut releases = Vec::new();
    for source in &manifest.releases {
        let mirror = args.mirror.as_ref();
        let release = hashicorp::resolve(source, target.deb_arch()?, mirror, &cache, &mut blobs, ui).await?;
        releases.push(release);
    }

    let (blob_list, paths) = blobs.into_sorted();
    let lock = Lock {
        schema: 1,
        name: manifest.name,
        version: manifest.version,
        created,
        packed_by: env!("CARGO_PKG_VERSION").into(),
        engine: manifest.engine,
        consul_https: manifest.consul_https,
        target: manifest.target,
        packages: manifest.packages,
        apt_index,
        debs,
        images,
        files,
        releases,
        services: manifest.services,
        backup: manifest.backup,
        revoked_keys: manifest.revoked_keys,
        blobs: blob_list,
    };
    fs::create_dir_all(&folder).at(&folder)?;
    let bundle = folder.join(format!("{}.zd.tar", lock.title()));
    let bar = ui.bytes("write bundle", lock.blobs.iter().map(|b| b.size).sum());
    let (digest, bytes) = writer::write(&bundle, &lock, &signer, &paths, |n| bar.inc(n))?;
    bar.finish_and_clear();
    write_companions(&folder, &bundle, &digest, &signer.key)?;

    let report = Report {
        folder,
        bundle,
        id: Digest::of(&lock.to_bytes()),
        bytes,
        images: lock.images.len(),
        packages: lock.debs.len(),
        releases: lock.programs().count(),
        upgrades: upgrades(&lock),
        fingerprint: signer.key.fingerprint(),
        seconds: start.elapsed().as_secs_f64(),
    };
    ui.report(&report, |r| {
        format!(
            "packed {} for {}: {} images, {} packages, {} in {:.1} s\nfolder       {} (copy it whole)\nfingerprint  {}\n\
             {}on site      sudo ./zd install --ip auto",
            lock.title(), lock.target, r.images, r.packages, bytesize::ByteSize(r.bytes), r.seconds,
            r.folder.display(), r.fingerprint, r.upgrades.iter().map(Upgrades::text).collect::<String>()
        )
    });
    Ok(())
}

/// Now, or what SOURCE_DATE_EPOCH says (reproducible-builds.org): then the same sources make the same bytes.
fn created() -> Result<Timestamp> {
    const VARIABLE: &str = "SOURCE_DATE_EPOCH";
    let Some(given) = std::env::var_os(VARIABLE) else {
        return Ok(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default());
    };
    let seconds = given.to_str().and_then(|text| text.parse().ok());
    seconds.and_then(|s| Timestamp::from_second(s).ok()).ok_or_else(|| {
        Code::Usage
            .err(format!("{VARIABLE}={}: expected seconds since 1970", given.display()))
            .cure("unset it, or set it to a time such as `git log -1 --format=%ct` prints")
    })
}

/// The installed versions that a program of the bundle is reached from.
#[derive(Serialize)]
struct Upgrades {
    product: Product,
    version: Version,
    /// Release series, such as 1.10.
    from: Vec<Series>,
    not_from: Vec<NotFrom>,
}

#[derive(Serialize)]
struct NotFrom {
    series: Series,
    /// To be added to `via`.
    missing: Vec<String>,
}

impl Upgrades {
    fn text(&self) -> String {
        let list = |all: &[Series]| all.iter().map(Series::to_string).collect::<Vec<_>>().join(" ");
        let mut text =
            format!("upgrades     to {} {} from {}\n", self.product, self.version, list(&self.from));
        let lacks: Vec<String> = self
            .not_from
            .iter()
            .map(|start| format!("{} ({})", start.series, start.missing.join(" ")))
            .collect();
        if !lacks.is_empty() {
            text.push_str(&format!(
                "             not from, unless via has these too: {}\n",
                lacks.join(", ")
            ));
        }
        text
    }
}

fn upgrades(lock: &Lock) -> Vec<Upgrades> {
    let releases = lock.releases.iter().filter(|release| !versions::rules(release.product).is_free());
    let of = |release: &lock::Release| {
        let carried = release.via.iter().map(|stone| &stone.version);
        let starts = versions::rules(release.product).starts(&release.version, carried);
        let (from, not_from): (Vec<_>, Vec<_>) =
            starts.into_iter().partition(|(_, missing)| missing.is_empty());
        Upgrades {
            product: release.product,
            version: release.version.clone(),
            from: from.into_iter().map(|(series, _)| series).collect(),
            not_from: not_from.into_iter().map(|(series, missing)| NotFrom { series, missing }).collect(),
        }
    };
    releases.map(of).collect()
}

fn read_manifest(args: &Args) -> Result<Manifest> {
    let text = fs::read_to_string(&args.manifest).at(&args.manifest)?;
    let mut manifest = Manifest::parse(&text).map_err(|e| e.during(args.manifest.display()))?;
    if let Some(target) = &args.target {
        target.codename()?;
        target.deb_arch()?;
        manifest.target = target.clone();
    }
    // Paths in a manifest are relative to it.
    let base = args.manifest.parent().unwrap_or(Path::new(""));
    let paths = manifest.images.iter_mut().flat_map(|i| [&mut i.oci, &mut i.docker_archive, &mut i.ca]);
    let paths = paths.chain(manifest.files.iter_mut().map(|f| &mut f.path));
    let paths = paths.chain(manifest.releases.iter_mut().map(|r| &mut r.key));
    for path in paths.chain([&mut manifest.packages.sources]).flatten() {
        *path = base.join(&*path);
    }
    Ok(manifest)
}

/// On a thread of its own: apt asks its sources while images are compressed.
async fn resolve_packages(
    manifest: &Manifest,
    cache: &Cache,
    ui: &Ui,
) -> Result<(Option<Digest>, Vec<Deb>, Blobs)> {
    let (packages, target) = (manifest.packages.clone(), manifest.target.clone());
    let (cache, ui) = (cache.clone(), ui.clone());
    let resolved = tokio::task::spawn_blocking(move || apt::resolve(&packages, &target, &cache, &ui));
    let resolved = resolved.await.or_code(Code::Bug, "resolving packages")??;
    require_stream(&manifest.services, &resolved.1)?;
    require_apparmor(&manifest.packages, &resolved.1)?;
    Ok(resolved)
}

async fn resolve_images(
    manifest: &Manifest,
    cache: &Cache,
    blobs: &mut Blobs,
    ui: &Ui,
) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for source in &manifest.images {
        images.push(image::resolve(source, manifest.target.deb_arch()?, cache, blobs, ui).await?);
        ui.done(format!("image {}", source.reference));
    }
    Ok(images)
}

/// nginx serves sessions by a module, which in Debian and Ubuntu is a package of its own.
fn require_stream(services: &[Service], debs: &[Deb]) -> Result<()> {
    const MODULE: &str = "libnginx-mod-stream";
    match services.iter().find(|s| !s.inlets().is_empty()) {
        Some(service) if !debs.iter().any(|d| d.name == MODULE) => Err(Code::Manifest
            .err(format!(
                "service {}: its TCP ports and long-lived paths need {MODULE}, and no package brings it",
                service.name
            ))
            .cure(format!("add it: [packages] nginx = [\"nginx-light\", \"{MODULE}\"]"))),
        _ => Ok(()),
    }
}

/// Where the kernel has AppArmor, as Debian's and Ubuntu's do, Docker starts no container without its parser, which
/// its package only recommends.
fn require_apparmor(packages: &Packages, debs: &[Deb]) -> Result<()> {
    const PARSER: &str = "apparmor";
    if packages.docker.is_empty() || debs.iter().any(|d| d.name == PARSER) {
        return Ok(());
    }
    Err(Code::Manifest
        .err(format!(
            "docker: no package brings {PARSER}, without which it starts no container on most hosts"
        ))
        .cure(format!("add it: [packages] docker = [\"docker.io\", \"{PARSER}\"]")))
}

async fn resolve_file(
    source: &FileSource,
    mirror: Option<&Place>,
    cache: &Cache,
    blobs: &mut Blobs,
    ui: &Ui,
) -> Result<lock::File> {
    let (digest, size, path) = match (&source.url, &source.sha256, &source.path) {
        (Some(url), Some(sum), _) => {
            let digest: Digest =
                format!("sha256:{sum}").parse().map_err(|e: String| Code::Manifest.err(e))?;
            let wanted = Wanted { name: source.name.as_str(), sum: &digest, says: "the manifest" };
            let (size, path) = url::fetch(wanted, &Place::of(url, mirror)?, cache, ui).await?;
            (digest, size, path)
        }
        (_, _, Some(path)) => {
            let file = fs::File::open(path)
                .map_err(|e| source_file(path, e).during(format!("file {}", source.name)))?;
            let (digest, size) = hash(file).at(path)?;
            (digest, size, path.clone())
        }
        _ => return Err(Code::Bug.err("a file source was not checked")),
    };
    blobs.add(digest.clone(), size, Role::File, path);
    Ok(lock::File { name: source.name.clone(), digest })
}

/// What lies beside the bundle: zd itself, the public key, instructions, and sums for `sha256sum -c`. A stick is pulled
/// out: what was said to be packed is on it, file by file, for the whole file system may hold much of others.
fn write_companions(folder: &Path, bundle: &Path, digest: &Digest, key: &Key) -> Result<()> {
    let own = std::env::current_exe().at("the running zd")?;
    let tool = folder.join("zd");
    let temp = tempfile::NamedTempFile::new_in(folder).at(folder)?;
    fs::copy(&own, temp.path()).at(temp.path())?;
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o755)).at(temp.path())?;
    temp.as_file().sync_all().at(temp.path())?;
    temp.persist(&tool).map_err(|e| crate::error::io(&tool, e.error))?;

    let fingerprint = format!(
        "This bundle is signed with the key in zd.pub.\nIts fingerprint: {}\n\
         Compare it with the one you were given by another way than this stick.\n",
        key.fingerprint()
    );
    let texts = [
        ("zd.pub", key.file_text()),
        ("FINGERPRINT.txt", fingerprint),
        ("INSTALL.md", assets::INSTALL.into()),
        ("INSTALL.ko.md", assets::INSTALL_KO.into()),
    ];
    let mut sums = format!("{}  {}\n", digest.hex(), name_of(bundle));
    sums.push_str(&format!("{}  zd\n", hash_file(&tool)?.0.hex()));
    for (name, text) in texts {
        let path = folder.join(name);
        write_through(&path, &text)?;
        sums.push_str(&format!("{}  {name}\n", Digest::of(text.as_bytes()).hex()));
    }
    let path = folder.join("SHA256SUMS");
    write_through(&path, &sums)?;
    fs::File::open(folder).and_then(|dir| dir.sync_all()).at(folder)
}

fn write_through(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::File::create(path).at(path)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).at(path)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
