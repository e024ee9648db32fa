//! Backups: taken under load, put back on the same host under load, and on a bare one in its place.

use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::host::{Host, Pack, SERVICE, differences, root, zd_stack};

/// Two bundles, the second one without v3. On the nomad engine the manifest says how hosts are backed up.
fn sticks(name: &str, releases: Option<(String, PathBuf)>, keys: &Path) -> [PathBuf; 2] {
    let mut service = SERVICE.to_owned();
    if releases.is_some() {
        let key = std::fs::read_to_string(keys.join("site.pub")).expect("a key");
        service.push_str(&format!("[backup]\nrecipient = {:?}\nkeep = 2\nevery = \"hour\"\n", key.trim()));
    }
    [("1", ""), ("2", "v3")].map(|(version, without)| {
        let (folder, releases) = (format!("{name}-{version}"), releases.clone());
        let (folder, version, service) = (folder.as_str(), Some(version), service.as_str());
        Pack { folder, name: Some(name), version, service, without, releases, ..Pack::default() }.make()
    })
}

/// Key pairs for backups: the one that is used, and another.
pub fn keys(name: &str) -> PathBuf {
    let folder = root().join("target/fab").join(format!("{name}-keys"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    for name in ["site", "other"] {
        let mut keygen = Command::new(env!("CARGO_BIN_EXE_zd"));
        assert!(
            keygen
                .args(["-q", "keygen", "--backup", "--out"])
                .arg(folder.join(name))
                .stdout(std::process::Stdio::null())
                .status()
                .expect("zd")
                .success()
        );
    }
    folder
}

/// What has to be the same again, a line each.
fn inventory(host: &Host) -> String {
    let status = host.zd(&["status", "--json"]).ok().json();
    let mut lines = String::new();
    for service in status["services"].as_array().expect("services") {
        for key in ["active", "active_since", "active_by", "listen"] {
            lines.push_str(&format!("{} {key} {}\n", service["name"], service[key]));
        }
        for slot in service["slots"].as_array().expect("slots") {
            let containers = slot["containers"].as_array().map(Vec::len);
            let held =
                ["version", "digest", "since", "by", "healthy", "role"].map(|key| slot[key].to_string());
            lines.push_str(&format!("{} {} {containers:?}\n", slot["slot"], held.join(" ")));
        }
    }
    lines + &host.sh(
        "cd /etc/zd && find tls registry secrets signing trust host.toml backup.toml */private.json -type f 2>/dev/null | sort -u | \
         while read -r f; do stat -c '%n %a %U' $f; sha256sum $f; done; \
         if test -e /etc/zd/secrets/consul-zd; then cd /opt/zd/generations/current/bin; \
         CONSUL_HTTP_TOKEN=$(cat /etc/zd/secrets/consul-zd) ./consul kv get zd/services/hello/pointer; \
         CONSUL_HTTP_TOKEN=$(cat /etc/zd/secrets/consul-management) ./consul acl token list | grep AccessorID; \
         CONSUL_HTTP_TOKEN=$(cat /etc/zd/secrets/consul-management) ./consul kv get site/recipe; \
         cat /var/lib/zd/nomad/client/client-id; echo; fi; \
         cd /var/lib/zd && sha256sum services/*/state.json reports/* && readlink generations/current services/*/active; \
         readlink /opt/zd/generations/current; curl --version 2>/dev/null; true",
    )
}

/// Everything that was there is there, and the same.
#[track_caller]
fn has(before: &str, after: &str) {
    let gone: Vec<&str> = before.lines().filter(|l| !after.lines().any(|m| m == *l)).collect();
    assert!(gone.is_empty(), "not the same any more:\n{}", gone.join("\n"));
}

fn history(host: &Host) -> Vec<Value> {
    let all = host.zd(&["history", "--json"]).ok().json();
    all.as_array().or(all["records"].as_array()).expect("records").clone()
}

/// The backup of `file` with another index, signed with the host's key all the same.
fn forged(file: &Path, keys: &Path, change: impl Fn(&mut Value)) -> Vec<u8> {
    rewritten(file, keys, |members| {
        let mut index: Value = serde_json::from_slice(&members[0].1).expect("an index");
        change(&mut index);
        members[0].1 = serde_json::to_vec(&index).expect("json");
        members[1].1 = signed(&keys.join("host.key"), &members[0].1, &members[1].1);
    })
}

/// A host's signature over an index that says the same as the one before.
pub fn signed(secret: &Path, index: &[u8], before: &[u8]) -> Vec<u8> {
    let text = std::fs::read_to_string(secret).expect("a key");
    let key = minisign::SecretKeyBox::from_string(&text).and_then(|k| k.into_unencrypted_secret_key());
    let before = std::str::from_utf8(before).expect("text");
    let trusted = before.lines().nth(2).and_then(|l| l.strip_prefix("trusted comment: "));
    let of = Some("signature of a host that zd is installed on");
    let signed = minisign::sign(None, &key.expect("a key"), Cursor::new(index), trusted, of);
    signed.expect("signed").into_string().into_bytes()
}

/// The members of the backup in plain, changed, and encrypted again to the same key.
pub fn rewritten(file: &Path, keys: &Path, change: impl FnOnce(&mut Vec<(String, Vec<u8>)>)) -> Vec<u8> {
    let secret = std::fs::read_to_string(keys.join("site.key")).expect("a key");
    let secret = secret.lines().find(|l| l.starts_with("AGE-SECRET-KEY-1")).expect("a key");
    let identity: age::x25519::Identity = secret.parse().expect("a key");
    let plain = age::decrypt(&identity, &std::fs::read(file).expect("a backup")).expect("decrypts");
    let mut members: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in tar::Archive::new(Cursor::new(&plain)).entries().expect("a tar") {
        let mut entry = entry.expect("a member");
        let (name, mut bytes) = (entry.path().expect("a name").display().to_string(), Vec::new());
        entry.read_to_end(&mut bytes).expect("bytes");
        members.push((name, bytes));
    }
    change(&mut members);
    let mut out = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).expect("a name");
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        out.append(&header, bytes.as_slice()).expect("a member");
    }
    age::encrypt(&identity.to_public(), &out.into_inner().expect("a tar")).expect("encrypts")
}

