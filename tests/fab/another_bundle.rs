//! The bundle of the next quarter, applied to services at work, and back again.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use crate::host::{
    Host, PROGRAMS, Pack, Running, SECOND, SERVICE, Said, differences, next_stack, stack, zd_stack,
};

const PACKAGES: [&str; 3] = ["nginx", "docker.io", "docker-registry"];

/// The bundle that is installed first, and one that follows it.
fn first() -> &'static Path {
    static FIRST: OnceLock<PathBuf> = OnceLock::new();
    let (folder, name, service) = ("quarter-1", Some("quarter"), SERVICE);
    FIRST.get_or_init(|| Pack { folder, name, service, ..Pack::default() }.make())
}

fn next(folder: &str, service_version: &str, broken: &str) -> PathBuf {
    next_with(folder, service_version, &PACKAGES, broken)
}

/// Another version of the service, and another service.
fn with_second(version: &str) -> String {
    SERVICE.replace("\"v1\"", &format!("{version:?}")) + SECOND
}

/// What the second service answers; empty where it is not installed, nor anything left of it.
fn second(host: &Host) -> String {
    let mut answer = String::new();
    if let Ok(mut stream) = TcpStream::connect((host.ip.as_str(), 82)) {
        stream.write_all(b"GET /hello HTTP/1.0\r\n\r\n").expect("asked");
        stream.read_to_string(&mut answer).expect("an answer");
    } else {
        let left = "docker ps -aq -f label=zd.service=second; ls /var/lib/zd/services /etc/zd/nginx /etc/zd/templates \
                    /var/lib/zd/pools | grep second; systemctl --no-legend list-units --all '*@second.*'";
        assert_eq!(host.sh(&format!("({left}) 2>/dev/null || true")), "");
    }
    answer
}

fn next_with(folder: &str, service_version: &str, newer: &[&str], broken: &str) -> PathBuf {
    let service = with_second(service_version);
    let (name, version) = (Some("quarter"), Some("2"));
    let (service, without) = (service.as_str(), "v3");
    Pack { folder, name, version, service, newer, broken, without, ..Pack::default() }.make()
}

/// Requests of every kind for as long as the change may take; no change of version is expected.
fn load(host: &Host, rate: u32, changes: usize) -> Running {
    host.load(rate, changes, &["--mode", "mixed", "--method", "mixed"])
}

/// Main processes of the parts; 0 where there is none.
fn pids(host: &Host) -> String {
    host.sh("for u in docker containerd zd-registry consul nomad consul-template zd-nginx@hello; do \
         echo $u $(systemctl show -p MainPID --value $u); done")
}

