//! TCP ports: sessions that stay open, and new ones in the order of time, while everything moves.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::{APART, Host, SERVICE, differences, pack, pack_nomad, root};

/// One port of the container, served with either policy.
pub const TCP: &str = r#"env = { HELLO_TCP = "5000" }
[[service.tcp]]
port = 5000
drain-ms = 300
[[service.tcp]]
port = 5000
listen = 5001
sessions = "cut"
"#;
const DRAIN: u16 = 5000;
const CUT: u16 = 5001;

/// A client of equipment: connects, and asks line by line.
struct Session(BufReader<TcpStream>);

impl Session {
    fn open(host: &Host, port: u16) -> std::io::Result<Self> {
        let address: SocketAddr = format!("{}:{port}", host.ip).parse().expect("an address");
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The version that answers; an error when the session has ended.
    fn ask(&mut self) -> std::io::Result<String> {
        self.0.get_mut().write_all(b"which\n")?;
        let mut line = String::new();
        match self.0.read_line(&mut line)? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim().to_owned()),
        }
    }
}

#[test]
#[ignore = "boots a host"]
fn tcp_ports() {
    let stick = pack("tcp", &format!("{SERVICE}{TCP}"));
    incomplete(&stick);
    let host = Host::bare("tcp", &stick);
    taken(&host);
    let before = host.picture();
    host.run(&["/stick/zd", "-q", "install"]).ok();
    let status = host.zd(&["status"]).ok().out;
    for line in [
        "tcp port 5000 (sessions drain): listening; 0 with blue, 0 with green open",
        "tcp port 5001 (sessions cut): listening",
    ] {
        assert!(status.contains(line), "{status}");
    }
    let doctor = host.zd(&["doctor"]).ok().out;
    assert!(doctor.contains("5000 (tcp of hello), 5001 (tcp of hello)"), "{doctor}");
    on_a_real_disk(&host, moves);
    zd_killed(&host);
    shut_ports_are_refused(&host);
    nginx_killed(&host);
    host.restart();
    answers(&host, Duration::from_secs(60));
    host.settles();
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    assert_eq!(differences(&before, &host.picture()), "", "as it was before");
}

#[test]
#[ignore = "boots a host"]
fn tcp_ports_on_the_nomad_engine() {
    let Some(stick) = pack_nomad("tcp-nomad", &format!("{SERVICE}{TCP}")) else { return };
    let host = Host::installed_from("tcp-nomad", &stick);
    on_a_real_disk(&host, moves);
    shut_ports_are_refused(&host);
    nginx_killed(&host);
}