/// Bad backups, beside the good one, each with what is said of it.
fn bad_backups(good: &Path, keys: &Path) -> Vec<(&'static str, i32, &'static str, &'static str)> {
    let folder = good.parent().expect("a folder");
    let write = |name: &str, bytes: &[u8]| {
        std::fs::File::create(folder.join(name)).and_then(|mut f| f.write_all(bytes)).expect(name);
    };
    let bytes = std::fs::read(good).expect("a backup");
    let mut flipped = bytes.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    write("flipped", &flipped);
    write("cut", &bytes[..bytes.len() - 10]);
    write("escape", &forged(good, keys, |i| i["files"][1]["path"] = json!("etc/zd/../../root/x")));
    write("elsewhere", &forged(good, keys, |i| i["files"][1]["path"] = json!("etc/cron.d/x")));
    write("renamed", &forged(good, keys, |i| i["files"][1]["path"] = json!("etc/zd/tls/renamed")));
    write("newer", &forged(good, keys, |i| i["schema"] = json!(3)));
    let other = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
    write("sum", &forged(good, keys, |i| i["files"][2]["digest"] = json!(other)));
    write("lock", &forged(good, keys, |i| i["host"]["bundle"] = json!(other)));
    vec![
        ("flipped", 4, "bundle", "copy it again"),
        ("cut", 4, "bundle", "copy it again"),
        ("escape", 4, "bundle", "is no place that a backup of zd has files of"),
        ("elsewhere", 4, "bundle", "is no place that a backup of zd has files of"),
        ("renamed", 4, "bundle", "is not what its index names here"),
        ("newer", 4, "bundle", "schema 3"),
        ("sum", 4, "bundle", "does not have the bytes that its index says"),
        ("lock", 4, "bundle", "is not the one of the installed bundle"),
    ]
}

fn restore(host: &Host, zd: &str, file: &str, more: &[&str]) -> crate::host::Said {
    let args = [&[zd, "restore", file, "--identity", "/keys/site.key", "--yes"], more].concat();
    host.run(&args)
}

