//! `zd keygen`: the key pair that signs bundles, and the one that backups are encrypted to.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::backup::key;
use crate::bundle::signature::{self, OF_SUCCESSOR, Signer};
use crate::error::{At, Code, Result};
use crate::host::trust::succession;
use crate::ui::Ui;

/// Make the key pair that signs bundles, or the one for backups
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd keygen                 zd.key (keep it) and zd.pub (give it away) here\n  \
                        zd keygen --out keys/site --password\n  \
                        zd keygen --out zd-2 --follows zd.key     the next pair, and zd-2.pub.minisig by the one before\n  \
                        zd keygen --backup        zd-backup.key (keep it away from every host) and zd-backup.pub"
)]
pub struct Args {
    /// Where to write: PREFIX.key and PREFIX.pub; `zd`, or `zd-backup` with --backup
    #[arg(long, value_name = "PREFIX")]
    out: Option<PathBuf>,
    /// The pair for backups: hosts encrypt to the public key, `zd restore` opens with the secret one (age, x25519)
    #[arg(long, conflicts_with = "password")]
    backup: bool,
    /// The pair that comes after this secret key, which signs the new public key: hosts that trust the one before take it
    /// with `zd trust rotate`
    #[arg(long, value_name = "FILE", conflicts_with = "backup")]
    follows: Option<PathBuf>,
    /// Protect the secret key with a password (asked for, or $ZD_KEY_PASSWORD)
    #[arg(long)]
    password: bool,
}

#[derive(Serialize)]
struct Report {
    secret: PathBuf,
    public: PathBuf,
    key: String,
    fingerprint: String,
}

#[derive(Serialize)]
struct BackupReport {
    secret: PathBuf,
    public: PathBuf,
    key: String,
}

pub fn run(args: Args, ui: &Ui) -> Result<()> {
    let out = args.out.unwrap_or_else(|| if args.backup { "zd-backup" } else { "zd" }.into());
    let (secret, public) = (with_suffix(&out, ".key"), with_suffix(&out, ".pub"));
    // Both before either: a secret key without its public one is of no use.
    let signed = with_suffix(&public, ".minisig");
    for path in [&secret, &public].into_iter().chain(args.follows.is_some().then_some(&signed)) {
        if path.exists() {
            return Err(taken(path));
        }
    }
    if args.backup {
        return backup_pair(secret, public, ui);
    }
    let before =
        args.follows.as_deref().map(|path| Signer::read(path, || ask_password(false))).transpose()?;
    let password = if args.password { Some(ask_password(true)?) } else { None };
    let (secret_text, key) = signature::generate(password)?;
    create(&secret, &secret_text, 0o600)?;
    create(&public, &key.file_text(), 0o644)?;
    if let Some(before) = before {
        let said = succession(&key, &before.key);
        create(&signed, &before.sign(key.file_text().as_bytes(), OF_SUCCESSOR, &said), 0o644)?;
    }
    let report = Report { secret, public, key: key.line.clone(), fingerprint: key.fingerprint() };
    ui.report(&report, |r| {
        format!(
            "secret key   {} (keep it off the stick)\npublic key   {}\nfingerprint  {}",
            r.secret.display(),
            r.public.display(),
            r.fingerprint
        )
    });
    Ok(())
}

fn backup_pair(secret: PathBuf, public: PathBuf, ui: &Ui) -> Result<()> {
    let (secret_text, key) = key::generate()?;
    create(&secret, &secret_text, 0o600)?;
    create(&public, &format!("{key}\n"), 0o644)?;
    ui.report(&BackupReport { secret, public, key: key.to_string() }, |r| {
        format!(
            "secret key   {} (keep it, twice, and on no host: without it no backup can be read)\n\
             public key   {}\nnext         zd backup --recipient {}, on each host",
            r.secret.display(),
            r.public.display(),
            r.key
        )
    });
    Ok(())
}

/// From `$ZD_KEY_PASSWORD` or the prompt.
pub fn ask_password(twice: bool) -> Result<String> {
    if let Ok(password) = std::env::var("ZD_KEY_PASSWORD") {
        return Ok(password);
    }
    let mut prompt = dialoguer::Password::new().with_prompt("password of the secret key");
    if twice {
        prompt = prompt.with_confirmation("again", "the two differ");
    }
    prompt.interact().map_err(|e| {
        Code::Usage.err(format!("no password: {e}")).cure("set ZD_KEY_PASSWORD where there is no terminal")
    })
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn create(path: &Path, text: &str, mode: u32) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file = file.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => taken(path),
        _ => crate::error::io(path, e),
    })?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).at(path)
}

fn taken(path: &Path) -> crate::error::Error {
    Code::Usage
        .err(format!("{} is there already", path.display()))
        .cure("a key is never overwritten: choose another --out")
}
