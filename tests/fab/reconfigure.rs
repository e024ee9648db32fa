//! An installed host at another address: what serves goes on, and everything else follows.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::another_bundle::active_containers;
use crate::host::{Host, Pack, SERVICE, differences, stack, stick, zd_stack};

/// The site's interface has a second address from here on, one that no other test host has.
fn readdressed(host: &Host) -> String {
    let (network, _) = host.ip.rsplit_once('.').expect("an address");
    let new = format!("{network}.0");
    // A later change of the first shall not take the second away.
    host.sh("echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries");
    add(host, &new);
    new
}

fn add(host: &Host, ip: &str) {
    host.sh(&format!("ip address add {ip}/{} dev eth0", prefix(host)));
}

fn remove(host: &Host, ip: &str) {
    host.sh(&format!("ip address del {ip}/{} dev eth0", prefix(host)));
}

fn prefix(host: &Host) -> String {
    host.sh("ip -o -4 address show dev eth0 | sed -n '1s#.*inet [^/]*/\\([0-9]*\\) .*#\\1#p'")
        .trim()
        .to_owned()
}

/// Everything zd has written of itself, but the certificate, which is made anew on the way back as well.
fn settings(host: &Host) -> String {
    host.sh("find /etc/zd /etc/docker -type f ! -name 'tls.*' -exec sha256sum {} + | sort")
}

/// What a change of address has no business with. Consul listens on it, too.
fn processes(host: &Host) -> String {
    host.sh("for u in docker containerd zd-nginx@hello nomad consul-template; do systemctl show -p MainPID $u; done")
}

fn registry_of(host: &Host) -> String {
    host.sh("ss -Hltn | awk '{print $4}' | grep ':5443$' || true").trim().to_owned()
}

#[test]
#[ignore = "boots a host"]
fn readdressed_at_work() {
    follows("readdressed", stick(), &next("readdressed-2", "fab", None));
}

#[test]
#[ignore = "boots a host"]
fn full_stack_readdressed() {
    let Some(stick) = stack() else { return };
    follows("stack-readdressed", stick, &next("stack-readdressed-2", "stack", zd_stack()));
}

/// The bundle of the next quarter: another version in the standby.
fn next(folder: &str, name: &str, releases: Option<(String, PathBuf)>) -> PathBuf {
    let service = SERVICE.replace("\"v1\"", "\"v2\"");
    let (name, version) = (Some(name), Some("2"));
    Pack { folder, name, version, service: &service, releases, ..Pack::default() }.make()
}

fn follows(name: &str, stick: &Path, next: &Path) {
    let mut host = Host::bare(name, stick);
    let before = host.picture();
    host.run(&["/stick/zd", "-q", "install", "--ip", "auto"]).ok();
    host.zd(&["deploy", "v2"]).ok();
    host.zd(&["switch"]).ok();
    let old = host.ip.clone();
    let new = readdressed(&host);
    refused_before_anything_changes(&host, &new);
    moves_under_load(&host, &new);

    remove(&host, &old);
    host.ip = new.clone();
    everything_goes_on(&host, &old);
    host.copy_in(next, "/stick2");
    host.run(&["/stick2/zd", "-q", "upgrade", "--yes"]).ok();
    host.zd(&["rollback", "--generation", "1", "--yes"]).ok();
    host.settles();
    comes_back_after_a_boot(&host, &old);
    already_gone(&mut host, &old);

    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    host.sh("rm -r /stick?*");
    assert_eq!(differences(&before, &host.picture()), "", "as it was before the install");
}

fn refused_before_anything_changes(host: &Host, new: &str) {
    let before = settings(host);
    let cure = format!("zd reconfigure --ip {new}");
    host.run(&["/stick/zd", "install", "--ip", new]).fails(2, "usage", &[&host.ip, &cure]);
    host.run(&["/stick/zd", "install", "--registry-port", "5444"]).fails(2, "usage", &["zd reconfigure"]);
    let to = |ip: &str| host.zd(&["reconfigure", "--ip", ip]);
    to("10.99.99.99").fails(5, "preflight", &["not an address of this host", new, "ip address add"]);
    to("172.31.0.1").fails(5, "preflight", &["172.31.0.0/16", "containers"]);
    to("auto").fails(5, "preflight", &["several addresses", new]);
    host.zd(&["reconfigure", "--registry-port", "80"]).fails(5, "preflight", &["the service of hello"]);
    host.sh(&format!(
        "printf '[Socket]\\nListenStream={new}:5443\\nAccept=yes\\n' > /run/systemd/system/site.socket; \
         printf '[Service]\\nExecStart=/bin/true\\n' > /run/systemd/system/site@.service; \
         systemctl daemon-reload; systemctl start site.socket"
    ));
    to(new).fails(5, "preflight", &[&format!("5443 for the private registry is taken on {new} by systemd")]);
    host.sh("systemctl stop site.socket; rm /run/systemd/system/site*; systemctl daemon-reload");
    let same = host.zd(&["reconfigure", "--ip", &host.ip, "--json"]).ok().json();
    assert_eq!((&same["changed"], &same["report"]), (&0.into(), &serde_json::Value::Null), "{same}");
    let plan = host.zd(&["reconfigure", "--ip", new, "--dry-run"]).ok().out;
    for part in [&format!("address {} -> {new}", host.ip), "do   secret", "do   zd-registry.service"] {
        assert!(plan.contains(part), "{part} in {plan}");
    }
    assert_eq!(settings(host), before);
}

