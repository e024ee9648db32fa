//! Clients that want to stop a service, or a switch of it: slow ones, very many, and ones that ask for too much.

use std::io::{BufRead, BufReader, ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::host::{Host, SECOND, SERVICE, pack};

const HELD: usize = 10_000;
/// And some for the rest: there are machines where a process may have 20,000 files.
const HALF_SENT: usize = 19_500;

#[test]
#[ignore = "boots a host"]
fn no_client_stops_a_switch_or_takes_all() {
    let many = "[service.clients]\nrequests-per-address = 20000\n";
    let few = "[service.clients]\nrequests-per-address = 5\n";
    let host =
        Host::installed_from("gate-attacks", &pack("gate-attacks", &[SERVICE, many, SECOND, few].concat()));
    host.zd(&["deploy", "v2", "hello"]).ok();
    open_files();
    an_ordinary_path_is_no_tunnel(&host);
    an_address_has_its_share(&host);
    bodies_fill_no_disk(&host);
    slow_clients_are_named_and_cut(&host);
    ten_thousand_are_held(&host);
    half_sent_headers_stop_nobody(&host);
    host.settles();
}

/// This test opens some.
fn open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(maximum.map_or(65_536, |most| most.min(65_536)));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).expect("as many open files as there may be");
}

/// A connection on which these bytes were sent.
fn sent(host: &Host, port: u16, bytes: &str) -> TcpStream {
    let address: SocketAddr = format!("{}:{port}", host.ip).parse().expect("an address");
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10)).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(bytes.as_bytes()).unwrap();
    stream
}

/// Status line and headers, in small letters.
fn head(stream: &TcpStream) -> Result<String> {
    let (mut head, mut lines) = (String::new(), BufReader::with_capacity(1, stream));
    while !head.ends_with("\r\n\r\n") {
        if lines.read_line(&mut head)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head.to_lowercase())
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n")
}

/// The first lines of an answer to a request of the host's own.
fn from_inside(host: &Host, port: u16, request: &str) -> String {
    let request = request.replace("\r\n", "\\r\\n");
    let ask = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}; printf '{request}' >&3; timeout 2 head -c 100 <&3; exit 0"
    );
    host.run(&["bash", "-c", &ask]).ok().out
}

fn is_closed(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    std::iter::repeat_with(|| stream.read(&mut [0; 1 << 20]))
        .find_map(|read| match read {
            Ok(0) => Some(true),
            Ok(_) => None,
            Err(e) => Some(e.kind() == ErrorKind::ConnectionReset),
        })
        .expect("an end")
}

fn an_ordinary_path_is_no_tunnel(host: &Host) {
    let ask = "GET /ws HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: lines\r\n\r\n";
    let answer = from_inside(host, 8081, ask);
    assert!(answer.starts_with("HTTP/1.1 404") && !answer.contains("upgrade"), "{answer}");
    let answer = head(&sent(host, 80, ask)).unwrap();
    assert!(answer.starts_with("http/1.1 404") && !answer.contains("upgrade"), "{answer}");
}

fn an_address_has_its_share(host: &Host) {
    let slow: Vec<TcpStream> = (0..8).map(|_| sent(host, 82, &get("/hello?delay_ms=1500"))).collect();
    let answers: Vec<String> = slow.iter().map(|stream| head(stream).unwrap()).collect();
    let with = |status: &str| answers.iter().filter(|a| a.starts_with(&format!("http/1.1 {status}"))).count();
    assert_eq!((with("200"), with("429")), (5, 3), "{answers:?}");
    assert!(from_inside(host, 82, &get("/hello")).contains(" 200 "));
}

fn bodies_fill_no_disk(host: &Host) {
    let large = sent(host, 80, "POST /hello HTTP/1.1\r\nHost: test\r\nContent-Length: 200000000\r\n\r\n");
    assert!(head(&large).unwrap().starts_with("http/1.1 413"));
    let inside = "nsenter -m -t $(cat /run/zd/hello/nginx.pid)";
    let tmp = host.sh(&format!("{inside} stat -f -c '%T %b' /var/lib/zd/services/hello/tmp"));
    assert!(tmp.starts_with("tmpfs"), "{tmp}");
    // A body that lies in a file there, and answers that nobody reads.
    let body = "x".repeat(1 << 20);
    let mut upload = sent(host, 80, "POST /hello HTTP/1.1\r\nHost: test\r\nContent-Length: 2000000\r\n\r\n");
    upload.write_all(body.as_bytes()).unwrap();
    let used = || host.sh("du -sm /var/lib/zd/services/hello | cut -f1");
    let before = used();
    let readers: Vec<TcpStream> = (0..3).map(|_| sent(host, 80, &get("/events?delay_ms=0"))).collect();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(used(), before);
    let blocks = host.sh(&format!("{inside} df --output=used /var/lib/zd/services/hello/tmp | tail -1"));
    let kilobytes: u64 = blocks.trim().parse().unwrap();
    assert!((800..3000).contains(&kilobytes), "the upload and nothing else: {kilobytes} kB");
    drop(readers);
}

