//! Bundles from outside: what `zd pack` makes, and what `zd verify` refuses.

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::forge::{BLOBS, LOCK, Member, Parts, SIG, hostile_values};
use support::image::{config, docker_archive, gunzip, gzip, layer, oci_archive, oci_layout};
use support::server::{Answer, Server};
use support::*;
use tar::EntryType;

// ---- What pack makes

#[test]
fn a_packed_folder_verifies_from_itself() {
    let site = Site::packed();
    let sums =
        isolated("/usr/bin/sha256sum").args(["-c", "SHA256SUMS"]).current_dir(site.path("stick")).output();
    let sums = sums.unwrap();
    assert!(sums.status.success(), "{sums:?}");
    // Every file of the folder has its sum there, but for the sums themselves.
    assert_eq!(String::from_utf8_lossy(&sums.stdout).lines().count() + 1, entries(&site.path("stick")).len());

    let report = site.verify(&site.bundle()).good();
    assert!(report.stdout.starts_with("good: demo-1 for debian-12-x86_64"), "{}", report.stdout);
    if Path::new("/etc/zd/trust").exists() {
        return skipped("zd verify without arguments", "this machine trusts keys of its own (/etc/zd/trust)");
    }
    let beside = Outcome::of(isolated(site.path("stick/zd")).arg("verify").current_dir("/")).good();
    assert!(beside.stdout.contains("compare it with the one you were given"), "{}", beside.stdout);
}

#[test]
fn a_bundle_is_named_by_its_folder_or_its_file() {
    let site = Site::packed();
    for verb in ["inspect", "verify"] {
        let by = |path: &str| site.zd(&[verb, path, "--key", "zd.pub", "--json"]).good().json()["id"].take();
        assert_eq!(by("stick"), by("stick/demo-1.zd.tar"), "{verb}");
        // The key is the one beside the bundle, also where only the folder is named.
        if !Path::new("/etc/zd/trust").exists() {
            assert_eq!(site.zd(&[verb, "stick", "--json"]).good().json()["trust"], "first-use", "{verb}");
        }
    }
    // What else is called so is no bundle: a folder, what macOS leaves on a stick.
    fs::create_dir(site.path("stick/old.zd.tar")).unwrap();
    site.write("stick/._demo-1.zd.tar", b"Mac OS X");
    site.zd(&["verify", "stick", "--key", "zd.pub"]).good();

    fs::copy(site.bundle(), site.path("stick/demo-2.zd.tar")).unwrap();
    let install = ["install", "stick", "--dry-run"];
    let upgrade = ["upgrade", "stick", "--dry-run"];
    for args in [&["inspect", "stick"][..], &["verify", "stick"], &install, &upgrade] {
        site.zd(args).refused(USAGE, &["2 bundles in stick: demo-1.zd.tar, demo-2.zd.tar", "name the file"]);
    }
    let beside = Outcome::of(isolated(site.path("stick/zd")).arg("verify").current_dir("/"));
    beside.refused(USAGE, &[&format!("2 bundles in {}: demo-1.zd.tar, demo-2.zd.tar", site.text("stick"))]);
    fs::create_dir(site.path("hollow")).unwrap();
    site.zd(&["verify", "hollow"]).refused(USAGE, &["no bundle (*.zd.tar) in hollow", "`zd pack` wrote"]);
}

#[test]
fn reports_are_json_where_asked() {
    let site = Site::new();
    site.sources();
    let keygen = site.zd(&["keygen", "--out", "second", "--json"]).good().json();
    assert!(site.path("second.key").exists() && keygen["fingerprint"].is_string(), "{keygen}");
    let pack = site.pack(SOURCES, &["--json"]).good().json();
    let verify = site.zd(&["verify", "stick/demo-1.zd.tar", "--key", "zd.pub", "--json"]).good().json();
    let inspect = site.zd(&["inspect", "stick/demo-1.zd.tar", "--json"]).good().json();
    for report in [&verify, &inspect] {
        assert_eq!(report["id"], pack["id"]);
        assert_eq!(report["bytes"], fs::metadata(site.bundle()).unwrap().len());
    }
    assert_eq!(verify["trust"], "given");
    assert_eq!(inspect["lock"]["images"][0]["ref"], "hello:v1");
    // The id is the digest of the lock as it stands in the bundle.
    let lock = &Parts::read(&site.bundle()).0[LOCK].body;
    assert_eq!(pack["id"], format!("sha256:{}", sha256(lock)));
    let text = site.zd(&["inspect", "stick/demo-1.zd.tar"]).good().stdout;
    assert!(text.contains("image hello") && text.contains("file recipe.bin"), "{text}");

    let refused = site.zd(&["verify", "no.zd.tar", "--key", "zd.pub", "--json"]).refused(IO, &["no.zd.tar"]);
    let error = &refused.json()["error"];
    assert!(error["code"] == "io" && error["exit"] == 6 && error["what"].is_string(), "{error}");
}

