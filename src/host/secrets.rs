//! Secrets made on the host: the private CA, the registry's certificate and its password. All 0600;
//! never in arguments, units, logs or receipts.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use base64::Engine;
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde::{Deserialize, Serialize};

use super::{fs, paths};
use crate::error::{At, Code, OrCode, Result};

/// The account that pushes and pulls.
pub const REGISTRY_ACCOUNT: &str = "zd";
/// Cost 5: the password is 256 random bits, and the registry hashes it at every request.
const BCRYPT_COST: u32 = 5;
/// A certificate that ends is a site that stops; a host does not live longer than this.
const YEARS: i32 = 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Secret {
    Ca,
    /// The registry's certificate for this address.
    RegistryCertificate {
        ip: IpAddr,
    },
    RegistryPassword,
    Htpasswd,
}

impl Secret {
    /// Files it consists of; the first is written last and so says that all are there.
    pub fn files(&self) -> Vec<PathBuf> {
        let registry = Path::new(paths::REGISTRY_ETC);
        match self {
            Secret::Ca => vec![paths::CA.into(), paths::CA_KEY.into()],
            Secret::RegistryCertificate { .. } => vec![registry.join("tls.crt"), registry.join("tls.key")],
            Secret::RegistryPassword => vec![paths::REGISTRY_PASSWORD.into()],
            Secret::Htpasswd => vec![registry.join("htpasswd")],
        }
    }

    pub fn make(&self) -> Result<()> {
        let files = self.files();
        let registry = Some(paths::REGISTRY_USER);
        match self {
            Secret::Ca => {
                let key = KeyPair::generate().or_code(Code::Bug, "making the CA's key")?;
                let certificate = ca_params().self_signed(&key).or_code(Code::Bug, "making the CA")?;
                fs::write(&files[1], key.serialize_pem().as_bytes(), 0o600, None)?;
                fs::write(&files[0], certificate.pem().as_bytes(), 0o644, None)
            }
            Secret::RegistryCertificate { ip } => {
                let pem = std::fs::read_to_string(paths::CA_KEY).at(paths::CA_KEY)?;
                let ca_key = KeyPair::from_pem(&pem).or_code(Code::Bug, "reading the CA's key")?;
                let issuer = Issuer::new(ca_params(), ca_key);
                let key = KeyPair::generate().or_code(Code::Bug, "making the registry's key")?;
                let mut params = params("zd registry");
                params.subject_alt_names =
                    vec![SanType::IpAddress(*ip), SanType::IpAddress([127, 0, 0, 1].into())];
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
                params.use_authority_key_identifier_extension = true;
                let certificate = params
                    .signed_by(&key, &issuer)
                    .or_code(Code::Bug, "making the registry's certificate")?;
                fs::write(&files[1], key.serialize_pem().as_bytes(), 0o600, registry)?;
                fs::write(&files[0], certificate.pem().as_bytes(), 0o644, registry)
            }
            Secret::RegistryPassword => fs::write(&files[0], random()?.as_bytes(), 0o600, None),
            Secret::Htpasswd => {
                let hash = bcrypt::hash_with_result(registry_password()?, BCRYPT_COST)
                    .or_code(Code::Bug, "hashing the registry's password")?
                    .format_for_version(bcrypt::Version::TwoY);
                fs::write(&files[0], format!("{REGISTRY_ACCOUNT}:{hash}\n").as_bytes(), 0o600, registry)
            }
        }
    }
}

pub fn registry_password() -> Result<String> {
    std::fs::read_to_string(paths::REGISTRY_PASSWORD).at(paths::REGISTRY_PASSWORD)
}

/// 256 bits from the kernel, in base64 without characters that need quoting.
fn random() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; 32];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).at("/dev/urandom")?;
    Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    // From the first of this month: another clock on the fab's network may be behind.
    params.not_before = rcgen::date_time_ymd(i32::from(now.year()), now.month() as u8, 1);
    params.not_after = rcgen::date_time_ymd(i32::from(now.year()) + YEARS, now.month() as u8, 1);
    params
}

fn ca_params() -> CertificateParams {
    let mut params = params("zd private CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}
