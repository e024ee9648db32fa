//! Requests of the old slot that a drain waits for in vain: whose they are, and how they are closed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::gate::Gate;
use crate::bundle::manifest::Service;
use crate::error::{Code, OrCode, Result};
use crate::host::nginx::Masters;
use crate::host::nginx_requests::{self, Request};
use crate::host::sock_diag::{self, Tcp};

/// Between two looks. What is on its way to the gate at the first one has reached it at the second.
const BETWEEN: Duration = Duration::from_millis(200);
/// So many are named in a message.
const NAMED: usize = 10;

#[derive(Clone, Debug, Serialize)]
pub struct Remaining {
    pub client: SocketAddr,
    /// Port of the host that it came to.
    pub port: u16,
    /// For at least so long under way.
    pub seconds: f64,
    /// Bytes of its answer on their way that it has not taken.
    pub unread: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    #[serde(skip)]
    pub inode: u64,
}

/// What is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Ordinary requests whose header is here.
    Requests,
    /// Every connection, idle ones and those of long-lived paths too.
    Connections,
}

/// What came before the hold, which began at `since`, and is still there. Held requests are never among them: those
/// have reached the gate, and are asked for last.
pub async fn find(service: &Service, gate: &Gate, since: Instant, which: Which) -> Result<Vec<Remaining>> {
    let masters = Masters::of(&service.name).await?;
    let before: BTreeSet<u64> = look(service, &masters, which)?.into_keys().collect();
    tokio::time::sleep(BETWEEN).await;
    let now = look(service, &masters, which)?;
    let held = gate.clients();
    let is_left = |tcp: &Tcp| before.contains(&tcp.inode) && !held.contains(&tcp.client);
    let left = now.into_values().filter(|(tcp, _)| is_left(tcp)).map(|(tcp, request)| Remaining {
        client: tcp.client,
        port: tcp.port,
        seconds: since.elapsed().max(tcp.silent).as_secs_f64(),
        unread: tcp.unread,
        request,
        inode: tcp.inode,
    });
    Ok(left.collect())
}

fn look(service: &Service, masters: &Masters, which: Which) -> Result<BTreeMap<u64, (Tcp, Option<String>)>> {
    let mut all = BTreeMap::new();
    for port in [service.listen, service.standby_listen] {
        let open = sock_diag::tcp_to(port).or_code(Code::Io, "open TCP connections (tcp_diag)")?;
        all.extend(open.into_iter().map(|tcp| (tcp.inode, (tcp, None))));
    }
    if which == Which::Connections {
        return Ok(all);
    }
    let requests = nginx_requests::on(masters, &all.keys().copied().collect())?;
    let begun = requests.into_iter().filter_map(|(inode, request)| match request {
        Request::Begun(line) if is_ordinary(service, line.as_deref()) => {
            Some((inode, (all.get(&inode)?.0.clone(), line)))
        }
        _ => None,
    });
    Ok(begun.collect())
}

/// Not to a long-lived path, which no switch waits for. Where there are such paths, a request without a known line
/// may be to one.
fn is_ordinary(service: &Service, line: Option<&str>) -> bool {
    if service.long_lived.is_empty() {
        return true;
    }
    let Some(target) = line.and_then(|line| line.split(' ').nth(1)) else { return false };
    let path = target.split('?').next().unwrap_or_default();
    // As nginx picks a location: the longest that fits.
    let fits = |location: &&String| path.starts_with(location.as_str());
    let long = service.long_lived.iter().map(|l| &l.path).filter(fits).map(String::len).max();
    path == service.health || long <= service.paths.iter().filter(fits).map(String::len).max()
}

impl fmt::Display for Remaining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = self.request.as_deref().unwrap_or("a request");
        write!(f, "{} to port {}: {request}, for {:.1} s", self.client, self.port, self.seconds)?;
        match self.unread {
            0 => Ok(()),
            bytes => write!(f, ", has {bytes} bytes of its answer to take"),
        }
    }
}

/// The first ones, one a line.
pub fn list(all: &[Remaining]) -> String {
    let mut lines: Vec<String> = all.iter().take(NAMED).map(|one| format!("\n  {one}")).collect();
    if all.len() > NAMED {
        lines.push(format!("\n  and {} more", all.len() - NAMED));
    }
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::manifest::Manifest;

    #[test]
    fn a_long_lived_request_is_none_that_a_switch_cuts() {
        let text = include_str!("../../manifests/demo.toml");
        let plain = Manifest::parse(text).unwrap().services.remove(0);
        assert!(is_ordinary(&plain, None) && is_ordinary(&plain, Some("GET /ws HTTP/1.1")));
        let more = "[[service.long-lived]]\npath = \"/ws/\"\n";
        let long = text.replace("\n# [backup]", &format!("\n{more}\n# [backup]"));
        let long = long.replace("paths = [\"/\"]", "paths = [\"/\", \"/ws/admin/\"]");
        let long = Manifest::parse(&long).unwrap().services.remove(0);
        for (line, ordinary) in [
            ("GET /ws/x?y=/z HTTP/1.1", false),
            ("GET /ws/admin/x HTTP/1.1", true),
            ("POST /a HTTP/1.1", true),
            ("GET /health HTTP/1.1", true),
        ] {
            assert_eq!(is_ordinary(&long, Some(line)), ordinary, "{line}");
        }
        assert!(!is_ordinary(&long, None));
    }

    #[test]
    fn a_message_names_some_and_counts_the_rest() {
        let one = |port| Remaining {
            client: ([10, 0, 0, 7], port).into(),
            port: 80,
            seconds: 12.34,
            unread: 0,
            request: Some("POST /x HTTP/1.1".into()),
            inode: 1,
        };
        let all: Vec<Remaining> = (1..=12).map(one).collect();
        let text = list(&all);
        assert!(text.starts_with("\n  10.0.0.7:1 to port 80: POST /x HTTP/1.1, for 12.3 s\n"), "{text}");
        assert!(text.ends_with("\n  and 2 more"), "{text}");
        let slow = Remaining { unread: 5, request: None, ..one(9) };
        assert_eq!(
            slow.to_string(),
            "10.0.0.7:9 to port 80: a request, for 12.3 s, has 5 bytes of its answer to take"
        );
    }
}
