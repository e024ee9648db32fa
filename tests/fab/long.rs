//! Long-lived paths: sessions that stay open over switches and reloads, and ordinary requests beside them that must
//! not be taken for one of these.

use std::io::{BufRead, BufReader, Error, ErrorKind, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use serde_json::Value;

use crate::host::{APART, Host, SERVICE, pack, pack_nomad};

const LONG: &str = r#"standby-allow = ["0.0.0.0/0"]
[[service.long-lived]]
path = "/ws"
drain-ms = 300
[[service.long-lived]]
path = "/poll"
drain-ms = 0
[[service.long-lived]]
path = "/events"
sessions = "cut"
"#;

/// A request, and what is read of its answer and of what follows it.
struct Request {
    stream: BufReader<TcpStream>,
    version: String,
    /// When the service began with it and had its answer, in µs of the host's clock, where it says so.
    began_us: u64,
    ended_us: u64,
}

impl Request {
    /// Until the answer's head is here.
    fn send(host: &Host, port: u16, path: &str) -> Result<Self> {
        let address: SocketAddr = format!("{}:{port}", host.ip).parse().expect("an address");
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let more = if path == "/ws" { "Connection: upgrade\r\nUpgrade: lines\r\n" } else { "" };
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\n{more}\r\n")?;
        let mut request =
            Self { stream: BufReader::new(stream), version: String::new(), began_us: 0, ended_us: 0 };
        let status = request.line()?;
        if !["HTTP/1.1 200", "HTTP/1.1 101"].iter().any(|good| status.starts_with(good)) {
            return Err(Error::other(status));
        }
        loop {
            match request.line()? {
                line if line.is_empty() => return Ok(request),
                line => match line.split_once(": ") {
                    Some(("X-Version", version)) => request.version = version.to_owned(),
                    Some(("X-Began-Us", us)) => request.began_us = us.parse().expect("a number"),
                    Some(("X-Ended-Us", us)) => request.ended_us = us.parse().expect("a number"),
                    _ => {}
                },
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    /// The version that is at the other end of an open /ws.
    fn ask(&mut self) -> Result<String> {
        self.stream.get_mut().write_all(b"which\n")?;
        self.line()
    }
}

fn ws(host: &Host) -> Request {
    Request::send(host, 80, "/ws").unwrap()
}

/// Packed once, for the tests of it run at the same time.
fn stick() -> &'static Path {
    static STICK: OnceLock<PathBuf> = OnceLock::new();
    STICK.get_or_init(|| pack("long", &format!("{SERVICE}{LONG}")))
}

#[test]
#[ignore = "boots a host"]
fn long_lived_paths() {
    let host = Host::installed_from("long", stick());
    host.zd(&["deploy", "v2"]).ok();
    over_switches(&host);
    nothing_is_hidden(&host);
    scaled(&host);
    nginx_replaced(&host);
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
}

#[test]
#[ignore = "boots a host"]
fn long_lived_paths_on_the_nomad_engine() {
    let Some(stick) = pack_nomad("long-nomad", &format!("{SERVICE}{LONG}")) else { return };
    let host = Host::installed_from("long-nomad", &stick);
    host.zd(&["deploy", "v2"]).ok();
    over_switches(&host);
    nothing_is_hidden(&host);
    scaled(&host);
}

/// Holds of some switches under load, in ms, sorted.
fn holds(host: &Host, switches: usize, each: impl Fn(&Value)) -> Vec<f64> {
    let load = host.load(1000, switches, &["--mode", "mixed", "--method", "mixed"]);
    std::thread::sleep(Duration::from_secs(2));
    let mut holds = Vec::new();
    for i in 0..switches {
        let report = host.zd(&[["switch", "rollback"][i % 2], "--json"]).ok().json();
        holds.push(report["hold_ms"].as_f64().unwrap());
        each(&report);
        std::thread::sleep(Duration::from_millis(700));
    }
    host.clean(load);
    holds.sort_by(f64::total_cmp);
    holds
}

fn over_switches(host: &Host) {
    const SWITCHES: usize = 10;
    const MANY: usize = 200;
    let without = holds(host, SWITCHES, |_| {});
    let mut kept: Vec<Request> = (0..MANY).map(|_| ws(host)).collect();
    let mut cut: Vec<Request> = (0..20).map(|_| Request::send(host, 80, "/events").unwrap()).collect();
    let mut standby = Request::send(host, 8081, "/ws").unwrap();
    assert!(kept.iter_mut().all(|s| s.ask().unwrap() == "v1"));
    assert!(cut.iter().all(|s| s.version == "v1"));
    assert_eq!(standby.ask().unwrap(), "v2");
    let status = host.zd(&["status"]).ok().out;
    for line in [
        "path /ws (sessions drain): 200 with blue, 1 with green open",
        "path /events (sessions cut): 20 with blue",
    ] {
        assert!(status.contains(line), "{status}");
    }

    let first = Mutex::new(true);
    let with = holds(host, SWITCHES, |report| {
        let blue = report["from"]["slot"] == "blue";
        let of = |i: usize| (&report["sessions"][i]["open"], &report["sessions"][i]["left"]);
        let open = Value::from(if blue { MANY } else { 1 });
        assert_eq!(of(0), (&open, &open), "{report}");
        if std::mem::take(&mut *first.lock().unwrap()) {
            assert_eq!(of(2), (&20.into(), &0.into()), "{report}");
            assert_eq!(ws(host).version, "v2", "a new one goes to the new slot");
        }
    });
    let median = |holds: &[f64]| holds[holds.len() / 2];
    println!(
        "{SWITCHES} switches under 1,000/s: hold median {:.1} ms, longest {:.1} ms; with {MANY} open: {:.1}, {:.1} ms",
        median(&without),
        without[SWITCHES - 1],
        median(&with),
        with[SWITCHES - 1]
    );
    // The median: other hosts' tests want the processors at the same time.
    assert!(median(&with) < 100.0, "{with:?}");
    assert!(kept.iter_mut().all(|s| s.ask().unwrap() == "v1"), "they stay with their slot");
    assert_eq!(standby.ask().unwrap(), "v2");
    assert!(cut.iter_mut().all(|s| std::iter::repeat_with(|| s.line()).take(1000).any(|l| l.is_err())));
    let history = host.zd(&["history", "--json"]).ok().out;
    assert!(history.contains("path /events: 20 sessions of blue closed"), "{history}");

    // A deploy to their slot says that it ends them.
    host.zd(&["switch"]).ok();
    let said = host.zd(&["deploy", "v3"]).ok();
    assert!(said.err.contains("200 sessions of path /ws are still with blue"), "{}", said.err);
    assert!(kept.iter_mut().all(|s| s.ask().is_err()));
    assert_eq!(standby.ask().unwrap(), "v2");
    host.zd(&["deploy", "v1"]).ok();
    host.zd(&["switch"]).ok();
}

/// The switch waits for an ordinary answer, however many others it leaves out.
fn nothing_is_hidden(host: &Host) {
    let mut kept: Vec<Request> = (0..20).map(|_| ws(host)).collect();
    waits_for_one(host);
    // A kernel that does not say who is connected.
    let blind =
        "systemd-run -q --wait --pipe -p RestrictAddressFamilies='AF_UNIX AF_INET' zd switch --drain 300ms";
    let why = ["20 requests of the old slot", "cannot be told apart", "modprobe unix_diag"];
    host.run(&["sh", "-c", blind]).fails(8, "not-drained", &why);
    assert_eq!(host.active(), "blue");
    assert!(kept.iter_mut().all(|s| s.ask().unwrap() == "v1"));
    drop(kept);
    host.comes("zd status | grep -q '/ws (sessions drain): 0 with blue, 0 with green open'");
}

fn waits_for_one(host: &Host) {
    let slow = |delay_ms: u32| Request::send(host, 80, &format!("/hello?delay_ms={delay_ms}"));
    let active = host.active();
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| slow(2500));
        std::thread::sleep(Duration::from_millis(300));
        let one = ["1 requests of the old slot had no answer after 500 ms", "--drain 10s"];
        host.zd(&["switch", "--drain", "500ms"]).fails(8, "not-drained", &one);
        assert_eq!(host.active(), active);
        let report = host.zd(&["switch", "--drain", "5s", "--json"]).ok().json();
        assert!(answer.is_finished(), "{report}");
        let answer = answer.join().unwrap().unwrap();
        assert_ne!(answer.version, ws(host).version, "the slot before answered");
        println!(
            "waits {:.0} ms for an ordinary answer beside open sessions",
            report["hold_ms"].as_f64().unwrap()
        );
    });
    host.zd(&["rollback"]).ok();
}