#[test]
#[ignore = "boots a host"]
fn upgraded_and_back_at_work() {
    let host = Host::bare("upgraded", first());
    let before = host.picture();
    host.run(&["/stick/zd", "-q", "install", "--ip", "auto"]).ok();
    host.copy_in(&next("quarter-2", "v2", ""), "/stick2");
    host.run(&["/stick2/zd", "install"]).fails(9, "other-bundle", &["zd upgrade"]);
    let plan = host.run(&["/stick2/zd", "upgrade", "--dry-run"]).ok().out;
    for part in ["package nginx", "package docker.io", "+zd1", "service hello"] {
        assert!(plan.contains(part), "{part} in {plan}");
    }
    let active = host.sh("docker inspect -f '{{.Id}} {{.State.StartedAt}}' zd-hello-blue-1 zd-hello-blue-2");
    let processes = pids(&host);

    let running = load(&host, 1000, 0);
    let start = Instant::now();
    let report = host.run(&["/stick2/zd", "upgrade", "--yes", "--json"]).ok().json();
    println!("upgrade of nginx, Docker, registry and service: {:.1} s", start.elapsed().as_secs_f32());
    assert_eq!(report["generation"], 2, "{report}");
    assert_eq!(report["failed"], 0, "{report}");
    assert!(report["probes"].as_u64().unwrap() > 50, "{report}");
    assert!(second(&host).contains("v1"));
    assert_eq!(report["deployed"][0]["slot"], "green", "{report}");
    let now = pids(&host);
    let same: Vec<_> = now.lines().filter(|line| processes.lines().any(|l| l == *line)).collect();
    let gone = |line: &&str| line.ends_with(" 0");
    let same: Vec<_> = same.into_iter().filter(|line| !gone(line)).collect();
    assert_eq!(same.len(), 1, "only containerd is the same: {processes} {now}");
    assert_eq!(
        host.sh("docker inspect -f '{{.Id}} {{.State.StartedAt}}' zd-hello-blue-1 zd-hello-blue-2"),
        active
    );
    host.settles();
    let start = Instant::now();
    let again = host.run(&["/stick2/zd", "upgrade", "--json"]).ok().json();
    assert_eq!(again["changed"], 0, "{again}");
    assert!(start.elapsed().as_secs() < 5);
    assert_eq!(host.run(&["/stick2/zd", "install", "--json"]).ok().json()["changed"], 0);

    // Back to the first generation, with the services as they are.
    let start = Instant::now();
    let back = host.zd(&["rollback", "--generation", "1", "--yes", "--json"]).ok().json();
    println!("back to generation 1: {:.1} s", start.elapsed().as_secs_f32());
    assert_eq!((back["failed"].clone(), back["generation"].clone()), (0.into(), 1.into()), "{back}");
    assert_eq!(second(&host), "", "gone back");
    assert!(!host.sh("dpkg-query -W nginx docker.io docker-registry").contains("+zd1"));
    host.settles();
    host.clean(running);

    let running = load(&host, 1000, 1);
    host.run(&["/stick2/zd", "upgrade", "--switch", "--yes"]).ok();
    host.clean(running);
    let status = host.zd(&["status", "--json"]).ok().json();
    assert_eq!(status["services"][0]["active"], "green", "{status}");
    host.restart();
    host.settles();
    host.serves();
    host.settles();
    let listed = host.zd(&["generations", "--json"]).ok().json();
    assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");
    assert_eq!(listed[1]["current"], true);

    assert_eq!(
        host.zd(&["gc", "--json"]).ok().json()["images"],
        serde_json::json!([]),
        "two generations name all"
    );
    host.sh("rm -r /opt/zd/generations/1");
    assert_eq!(host.zd(&["gc", "--yes", "--json"]).ok().json()["images"], serde_json::json!(["hello:v3"]));
    host.zd(&["deploy", "v3", "hello"]).fails(10, "unknown-version", &["v1", "v2"]);
    host.sh("docker image prune -af >/dev/null");
    host.zd(&["deploy", "v1", "hello"]).ok();
    host.settles();
    // Of an upgrade that deployed as well: its own steps are taken back, not only those of the install.
    let undone = host.zd(&["uninstall", "--purge", "--yes", "--json"]).ok().json()["undone"].to_string();
    assert_eq!(undone.matches("link /opt/zd/generations/current").count(), 4, "{undone}");
    host.sh("rm -r /stick?*");
    assert_eq!(differences(&before, &host.picture()), "", "as it was before the first install");
}

/// Seconds that the way back took.
fn went_back_in(said: &Said) -> f64 {
    let seconds = said.err.split("back as it was before, in ").nth(1).and_then(|rest| rest.split(' ').next());
    seconds.and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{said:?}"))
}

/// What does not work is taken back by itself: nothing of it stays, and no client notices.
#[test]
#[ignore = "boots a host"]
fn broken_upgrades_go_back() {
    let host = Host::bare("broken", first());
    host.sh("mkdir /opt/zd && mount -t tmpfs -o size=1g tmpfs /opt/zd");
    host.sh("mkdir /var/lib/zd && mount -t tmpfs -o size=400m tmpfs /var/lib/zd");
    host.run(&["/stick/zd", "-q", "install", "--ip", "auto"]).ok();
    nothing_begins_on_a_full_disk(&host);
    let containers = host.containers();
    let packages = host.sh("dpkg-query -W");
    disk_full(&host);
    for (folder, version, broken, says) in [
        ("quarter-sick", "sick", "", "status 503"),
        ("quarter-nginx", "v2", "nginx", "broken on purpose"),
        ("quarter-registry", "v2", "docker-registry", "keeps ending"),
        ("quarter-docker", "v2", "docker.io", "docker.service does not start"),
    ] {
        let stick = format!("/stick-{folder}");
        host.copy_in(&next(folder, version, broken), &stick);
        let running = load(&host, 300, 0);
        let start = Instant::now();
        let said = host.run(&[&format!("{stick}/zd"), "upgrade", "--yes"]);
        println!("{folder}: {:.1} s there and back", start.elapsed().as_secs_f32());
        assert!(said.code != 0 && went_back_in(&said) < 60.0, "{said:?}");
        assert!(
            said.err.contains("no backup is taken before") && said.err.contains("--recipient"),
            "{}",
            said.err
        );
        assert!(said.err.contains(says) && said.err.contains("generation 1 is back"), "{said:?}");
        host.clean(running);
        assert_eq!(host.sh("dpkg-query -W"), packages, "{folder}");
        assert_eq!(
            host.sh("readlink /opt/zd/generations/current; ls /opt/zd/generations"),
            "1\n1\ncurrent\n"
        );
        host.settles();
        host.sh(&format!("rm -r {stick}"));
    }
    let same = |line: &&str| line.contains("blue");
    let (was, now) = (containers, host.containers());
    assert_eq!(was.lines().filter(same).collect::<Vec<_>>(), now.lines().filter(same).collect::<Vec<_>>());
}