/// The bundle would install, and nginx not start, or on a kernel with AppArmor no container.
fn incomplete(stick: &std::path::Path) {
    let manifest = root().join("target/fab/tcp.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    for (package, needs, cure) in [
        ("libnginx-mod-stream", "service hello", "[packages] nginx"),
        ("apparmor", "docker", "[packages] docker"),
    ] {
        let bare = text.replace(&format!(", {package:?}"), "");
        assert_ne!(text, bare);
        let path = manifest.with_file_name("tcp-bare.toml");
        std::fs::write(&path, bare).unwrap();
        let out = Command::new(stick.join("zd"))
            .args(["pack", "--key"])
            .arg(manifest.with_file_name("zd.key"))
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{said}");
        for part in ["error[manifest]", needs, package, cure] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
}

fn taken(host: &Host) {
    host.sh(
        "printf '[Socket]\\nListenStream=0.0.0.0:5000\\nAccept=yes\\n' > /etc/systemd/system/site.socket; \
         printf '[Service]\\nExecStart=/bin/true\\n' > /etc/systemd/system/site@.service; \
         systemctl daemon-reload; systemctl start site.socket",
    );
    let said = host.run(&["/stick/zd", "install", "--registry-port", "5001"]);
    said.fails(
        5,
        "preflight",
        &[
            "5000 for the TCP service is taken by systemd",
            "5001 is wanted for the private registry and for the TCP service of hello",
        ],
    );
    host.sh("systemctl stop site.socket; rm /etc/systemd/system/site*; systemctl daemon-reload");
}

/// The root of a test host may be a FUSE file system, in which a link is gone for a moment while it is replaced;
/// no server has its disk there. HTTP asks the gate then, a session would be refused.
fn on_a_real_disk(host: &Host, work: impl FnOnce(&Host)) {
    const POINTER: &str = "/var/lib/zd/services/hello";
    host.sh(&format!(
        "systemctl stop zd-nginx@hello; cp -a {POINTER} /tmp/pointer; mount -t tmpfs -o mode=755 zd {POINTER}; \
         cp -a /tmp/pointer/. {POINTER}; systemctl start zd-nginx@hello"
    ));
    work(host);
    host.sh(&format!(
        "systemctl stop zd-nginx@hello; rm -r /tmp/pointer; cp -a {POINTER} /tmp/pointer; umount {POINTER}; \
         cp -a --remove-destination /tmp/pointer/. {POINTER}; rm -r /tmp/pointer; systemctl start zd-nginx@hello"
    ));
}

/// Switches and scales, with sessions that stay open, new ones, and HTTP beside them.
fn moves(host: &Host) {
    host.zd(&["deploy", "v2"]).ok();
    const MANY: usize = 60;
    let mut kept = Session::open(host, DRAIN).unwrap();
    let mut cut: Vec<Session> = (0..MANY).map(|_| Session::open(host, CUT).unwrap()).collect();
    assert!(cut.iter_mut().chain([&mut kept]).all(|s| s.ask().unwrap() == "v1"));

    let report = host.zd(&["switch", "--json"]).ok().json();
    let tcp = |i: usize| &report["sessions"][i];
    assert_eq!((&tcp(0)["open"], &tcp(0)["left"]), (&1.into(), &1.into()), "{report}");
    assert_eq!((&tcp(1)["open"], &tcp(1)["left"]), (&MANY.into(), &0.into()), "{report}");
    let total = report["total_ms"].as_f64().unwrap();
    assert!((300.0..1900.0).contains(&total), "waits as long as it was told to, and no longer: {report}");
    assert_eq!(kept.ask().unwrap(), "v1", "an open session stays with its slot");
    assert!(cut.iter_mut().all(|s| s.ask().is_err()), "and one that is to be cut does not");
    let mut cut = Session::open(host, CUT).unwrap();
    assert_eq!(cut.ask().unwrap(), "v2", "it connects again, to the new slot");
    let status = host.zd(&["status", "--json"]).ok().json();
    let tcp = &status["services"][0]["tcp"];
    assert_eq!((&tcp[0]["open"]["blue"], &tcp[0]["open"]["green"]), (&1.into(), &0.into()), "{tcp}");
    assert_eq!((&tcp[1]["open"]["blue"], &tcp[1]["open"]["green"]), (&0.into(), &1.into()), "{tcp}");
    let history = host.zd(&["history", "--json"]).ok().out;
    assert!(history.contains("tcp port 5001: 60 sessions of blue closed"), "{history}");
    drop(cut);
    host.zd(&["switch"]).ok();

    in_the_order_of_time(host);
    assert_eq!(kept.ask().unwrap(), "v1", "after all switches");
    scaled(host, &mut kept);
}

/// What one new session saw.
struct Seen {
    started: Instant,
    answered: Instant,
    version: String,
}

/// New sessions all the time, in four threads, while something is done: none may be refused.
fn sessions_during(host: &Host, work: impl FnOnce()) -> Vec<Seen> {
    /// Ends the threads also when the work fails.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    let all: Mutex<Vec<Seen>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    let seen = Session::open(host, DRAIN).and_then(|mut s| s.ask());
                    let answered = Instant::now();
                    let version = seen.unwrap_or_else(|e| format!("refused: {e}"));
                    all.lock().unwrap().push(Seen { started, answered, version });
                    std::thread::sleep(APART);
                }
            });
        }
        let _stop = Stop(&stop);
        work();
    });
    let all = all.into_inner().unwrap();
    for seen in &all {
        assert!(["v1", "v2"].contains(&seen.version.as_str()), "{} of {}", seen.version, all.len());
    }
    all
}

