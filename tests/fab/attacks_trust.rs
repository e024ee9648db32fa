//! Whose backups and whose bundles a host takes: attempts of those whom it does not trust.

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::backup::{keys, rewritten, signed};
use crate::host::{Host, Pack, SERVICE, root};

const FIRST: &str = "etc/zd/trust/first.pub";

/// Of a backup: name and bytes.
type Members = Vec<(String, Vec<u8>)>;

/// What nobody may change: whom the host trusts, what it signs with, what its slots hold.
fn trusts(host: &Host) -> String {
    host.sh(
        "cd /etc/zd && sha256sum trust/* signing/*; ls -A trust; readlink /var/lib/zd/services/hello/active; \
             sha256sum /var/lib/zd/services/hello/state.json; ls /var/lib/zd/receipts",
    ) + &host.containers()
}

fn zd(args: &[&str]) {
    let done = Command::new(env!("CARGO_BIN_EXE_zd")).arg("--json").args(args).output().expect("zd runs");
    assert!(done.status.success(), "{args:?}: {done:?}");
}

/// A pair of keys as `zd keygen` makes it.
fn pair(folder: &Path, name: &str, more: &[&str]) -> PathBuf {
    let out = folder.join(name);
    zd(&[&["keygen", "--out", out.to_str().expect("text")], more].concat());
    out.with_extension("pub")
}

/// The signature with the number of another key, by which it says whose it is.
fn claiming(known: &str, signature: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(signature).expect("text");
    let lines: Vec<&str> = text.lines().collect();
    let key = BASE64.decode(known.trim()).expect("a key");
    let mut bytes = BASE64.decode(lines[1]).expect("a signature");
    bytes[2..10].copy_from_slice(&key[2..10]);
    text.replace(lines[1], &BASE64.encode(bytes)).into_bytes()
}