#[test]
fn keys_are_never_overwritten_and_secret() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new();
    let mode = fs::metadata(site.path("zd.key")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let before = site.snapshot();
    site.zd(&["keygen"]).refused(USAGE, &["zd.key is there already", "do: "]);
    assert_eq!(site.snapshot(), before);
    // Half a pair would be worse than none.
    site.write("half.pub", b"somebody's");
    site.zd(&["keygen", "--out", "half"]).refused(USAGE, &["half.pub is there already"]);
    assert!(!site.path("half.key").exists(), "a secret key without its public key was left");
}

#[test]
fn the_same_manifest_packs_to_the_same_blobs() {
    let site = Site::packed();
    docker_archive(&site.path("hello.tar"), "amd64", &[layer(1, 700_000)]);
    let blobs = |cache: &str| {
        fs::remove_dir_all(site.path("stick")).unwrap();
        let mut command = site.command();
        command.env("ZD_CACHE_DIR", site.path(cache)).args(["pack", "demo.toml", "--out", "stick"]);
        Outcome::of(&mut command).good();
        site.verify(&site.bundle()).good();
        Parts::read(&site.bundle())
            .0
            .split_off(BLOBS)
            .into_iter()
            .map(|m| (m.name, m.body))
            .collect::<Vec<_>>()
    };
    let first = blobs("cache");
    assert_eq!(first, blobs("cache"), "from the same cache");
    assert_eq!(first, blobs("another-cache"), "compressed again");
}

#[test]
fn layers_are_kept_as_they_came_or_gzipped() {
    let site = Site::new();
    let (plain, zipped) = (layer(5, 400_000), gzip(&layer(6, 4000)));
    docker_archive(&site.path("hello.tar"), "amd64", &[plain.clone(), zipped.clone()]);
    oci_layout(&site.path("layout"), "world:v2", "amd64", &[layer(7, 3000), gzip(&layer(8, 3000))]);
    site.pack(&SOURCES.replace("[[file]]", "#").replace("name =", "#").replace("\npath =", "\n#"), &[])
        .good();
    let (parts, lock) = (Parts::read(&site.bundle()), site.lock());
    let blob = |digest: &Value| {
        let name = format!("blobs/sha256/{}", &digest.as_str().unwrap()["sha256:".len()..]);
        parts.0.iter().find(|m| m.name == name).map(|m| m.body.clone()).expect("the blob is in the bundle")
    };
    let hello = &lock["images"][0];
    assert_eq!(hello["layers"][1], format!("sha256:{}", sha256(&zipped)), "gzipped already: kept");
    assert_eq!(gunzip(&blob(&hello["layers"][0])), plain, "plain: gzipped, nothing else");
    assert_eq!(blob(&hello["config"]), config("amd64", &[plain, zipped]), "its diff_ids go on fitting");
    let manifest: Value = serde_json::from_slice(&blob(&hello["manifest"])).unwrap();
    for (i, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        assert_eq!(layer["digest"], hello["layers"][i]);
        assert_eq!(layer["size"], blob(&layer["digest"]).len());
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
    }
    // An OCI layout keeps its manifest's digest, hence all else; a tar of it is the same image.
    let index: Value = serde_json::from_slice(&fs::read(site.path("layout/index.json")).unwrap()).unwrap();
    assert_eq!(lock["images"][1]["manifest"], index["manifests"][0]["digest"]);
    oci_archive(&site.path("layout"), &site.path("layout.tar"));
    site.pack("[[image]]\nref = \"world:v2\"\noci = \"layout.tar\"\n", &[]).good();
    assert_eq!(site.lock()["images"][0], lock["images"][1]);
}

