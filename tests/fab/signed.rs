//! What a host has signed, checked on another machine by an implementation that is not zd's.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::host::{Host, root, stick};

const HEAD: &str = "/var/lib/zd/audit.head";

/// Reports and public key, as change control takes them away.
fn taken_away(host: &Host, folder: &str) -> PathBuf {
    let folder = root().join("target/fab").join(folder);
    let _ = std::fs::remove_dir_all(&folder);
    host.copy_out("/var/lib/zd/reports", &folder);
    host.copy_out("/etc/zd/signing/host.pub", &folder.join("host.pub"));
    host.copy_out(HEAD, &folder.join("audit.head"));
    folder
}

/// Debian's minisign: what it says of a file, None where the signature does not hold.
fn minisign(folder: &Path, file: &str, key: &str) -> Option<String> {
    let out = Command::new("minisign").args(["-Vm", file, "-p", key]).current_dir(folder).output();
    let out = out.expect("minisign runs");
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Names of reports, without what follows the dot.
fn reports(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder).expect("a folder").map(|f| f.expect("a file").file_name());
    let files = files.map(|name| name.to_string_lossy().into_owned());
    let mut names: Vec<String> = files.filter_map(|f| Some(f.strip_suffix(".html")?.to_owned())).collect();
    names.sort();
    names
}

/// A head and its signature, as they stand in a report or in the head's own file.
fn head_holds(folder: &Path, log: &Value, key: &str) {
    let signed = format!("{{\"seq\":{},\"hash\":{}}}", log["seq"], log["hash"]);
    std::fs::write(folder.join("head"), signed).expect("head");
    std::fs::write(folder.join("head.minisig"), log["signature"].as_str().expect("signed"))
        .expect("signature");
    let said = minisign(folder, "head", key).unwrap_or_else(|| panic!("{log}"));
    assert!(said.contains(&format!("record {} of the audit log", log["seq"])), "{said}");
}

fn signed_by(host: &Host) -> Value {
    host.zd(&["history", "--json"]).ok().json()["signed_by"].clone()
}

#[test]
#[ignore = "boots a host"]
fn checked_by_minisign_on_another_machine() {
    let host = Host::bare("signed", stick());
    let key = host.run(&["/stick/zd", "install", "--json"]).ok().json()["signing_key"].clone();
    assert_eq!(signed_by(&host), key);
    assert_eq!(
        host.sh("cd /etc/zd/signing && stat -c '%n %a %U' . *"),
        ". 711 root\nhost.key 600 root\nhost.pub 644 root\n"
    );
    host.zd(&["deploy", "v2"]).ok();
    host.zd(&["switch", "--reason", "ticket 1"]).ok();
    let secret = host.sh("tail -n 1 /etc/zd/signing/host.key");
    let secret = secret.trim();
    host.zd(&["support", "--out", "/tmp/s.tar.gz"]).ok();
    let found = host.sh(&format!(
        "grep -rlF -- '{secret}' /var/log /var/lib/zd /etc/systemd /run/log 2>/dev/null; \
         journalctl --no-pager | grep -cF -- '{secret}'; tar -xzOf /tmp/s.tar.gz | grep -cF -- '{secret}'; true"
    ));
    assert_eq!(found, "0\n0\n");

    let folder = taken_away(&host, "signed-1");
    let report = reports(&folder).pop().expect("a report");
    assert!(report.ends_with("-switch"), "{report}");
    for kind in ["html", "json"] {
        let file = format!("{report}.{kind}");
        let said = minisign(&folder, &file, "host.pub").expect("holds");
        assert!(said.contains(&format!("report {file} of node-")), "{said}");
    }
    let page = std::fs::read_to_string(folder.join(format!("{report}.html"))).expect("a page");
    assert!(page.contains(key.as_str().expect("an id")), "{page}");
    let whole = std::fs::read(folder.join(format!("{report}.json"))).expect("a report");
    let whole: Value = serde_json::from_slice(&whole).expect("json");
    assert_eq!((&whole["log"]["key"], &whole["log"]["hash"]), (&key, &whole["hash"]));
    head_holds(&folder, &whole["log"], "host.pub");
    let head = std::fs::read(folder.join("audit.head")).expect("a head");
    head_holds(&folder, &serde_json::from_slice(&head).expect("json"), "host.pub");
    let changed = page.replace("ticket 1", "ticket 2");
    assert_ne!(changed, page);
    std::fs::write(folder.join(format!("{report}.html")), changed).expect("a page");
    assert_eq!(minisign(&folder, &format!("{report}.html"), "host.pub"), None);

    missing_or_of_somebody_else(&host);
    of_an_earlier_zd(&host);
    rotated(&host);

    host.zd(&["uninstall", "--yes"]).ok();
    assert_eq!(host.sh("test ! -e /etc/zd && ls /var/lib/zd/reports/*.pub | wc -l"), "3\n");
    let again = host.run(&["/stick/zd", "install", "--json"]).ok().json()["signing_key"].clone();
    assert!(again != key && signed_by(&host) == again);
    host.settles();
}

