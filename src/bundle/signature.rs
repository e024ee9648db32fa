//! minisign signatures (prehashed Ed25519), so that `minisign -V` checks without zd what zd has signed: locks of
//! bundles, and what a host signs.

use std::io::Cursor;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use blake2::{Blake2b512, Digest as _};
use minisign::{KeyPair, PublicKey, SecretKeyBox, SignatureBox};
use ring::signature::Ed25519KeyPair;
use serde::{Deserialize, Serialize};

use super::medium;
use crate::error::{At, Code, OrCode, Result};
use crate::ids::Digest;

/// What a signature says it is of; no signature covers it, so nothing else may stand there.
pub const OF_LOCK: &str = "signature of a zd bundle's lock";
pub const OF_HOST: &str = "signature of a host that zd is installed on";
pub const OF_SUCCESSOR: &str = "signature of a key that follows another";

/// A public key and the text it came from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key {
    key: PublicKey,
    /// The one line that names the key, as minisign's `-P` takes it.
    pub line: String,
}

/// By the key itself: an id is chosen by whoever makes the pair.
impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.key.to_bytes() == other.key.to_bytes()
    }
}

impl TryFrom<String> for Key {
    type Error = String;
    fn try_from(line: String) -> Result<Self, String> {
        Self::parse(&line).map_err(|e| e.what)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> String {
        key.line
    }
}

impl Key {
    /// Reads a key file (two lines) or the bare base64 line.
    pub fn parse(text: &str) -> Result<Self> {
        let line = text.lines().find(|l| !l.starts_with("untrusted comment:") && !l.trim().is_empty());
        let line = line.unwrap_or_default().trim().to_owned();
        let key = PublicKey::from_base64(&line)
            .or_code(Code::Signature, "not a public key as `zd keygen` writes it")
            .map_err(|e| e.cure("give the zd.pub that belongs to the bundle"))?;
        Ok(Self { key, line })
    }

    pub fn read(path: &Path) -> Result<Self> {
        let text = medium::text(path).at(path)?;
        Self::parse(&text).map_err(|e| e.during(path.display()))
    }

    /// As `flag` names it on the command line: a file, or the key's line.
    pub fn given(flag: &str, text: &str) -> Result<Self> {
        let path = Path::new(text);
        if path.exists() {
            return Self::read(path);
        }
        Self::parse(text).map_err(|_| {
            Code::Signature
                .err(format!("{flag} {text}: neither a file that is here nor a public key's line"))
                .cure("give the .pub file of the key, or the line in it")
        })
    }

    /// For people to compare: the SHA-256 of the key's bytes, in groups of four.
    pub fn fingerprint(&self) -> String {
        let hex = Digest::of(&self.key.to_bytes()).hex().to_owned();
        let groups: Vec<&str> = (0..8).map(|i| &hex[i * 4..i * 4 + 4]).collect();
        groups.join(" ")
    }

    /// As minisign calls it.
    pub fn id(&self) -> String {
        key_id(self.key.keynum())
    }

    pub fn file_text(&self) -> String {
        format!("untrusted comment: minisign public key {}\n{}\n", self.id(), self.line)
    }
}

fn key_id(keynum: &[u8]) -> String {
    keynum.iter().rev().map(|b| format!("{b:02X}")).collect()
}

/// A new pair: secret key file text, public key. With a password the secret is encrypted (scrypt).
pub fn generate(password: Option<String>) -> Result<(String, Key)> {
    let pair = match &password {
        Some(p) => KeyPair::generate_encrypted_keypair(Some(p.clone())),
        None => KeyPair::generate_unencrypted_keypair(),
    };
    let pair = pair.or_code(Code::Bug, "making a key pair")?;
    let secret = pair.sk.to_box(Some("zd secret key")).or_code(Code::Bug, "writing the secret key")?;
    let key = Key { line: pair.pk.to_base64(), key: pair.pk };
    Ok((secret.into_string(), key))
}

/// Whether a secret key file is encrypted, by its KDF field; None where it is no secret key at all
/// (minisign's key format: algorithm 2, KDF 2, checksum 2, salt 32, limits 16, key 104 bytes).
fn is_encrypted(text: &str) -> Option<bool> {
    let bytes = BASE64.decode(text.lines().nth(1)?.trim()).ok()?;
    (bytes.len() == 158).then(|| bytes[2..4] != [0, 0])
}

fn no_secret_key(path: &Path) -> crate::error::Error {
    Code::Signature
        .err(format!("secret key {}: not a secret key as `zd keygen` writes it", path.display()))
        .cure("give the .key file, not the .pub file; `zd keygen` makes a pair")
}

pub struct Signer {
    pair: Ed25519KeyPair,
    pub key: Key,
}

impl Signer {
    /// Opens a secret key file; `password` is asked for only when the file is encrypted.
    pub fn read(path: &Path, password: impl FnOnce() -> Result<String>) -> Result<Self> {
        let text = medium::text(path).at(path)?;
        let doing = format!("secret key {}", path.display());
        let boxed = SecretKeyBox::from_string(&text).map_err(|_| no_secret_key(path))?;
        let secret = if is_encrypted(&text).ok_or_else(|| no_secret_key(path))? {
            boxed
                .into_secret_key(Some(password()?))
                .or_code(Code::Signature, &doing)
                .map_err(|e| e.cure("give the right password (ZD_KEY_PASSWORD, or at the prompt)"))?
        } else {
            boxed.into_unencrypted_secret_key().or_code(Code::Signature, &doing)?
        };
        let key = PublicKey::from_secret_key(&secret).or_code(Code::Signature, &doing)?;
        // The seed lies behind the key's number; the last 32 bytes of a public key are the key.
        let (secret, public) = (secret.to_bytes(), key.to_bytes());
        let pair = Ed25519KeyPair::from_seed_and_public_key(&secret[62..94], &public[10..]);
        Ok(Self { key: Key { line: key.to_base64(), key }, pair: pair.or_code(Code::Signature, &doing)? })
    }

