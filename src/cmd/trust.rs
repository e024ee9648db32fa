//! `zd trust`: whose bundles this host takes.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::Serialize;

use super::ChangeArgs;
use crate::audit::{self, Event};
use crate::bundle::signature::Key;
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::trust::{Revoked, Trust};
use crate::ui::Ui;

/// Whose bundles this host takes: list, add, revoke and rotate keys
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd trust list\n  zd trust add second.pub --reason 'ticket 12'\n  \
                        zd trust revoke 1F2E3D4C5B6A7988 --reason 'laptop lost'\n  \
                        zd trust rotate zd-2.pub            a key that one which is trusted has signed")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// The keys, those that are revoked, and when the newest bundle was packed that was installed here
    List,
    /// Take bundles that are signed with this key, too
    Add {
        /// Its .pub file, or the line in it
        #[arg(value_name = "FILE|KEY")]
        key: String,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Never take a bundle again that is signed with this key
    Revoke {
        /// Its id, its .pub file, or the line in it
        #[arg(value_name = "ID|FILE|KEY")]
        key: String,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Take bundles of the key that follows one which is trusted, by that one's signature in FILE.minisig
    Rotate {
        /// The .pub file of the new key, as `zd keygen --follows` wrote it
        file: PathBuf,
        #[command(flatten)]
        change: ChangeArgs,
    },
}

#[derive(Serialize)]
struct Listed {
    id: String,
    fingerprint: String,
    key: Key,
}

impl From<Key> for Listed {
    fn from(key: Key) -> Self {
        Self { id: key.id(), fingerprint: key.fingerprint(), key }
    }
}

#[derive(Serialize)]
struct List {
    keys: Vec<Listed>,
    revoked: Vec<Revoked>,
    /// When the newest bundle was packed that was installed here.
    newest: Option<Timestamp>,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    key: Listed,
    /// False where it was so already.
    changed: bool,
}

pub fn run(args: Args, ui: &Ui) -> Result<()> {
    match args.command {
        Command::List => list(ui),
        Command::Add { key, change } => {
            let find = |_: &Trust| Key::given("key", &key).map(|key| (key, String::new()));
            let question = "take every bundle that is signed with it";
            changed("trust add", &change, question, find, Trust::add, ui)
        }
        Command::Revoke { key, change } => {
            let find = |trust: &Trust| trust.named(&key).map(|key| (key, String::new()));
            let revoke = |trust: &mut Trust, key: &Key| trust.revoke(key, &audit::actor(), &change.reason);
            changed(
                "trust revoke",
                &change,
                "never take a bundle again that is signed with it",
                find,
                revoke,
                ui,
            )
        }
        Command::Rotate { file, change } => {
            let find = |trust: &Trust| {
                let (key, by) = trust.successor(&file)?;
                Ok((key, format!(", which follows {}", by.id())))
            };
            let question = "take every bundle that is signed with it";
            changed("trust rotate", &change, question, find, Trust::add, ui)
        }
    }
}

fn list(ui: &Ui) -> Result<()> {
    let trust = Trust::read()?;
    let keys = trust.keys().into_iter().map(Listed::from).collect();
    let list = List { keys, revoked: trust.revoked().to_vec(), newest: trust.newest() };
    ui.report(&list, |list| {
        let keys = list.keys.iter().map(|key| format!("trusted  {}  {}\n", key.id, key.fingerprint));
        let revoked = list.revoked.iter().map(|revoked| {
            let reason =
                if revoked.reason.is_empty() { String::new() } else { format!(": {}", revoked.reason) };
            format!(
                "revoked  {}  {} by {}{reason}\n",
                revoked.key.id(),
                revoked.at.strftime("%F"),
                revoked.by
            )
        });
        let newest = list.newest.map(|at| format!("newest   bundle packed {at}\n"));
        keys.chain(revoked).chain(newest).collect()
    });
    Ok(())
}

/// Finds the key, asks, acts, records.
fn changed(
    verb: &str,
    change: &ChangeArgs,
    question: &str,
    find: impl FnOnce(&Trust) -> Result<(Key, String)>,
    act: impl FnOnce(&mut Trust, &Key) -> Result<bool>,
    ui: &Ui,
) -> Result<()> {
    let _lock = if change.dry_run { None } else { Some(HostLock::take(verb, ui)?) };
    Installed::require()?;
    let mut trust = Trust::read()?;
    let (key, of) = find(&trust)?;
    let named = format!("{} ({}){of}", key.id(), key.fingerprint());
    if change.dry_run {
        ui.report(&Report { key: key.into(), changed: false }, |_| format!("{verb} {named}"));
        return Ok(());
    }
    ui.confirm(&format!("key {named}: {question}?"), change.yes)?;
    let changed = act(&mut trust, &key)?;
    if changed {
        let (reason, detail) = (change.reason.as_str(), named.clone());
        audit::append(Event { verb, outcome: "done", reason, detail, ..Event::default() })?;
    }
    ui.report(&Report { key: key.into(), changed }, |r| match (r.changed, verb) {
        (false, _) => format!("key {named}: it was so already, nothing was changed"),
        (true, "trust rotate") => {
            format!("key {named}: trusted\nnext  zd trust revoke the one before, when no stick that it signed is needed")
        }
        (true, "trust add") => format!("key {named}: trusted"),
        (true, _) => format!("key {named}: revoked for good"),
    });
    Ok(())
}
