//! The key pair that backups are encrypted to: age's x25519 keys, in the files that age(1) takes.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use age::secrecy::ExposeSecret;
use age::x25519::Identity;
use serde::{Deserialize, Serialize};

use crate::bundle::medium;
use crate::error::{At, Code, Result};

/// The public half: `age1…`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Recipient(String);

impl FromStr for Recipient {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let known = s.parse::<age::x25519::Recipient>();
        known.map(|key| Self(key.to_string())).map_err(|_| format!("{s:?} is not a public key as age1…"))
    }
}

impl TryFrom<String> for Recipient {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<Recipient> for String {
    fn from(r: Recipient) -> String {
        r.0
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Recipient {
    pub fn key(&self) -> Result<age::x25519::Recipient> {
        self.0.parse().map_err(|e: &str| Code::Bug.err(e))
    }

    /// The line itself, or the file that it is in.
    pub fn given(text: &str) -> Result<Self> {
        let path = Path::new(text);
        let line = if path.is_file() {
            let file = medium::text(path).at(path)?;
            key_line(&file).to_owned()
        } else {
            text.to_owned()
        };
        line.parse().map_err(|_| {
            Code::Usage
                .err(format!("--recipient {text}: neither a public key (age1…) nor a file with one"))
                .cure("`zd keygen --backup` makes the pair; give the .pub file, or its line")
        })
    }
}

/// Comments begin with #.
fn key_line(text: &str) -> &str {
    text.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with('#')).unwrap_or_default()
}

/// A new pair: the text of the secret file, and the public half.
pub fn generate() -> Result<(String, Recipient)> {
    let identity = Identity::generate();
    let public = Recipient(identity.to_public().to_string());
    let secret = identity.to_string();
    Ok((format!("# secret key of zd backups\n# public key: {public}\n{}\n", secret.expose_secret()), public))
}

/// The secret half out of its file.
pub fn read_identity(path: &Path) -> Result<Identity> {
    let text = medium::text(path).at(path)?;
    key_line(&text).parse().map_err(|_| {
        Code::Usage
            .err(format!("{}: no secret key of backups (AGE-SECRET-KEY-1…)", path.display()))
            .cure("give the .key file that `zd keygen --backup` wrote")
    })
}
