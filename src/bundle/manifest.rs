//! The manifest: the TOML a person writes. Unknown keys and wrong types are errors with their place.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use oci_client::Reference;
use serde::{Deserialize, Serialize};

use crate::backup::Settings;
use crate::error::{Code, Error, Result};
use crate::ids::{Digest, Name, Version};

pub use super::service::{CAPABILITIES, Door, Inlet, LongLived, Service, Sessions, Tcp};
use super::signature::Key;
use super::target::Target;
use super::versions;

/// Port of the private registry, where an install is not told another. Not 5000: that is the usual HSMS port
/// of the equipment next to us.
pub const REGISTRY_PORT: u16 = 5443;
/// Ports of the full stack on loopback.
pub const STACK_PORTS: [(u16, &str); 6] = [
    (8300, "servers of Consul"),
    (8301, "gossip of Consul"),
    (8500, "HTTP of Consul"),
    (4646, "HTTP of Nomad"),
    (4647, "RPC of Nomad"),
    (4648, "gossip of Nomad"),
];
pub const CONSUL_HTTPS: &str = "HTTPS of Consul";

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Manifest {
    /// Form of this file; 1 is the only one.
    pub schema: u32,
    pub name: Name,
    pub version: Version,
    #[serde(default)]
    pub engine: Engine,
    /// Where Consul answers others than this host, too: with TLS, on the host's address, reads only.
    pub consul_https: Option<u16>,
    pub target: Target,
    #[serde(default)]
    pub packages: Packages,
    #[serde(default, rename = "image")]
    pub images: Vec<ImageSource>,
    #[serde(default, rename = "file")]
    pub files: Vec<FileSource>,
    #[serde(default, rename = "release")]
    pub releases: Vec<Release>,
    #[serde(default, rename = "service")]
    pub services: Vec<Service>,
    /// How hosts are backed up, unless one is told otherwise there.
    pub backup: Option<Settings>,
    /// Public keys, as a line of their .pub files, that no host is to trust any more.
    #[serde(default)]
    pub revoked_keys: Vec<Key>,
}

/// Who runs the containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    #[default]
    Docker,
    Nomad,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Engine::Docker => "docker",
            Engine::Nomad => "nomad",
        })
    }
}

/// OS packages by the part they play; each closure is resolved for the target's release.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Packages {
    #[serde(default)]
    pub docker: Vec<String>,
    #[serde(default)]
    pub registry: Vec<String>,
    #[serde(default)]
    pub nginx: Vec<String>,
    #[serde(default)]
    pub logrotate: Vec<String>,
    /// More packages the site wants.
    #[serde(default)]
    pub extra: Vec<String>,
    /// An apt sources file to use instead of this machine's own.
    #[serde(default, skip_serializing)]
    pub sources: Option<PathBuf>,
    /// Sources may be marked as trusted without a signature.
    #[serde(default, skip_serializing)]
    pub unsigned_packages: bool,
}

impl Packages {
    pub fn all(&self) -> impl Iterator<Item = &String> {
        [&self.docker, &self.registry, &self.nginx, &self.logrotate, &self.extra].into_iter().flatten()
    }
}

/// One image and where to take it from: exactly one of the four.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ImageSource {
    /// `name:version` under which the registry will serve it.
    #[serde(rename = "ref")]
    pub reference: ImageRef,
    /// An image of the Docker daemon of this machine.
    pub docker: Option<String>,
    /// An OCI image layout: a tar, or a folder.
    pub oci: Option<PathBuf>,
    /// A tar made by `docker save`.
    pub docker_archive: Option<PathBuf>,
    /// An image of a registry.
    pub registry: Option<RegistryRef>,
    /// With `registry`: certificates of CAs that sign for it, besides those that this machine trusts (PEM).
    pub ca: Option<PathBuf>,
    /// With `registry`: it speaks HTTP without TLS.
    #[serde(default)]
    pub plain_http: bool,
}

impl ImageSource {
    fn problem(&self) -> Option<&'static str> {
        let sources = [
            self.docker.is_some(),
            self.docker_archive.is_some(),
            self.oci.is_some(),
            self.registry.is_some(),
        ];
        if sources.iter().filter(|s| **s).count() != 1 {
            return Some("give exactly one of docker, docker-archive, oci, registry");
        }
        match (&self.registry, &self.ca, self.plain_http) {
            (None, Some(_), _) | (None, _, true) => Some("ca and plain-http belong to registry"),
            (Some(_), Some(_), true) => Some("give ca or plain-http = true, not both"),
            _ => None,
        }
    }
}