/// There and back where the registry does not start, killed and undone, killed and run again: no client notices.
fn moves_under_load(host: &Host, new: &str) {
    let (active, containers) = (active_containers(host), host.containers());
    let (before, processes_before, start) = (settings(host), processes(host), Instant::now());
    let running = host.load(1000, 0, &["--mode", "mixed", "--method", "mixed"]);
    let unchanged = |when: &str| {
        assert_eq!(settings(host), before, "{when}");
        assert_eq!(registry_of(host), format!("{}:5443", host.ip), "{when}");
        assert_eq!(host.drift(), serde_json::json!([]), "{when}");
        consul_tells(host);
    };
    let drop_in = "/run/systemd/system/zd-registry.service.d";
    host.sh(&format!(
        "mkdir {drop_in}; printf '[Service]\\nExecStartPre=/bin/sh -c \"! grep -q {new} /etc/zd/registry/config.json\"\\n' \
         >{drop_in}/broken.conf; systemctl daemon-reload"
    ));
    let said = host.zd(&["reconfigure", "--ip", new, "--yes"]);
    assert!(said.code != 0 && said.err.contains(&format!("{}:5443 is back as it was", host.ip)), "{said:?}");
    host.sh(&format!("rm -r {drop_in}; systemctl daemon-reload"));
    unchanged("a registry that does not start");

    let killed_at = |entry: u32| {
        let failpoint = format!("journal:{entry}");
        let argv = ["zd", "-q", "reconfigure", "--ip", new, "--yes"];
        host.run_env(&[("ZD_FAILPOINT", &failpoint)], &argv).code != 0
    };
    let mut undone = 0;
    for entry in [3, 7, 9, 13] {
        assert!(killed_at(entry), "fewer than {entry} entries");
        host.zd(&["switch"]).fails(9, "unfinished", &["zd reconfigure", "zd undo"]);
        host.zd(&["reconfigure", "--ip", &host.ip]).fails(9, "unfinished", &[new]);
        host.zd(&["-q", "undo", "--yes"]).ok();
        unchanged(&format!("undo after entry {entry}"));
        undone += 1;
    }
    // Each run dies at the first entry that it writes.
    let mut kills = 0;
    while kills < 4 && killed_at(1) {
        kills += 1;
    }
    let report = host.zd(&["reconfigure", "--ip", new, "--reason", "line 4", "--yes", "--json"]).ok().json();
    println!(
        "readdressed after {undone} kills with undo and {kills} without: {:.1} s in all, the last run {:.1} s",
        start.elapsed().as_secs_f32(),
        report["seconds"].as_f64().unwrap()
    );
    assert_eq!((&report["failed"], &report["ip"]), (&0.into(), &new.into()), "{report}");
    assert!(report["probes"].as_u64().unwrap() > 5, "{report}");
    assert!(report["report"].as_str().unwrap().ends_with("-reconfigure.html"), "{report}");
    let loaded = host.clean(running);
    println!("meanwhile {} requests at 1,000/s, 0 failed, 0 mixed", loaded["requests"]);
    assert_eq!((active_containers(host), host.containers()), (active, containers), "nothing was touched");
    assert_eq!(processes(host), processes_before);
    assert_eq!(registry_of(host), format!("{new}:5443"));
    assert_eq!(host.sh("ls /etc/docker/certs.d"), format!("{new}:5443\n"));
    assert!(host.zd(&["history"]).ok().out.contains("line 4"));
}

