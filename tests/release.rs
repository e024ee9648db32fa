//! HashiCorp releases and mirrors from outside: what `zd pack` takes, and what it refuses. A test key
//! stands for HashiCorp's: the manifest names it as the site's own.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Write};

use serde_json::{Value, json};
use support::forge::{LOCK, Parts};
use support::openpgp::{Form, Keys};
use support::server::{Answer, Server};
use support::*;
use zip::write::SimpleFileOptions;

const SUMS: &str = "nomad/1.6.1/nomad_1.6.1_SHA256SUMS";
const SIGNATURE_FILE: &str = "nomad/1.6.1/nomad_1.6.1_SHA256SUMS.sig";
const ZIP: &str = "nomad/1.6.1/nomad_1.6.1_linux_amd64.zip";

fn binary() -> Vec<u8> {
    noise(61, 300_000)
}

fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        zip.start_file(*name, SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// One release as its origin has it.
#[derive(Clone)]
struct Release {
    files: BTreeMap<String, Vec<u8>>,
}

impl Release {
    fn good(keys: &Keys) -> Self {
        Self::of(keys, zip(&[("LICENSE.txt", b"terms"), ("nomad", &binary())]))
    }

    fn of(keys: &Keys, zip: Vec<u8>) -> Self {
        let sums = format!("{}  nomad_1.6.1_linux_amd64.zip\n", sha256(&zip));
        Self { files: BTreeMap::from([(ZIP.into(), zip)]) }.signed(keys, &sums)
    }

    fn signed(self, keys: &Keys, sums: &str) -> Self {
        let sums = format!("{}  nomad_1.6.1_darwin_amd64.zip\n{sums}", sha256(b"another"));
        self.with(SIGNATURE_FILE, keys.sign(sums.as_bytes())).with(SUMS, sums.into())
    }

    fn with(mut self, path: &str, bytes: Vec<u8>) -> Self {
        self.files.insert(path.into(), bytes);
        self
    }

    fn without(mut self, path: &str) -> Self {
        self.files.remove(path).unwrap();
        self
    }

    /// As a folder of the site.
    fn lay(&self, site: &Site, name: &str) {
        for (path, bytes) in &self.files {
            let path = site.path(name).join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    fn serve(&self, answers: &[Answer]) -> Server {
        Server::tree(self.files.clone(), answers)
    }
}

/// A site whose manifests name `keys`.
fn site(keys: &Keys) -> Site {
    let site = Site::new();
    site.write("site.asc", &keys.public(Form::Good));
    site
}

fn pack(site: &Site, more: &str, mirror: &str) -> Outcome {
    let head = HEAD.replace("[target]", "engine = \"nomad\"\n[target]");
    let release = "[[release]]\nproduct = \"nomad\"\nversion = \"1.6.1\"\n";
    site.write("demo.toml", format!("{head}{release}{more}").as_bytes());
    let _ = fs::remove_dir_all(site.path("stick"));
    site.zd(&["pack", "demo.toml", "--out", "stick", "--mirror", mirror])
}

const KEY: &str = "key = \"site.asc\"\n";
const UNSIGNED: &str = "unsigned = true\n";

fn the_release(site: &Site) -> Value {
    site.verify(&site.bundle()).good();
    site.lock()["releases"][0].take()
}

// ---- What is taken

#[test]
fn a_release_is_checked_by_its_signature_and_its_sum() {
    let keys = Keys::rsa();
    let release = Release::good(&keys);
    let in_lock = json!({
        "product": "nomad",
        "version": "1.6.1",
        "unsigned": false,
        "archive": format!("sha256:{}", sha256(&release.files[ZIP])),
        "signed-by": keys.signer(),
        "digest": format!("sha256:{}", sha256(&binary())),
    });
    let (site, server) = (site(&keys), release.serve(&[]));
    let said = pack(&site, KEY, &server.origin()).good().stderr;
    assert!(said.contains(&format!("release nomad 1.6.1: signed by {}", keys.signer())), "{said}");
    assert_eq!(the_release(&site), in_lock);
    let lock = site.lock();
    assert_eq!(lock["blobs"], json!([{ "digest": in_lock["digest"], "size": 300_000, "role": "binary" }]));
    let shown = site.zd(&["inspect", "stick/demo-1.zd.tar"]).good().stdout;
    assert!(shown.contains("signed by") && shown.contains(&keys.signer()), "{shown}");
    assert!(!shown.contains("UNSIGNED"), "{shown}");

    // Again: the sums are asked for, the zip is in the cache.
    let before = server.seen().len();
    let quiet = site.zd(&["-q", "pack", "demo.toml", "--out", "again", "--mirror", &server.origin()]).good();
    assert_eq!(quiet.stderr, "");
    let asked: Vec<String> = server.seen().split_off(before).into_iter().map(|s| s.path).collect();
    assert_eq!(asked, [SUMS, SIGNATURE_FILE]);

    // The same from a folder, with an empty cache.
    fs::remove_dir_all(site.path("cache")).unwrap();
    release.lay(&site, "mirror");
    pack(&site, KEY, "mirror").good();
    assert_eq!(the_release(&site), in_lock);
}

#[test]
fn a_break_in_the_middle_is_gone_on_with() {
    let keys = Keys::new();
    let (site, release) = (site(&keys), Release::good(&keys));
    let server = release.serve(&[
        Answer::Break(10),
        Answer::Good,
        Answer::Status(503),
        Answer::Good,
        Answer::Break(150_000),
        Answer::Good,
    ]);
    pack(&site, KEY, &server.origin()).good();
    assert_eq!(the_release(&site)["digest"], format!("sha256:{}", sha256(&binary())));
    let seen = server.seen();
    let paths: Vec<&str> = seen.iter().map(|s| s.path.as_str()).collect();
    assert_eq!(paths, [SUMS, SUMS, SIGNATURE_FILE, SIGNATURE_FILE, ZIP, ZIP]);
    assert_eq!(seen[5].range.as_deref(), Some("bytes=150000-"));
    assert!(entries(&site.path("cache/partial")).is_empty());
}

#[test]
fn a_signature_counts_if_the_key_was_good_when_it_was_made() {
    let keys = Keys::new();
    let site = site(&keys);
    let good = Release::good(&keys);
    let earlier = |days| good.clone().with(SIGNATURE_FILE, keys.sign_at(&good.files[SUMS], days));
    // The key lived from ten days ago until five days ago.
    site.write("site.asc", &keys.public(Form::SubkeyExpires(5)));
    earlier(7.0).lay(&site, "mirror");
    pack(&site, KEY, "mirror").good();
    assert_eq!(the_release(&site)["signed-by"], keys.signer());
    for (days, key, text) in [(1.0, keys.signer(), "expired on"), (11.0, keys.primary(), "was only made on")]
    {
        earlier(days).lay(&site, "mirror");
        pack(&site, KEY, "mirror").refused(SIGNATURE, &["nomad 1.6.1", &format!("key {key} {text}"), "do: "]);
    }
}

#[test]
fn what_is_unsigned_says_so() {
    let keys = Keys::new();
    let site = site(&keys);
    fs::create_dir(site.path("built")).unwrap();
    site.write("built/nomad", &binary());
    let said = pack(&site, UNSIGNED, "built").good().stderr;
    assert!(said.contains("release nomad 1.6.1: UNSIGNED"), "{said}");
    let expected = |archive: Value| {
        json!({
            "product": "nomad", "version": "1.6.1", "unsigned": true, "archive": archive, "signed-by": null,
            "digest": format!("sha256:{}", sha256(&binary())),
        })
    };
    assert_eq!(the_release(&site), expected(Value::Null));
    let shown = site.zd(&["inspect", "stick/demo-1.zd.tar"]).good().stdout;
    let text = ["release nomad 1.6.1: UNSIGNED", "release nomad (UNSIGNED)"];
    assert!(text.iter().all(|t| shown.contains(t)), "{shown}");

    // The origin's layout without a signature: by the sums where there are any.
    let release = Release::good(&keys).without(SIGNATURE_FILE);
    let archive = json!(format!("sha256:{}", sha256(&release.files[ZIP])));
    pack(&site, UNSIGNED, &release.serve(&[]).origin()).good();
    assert_eq!(the_release(&site), expected(archive.clone()));
    fs::remove_dir_all(site.path("cache")).unwrap();
    release.clone().without(SUMS).lay(&site, "bare");
    pack(&site, UNSIGNED, "bare").good();
    assert_eq!(the_release(&site), expected(archive));
    fs::remove_dir_all(site.path("cache")).unwrap();
    release.with(ZIP, zip(&[("nomad", b"another")])).lay(&site, "bent");
    pack(&site, UNSIGNED, "bent").refused(SOURCE, &["nomad 1.6.1", "has sha256", "SHA256SUMS says"]);
}

#[test]
fn versions_that_an_upgrade_goes_through_are_carried_too() {
    let site = Site::new();
    let (stone, more) = (noise(63, 200_000), format!("{UNSIGNED}via = [\"1.4.14\"]\n"));
    fs::create_dir_all(site.path("built/nomad/1.6.1")).unwrap();
    site.write("built/nomad/1.6.1/nomad", &binary());
    pack(&site, &more, "built").refused(SOURCE, &["nomad 1.4.14", "built/nomad/1.4.14/nomad"]);
    fs::create_dir_all(site.path("built/nomad/1.4.14")).unwrap();
    site.write("built/nomad/1.4.14/nomad", &stone);
    let said = pack(&site, &more, "built").good();
    for line in [
        "upgrades     to nomad 1.6.1 from 1.3 1.4 1.5 1.6\n",
        "not from, unless via has these too: 1.1 (1.3.x), 1.2 (1.3.x)\n",
    ] {
        assert!(said.stdout.contains(line), "{said:#?}");
    }
    assert!(said.stderr.contains("release nomad 1.4.14: UNSIGNED"), "{said:#?}");
    let in_lock = |version: &str, bytes: &[u8]| {
        let digest = format!("sha256:{}", sha256(bytes));
        json!({
            "product": "nomad", "version": version, "unsigned": true, "archive": null, "signed-by": null,
            "digest": digest,
        })
    };
    let mut expected = in_lock("1.6.1", &binary());
    expected["via"] = json!([in_lock("1.4.14", &stone)]);
    assert_eq!(the_release(&site), expected);
    let shown = site.zd(&["inspect", "stick/demo-1.zd.tar"]).good().stdout;
    assert!(shown.contains("release nomad 1.4.14: UNSIGNED"), "{shown}");

    // A binary that only has the program's name is of one version.
    fs::create_dir(site.path("plain")).unwrap();
    site.write("plain/nomad", &binary());
    pack(&site, &more, "plain").refused(SOURCE, &["nomad 1.4.14", "plain/nomad/1.4.14/nomad"]);
}

#[test]
fn files_come_from_the_mirror_as_well() {
    let (site, file) = (Site::new(), noise(62, 5000));
    let body = |sum: &str| {
        format!(
            "[[file]]\nname = \"a.bin\"\nurl = \"https://files.invalid/x/a.bin?y=1\"\nsha256 = \"{sum}\"\n"
        )
    };
    let (good, wrong) = (body(&sha256(&file)), body(&sha256(b"another")));
    let server = Server::tree(BTreeMap::from([("hc/x/a.bin".into(), file.clone())]), &[]);
    fs::create_dir_all(site.path("mirror/x")).unwrap();
    site.write("mirror/x/a.bin", &file);
    for mirror in [format!("{}/hc/", server.origin()), "mirror".into(), site.text("mirror")] {
        let _ = fs::remove_dir_all(site.path("cache"));
        site.pack(&good, &["--mirror", &mirror]).good();
        site.verify(&site.bundle()).good();
        site.pack(&wrong, &["--mirror", &mirror]).refused(SOURCE, &["a.bin", &sha256(&file), "do: "]);
    }
    fs::remove_dir_all(site.path("cache")).unwrap();
    site.pack(&good, &["--mirror", "nowhere"]).refused(SOURCE, &["nowhere/x/a.bin", "correct --mirror"]);
    site.pack(&good, &["--mirror", &server.origin()]).refused(SOURCE, &["/x/a.bin", "404", "--mirror"]);
    let usage = site.pack(&good, &["--mirror", "ftp://h/"]);
    assert!(usage.code == Some(2) && usage.stderr.contains("ftp:// is not known here"), "{usage:#?}");
}

// ---- What is refused

#[test]
fn sums_that_nobody_good_signed_are_refused() {
    let (keys, other) = (Keys::rsa(), Keys::new());
    let site = site(&keys);
    let good = Release::good(&keys);
    let sums = &good.files[SUMS];
    let signature = |bytes: Vec<u8>| good.clone().with(SIGNATURE_FILE, bytes);
    let altered = [b"00".as_slice(), &sums[2..]].concat();
    let cases = [
        ("by another key", signature(other.sign(sums)), "which is not the expected one"),
        ("sums altered", good.clone().with(SUMS, altered), "was altered"),
        ("of other sums", signature(keys.sign(b"other")), "was altered"),
        ("by the primary key", signature(keys.sign_by_primary(sums)), "is not for signing"),
        ("with SHA-1", signature(keys.sign_with_sha1(sums)), "of a kind that zd does not trust"),
        ("none", good.clone().without(SIGNATURE_FILE), "is not there, so"),
        ("empty", signature(vec![]), "cannot be read"),
        ("noise", signature(noise(5, 500)), ""),
        ("cut", signature(keys.sign(sums)[..40].into()), ""),
        ("a key instead", signature(keys.public(Form::Good)), "cannot be read"),
        ("endless", signature(vec![b'x'; 100_000]), "at most 65536 bytes"),
    ];
    let mut wrong = Vec::new();
    for (what, release, text) in cases {
        let code = if what == "endless" { SOURCE } else { SIGNATURE };
        let server = release.serve(&[]);
        let out = pack(&site, KEY, &server.origin());
        wrong.extend(
            out.not_refused(code, &["nomad 1.6.1", text, "do: "]).map(|why| format!("{what}: {why}")),
        );
        assert!(server.seen().iter().all(|s| s.path != ZIP), "{what}: the zip was fetched");
    }
    // HashiCorp's own key counts where the manifest names no other.
    let out = pack(&site, "", &good.serve(&[]).origin());
    let expected = ["HashiCorp's key, C874011F0AB405110D02105534365D9472D7468F"];
    wrong.extend(out.not_refused(SIGNATURE, &expected));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!site.path("stick").exists(), "something was written");
}

#[test]
fn a_key_that_is_no_good_is_refused() {
    let (keys, site) = (Keys::new(), Site::new());
    Release::good(&keys).lay(&site, "mirror");
    let cases = [
        (Form::SubkeyExpires(9), "expired on"),
        (Form::PrimaryExpires(9), "expired on"),
        (Form::SubkeyRevoked, "is revoked"),
        (Form::PrimaryRevoked, "is revoked"),
        (Form::NotForSigning, "is not for signing"),
        (Form::OneSided, "does not itself say that it belongs"),
        (Form::Foreign, "is not bound to its primary key"),
    ];
    let mut wrong = Vec::new();
    for (form, text) in cases {
        site.write("site.asc", &keys.public(form));
        let out = pack(&site, KEY, "mirror");
        wrong.extend(out.not_refused(SIGNATURE, &["nomad 1.6.1", text, "site.asc", "do: "]));
    }
    site.write("site.asc", b"no key at all");
    let out = pack(&site, KEY, "mirror");
    wrong.extend(out.not_refused(SIGNATURE, &["site.asc cannot be read", "gpg --armor --export"]));
    fs::remove_file(site.path("site.asc")).unwrap();
    wrong.extend(pack(&site, KEY, "mirror").not_refused(SOURCE, &["site.asc", "there is no such file"]));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    site.write("site.asc", &keys.public(Form::PrimaryExpires(11)));
    pack(&site, KEY, "mirror").good();
}

#[test]
fn a_zip_that_is_not_the_release_is_refused() {
    let keys = Keys::new();
    let site = site(&keys);
    let good = Release::good(&keys);
    let line = |bytes: &[u8]| format!("{}  nomad_1.6.1_linux_amd64.zip\n", sha256(bytes));
    let other_sum = good.clone().signed(&keys, &line(b"another"));
    let twice = [line(&good.files[ZIP]), line(b"another")].concat();
    let mut damaged = good.files[ZIP].clone();
    damaged[100_000] ^= 1;
    let cases = [
        ("another sum", other_sum, "SHA256SUMS says"),
        ("no sum", good.clone().signed(&keys, ""), "has no line for nomad_1.6.1_linux_amd64.zip"),
        ("two sums", good.clone().signed(&keys, &twice), "more than one line"),
        ("no zip", good.clone().without(ZIP), ZIP),
        ("no sums", good.clone().without(SUMS), SUMS),
        ("no binary", Release::of(&keys, zip(&[("README", b"x"), ("bin/nomad", b"x")])), "nomad: "),
        ("a folder", Release::of(&keys, zip(&[("nomad/", b"")])), "nomad: "),
        ("no zip at all", Release::of(&keys, noise(9, 5000)), ".zip"),
        ("a damaged one", Release::of(&keys, damaged), "it is damaged"),
    ];
    let mut wrong = Vec::new();
    for (what, release, text) in cases {
        let folder = format!("mirror {what}");
        release.lay(&site, &folder);
        for mirror in [release.serve(&[]).origin(), folder] {
            let out = pack(&site, KEY, &mirror);
            let why = out.not_refused(SOURCE, &["nomad 1.6.1", text, "do: "]);
            wrong.extend(why.map(|why| format!("{what}: {why}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(entries(&site.path("cache/tmp")).is_empty(), "leftovers in the cache");
    assert!(!site.path("stick").exists(), "something was written");
}

#[test]
fn a_plain_binary_is_not_taken_for_a_signed_one() {
    let site = Site::new();
    fs::create_dir(site.path("built")).unwrap();
    let texts = ["built/nomad/1.6.1/nomad_1.6.1_SHA256SUMS is not there", "only taken with unsigned = true"];
    site.write("built/nomad", b"anything");
    pack(&site, "", "built").refused(SOURCE, &texts);
    pack(&site, UNSIGNED, "nowhere")
        .refused(SOURCE, &["put the binary itself at nowhere/nomad/1.6.1/nomad or nowhere/nomad,"]);
}

#[test]
fn a_lock_says_either_who_signed_or_that_nobody_did() {
    let site = Site::new();
    fs::create_dir(site.path("built")).unwrap();
    site.write("built/nomad", &binary());
    pack(&site, UNSIGNED, "built").good();
    let good = Parts::read(&site.bundle());
    let (key, print) = (site.path("zd.key"), "AB".repeat(20));
    let release = good.lock()["releases"][0].clone();
    let via = |changes: &[Value]| -> Value {
        let stone = |change: &Value| {
            let mut stone = release.clone();
            stone.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            stone
        };
        json!({ "via": changes.iter().map(stone).collect::<Vec<_>>() })
    };
    let cases = [
        (json!({ "unsigned": false }), "or the mark unsigned"),
        (json!({ "signed-by": print }), "or the mark unsigned"),
        (json!({ "unsigned": false, "signed-by": print }), "expected a signed archive"),
        (json!({ "signed-by": "anybody" }), "is not an OpenPGP fingerprint"),
        (json!({ "product": "vault" }), "unknown variant"),
        (json!({ "run-me": "x" }), "unknown field"),
        (json!({ "digest": format!("sha256:{}", "00".repeat(32)) }), "not listed among the blobs"),
        (via(&[json!({ "version": "1.6.1" })]), "via 1.6.1 is not in order"),
        (via(&[json!({ "version": "1.5.1" }), json!({ "version": "1.4.1" })]), "via 1.4.1 is not in order"),
        (via(&[json!({ "version": "1.5.1", "product": "consul" })]), "more than earlier versions of it"),
        (via(&[json!({ "version": "1.5.1", "unsigned": false })]), "nomad 1.5.1: expected a signed archive"),
    ];
    for (change, text) in cases {
        let mut lock = good.lock();
        lock["releases"][0].as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let forged = good.with_lock(&serde_json::to_vec(&lock).unwrap(), &key);
        site.verify(&site.write("forged.zd.tar", &forged.bytes())).refused(BUNDLE, &[text]);
    }
    // A lock without releases is the same as before there were any.
    let without = Site::packed();
    assert!(!String::from_utf8_lossy(&Parts::read(&without.bundle()).0[LOCK].body).contains("releases"));
}
