//! Detached OpenPGP signatures (RFC 9580) of release sums. HashiCorp signs with a subkey: the primary
//! key is known by its fingerprint, it vouches for its subkeys, and one of these signed the file.

use std::path::Path;

use jiff::Timestamp as Time;
use pgp::composed::{Deserializable, DetachedSignature, SignedPublicKey, SignedPublicSubKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType, SignatureVersion};
use pgp::types::{Duration, KeyDetails, Tag, Timestamp};

use crate::assets;
use crate::error::{Code, OrCode, Result, source_file};
use crate::ids::Fingerprint;

/// Primary key of HashiCorp Security, as published on hashicorp.com/security.
const HASHICORP: &str = "C874011F0AB405110D02105534365D9472D7468F";

/// A public key with its subkeys.
pub struct PublicKey {
    key: SignedPublicKey,
    /// Whose it is, for errors.
    owner: String,
}

impl PublicKey {
    /// The one carried in zd.
    pub fn hashicorp() -> Result<Self> {
        let key = Self::parse(assets::HASHICORP_KEY, "HashiCorp's key".into())?;
        if key.fingerprint() != HASHICORP {
            return Err(Code::Bug.err(format!("HashiCorp's key in zd is {}", key.fingerprint())));
        }
        Ok(key)
    }

    /// A site's own.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| source_file(path, e))?;
        Self::parse(&text, format!("the key in {}", path.display()))
    }

    fn parse(text: &str, owner: String) -> Result<Self> {
        let keys = SignedPublicKey::from_string_many(text).and_then(|(keys, _)| keys.collect());
        let keys: Vec<SignedPublicKey> = keys
            .or_code(Code::Signature, format!("{owner} cannot be read"))
            .map_err(|e| e.cure("give one public key as `gpg --armor --export KEY` writes it"))?;
        let [key] = <[_; 1]>::try_from(keys).map_err(|keys| {
            Code::Signature
                .err(format!("{owner}: there are {} keys, expected one", keys.len()))
                .cure("give one public key as `gpg --armor --export KEY` writes it")
        })?;
        Ok(Self { key, owner })
    }

    fn fingerprint(&self) -> String {
        hex(&self.key)
    }

    /// Checks `signature` over `bytes`; says which key or subkey made it.
    pub fn verify(&self, signature: &[u8], bytes: &[u8]) -> Result<Fingerprint> {
        let refused = |why: &str| {
            Code::Signature
                .err(format!("{why} ({}, {})", self.owner, self.fingerprint()))
                .cure("do not use these files; fetch them again from where they were released")
        };
        let (signature, _) = DetachedSignature::from_reader_single(signature)
            .map_err(|e| refused(&format!("the signature cannot be read: {e}")))?;
        let signature = signature.signature;
        let signed = match signature.created() {
            Some(at) if signature.typ() == Some(SignatureType::Binary) && strong(&signature) => at,
            _ => return Err(refused("the signature is of a kind that zd does not trust")),
        };
        let primary = &self.key.primary_key;
        let subkey = self.key.public_subkeys.iter().find(|s| made_by(&signature, &s.key));
        let (by, holds) = match subkey {
            Some(subkey) => (hex(&subkey.key), signature.verify(&subkey.key, bytes)),
            None if made_by(&signature, primary) => (hex(primary), signature.verify(primary, bytes)),
            None => {
                let ids = signature.issuer_key_id();
                let issuer = ids.first().map_or("unknown".into(), |id| id.to_string().to_uppercase());
                return Err(refused(&format!("key {issuer} signed it, which is not the expected one")));
            }
        };
        holds.map_err(|_| refused("the signature does not fit: it or what it signs was altered"))?;
        let bad =
            |key: &str, why: String| refused(&format!("signed on {}, but key {key} {why}", day(signed)));
        self.primary_at(signed, subkey.is_none()).map_err(|why| bad(&self.fingerprint(), why))?;
        if let Some(subkey) = subkey {
            self.subkey_at(subkey, signed).map_err(|why| bad(&by, why))?;
        }
        by.parse().map_err(|e: String| Code::Bug.err(e))
    }

    /// Was the primary key in force at that time, and was it for signing files where it has to be?
    fn primary_at(&self, at: Timestamp, signing: bool) -> Result<(), String> {
        let (key, details) = (&self.key.primary_key, &self.key.details);
        if !details.revocation_signatures.is_empty() {
            return Err("is revoked".into());
        }
        let about_key = details.direct_signatures.iter().filter(|s| s.verify_key(key).is_ok());
        let about_users = details.users.iter().flat_map(|user| {
            user.signatures.iter().filter(|s| {
                s.typ() != Some(SignatureType::CertRevocation)
                    && s.verify_certification(key, Tag::UserId, &user.id).is_ok()
            })
        });
        // Either kind may say until when the key is good; the newest of its kind replaces those before.
        let own = [newest(about_key), newest(about_users)];
        let own: Vec<&Signature> = own.into_iter().flatten().collect();
        if own.is_empty() {
            return Err("has no valid signature by its owner".into());
        }
        if signing && !own.iter().any(|s| s.key_flags().sign()) {
            return Err("is not for signing".into());
        }
        own.iter().try_for_each(|s| in_force(key.created_at(), s.key_expiration_time(), at))
    }

    /// Was the subkey in force at that time, and is it one of this key for signing? Both must say so:
    /// else anybody could pass off somebody's signing key as one of his own (RFC 9580, 10.1.5).
    fn subkey_at(&self, subkey: &SignedPublicSubKey, at: Timestamp) -> Result<(), String> {
        let (primary, key) = (&self.key.primary_key, &subkey.key);
        if subkey.signatures.iter().any(|s| s.typ() == Some(SignatureType::SubkeyRevocation)) {
            return Err("is revoked".into());
        }
        let bindings = subkey.signatures.iter().filter(|s| s.verify_subkey_binding(primary, key).is_ok());
        let binding = newest(bindings).ok_or("is not bound to its primary key")?;
        if !binding.key_flags().sign() {
            return Err("is not for signing".into());
        }
        let back = binding.embedded_signature().filter(|s| strong(s));
        if back.is_none_or(|s| s.verify_primary_key_binding(key, primary).is_err()) {
            return Err("does not itself say that it belongs to its primary key".into());
        }
        in_force(key.created_at(), binding.key_expiration_time(), at)
    }
}

