//! Switches under load, with a client that never retries.

use crate::host::{Host, SERVICE, pack};

#[test]
#[ignore = "boots a host"]
fn a_hundred_switches_under_load() {
    const SWITCHES: usize = 100;
    let host = Host::installed("switches");
    host.zd(&["deploy", "v2"]).ok();
    let load = host.load(1000, SWITCHES, &["--mode", "mixed", "--method", "mixed", "--body", "1024"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    let start = std::time::Instant::now();
    let mut worst_hold = 0.0f64;
    let (mut p99s, mut totals) = (Vec::new(), Vec::new());
    for i in 0..SWITCHES {
        let report = host.zd(&["switch", "--json"]).ok().json();
        let ms = |key: &str| report[key].as_f64().unwrap();
        worst_hold = worst_hold.max(ms("hold_ms"));
        totals.push(ms("total_ms"));
        p99s.push(ms("held_p99_ms"));
        // Evenly over the load, so that each version settles.
        let ahead = (i + 1) as f64 * 0.69 - start.elapsed().as_secs_f64();
        std::thread::sleep(std::time::Duration::from_secs_f64(ahead.max(0.3)));
    }
    let report = host.clean(load);
    p99s.sort_by(f64::total_cmp);
    totals.sort_by(f64::total_cmp);
    println!(
        "{SWITCHES} switches, {} requests, 0 failed, 0 mixed; hold worst {worst_hold:.1} ms; held p99 median {:.1} ms, \
         99th switch {:.1} ms; command worst {:.0} ms; latency {}",
        report["requests"],
        p99s[p99s.len() / 2],
        p99s[p99s.len() * 99 / 100],
        totals[SWITCHES - 1],
        report["latency_ms"]
    );
    assert!(totals[98] < 1000.0, "a switch with its verification takes under 1 s: {totals:?}");
}

#[test]
#[ignore = "boots a host"]
fn slow_services() {
    let folder = pack("slow", &SERVICE.replace("\"v1\"", "\"slow200\""));
    let host = Host::installed_from("slow", &folder);
    host.zd(&["deploy", "v2"]).ok();

    // 200 ms answers: drained in time, nothing fails.
    let load = host.load(200, 2, &["--mode", "mixed"]);
    for to in ["green", "blue"] {
        std::thread::sleep(std::time::Duration::from_millis(2500));
        host.zd(&["switch", "--to", to]).ok();
    }
    host.clean(load);

    // 3 s answers: the switch gives up within its time, nothing fails, nothing changed.
    host.zd(&["deploy", "slow3000"]).ok();
    host.zd(&["switch", "--to", "green"]).ok();
    host.zd(&["deploy", "v3"]).ok();
    let load = host.load(50, 0, &["--mode", "mixed", "--timeout", "20s"]);
    std::thread::sleep(std::time::Duration::from_secs(4));
    let start = std::time::Instant::now();
    host.zd(&["switch"]).fails(8, "not-drained", &["nothing changed"]);
    assert!(start.elapsed().as_secs_f32() < 5.0, "{:?}", start.elapsed());
    assert_eq!(host.active(), "green");
    let report = host.clean(load);
    assert_eq!(report["versions"].as_object().unwrap().len(), 1, "{}", report["versions"]);
}

#[test]
#[ignore = "boots a host"]
fn large_uploads_scaling_and_docker_stopped() {
    let host = Host::installed("uploads");
    host.zd(&["deploy", "v2"]).ok();
    // Bodies larger than nginx's buffers, while switching.
    let load = host.load(10, 2, &["--method", "post", "--body", "4000000", "--timeout", "20s"]);
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_millis(2500));
        host.zd(&["switch", "--drain", "10s"]).ok();
    }
    host.clean(load);
    scales(&host);
    // Nothing that serves needs dockerd or the registry to be up.
    let load = host.load(500, 0, &[]);
    std::thread::sleep(std::time::Duration::from_secs(1));
    host.sh("systemctl stop docker.socket docker zd-registry");
    std::thread::sleep(std::time::Duration::from_secs(3));
    host.sh("systemctl start docker.socket docker zd-registry");
    host.clean(load);
}

/// More containers and fewer under load, with both kinds of connections: no request fails, what stays is
/// not touched, and nginx spreads over what is there.
pub fn scales(host: &Host) {
    let load = host.load(1000, 0, &["--mode", "mixed", "--method", "mixed"]);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let two = host.containers();
    assert_eq!(two.lines().count(), 4);
    let more = host.zd(&["scale", "hello", "4", "--reason", "ticket 5", "--json"]).ok().json();
    assert_eq!((&more["from"], &more["to"]), (&2.into(), &4.into()));
    let four = host.containers();
    assert_eq!(four.lines().count(), 8, "{four}");
    assert!(two.lines().all(|l| four.contains(l)), "those that stay are the same:\n{two}\n{four}");
    // Killed half way, then taken back by the next command.
    let died = host.run_env(&[("ZD_FAILPOINT", "journal:4")], &["zd", "scale", "hello", "5"]);
    assert_ne!(died.code, 0, "{died:?}");
    host.zd(&["scale", "hello", "1"]).ok();
    let one = host.containers();
    assert_eq!(one.lines().count(), 2, "{one}");
    assert!(one.lines().all(|l| two.contains(l)), "those that stay are the same:\n{two}\n{one}");
    let report = host.clean(load);
    println!("scale 2, 4, 1 at 1,000/s: 0 failed; latency {}", report["latency_ms"]);
    let status = host.zd(&["status", "--json"]).ok().json();
    assert_eq!(status["drift"].as_array().unwrap().len(), 0, "{}", status["drift"]);
    assert_eq!(host.run(&["/stick/zd", "install", "--json"]).ok().json()["changed"], 0);
    let too_many = host.zd(&["scale", "hello", "10"]);
    assert!(too_many.code == 2 && too_many.err.contains("1..=9"), "{too_many:?}");
    host.zd(&["scale", "hello", "2"]).ok();
    assert!(host.zd(&["history"]).ok().out.contains("ticket 5"));
}