/// Backups that somebody made who has the public key and may read what everybody may: the attacker's key is trusted in
/// them. What is wrong with each is that the host has not signed it.
fn forged_backups(host: &Host, good: &Path, keys: &Path) -> Vec<(&'static str, &'static str)> {
    let theirs = pair(keys, "attacker", &[]);
    let trusted = std::fs::read(&theirs).expect("a key");
    let swapped = |members: &mut Members| {
        let mut index: Value = serde_json::from_slice(&members[0].1).expect("an index");
        for file in index["files"].as_array_mut().expect("files").iter_mut().filter(|f| f["path"] == FIRST) {
            file["size"] = json!(trusted.len());
            file["digest"] = json!(format!("sha256:{}", sha256(&trusted)));
        }
        members[0].1 = serde_json::to_vec(&index).expect("json");
        members.iter_mut().filter(|(name, _)| name == FIRST).for_each(|(_, bytes)| *bytes = trusted.clone());
    };
    let known = host.sh("tail -n 1 /etc/zd/signing/host.pub");
    let attempt = |name: &str, sign: &dyn Fn(&mut Members)| {
        let bytes = rewritten(good, keys, |members| {
            swapped(members);
            sign(members);
        });
        std::fs::write(good.with_file_name(name), bytes).expect(name);
    };
    let by = |key: &Path, members: &mut Members| {
        members[1].1 = signed(key, &members[0].1, &members[1].1);
    };
    attempt("unsigned", &|members| drop(members.remove(1)));
    attempt("signature-of-another", &|_| {});
    attempt("attackers", &|members| by(&keys.join("attacker.key"), members));
    attempt("claims", &|members| {
        by(&keys.join("attacker.key"), members);
        members[1].1 = claiming(&known, &members[1].1);
    });
    vec![
        ("unsigned", "it is not signed by any host"),
        ("signature-of-another", "it was altered"),
        ("attackers", "it is signed with key"),
        ("claims", "it was altered"),
    ]
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A bundle of the same manifest in another version, signed with another key.
fn repacked(manifest: &Path, version: &str, key: &Path, more: &str) -> PathBuf {
    let text = std::fs::read_to_string(manifest).expect("a manifest");
    let other = text.replace("version = \"1\"\n", &format!("version = {version:?}\n{more}"));
    assert_ne!(other, text);
    let path = manifest.with_file_name(format!("trust-{version}.toml"));
    std::fs::write(&path, other).expect("a manifest");
    let folder = path.with_extension("");
    let _ = std::fs::remove_dir_all(&folder);
    let [path, key, out] = [&path, key, &folder].map(|p| p.to_str().expect("text"));
    zd(&["pack", path, "--key", key, "--out", out]);
    folder
}

#[test]
#[ignore = "boots a host"]
fn nobody_becomes_trusted_by_a_backup_or_a_bundle() {
    let stick = Pack { folder: "trust-1", name: Some("trust"), service: SERVICE, ..Pack::default() }.make();
    let manifest = stick.with_extension("toml");
    let host = Host::bare("trusting", &stick);
    let signing = host.run(&["/stick/zd", "install", "--json"]).ok().json()["signing_key"].clone();
    let keys = keys("trust");

    no_backup_of_somebody_else_is_restored(&host, &keys, &signing);

    // A second signer: not by --key, and without driving out the first.
    let second = pair(&keys, "second", &[]);
    let stick2 = repacked(&manifest, "2", &keys.join("second.key"), "");
    host.copy_in(&stick2, "/stick2");
    host.copy_in(&keys, "/keys");
    let before = trusts(&host);
    for verb in ["upgrade", "install"] {
        host.run(&["/stick2/zd", verb, "--yes"]).fails(4, "signature", &["which is not trusted here"]);
        host.run(&["/stick2/zd", verb, "--yes", "--key", "/keys/second.pub"]).fails(
            4,
            "signature",
            &["--key does not add one", "zd trust add"],
        );
    }
    host.run(&["/stick2/zd", "verify", "--key", "/keys/second.pub"]).ok();
    assert_eq!(trusts(&host), before);
    host.zd(&["trust", "add", "/keys/second.pub", "--reason", "ticket 12"]).ok();
    let list = || host.zd(&["trust", "list", "--json"]).ok().json();
    let ids = || -> Vec<String> {
        let list = list();
        let keys = list["keys"].as_array().expect("keys").iter();
        keys.map(|key| key["id"].as_str().expect("an id").to_owned()).collect()
    };
    let both = ids();
    assert_eq!(both.len(), 2, "{both:?}");
    host.run(&["/stick2/zd", "upgrade", "--yes"]).ok();
    assert_eq!(ids(), both, "a second signer evicts nobody");

    // An older bundle, with all its holes, is not put over a newer one by accident, nor without a reason.
    let older = ["/stick/zd", "upgrade", "--yes"];
    host.run(&older).fails(5, "preflight", &["--allow-older"]);
    host.zd(&["rollback", "--generation", "1", "--yes"]).ok();
    assert!(list()["newest"].is_string(), "also after the way back");
    host.run(&[&older[..], &["--allow-older"]].concat()).fails(2, "usage", &["--reason"]);
    host.zd(&["rollback", "--generation", "2", "--yes"]).ok();
    host.run(&[&older[..], &["--allow-older", "--reason", "ticket 13"]].concat()).ok();
    assert_eq!(ids(), both);

    // A revocation that travels in a bundle is remembered.
    let line = std::fs::read_to_string(&second).expect("a key");
    let revoked = format!("revoked-keys = [{:?}]\n", line.lines().nth(1).expect("a line"));
    let site = root().join("target/fab/zd.key");
    let stick3 = repacked(&manifest, "3", &site, &revoked);
    host.copy_in(&stick3, "/stick3");
    host.run(&["/stick3/zd", "upgrade", "--yes"]).ok();
    assert_eq!((ids().len(), list()["revoked"].as_array().map(Vec::len)), (1, Some(2)));
    host.run(&["/stick2/zd", "upgrade", "--yes"]).fails(4, "signature", &["which is not trusted here"]);
    for again in [
        &["/stick2/zd", "verify", "--key", "/keys/second.pub"][..],
        &["zd", "trust", "add", "/keys/second.pub", "--yes"],
    ] {
        host.run(again).fails(4, "signature", &["was revoked on this host"]);
    }

    // A successor counts by its predecessor's signature, and only so.
    let before = trusts(&host);
    let next = pair(&keys, "next", &["--follows", site.to_str().expect("text")]);
    let foreign = pair(&keys, "foreign", &["--follows", keys.join("attacker.key").to_str().expect("text")]);
    host.copy_in(&keys, "/keys2");
    for (file, says) in [(&foreign, "trusted are"), (&second, "No such file")] {
        let file = format!("/keys2/{}", file.file_name().expect("a name").display());
        let refused = host.zd(&["trust", "rotate", &file]);
        assert!(refused.code != 0 && refused.err.contains(says), "{refused:?}");
    }
    host.zd(&["trust", "revoke", &ids()[0]]).fails(2, "usage", &["the only key"]);
    assert_eq!(trusts(&host), before);
    let old = ids().remove(0);
    let file = format!("/keys2/{}", next.file_name().expect("a name").display());
    host.zd(&["trust", "rotate", &file, "--reason", "yearly"]).ok();
    host.zd(&["trust", "revoke", &old, "--reason", "yearly"]).ok();
    assert!(!ids().contains(&old) && ids().len() == 1);
    host.run(&["/stick3/zd", "install", "--yes"]).fails(4, "signature", &["which is not trusted here"]);
    let history = host.zd(&["history", "--json"]).ok().out;
    for verb in ["trust add", "trust revoke", "trust rotate", "ticket 13", "said by bundle trust-3"] {
        assert!(history.contains(verb), "{verb} in {history}");
    }
    host.settles();
    host.zd(&["uninstall", "--yes"]).ok();
    assert_eq!(host.sh("ls -d /etc/zd 2>/dev/null; true"), "");
}

fn no_backup_of_somebody_else_is_restored(host: &Host, keys: &Path, signing: &Value) {
    host.copy_in(keys, "/keys0");
    let set = ["backup", "--recipient", "/keys0/site.pub", "--yes", "--json"];
    let taken = host.zd(&set).ok().json();
    let folder = root().join("target/fab/trust-backups");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    let good = folder.join("good");
    host.copy_out(taken["file"].as_str().expect("a file"), &good);
    let forged = forged_backups(host, &good, keys);
    host.copy_in(&folder, "/backups");
    host.copy_in(keys, "/keys1");
    let restore = |file: &str, more: &[&str]| {
        let file = format!("/backups/{file}");
        host.zd(&[&["restore", &file, "--identity", "/keys0/site.key", "--yes"], more].concat())
    };
    let before = trusts(host);
    for (name, says) in forged {
        restore(name, &[]).fails(4, "signature", &[says]);
    }
    // Nor is a host talked into another key.
    restore("attackers", &["--host-key", "/keys1/attacker.pub"]).fails(
        4,
        "signature",
        &["no key that this host has or had"],
    );
    assert_eq!(trusts(host), before, "refused before anything changes");

    // Its own it takes, also after it has another key; whom it trusts by then stays.
    host.zd(&["trust", "add", "/keys1/attacker.pub", "--reason", "as if it were not one"]).ok();
    host.zd(&["secrets", "rotate", "--yes"]).ok();
    let now = host.sh("cd /etc/zd/trust && sha256sum *");
    host.sh("rm /var/lib/zd/services/hello/state.json");
    let report = restore("good", &["--json"]).ok().json();
    assert_eq!((&report["signed_by"], report["at"].is_string()), (signing, true), "{report}");
    assert_eq!(host.sh("cd /etc/zd/trust && sha256sum *"), now, "a restore changes nothing there");
    let id = host.sh("sed -n 's/.*key //p' /keys1/attacker.pub").trim().to_owned();
    host.zd(&["trust", "revoke", &id]).ok();
    let again = restore("good", &["--json"]).ok().json();
    assert_eq!(again["changed"], 0, "{again}");
}
