//! OpenPGP keys as HashiCorp or a site has them: a primary key that vouches, a subkey that signs. Both
//! are ten days old.

use pgp::composed::{
    DetachedSignature, KeyType, SecretKeyParamsBuilder, SignedPublicKey, SignedSecretKey,
    SubkeyParamsBuilder, SubpacketConfig,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{KeyFlags, Signature, SignatureConfig, SignatureType, Subpacket, SubpacketData};
use pgp::ser::Serialize;
use pgp::types::{Duration, KeyDetails, Password, SigningKey, Tag, Timestamp};
use rand::rngs::OsRng;

const DAY: u32 = 24 * 3600;

pub struct Keys {
    secret: SignedSecretKey,
}

/// What is wrong with a public key, or not.
#[derive(Clone, Copy)]
pub enum Form {
    Good,
    /// So many days after it was made.
    SubkeyExpires(u32),
    PrimaryExpires(u32),
    SubkeyRevoked,
    PrimaryRevoked,
    NotForSigning,
    /// Without the subkey's own word that it belongs to the primary key.
    OneSided,
    /// Bound by somebody else's primary key.
    Foreign,
}

fn days_ago(days: f64) -> Timestamp {
    Timestamp::from_secs(Timestamp::now().as_secs() - (days * f64::from(DAY)) as u32)
}

fn empty() -> Password {
    Password::empty()
}

impl Keys {
    pub fn new() -> Self {
        Self::of(KeyType::Ed25519)
    }

    /// As HashiCorp's are.
    pub fn rsa() -> Self {
        Self::of(KeyType::Rsa(2048))
    }

    fn of(kind: KeyType) -> Self {
        let made = days_ago(10.0);
        let subkey =
            SubkeyParamsBuilder::default().key_type(kind).can_sign(true).created_at(made).build().unwrap();
        let key = SecretKeyParamsBuilder::default()
            .key_type(KeyType::Ed25519)
            .can_certify(true)
            .created_at(made)
            .primary_user_id("Site <site@fab.example>".into())
            .subkey(subkey)
            .build()
            .unwrap();
        Self { secret: key.generate(OsRng).unwrap() }
    }

    /// Fingerprint of the subkey.
    pub fn signer(&self) -> String {
        format!("{:X}", self.secret.secret_subkeys[0].key.fingerprint())
    }

    pub fn primary(&self) -> String {
        format!("{:X}", self.secret.primary_key.fingerprint())
    }

    /// The public key file.
    pub fn public(&self, form: Form) -> Vec<u8> {
        let mut key = self.secret.to_public_key();
        let lifetime = |days| SubpacketData::KeyExpirationTime(Duration::from_secs(days * DAY));
        match form {
            Form::Good => {}
            Form::SubkeyExpires(days) => self.bind(&mut key, |c| push(c, lifetime(days))),
            Form::PrimaryExpires(days) => self.certify(&mut key, |c| push(c, lifetime(days))),
            Form::NotForSigning => self.bind(&mut key, |c| {
                c.hashed_subpackets.retain(|s| !matches!(s.data, SubpacketData::KeyFlags(_)));
                let mut flags = KeyFlags::default();
                flags.set_authentication(true);
                push(c, SubpacketData::KeyFlags(flags));
            }),
            Form::OneSided => self.bind(&mut key, |c| {
                let other = |s: &Subpacket| !matches!(s.data, SubpacketData::EmbeddedSignature(_));
                c.hashed_subpackets.retain(other);
                c.unhashed_subpackets.retain(other);
            }),
            Form::SubkeyRevoked => {
                let binding = key.public_subkeys[0].signatures[0].clone();
                self.bind(&mut key, |c| c.typ = SignatureType::SubkeyRevocation);
                key.public_subkeys[0].signatures.insert(0, binding);
            }
            Form::PrimaryRevoked => {
                let mut config = config(&key.details.users[0].signatures[0]);
                config.typ = SignatureType::KeyRevocation;
                let signed = config.sign_key(&self.secret.primary_key, &empty(), &key.primary_key).unwrap();
                key.details.revocation_signatures.push(signed);
            }
            Form::Foreign => {
                let other = Keys::new().secret.to_public_key();
                key.primary_key = other.primary_key;
                key.details = other.details;
            }
        }
        key.to_armored_bytes(Default::default()).unwrap()
    }

    /// The subkey's binding, changed and signed again.
    fn bind(&self, key: &mut SignedPublicKey, change: impl FnOnce(&mut SignatureConfig)) {
        let subkey = &mut key.public_subkeys[0];
        let mut config = config(&subkey.signatures[0]);
        change(&mut config);
        let primary = &self.secret.primary_key;
        let signed = config.sign_subkey_binding(primary, &key.primary_key, &empty(), &subkey.key);
        subkey.signatures = vec![signed.unwrap()];
    }

    /// What the primary key says of itself, changed and signed again.
    fn certify(&self, key: &mut SignedPublicKey, change: impl FnOnce(&mut SignatureConfig)) {
        let user = &mut key.details.users[0];
        let mut config = config(&user.signatures[0]);
        change(&mut config);
        let primary = &self.secret.primary_key;
        let signed = config.sign_certification(primary, &key.primary_key, &empty(), Tag::UserId, &user.id);
        user.signatures = vec![signed.unwrap()];
    }

    /// A detached signature by the subkey, made now.
    pub fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        self.sign_at(bytes, 0.0)
    }

    pub fn sign_at(&self, bytes: &[u8], days: f64) -> Vec<u8> {
        detached(&self.secret.secret_subkeys[0].key, bytes, days, HashAlgorithm::Sha256)
    }

    /// By the primary key, which is not for that.
    pub fn sign_by_primary(&self, bytes: &[u8]) -> Vec<u8> {
        detached(&self.secret.primary_key, bytes, 0.0, HashAlgorithm::Sha256)
    }

    pub fn sign_with_sha1(&self, bytes: &[u8]) -> Vec<u8> {
        detached(&self.secret.secret_subkeys[0].key, bytes, 0.0, HashAlgorithm::Sha1)
    }
}

fn config(signature: &Signature) -> SignatureConfig {
    signature.config().unwrap().clone()
}

fn push(config: &mut SignatureConfig, data: SubpacketData) {
    config.hashed_subpackets.push(Subpacket::regular(data).unwrap());
}

fn detached(key: &impl SigningKey, bytes: &[u8], days: f64, hash: HashAlgorithm) -> Vec<u8> {
    let hashed = [
        SubpacketData::SignatureCreationTime(days_ago(days)),
        SubpacketData::IssuerFingerprint(key.fingerprint()),
    ];
    let hashed = hashed.map(|data| Subpacket::regular(data).unwrap()).into();
    let parts = SubpacketConfig::UserDefined { hashed, unhashed: vec![] };
    DetachedSignature::sign_binary_data_with_subpackets(OsRng, key, &empty(), hash, bytes, parts)
        .unwrap()
        .to_bytes()
        .unwrap()
}