/// A reload: what is open goes on with nginx's old workers, and is still left out of the wait.
fn scaled(host: &Host) {
    let mut kept: Vec<Request> = (0..20).map(|_| ws(host)).collect();
    let load = host.load(500, 0, &["--mode", "mixed"]);
    std::thread::sleep(Duration::from_secs(1));
    host.zd(&["scale", "hello", "3"]).ok();
    host.clean(load);
    assert!(kept.iter_mut().all(|s| s.ask().unwrap() == "v1"));
    host.sh("pgrep -f 'nginx: worker process is shutting down'");
    waits_for_one(host);
    host.zd(&["scale", "hello", "2"]).ok();
    // Those of the third container went with it.
    assert!(kept.iter_mut().all(|s| s.ask().unwrap() == "v1"));
    host.zd(&["switch"]).ok();
    host.zd(&["switch"]).ok();
}

/// An upgrade of nginx's program: the one before serves its sessions on, and counts them for itself. They must not
/// stand for requests that the new one counts.
fn nginx_replaced(host: &Host) {
    let mut kept: Vec<Request> = (0..20).map(|_| ws(host)).collect();
    host.sh("kill -USR2 $(cat /run/zd/hello/nginx.pid)");
    host.comes("test -e /run/zd/hello/nginx.pid.oldbin && pgrep -P $(cat /run/zd/hello/nginx.pid)");
    let mut both = ws(host);
    host.sh("kill -WINCH $(cat /run/zd/hello/nginx.pid.oldbin)");
    std::thread::sleep(Duration::from_millis(500));
    host.sh("kill -QUIT $(cat /run/zd/hello/nginx.pid.oldbin)");
    let mut new = ws(host);
    waits_for_one(host);
    host.sh("test -e /run/zd/hello/nginx.pid.oldbin");
    assert!(kept.iter_mut().chain([&mut both, &mut new]).all(|s| s.ask().unwrap() == "v1"));
    drop(kept);
    drop(both);
    host.comes("test ! -e /run/zd/hello/nginx.pid.oldbin");
    assert_eq!(new.ask().unwrap(), "v1");
    host.settles();
}