fn slow_clients_are_named_and_cut(host: &Host) {
    let idle = sent(host, 80, &get("/hello"));
    let answer = head(&idle).unwrap();
    let length = answer.split("content-length: ").nth(1).unwrap().lines().next().unwrap().parse().unwrap();
    (&idle).read_exact(&mut vec![0; length]).unwrap();
    let mut half = sent(host, 80, "GET /hello HTTP/1.1\r\nHost: te");
    let reader = sent(host, 80, &get("/events?delay_ms=0"));
    let upload = "POST /hello HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\n";
    let mut trickle = sent(host, 80, upload);
    let one = |stream: &TcpStream| stream.local_addr().unwrap().to_string();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = trickle.write_all(b"x");
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let names = [&one(&reader), "GET /events?delay_ms=0 HTTP/1.1, for", "of its answer to take", "--cut"];
        let said = host.zd(&["switch", "hello", "--drain", "1s"]).fails(8, "not-drained", &names);
        assert!(said.err.contains("to port 80: POST /hello HTTP/1.1, for"), "{}", said.err);
        assert!(!said.err.contains(&one(&half)) && !said.err.contains(&one(&idle)), "{}", said.err);
        assert_eq!(host.active(), "blue");

        let start = Instant::now();
        let report = host.zd(&["switch", "hello", "--drain", "1s", "--cut", "--json"]).ok().json();
        println!("cut: {} in {:?}, hold {} ms", report["cut"], start.elapsed(), report["hold_ms"]);
        assert_eq!(report["cut"].as_array().unwrap().len(), 2, "{report}");
        assert!(report["hold_ms"].as_f64().unwrap() < 3000.0, "{report}");
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(host.active(), "green");
    assert!(is_closed(&reader) && is_closed(&trickle));
    // Who had no request there is not touched.
    half.write_all(b"st\r\n\r\n").unwrap();
    assert!(head(&half).unwrap().contains("x-version: v2"));
    (&idle).write_all(get("/hello").as_bytes()).unwrap();
    assert!(head(&idle).unwrap().contains("x-version: v2"));
    let history = host.zd(&["history", "--json"]).ok().out;
    assert!(history.contains("to port 80: POST /hello HTTP/1.1, for"), "{history}");

    // The way back does not wait for anybody either; nor for one that came by the standby entry.
    let _late = sent(host, 80, upload);
    let start = Instant::now();
    host.zd(&["rollback", "hello", "--drain", "500ms", "--cut"]).ok();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(host.active(), "blue");
}

fn ten_thousand_are_held(host: &Host) {
    let last = sent(host, 80, "POST /hello HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n");
    let switch = host.spawn(&["sh", "-c", "ulimit -Sn 1024; exec zd switch hello --drain 60s --json"]);
    host.comes("readlink /var/lib/zd/services/hello/active | grep -q hold-blue");
    let request = "GET /hello HTTP/1.0\r\nHost: test\r\n\r\n";
    let held: Vec<TcpStream> = (0..HELD).map(|_| sent(host, 80, request)).collect();
    std::thread::sleep(Duration::from_secs(2));
    (&last).write_all(b"0123456789").unwrap();
    assert!(head(&last).unwrap().contains("x-version: v1"));
    let report = switch.wait().ok().json();
    println!("held {} for {} ms", report["held"], report["hold_ms"]);
    assert!(report["held"].as_u64().unwrap() >= HELD as u64, "{report}");
    let other =
        held.iter().filter(|s| !head(s).is_ok_and(|a| a.contains(" 200 ") && a.contains("x-version: v2")));
    assert_eq!(other.count(), 0, "all were held, and all got the new version");
    host.zd(&["switch", "hello"]).ok();
}

fn half_sent_headers_stop_nobody(host: &Host) {
    let load = host.load(200, 1, &["--mode", "mixed"]);
    let half: Vec<TcpStream> =
        (0..HALF_SENT).map(|_| sent(host, 80, "GET /hello HTTP/1.1\r\nHost: te")).collect();
    host.zd(&["status"]).ok();
    assert!(from_inside(host, 8081, &get("/hello")).contains(" 200 "));
    let report = host.zd(&["switch", "hello", "--json"]).ok().json();
    let open = host.sh("ss -Htn state established '( sport = :80 )' | wc -l");
    println!("a switch beside {} connections: hold {} ms", open.trim(), report["hold_ms"]);
    host.clean(load);
    drop(half);
}
