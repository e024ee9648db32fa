//! A service of the manifest: what is run blue-green, on which ports, and how long things may take.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{Name, Version};

/// Capabilities (capabilities(7)) that a service may be given: those that Docker gives by itself, without NET_RAW and
/// MKNOD, which forge packets and devices.
pub const CAPABILITIES: [&str; 12] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// A service that is run blue-green. Stands unchanged in the lock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Service {
    pub name: Name,
    /// Image repository in the bundle.
    pub image: Name,
    /// Version that `install` starts in both slots.
    pub version: Version,
    /// Port the container listens on.
    pub port: u16,
    /// Port nginx serves it on, on all addresses of the host.
    pub listen: u16,
    /// Port of the standby entry.
    pub standby_listen: u16,
    /// Networks besides localhost that may use the standby entry (CIDR).
    #[serde(default)]
    pub standby_allow: Vec<String>,
    #[serde(default = "root_paths")]
    pub paths: Vec<String>,
    #[serde(default = "health_path")]
    pub health: String,
    #[serde(default)]
    pub server_names: Vec<String>,
    /// Containers per slot, 1 to 9.
    #[serde(default = "one")]
    pub instances: u8,
    /// Weight of each instance in its pool; 1 where not given.
    #[serde(default)]
    pub weights: Vec<u16>,
    #[serde(default = "one_u32")]
    pub max_fails: u32,
    /// Seconds an instance is left out after `max_fails` failures.
    #[serde(default = "ten")]
    pub fail_timeout: u32,
    /// Seconds an answer may take.
    #[serde(default = "sixty")]
    pub read_timeout: u32,
    /// Seconds a slot may take to become healthy.
    #[serde(default = "sixty")]
    pub health_timeout: u32,
    /// Milliseconds a switch waits for answers of the old slot.
    #[serde(default = "two_thousand")]
    pub drain_ms: u32,
    /// Left out where all are defaults, as in locks from before there were any.
    #[serde(default, skip_serializing_if = "Clients::is_default")]
    pub clients: Clients,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Megabytes of memory per container; 0 is no limit.
    #[serde(default)]
    pub memory_mb: u32,
    /// What its processes may do that root may and others may not; none where not given. Left out where there is none,
    /// as in locks from before there were any, and so are the next two.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub capabilities: BTreeSet<String>,
    /// Nothing in the container can be written to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// `user` or `user:group` that it runs as; the image's own where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// TCP ports beside HTTP. Left out where there is none, as in locks from before there were any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tcp: Vec<Tcp>,
    /// Paths whose requests stay open for long. Left out where there is none, as `tcp` is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub long_lived: Vec<LongLived>,
}

impl Service {
    /// Ports of the host that clients come to.
    pub fn client_ports(&self) -> impl Iterator<Item = u16> {
        std::iter::once(self.listen).chain(self.tcp.iter().map(Tcp::listen))
    }

    /// All ports of the host that nginx takes for it, and what each is for.
    pub fn ports(&self) -> impl Iterator<Item = (u16, &'static str)> {
        let http = [(self.listen, "service"), (self.standby_listen, "standby entry")];
        http.into_iter().chain(self.tcp.iter().map(|t| (t.listen(), "TCP service")))
    }

    /// Every way by which sessions come in.
    pub fn inlets(&self) -> Vec<Inlet> {
        let inlet = |door, sessions, drain_ms| Inlet { door, sessions, drain_ms };
        let tcp = self.tcp.iter().map(|t| inlet(Door::Listen(t.listen()), t.sessions, t.drain_ms));
        let paths = self.long_lived.iter().map(|l| inlet(Door::Path(l.path.clone()), l.sessions, l.drain_ms));
        tcp.chain(paths).collect()
    }

    /// What its containers have otherwise than others, for people.
    pub fn rights(&self) -> Vec<String> {
        let capabilities = self.capabilities.iter().map(|c| format!("capability {c}"));
        let user = self.user.iter().map(|user| format!("user {user}"));
        let read_only = self.read_only.then(|| "read-only files".to_owned());
        capabilities.chain(user).chain(read_only).collect()
    }