/// Over several switches no session that was started after the first answer of a new version is answered by
/// the one before.
fn in_the_order_of_time(host: &Host) {
    const SWITCHES: usize = 8;
    let load = host.load(300, SWITCHES, &["--mode", "mixed"]);
    let mut rounds = Vec::new();
    let all = sessions_during(host, || {
        std::thread::sleep(Duration::from_secs(2));
        for _ in 0..SWITCHES {
            rounds.push(Instant::now());
            host.zd(&["switch"]).ok();
            std::thread::sleep(Duration::from_millis(700));
        }
    });
    host.clean(load);
    let ends = rounds[1..].iter().copied().chain([all.iter().map(|s| s.answered).max().unwrap()]);
    let mut fewest = usize::MAX;
    for (i, (from, to)) in rounds.iter().zip(ends).enumerate() {
        let new = if i % 2 == 0 { "v2" } else { "v1" };
        let round: Vec<&Seen> = all.iter().filter(|s| *from <= s.answered && s.answered < to).collect();
        let first = round.iter().filter(|s| s.version == new).map(|s| s.answered).min();
        let first = first.unwrap_or_else(|| panic!("no session of round {i} reached {new}"));
        let late = round.iter().filter(|s| s.version != new && s.started > first).count();
        assert_eq!(late, 0, "round {i}: sessions that went back");
        fewest = fewest.min(round.iter().filter(|s| s.version == new).count());
    }
    println!("{} new sessions over {SWITCHES} switches: none refused, none went back", all.len());
    assert!(all.len() > 200 && fewest > 10, "too few to prove anything: {} {fewest}", all.len());
}

/// A reload: open sessions of either policy go on, and new ones reach the new containers too.
fn scaled(host: &Host, kept: &mut Session) {
    let mut cut = Session::open(host, CUT).unwrap();
    assert_eq!(cut.ask().unwrap(), "v1");
    // As a reload that failed half way leaves it.
    let stale = "/run/zd/hello/blue-7000.sock";
    host.sh(&format!(
        "perl -MSocket -e 'socket S, AF_UNIX, SOCK_STREAM, 0; bind S, sockaddr_un(\"{stale}\") or die'; test -S {stale}"
    ));
    let more = sessions_during(host, || {
        host.zd(&["scale", "hello", "3"]).ok();
    });
    println!("{} new sessions during a scale: none refused", more.len());
    assert!(more.len() > 200, "too few to prove anything: {}", more.len());
    host.sh(&format!("test ! -e {stale}"));
    assert_eq!((kept.ask().unwrap(), cut.ask().unwrap()), ("v1".into(), "v1".into()));
    // Each of nginx's workers begins with the first one.
    for _ in 0..240 {
        assert_eq!(Session::open(host, DRAIN).unwrap().ask().unwrap(), "v1");
    }
    let servers =
        || host.sh("tail -n 200 /var/log/zd/hello/tcp.log | grep -o '\"server\":\"[^\"]*\"' | sort -u");
    assert_eq!(servers().lines().count(), 3, "{}", servers());
    assert!(host.sh("tail -n 1 /var/log/zd/hello/tcp.log").contains("\"slot\":\"blue\""));
    // A session that an old worker of nginx keeps is found and cut as well.
    let report = host.zd(&["switch", "--json"]).ok().json();
    assert_eq!(
        (&report["sessions"][1]["open"], &report["sessions"][1]["left"]),
        (&1.into(), &0.into()),
        "{report}"
    );
    assert!(cut.ask().is_err());
    host.zd(&["scale", "hello", "2"]).ok();
    assert_eq!(Session::open(host, DRAIN).unwrap().ask().unwrap(), "v2");
    host.zd(&["switch"]).ok();
    assert_eq!(kept.ask().unwrap(), "v1");
    assert_eq!(host.drift(), Value::Array(Vec::new()));
}

