//! Secrets made on the host: the private CA, the registry's certificate and its password, and more. All 0600;
//! never in arguments, units, logs or receipts.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;
use x509_parser::time::ASN1Time;

use super::{fs, paths, signing};
use crate::error::{At, Code, OrCode, Result};

/// Name of the part of a configuration that only its user may read.
const PRIVATE: &str = "private.json";
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// The account that pulls. Nobody pushes with an account, see [`super::registry`].
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
    /// Consul's, where others than this host may ask it.
    ConsulCertificate {
        ip: IpAddr,
    },
    /// What Nomad pulls with, in the form of docker's config.json.
    DockerAuth {
        registry: String,
    },
    /// Nomad's certificate, for servers and clients of the region `zd`.
    NomadCertificate,
    Token(Token),
    /// The part of Consul's configuration that nobody else may read. `management` is the name that this
    /// version of Consul has for the first token.
    ConsulPrivate {
        management: String,
    },
    NomadPrivate,
    ConsulTemplatePrivate,
    /// What this host signs its log and reports with.
    SigningKey,
}

/// Tokens of the ACLs, each in a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Token {
    ConsulManagement,
    ConsulAgent,
    ConsulNomad,
    ConsulTemplate,
    ConsulZd,
    /// Made by Nomad, not by us.
    NomadManagement,
}

impl Token {
    /// Those of Consul: the first one, which makes the others, and one for each of its users.
    pub const CONSUL: [Token; 5] = [
        Token::ConsulManagement,
        Token::ConsulAgent,
        Token::ConsulNomad,
        Token::ConsulTemplate,
        Token::ConsulZd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Token::ConsulManagement => "consul-management",
            Token::ConsulAgent => "consul-agent",
            Token::ConsulNomad => "consul-nomad",
            Token::ConsulTemplate => "consul-template",
            Token::ConsulZd => "consul-zd",
            Token::NomadManagement => "nomad-management",
        }
    }

    pub fn path(self) -> PathBuf {
        Path::new(paths::SECRETS).join(self.name())
    }
}

pub fn token(token: Token) -> Result<String> {
    let path = token.path();
    std::fs::read_to_string(&path).at(&path)
}

pub fn keep(token: Token, secret: &str) -> Result<()> {
    fs::write(&token.path(), secret.as_bytes(), 0o600, None)
}

impl Secret {
    /// Files it consists of; the first is written last and so says that all are there.
    pub fn files(&self) -> Vec<PathBuf> {
        let registry = Path::new(paths::REGISTRY_ETC);
        match self {
            Secret::Ca => vec![paths::CA.into(), paths::CA_KEY.into()],
            Secret::RegistryCertificate { .. } => vec![registry.join("tls.crt"), registry.join("tls.key")],
            Secret::ConsulCertificate { .. } => vec![paths::CONSUL_CERT.into(), paths::CONSUL_KEY.into()],
            Secret::RegistryPassword => vec![paths::REGISTRY_PASSWORD.into()],
            Secret::Htpasswd => vec![registry.join("htpasswd")],
            Secret::DockerAuth { .. } => vec![paths::DOCKER_AUTH.into()],
            Secret::NomadCertificate => vec![paths::NOMAD_CERT.into(), paths::NOMAD_KEY.into()],
            Secret::Token(token) => vec![token.path()],
            Secret::ConsulPrivate { .. } => vec![Path::new(paths::CONSUL_ETC).join(PRIVATE)],
            Secret::NomadPrivate => vec![Path::new(paths::NOMAD_ETC).join(PRIVATE)],
            Secret::ConsulTemplatePrivate => vec![Path::new(paths::CONSUL_TEMPLATE_ETC).join(PRIVATE)],
            Secret::SigningKey => vec![paths::SIGNING_KEY.into(), paths::SIGNING_PUB.into()],
        }
    }

