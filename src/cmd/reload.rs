//! `zd reload`, run by a unit when consul-template has written other pools: nginx checks them, loads
//! them, and the audit log says so.

use std::time::Duration;

use super::publish::wait_for_lock;
use crate::audit::{self, Event};
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::{fs, paths};
use crate::ids::{Digest, Name};
use crate::service::reload;
use crate::ui::Ui;

/// Have nginx load its pools where they have changed
#[derive(clap::Args)]
pub struct Args {
    service: Name,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = wait_for_lock("reload", Duration::from_secs(120), ui).await?;
    let installed = Installed::require()?;
    let name = &installed.service(Some(&args.service))?.name;
    let (rendered, included) = (paths::pools(name), paths::nginx_pools(name));
    let new = fs::read(&rendered)?;
    if fs::read_if_any(&included)?.as_ref() == Some(&new) {
        return Ok(());
    }
    let result = reload::with(name, &included, &new).await;
    let outcome = if result.is_ok() { "done" } else { "failed" };
    let detail = match &result {
        Ok(()) => format!("pools {}", Digest::of(&new)),
        Err(e) => e.what.clone(),
    };
    audit::append(Event { verb: "reload", outcome, service: Some(name), detail, ..Event::default() })?;
    result?;
    ui.done(format!("nginx of {name} has loaded its pools"));
    Ok(())
}