/// An image of a registry, named in full: `host[:port]/repository`, then `:tag` or `@sha256:…`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct RegistryRef(pub Reference);

impl TryFrom<String> for RegistryRef {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        let bad = |why: &str| format!("{s:?} {why}: expected host[:port]/repository:tag, or …@sha256:…");
        let reference: Reference = s.parse().map_err(|e| bad(&format!("names no image ({e})")))?;
        // What Docker would fill in: its own registry, and the tag that says nothing.
        let host = s.split_once('/').map_or("", |(host, _)| host);
        if !host.contains(['.', ':']) && host != "localhost" {
            return Err(bad("names no registry"));
        }
        match (reference.digest(), reference.tag()) {
            (Some(digest), _) if digest.parse::<Digest>().is_err() => {
                Err(bad("has a digest of another kind"))
            }
            (None, Some(tag)) if !s.ends_with(&format!(":{tag}")) => Err(bad("names no tag and no digest")),
            _ => Ok(Self(reference)),
        }
    }
}

/// `name:version`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    pub name: Name,
    pub version: Version,
}

impl FromStr for ImageRef {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let (name, version) = s.split_once(':').ok_or_else(|| format!("{s:?} is not name:version"))?;
        Ok(Self { name: name.parse()?, version: version.parse()? })
    }
}

impl TryFrom<String> for ImageRef {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<ImageRef> for String {
    fn from(r: ImageRef) -> String {
        r.to_string()
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.version)
    }
}

/// A file to carry: from a URL with its sum, or from a path.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FileSource {
    pub name: Version,
    pub url: Option<String>,
    /// Needed with `url`: 64 hexadecimal digits.
    pub sha256: Option<String>,
    pub path: Option<PathBuf>,
}

/// A program that HashiCorp releases: what the nomad engine is made of.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Release {
    pub product: Product,
    pub version: Version,
    /// Earlier versions that an upgrade goes through where a host is too far behind, oldest first.
    #[serde(default)]
    pub via: Vec<Version>,
    /// Taken without any signature: the site answers for its own build. The lock says so.
    #[serde(default)]
    pub unsigned: bool,
    /// The site's own OpenPGP public key, for builds that the site signs; HashiCorp's where not given.
    pub key: Option<PathBuf>,
}

impl Release {
    /// Those between, then the one that it is about.
    pub fn versions(&self) -> impl Iterator<Item = &Version> {
        self.via.iter().chain([&self.version])
    }