#[test]
fn other_tools_read_the_bundle_as_an_oci_archive() {
    if !has("skopeo") {
        return skipped("skopeo inspect of a bundle", "skopeo is not installed");
    }
    let site = Site::packed();
    let lock = site.lock();
    for image in lock["images"].as_array().unwrap() {
        let name =
            format!("oci-archive:{}:{}", site.text("stick/demo-1.zd.tar"), image["ref"].as_str().unwrap());
        let seen = Outcome::of(isolated("/usr/bin/skopeo").args(["inspect", &name])).good().json();
        assert_eq!(seen["Digest"], image["manifest"]);
        assert_eq!(seen["Layers"], image["layers"]);
    }
}

// ---- What verify refuses

#[test]
fn any_flipped_bit_is_found() {
    let site = Site::packed();
    let regions = Parts::read(&site.bundle()).regions();
    let len = regions.last().unwrap().1.end;
    let signature =
        regions.iter().find(|(what, _)| what == "body of zd-lock.json.minisig").unwrap().1.clone();
    let mut random = Random(17);
    let mut at: Vec<usize> = (0..8192).chain(signature.flat_map(|p| [p; 8])).collect();
    at.extend(regions.iter().flat_map(|(_, range)| [range.start, range.end - 1]));
    at.extend((0..1000).map(|_| random.below(len)));
    // The signature gets all eight bits of each byte, the rest one that chance picks.
    let cases: Vec<(usize, u8)> = at
        .iter()
        .enumerate()
        .map(|(i, p)| (*p, if i < 8192 { random.below(8) as u8 } else { (i % 8) as u8 }))
        .collect();
    let wrong = site.not_refused(&cases, |(p, bit), bytes| {
        bytes[*p] ^= 1 << bit;
        format!("byte {p} bit {bit} ({})", regions.iter().find(|(_, r)| r.contains(p)).unwrap().0)
    });
    assert!(wrong.is_empty(), "{} of {} flips:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn a_bundle_that_is_cut_off_or_longer_is_refused() {
    let site = Site::packed();
    let regions = Parts::read(&site.bundle()).regions();
    let len = regions.last().unwrap().1.end;
    let mut random = Random(23);
    let mut lengths: Vec<usize> = vec![1, len - 1, len - 511, len - 512, len - 513, len - 1023];
    lengths.extend(regions.iter().flat_map(|(_, r)| [r.start, r.start + 1, r.end - 1]));
    lengths.extend((0..150).map(|_| random.below(len)));
    let wrong = site.not_refused(&lengths, |n, bytes| {
        bytes.truncate(*n);
        format!("cut to {n} of {len}")
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let tails =
        [vec![0], vec![1], vec![0; 512], vec![0; 1024], vec![0; 10_240], noise(1, 700), b"\n".to_vec()];
    let wrong = site.not_refused(&tails, |tail, bytes| {
        bytes.extend(tail);
        format!("{} bytes more", tail.len())
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    let bytes = fs::read(site.bundle()).unwrap();
    let refused = |name: &str, bytes: &[u8], text: &str| {
        let path = site.write(name, bytes);
        let before = site.snapshot();
        site.verify(&path).refused(BUNDLE, &[text, "copy it again"]);
        assert_eq!(site.snapshot(), before, "verify wrote something");
    };
    refused("cut.zd.tar", &bytes[..len - 4096], "cut off");
    refused("longer.zd.tar", &[bytes.as_slice(), b"x"].concat(), "added behind its end");
    refused("none.zd.tar", b"", "cut off");
    refused("noise.zd.tar", &noise(9, 40_000), "is no zd bundle");
}

#[test]
fn members_that_do_not_belong_are_refused() {
    let site = Site::packed();
    let good = Parts::read(&site.bundle());
    let last = good.0.len();
    let refused = |code: Code, text: &str, parts: &Parts| {
        let path = site.write("forged.zd.tar", &parts.bytes());
        let before = site.snapshot();
        for verb in ["verify", "inspect"] {
            site.zd(&[verb, path.to_str().unwrap(), "--key", "zd.pub"]).refused(code, &[text]);
        }
        assert_eq!(site.snapshot(), before, "{text}: something was written");
    };
    let with = |at: usize, member: Member| {
        let mut parts = good.clone();
        parts.0.insert(at, member);
        parts
    };
    let without = |at: usize| {
        let mut parts = good.clone();
        parts.0.remove(at);
        parts
    };
    let as_kind = |at: usize, kind: EntryType| {
        let mut parts = good.clone();
        parts.0[at] = Member::new(&good.0[at].name, kind, b"");
        parts
    };
    for at in [BLOBS, BLOBS + 2, last] {
        refused(BUNDLE, "is not in the lock", &with(at, Member::file("extra.sh", b"rm -rf")));
        let name = format!("blobs/sha256/{}", sha256(b"rm"));
        refused(BUNDLE, "is not in the lock", &with(at, Member::file(&name, b"rm")));
        for name in ["../zd", "/etc/cron.d/zd", "blobs/../../zd", "blobs/sha256/.."] {
            refused(BUNDLE, "points outside the bundle", &with(at, Member::file(name, b"x")));
        }
    }
    refused(BUNDLE, "points outside the bundle", &with(0, Member::file("../zd", b"x")));
    refused(BUNDLE, "is not in the lock", &with(1, Member::file("extra", b"x")));
    refused(SIGNATURE, "is not signed", &without(SIG));
    refused(SIGNATURE, "is not signed", &with(SIG, Member::file("extra", b"x")));
    refused(BUNDLE, "zd-lock.json.minisig stands where zd-lock.json belongs", &without(LOCK));
    refused(BUNDLE, "zd-lock.json stands where index.json belongs", &without(1));
    refused(BUNDLE, "is no zd bundle", &without(0));
    refused(BUNDLE, "one is missing, twice there, or moved", &without(BLOBS));
    refused(BUNDLE, "ends early", &without(last - 1));
    refused(BUNDLE, "one is missing, twice there, or moved", &with(BLOBS, good.0[BLOBS].clone()));
    refused(BUNDLE, "one is missing, twice there, or moved", &with(BLOBS + 1, good.0[BLOBS].clone()));
    refused(BUNDLE, "one is missing, twice there, or moved", &with(last, good.0[LOCK].clone()));
    let kinds = [
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Char,
        EntryType::Block,
        EntryType::Fifo,
        EntryType::Directory,
        EntryType::GNUSparse,
        EntryType::GNULongName,
        EntryType::XHeader,
    ];
    for kind in kinds {
        refused(
            BUNDLE,
            &format!("is a {kind:?}; a bundle holds regular files only"),
            &as_kind(BLOBS + 1, kind),
        );
        refused(BUNDLE, &format!("is a {kind:?}"), &as_kind(LOCK, kind));
        refused(SIGNATURE, "is not signed", &as_kind(SIG, kind));
    }
    let mut moved = good.clone();
    moved.0.swap(BLOBS + 1, BLOBS + 2);
    refused(BUNDLE, "or moved", &moved);
    let mut index = good.clone();
    index.0[1].body = b"{}".into();
    refused(BUNDLE, "index.json does not fit the lock", &index);
    let mut other = good.clone();
    other.0[last - 1].body[10] ^= 1;
    let path = site.write("forged.zd.tar", &other.bytes());
    site.verify(&path)
        .refused(BUNDLE, &[&good.0[last - 1].name[13..], "does not have the bytes its name says"]);
}

#[test]
fn only_the_trusted_keys_signature_counts() {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD as BASE64;
    let site = Site::packed();
    site.zd(&["keygen", "--out", "other"]).good();
    let bundle = "stick/demo-1.zd.tar";
    let with_key = |key: &str| site.zd(&["verify", bundle, "--key", key]);
    let before = site.snapshot();
    with_key("other.pub").refused(SIGNATURE, &["which is not trusted here", "do: "]);
    with_key("zd.key").refused(SIGNATURE, &["zd.key"]);
    let text = |name: &str| fs::read_to_string(site.path(name)).unwrap();
    let line = |name: &str| text(name).lines().nth(1).unwrap().to_owned();
    with_key(&line("zd.pub")).good();
    // Another key that claims this one's number.
    let (mine, theirs) = (BASE64.decode(line("zd.pub")).unwrap(), BASE64.decode(line("other.pub")).unwrap());
    with_key(&BASE64.encode([&mine[..10], &theirs[10..]].concat()))
        .refused(SIGNATURE, &["does not fit its lock"]);
    assert_eq!(site.snapshot(), before);

    let good = Parts::read(&site.bundle());
    let mut wrong = Vec::new();
    for (what, text) in good.hostile_signatures(&site.path("zd.key"), &site.path("other.key")) {
        let path = site.write("forged.zd.tar", &good.with_signature(&text).bytes());
        wrong
            .extend(site.verify(&path).not_refused(SIGNATURE, &["do: "]).map(|why| format!("{what}: {why}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_key_that_cannot_be_used_is_named() {
    let site = Site::packed();
    site.write("empty", b"");
    let cases = [
        (&["verify", "stick/demo-1.zd.tar", "--key", "no-such.pub"][..], SIGNATURE, "no-such.pub"),
        (&["verify", "stick/demo-1.zd.tar", "--key", "empty"], SIGNATURE, "empty"),
        (&["pack", "demo.toml", "--key", "zd.pub"], SIGNATURE, "secret key zd.pub"),
        (&["pack", "demo.toml", "--key", "demo.toml"], SIGNATURE, "secret key demo.toml"),
        (&["pack", "demo.toml", "--key", "empty"], SIGNATURE, "secret key empty"),
        (&["pack", "demo.toml", "--key", "no.key"], IO, "make one with `zd keygen`"),
    ];
    let found = cases.map(|(args, code, text)| site.zd(args).not_refused(code, &[text, "do: "]));
    let wrong: Vec<String> = found.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_signed_lock_is_not_believed_either() {
    let site = Site::packed();
    let good = Parts::read(&site.bundle());
    let key = site.path("zd.key");
    let again = good.with_lock(&good.0[LOCK].body, &key);
    site.verify(&site.write("again.zd.tar", &again.bytes())).good();
    let mut wrong = Vec::new();
    let mut refused = |what: &str, lock: &[u8], text: &str| {
        let path = site.write("forged.zd.tar", &good.with_lock(lock, &key).bytes());
        wrong.extend(
            site.verify(&path).not_refused(BUNDLE, &[text, "do: "]).map(|why| format!("{what}: {why}")),
        );
    };
    for (pointer, value, text) in hostile_values() {
        let mut lock = good.lock();
        *lock.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer} is in the lock")) = value.clone();
        refused(&format!("{pointer} = {value}"), &serde_json::to_vec_pretty(&lock).unwrap(), text);
    }
    for pointer in ["", "/target", "/packages", "/blobs/0", "/images/0", "/files/0"] {
        let mut lock = good.lock();
        lock.pointer_mut(pointer).unwrap()["run-me"] = json!("x");
        refused(&format!("a key more in {pointer:?}"), &serde_json::to_vec(&lock).unwrap(), "unknown field");
    }
    for file in ["../x.deb", "a/b.deb", "/x.deb", ".x.deb", "x.sh", ".deb"] {
        let mut lock = good.lock();
        let digest = lock["files"][0]["digest"].clone();
        lock["debs"] =
            json!([{ "name": "x", "version": "1", "file": file, "digest": digest, "signed-by": [] }]);
        refused(file, &serde_json::to_vec(&lock).unwrap(), "is not a plain .deb name");
    }
    let changed = |change: fn(&mut Vec<Value>)| {
        let mut lock = good.lock();
        change(lock["blobs"].as_array_mut().unwrap());
        serde_json::to_vec(&lock).unwrap()
    };
    refused("blobs out of order", &changed(|b| b.swap(1, 2)), "not in order");
    refused("a blob twice", &changed(|b| b.insert(1, b[1].clone())), "listed twice");
    refused("a blob less", &changed(|b| drop(b.pop())), "not listed among the blobs");
    let text = String::from_utf8(good.0[LOCK].body.clone()).unwrap();
    refused(
        "a key twice",
        text.replacen("\"schema\"", "\"schema\": 1, \"schema\"", 1).as_bytes(),
        "duplicate field",
    );
    refused("a key less", text.replacen("\"schema\": 1,", "", 1).as_bytes(), "missing field");
    refused("more behind it", format!("{text}{{}}").as_bytes(), "cannot be read");
    for lock in ["", "{}", "[]", "null", &"[".repeat(100_000)] {
        refused(&lock[..lock.len().min(9)], lock.as_bytes(), "cannot be read");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_bundle_for_another_host_changes_nothing() {
    let site = Site::new();
    let here = this_host().unwrap_or_default();
    let release = if here.starts_with("debian-13") { "debian-12" } else { "debian-13" };
    let arch = if here.ends_with("x86_64") { "aarch64" } else { "x86_64" };
    let before = host_snapshot();
    for target in [format!("{release}-{}", std::env::consts::ARCH), format!("debian-12-{arch}")] {
        site.pack("", &["--target", &target]).good();
        let refused = site.zd(&["install", "stick/demo-1.zd.tar", "--key", "zd.pub", "--dry-run"]);
        refused.refused(TARGET, &[&format!("the bundle is for {target}"), "this host is", "zd pack"]);
    }
    assert_eq!(host_snapshot(), before);
}

// ---- What pack refuses

#[test]
fn a_manifest_that_cannot_be_read_says_where() {
    let site = Site::new();
    let file = "\n[[file]]\nname = \"a\"\npath = \"a\"\n";
    let image = "\n[[image]]\nref = \"hello:v1\"\n";
    let service = "\n[[service]]\nname = \"hello\"\nimage = \"hello\"\nversion = \"v1\"\nport = 80\nlisten = 80\n\
                   standby-listen = 81\n";
    let cases: Vec<(String, &[&str])> = vec![
        (format!("{file}color = \"red\"\n"), &["demo.toml", "line 11, column 1", "color"]),
        (file.replace("\"a\"\npath", "1\npath"), &["line 9, column 8", "string"]),
        (format!("{file}name = "), &["line 11"]),
        (file.replace("name = \"a\"", "name = \"a/b\""), &["line 9, column 8", "is not a version"]),
        (file.replace("path = \"a\"", ""), &["file a: give url and sha256, or path"]),
        (file.replace("path", "url"), &["file a: give url and sha256, or path"]),
        (file.replace("path = \"a\"", "url = \"http://h/\"\nsha256 = \"AB\""), &["file a: sha256 is not 64"]),
        (format!("{file}{file}"), &["file a is listed twice"]),
        (image.into(), &["image hello:v1: give exactly one of docker, docker-archive, oci, registry"]),
        (format!("{image}oci = \"a\"\ndocker = \"b\"\n"), &["image hello:v1: give exactly one of"]),
        (image.replace("hello:v1", "Hello"), &["line 9, column 7", "is not name:version"]),
        (service.into(), &["service hello: no image hello:v1", "packages.docker is empty", "packages.nginx"]),
        ("arch = \"riscv64\"\n".into(), &["target arch \"riscv64\"", "aarch64"]),
    ];
    for (body, texts) in cases {
        site.pack(&body, &[]).refused(MANIFEST, &[texts, &["do: "]].concat());
    }
    site.write("demo.toml", HEAD.replace("schema = 1", "schema = 2").as_bytes());
    site.zd(&["pack", "demo.toml"]).refused(MANIFEST, &["schema = 2: this zd reads schema 1"]);
    site.zd(&["pack", "no.toml"]).refused(IO, &["no.toml"]);
    site.write("demo.toml", HEAD.as_bytes());
    site.zd(&["pack", "demo.toml", "--target", "beos-5"]).refused(MANIFEST, &["beos-5", "no package source"]);
    site.zd(&["pack", "demo.toml", "--key", "no.key"]).refused(IO, &["no.key", "make one with `zd keygen`"]);
    assert_eq!(entries(site.path("").as_path()), ["demo.toml", "zd.key", "zd.pub"], "something was written");
}

#[test]
fn a_fifo_a_device_and_an_endless_file_are_refused_at_once() {
    let site = Site::packed();
    for pipe in ["pipe.zd.tar", "pipe.pub"] {
        assert!(std::process::Command::new("mkfifo").arg(site.path(pipe)).status().unwrap().success());
    }
    std::os::unix::fs::symlink("/dev/zero", site.path("zero.pub")).unwrap();
    fs::File::create(site.path("endless.pub")).unwrap().set_len(1 << 40).unwrap();
    site.zd(&["verify", "pipe.zd.tar", "--key", "zd.pub"])
        .refused(IO, &["pipe.zd.tar", "not a regular file"]);
    for (key, says) in [
        ("pipe.pub", "not a regular file"),
        ("zero.pub", "not a regular file"),
        ("endless.pub", "over 64 KiB"),
    ] {
        site.zd(&["verify", "stick", "--key", key]).refused(IO, &[key, says]);
    }
}

#[test]
fn packages_that_nobody_signed_are_not_taken_silently() {
    let site = Site::new();
    site.write("site.sources", b"Types: deb\nURIs: copy:/nowhere\nSuites: ./\nTrusted: yes\n");
    site.write("site.list", b"deb [trusted=yes] copy:/nowhere ./\n");
    for sources in ["site.sources", "site.list"] {
        let packages = format!("[packages]\nextra = [\"tree\"]\nsources = {sources:?}\n");
        site.pack(&packages, &[]).refused(SOURCE, &["nobody signed", "unsigned-packages = true"]);
    }
}

#[test]
fn a_source_that_is_not_what_was_asked_for_stops_the_pack() {
    let site = Site::new();
    docker_archive(&site.path("arm.tar"), "arm64", &[layer(1, 100)]);
    oci_layout(&site.path("arm"), "hello:v1", "arm64", &[layer(1, 100)]);
    oci_layout(&site.path("bent"), "hello:v1", "amd64", &[layer(1, 100)]);
    for name in entries(&site.path("bent/blobs/sha256")) {
        let path = site.path("bent/blobs/sha256").join(name);
        let mut bytes = fs::read(&path).unwrap();
        if bytes.len() > 1000 {
            bytes[600] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
    docker_archive(&site.path("good.tar"), "amd64", &[layer(1, 100)]);
    let good = fs::read(site.path("good.tar")).unwrap();
    site.write("zipped.tar", &gzip(&good));
    let mut bent = good.clone();
    let data = bent.windows(8).rposition(|w| w == b"data.bin").unwrap() + 600;
    bent[data] ^= 1;
    site.write("bent.tar", &bent);
    site.write("cut.tar", &good[..good.len() / 2]);
    site.write("text.tar", &b"no archive at all\n".repeat(100));
    site.write("empty.tar", b"");
    fs::create_dir(site.path("hollow")).unwrap();
    let cases = [
        ("docker-archive", "arm.tar", "linux/arm64"),
        ("oci", "arm", "linux/arm64"),
        ("oci", "bent", "other bytes than its name says"),
        ("docker-archive", "zipped.tar", "not an image archive"),
        ("docker-archive", "cut.tar", "cut.tar"),
        ("docker-archive", "bent.tar", "the image's config (rootfs.diff_ids) says sha256:"),
        ("oci", "text.tar", "not an image archive"),
        ("oci", "empty.tar", "is missing in the archive"),
        ("oci", "hollow", "hollow"),
        ("docker-archive", "no.tar", "no.tar"),
        ("oci", "no-layout", "no-layout"),
    ];
    let mut bodies: Vec<(String, &str)> = Vec::new();
    for (kind, path, text) in cases {
        bodies.push((format!("[[image]]\nref = \"hello:v1\"\n{kind} = \"{path}\"\n"), text));
    }
    bodies.push(("[[file]]\nname = \"a.bin\"\npath = \"nowhere/a.bin\"\n".into(), "nowhere/a.bin"));
    let mut wrong = Vec::new();
    for (body, text) in bodies {
        let out = site.pack(&body, &[]);
        wrong.extend(out.not_refused(SOURCE, &[text, "do: "]).map(|why| format!("{body}{why}")));
        assert!(entries(&site.path("stick")).is_empty(), "{body}: something was written");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(entries(&site.path("cache/tmp")).is_empty(), "leftovers in the cache");
}

#[test]
fn a_full_disk_leaves_no_half_bundle() {
    if !is_root() || !has("unshare") {
        return skipped("disk full during pack", "needs root and unshare for a small tmpfs");
    }
    let site = Site::new();
    fs::create_dir(site.path("small")).unwrap();
    // The mount lives and dies with the namespace: nothing is left to unmount.
    let script = "mount -t tmpfs -o size=1m none small || exit 99; \"$0\" pack demo.toml --out small; code=$?; \
                  ls -A small; exit $code";
    for (size, left) in [(3 << 20, ""), (300_000, "demo-1.zd.tar")] {
        // The second fits, but zd itself beside it does not.
        site.write("big.bin", &noise(1, size));
        site.write("demo.toml", format!("{HEAD}[[file]]\nname = \"big\"\npath = \"big.bin\"\n").as_bytes());
        let mut command = isolated("/usr/bin/unshare");
        command.args(["--mount", "sh", "-c", script, ZD]).current_dir(site.path(""));
        let out = Outcome::of(command.env("ZD_CACHE_DIR", site.path("cache")));
        if out.code == Some(99) {
            return skipped("disk full during pack", "this machine does not let root mount a tmpfs");
        }
        let out = out.refused(DISK_FULL, &["the disk is full", "free some space", "df -h"]);
        assert_eq!(out.stdout.trim(), left, "what is left on the full disk");
    }
}

// ---- Files from a URL

fn packing(site: &Site, server: &Server, sum: &str) -> Outcome {
    site.pack(
        &format!("[[file]]\nname = \"recipe.bin\"\nurl = \"{}\"\nsha256 = \"{sum}\"\n", server.url()),
        &[],
    )
}

#[test]
fn a_file_from_a_url_is_fetched_once_and_resumed() {
    let file = noise(11, 300_000);
    let sum = sha256(&file);
    let half = 150_000;
    let good = |answers: &[Answer], requests: usize, ranges: &[Option<&str>]| {
        let (site, server) = (Site::new(), Server::start(file.clone(), answers));
        packing(&site, &server, &sum).good();
        site.verify(&site.bundle()).good();
        assert_eq!(site.lock()["files"][0]["digest"], format!("sha256:{sum}"));
        let seen = server.seen();
        assert_eq!(seen.len(), requests, "{seen:?}");
        assert_eq!(seen.iter().map(|s| s.range.as_deref()).collect::<Vec<_>>(), ranges);
        packing(&site, &server, &sum).good();
        assert_eq!(server.seen().len(), requests, "the second pack has it in its cache");
        assert!(entries(&site.path("cache/partial")).is_empty());
        seen.iter().map(|s| s.sent).sum::<usize>()
    };
    assert_eq!(good(&[], 1, &[None]), file.len());
    let resume = Some("bytes=150000-");
    assert_eq!(good(&[Answer::Break(half)], 2, &[None, resume]), file.len(), "nothing was fetched twice");
    assert_eq!(good(&[Answer::Status(500)], 2, &[None, None]), file.len());
    assert_eq!(good(&[Answer::Break(half), Answer::Status(503)], 3, &[None, resume, resume]), file.len());
    assert_eq!(good(&[Answer::Break(half), Answer::Deaf], 2, &[None, resume]), file.len() + half);
}

#[test]
fn a_url_that_gives_something_else_stops_the_pack() {
    let file = noise(12, 100_000);
    let (site, server) = (Site::new(), Server::start(file.clone(), &[]));
    let wrong = sha256(b"something else");
    packing(&site, &server, &wrong).refused(SOURCE, &["recipe.bin", &wrong, &sha256(&file), "do: "]);
    assert_eq!(server.seen().len(), 1);
    assert!(entries(&site.path("cache/partial")).is_empty() && entries(&site.path("stick")).is_empty());

    // 404 is final; what came before it is kept and gone on with.
    let server =
        Server::start(file.clone(), &[Answer::Status(404), Answer::Break(40_000), Answer::Status(404)]);
    let sum = sha256(&file);
    packing(&site, &server, &sum).refused(SOURCE, &["recipe.bin", "404", &server.url()]);
    assert_eq!(server.seen().len(), 1);
    packing(&site, &server, &sum).refused(SOURCE, &["404", "what was fetched is kept"]);
    packing(&site, &server, &sum).good();
    assert_eq!(server.seen().last().unwrap().range.as_deref(), Some("bytes=40000-"));
    assert_eq!(server.seen().iter().map(|s| s.sent).sum::<usize>(), file.len());
}

#[test]
fn the_key_pair_for_backups() {
    let site = Site::new();
    let report = site.zd(&["keygen", "--backup", "--json"]).good().json();
    let key = report["key"].as_str().expect("a key");
    let secret = std::fs::read_to_string(site.path("zd-backup.key")).unwrap();
    assert!(
        key.starts_with("age1") && secret.contains(key) && secret.contains("\nAGE-SECRET-KEY-1"),
        "{report}"
    );
    assert_eq!(std::fs::read_to_string(site.path("zd-backup.pub")).unwrap(), format!("{key}\n"));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &site.path("zd-backup.key").metadata().unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    assert!(!report.to_string().contains("AGE-SECRET"), "the secret half is in its file only");
    site.zd(&["keygen", "--backup"]).refused(USAGE, &["zd-backup.key is there already"]);
    let both = site.zd(&["keygen", "--backup", "--password"]);
    assert!(both.code == Some(2) && both.stderr.contains("--password"), "{both:#?}");
    // A backup is read and refused before anything is asked of the host.
    site.zd(&["keygen", "--out", "host"]).good();
    site.zd(&["restore", "none", "--identity", "zd-backup.key"]).refused(USAGE, &["do: ", "--host-key"]);
    let restore =
        |file: &str, key: &str| site.zd(&["restore", file, "--identity", key, "--host-key", "host.pub"]);
    restore("none", "zd-backup.pub").refused(USAGE, &["no secret key of backups", "zd keygen --backup"]);
    restore("none", "zd-backup.key").refused(IO, &["none"]);
    site.write("empty", b"");
    for file in ["empty", "zd-backup.pub"] {
        restore(file, "zd-backup.key").refused(BUNDLE, &[file, "an earlier backup"]);
    }
}
