//! How a host is backed up: `[backup]` of the manifest, or what `zd backup --recipient` has set on this host, which
//! counts for more. Not in host.toml: an earlier zd reads that too, after a way back.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::key::Recipient;
use crate::bundle::Lock;
use crate::error::{Code, OrCode, Result};
use crate::host::{fs, paths};

/// Where backups go unless somebody says otherwise; the only folder that zd makes for them.
pub const FOLDER: &str = "/var/backups/zd";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    pub recipient: Recipient,
    #[serde(default = "folder")]
    pub to: PathBuf,
    /// Backups of this host that stay in the folder.
    #[serde(default = "keep")]
    pub keep: u32,
    #[serde(default)]
    pub every: Every,
}

/// How often the timer asks for one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Every {
    Hour,
    #[default]
    Day,
    Week,
}

impl Every {
    pub fn length(self) -> Duration {
        let hours = match self {
            Every::Hour => 1,
            Every::Day => 24,
            Every::Week => 168,
        };
        Duration::from_secs(hours * 3600)
    }

    /// As systemd.time(7) calls it.
    pub fn calendar(self) -> &'static str {
        match self {
            Every::Hour => "hourly",
            Every::Day => "daily",
            Every::Week => "weekly",
        }
    }
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Every::Hour => "hour",
            Every::Day => "day",
            Every::Week => "week",
        })
    }
}

pub fn folder() -> PathBuf {
    FOLDER.into()
}

pub fn keep() -> u32 {
    14
}

/// The file on the host.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    schema: u32,
    backup: Settings,
}

impl Settings {
    /// What counts on this host.
    pub fn read(lock: &Lock) -> Result<Option<Self>> {
        match fs::read_if_any(Path::new(paths::BACKUP_TOML))? {
            Some(bytes) => Self::parse(&bytes).map(Some),
            None => Ok(lock.backup.clone()),
        }
    }

    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let form: Form = toml::from_slice(bytes).or_code(Code::Io, paths::BACKUP_TOML)?;
        if form.schema != 1 {
            return Err(Code::Io
                .err(format!("{}: schema {}, this zd reads 1", paths::BACKUP_TOML, form.schema))
                .cure("use the newer zd that wrote it: /opt/zd/bin/zd"));
        }
        Ok(form.backup)
    }

    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(&Form { schema: 1, backup: self.clone() }).or_code(Code::Bug, "writing settings")
    }

    /// What cannot be, for people.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        let plain =
            self.to.to_string_lossy().bytes().all(|b| b.is_ascii_alphanumeric() || b"/-_.".contains(&b));
        let mut parts = self.to.components();
        // It stands in a unit.
        if !plain
            || parts.next() != Some(Component::RootDir)
            || parts.any(|p| !matches!(p, Component::Normal(_)))
        {
            found.push(format!(
                "backup: to = {:?}: expected a path from / on, of letters, digits, - _ . /",
                self.to
            ));
        }
        if self.keep == 0 {
            found.push("backup: keep = 0: at least the newest one has to stay".into());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";

    #[test]
    fn defaults_and_the_file_read_back() {
        let settings: Settings = toml::from_str(&format!("recipient = {KEY:?}")).unwrap();
        assert_eq!((settings.to.as_path(), settings.keep), (Path::new(FOLDER), 14));
        assert_eq!(settings.every.calendar(), "daily");
        assert_eq!(Settings::parse(settings.to_toml().unwrap().as_bytes()).unwrap(), settings);
        assert_eq!(settings.problems(), [""; 0]);
        let newer = settings.to_toml().unwrap().replace("schema = 1", "schema = 2");
        assert!(Settings::parse(newer.as_bytes()).unwrap_err().what.contains("schema 2"));
    }

    #[test]
    fn settings_of_an_earlier_version_are_read() {
        let settings = Settings::parse(include_bytes!("../../tests/fixtures/backup/backup.toml")).unwrap();
        assert_eq!(
            (settings.to.as_path(), settings.keep, settings.every),
            (Path::new("/media/stick"), 8, Every::Week)
        );
    }

    #[test]
    fn what_cannot_be_is_named() {
        let settings = |more: &str| toml::from_str::<Settings>(&format!("recipient = {KEY:?}\n{more}"));
        for to in ["relative", "/a/../b", "/a b", "/x\\ny"] {
            assert!(settings(&format!("to = \"{to}\"")).unwrap().problems()[0].contains("from / on"), "{to}");
        }
        assert!(settings("keep = 0").unwrap().problems()[0].contains("newest"));
        for more in ["every = \"minute\"", "unknown = 1"] {
            assert!(settings(more).is_err(), "{more}");
        }
        assert!(toml::from_str::<Settings>("recipient = \"age1x\"").is_err());
    }
}