/// Installed, deployed, switched, scaled, upgraded: green holds v3, which the bundle does not carry.
fn lived_in(name: &str, [first, next]: &[PathBuf; 2], keys: &Path, by_manifest: bool) -> Host {
    let host = Host::installed_from(name, first);
    host.copy_in(keys, "/keys");
    if by_manifest {
        assert_eq!(host.sh("systemctl is-active zd-backup.timer"), "active\n");
    } else {
        host.zd(&["backup"]).fails(2, "usage", &["zd keygen --backup", "--recipient"]);
        let set =
            ["backup", "--recipient", "/keys/site.pub", "--keep", "2", "--every", "hour", "--yes", "--json"];
        host.zd(&set).ok();
    }
    host.zd(&["deploy", "v3", "--reason", "ticket 1"]).ok();
    host.zd(&["switch", "--reason", "ticket 2"]).ok();
    host.copy_in(next, "/stick2");
    let upgraded = host.run(&["/stick2/zd", "upgrade", "--yes", "--json"]).ok().json();
    let saved = upgraded["backup"].as_str().expect("a backup before the upgrade").to_owned();
    assert!(saved.starts_with("/var/backups/zd/zd-node-"), "{saved}");
    host.sh(&format!("test -s {saved}"));
    host.zd(&["deploy", "v2"]).ok();
    host.zd(&["switch"]).ok();
    host.zd(&["scale", "hello", "3", "--reason", "ticket 3"]).ok();
    if by_manifest {
        // A key of the site's own, which nothing but the snapshot knows.
        host.sh("cd /opt/zd/generations/current/bin && \
             CONSUL_HTTP_TOKEN=$(cat /etc/zd/secrets/consul-management) ./consul kv put site/recipe 4711");
    }
    host
}

#[test]
#[ignore = "boots two hosts"]
fn backed_up_and_restored() {
    there_and_back("saved", None);
}

#[test]
#[ignore = "boots two hosts"]
fn full_stack_backed_up_and_restored() {
    let Some(releases) = zd_stack() else { return };
    there_and_back("full", Some(releases));
}

fn there_and_back(name: &str, releases: Option<(String, PathBuf)>) {
    let keys = keys(name);
    let nomad = releases.is_some();
    let sticks = sticks(name, releases, &keys);
    let start = Instant::now();
    let host = lived_in(name, &sticks, &keys, nomad);
    println!("installed, upgraded and lived in: {:.1} s", start.elapsed().as_secs_f32());
    let start = Instant::now();

    let load = host.load(500, 0, &["--mode", "mixed"]);
    let before = history(&host);
    host.zd(&["backup", "--json"]).ok();
    let report = host.zd(&["backup", "--reason", "ticket 4", "--json"]).ok().json();
    assert_eq!(report["images"], json!(["hello:v3"]), "{report}");
    let file = report["file"].as_str().expect("a file").to_owned();
    let kept = host.sh("ls -A /var/backups/zd");
    assert!(kept.lines().count() == 2 && file.ends_with(kept.lines().last().expect("one")), "{kept}");
    assert_eq!(host.sh(&format!("stat -c '%a %U' {file} /var/backups/zd")), "600 root\n700 root\n");
    host.clean(load);
    println!("backup: {} bytes in {} s, under load", report["bytes"], report["seconds"]);
    let password = host.sh("cat /etc/zd/registry/password");
    let found =
        host.sh(&format!("grep -rlF -- '{password}' /var/log /var/lib/zd/receipts /var/backups; true"));
    assert_eq!(found, "", "no secret in plain");
    host.sh("systemctl start zd-backup.service && systemctl is-active zd-backup.timer");
    host.is_hardened(&["zd-backup"]);
    // One that fails is seen, until there is one that does not.
    host.sh("mv /var/backups/zd /var/backups/away && ! systemctl start zd-backup.service");
    let drift = host.drift().to_string();
    assert!(drift.contains("the last timed backup failed") && drift.contains("zd logs backup"), "{drift}");
    assert!(host.zd(&["doctor"]).out.contains("the last timed backup failed"));
    host.sh("mv /var/backups/away /var/backups/zd && systemctl restart zd-backup.service");
    assert_eq!(host.drift(), json!([]));
    let whole = inventory(&host);
    assert!(!nomad || whole.lines().any(|l| l == "4711"), "{whole}");

    // Out of the host, as on a stick.
    let out = root().join("target/fab").join(format!("{name}-backups"));
    let _ = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out).expect("a folder");
    let good = out.join("good");
    host.zd(&["backup", "--to", "/out"]).fails(6, "io", &["there is no such folder"]);
    host.sh("mkdir /out");
    host.zd(&["backup", "--to", "/out"]).ok();
    let last = host.sh("ls /out/zd-node-*.tar.age").trim().to_owned();
    host.copy_out(&last, &good);
    for half in ["host.key", "host.pub"] {
        host.copy_out(&format!("/etc/zd/signing/{half}"), &keys.join(half));
    }
    let bad = bad_backups(&good, &keys);
    host.copy_in(&out, "/backups");

    // Nothing is believed that is not whole, and nothing is changed by it.
    let (picture, records) = (inventory(&host), history(&host).len());
    for (name, exit, code, says) in &bad {
        restore(&host, "zd", &format!("/backups/{name}"), &[]).fails(*exit, code, &[says]);
    }
    let other = ["restore", "/backups/good", "--identity", "/keys/other.key"];
    host.zd(&other).fails(4, "signature", &["was not encrypted to this key"]);
    let no_key = ["restore", "/backups/good", "--identity", "/keys/site.pub"];
    host.zd(&no_key).fails(2, "usage", &["no secret key", "zd keygen --backup"]);
    assert_eq!(inventory(&host), picture);
    let refused = history(&host).split_off(records);
    assert_eq!(refused.len(), bad.len() + 2, "{refused:?}");
    assert!(refused.iter().all(|record| record["outcome"] == "refused"), "{refused:?}");
    let containers = host.containers();
    let same = restore(&host, "zd", "/backups/good", &["--json"]).ok().json();
    assert_eq!((&same["changed"], host.containers()), (&json!(0), containers), "{same}");
    println!("refused and found the same: {:.1} s", start.elapsed().as_secs_f32());

    same_host(&host, &whole);
    another_version_and_no_stack(&host, &whole, nomad);
    let ip = host.ip.clone();
    host.settles();
    drop(host);
    let start = Instant::now();
    bare_host(name, &ip, &sticks, &keys, &out, (&whole, &before));
    println!("bare host, all of it: {:.1} s", start.elapsed().as_secs_f32());
}