    /// What cannot be about it, whatever else is in the manifest.
    pub fn problems(&self) -> Vec<String> {
        let (name, mut found) = (&self.name, Vec::new());
        let inside = self.tcp.iter().map(|t| t.port).chain([self.port]);
        if self.ports().map(|(port, _)| port).chain(inside).any(|port| port == 0) {
            found.push(format!("service {name}: port 0 cannot be listened on"));
        }
        for inlet in self.inlets() {
            let (door, drain) = (&inlet.door, inlet.drain());
            if drain > Duration::from_secs(60) {
                let asked = drain.as_millis();
                found.push(format!("service {name}: {door}: drain-ms = {asked}: at most 60000"));
            }
            if inlet.sessions == Sessions::Cut && inlet.drain_ms.is_some() {
                found.push(format!(
                    "service {name}: {door}: drain-ms belongs to sessions = \"drain\"; cut waits for nobody"
                ));
            }
        }
        found.extend(self.clients.problems().map(|why| format!("service {name}: {why}")));
        for (i, LongLived { path, .. }) in self.long_lived.iter().enumerate() {
            if self.long_lived[..i].iter().any(|l| l.path == *path) {
                found.push(format!("service {name}: long-lived path {path} is listed twice"));
            }
            if self.paths.contains(path) {
                found.push(format!(
                    "service {name}: long-lived path {path} is in paths too; leave it out there"
                ));
            }
            if self.health == *path {
                found.push(format!(
                    "service {name}: long-lived path {path} is that of health: it must answer at once"
                ));
            }
        }
        if !(1..=9).contains(&self.instances) {
            found.push(format!("service {name}: instances = {}: expected 1 to 9", self.instances));
        }
        if self.weights.len() > usize::from(self.instances) || self.weights.contains(&0) {
            found.push(format!("service {name}: weights: one number above 0 for each instance"));
        }
        if self.drain_ms > 60_000 {
            found.push(format!("service {name}: drain-ms = {}: at most 60000", self.drain_ms));
        }
        let long_lived = self.long_lived.iter().map(|l| &l.path);
        for path in self.paths.iter().chain([&self.health]).chain(long_lived) {
            // Goes into nginx's configuration: nothing that could end a token there.
            let plain = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-_.~%".contains(&b));
            if !path.starts_with('/') || !plain {
                found.push(format!(
                    "service {name}: path {path:?}: expected / and then letters, digits, - _ . ~ % /"
                ));
            }
        }
        for host in &self.server_names {
            if host.is_empty() || !host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-*".contains(&b)) {
                found.push(format!("service {name}: server name {host:?} is not a host name"));
            }
        }
        for net in &self.standby_allow {
            if parse_cidr(net).is_none() {
                found.push(format!(
                    "service {name}: standby-allow {net:?} is not a network such as 10.1.0.0/16"
                ));
            }
        }
        for key in self.env.keys() {
            if key.is_empty() || key.contains(['=', '\0']) {
                found.push(format!("service {name}: env name {key:?} cannot be set"));
            }
        }
        for capability in self.capabilities.iter().filter(|c| !CAPABILITIES.contains(&c.as_str())) {
            let all = CAPABILITIES.join(", ");
            found.push(format!("service {name}: capability {capability:?}: expected some of {all}"));
        }
        if let Some(user) = self.user.as_ref().filter(|user| !is_user(user)) {
            found.push(format!(
                "service {name}: user {user:?}: expected user or user:group, such as 1000:1000"
            ));
        }
        found
    }
}

/// What a client may take of nginx, HTTP only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Clients {
    /// Seconds for a whole request header.
    pub header_timeout: u32,
    /// Seconds between two pieces of a request body.
    pub body_timeout: u32,
    /// Megabytes of a request body; a larger one is answered 413.
    pub max_body_mb: u32,
    /// Requests of one address at a time, held ones among them; more are answered 429. 0 is no limit.
    pub requests_per_address: u32,
}

impl Default for Clients {
    fn default() -> Self {
        // A plant behind one gateway has a thousand requests a second, and a hold keeps them all for two.
        Self { header_timeout: 20, body_timeout: 30, max_body_mb: 100, requests_per_address: 5000 }
    }
}

impl Clients {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn problems(&self) -> impl Iterator<Item = String> {
        let bounds = [
            ("header-timeout", self.header_timeout, 1..=600),
            ("body-timeout", self.body_timeout, 1..=600),
            ("max-body-mb", self.max_body_mb, 1..=1 << 20),
            ("requests-per-address", self.requests_per_address, 0..=1 << 20),
        ];
        bounds.into_iter().filter(|(_, number, good)| !good.contains(number)).map(|(key, number, good)| {
            format!("clients.{key} = {number}: expected {} to {}", good.start(), good.end())
        })
    }
}

/// A TCP port of a service, such as HSMS (SEMI E37): new sessions follow the same pointer as HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tcp {
    /// Port the container listens on.
    pub port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    listen: Option<u16>,
    #[serde(default)]
    pub sessions: Sessions,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drain_ms: Option<u32>,
}

/// A path whose requests stay open for long, such as WebSockets and long polls: no switch waits for their answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LongLived {
    /// What the paths of these requests begin with.
    pub path: String,
    #[serde(default)]
    pub sessions: Sessions,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drain_ms: Option<u32>,
}

/// A way by which sessions come in, TCP connections or long-lived requests, and what a switch does about them.
pub struct Inlet {
    pub door: Door,
    pub sessions: Sessions,
    drain_ms: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Door {
    /// Port of the host.
    Listen(u16),
    Path(String),
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Door::Listen(port) => write!(f, "tcp port {port}"),
            Door::Path(path) => write!(f, "path {path}"),
        }
    }
}

/// What a switch does about open sessions of the old slot, once new ones go to the new slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sessions {
    /// They go on until they end; the switch waits for that, for a while.
    #[default]
    Drain,
    /// They are closed, so that the clients connect again, to the new slot.
    Cut,
}

impl fmt::Display for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Sessions::Drain => "drain",
            Sessions::Cut => "cut",
        })
    }
}

impl Tcp {
    /// Port nginx serves it on, on all addresses of the host; the container's where not given.
    pub fn listen(&self) -> u16 {
        self.listen.unwrap_or(self.port)
    }
}

impl Inlet {
    /// How long a switch waits, after it has moved the pointer, for sessions of the old slot to end.
    pub fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms.unwrap_or(two_thousand()).into())
    }
}

fn root_paths() -> Vec<String> {
    vec!["/".into()]
}
fn health_path() -> String {
    "/health".into()
}
fn one() -> u8 {
    1
}
fn one_u32() -> u32 {
    1
}
fn ten() -> u32 {
    10
}
fn sixty() -> u32 {
    60
}
fn two_thousand() -> u32 {
    2000
}

fn is_user(user: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let (user, group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    plain(user) && group.is_none_or(plain)
}

/// `address/bits`, or one address.
fn parse_cidr(s: &str) -> Option<(std::net::IpAddr, u8)> {
    let (addr, bits) = s.split_once('/').map_or((s, None), |(a, b)| (a, Some(b)));
    let addr: std::net::IpAddr = addr.parse().ok()?;
    let most = if addr.is_ipv4() { 32 } else { 128 };
    let bits = bits.map_or(Some(most), |b| b.parse().ok())?;
    (bits <= most).then_some((addr, bits))
}
