//! Install from the bundle alone, again, deploy, reboot, uninstall.

use std::time::{Duration, Instant};

use crate::host::{Host, Pack, SERVICE, differences};
use crate::journal;

#[test]
#[ignore = "boots a host"]
fn install_deploy_switch_rollback_reboot_uninstall() {
    let stick = Pack { folder: "main", service: SERVICE, plain: true, ..Pack::default() }.make();
    let host = Host::bare("main", &stick);
    let before = host.picture();

    let preview = host.run(&["/stick/zd", "install", "--ip", "auto", "--dry-run", "--json"]).ok().json();
    assert!(preview["steps"].as_array().unwrap().len() > 30);
    assert_eq!(differences(&before, &host.picture()), "", "a dry run changes nothing");

    let first = host.run(&["/stick/zd", "install", "--ip", "auto"]).ok();
    assert!(first.err.contains(&format!("address {} of eth0", host.ip)), "{}", first.err);
    assert!(!first.err.contains('\x1b'), "plain off a terminal");
    assert!(host.sh("curl -V >/dev/null 2>&1 || echo none").contains("none"), "still a bare host");

    again_changes_nothing(&host);
    everything_is_from_the_registry(&host);
    secrets_are_rotated(&host);
    deploy_leaves_the_active_slot_alone(&host);
    switch_and_back(&host);
    a_bad_version_puts_the_standby_back(&host);
    rollback_restarts_what_was_replaced(&host);
    two_at_once(&host);
    drift_is_shown(&host);
    logs_are_rotated(&host);
    reboot(&host);
    journal::fills_neither_the_disk_nor_the_hosts_own(&host);

    // Without --purge the data stays, and the next install takes it up.
    host.zd(&["uninstall"]).fails(2, "not-confirmed", &["--yes"]);
    host.zd(&["uninstall", "--yes"]).ok();
    assert_eq!(
        host.sh("ls /var/lib/zd; ls /opt/zd /etc/zd 2>/dev/null || true"),
        "audit.head\nreceipts\nregistry\nreports\nservices\n"
    );
    journal::ended(&host);
    assert!(journal::used(&host) > 0);
    assert!(host.sh("command -v dockerd nginx docker-registry || echo none").contains("none"));
    host.run(&["/stick/zd", "-q", "install"]).ok();
    assert!(host.zd(&["history"]).ok().out.contains("uninstall done"), "the log goes on");

    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    journal::ended(&host);
    assert_eq!(host.sh("ls -d /var/log/journal/*.zd /run/log/journal/*.zd 2>/dev/null || true"), "");
    assert_eq!(
        differences(&before, &host.picture()),
        "",
        "uninstall leaves what was there and nothing of ours"
    );
}

fn again_changes_nothing(host: &Host) {
    let (picture, containers) = (host.picture(), host.containers());
    let pids = host.sh("systemctl show -p MainPID zd-registry zd-nginx@hello docker");
    let start = Instant::now();
    let again = host.run(&["/stick/zd", "install", "--ip", "auto", "--json"]).ok().json();
    assert!(start.elapsed().as_secs_f64() < 5.0, "took {:?}", start.elapsed());
    assert_eq!(again["changed"], 0, "{again}");
    // The probe that finds the service serving is a request like any other.
    let but_access_log = |picture: &str| {
        picture.lines().filter(|l| !l.contains("/access.log")).map(|l| format!("{l}\n")).collect::<String>()
    };
    assert_eq!(differences(&but_access_log(&picture), &but_access_log(&host.picture())), "");
    assert_eq!(host.containers(), containers);
    assert_eq!(host.sh("systemctl show -p MainPID zd-registry zd-nginx@hello docker"), pids);
}

fn everything_is_from_the_registry(host: &Host) {
    let images = host.sh("docker ps -q | xargs docker inspect -f '{{.Config.Image}}' | sort -u");
    assert!(images.starts_with(&format!("{}:5443/hello@sha256:", host.ip)), "{images}");
    assert_eq!(
        host.sh("docker ps --format '{{.Ports}}' | grep -c -- '->' || true").trim(),
        "0",
        "no published ports"
    );
    assert_eq!(
        host.sh("stat -c '%a %U' /etc/zd/tls/ca.key /etc/zd/registry/password"),
        "600 root\n600 root\n"
    );
    // Neither secret stands where it can be read: logs, receipts, arguments, units.
    let password = host.sh("cat /etc/zd/registry/password");
    let found = host.sh(&format!(
        "grep -rlF -- '{password}' /var/log /var/lib/zd/receipts /etc/systemd /run/log 2>/dev/null; \
         journalctl --no-pager | grep -cF -- '{password}' || true"
    ));
    assert_eq!(found.trim(), "0");
    host.is_hardened(&["zd-registry", "zd-registry-push", "zd-nginx@hello", "zd-settle", "zd-logrotate"]);
}

