//! `zd reload`, run by a unit when consul-template has written other pools: nginx checks them, loads
//! them, and the audit log says so.

use std::time::Duration;

use super::publish::wait_for_lock;
use crate::audit::{self, Event};
use crate::error::{At, Code, Result};
use crate::host::config::Installed;
use crate::host::{exec, fs, paths};
use crate::ids::{Digest, Name};
use crate::ui::Ui;

/// Have nginx load its pools where they have changed
#[derive(clap::Args)]
pub struct Args {
    service: Name,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let _lock = wait_for_lock("reload", Duration::from_secs(120)).await?;
    let installed = Installed::require()?;
    let name = &installed.service(Some(&args.service))?.name;
    let (rendered, included) = (paths::pools(name), paths::nginx_pools(name));
    let (new, old) = (std::fs::read(&rendered).at(&rendered)?, fs::read_if_any(&included)?);
    if old.as_ref() == Some(&new) {
        return Ok(());
    }
    fs::write(&included, &new, 0o644, None)?;
    let result = load(name).await;
    if let (Err(_), Some(old)) = (&result, &old) {
        // What nginx refuses must not be there at its next start.
        fs::write(&included, old, 0o644, None)?;
    }
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

async fn load(name: &Name) -> Result<()> {
    let conf = paths::nginx_conf(name);
    let conf = conf.to_string_lossy();
    exec::run(&["runuser", "-u", paths::NGINX_USER, "--", "nginx", "-q", "-t", "-c", conf.as_ref()])
        .await
        .map_err(|e| Code::Nginx.err(format!("the new pools are not loaded: {}", e.what)))?;
    exec::run(&["systemctl", "kill", "--kill-who=main", "-s", "HUP", &paths::nginx_unit(name)])
        .await
        .map(drop)
}
