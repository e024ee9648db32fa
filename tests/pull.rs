//! Images straight from a registry: what `zd pack` takes out of Debian's docker-registry, and what it refuses.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use support::image::{gzip, layer, oci_blob, oci_index, oci_layout};
use support::registry::{PASSWORD, PROGRAM, Registry, USER, Way};
use support::*;

/// When every bundle here says that it was packed.
const EPOCH: &str = "1767225600";

/// False where a registry cannot be had; that is said.
fn possible(what: &str) -> bool {
    let missing: Vec<&str> =
        [PROGRAM, "/usr/bin/skopeo"].into_iter().filter(|p| !Path::new(p).exists()).collect();
    if !missing.is_empty() {
        skipped(what, &format!("{} is not here; tests/fab/need installs it", missing.join(", ")));
    }
    missing.is_empty()
}

fn layers() -> Vec<Vec<u8>> {
    (0..6).map(|i| gzip(&layer(70 + i, 700_000))).collect()
}

/// A site that has logged in to `host` and knows the registry's CA.
fn site(registry: &Registry, host: &str) -> Site {
    let site = Site::new();
    fs::copy(registry.ca(), site.path("plant-ca.pem")).unwrap();
    log_in(&site, host, PASSWORD);
    site
}

/// As `docker login` does without a helper.
fn log_in(site: &Site, host: &str, password: &str) {
    let auth = BASE64.encode(format!("{USER}:{password}"));
    configure(site, &json!({ "auths": { host: { "auth": auth } } }));
}

fn configure(site: &Site, config: &Value) {
    fs::create_dir_all(site.path("docker")).unwrap();
    site.write("docker/config.json", config.to_string().as_bytes());
}

fn image(from: &str, more: &str) -> String {
    format!("[[image]]\nref = \"drimeap:1.4.2\"\nregistry = \"{from}\"\n{more}\n")
}

const CA: &str = "ca = \"plant-ca.pem\"";

fn pack(site: &Site, body: &str, out: &str) -> Outcome {
    site.write("demo.toml", format!("{HEAD}{body}").as_bytes());
    let mut command = site.command();
    command.env("DOCKER_CONFIG", site.path("docker")).env("SOURCE_DATE_EPOCH", EPOCH);
    command.env("PATH", format!("{}:/usr/bin:/bin", site.text("bin")));
    let done = Outcome::of(command.args(["pack", "demo.toml", "--out", out]));
    assert!(!done.stderr.contains(PASSWORD) && !done.stdout.contains(PASSWORD), "{done:#?}");
    done
}

/// Bytes of all files in a folder.
fn size_of(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum()
}

/// SHA-256 of the bundle in a folder.
fn sum(site: &Site, folder: &str) -> String {
    sha256(&fs::read(site.path(folder).join("demo-1.zd.tar")).unwrap())
}

#[test]
fn a_pull_that_is_cut_goes_on_and_makes_the_same_bundle() {
    if !possible("an image of a registry with TLS and a password") {
        return;
    }
    let registry = Registry::start(true);
    let way = Way::to(&registry, usize::MAX);
    let site = site(&registry, &way.host());
    oci_layout(&site.path("layout"), "v", "amd64", &layers());
    registry.push(&site.path("layout"), "v", "eap/drimeap:1.4.2");
    let body = image(&format!("{}/eap/drimeap:1.4.2", way.host()), CA);

    // In one go.
    pack(&site, &body, "stick").good();
    site.verify(&site.bundle()).good();
    let whole = sum(&site, "stick");
    let (lock, needed) = (site.lock(), way.passed());
    let index: Value = serde_json::from_slice(&fs::read(site.path("layout/index.json")).unwrap()).unwrap();
    assert_eq!(lock["images"][0]["manifest"], index["manifests"][0]["digest"], "every byte is kept");
    assert!(lock["images"][0].get("index").is_none(), "{lock}");
    // Again: the manifest is asked for, the rest is in the cache.
    pack(&site, &body, "again").good();
    assert!(way.passed() - needed < 100_000, "{} of {needed}", way.passed() - needed);

    // Each connection is cut off in the middle, and those that come after it, until the way is mended.
    let all = layers().iter().map(Vec::len).sum::<usize>();
    for (killed, out) in [(false, "cut"), (true, "killed")] {
        let way = Way::to(&registry, all / 2);
        log_in(&site, &way.host(), PASSWORD);
        fs::remove_dir_all(site.path("cache")).unwrap();
        let body = image(&format!("{}/eap/drimeap:1.4.2", way.host()), CA);
        if killed {
            site.write("demo.toml", format!("{HEAD}{body}").as_bytes());
            let mut zd = std::process::Command::new(ZD);
            zd.args(["pack", "demo.toml", "--out", out]).current_dir(site.path("")).stderr(Stdio::null());
            zd.env("ZD_CACHE_DIR", site.path("cache")).env("DOCKER_CONFIG", site.path("docker"));
            let mut zd = zd.spawn().unwrap();
            way.wait_for_break();
            // What came has reached its disk, but for the last record of each connection.
            let kept = || size_of(&site.path("cache/partial")) + size_of(&site.path("cache/blobs/sha256"));
            while kept() < all as u64 / 2 - 200_000 {
                assert!(zd.try_wait().unwrap().is_none(), "it gave up");
                thread::sleep(Duration::from_millis(5));
            }
            zd.kill().unwrap();
            zd.wait().unwrap();
            assert!(entries(&site.path(out)).is_empty(), "a bundle of half an image");
            way.mend();
            pack(&site, &body, out).good();
        } else {
            thread::scope(|scope| {
                scope.spawn(|| {
                    way.wait_for_break();
                    way.mend();
                });
                let said = pack(&site, &body, out).good().stderr;
                assert!(said.contains("going on in"), "{said}");
            });
        }
        assert_eq!(sum(&site, out), whole, "{out}");
        assert!(entries(&site.path("cache/partial")).is_empty());
        // What was under way on each of the connections, and handshakes; not the image again.
        assert!(way.passed() < needed + all / 4, "{} bytes came for {needed}; {out}", way.passed());
    }
}

