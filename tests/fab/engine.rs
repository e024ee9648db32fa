//! Whatever happens to the daemons beneath the services, no request fails.

use std::time::Duration;

use crate::host::{Host, stack, stick};

#[test]
#[ignore = "boots a host"]
fn daemons_that_end_cost_no_request() {
    let host = Host::installed_from("daemons", stick());
    daemons_end(&host, &["docker", "containerd"]);
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
}

#[test]
#[ignore = "boots a host"]
fn full_stack_daemons_that_end_cost_no_request() {
    let Some(stick) = stack() else { return };
    let host = Host::installed_from("daemons-nomad", stick);
    daemons_end(&host, &["docker", "containerd", "nomad", "consul", "consul-template"]);
    let containers = host.containers();
    // What Nomad and Docker clear away is nothing that serves.
    under_load(&host, &format!("{} system gc; docker system prune -af", nomad(1)));
    assert_eq!(host.containers(), containers, "nothing was restarted");
    // Nomad starts another one in its place. What such a container was answering is asked again of another one only where
    // that is safe: a POST that it had in hand fails, for it may have done its work.
    for line in ["docker kill", "docker rm -f"] {
        let line = format!("{line} $(docker ps -q -f label=zd.slot=blue | head -1)");
        under_load_of(&host, "get", &line);
    }
    host.restart();
    host.settles();
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
}

/// Nomad's command line, with all that it needs to be let in, out of the bundle of a generation.
pub fn nomad(generation: u32) -> String {
    format!(
        "NOMAD_ADDR=https://127.0.0.1:4646 NOMAD_CACERT=/etc/zd/tls/ca.crt NOMAD_CLIENT_CERT=/etc/zd/tls/nomad.crt \
         NOMAD_CLIENT_KEY=/etc/zd/tls/nomad.key NOMAD_TOKEN=$(cat /etc/zd/secrets/nomad-management) \
         /opt/zd/generations/{generation}/bin/nomad"
    )
}

/// Each is restarted, killed once and again before it is up, and stopped for a while; then all are killed at once.
fn daemons_end(host: &Host, daemons: &[&str]) {
    let long = std::env::var_os("ZD_TEST_LONG").is_some();
    let (kills, stopped) = if long { (10, 60) } else { (4, 8) };
    let containers = host.containers();
    // Not what else is in the unit: the shims of all containers are in containerd's.
    let kill = |unit: &str| format!("systemctl kill --kill-whom=main -s KILL {unit}");
    for unit in daemons {
        under_load(host, &format!("systemctl restart {unit}"));
        under_load(host, &kill(unit));
        under_load(host, &format!("for i in $(seq {kills}); do {}; sleep 1.5; done", kill(unit)));
        under_load(host, &format!("systemctl stop {unit}; sleep {stopped}; systemctl start {unit}"));
    }
    under_load(host, &kill(&daemons.join(" ")));
    assert_eq!(host.containers(), containers, "nothing was restarted");
}

/// 300 POST requests a second around what is done, and until all is well again.
fn under_load(host: &Host, line: &str) {
    under_load_of(host, "post", line);
}

fn under_load_of(host: &Host, method: &str, line: &str) {
    println!("{method}: {line}");
    let load = host.load(300, 0, &["--method", method]);
    std::thread::sleep(Duration::from_millis(500));
    host.sh(line);
    host.settles();
    host.clean(load);
}

const GARBAGE: &str = "head -c 40000 /dev/urandom >";
/// What is done to a store while its agent is stopped, and what doctor says of it; nothing where the agent goes on.
const DAMAGES: [[&str; 4]; 13] = [
    ["consul", GARBAGE, "raft/raft.db", "raft.db of consul is no database"],
    ["consul", "truncate -s 9000 ", "raft/raft.db", "raft.db of consul is cut short"],
    ["consul", "rm ", "raft/raft.db", "raft.db of consul was begun anew"],
    ["consul", ": >", "server_metadata.json", "server_metadata.json of consul is no JSON"],
    ["consul", ": >", "node-id", "node-id of consul holds no node id"],
    ["consul", "rm ", "node-id", "raft.db of consul elects no leader"],
    ["nomad", GARBAGE, "client/state.db", "state.db of nomad is no database"],
    ["nomad", "rm ", "client/state.db", ""],
    ["nomad", "rm ", "client/client-id", ""],
    ["nomad", GARBAGE, "server/raft/raft.db", "raft.db of nomad is no database"],
    ["nomad", "truncate -s 9000 ", "server/raft/raft.db", "raft.db of nomad is cut short"],
    ["nomad", "rm ", "server/raft/raft.db", "raft.db of nomad is empty or gone"],
    ["nomad", "umount -l alloc/*/*/* 2>/dev/null; rm -r ", "*", "raft.db of nomad was begun anew"],
];

#[test]
#[ignore = "boots a host"]
fn full_stack_repairs_its_stores() {
    let Some(stick) = stack() else { return };
    let host = Host::installed_from("stores", stick);
    host.zd(&["deploy", "v2"]).ok();
    let known = || {
        host.sh(
            "cd /etc/zd/secrets && cat nomad-management consul-* | sha256sum; cat /var/lib/zd/nomad/client/client-id; \
             readlink /var/lib/zd/services/hello/active",
        )
    };
    let before = known();
    for [product, line, store, says] in DAMAGES {
        println!("{product}: {line}{store}");
        let load = host.load(300, 0, &["--method", "post"]);
        host.sh(&format!(
            "systemctl stop {product}; cd /var/lib/zd/{product} && {line}{store}; systemctl start --no-block {product}"
        ));
        if says.is_empty() {
            host.settles();
        } else {
            host.comes(&format!("zd doctor | grep '{says}'"));
            // Not one that waits for what cannot come.
            host.run(&["/stick/zd", "install"]).fails(5, "preflight", &[says, "zd repair"]);
            host.zd(&["repair", "--yes", "--reason", "power cut"]).ok();
        }
        host.settles();
        host.clean(load);
        assert_eq!(known(), before, "tokens, node and pointer are as they were");
        assert_eq!(host.zd(&["repair", "--yes", "--json"]).ok().json()["changed"], 0);
        assert_eq!(host.run(&["/stick/zd", "install", "--json"]).ok().json()["changed"], 0);
    }
    host.zd(&["deploy", "v3"]).ok();

    // A repair that dies at each entry it writes comes to the same end.
    let load = host.load(300, 0, &["--method", "post"]);
    host.sh(
        "systemctl stop nomad; rm /var/lib/zd/nomad/server/raft/raft.db; systemctl start --no-block nomad",
    );
    let died = |entry: u32| {
        let failpoint = format!("journal:{entry}");
        host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["zd", "-q", "repair", "--yes"]).code
    };
    let mut kills = 0;
    while died(1) != 0 {
        kills += 1;
        assert!(kills < 60, "does not come to an end");
    }
    assert!(kills > 10, "only {kills} entries?");
    host.settles();
    host.clean(load);
    assert_eq!(known(), before);
    // Also where nothing looks broken, when it is asked for.
    let aside = host.zd(&["repair", "nomad", "--yes", "--json"]).ok().json()["aside"].clone();
    host.sh(&format!("test -s {}/server/raft/raft.db", aside[0].as_str().expect("a folder")));
    host.settles();
    assert_eq!(known(), before);
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
}