    /// Certificates that zd has made, where they are needed.
    pub fn certificates() -> [PathBuf; 4] {
        let registry = Path::new(paths::REGISTRY_ETC).join("tls.crt");
        [paths::CA.into(), registry, paths::NOMAD_CERT.into(), paths::CONSUL_CERT.into()]
    }

    /// What is there of it. One that names an address may be there for another, or spoilt: then for none.
    pub fn found(&self) -> Option<Self> {
        let path = &self.files()[0];
        path.exists().then(|| match self {
            Secret::RegistryCertificate { .. } => {
                Secret::RegistryCertificate { ip: certified(path).unwrap_or(NOWHERE) }
            }
            Secret::ConsulCertificate { .. } => {
                Secret::ConsulCertificate { ip: certified(path).unwrap_or(NOWHERE) }
            }
            Secret::DockerAuth { .. } => {
                let auths = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
                let auths: serde_json::Value = auths.unwrap_or_default();
                let registry = auths["auths"].as_object().and_then(|all| all.keys().next());
                Secret::DockerAuth { registry: registry.cloned().unwrap_or_default() }
            }
            other => other.clone(),
        })
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
                certificate(server_params("zd registry", *ip), &files, registry)
            }
            Secret::ConsulCertificate { ip } => {
                certificate(server_params("zd consul", *ip), &files, Some(paths::CONSUL_USER))
            }
            Secret::NomadCertificate => {
                let mut params = params("zd nomad");
                params.subject_alt_names = vec![SanType::IpAddress(LOCALHOST)];
                // The names that verify_server_hostname looks for.
                for name in ["server.zd.nomad", "client.zd.nomad", "localhost"] {
                    let name = name.try_into().or_code(Code::Bug, "a name of Nomad's certificate")?;
                    params.subject_alt_names.push(SanType::DnsName(name));
                }
                params.extended_key_usages =
                    vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
                certificate(params, &files, None)
            }
            Secret::RegistryPassword => {
                let password = URL_SAFE_NO_PAD.encode(random::<32>()?);
                fs::write(&files[0], password.as_bytes(), 0o600, None)
            }
            Secret::DockerAuth { registry } => {
                let account = STANDARD.encode(format!("{REGISTRY_ACCOUNT}:{}", registry_password()?));
                let auths = json!({ "auths": { registry: { "auth": account } } });
                private(&files[0], &auths, None)
            }
            Secret::Token(token) => keep(*token, &uuid()?),
            Secret::ConsulPrivate { management } => {
                let tokens = json!({
                    management: self::token(Token::ConsulManagement)?,
                    "agent": self::token(Token::ConsulAgent)?,
                });
                let config = json!({ "encrypt": gossip_key()?, "acl": { "tokens": tokens } });
                private(&files[0], &config, Some(paths::CONSUL_USER))
            }
            Secret::NomadPrivate => {
                let consul = self::token(Token::ConsulNomad)?;
                let config = json!({ "server": { "encrypt": gossip_key()? }, "consul": { "token": consul } });
                private(&files[0], &config, None)
            }
            Secret::ConsulTemplatePrivate => {
                let config = json!({ "consul": { "token": self::token(Token::ConsulTemplate)? } });
                private(&files[0], &config, Some(paths::CONSUL_TEMPLATE_USER))
            }
            Secret::SigningKey => signing::make(),
            Secret::Htpasswd => {
                let hash = bcrypt::hash_with_result(registry_password()?, BCRYPT_COST)
                    .or_code(Code::Bug, "hashing the registry's password")?
                    .format_for_version(bcrypt::Version::TwoY);
                fs::write(&files[0], format!("{REGISTRY_ACCOUNT}:{hash}\n").as_bytes(), 0o600, registry)
            }
        }
    }
}

/// The private part of a configuration.
pub fn private_config(etc: &str) -> Result<serde_json::Value> {
    let path = Path::new(etc).join(PRIVATE);
    serde_json::from_slice(&std::fs::read(&path).at(&path)?).or_code(Code::Io, path.display())
}

pub fn registry_password() -> Result<String> {
    std::fs::read_to_string(paths::REGISTRY_PASSWORD).at(paths::REGISTRY_PASSWORD)
}