/// What could not be written down is not begun; what frees the disk is.
fn nothing_begins_on_a_full_disk(host: &Host) {
    host.sh("fallocate -l $(df --output=avail -B1 /var/lib/zd | tail -1) /var/lib/zd/fill");
    let before = host.containers();
    for verb in
        [&["switch"][..], &["deploy", "v3"], &["scale", "hello", "3"], &["secrets", "rotate", "--yes"]]
    {
        host.zd(verb).fails(6, "disk-full", &["/var/lib/zd", "nothing was changed", "zd gc"]);
    }
    host.zd(&["gc", "--yes"]).ok();
    host.zd(&["undo", "--yes"]).ok();
    assert_eq!((host.active().as_str(), host.containers()), ("blue", before));
    assert_eq!(host.drift(), serde_json::json!([]));
    host.sh("rm /var/lib/zd/fill");
    host.zd(&["switch"]).ok();
    host.zd(&["rollback"]).ok();
    host.zd(&["history"]).ok();
}

/// The disk fills after the forecast said that there is room.
fn disk_full(host: &Host) {
    host.copy_in(&next("quarter-full", "v2", ""), "/stick-full");
    host.sh("systemd-run -q --unit=site --socket-property=ListenStream=82 true");
    host.run(&["/stick-full/zd", "upgrade", "--yes"]).fails(5, "preflight", &["82 for the service is taken"]);
    assert_eq!(host.sh("ls /opt/zd/generations"), "1\ncurrent\n");
    host.sh("systemctl stop site.socket");
    let running = load(host, 300, 0);
    let said = host.run(&[
        "sh",
        "-c",
        "/stick-full/zd upgrade --yes & p=$!; while [ ! -d /opt/zd/generations/2 ]; do :; done; kill -STOP $p; \
         fallocate -l $(($(df --output=avail -B1 /opt/zd | tail -1) - 4096)) /opt/zd/fill; kill -CONT $p; wait $p",
    ]);
    assert!(said.code == 6 && said.err.contains("error[disk-full]"), "{said:?}");
    assert!(said.err.contains("generation 1 is back"), "{said:?}");
    assert_eq!(host.sh("ls /opt/zd/generations"), "1\ncurrent\n");
    host.sh("rm /opt/zd/fill; rm -r /stick-full");
    host.settles();
    host.clean(running);
}

/// One part after the other, each in a bundle of its own: only it is restarted.
#[test]
#[ignore = "boots a host"]
fn each_part_alone() {
    if std::env::var_os("ZD_TEST_LONG").is_none() {
        println!("SKIPPED each_part_alone: only with ./test --long");
        return;
    }
    let host = Host::installed_from("parts", first());
    for (folder, newer, service, restarted) in [
        ("part-nginx", &["nginx"][..], "v1", &["zd-nginx@hello"][..]),
        ("part-registry", &["docker-registry"], "v1", &["zd-registry"]),
        ("part-docker", &["docker.io"], "v1", &["docker"]),
        ("part-service", &[], "v2", &[]),
    ] {
        there_and_back(&host, &next_with(folder, service, newer, ""), restarted);
    }
    let Some(releases) = zd_stack() else { return };
    let (folder, name, service) = ("part-stack", Some("stack"), SERVICE);
    let first = Pack { folder, name, service, releases: Some(releases), ..Pack::default() }.make();
    let host = Host::installed_from("stack-parts", &first);
    for program in PROGRAMS {
        let folder = &format!("part-{program}");
        let releases = next_stack(&format!("{folder}-binaries"), &[program], "");
        let version = Some("2");
        let next = Pack { folder, name, version, service, releases, ..Pack::default() }.make();
        there_and_back(&host, &next, &[program]);
    }
}