fn hex(key: &impl KeyDetails) -> String {
    format!("{:X}", key.fingerprint())
}

/// Only a hint which key to try; the signature itself decides.
fn made_by(signature: &Signature, key: &impl KeyDetails) -> bool {
    signature.issuer_fingerprint().contains(&&key.fingerprint())
        || signature.issuer_key_id().contains(&&key.legacy_key_id())
}

/// Hashes without known collisions, and the versions whose time of signing is signed too.
fn strong(signature: &Signature) -> bool {
    use HashAlgorithm::{Sha3_256, Sha3_512, Sha256, Sha384, Sha512};
    matches!(signature.version(), SignatureVersion::V4 | SignatureVersion::V6)
        && matches!(signature.hash_alg(), Some(Sha256 | Sha384 | Sha512 | Sha3_256 | Sha3_512))
}

fn newest<'a>(signatures: impl Iterator<Item = &'a Signature>) -> Option<&'a Signature> {
    signatures.filter(|s| strong(s)).max_by_key(|s| s.created())
}

/// A lifetime of 0 is none at all (RFC 9580, 5.2.3.13).
fn in_force(created: Timestamp, lifetime: Option<Duration>, at: Timestamp) -> Result<(), String> {
    if at < created {
        return Err(format!("was only made on {}", day(created)));
    }
    match lifetime.map(Duration::as_secs).filter(|n| *n > 0) {
        Some(lifetime) if at.as_secs() - created.as_secs() >= lifetime => {
            let end = Timestamp::from_secs(created.as_secs().saturating_add(lifetime));
            Err(format!("expired on {}", day(end)))
        }
        _ => Ok(()),
    }
}

/// For people: the day in UTC.
fn day(at: Timestamp) -> String {
    let at = Time::from_second(at.as_secs().into()).unwrap_or_default();
    at.strftime("%Y-%m-%d").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_carried_key_is_hashicorps() {
        let key = PublicKey::hashicorp().unwrap();
        let subkeys: Vec<String> = key.key.public_subkeys.iter().map(|s| hex(&s.key)).collect();
        assert!(subkeys.contains(&"374EC75B485913604A831CC7C820C6D5CD27AB87".into()), "{subkeys:?}");
    }

    #[test]
    fn each_subkey_signs_in_its_time_only() {
        let key = PublicKey::hashicorp().unwrap();
        let subkey_at = |end: &str, date: &str| {
            let subkey = key.key.public_subkeys.iter().find(|s| hex(&s.key).ends_with(end)).unwrap();
            let at: Time = format!("{date}T00:00:00Z").parse().unwrap();
            key.subkey_at(subkey, Timestamp::from_secs(at.as_second() as u32))
        };
        // Nomad 1.6.1 was released in July 2023.
        assert_eq!(subkey_at("CD27AB87", "2023-07-21"), Ok(()));
        assert_eq!(subkey_at("CD27AB87", "2021-04-20"), Err("was only made on 2021-04-21".into()));
        assert_eq!(subkey_at("CD27AB87", "2031-01-01"), Err("expired on 2030-03-01".into()));
        assert_eq!(subkey_at("7685B676", "2021-05-01"), Ok(()));
        assert_eq!(subkey_at("7685B676", "2023-07-21"), Err("expired on 2022-04-20".into()));
        assert_eq!(subkey_at("2379BA9A", "2023-07-21"), Err("is not for signing".into()));
    }
}