#[test]
fn one_platform_is_taken_out_of_an_index() {
    if !possible("an index of a registry without TLS") {
        return;
    }
    let registry = Registry::start(false);
    let site = Site::new();
    let platforms = [("amd64", vec![gzip(&layer(81, 9000))]), ("arm64", vec![gzip(&layer(82, 9000))])];
    oci_index(&site.path("layout"), "v", &platforms);
    registry.push(&site.path("layout"), "v", "eap/drimeap:1.4.2");
    let layout: Value = serde_json::from_slice(&fs::read(site.path("layout/index.json")).unwrap()).unwrap();
    let index = layout["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let blob = |digest: &Value| -> Value {
        let path = site.path("layout/blobs/sha256").join(&digest.as_str().unwrap()["sha256:".len()..]);
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    let entries = blob(&layout["manifests"][0]["digest"])["manifests"].clone();

    let host = registry.host();
    let plain = "plain-http = true";
    let tag = image(&format!("{host}/eap/drimeap:1.4.2"), plain);
    pack(&site, &tag, "stick").good();
    let taken = site.lock()["images"][0].clone();
    assert_eq!((&taken["index"], &taken["manifest"]), (&json!(index), &entries[0]["digest"]));
    assert_eq!(taken["layers"][0], format!("sha256:{}", sha256(&platforms[0].1[0])));
    let shown = site.zd(&["inspect", "stick", "--key", "zd.pub"]).good().stdout;
    assert!(shown.contains(&format!("image drimeap:1.4.2: one platform of the index {index}")), "{shown}");
    let bundle = sum(&site, "stick");
    pack(&site, &image(&format!("{host}/eap/drimeap@{index}"), plain), "stick").good();
    assert_eq!(sum(&site, "stick"), bundle, "by the digest of the index");
    // For the other platform the other image is taken.
    site.write("demo.toml", format!("{HEAD}{tag}").as_bytes());
    site.zd(&["pack", "demo.toml", "--target", "debian-12-aarch64", "--out", "arm"]).good();
    let arm = site.zd(&["inspect", "arm", "--key", "zd.pub", "--json"]).good().json();
    assert_eq!(arm["lock"]["images"][0]["manifest"], entries[1]["digest"]);
    let own = entries[1]["digest"].as_str().unwrap();
    pack(&site, &image(&format!("{host}/eap/drimeap@{own}"), plain), "other")
        .refused(SOURCE, &["linux/arm64", "needs linux/amd64"]);

    oci_index(&site.path("arm"), "v", &platforms[1..]);
    registry.push(&site.path("arm"), "v", "eap/drimeap:arm");
    pack(&site, &image(&format!("{host}/eap/drimeap:arm"), plain), "other")
        .refused(SOURCE, &["no image for linux/amd64, only for linux/arm64", "pack for another target"]);
    // Only a word in the manifest leaves TLS away.
    pack(&site, &image(&format!("{host}/eap/drimeap:1.4.2"), ""), "other")
        .refused(SOURCE, &["image drimeap:1.4.2", "plain-http = true"]);
    assert!(support::entries(&site.path("other")).is_empty());
}

#[test]
fn a_registry_that_refuses_is_named_with_the_cure() {
    if !possible("what a registry refuses") {
        return;
    }
    let registry = Registry::start(true);
    let host = registry.host();
    let site = site(&registry, &host);
    oci_layout(&site.path("layout"), "v", "amd64", &[gzip(&layer(91, 9000))]);
    registry.push(&site.path("layout"), "v", "eap/drimeap:1.4.2");
    let good = image(&format!("{host}/eap/drimeap:1.4.2"), CA);
    let login = format!("docker login {host}");

    pack(&site, &good.replace("drimeap:1.4.2\"\nca", "drimeap:9\"\nca"), "stick")
        .refused(SOURCE, &["drimeap:9: there is no such image", "skopeo list-tags docker://"]);
    pack(&site, &good.replace(CA, ""), "stick")
        .refused(SOURCE, &["invalid peer certificate", "ca = \"plant-ca.pem\""]);
    site.write("other.pem", b"no certificate");
    pack(&site, &good.replace("plant-ca", "other"), "stick").refused(SOURCE, &["other.pem", "PEM"]);
    pack(&site, &good.replace("plant-ca", "none"), "stick")
        .refused(SOURCE, &["none.pem", "relative to the manifest"]);
    log_in(&site, &host, "wrong-password");
    let refused = pack(&site, &good, "stick").refused(SOURCE, &["refuses the credentials", &login]);
    assert!(!refused.stderr.contains("wrong-password"), "{refused:#?}");
    configure(&site, &json!({}));
    pack(&site, &good, "stick")
        .refused(SOURCE, &["wants credentials", "docker/config.json has none", &login]);
    configure(&site, &json!({ "auths": { &host: { "identitytoken": PASSWORD } } }));
    pack(&site, &good, "stick").refused(SOURCE, &["identity token", &login]);
    site.write("docker/config.json", b"{");
    pack(&site, &good, "stick").refused(SOURCE, &["docker/config.json", "Unable to read config"]);
    assert!(entries(&site.path("stick")).is_empty());

    // A layer that is not with the image.
    let dir = site.path("foreign");
    let config = oci_blob(&dir, "config.v1+json", &support::image::config("amd64", &[]));
    let mut layer = oci_blob(&dir, "layer.nondistributable.v1.tar+gzip", &gzip(b"x"));
    layer["urls"] = json!(["https://layers.example/x"]);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer],
    });
    let manifest = oci_blob(&dir, "manifest.v1+json", &serde_json::to_vec(&manifest).unwrap());
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    site.pack("[[image]]\nref = \"odd:v1\"\noci = \"foreign\"\n", &[])
        .refused(SOURCE, &["non-distributable", "https://layers.example/x"]);
}