/// Upgrades, and goes back to the first generation, under load; of the main processes only these become others.
fn there_and_back(host: &Host, next: &Path, restarted: &[&str]) {
    host.copy_in(next, "/next");
    let (active, before) = (active_containers(host), pids(host));
    let running = load(host, 1000, 0);
    let there = host.run(&["/next/zd", "upgrade", "--yes", "--json"]).ok().json();
    assert_eq!(there["failed"], 0, "{there}");
    host.settles();
    let now = pids(host);
    let changed: Vec<&str> = now
        .lines()
        .filter(|line| !before.lines().any(|l| l == *line))
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(changed, restarted, "{before} {now}");
    let back = host.zd(&["rollback", "--generation", "1", "--yes", "--json"]).ok().json();
    assert_eq!(back["failed"], 0, "{back}");
    host.settles();
    assert_eq!(active_containers(host), active, "{restarted:?}");
    host.clean(running);
    println!("{restarted:?}: there {} s, back {} s", there["seconds"], back["seconds"]);
    host.sh("rm -r /next");
}

/// Killed after journal entries of an upgrade: taken back, or run again, each time whole.
#[test]
#[ignore = "boots a host"]
fn killed_upgrades_are_undone_or_finished() {
    torn(&Host::bare("torn", first()), &next("quarter-torn", "v2", ""));
}

#[test]
#[ignore = "boots a host"]
fn full_stack_upgrades_are_undone_or_finished() {
    let Some(first) = stack() else { return };
    torn(&Host::bare("torn-nomad", first), &next_of_stack("stack-torn", "").expect("programs"));
}

fn torn(host: &Host, next: &Path) {
    host.run(&["/stick/zd", "-q", "install", "--ip", "auto"]).ok();
    host.copy_in(next, "/stick2");
    let packages = host.sh("dpkg-query -W");
    let long = std::env::var_os("ZD_TEST_LONG").is_some();
    let (mut entry, mut tried) = (1, 0);
    let running = load(host, 300, 0);
    loop {
        let failpoint = format!("journal:{entry}");
        let died = host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["/stick2/zd", "-q", "upgrade", "--yes"]);
        // Killed behind the last entry it is whole.
        if died.code == 0 || host.zd(&["undo", "--dry-run"]).out.contains("nothing is unfinished") {
            break;
        }
        host.zd(&["switch"]).fails(9, "unfinished", &["zd upgrade", "zd undo"]);
        host.run(&["/stick2/zd", "-q", "undo", "--yes"]).ok();
        if host.sh("readlink /opt/zd/generations/current") == "2\n" {
            // The containers before were being removed: from there it is finished.
            break;
        }
        assert_eq!(host.sh("dpkg-query -W"), packages, "undo after entry {entry}");
        assert_eq!(second(host), "", "undo after entry {entry}");
        host.settles();
        tried += 1;
        entry += if long { 1 } else { 21 };
    }
    println!("upgrade killed after {tried} entries and undone each time");
    assert!(second(host).contains("v1"));
    let back = ["zd", "-q", "rollback", "--generation", "1", "--yes"];
    let plan = host.run(&[&back[..], &["--dry-run"]].concat()).ok().out;
    assert!(plan.contains("service second goes, and port 82 with it"), "{plan}");
    finished_though_killed(host, &back);
    assert_eq!(second(host), "", "gone back");
    host.clean(running);
    taken_back_by_a_reboot(host, "journal:5");
    let running = load(host, 300, 0);
    finished_though_killed(host, &["/stick2/zd", "-q", "upgrade", "--yes"]);
    assert!(host.sh("dpkg-query -W nginx").contains("+zd1") && second(host).contains("v1"));
    host.settles();
    host.clean(running);
}

/// Each run dies at the third entry that it writes, so now before a step and now behind one; at the first with --long.
pub fn finished_though_killed(host: &Host, command: &[&str]) {
    let entry = if std::env::var_os("ZD_TEST_LONG").is_some() { "journal:1" } else { "journal:3" };
    let mut kills = 0;
    while host.run_env(&[("ZD_FAILPOINT", entry)], command).code != 0 {
        kills += 1;
        assert!(kills < 200, "does not come to an end");
    }
    println!("{} killed {kills} times and run again each time", command[2]);
}

/// The host goes down in the middle: it comes up with all that it had before.
fn taken_back_by_a_reboot(host: &Host, at: &str) {
    let packages = host.sh("dpkg-query -W");
    let died = host.run_env(&[("ZD_FAILPOINT", at)], &["/stick2/zd", "-q", "upgrade", "--yes"]);
    assert_ne!(died.code, 0, "{died:?}");
    assert_ne!(host.sh("dpkg-query -W"), packages, "it was in the middle");
    let unfinished = host.drift().to_string();
    assert!(unfinished.contains("an interrupted upgrade"), "{unfinished}");
    let start = Instant::now();
    host.restart();
    host.settles();
    println!("rebooted in the middle of an upgrade: as before {:.1} s later", start.elapsed().as_secs_f32());
    assert_eq!(host.sh("dpkg-query -W"), packages);
    assert_eq!(host.sh("readlink /opt/zd/generations/current"), "1\n");
    assert!(host.zd(&["history"]).ok().out.contains("undone"));
    host.serves();
}