/// While requests are held, sessions reach the slot they are held for. When the pointer has moved and the old
/// sessions are there still, the next command closes them.
fn zd_killed(host: &Host) {
    let died = host.run_env(&[("ZD_FAILPOINT", "switch:held")], &["zd", "switch"]);
    assert_ne!(died.code, 0, "{died:?}");
    assert_eq!(host.sh("readlink /var/lib/zd/services/hello/active"), "hold-blue\n");
    let mut cut = Session::open(host, CUT).unwrap();
    assert_eq!(cut.ask().unwrap(), "v1");
    let died = host.run_env(&[("ZD_FAILPOINT", "switch:released")], &["zd", "switch"]);
    assert_ne!(died.code, 0, "{died:?}");
    assert_eq!(cut.ask().unwrap(), "v1");
    assert_eq!(Session::open(host, CUT).unwrap().ask().unwrap(), "v2");
    host.zd(&["switch", "--to", "green"]).ok();
    assert!(cut.ask().is_err());
    host.zd(&["switch"]).ok();
}

/// Neither a deploy nor a switch goes on with a slot that takes no session.
fn shut_ports_are_refused(host: &Host) {
    let id = "docker ps -q --filter label=zd.slot=green --filter label=zd.instance=2";
    let inspect = "docker inspect -f '{{.NetworkSettings.Networks.zd.IPAddress}}'";
    let address = host.sh(&format!("{inspect} $({id})"));
    let rule = format!("OUTPUT -d {} -p tcp --dport 5000 -j REJECT --reject-with tcp-reset", address.trim());
    host.sh(&format!("iptables -I {rule}"));
    let parts = [address.trim(), "TCP port 5000 does not accept", "nothing was changed"];
    host.zd(&["switch", "--to", "green"]).fails(8, "unhealthy", &parts);
    assert_eq!(host.active(), "blue");
    host.sh(&format!("iptables -D {rule}"));
    host.zd(&["switch"]).ok();
    // One session with blue, the standby now: whoever replaces it is told, and it ends.
    host.zd(&["switch"]).ok();
    let mut session = Session::open(host, DRAIN).unwrap();
    assert_eq!(session.ask().unwrap(), "v1");
    host.zd(&["switch"]).ok();
    let said = host.zd(&["deploy", "deaf"]).fails(8, "unhealthy", &["TCP port 5000 does not accept"]);
    assert!(said.err.contains("sessions of tcp port 5000 are still with blue"), "{}", said.err);
    assert!(session.ask().is_err());
    host.settles();
    host.zd(&["switch"]).ok();
    assert_eq!(Session::open(host, DRAIN).unwrap().ask().unwrap(), "v1", "blue was put back");
}

/// Its sockets lie about then; systemd starts it again all the same.
fn nginx_killed(host: &Host) {
    let mut session = Session::open(host, DRAIN).unwrap();
    session.ask().unwrap();
    for _ in 0..3 {
        host.sh("kill -9 $(cat /run/zd/hello/nginx.pid)");
        answers(host, Duration::from_secs(15));
    }
    assert!(session.ask().is_err(), "it was that nginx's");
    host.settles();
    host.zd(&["switch"]).ok();
    assert_eq!(Session::open(host, DRAIN).unwrap().ask().unwrap(), "v2");
    host.zd(&["switch"]).ok();
}

fn answers(host: &Host, within: Duration) {
    let start = Instant::now();
    // The killed one's port may be open a moment longer.
    std::thread::sleep(Duration::from_millis(100));
    while Session::open(host, DRAIN).and_then(|mut s| s.ask()).is_err() {
        assert!(start.elapsed() < within, "no session after {:?}", start.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("sessions again after {:.1} s", start.elapsed().as_secs_f32());
}
