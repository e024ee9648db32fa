//! The hosts a bundle is for: distribution, release, architecture.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Result};

/// The hosts a bundle is for, as in their os-release(5) and uname(1) -m: `debian-12-x86_64`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    pub os: String,
    pub release: String,
    #[serde(default = "x86_64")]
    pub arch: String,
}

fn x86_64() -> String {
    "x86_64".into()
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.os, self.release, self.arch)
    }
}

impl FromStr for Target {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = s.splitn(3, '-');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(release), arch) if !os.is_empty() && !release.is_empty() => Ok(Target {
                os: os.into(),
                release: release.into(),
                arch: arch.map_or_else(x86_64, Into::into),
            }),
            _ => Err(format!("{s:?} is not a target such as debian-12 or ubuntu-24.04-x86_64")),
        }
    }
}

impl Target {
    /// Release codename as it stands in apt sources.
    pub fn codename(&self) -> Result<&'static str> {
        Ok(match (self.os.as_str(), self.release.as_str()) {
            ("debian", "11") => "bullseye",
            ("debian", "12") => "bookworm",
            ("debian", "13") => "trixie",
            ("ubuntu", "22.04") => "jammy",
            ("ubuntu", "24.04") => "noble",
            _ => {
                return Err(Code::Manifest
                    .err(format!("target {self}: zd knows no package source for it"))
                    .cure("use one of debian-11, debian-12, debian-13, ubuntu-22.04, ubuntu-24.04"));
            }
        })
    }

    /// Architecture as dpkg and OCI call it.
    pub fn deb_arch(&self) -> Result<&'static str> {
        match self.arch.as_str() {
            "x86_64" => Ok("amd64"),
            "aarch64" => Ok("arm64"),
            other => Err(Code::Manifest
                .err(format!("target arch {other:?}: expected x86_64 or aarch64"))
                .cure("write arch = \"x86_64\"")),
        }
    }
}
