//! One upgrade over more versions of Nomad than its maker lets one step over: through those between.

use std::path::PathBuf;
use std::time::Instant;

use crate::another_bundle::{active_containers, finished_though_killed};
use crate::host::{Host, Pack, SERVICE, Said, stack, stepping_stack};

/// Which Nomad the unit starts.
const UNIT: &str = "grep ExecStart= /etc/systemd/system/nomad.service";

/// Kills the upgrade when this version is started, and not known to serve yet.
fn killed_at(host: &Host, version: &str) -> Said {
    let failpoint = format!("stone:{version}");
    let died = host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["/stick2/zd", "upgrade", "--yes"]);
    assert_ne!(died.code, 0, "{died:?}");
    died
}

fn serves_with(said: &Said, version: &str) -> bool {
    said.err.contains(&format!("nomad.service serves with {version} "))
}

/// Undone, and then gone on with, after every entry of the journal.
fn killed_after_each_entry(host: &Host) {
    let (active, unit) = (active_containers(host), host.sh(UNIT));
    let running = host.load(300, 0, &["--mode", "mixed", "--method", "mixed"]);
    for entry in 1.. {
        let failpoint = format!("journal:{entry}");
        let died = host.run_env(&[("ZD_FAILPOINT", &failpoint)], &["/stick2/zd", "-q", "upgrade", "--yes"]);
        assert_ne!(died.code, 0, "entry {entry}: {died:?}");
        if host.zd(&["undo", "--dry-run"]).out.contains("nothing is unfinished") {
            println!("upgrade killed after {entry} entries, undone each time but the last");
            break;
        }
        host.run(&["/stick2/zd", "-q", "undo", "--yes"]).ok();
        assert_eq!((host.sh(UNIT), active_containers(host)), (unit.clone(), active.clone()), "entry {entry}");
        host.settles();
    }
    host.settles();
    host.zd(&["-q", "rollback", "--generation", "1", "--yes"]).ok();
    finished_though_killed(host, &["/stick2/zd", "-q", "upgrade", "--yes"]);
    assert_eq!(active_containers(host), active);
    host.settles();
    host.clean(running);
}

fn next() -> Option<PathBuf> {
    let (folder, name, version, service) = ("stack-stones", Some("stack"), Some("2"), SERVICE);
    let releases = Some(stepping_stack("stack-stones-binaries")?);
    Some(Pack { folder, name, version, service, releases, ..Pack::default() }.make())
}

#[test]
#[ignore = "boots a host"]
fn full_stack_goes_through_stones() {
    let (Some(first), Some(next)) = (stack(), next()) else { return };
    let host = Host::installed_from("stones", first);
    host.copy_in(&next, "/stick2");
    let plan = host.run(&["/stick2/zd", "upgrade", "--dry-run", "--json"]).ok().json();
    let differences = plan["differences"].as_array().unwrap().iter().filter_map(|line| line.as_str());
    let nomad =
        differences.map(|line| line.split(" (").next().unwrap()).find_map(|l| l.strip_prefix("nomad "));
    let versions: Vec<&str> = nomad.expect("another Nomad").split(" -> ").collect();
    let [_, stones @ .., last] = versions.as_slice() else { panic!("{versions:?}") };
    assert!(stones.len() > 1, "more than one stone: {versions:?}");
    let active = active_containers(&host);
    let unit = || host.sh(UNIT);
    let unit_before = unit();

    let running = host.load(500, 0, &["--mode", "mixed", "--method", "mixed"]);
    let start = Instant::now();
    let said = host.run(&["/stick2/zd", "upgrade", "--yes", "--json"]).ok();
    println!("nomad {} in {:.1} s", versions.join(" -> "), start.elapsed().as_secs_f32());
    said.err.lines().filter(|line| line.contains("serves with")).for_each(|line| println!("{line}"));
    assert_eq!(said.json()["failed"], 0, "{}", said.out);
    assert!(stones.iter().all(|stone| serves_with(&said, stone)), "{}", said.err);
    assert!(said.err.contains("leads back"), "the way back is known before: {}", said.err);
    assert_eq!(active_containers(&host), active);
    host.settles();
    let status = host.zd(&["status"]).ok().out;
    assert!(status.contains(last), "{last} in {status}");
    let kept = host.sh("ls /opt/zd/programs | grep -c ^nomad-");
    assert_eq!(kept, "2\n", "what it only went through is not kept");

    let start = Instant::now();
    let back = host.zd(&["rollback", "--generation", "1", "--yes", "--json"]).ok();
    println!("and back in {:.1} s", start.elapsed().as_secs_f32());
    assert_eq!(back.json()["failed"], 0, "{}", back.out);
    assert!(back.err.contains("supports no way back"), "{}", back.err);
    assert_eq!((active_containers(&host), unit()), (active.clone(), unit_before.clone()));
    host.settles();
    host.zd(&["deploy", "v2"]).ok();
    host.zd(&["deploy", "v1"]).ok();
    println!("{}", host.clean(running)["requests"]);

    let running = host.load(300, 0, &["--mode", "mixed", "--method", "mixed"]);
    let programs = host.sh("ls /opt/zd/programs");
    for stone in stones {
        killed_at(&host, stone);
        host.run(&["/stick2/zd", "-q", "undo", "--yes"]).ok();
        assert_eq!((unit(), active_containers(&host)), (unit_before.clone(), active.clone()), "{stone}");
        assert_eq!(host.sh("ls /opt/zd/programs"), programs, "{stone}");
        host.settles();
    }
    // Each run goes on from where the one before was killed.
    for (at, stone) in stones.iter().enumerate() {
        let died = killed_at(&host, stone);
        for (earlier, passed) in stones.iter().enumerate() {
            assert_eq!(
                serves_with(&died, passed),
                earlier + 1 == at,
                "{passed} on the way to {stone}: {}",
                died.err
            );
        }
    }
    let said = host.run(&["/stick2/zd", "upgrade", "--yes"]).ok();
    assert!(serves_with(&said, stones[stones.len() - 1]) && !serves_with(&said, stones[0]), "{}", said.err);
    assert_eq!(active_containers(&host), active);
    host.settles();
    host.clean(running);

    if std::env::var_os("ZD_TEST_LONG").is_some() {
        host.zd(&["-q", "rollback", "--generation", "1", "--yes"]).ok();
        killed_after_each_entry(&host);
    }

    // When Nomad has had the time to write what earlier ones do not read, nobody tries.
    host.sh("touch -d '-11 minutes' /opt/zd/generations/2/zd-lock.json");
    let back = ["rollback", "--generation", "1", "--yes"];
    host.zd(&back).fails(5, "preflight", &["keys into Raft", "zd uninstall"]);
    assert_eq!(active_containers(&host), active);
    host.settles();
}