/// State lost, pointer moved, secrets gone, other versions in the slots: put right while it serves.
fn same_host(host: &Host, whole: &str) {
    host.zd(&["deploy", "v1"]).ok();
    host.sh(
        "cd /var/lib/zd/services/hello && ln -s green active.new && mv -T active.new active && rm state.json && \
         rm /etc/zd/registry/password /etc/zd/tls/ca.key && rm /var/lib/zd/reports/*",
    );
    let damaged = host.sh("readlink /var/lib/zd/services/hello/active; ls -R /etc/zd /var/lib/zd/reports");
    let containers = host.containers();
    let load = host.load(500, 1, &["--mode", "mixed", "--method", "mixed"]);
    std::thread::sleep(Duration::from_secs(1));
    // Killed on its way: back to what was, and then all of it.
    let died = host.run_env(
        &[("ZD_FAILPOINT", "journal:6")],
        &["zd", "-q", "restore", "/backups/good", "--identity", "/keys/site.key", "--yes"],
    );
    assert_ne!(died.code, 0, "{died:?}");
    host.zd(&["undo", "--yes"]).ok();
    assert_eq!(
        host.sh("readlink /var/lib/zd/services/hello/active; ls -R /etc/zd /var/lib/zd/reports"),
        damaged
    );
    assert_eq!(host.containers(), containers);
    let start = Instant::now();
    let report = restore(host, "zd", "/backups/good", &["--json", "--reason", "ticket 5"]).ok().json();
    println!("restored on the same host in {:.1} s", start.elapsed().as_secs_f32());
    host.clean(load);
    assert_eq!((&report["bare"], host.active().as_str()), (&json!(false), "blue"));
    has(whole, &inventory(host));
    host.settles();
    assert_eq!(restore(host, "zd", "/backups/good", &["--json"]).ok().json()["changed"], 0);
    // The secrets are those that everything was set up with.
    host.zd(&["deploy", "v1"]).ok();
    host.zd(&["deploy", "v2"]).ok();
    assert!(history(host).iter().any(|r| r["verb"] == "restore" && r["reason"] == "ticket 5"));
}

