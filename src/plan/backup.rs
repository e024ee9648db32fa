//! The plan that sets a host to be backed up: settings, and the timer.

use std::path::Path;

use serde_json::json;

use super::install::{Builder, unit_file};
use super::{Keep, Plan, Step};
use crate::assets;
use crate::backup::Settings;
use crate::backup::settings::FOLDER;
use crate::error::Result;
use crate::host::paths;

pub const TIMER: &str = "zd-backup.timer";
pub const SERVICE: &str = "zd-backup.service";

pub fn plan(settings: &Settings) -> Result<Plan> {
    let mut plan = Builder::default();
    plan.file(paths::BACKUP_TOML, settings.to_toml()?);
    plan.timed_backups(settings)?;
    let about = format!("every {} to {}", settings.every, settings.to.display());
    Ok(Plan { verb: "backup", about, steps: plan.steps })
}

impl Builder<'_> {
    pub(super) fn timed_backups(&mut self, settings: &Settings) -> Result<()> {
        // Any other folder is the site's: on a stick that is not there it must not come to be.
        if settings.to == Path::new(FOLDER) {
            // Backups outlast an uninstall: they are what another host is made from.
            self.push(Step::Dir { path: FOLDER.into(), mode: 0o700, owner: None, keep: Keep::Shared });
        }
        let variables = json!({ "to": settings.to });
        let unit = assets::render(SERVICE, assets::BACKUP_UNIT, variables)?;
        let variables = json!({ "calendar": settings.every.calendar() });
        let timer = assets::render(TIMER, assets::BACKUP_TIMER, variables)?;
        self.daemon(TIMER, vec![unit_file(SERVICE, unit), unit_file(TIMER, timer)], None);
        Ok(())
    }
}
