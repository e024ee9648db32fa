//! Identifiers, checked once where they enter.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $check:expr, $want:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                let check: fn(&str) -> bool = $check;
                if check(s) { Ok(Self(s.to_owned())) } else { Err(format!("{s:?} is not {}", $want)) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(s: String) -> Result<Self, String> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

fn lower_name(s: &str, max: usize) -> bool {
    !s.is_empty()
        && s.len() <= max
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !s.starts_with('-')
        && !s.ends_with('-')
}

string_id!(
    /// Name of a service, a bundle or an image repository: a DNS label (RFC 1123).
    Name,
    |s| lower_name(s, 40),
    "a name (1 to 40 of a-z, 0-9 and -, not beginning or ending with -)"
);

string_id!(
    /// Version of a service or bundle: an OCI tag (distribution spec, "Pulling manifests").
    Version,
    |s| {
        !s.is_empty()
            && s.len() <= 64
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
            && !s.starts_with(['.', '-'])
    },
    "a version (1 to 64 of letters, digits, ., _ and -, beginning with a letter, digit or _)"
);

impl Version {
    /// Major, minor and patch of a release that is numbered so (semver.org); 0 where there is no number.
    pub fn numbers(&self) -> (u32, u32, u32) {
        numbers(self.as_str())
    }
}

/// The first three numbers of a version, whatever stands between them.
pub fn numbers(version: &str) -> (u32, u32, u32) {
    let mut parts = version.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next())
}

string_id!(
    /// `sha256:` and 64 lower-case hexadecimal digits (OCI image spec, "Digests").
    Digest,
    |s| s.strip_prefix("sha256:").is_some_and(|h| {
        h.len() == 64 && h.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    }),
    "a digest (sha256: and 64 hexadecimal digits)"
);

string_id!(
    /// Fingerprint of an OpenPGP key: 40 digits (version 4) or 64 (version 6), RFC 9580, 5.5.4.
    Fingerprint,
    |s| {
        matches!(s.len(), 40 | 64) && s.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
    },
    "an OpenPGP fingerprint (40 or 64 digits, 0-9 and A-F)"
);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hash(Sha256::digest(bytes).as_slice())
    }

    /// Of all that a reader gives, with its size; `each` sees every piece.
    pub fn of_reader(
        mut from: impl Read,
        mut each: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<(Self, u64)> {
        let (mut sha, mut size, mut buf) = (Sha256::new(), 0, vec![0u8; 1 << 20]);
        loop {
            match from.read(&mut buf)? {
                0 => return Ok((Self::from_hash(sha.finalize().as_slice()), size)),
                n => {
                    sha.update(&buf[..n]);
                    each(&buf[..n])?;
                    size += n as u64;
                }
            }
        }
    }

    /// From the 32 bytes of a finished SHA-256.
    pub fn from_hash(hash: &[u8]) -> Self {
        let mut s = String::with_capacity(71);
        s.push_str("sha256:");
        for b in hash {
            s.push_str(&format!("{b:02x}"));
        }
        Self(s)
    }

    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The first twelve digits, for people.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }
}

/// The two places a service can run in. Active or standby is a role, never a name.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    Blue,
    Green,
}

impl Slot {
    pub const BOTH: [Slot; 2] = [Slot::Blue, Slot::Green];

    pub fn other(self) -> Slot {
        match self {
            Slot::Blue => Slot::Green,
            Slot::Green => Slot::Blue,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Slot::Blue => "blue",
            Slot::Green => "green",
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_escape_a_path_or_a_label_are_refused() {
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a.b", "ü", &"x".repeat(41)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
        for bad in ["", ".", "..", "../x", "-v", "a b", "v1/..", &"x".repeat(65)] {
            assert!(bad.parse::<Version>().is_err(), "{bad:?}");
        }
        assert!("hello-2".parse::<Name>().is_ok());
        assert!("1.2.3-rc_1".parse::<Version>().is_ok());
    }

    #[test]
    fn a_digest_is_lower_case_and_whole() {
        let d = Digest::of(b"");
        assert_eq!(d.as_str(), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert!(d.as_str().to_uppercase().parse::<Digest>().is_err());
        assert!(d.as_str()[..70].parse::<Digest>().is_err());
    }
}