/// Both slots hold what the backup does not, so that all traffic goes to the standby and back; on the nomad engine
/// Consul and Nomad have lost all that they knew, and what serves is not Nomad's any more.
fn another_version_and_no_stack(host: &Host, whole: &str, nomad: bool) {
    for _ in ["green", "blue"] {
        host.zd(&["deploy", "v1"]).ok();
        host.zd(&["switch"]).ok();
    }
    let load = host.load(300, 1, &["--mode", "mixed", "--method", "mixed"]);
    if nomad {
        host.sh("systemctl stop nomad consul; umount /var/lib/zd/nomad/alloc/*/*/secrets; \
             rm -r /var/lib/zd/nomad/* /var/lib/zd/consul/*; systemctl start consul nomad");
        for product in ["consul", "nomad"] {
            host.comes(&format!("zd status | grep 'raft.db of {product} was begun anew'"));
        }
    }
    let start = Instant::now();
    restore(host, "zd", "/backups/good", &["--json"]).ok();
    println!("by way of the standby: {:.1} s", start.elapsed().as_secs_f32());
    let seen = host.clean(load);
    assert!(seen["versions"]["v1"].is_number() && seen["versions"]["v2"].is_number(), "{}", seen["versions"]);
    has(whole, &inventory(host));
    host.settles();
    assert_eq!(restore(host, "zd", "/backups/good", &["--json"]).ok().json()["changed"], 0);
    host.zd(&["deploy", "v1"]).ok();
    host.zd(&["deploy", "v3"]).ok();
}

/// Another machine gets the address, the stick and the backup.
fn bare_host(
    name: &str,
    ip: &str,
    [first, next]: &[PathBuf; 2],
    keys: &Path,
    backups: &Path,
    (whole, records): (&str, &[Value]),
) {
    let host = Host::bare(&format!("{name}-bare"), next);
    let start = Instant::now();
    host.copy_in(first, "/stick1");
    host.copy_in(keys, "/keys");
    host.copy_in(backups, "/backups");
    let good = "/backups/good";
    restore(&host, "/stick/zd", good, &[]).fails(2, "usage", &["--host-key"]);
    let restore = |host: &Host, zd: &str, file: &str, more: &[&str]| {
        restore(host, zd, file, &[more, &["--host-key", "/keys/host.pub"]].concat())
    };
    restore(&host, "/stick/zd", good, &[]).fails(5, "preflight", &[ip, "ip address add"]);
    host.sh(&format!("ip address add {ip}/16 dev eth0"));
    let before = host.picture();
    restore(&host, "/stick1/zd", good, &[]).fails(4, "bundle", &[&format!("{name}-2"), &format!("{name}-1")]);
    let preview = restore(&host, "/stick/zd", good, &["--dry-run", "--json"]).ok().json();
    assert!(preview["steps"].as_array().expect("steps").len() > 30);
    host.sh("test ! -e /etc/zd && test ! -e /var/lib/zd && test ! -e /var/log/zd");

    let killed = ["/stick/zd", "-q", "restore", good, "--identity", "/keys/site.key", "--yes"];
    let killed = [&killed[..], &["--host-key", "/keys/host.pub"]].concat();
    let died = host.run_env(&[("ZD_FAILPOINT", "journal:120")], &killed);
    assert_ne!(died.code, 0, "{died:?}");
    host.run(&["/stick/zd", "undo", "--yes"]).ok();
    assert_eq!(differences(&before, &host.picture()), "", "a broken restore is taken back");
    println!("broken and taken back: {:.1} s since the host was booted", start.elapsed().as_secs_f32());

    let died = host.run_env(&[("ZD_FAILPOINT", "journal:90")], &killed);
    assert_ne!(died.code, 0, "{died:?}");
    let report = restore(&host, "/stick/zd", good, &["--json", "--reason", "disk failed"]).ok().json();
    println!(
        "killed and gone on with: {:.1} s, the rest of it in {} s",
        start.elapsed().as_secs_f32(),
        report["seconds"]
    );
    assert_eq!(report["bare"], true);
    has(whole, &inventory(&host));
    assert_eq!(history(&host)[..records.len()], *records, "the log goes on");
    host.settles();
    let load = host.load(300, 1, &["--mode", "mixed"]);
    std::thread::sleep(Duration::from_secs(1));
    host.zd(&["rollback"]).ok();
    let seen = host.clean(load);
    assert!(seen["versions"]["v2"].is_number() && seen["versions"]["v3"].is_number(), "{}", seen["versions"]);
    host.zd(&["deploy", "v1"]).ok();
    assert_eq!(host.run(&["/stick/zd", "install", "--json"]).ok().json()["changed"], 0);
    assert_eq!(host.sh("systemctl is-active zd-backup.timer"), "active\n");
    println!("the same as before, serving: {:.1} s", start.elapsed().as_secs_f32());

    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    assert_eq!(differences(&before, &host.picture()), "", "as the bare host was");
}