/// When the service began with a request and when it had the answer, and its version.
type Seen = (u64, u64, String);

/// Long-lived requests that begin and end all the time, while ordinary ones are under way at every switch.
#[test]
#[ignore = "boots a host"]
fn long_lived_requests_that_come_and_go() {
    const SWITCHES: usize = 30;
    let host = Host::installed_from("come-and-go", stick());
    host.zd(&["deploy", "v2"]).ok();
    let polls = |delay_ms: u32, rate: &str| {
        let url = format!("http://{}/poll?delay_ms={delay_ms}", host.ip);
        let changes = SWITCHES.to_string();
        host.spawn(&[
            "zd",
            "-q",
            "loadtest",
            &url,
            "--rate",
            rate,
            "--duration",
            "20m",
            "--expect-changes",
            &changes,
            "--json",
        ])
    };
    let polls = [polls(0, "200"), polls(150, "200")];
    let load = host.load(300, SWITCHES, &["--mode", "mixed"]);
    std::thread::sleep(Duration::from_secs(2));

    let stop = AtomicBool::new(false);
    let ordinary: Mutex<Vec<Seen>> = Mutex::new(Vec::new());
    let sessions: Mutex<Vec<Seen>> = Mutex::new(Vec::new());
    let mut holds = Vec::new();
    let host = &host;
    let again = |path: &'static str, all: &Mutex<Vec<Seen>>| {
        while !stop.load(Ordering::Relaxed) {
            let seen = Request::send(host, 80, path).unwrap_or_else(|e| panic!("{path}: {e}"));
            all.lock().unwrap().push((seen.began_us, seen.ended_us, seen.version));
            std::thread::sleep(APART);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| again("/hello?delay_ms=80", &ordinary));
        }
        // The first answer of the new slot is one of these.
        scope.spawn(|| again("/hello?delay_ms=2", &ordinary));
        for _ in 0..3 {
            scope.spawn(|| again("/ws", &sessions));
        }
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        for _ in 0..SWITCHES {
            holds.push(host.zd(&["switch", "--json"]).ok().json()["hold_ms"].as_f64().unwrap());
            std::thread::sleep(Duration::from_millis(600));
        }
    });
    let report = host.clean(load);
    for polls in polls {
        let polls = polls.wait().json();
        assert_eq!((&polls["failed"], &polls["mixed"]), (&0.into(), &0.into()), "{polls}");
    }
    let (mut ordinary, sessions) = (ordinary.into_inner().unwrap(), sessions.into_inner().unwrap());
    // Stricter than "no later request": every ordinary answer of the slot before was out when the new slot began with
    // its first one. By the service's own clock, so exactly.
    ordinary.sort();
    let (mut changes, mut last_ended, mut now) = (0, 0, ordinary[0].2.as_str());
    for (began, ended, version) in &ordinary {
        if version != now {
            changes += 1;
            now = version;
            assert!(last_ended < *began, "change {changes}: an old answer {} µs later", last_ended - began);
        }
        last_ended = last_ended.max(*ended);
    }
    holds.sort_by(f64::total_cmp);
    println!(
        "{SWITCHES} switches, {} ordinary requests of 80 ms, {} sessions that came and went, 400 polls/s, {} requests: \
         0 failed, 0 mixed, every old answer out before the first new one; hold median {:.0} ms, longest {:.0} ms",
        ordinary.len(),
        sessions.len(),
        report["requests"],
        holds[SWITCHES / 2],
        holds[SWITCHES - 1]
    );
    assert_eq!(changes, SWITCHES);
    assert!(sessions.len() > 500 && ordinary.len() > 500, "too few to prove anything");
}