    /// Signature file over `bytes`. `trusted` is signed with them and shown by minisign. The same bytes get the same
    /// signature (RFC 8032), as from the program minisign; the library of that name makes another each time.
    pub fn sign(&self, bytes: &[u8], of: &str, trusted: &str) -> String {
        let signature = self.pair.sign(&Blake2b512::digest(bytes));
        let global = self.pair.sign(&[signature.as_ref(), trusted.as_bytes()].concat());
        let line = BASE64.encode([b"ED", self.key.key.keynum(), signature.as_ref()].concat());
        format!("untrusted comment: {of}\n{line}\ntrusted comment: {trusted}\n{}\n", BASE64.encode(global))
    }
}

/// Why a signature does not hold.
#[derive(Debug, PartialEq)]
pub enum Fault {
    Unreadable,
    /// It is not in the one form that zd writes.
    Form,
    /// The key of this id made it, which is none of those that count.
    Key(String),
    /// It is of other bytes.
    Bytes,
}

/// Checks `signature` over the lock `bytes` against any of `trusted`; says which key it was.
pub fn verify<'k>(bytes: &[u8], signature: &str, trusted: &'k [Key]) -> Result<&'k Key> {
    let damaged = |what: &str| {
        Code::Signature
            .err(format!("the bundle's signature {what}"))
            .cure("do not use this bundle; copy it again from its source")
    };
    check(bytes, signature, OF_LOCK, trusted).map_err(|fault| match fault {
        Fault::Unreadable => damaged("cannot be read"),
        Fault::Form => damaged("is not in the form zd writes: it was altered"),
        Fault::Bytes => damaged("does not fit its lock: one of them was altered"),
        Fault::Key(id) => {
            let known: Vec<String> = trusted.iter().map(Key::id).collect();
            Code::Signature
                .err(format!(
                    "the bundle is signed with key {id}, which is not trusted here (trusted: {})",
                    if known.is_empty() { "none".into() } else { known.join(", ") }
                ))
                .cure("check with whoever packed it; an installed host trusts another key after `zd trust add FILE`, \
                       before its first install by `--key FILE`")
        }
    })
}

/// What the signature covers beside the bytes.
pub fn trusted_comment(signature: &str) -> Option<String> {
    SignatureBox::from_string(signature).ok()?.trusted_comment().ok()
}

/// The one of `keys` that made `signature` over `bytes`, in the form that zd writes for what it is `of`.
pub fn check<'k>(bytes: &[u8], signature: &str, of: &str, keys: &'k [Key]) -> Result<&'k Key, Fault> {
    // minisign takes this field's length on trust; more or fewer than 64 bytes is no Ed25519 signature.
    let global = signature.lines().nth(3).and_then(|line| BASE64.decode(line).ok());
    if global.is_none_or(|bytes| bytes.len() != 64) {
        return Err(Fault::Unreadable);
    }
    let parsed = SignatureBox::from_string(signature).map_err(|_| Fault::Unreadable)?;
    // One text per signature: bytes that no signature covers (comment, base64 slack) must not vary.
    if parsed.to_string() != signature || parsed.untrusted_comment().ok().as_deref() != Some(of) {
        return Err(Fault::Form);
    }
    let by = || Fault::Key(key_id(parsed.keynum()));
    let key = keys.iter().find(|k| k.key.keynum() == parsed.keynum()).ok_or_else(by)?;
    minisign::verify(&key.key, &parsed, Cursor::new(bytes), true, false, false).map_err(|_| Fault::Bytes)?;
    Ok(key)
}