fn head(host: &Host) -> Value {
    serde_json::from_str(&host.sh(&format!("cat {HEAD}"))).expect("a head")
}

fn put_head(host: &Host, head: &Value) {
    host.sh(&format!("printf %s '{head}' >{HEAD}"));
}

fn unsigned(host: &Host) {
    let head = head(host);
    put_head(host, &json!({ "seq": head["seq"], "hash": head["hash"] }));
}

fn missing_or_of_somebody_else(host: &Host) {
    let earlier = head(host);
    unsigned(host);
    let said = host.zd(&["history"]).fails(11, "audit", &["is missing", "zd install"]);
    assert!(said.out.contains("switch done"), "it is shown all the same: {}", said.out);
    let said = host.zd(&["doctor"]).fails(5, "preflight", &["1 of these are bad"]);
    assert!(said.out.contains("BAD  audit: the signature"), "{}", said.out);
    // The next record puts it right.
    host.zd(&["switch"]).ok();
    assert!(!signed_by(host).is_null());
    let now = head(host);
    put_head(host, &json!({ "seq": now["seq"], "hash": now["hash"], "signature": earlier["signature"] }));
    host.zd(&["history"]).fails(11, "audit", &["is of another record"]);
    put_head(host, &now);
    host.sh("mkdir /tmp/keys; mv /var/lib/zd/reports/*.pub /etc/zd/signing/host.pub /tmp/keys");
    host.zd(&["history"]).fails(11, "audit", &["which this host never had", "change control"]);
    host.sh(
        "mv /tmp/keys/host.pub /etc/zd/signing/; mv /tmp/keys/*.pub /var/lib/zd/reports/; rmdir /tmp/keys",
    );
    host.zd(&["doctor"]).ok();
}

/// It has no key and signs nothing, and that is no fault; the next install makes one.
fn of_an_earlier_zd(host: &Host) {
    host.sh("rm -r /etc/zd/signing");
    unsigned(host);
    assert_eq!(signed_by(host), Value::Null);
    host.zd(&["switch"]).ok();
    let last = host.sh("cd /var/lib/zd/reports; ls -t | head -n 2; ls -t *.json | head -n 1 | xargs cat");
    assert!(last.contains("\"key\": null") && !last.contains(".minisig"), "{last}");
    host.zd(&["doctor"]).ok();
    let install = host.run(&["/stick/zd", "install", "--json"]).ok().json();
    assert_eq!((&install["changed"], &install["signing_key"]), (&json!(2), &signed_by(host)), "{install}");
    host.zd(&["switch"]).ok();
}

fn rotated(host: &Host) {
    let before = signed_by(host);
    let known = taken_away(host, "signed-2");
    host.zd(&["secrets", "rotate", "--yes"]).ok();
    let now = signed_by(host);
    assert_ne!(now, before);
    host.zd(&["switch"]).ok();
    let folder = taken_away(host, "signed-3");
    let [before, now] = [before, now].map(|id| format!("{}.pub", id.as_str().expect("an id")));
    // The report before with the key before, the new one with the new key, which the one before has signed.
    let earlier = reports(&known).pop().expect("a report");
    let latest = reports(&folder).pop().expect("a report");
    assert!(minisign(&folder, &format!("{earlier}.html"), &before).is_some());
    assert!(minisign(&folder, &format!("{latest}.html"), &before).is_none());
    assert!(minisign(&folder, &format!("{latest}.html"), "host.pub").is_some());
    assert!(minisign(&folder, &now, &before).expect("holds").contains("follows key"));
}