fn next_of_stack(folder: &str, broken: &str) -> Option<PathBuf> {
    let service = with_second("v2");
    let releases = Some(next_stack(&format!("{folder}-binaries"), &PROGRAMS, broken)?);
    let (name, version) = (Some("stack"), Some("2"));
    Some(
        Pack { folder, name, version, service: &service, newer: &PACKAGES, releases, ..Pack::default() }
            .make(),
    )
}

/// Containers of the active slot: id and start time.
pub fn active_containers(host: &Host) -> String {
    let slot = host.active();
    let list = format!("docker ps -q --no-trunc -f label=zd.slot={slot} -f label=zd.service=hello");
    host.sh(&format!("docker inspect -f '{{{{.Id}}}} {{{{.State.StartedAt}}}}' $({list}) | sort"))
}

#[test]
#[ignore = "boots a host"]
fn full_stack_upgraded() {
    let Some(releases) = zd_stack() else { return };
    let (folder, service) = ("stack-1", SERVICE);
    let name = Some("stack");
    let (releases, loopback_only) = (Some(releases), true);
    let first = Pack { folder, name, service, releases, loopback_only, ..Pack::default() }.make();
    let host = Host::bare("stack-next", &first);
    let before = host.picture();
    host.run(&["/stick/zd", "-q", "install", "--ip", "auto"]).ok();
    host.copy_in(&next_of_stack("stack-2", "").expect("programs"), "/stick2");
    // As an earlier zd left it: the programs in the folder of their generation, the jobs kept nowhere.
    host.sh(
        "cd /opt/zd/generations/1/bin; for p in *; do cp --remove-destination $(readlink -f $p) $p; done; \
         rm /var/lib/zd/services/hello/*.job.json",
    );
    let active = active_containers(&host);

    let running = load(&host, 1000, 0);
    let start = Instant::now();
    let report = host.run(&["/stick2/zd", "upgrade", "--yes", "--json"]).ok().json();
    println!("nomad engine: everything upgraded in {:.1} s", start.elapsed().as_secs_f32());
    assert_eq!(report["failed"], 0, "{report}");
    assert_eq!(active_containers(&host), active);
    host.settles();
    let again = host.run(&["/stick2/zd", "upgrade", "--json"]).ok().json();
    assert_eq!(again["changed"], 0, "{again}");
    assert_eq!(host.run(&["/stick2/zd", "install", "--json"]).ok().json()["changed"], 0);
    host.sh("readlink -f /opt/zd/generations/2/bin/* >/tmp/new; \
         rm $(find /opt/zd/programs -type f ! -name 'zd-*' | grep -vxF -f /tmp/new); rm /tmp/new");
    let start = Instant::now();
    let back = host.zd(&["rollback", "--generation", "1", "--yes", "--json"]).ok().json();
    println!("nomad engine: back to generation 1 in {:.1} s", start.elapsed().as_secs_f32());
    assert_eq!(back["failed"], 0, "{back}");
    assert_eq!(active_containers(&host), active);
    host.settles();
    host.clean(running);

    for broken in ["consul", "nomad"] {
        let stick = format!("/stick-{broken}");
        host.copy_in(&next_of_stack(&format!("stack-{broken}"), broken).expect("programs"), &stick);
        let running = load(&host, 1000, 0);
        let start = Instant::now();
        let said = host.run(&[&format!("{stick}/zd"), "upgrade", "--yes"]);
        println!("a {broken} that does not start: {:.1} s there and back", start.elapsed().as_secs_f32());
        assert!(went_back_in(&said) < 60.0, "{said:?}");
        assert!(said.code != 0 && said.err.contains("generation 1 is back"), "{said:?}");
        host.settles();
        host.clean(running);
        assert_eq!(active_containers(&host), active);
    }

    let running = load(&host, 1000, 1);
    for entry in [7, 5, 3] {
        let failpoint = format!("journal:{entry}");
        let died = host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["/stick2/zd", "-q", "upgrade", "--yes"]);
        assert_ne!(died.code, 0, "{died:?}");
    }
    host.run(&["/stick2/zd", "-q", "upgrade", "--switch", "--yes"]).ok();
    host.clean(running);
    host.settles();
    host.zd(&["rollback", "--generation", "1", "--yes"]).ok();
    taken_back_by_a_reboot(&host, "journal:9");
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    host.sh("rm -r /stick?*");
    assert_eq!(differences(&before, &host.picture()), "", "as it was before the first install");
}
