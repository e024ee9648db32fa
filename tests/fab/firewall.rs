//! Ports opened in a host's own firewall: ufw, firewalld and nftables, each the real one.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::host::{Host, Pack, SECOND, SERVICE};
use crate::tcp::TCP;

const RULES: &str = "flush ruleset
table inet filter {
    chain input {
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iif lo accept
        icmp type echo-request accept
    }
}
";

#[test]
#[ignore = "boots a host"]
fn ports_are_opened_in_each_kind_of_firewall() {
    let service = format!("{SERVICE}{TCP}");
    let extra = &["ufw", "firewalld", "nftables"];
    let stick = Pack { folder: "firewalls", extra, service: &service, ..Pack::default() }.make();
    let host = Host::bare("firewall", &stick);
    // What serves was made before the bundle had that path, and goes on.
    let service = service.replace("health-timeout", "health = \"/hello\"\nhealth-timeout") + SECOND;
    let (folder, name, version) = ("firewalls-2", Some("firewalls"), Some("2"));
    host.copy_in(
        &Pack { folder, name, version, extra, service: &service, ..Pack::default() }.make(),
        "/stick2",
    );
    // It would start with its package, and throw away the rules that dockerd has just made.
    host.sh("systemctl mask --quiet firewalld");
    host.run(&["/stick/zd", "-q", "install"]).ok();
    host.sh("systemctl unmask --quiet firewalld");
    assert!(all_are(&host, true));

    host.sh("ufw --force enable");
    opened(&host, "ufw");
    assert!(host.sh("ufw status").contains("80/tcp"), "told to ufw, so that it lasts");
    follow_the_bundle(&host);
    host.sh("ufw --force disable");

    host.sh("systemctl start firewalld");
    opened(&host, "firewalld");
    host.sh("firewall-cmd --reload");
    assert!(becomes(&host, true), "lasts over a reload");
    follow_the_bundle(&host);
    host.sh("systemctl stop firewalld");

    host.sh(&format!("printf '{}' >/etc/nftables.conf", RULES.replace('\n', "\\n")));
    host.sh("systemctl enable --quiet --now nftables");
    opened(&host, "nftables");
    host.is_hardened(&["zd-firewall"]);
    for change in ["reload", "restart"] {
        host.sh(&format!("systemctl {change} nftables"));
        assert!(becomes(&host, true), "lasts over a {change}");
    }
    follow_the_bundle(&host);
    host.restart();
    host.settles();
    let again = host.run(&["/stick/zd", "install", "--open-firewall", "--json"]).ok().json();
    assert_eq!(again["changed"], 0, "lasts over a boot: {again}");
    assert!(all_are(&host, true));

    host.sh("systemctl stop zd-firewall");
    assert!(!host.sh("nft list ruleset").contains("zd 80"), "what was opened is closed again");

    // Also in firewalls that do not run.
    host.zd(&["uninstall", "--yes"]).ok();
    assert!(!host.sh("systemctl is-enabled zd-firewall 2>&1 || true").contains("enabled"));
}

/// The port is shut, zd says so, opens it when told, and only once.
fn opened(host: &Host, kind: &str) {
    assert!(becomes(host, false), "{kind} keeps clients out");
    let told = host.run(&["/stick/zd", "install"]).ok();
    assert!(
        told.err.contains(&format!("{kind} is active; clients need tcp 80, tcp 5000, tcp 5001")),
        "{}",
        told.err
    );
    assert!(told.err.contains("--open-firewall"), "{}", told.err);
    assert!(all_are(host, false), "zd opens nothing unasked");
    let opened = host.run(&["/stick/zd", "install", "--open-firewall", "--json"]).ok().json();
    assert!(opened["changed"].as_u64() > Some(0), "{opened}");
    assert!(becomes(host, true), "{kind} lets clients in");
    let again = host.run(&["/stick/zd", "install", "--open-firewall", "--json"]).ok().json();
    assert_eq!(again["changed"], 0, "{kind}: {again}");
}

/// The port of a service that comes with a bundle is opened, and shut when it goes.
fn follow_the_bundle(host: &Host) {
    host.run(&["/stick2/zd", "-q", "upgrade", "--yes"]).ok();
    assert!(all_are(host, true) && reaches(host, 82));
    host.zd(&["rollback", "--generation", "1", "--yes"]).ok();
    let rules = host.sh("ufw status; firewall-cmd --list-ports 2>&1; nft list ruleset");
    assert!(!rules.contains("zd 82") && rules.split_whitespace().all(|word| word != "82/tcp"), "{rules}");
    assert!(all_are(host, true));
}

/// firewalld is not yet, or no more, at work when its command has returned.
fn becomes(host: &Host, wanted: bool) -> bool {
    let start = Instant::now();
    while !all_are(host, wanted) {
        if start.elapsed().as_secs() > 20 {
            return false;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    true
}

/// From another machine: every port that clients come to is open, or none.
fn all_are(host: &Host, open: bool) -> bool {
    [80, 5000, 5001].iter().all(|port| reaches(host, *port) == open)
}

fn reaches(host: &Host, port: u16) -> bool {
    let address = format!("{}:{port}", host.ip).parse().expect("an address");
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
}
