//! Debian's docker-registry on loopback, and a way to it that breaks.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use super::{Outcome, isolated};

pub const PROGRAM: &str = "/usr/bin/docker-registry";
pub const USER: &str = "packer";
pub const PASSWORD: &str = "S3cret-of-the-plant";

/// Ends with the test.
pub struct Registry {
    dir: TempDir,
    process: Child,
    address: SocketAddr,
    tls: bool,
}

impl Registry {
    /// By TLS and for those who know the password, or neither.
    pub fn start(tls: bool) -> Self {
        let dir = TempDir::with_prefix("zd-registry-").unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        // Free for a moment, which is all that can be had: the registry takes no socket that is open.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: {address}\n",
            path("data")
        );
        if tls {
            certify(dir.path());
            let line = format!("{USER}:{}\n", bcrypt::hash(PASSWORD, 4).unwrap());
            fs::write(path("htpasswd"), line).unwrap();
            config.push_str(&format!(
                "  tls: {{certificate: {}, key: {}}}\nauth: {{htpasswd: {{realm: plant, path: {}}}}}\n",
                path("cert.pem"),
                path("key.pem"),
                path("htpasswd")
            ));
        }
        fs::write(path("config.yml"), config).unwrap();
        let log = fs::File::create(path("log")).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["serve", &path("config.yml")]).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        let process = command.stderr(log).spawn().unwrap();
        let registry = Self { dir, process, address, tls };
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            let log = || fs::read_to_string(registry.dir.path().join("log")).unwrap();
            assert!(start.elapsed() < Duration::from_secs(20), "the registry does not start: {}", log());
            thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Pushes what a layout names `reference`, an index with all that it lists.
    pub fn push(&self, layout: &Path, reference: &str, to: &str) {
        let (from, to) =
            (format!("oci:{}:{reference}", layout.display()), format!("docker://{}/{to}", self.address));
        let mut skopeo = isolated("/usr/bin/skopeo");
        skopeo.args([
            "--insecure-policy",
            "copy",
            "-q",
            "--all",
            "--preserve-digests",
            "--dest-tls-verify=false",
        ]);
        if self.tls {
            skopeo.args(["--dest-creds", &format!("{USER}:{PASSWORD}")]);
        }
        Outcome::of(skopeo.args([from, to])).good();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `ca.pem`, and with it `cert.pem` and `key.pem` for 127.0.0.1.
fn certify(dir: &Path) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "CA of the plant");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap();
    let issuer = Issuer::from_params(&params, &key);
    let own = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&own, &issuer).unwrap();
    for (name, text) in
        [("ca.pem", ca.pem()), ("cert.pem", certificate.pem()), ("key.pem", own.serialize_pem())]
    {
        fs::write(dir.join(name), text).unwrap();
    }
}

/// Passes everything to a registry, and so many bytes of what it answers.
pub struct Way {
    address: SocketAddr,
    left: Arc<AtomicUsize>,
    count: Arc<Count>,
}

#[derive(Default)]
struct Count {
    passed: AtomicUsize,
    broken: AtomicUsize,
}

impl Way {
    /// Breaks all connections, and those that come, once `most` bytes were answered.
    pub fn to(registry: &Registry, most: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, to) = (listener.local_addr().unwrap(), registry.address);
        let way = Self { address, left: Arc::new(AtomicUsize::new(most)), count: Arc::default() };
        let (left, count) = (way.left.clone(), way.count.clone());
        // Ends with the test program.
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), TcpStream::connect(to).unwrap());
                let (asking, asked) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || std::io::copy(&mut &asking, &mut &asked));
                let (left, count) = (left.clone(), count.clone());
                thread::spawn(move || pass(server, client, &left, &count));
            }
        });
        way
    }

    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Bytes that were answered up to now.
    pub fn passed(&self) -> usize {
        self.count.passed.load(Ordering::SeqCst)
    }

    /// Waits until it broke a connection.
    pub fn wait_for_break(&self) {
        let start = Instant::now();
        while self.count.broken.load(Ordering::SeqCst) == 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "only {} bytes came", self.passed());
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn mend(&self) {
        self.left.store(usize::MAX, Ordering::SeqCst);
    }
}

fn pass(mut server: TcpStream, mut client: TcpStream, left: &AtomicUsize, count: &Count) {
    let mut buf = [0; 4096];
    loop {
        let n = match server.read(&mut buf) {
            Ok(n) if n > 0 => n,
            _ => break,
        };
        let mut allowed = 0;
        let _ = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            allowed = n.min(left);
            Some(left - allowed)
        });
        count.passed.fetch_add(allowed, Ordering::SeqCst);
        if client.write_all(&buf[..allowed]).is_err() {
            break;
        }
        if allowed < n {
            count.broken.fetch_add(1, Ordering::SeqCst);
            break;
        }
    }
    let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
}