    fn via_problems(&self) -> Vec<String> {
        let (product, rules) = (self.product, versions::rules(self.product));
        let mut found = Vec::new();
        if rules.is_free() && !self.via.is_empty() {
            found.push(format!(
                "release {product}: leave via out: it keeps no data, so any version may follow"
            ));
        }
        let versions: Vec<&Version> = self.versions().collect();
        for hop in versions.windows(2) {
            let (from, to) = (hop[0], hop[1]);
            if from.numbers() >= to.numbers() {
                found.push(format!(
                    "release {product}: via lists {from} before {to}; oldest first, all before {}",
                    self.version
                ));
                continue;
            }
            match rules.route(from, to, []) {
                Some(way) if way.missing.is_empty() => {}
                Some(way) => found.push(format!(
                    "release {product}: {to} does not follow {from}: add {} to via ({})",
                    way.missing.join(", "),
                    rules.pages(from, to)
                )),
                None => found.push(format!(
                    "release {product}: this zd does not know whether {to} may follow {from} ({})",
                    rules.pages(from, to)
                )),
            }
        }
        found
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Product {
    Nomad,
    Consul,
    ConsulTemplate,
}

impl Product {
    pub const ALL: [Product; 3] = [Product::Nomad, Product::Consul, Product::ConsulTemplate];

    /// Name of its folder at the origin, and of its binary.
    pub fn as_str(self) -> &'static str {
        match self {
            Product::Nomad => "nomad",
            Product::Consul => "consul",
            Product::ConsulTemplate => "consul-template",
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Manifest {
    /// Parses and checks. All problems of meaning are reported at once.
    pub fn parse(text: &str) -> Result<Self> {
        let manifest: Manifest = toml::from_str(text).map_err(|e| {
            Code::Manifest
                .err(format!("the manifest cannot be read:\n{}", e.to_string().trim_end()))
                .cure("correct the line shown; manifests/demo.toml shows every key")
        })?;
        let problems = manifest.problems();
        if problems.is_empty() {
            return Ok(manifest);
        }
        Err(Error {
            code: Code::Manifest,
            what: format!("the manifest asks for what cannot be:\n  - {}", problems.join("\n  - ")),
            cure: Some("correct these; manifests/demo.toml shows every key".into()),
        })
    }

    fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.schema != 1 {
            found.push(format!("schema = {}: this zd reads schema 1", self.schema));
        }
        for e in [self.target.codename().err(), self.target.deb_arch().err()].into_iter().flatten() {
            found.push(e.what);
        }
        let mut refs = BTreeSet::new();
        for image in &self.images {
            found.extend(image.problem().map(|why| format!("image {}: {why}", image.reference)));
            if !refs.insert(&image.reference) {
                found.push(format!("image {} is listed twice", image.reference));
            }
        }
        let mut names = BTreeSet::new();
        for file in &self.files {
            if !names.insert(&file.name) {
                found.push(format!("file {} is listed twice", file.name));
            }
            match (&file.url, &file.sha256, &file.path) {
                (Some(_), Some(sum), None) => {
                    if format!("sha256:{sum}").parse::<Digest>().is_err() {
                        found.push(format!(
                            "file {}: sha256 is not 64 lower-case hexadecimal digits",
                            file.name
                        ));
                    }
                }
                (None, None, Some(_)) => {}
                _ => found.push(format!("file {}: give url and sha256, or path", file.name)),
            }
        }
        self.release_problems(&mut found);
        self.service_problems(&refs, &mut found);
        found.extend(self.backup.iter().flat_map(Settings::problems));
        found
    }

    fn release_problems(&self, found: &mut Vec<String>) {
        let mut products = BTreeSet::new();
        for release in &self.releases {
            let product = release.product;
            if !products.insert(product) {
                found.push(format!("release {product} is listed twice"));
            }
            if release.unsigned && release.key.is_some() {
                found.push(format!("release {product}: give key or unsigned = true, not both"));
            }
            for version in release.versions().filter(|_| product == Product::Nomad) {
                if ["1.1.0", "1.1.1", "1.1.2"].contains(&version.as_str()) {
                    found.push(format!(
                        "release nomad {version}: it removes what runs when it is restarted (its issue 10907); \
                         use 1.1.3 or later"
                    ));
                }
            }
            found.extend(release.via_problems());
            if self.engine == Engine::Docker {
                found.push(format!("release {product}: the docker engine runs none of them"));
            }
        }
        if self.engine == Engine::Nomad && !self.services.is_empty() {
            for missing in Product::ALL.iter().filter(|p| !products.contains(p)) {
                found.push(format!("release {missing} is missing: the nomad engine needs it on a bare host"));
            }
        }
    }

    fn service_problems(&self, refs: &BTreeSet<&ImageRef>, found: &mut Vec<String>) {
        let mut names = BTreeSet::new();
        let mut ports = BTreeMap::from([(REGISTRY_PORT, "the private registry".to_owned())]);
        if self.engine == Engine::Nomad {
            ports.extend(STACK_PORTS.map(|(port, what)| (port, format!("the {what}"))));
        }
        if let Some(port) = self.consul_https {
            if self.engine == Engine::Docker {
                found.push("consul-https: the docker engine runs no Consul".to_owned());
            }
            if port < 1024 {
                found.push(format!("consul-https = {port}: Consul has no right to ports below 1024"));
            }
            if let Some(other) = ports.insert(port, format!("the {CONSUL_HTTPS}")) {
                found.push(format!("consul-https: port {port} is already taken by {other}"));
            }
        }
        for service in &self.services {
            let name = &service.name;
            if !names.insert(name) {
                found.push(format!("service {name} is listed twice"));
            }
            let wanted = ImageRef { name: service.image.clone(), version: service.version.clone() };
            if !refs.contains(&wanted) {
                found.push(format!("service {name}: no image {wanted} is in the manifest"));
            }
            for (port, what) in service.ports() {
                let taker = format!("the {what} of {name}");
                if let Some(other) = ports.insert(port, taker) {
                    found.push(format!("service {name}: port {port} is already taken by {other}"));
                }
            }
            found.extend(service.problems());
        }
        if !self.services.is_empty() {
            let p = &self.packages;
            let roles = [
                ("docker", &p.docker),
                ("registry", &p.registry),
                ("nginx", &p.nginx),
                ("logrotate", &p.logrotate),
            ];
            for (role, list) in roles {
                if list.is_empty() {
                    let engine = self.engine;
                    found.push(format!(
                        "packages.{role} is empty: the {engine} engine needs it on a bare host"
                    ));
                }
            }
        }
        for package in self.packages.all() {
            let plain =
                package.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
            if package.is_empty() || package.starts_with('-') || !plain {
                found.push(format!("package {package:?} is not a package name"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
schema = 1
name = "demo"
version = "1"
[target]
os = "debian"
release = "12"
[packages]
docker = ["docker.io"]
registry = ["docker-registry"]
nginx = ["nginx-light"]
logrotate = ["logrotate"]
[[image]]
ref = "hello:v1"
docker = "hello:v1"
[[service]]
name = "hello"
image = "hello"
version = "v1"
port = 8080
listen = 80
standby-listen = 8081
"#;

    #[test]
    fn the_place_of_an_unknown_key_is_shown() {
        let e = Manifest::parse(&GOOD.replace("listen = 80\n", "lisen = 80\n")).unwrap_err();
        assert!(e.what.contains("lisen") && e.what.contains("line 21, column 1"), "{}", e.what);
    }

    #[test]
    fn the_place_of_a_wrong_type_is_shown() {
        let e = Manifest::parse(&GOOD.replace("port = 8080", "port = \"x\"")).unwrap_err();
        assert!(e.what.contains("line 20, column 8") && e.what.contains("u16"), "{}", e.what);
    }

    #[test]
    fn problems_of_meaning_come_all_at_once() {
        let bad = GOOD.replace("8081", "80").replace("\"v1\"", "\"v9\"").replace("schema = 1", "schema = 7");
        let e = Manifest::parse(&bad).unwrap_err();
        for part in ["schema = 7", "no image hello:v9", "port 80 is already taken"] {
            assert!(e.what.contains(part), "{part}: {}", e.what);
        }
        assert!(Manifest::parse(GOOD).is_ok());
    }

    #[test]
    fn backups_are_settings_of_the_site() {
        let key = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";
        let with = |more: &str| Manifest::parse(&format!("{GOOD}[backup]\nrecipient = {key:?}\n{more}"));
        assert_eq!(with("every = \"week\"\n").unwrap().backup.unwrap().keep, 14);
        assert_eq!(Manifest::parse(GOOD).unwrap().backup, None);
        let e = with("keep = 0\nto = \"x\"\n").unwrap_err().what;
        assert!(e.contains("keep = 0") && e.contains("to = \"x\""), "{e}");
        let e = Manifest::parse(&format!("{GOOD}[backup]\nrecipient = \"age1x\"\n")).unwrap_err().what;
        assert!(e.contains("is not a public key as age1"), "{e}");
    }

    #[test]
    fn containers_have_no_rights_but_those_given() {
        let with = |more: &str| Manifest::parse(&format!("{GOOD}{more}"));
        let given =
            "capabilities = [\"NET_BIND_SERVICE\", \"CHOWN\"]\nread-only = true\nuser = \"1000:www-data\"\n";
        let service = with(given).unwrap().services.remove(0);
        let text = serde_json::to_string(&service).unwrap();
        let lock = r#""capabilities":["CHOWN","NET_BIND_SERVICE"],"read-only":true,"user":"1000:www-data""#;
        assert!(text.contains(lock), "{text}");
        assert_eq!(serde_json::from_str::<Service>(&text).unwrap(), service);
        // A lock without any has the bytes that it always had.
        let text = serde_json::to_string(&Manifest::parse(GOOD).unwrap().services[0]).unwrap();
        assert!(!["capabilities", "read-only", "user"].iter().any(|key| text.contains(key)), "{text}");

        for (wrong, why) in [
            ("capabilities = [\"NET_RAW\"]\n", "capability \"NET_RAW\": expected some of AUDIT_WRITE, CHOWN"),
            ("capabilities = [\"ALL\"]\n", "capability \"ALL\""),
            ("capabilities = [\"chown\"]\n", "capability \"chown\""),
            ("user = \"\"\n", "user \"\": expected user or user:group, such as 1000:1000"),
            ("user = \"1:\"\n", "user \"1:\""),
            ("user = \"a b\"\n", "user \"a b\""),
            ("user = \"1:2:3\"\n", "user \"1:2:3\""),
            ("privileged = true\n", "unknown field `privileged`"),
        ] {
            let said = with(wrong).unwrap_err().what;
            assert!(said.contains(why), "{wrong}: {said}");
        }
    }

    #[test]
    fn tcp_ports_have_defaults_and_a_policy() {
        let tcp = |more: &str| Manifest::parse(&format!("{GOOD}[[service.tcp]]\nport = 5000\n{more}"));
        let plain = tcp("").unwrap().services.remove(0);
        let port = &plain.tcp[0];
        let drain = |service: &Service| service.inlets()[0].drain().as_millis();
        assert_eq!((port.listen(), port.sessions, drain(&plain)), (5000, Sessions::Drain, 2000));
        assert_eq!(plain.client_ports().collect::<Vec<_>>(), [80, 5000]);
        let other = tcp("listen = 5001\nsessions = \"drain\"\ndrain-ms = 0\n").unwrap().services.remove(0);
        assert_eq!((other.tcp[0].listen(), drain(&other)), (5001, 0));
        assert_eq!(tcp("sessions = \"cut\"\n").unwrap().services[0].tcp[0].sessions, Sessions::Cut);
        // A lock without TCP ports has the bytes that it always had.
        let text = serde_json::to_string(&Manifest::parse(GOOD).unwrap().services[0]).unwrap();
        assert!(!text.contains("tcp"), "{text}");
        let text = serde_json::to_string(&other).unwrap();
        assert_eq!(serde_json::from_str::<Service>(&text).unwrap(), other);

        let said = |more: &str| tcp(more).unwrap_err().what;
        assert!(
            said("sessions = \"keep\"\n").contains("expected `drain` or `cut`"),
            "{}",
            said("sessions = \"keep\"\n")
        );
        assert!(
            said("sessions = \"cut\"\ndrain-ms = 5\n").contains("drain-ms belongs to sessions = \"drain\"")
        );
        assert!(said("drain-ms = 60001\n").contains("tcp port 5000: drain-ms = 60001: at most 60000"));
        assert!(said("listen = 0\n").contains("port 0 cannot be listened on"));
    }

    #[test]
    fn long_lived_paths_have_a_policy_each() {
        let long = |more: &str| Manifest::parse(&format!("{GOOD}[[service.long-lived]]\n{more}"));
        let plain = long("path = \"/ws/\"\n").unwrap().services.remove(0);
        let inlet = &plain.inlets()[0];
        assert_eq!((inlet.door.to_string(), inlet.sessions), ("path /ws/".into(), Sessions::Drain));
        let text = serde_json::to_string(&plain).unwrap();
        assert!(text.contains("\"long-lived\":[{\"path\":\"/ws/\",\"sessions\":\"drain\"}]"), "{text}");
        assert_eq!(serde_json::from_str::<Service>(&text).unwrap(), plain);
        // A lock without such paths has the bytes that it always had.
        let text = serde_json::to_string(&Manifest::parse(GOOD).unwrap().services[0]).unwrap();
        assert!(!text.contains("long"), "{text}");

        let said = |more: &str| long(more).unwrap_err().what;
        for (wrong, why) in [
            ("path = \"/\"\n", "long-lived path / is in paths too"),
            ("path = \"/health\"\n", "long-lived path /health is that of health"),
            ("path = \"/a\"\n[[service.long-lived]]\npath = \"/a\"\n", "long-lived path /a is listed twice"),
            ("path = \"a\"\n", "path \"a\": expected / and then"),
            ("path = \"/a b\"\n", "path \"/a b\": expected / and then"),
            ("path = \"/a\"\nport = 1\n", "unknown field `port`"),
            ("sessions = \"cut\"\n", "missing field `path`"),
            ("path = \"/a\"\ndrain-ms = 60001\n", "path /a: drain-ms = 60001: at most 60000"),
            ("path = \"/a\"\nsessions = \"cut\"\ndrain-ms = 1\n", "drain-ms belongs to sessions = \"drain\""),
        ] {
            assert!(said(wrong).contains(why), "{wrong}: {}", said(wrong));
        }
    }

    #[test]
    fn what_a_client_may_take_has_bounds() {
        let with = |more: &str| Manifest::parse(&format!("{GOOD}[service.clients]\n{more}"));
        let text = serde_json::to_string(&with("").unwrap().services[0]).unwrap();
        assert!(
            !text.contains("clients"),
            "a lock with the defaults has the bytes that it always had: {text}"
        );
        let some = with("max-body-mb = 2000\n").unwrap().services.remove(0);
        assert_eq!((some.clients.max_body_mb, some.clients.header_timeout), (2000, 20));
        let text = serde_json::to_string(&some).unwrap();
        assert_eq!(serde_json::from_str::<Service>(&text).unwrap(), some);
        let said = with("max-body-mb = 0\nbody-timeout = 601\n").unwrap_err().what;
        for part in
            ["clients.max-body-mb = 0: expected 1 to", "clients.body-timeout = 601: expected 1 to 600"]
        {
            assert!(said.contains(part), "{said}");
        }
        assert!(with("max-body = 5\n").unwrap_err().what.contains("unknown field `max-body`"));
    }

    #[test]
    fn ports_that_clash_are_named_with_who_has_them() {
        let said = |text: String| Manifest::parse(&text).unwrap_err().what;
        let tcp = |listen: u16| format!("{GOOD}[[service.tcp]]\nport = 5000\nlisten = {listen}\n");
        for (listen, owner) in [
            (80, "the service of hello"),
            (8081, "the standby entry of hello"),
            (5443, "the private registry"),
        ] {
            let wanted = format!("service hello: port {listen} is already taken by {owner}");
            assert!(said(tcp(listen)).contains(&wanted), "{}", said(tcp(listen)));
        }
        let second =
            GOOD[GOOD.find("[[service]]").unwrap()..].replace("\"hello\"\nimage", "\"other\"\nimage");
        let second = second.replace("= 80\n", "= 5000\n").replace("8081", "8082");
        let both = said(tcp(5000) + &second);
        assert!(
            both.contains("service other: port 5000 is already taken by the TCP service of hello"),
            "{both}"
        );
        let consul = tcp(8500);
        assert!(Manifest::parse(&consul).is_ok());
        let consul = said(consul.replace("[target]", "engine = \"nomad\"\n[target]"));
        assert!(consul.contains("port 8500 is already taken by the HTTP of Consul"), "{consul}");
    }

    #[test]
    fn releases_belong_to_the_nomad_engine() {
        let releases = |list: &[&str]| -> String {
            list.iter().map(|p| format!("[[release]]\nproduct = \"{p}\"\nversion = \"1.2.3\"\n")).collect()
        };
        let nomad = GOOD.replace("[target]", "engine = \"nomad\"\n[target]");
        let all = releases(&["nomad", "consul", "consul-template"]);
        assert!(Manifest::parse(&format!("{nomad}{all}")).is_ok());

        let said = |text: String| Manifest::parse(&text).unwrap_err().what;
        let docker = said(format!("{GOOD}{all}"));
        assert!(docker.contains("release consul: the docker engine runs none of them"), "{docker}");
        let bare = said(nomad.clone());
        assert!(bare.contains("release consul-template is missing: the nomad engine needs it"), "{bare}");
        let twice = said(format!("{nomad}{all}{}", releases(&["consul"])));
        assert!(twice.contains("release consul is listed twice"), "{twice}");
        let both = said(format!("{nomad}{all}unsigned = true\nkey = \"site.asc\"\n"));
        assert!(both.contains("release consul-template: give key or unsigned = true, not both"), "{both}");
        let other = said(format!("{nomad}{}", releases(&["vault"])));
        assert!(other.contains("unknown variant `vault`"), "{other}");
    }

    #[test]
    fn via_lists_versions_that_may_follow_each_other() {
        let with = |product: &str, version: &str, via: &str| {
            let nomad = GOOD.replace("[target]", "engine = \"nomad\"\n[target]");
            let services = nomad.find("[[service]]").unwrap();
            let release = format!("[[release]]\nproduct = {product:?}\nversion = {version:?}\nvia = {via}\n");
            Manifest::parse(&format!("{}{release}", &nomad[..services]))
        };
        let good = with("nomad", "2.0.5", r#"["1.8.4", "1.10.5", "1.11.3"]"#).unwrap();
        assert_eq!(good.releases[0].via.len(), 3);
        for (product, version, via, why) in [
            (
                "nomad",
                "2.0.5",
                r#"["1.8.4", "1.11.3"]"#,
                "1.11.3 does not follow 1.8.4: add 1.10.x to via (https://",
            ),
            ("nomad", "2.0.5", r#"["1.10.5"]"#, "2.0.5 does not follow 1.10.5: add 1.11.x to via"),
            (
                "nomad",
                "1.8.4",
                r#"["1.8.4"]"#,
                "via lists 1.8.4 before 1.8.4; oldest first, all before 1.8.4",
            ),
            ("nomad", "1.10.5", r#"["1.9.0", "1.8.4"]"#, "via lists 1.9.0 before 1.8.4"),
            ("nomad", "9.1.0", r#"["2.0.5"]"#, "this zd does not know whether 9.1.0 may follow 2.0.5"),
            ("nomad", "1.3.1", r#"["1.1.2"]"#, "release nomad 1.1.2: it removes what runs"),
            ("consul", "2.0.1", r#"["1.21.4"]"#, "2.0.1 does not follow 1.21.4: add 1.22.x to via"),
            ("consul-template", "0.41.0", r#"["0.33.0"]"#, "release consul-template: leave via out"),
        ] {
            let said = with(product, version, via).unwrap_err().what;
            assert!(said.contains(why), "{via}: {said}");
        }
    }

    #[test]
    fn consul_may_have_a_port_for_others() {
        let said = |key: &str, engine: &str| {
            let text =
                GOOD.replace("[target]", &format!("engine = \"{engine}\"\nconsul-https = {key}\n[target]"));
            Manifest::parse(&text).unwrap_err().what
        };
        let docker = said("8501", "docker");
        assert!(docker.contains("consul-https: the docker engine runs no Consul"), "{docker}");
        let low = said("443", "nomad");
        assert!(low.contains("consul-https = 443: Consul has no right to ports below 1024"), "{low}");
        let taken = said("8500", "nomad");
        assert!(taken.contains("consul-https: port 8500 is already taken by the HTTP of Consul"), "{taken}");
        let service = said("8081", "nomad");
        assert!(
            service.contains("service hello: port 8081 is already taken by the HTTPS of Consul"),
            "{service}"
        );
    }

    #[test]
    fn an_image_of_a_registry_is_named_in_full() {
        let image = |keys: &str| Manifest::parse(&GOOD.replace("docker = \"hello:v1\"", keys));
        let sum = format!("sha256:{}", "a".repeat(64));
        for good in
            ["harbor.plant:5000/eap/hello:1.4.2", "localhost/hello:v1", &format!("reg.example/h@{sum}")]
        {
            let images = image(&format!("registry = {good:?}\nca = \"ca.pem\"")).unwrap().images;
            assert_eq!(images[0].registry.as_ref().unwrap().0.whole(), good);
        }
        for (bad, why) in [
            ("registry = \"eap/hello:v1\"", "names no registry: expected host[:port]/repository:tag"),
            ("registry = \"harbor.plant:5000/eap/hello\"", "names no tag and no digest"),
            ("registry = \"reg.example/Hello:v1\"", "names no image"),
            (&format!("registry = \"reg.example/h@sha512:{}\"", "a".repeat(128)), "digest of another kind"),
            ("docker = \"h\"\nplain-http = true", "ca and plain-http belong to registry"),
            (
                "registry = \"reg.example/h:v1\"\nplain-http = true\nca = \"c\"",
                "ca or plain-http = true, not both",
            ),
        ] {
            let said = image(bad).unwrap_err().what;
            assert!(said.contains(why), "{bad}: {said}");
        }
    }

    #[test]
    fn the_manifests_to_start_from_are_good() {
        for text in [
            include_str!("../../manifests/demo.toml"),
            include_str!("../../manifests/hello.toml"),
            include_str!("../../manifests/drimeap.toml"),
        ] {
            Manifest::parse(text).unwrap();
        }
    }
}
