//! kill -9 of zd: in the middle of switches, and after every journal entry of an install.

use std::path::Path;
use std::time::Duration;

use crate::host::{Host, differences, stack, stick};

#[test]
#[ignore = "boots a host"]
fn killed_in_the_middle_of_a_switch() {
    switches_killed(&Host::installed("killed"));
}

#[test]
#[ignore = "boots a host"]
fn full_stack_killed_in_the_middle_of_a_switch() {
    let Some(stick) = stack() else { return };
    let host = Host::installed_from("killed-nomad", stick);
    switches_killed(&host);
    host.settles();
}

fn switches_killed(host: &Host) {
    host.zd(&["deploy", "v2"]).ok();
    // How long a switch takes decides where the random moments lie.
    let whole = host.zd(&["switch", "--json"]).ok().json()["total_ms"].as_f64().unwrap();
    host.zd(&["switch"]).ok();
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    let (mut held, mut flipped) = (0, 0);
    let load = host.spawn(&[
        "zd",
        "-q",
        "loadtest",
        &format!("http://{}/hello", host.ip),
        "--rate",
        "1000",
        "--duration",
        "20m",
        "--mode",
        "mixed",
        "--method",
        "mixed",
        "--json",
    ]);
    std::thread::sleep(Duration::from_millis(1000));
    let mut changes = 0;
    for round in 0..20 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let after = Duration::from_micros(seed % ((whole * 700.0) as u64));
        let before = host.active();
        host.sh(&format!(
            "zd -q switch >/dev/null 2>&1 & p=$!; sleep {:.6}; kill -9 $p || true; wait",
            after.as_secs_f64()
        ));
        held += usize::from(host.sh("readlink /var/lib/zd/services/hello/active").starts_with("hold"));
        let now = host.active();
        assert!(["blue", "green"].contains(&now.as_str()), "round {round} after {after:?}: {now}");
        flipped += usize::from(now != before);
        std::thread::sleep(Duration::from_millis(300));
        // The next command works.
        let to = if now == "blue" { "green" } else { "blue" };
        host.zd(&["switch", "--to", to]).ok();
        changes += usize::from(now != before) + 1;
        std::thread::sleep(Duration::from_millis(300));
    }
    let report = host.clean(load);
    let seen = report["changes"].as_array().unwrap().len();
    assert_eq!(seen, changes, "what clients saw is what status says");
    println!(
        "20 kills, {} requests: {held} found holding, {flipped} after the flip; 0 failed, 0 mixed",
        report["requests"]
    );

    // The moments that matter most are too short to be hit by chance.
    for (at, moved) in [("held", false), ("flipped", true), ("released", true)] {
        let before = host.active();
        let load = host.load(1000, usize::from(moved), &["--mode", "mixed", "--method", "mixed"]);
        std::thread::sleep(Duration::from_millis(1500));
        let failpoint = format!("switch:{at}");
        let died = host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["zd", "-q", "switch"]);
        assert_ne!(died.code, 0, "{died:?}");
        let link = host.sh("readlink /var/lib/zd/services/hello/active");
        assert_eq!(link.starts_with("hold"), at == "held", "{link}");
        host.clean(load);
        assert_eq!(host.active() != before, moved, "killed when {at}");
        // A rollback knows where it goes, whatever was not written down.
        host.zd(&["switch", "--to", "green"]).ok();
        let back = host.zd(&["rollback", "--json"]).ok().json();
        assert_eq!(back["to"]["slot"], "blue", "{back}");
    }
}

fn install_dying_at(host: &Host, entry: u32) -> i32 {
    let failpoint = format!("journal:{entry}");
    host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["/stick/zd", "-q", "install", "--ip", "auto"]).code
}

#[test]
#[ignore = "boots a host"]
fn install_killed_after_every_journal_entry_and_run_again() {
    run_again("", stick());
}

#[test]
#[ignore = "boots a host"]
fn full_stack_install_killed_after_every_journal_entry_and_run_again() {
    let Some(stick) = stack() else { return };
    run_again("-nomad", stick);
}

fn run_again(engine: &str, stick: &Path) {
    let reference = Host::installed_from(&format!("whole{engine}"), stick);
    let wanted = comparable(&reference.picture());
    let host = Host::bare(&format!("resumed{engine}"), stick);
    // Each run dies at the first entry it writes: together they die once after every entry.
    let mut kills = 0;
    while install_dying_at(&host, 1) != 0 {
        kills += 1;
        assert!(kills < 400, "does not come to an end");
    }
    assert!(kills > 50, "only {kills} entries?");
    assert_eq!(host.run(&["/stick/zd", "install", "--ip", "auto", "--json"]).ok().json()["changed"], 0);
    assert_eq!(host.run(&["systemctl", "is-active", "zd-registry-push"]).out, "inactive\n");
    println!("install killed {kills} times and run again each time: whole");
    assert_eq!(differences(&wanted, &comparable(&host.picture())), "", "as if it had never been interrupted");
}