/// Where there is a Consul: by TLS, with a certificate for the address that the host has.
fn consul_tells(host: &Host) {
    host.sh(&format!(
        "test ! -e /etc/zd/consul.d || CONSUL_HTTP_TOKEN=$(cat /etc/zd/secrets/consul-zd) \
         /opt/zd/generations/current/bin/consul catalog nodes -http-addr=https://{}:8501 -ca-file=/etc/zd/tls/ca.crt \
         | grep -q node-",
        host.ip
    ));
}

/// With the address before gone.
fn everything_goes_on(host: &Host, old: &str) {
    host.settles();
    host.zd(&["doctor"]).ok();
    consul_tells(host);
    assert_eq!(host.run(&["/stick/zd", "install", "--ip", "auto", "--json"]).ok().json()["changed"], 0);
    restarts(host);

    let active = active_containers(host);
    host.zd(&["scale", "hello", "3"]).ok();
    let three = active_containers(host);
    assert!(
        active.lines().all(|line| three.contains(line)),
        "those that stay are the same: {active} {three}"
    );
    host.zd(&["scale", "hello", "2"]).ok();
    assert_eq!(active_containers(host), active);
    let back = host.zd(&["rollback", "--json"]).ok().json();
    assert_eq!((&back["to"]["slot"], &back["to"]["version"]), (&"blue".into(), &"v1".into()));
    host.zd(&["secrets", "rotate", "--yes"]).ok();
    host.zd(&["deploy", "v3"]).ok();
    assert_eq!(named(host, "green"), format!("{}:5443", host.ip), "the next deploy takes the new name");
    assert_eq!(named(host, "blue"), format!("{old}:5443"));
    host.zd(&["switch"]).ok();
    host.zd(&["gc", "--yes"]).ok();
    host.zd(&["rollback"]).ok();
    host.settles();
}

/// Registry that a slot's image is named by.
fn named(host: &Host, slot: &str) -> String {
    let job = format!("/var/lib/zd/services/hello/{slot}.job.json");
    let names = host.sh(&format!(
        "if [ -e {job} ]; then sed -n 's/.*\"image\": \"\\([^/]*\\).*/\\1/p' {job}; \
         else docker inspect -f '{{{{.Config.Image}}}}' zd-hello-{slot}-1 | sed 's#/.*##'; fi | sort -u"
    ));
    names.trim().to_owned()
}

/// What crashes comes back from what Docker has, though its image is named by an address that is gone.
fn restarts(host: &Host) {
    let slot = host.active();
    host.sh(&format!(
        "docker ps -q -f label=zd.slot={slot} | xargs docker inspect -f {{{{.State.Pid}}}} | xargs kill -9"
    ));
    std::thread::sleep(Duration::from_secs(1));
    host.settles();
    host.serves();
}

/// The host boots with the new address alone.
fn comes_back_after_a_boot(host: &Host, old: &str) {
    let (unit, prefix) = ("/etc/systemd/system/fab-readdressed.service", prefix(host));
    let new = &host.ip;
    host.sh(&format!(
        "printf '[Unit]\\nDefaultDependencies=no\\nBefore=sysinit.target network-pre.target\\n[Service]\\nType=oneshot\\n\
         ExecStart=/sbin/ip address del {old}/{prefix} dev eth0\\nExecStart=/sbin/ip address add {new}/{prefix} dev eth0\\n\
         [Install]\\nWantedBy=sysinit.target\\n' >{unit}; systemctl enable -q fab-readdressed"
    ));
    let start = Instant::now();
    host.restart();
    host.settles();
    println!("as recorded {:.1} s after a boot with the new address alone", start.elapsed().as_secs_f32());
    host.serves();
    host.sh(&format!("systemctl disable -q fab-readdressed; rm {unit}; systemctl daemon-reload"));
}

/// The address is gone before zd was told of another.
fn already_gone(host: &mut Host, old: &str) {
    let new = host.ip.clone();
    host.sh("echo 1 >/proc/sys/net/ipv4/conf/eth0/promote_secondaries");
    add(host, old);
    remove(host, &new);
    host.ip = old.to_owned();
    let drift = host.drift().to_string();
    assert!(drift.contains(&new) && drift.contains("zd reconfigure --ip auto"), "{drift}");
    host.zd(&["doctor"]).fails(5, "preflight", &[]);
    host.zd(&["deploy", "v2"]).fails(7, "registry", &["zd reconfigure --ip auto"]);
    host.run(&["/stick/zd", "install"]).fails(5, "preflight", &["zd reconfigure"]);
    let active = active_containers(host);
    host.zd(&["reconfigure", "--ip", "auto", "--registry-port", "5444", "--yes"]).ok();
    assert_eq!(active_containers(host), active);
    host.settles();
    host.zd(&["deploy", "v2"]).ok();
}