/// All anew under load; the deploys that follow pull with the new password.
fn secrets_are_rotated(host: &Host) {
    let sums = || host.sh("cd /etc/zd && sha256sum tls/* registry/htpasswd registry/password registry/tls.*");
    let (before, containers) = (sums(), host.containers());
    let load = host.load(300, 0, &["--mode", "mixed"]);
    let report = host.zd(&["secrets", "rotate", "--dry-run", "--json"]).ok().json();
    assert_eq!(report["restarted"], serde_json::json!(["zd-registry"]));
    assert_eq!(sums(), before, "a dry run changes nothing");
    host.zd(&["secrets", "rotate", "--reason", "quarterly", "--yes"]).ok();
    host.clean(load);
    assert!(sums().lines().all(|l| !before.contains(l)), "not rotated:\n{before}\n{}", sums());
    assert_eq!(host.containers(), containers);
    assert!(host.zd(&["doctor"]).ok().out.contains("is valid until"));
}

fn deploy_leaves_the_active_slot_alone(host: &Host) {
    let blue = |all: &str| all.lines().filter(|l| l.contains("blue")).map(str::to_owned).collect::<Vec<_>>();
    let before = blue(&host.containers());
    assert_eq!(before.len(), 2);
    let report = host.zd(&["deploy", "v2", "--reason", "ticket 4711", "--json"]).ok().json();
    assert_eq!(report["slot"], "green");
    assert_eq!(blue(&host.containers()), before, "same ids, same start times");
    assert_eq!(host.zd(&["deploy", "v2", "--json"]).ok().json()["changed"], false);
    host.zd(&["deploy", "v99"]).fails(10, "unknown-version", &["hello:v99", "v1", "v2"]);
    // Clients still get v1; the standby entry shows v2, to localhost only.
    let get =
        |url: &str| host.zd(&["loadtest", url, "--rate", "20", "--duration", "1s", "--json"]).ok().json();
    assert_eq!(get("http://127.0.0.1/hello")["versions"]["v1"], 20);
    assert_eq!(get("http://127.0.0.1:8081/hello")["versions"]["v2"], 20);
    let outside = host.zd(&[
        "loadtest",
        &format!("http://{}:8081/hello", host.ip),
        "--rate",
        "5",
        "--duration",
        "1s",
        "--json",
    ]);
    assert_eq!(outside.json()["failures"]["status-403"], 5);
}

fn switch_and_back(host: &Host) {
    let report = host.zd(&["switch", "--reason", "ticket 4712", "--json"]).ok().json();
    assert_eq!((&report["from"]["version"], &report["to"]["version"]), (&"v1".into(), &"v2".into()));
    assert!(report["total_ms"].as_f64().unwrap() < 5000.0, "{report}");
    assert!(report["to"]["digest"].as_str().unwrap().starts_with("sha256:"));
    let again = host.zd(&["switch", "--to", "green", "--json"]).ok().json();
    assert_eq!(again["changed"], false, "switch --to is no toggle");
    let status = host.zd(&["status", "--json"]).ok().json();
    assert_eq!(status["services"][0]["active"], "green");
    assert_eq!(status["drift"].as_array().unwrap().len(), 0, "{}", status["drift"]);
    host.zd(&["rollback", "--json"]).ok();
    assert_eq!(host.active(), "blue");
    let history = host.zd(&["history", "--json"]).ok().json();
    let text = history.to_string();
    assert!(text.contains("ticket 4711") && text.contains("ticket 4712"), "{text}");
    // A log that somebody edits is noticed.
    host.sh("cp /var/log/zd/audit.jsonl /tmp/a; sed -i 's/4712/4713/' /var/log/zd/audit.jsonl");
    host.zd(&["history"]).fails(11, "audit", &["broken at line"]);
    host.sh("cp /tmp/a /var/log/zd/audit.jsonl; rm /tmp/a");
    host.zd(&["history"]).ok();
}