/// From when until when a certificate holds (RFC 5280 section 4.1.2.5).
pub fn validity(path: &Path) -> Result<(Timestamp, Timestamp)> {
    let validity = certificate_at(path, |certificate| certificate.validity().clone())?;
    let at = |time: ASN1Time| Timestamp::from_second(time.timestamp()).or_code(Code::Io, path.display());
    Ok((at(validity.not_before)?, at(validity.not_after)?))
}

/// The address beside loopback that a certificate is for (RFC 5280 section 4.2.1.6).
fn certified(path: &Path) -> Result<IpAddr> {
    let ips = certificate_at(path, |certificate| {
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.map_or(Vec::new(), |names| names.value.general_names.clone());
        let ip = |name| match name {
            GeneralName::IPAddress(bytes) => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => None,
        };
        names.into_iter().filter_map(ip).collect::<Vec<_>>()
    })?;
    Ok(ips.into_iter().find(|ip| !ip.is_loopback()).unwrap_or(NOWHERE))
}

/// A certificate's file (PEM).
fn certificate_at<T>(path: &Path, read: impl FnOnce(&X509Certificate) -> T) -> Result<T> {
    let bytes = std::fs::read(path).at(path)?;
    let bad = |e: String| {
        Code::Io
            .err(format!("{} is no certificate: {e}", path.display()))
            .cure("put the file back from a backup")
    };
    let (_, pem) = parse_x509_pem(&bytes).map_err(|e| bad(e.to_string()))?;
    pem.parse_x509().map(|certificate| read(&certificate)).map_err(|e| bad(e.to_string()))
}

/// Bytes from the kernel.
fn random<const N: usize>() -> Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0u8; N];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).at("/dev/urandom")?;
    Ok(bytes)
}

/// The form of Consul's and Nomad's tokens (RFC 9562, version 4).
pub fn uuid() -> Result<String> {
    let mut bytes = random::<16>()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// The form of a gossip key (`consul keygen`, `nomad operator keygen`).
fn gossip_key() -> Result<String> {
    Ok(STANDARD.encode(random::<32>()?))
}

fn private(path: &Path, config: &serde_json::Value, owner: Option<&str>) -> Result<()> {
    fs::write(path, format!("{config:#}\n").as_bytes(), 0o600, owner)
}

/// A certificate of the private CA and its key; `files` are the two in this order.
fn certificate(mut params: CertificateParams, files: &[PathBuf], owner: Option<&str>) -> Result<()> {
    let pem = std::fs::read_to_string(paths::CA_KEY).at(paths::CA_KEY)?;
    let ca_key = KeyPair::from_pem(&pem).or_code(Code::Bug, "reading the CA's key")?;
    let issuer = Issuer::new(ca_params(), ca_key);
    let key = KeyPair::generate().or_code(Code::Bug, "making a key")?;
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).or_code(Code::Bug, "making a certificate")?;
    fs::write(&files[1], key.serialize_pem().as_bytes(), 0o600, owner)?;
    fs::write(&files[0], certificate.pem().as_bytes(), 0o644, owner)
}

/// For what listens on the host's address.
fn server_params(name: &str, ip: IpAddr) -> CertificateParams {
    let mut params = params(name);
    params.subject_alt_names = vec![SanType::IpAddress(ip), SanType::IpAddress(LOCALHOST)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_that_a_certificate_is_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(certified(file.path()).unwrap_err().what.contains("is no certificate"));
        let ip = IpAddr::from([10, 4, 0, 17]);
        for (names, expected) in [(vec![LOCALHOST, ip], ip), (vec![LOCALHOST], NOWHERE), (vec![], NOWHERE)] {
            let mut params = params("zd registry");
            params.subject_alt_names = names.into_iter().map(SanType::IpAddress).collect();
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            std::fs::write(file.path(), certificate.pem()).unwrap();
            assert_eq!(certified(file.path()).unwrap(), expected);
        }
    }
}