/// What two installs may differ in: secrets, addresses, times.
fn comparable(picture: &str) -> String {
    let own = [
        "/etc/zd/tls/",
        "/etc/zd/registry/",
        "/etc/zd/signing/",
        "/etc/zd/host.toml",
        "/var/lib/zd/receipts",
        "/var/lib/zd/audit.head",
        "/var/log/zd/",
        "state.json",
        "/etc/docker/certs.d",
        "/var/lib/docker",
        "/var/lib/containerd",
        "/stick",
        "/etc/docker/key.json",
        "/var/lib/zd/registry",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/machine-id",
        "/var/lib/dbus/machine-id",
        "/etc/systemd/system/dbus",
        // Of the nomad engine.
        "/private.json",
        ".job.json",
        "/etc/zd/consul.d/consul.json",
        "/etc/zd/nomad.d/nomad.json",
        "/etc/zd/consul.d/tls.",
        "/etc/zd/nomad-ids/",
        "/etc/zd/secrets/",
        "/var/lib/zd/consul/",
        "/var/lib/zd/nomad/",
    ];
    picture
        .lines()
        .filter(|l| !l.starts_with("port") && !own.iter().any(|o| l.contains(o)))
        .map(|l| format!("{l}\n"))
        .collect()
}

#[test]
#[ignore = "boots a host"]
fn install_killed_and_undone() {
    undone(&Host::bare("undone", stick()), 1);
}

#[test]
#[ignore = "boots a host"]
fn full_stack_install_killed_and_undone() {
    let Some(stick) = stack() else { return };
    // What comes before Consul is what the other engine does.
    undone(&Host::bare("undone-nomad", stick), 100);
}

fn undone(host: &Host, first: u32) {
    let before = host.picture();
    // --long dies after every entry.
    let long = std::env::var_os("ZD_TEST_LONG").is_some();
    let mut entry = first;
    let mut tried = 0;
    loop {
        if install_dying_at(host, entry) == 0 {
            break;
        }
        let undone = host.zd_or_stick(&["-q", "undo", "--yes"]);
        if undone.contains("nothing is unfinished") {
            // Killed behind the last entry: this install is whole.
            host.zd_or_stick(&["-q", "uninstall", "--purge", "--yes"]);
        }
        let now = host.picture();
        assert_eq!(differences(&before, &now), "", "undo after journal entry {entry}");
        assert_eq!(
            host.sh("systemctl list-units --no-legend 'zd-*'"),
            "",
            "undo after journal entry {entry}"
        );
        tried += 1;
        entry += if long || entry < 3 { 1 } else { 40 };
    }
    println!("install killed after {tried} entries and undone each time: as before");
}

impl Host {
    /// The installed zd may be gone in the middle of an undo: the stick's does it.
    fn zd_or_stick(&self, args: &[&str]) -> String {
        self.run(&[&["/stick/zd"], args].concat()).ok().out
    }
}

#[test]
#[ignore = "boots a host"]
fn nginx_and_containers_come_back() {
    let host = Host::installed("back");
    host.sh(
        "systemctl kill -s KILL zd-nginx@hello; kill -9 $(docker inspect -f {{.State.Pid}} zd-hello-blue-1)",
    );
    host.settles();
    host.serves();
    // A deploy that was killed is taken back by the next command.
    let out = host.run_env(&[("ZD_FAILPOINT", "journal:3")], &["zd", "deploy", "v2"]);
    assert_ne!(out.code, 0);
    host.zd(&["deploy", "v3"]).ok();
    let status = host.zd(&["status", "--json"]).ok().json();
    assert_eq!(status["drift"].as_array().unwrap().len(), 0, "{}", status["drift"]);
    assert_eq!(status["services"][0]["slots"][1]["version"], "v3");
    deploys_are_taken_back_or_finished(&host);
}

/// Killed on both sides of the last way back of a deploy: `undo` says rightly which of the two it was.
fn deploys_are_taken_back_or_finished(host: &Host) {
    let standby = || host.zd(&["status", "--json"]).ok().json()["services"][0]["slots"][1]["version"].clone();
    // Both images are here by then. The last lines: removing the containers before is intended, is done, the end.
    host.zd(&["deploy", "v2"]).ok();
    host.zd(&["deploy", "v3"]).ok();
    let lines = host.sh("wc -l <$(ls /var/lib/zd/receipts/*-deploy.jsonl | tail -1)");
    let last: u32 = lines.trim().parse().expect("a number");
    for (entry, finished, version) in [(last - 3, false, "v3"), (last - 2, true, "v2")] {
        let failpoint = format!("journal:{entry}");
        let died = host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["zd", "deploy", "v2"]);
        assert_ne!(died.code, 0, "entry {entry} of {last}");
        let told = host.zd(&["undo", "--dry-run", "--json"]).ok().json();
        let done = host.zd(&["undo", "--yes", "--json"]).ok().json();
        assert_eq!(
            (&told["finished"], &done["finished"]),
            (&finished.into(), &finished.into()),
            "{told} {done}"
        );
        host.settles();
        assert_eq!(standby(), version);
        let history = host.zd(&["history", "--json"]).ok().json().to_string();
        assert_eq!(history.contains("\"finished\""), finished);
    }
}
