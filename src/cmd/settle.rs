//! `zd settle`, run by a unit after a boot: what the end of the host has interrupted is taken back.

use std::time::Duration;

use super::publish::wait_for_lock;
use super::repair;
use super::undo::{is_first_install, take_back};
use crate::apply::Way;
use crate::bundle::manifest::Engine;
use crate::error::Result;
use crate::host::config::Installed;
use crate::host::{Host, nomad, until};
use crate::receipt;
use crate::ui::Ui;

const LIMIT: Duration = Duration::from_secs(120);

/// Take back what a reboot has interrupted
#[derive(clap::Args)]
pub struct Args {}

pub async fn run(_: Args, ui: &Ui) -> Result<()> {
    // Nothing serves yet where a first install was interrupted: whether it goes on is the engineer's to say.
    let Some(installed) = Installed::read()? else { return Ok(()) };
    if receipt::unfinished()?.is_none() {
        return Ok(());
    }
    if installed.lock.engine == Engine::Nomad {
        // One that does not start is what the undo has to put right.
        let _ = until(LIMIT, Duration::from_millis(500), async || nomad::version().await.map(drop)).await;
    }
    let _lock = wait_for_lock("settle", LIMIT, ui).await?;
    let Some(mut journal) = receipt::unfinished()? else { return Ok(()) };
    // A repair goes on only with somebody who looks at what it finds; meanwhile what serves goes on serving.
    if is_first_install(&journal)? || journal.header.verb == repair::VERB {
        return Ok(());
    }
    let reason = "the host went down in the middle of it";
    take_back(&mut journal, &Host::new(ui), Way::Back, reason).await.map(drop)
}