fn a_bad_version_puts_the_standby_back(host: &Host) {
    let before = host.sh("docker ps --no-trunc --format '{{.Names}} {{.ID}}' | sort");
    for (version, part) in [("sick", "status 503"), ("dies", "it keeps ending")] {
        let said = host.zd(&["deploy", version]).fails(8, "unhealthy", &[part, "its last lines:"]);
        assert!(said.err.contains("hello"), "the container's own words: {}", said.err);
        assert_eq!(host.sh("docker ps --no-trunc --format '{{.Names}} {{.ID}}' | sort"), before);
    }
    assert_eq!(host.sh("docker ps -aq | wc -l").trim(), "4", "nothing of the failed deploys is left");
    let status = host.zd(&["status", "--json"]).ok().json();
    assert_eq!(status["drift"].as_array().unwrap().len(), 0, "{}", status["drift"]);
    // One that only starts slowly is waited for.
    host.zd(&["deploy", "lazy"]).ok();
    host.zd(&["deploy", "v2"]).ok();
}

fn rollback_restarts_what_was_replaced(host: &Host) {
    host.zd(&["switch", "--to", "green"]).ok(); // v2, from blue v1
    host.zd(&["deploy", "v3"]).ok(); // over v1 in blue
    let report = host.zd(&["rollback", "--json"]).ok().json();
    assert_eq!((&report["to"]["slot"], &report["to"]["version"]), (&"blue".into(), &"v1".into()));
    // And when it was stopped by hand.
    host.sh("docker stop -t 0 zd-hello-green-1 >/dev/null");
    let report = host.zd(&["rollback", "--json"]).ok().json();
    assert_eq!((&report["to"]["slot"], &report["to"]["version"]), (&"green".into(), &"v2".into()));
    host.zd(&["switch", "--to", "blue"]).ok();
}

fn two_at_once(host: &Host) {
    let deploy = host.spawn(&["zd", "deploy", "lazy"]);
    host.comes("grep -q '\"verb\":\"deploy\"' /run/zd/lock");
    host.zd(&["switch"]).fails(9, "locked", &["zd deploy", "process"]);
    deploy.wait().ok();
    host.zd(&["deploy", "v2"]).ok();
}

fn drift_is_shown(host: &Host) {
    host.sh("docker rm -f zd-hello-green-2 >/dev/null");
    let status = host.zd(&["status"]).ok();
    assert!(status.out.contains("container hello green 2 is gone"), "{}", status.out);
    host.zd(&["switch"]).fails(8, "unhealthy", &["nothing was changed"]);
    assert_eq!(host.zd(&["doctor"]).code, 5);
    host.zd(&["deploy", "v2"]).ok();
    host.zd(&["doctor"]).ok();
}

fn logs_are_rotated(host: &Host) {
    let load = host.load(200, 0, &[]);
    // Grown at once, sparse; nginx appends to it all the same.
    host.sh("truncate -s 300M /var/log/zd/hello/access.log");
    host.sh("systemctl start zd-logrotate.service");
    host.clean(load);
    let sizes = host.sh("cd /var/log/zd/hello && stat -c '%n %s' access.log access.log.1");
    let sizes: Vec<u64> = sizes.lines().map(|l| l.rsplit_once(' ').unwrap().1.parse().unwrap()).collect();
    assert!(sizes[0] > 1000 && sizes[0] < 1 << 20, "nginx writes to a new file: {sizes:?}");
    assert!(sizes[1] > 300 << 20, "the old one is kept: {sizes:?}");
    assert_eq!(host.sh("systemctl is-active zd-logrotate.timer"), "active\n");
}

fn reboot(host: &Host) {
    host.zd(&["switch", "--to", "green"]).ok();
    let start = Instant::now();
    host.restart();
    let url = format!("http://{}/hello", host.ip);
    let report = loop {
        let said = host.run(&["zd", "loadtest", &url, "--rate", "20", "--duration", "1s", "--json"]);
        if said.code == 0 {
            break said.json();
        }
        assert!(start.elapsed().as_secs() < 90, "does not serve after a reboot: {}", said.out);
        std::thread::sleep(Duration::from_millis(500));
    };
    println!("reboot: serving {:.1} s after `docker restart`", start.elapsed().as_secs_f32());
    assert_eq!(report["versions"]["v2"], 20, "the same slot as before");
    host.settles();
}