#[test]
fn credentials_come_from_helpers_too() {
    if !possible("credential helpers") {
        return;
    }
    let registry = Registry::start(true);
    let host = registry.host();
    let site = site(&registry, &host);
    oci_layout(&site.path("layout"), "v", "amd64", &[gzip(&layer(95, 9000))]);
    registry.push(&site.path("layout"), "v", "eap/drimeap:1.4.2");
    let good = image(&format!("{host}/eap/drimeap:1.4.2"), CA);
    fs::create_dir(site.path("bin")).unwrap();
    let helper = |name: &str, script: &str| {
        let path =
            site.write(&format!("bin/docker-credential-{name}"), format!("#!/bin/sh\n{script}").as_bytes());
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let answer = json!({ "ServerURL": &host, "Username": USER, "Secret": PASSWORD });
    helper("plant", &format!("[ \"$1 $(cat)\" = \"get {host}\" ] && echo '{answer}'\n"));
    helper("empty", "cat >/dev/null; echo 'credentials not found in native keychain'; exit 1\n");
    helper("broken", &format!("cat >/dev/null; echo {PASSWORD}; echo {PASSWORD} >&2; exit 1\n"));

    configure(&site, &json!({ "credHelpers": { &host: "plant" }, "credsStore": "broken" }));
    pack(&site, &good, "stick").good();
    configure(&site, &json!({ "auths": { &host: {} }, "credsStore": "plant" }));
    pack(&site, &good, "stick").good();
    configure(&site, &json!({ "credsStore": "empty" }));
    pack(&site, &good, "stick").refused(SOURCE, &["wants credentials"]);
    configure(&site, &json!({ "credsStore": "broken" }));
    pack(&site, &good, "stick").refused(SOURCE, &["docker-credential-broken get failed", "docker login"]);
}

#[test]
fn a_time_that_is_none_is_a_usage_error() {
    let site = Site::packed();
    let mut command = site.command();
    command.env("SOURCE_DATE_EPOCH", "yesterday").args(["pack", "demo.toml", "--out", "other"]);
    Outcome::of(&mut command)
        .refused(USAGE, &["SOURCE_DATE_EPOCH=yesterday: expected seconds since 1970", "do: "]);
}
