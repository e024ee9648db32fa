//! Who did it is what the kernel says; what was refused is written down; operators without root stay within their role.

use serde_json::{Value, json};

use crate::host::{Host, Pack, SERVICE, Said};

#[test]
#[ignore = "boots a host"]
fn nobody_acts_as_somebody_else_unseen_or_beyond_his_role() {
    let stick =
        Pack { folder: "attacks-audit", service: SERVICE, extra: &["sudo"], ..Pack::default() }.make();
    let host = Host::installed_from("attacks-audit", &stick);
    host.zd(&["deploy", "v2"]).ok();
    host.sh("useradd -m kim; useradd -m lee");

    the_environment_does_not_outrank_the_kernel(&host);
    no_refusal_goes_unrecorded(&host);
    no_user_without_rights_fills_the_log(&host);
    the_journal_has_the_fields(&host);
    an_operator_stays_within_the_role(&host);
    a_viewer_cannot_switch(&host);
    a_role_that_was_taken_is_gone_in_open_sessions(&host);
    host.zd(&["history"]).ok();

    host.zd(&["-q", "uninstall", "--yes"]).ok();
    let left = "getent group zd-viewer zd-operator zd-admin; ls /etc/sudoers.d 2>/dev/null | grep zd-; true";
    assert_eq!(host.sh(left), "");
}

fn last(host: &Host) -> Value {
    host.zd(&["history", "--last", "1", "--json"]).ok().json()["records"][0].clone()
}

fn records(host: &Host) -> u64 {
    host.zd(&["history", "--last", "1", "--json"]).ok().json()["total"].as_u64().expect("a number")
}

fn is(record: &Value, verb: &str, outcome: &str, detail: &str) {
    assert_eq!((&record["verb"], &record["outcome"]), (&json!(verb), &json!(outcome)), "{record}");
    assert!(record["detail"].as_str().is_some_and(|d| d.contains(detail)), "{record}");
}

fn the_environment_does_not_outrank_the_kernel(host: &Host) {
    host.run_env(
        &[("SUDO_USER", "mallory"), ("SSH_CONNECTION", "10.0.0.9 5 10.0.0.1 22")],
        &["zd", "switch"],
    )
    .ok();
    let record = last(host);
    is(&record, "switch", "done", "");
    assert_eq!(record["by"], "root", "{record}");
    let who = &record["who"];
    assert_eq!((&who["uid"], &who["sudo_user"]), (&json!(0), &json!("mallory")), "{record}");
    assert_eq!(who["ssh_connection"], "10.0.0.9 5 10.0.0.1 22", "{record}");
    assert!(host.zd(&["history"]).ok().out.contains("root (SUDO_USER mallory)"));
    let status = host.zd(&["status", "--json"]).ok().json();
    assert_eq!(status["services"][0]["active_by"], "root");
}

fn no_refusal_goes_unrecorded(host: &Host) {
    host.sh("cp -r /stick /tmp/bad; printf XXXX | dd of=$(ls /tmp/bad/*.zd.tar) bs=1 seek=2000 conv=notrunc status=none");
    assert_eq!(host.zd(&["verify", "/tmp/bad"]).code, 4);
    is(&last(host), "verify", "refused", "");
    assert_eq!(host.zd(&["upgrade", "/tmp/bad", "--yes"]).code, 4);
    is(&last(host), "upgrade", "refused", "");
    host.zd(&["verify", "/stick", "--key", "/stick/zd.pub"]).ok();
    is(&last(host), "verify", "key-given", "--key /stick/zd.pub");
    host.zd(&["deploy", "v99"]).fails(10, "unknown-version", &[]);
    assert!(["refused", "failed"].map(Value::from).contains(&last(host)["outcome"]), "{}", last(host));

    let holder = r#"{"pid":1,"by":"x","verb":"switch","since":"2026-01-01T00:00:00Z"}"#;
    host.sh(&format!("echo '{holder}' >/run/zd/lock"));
    let held = host.spawn(&["flock", "/run/zd/lock", "sleep", "5"]);
    host.comes("! flock -n /run/zd/lock true");
    host.zd(&["switch"]).fails(9, "locked", &["process 1"]);
    is(&last(host), "switch", "refused", "locked: ");
    held.wait().ok();
}

fn no_user_without_rights_fills_the_log(host: &Host) {
    let before = records(host);
    for verb in [&["switch"][..], &["uninstall", "--yes"], &["verify", "/tmp/bad"]] {
        assert_ne!(user(host, "kim", &[&["zd"], verb].concat()).code, 0, "{verb:?}");
    }
    assert_eq!(records(host), before);
    assert_ne!(user(host, "kim", &["flock", "-sn", "/var/log/zd/audit.lock", "true"]).code, 0);
}

fn the_journal_has_the_fields(host: &Host) {
    let one = "journalctl -q --no-pager -o json SYSLOG_FACILITY=10 SYSLOG_IDENTIFIER=zd";
    host.comes(&format!("{one} ZD_VERB=verify ZD_OUTCOME=refused | grep -q ZD_DETAIL"));
    let line = host.sh(&format!("{one} ZD_VERB=switch ZD_OUTCOME=done ZD_SUDO_USER=mallory | tail -n 1"));
    let entry: Value = serde_json::from_str(&line).expect("json");
    let log = host.sh("grep mallory /var/log/zd/audit.jsonl | grep '\"outcome\":\"done\"' | tail -n 1");
    let record: Value = serde_json::from_str(&log).expect("json");
    assert_eq!(entry["ZD_SEQ"], record["seq"].to_string(), "{entry}");
    assert_eq!((&entry["ZD_BY"], &entry["ZD_UID"]), (&json!("root"), &json!("0")), "{entry}");
    assert_eq!(entry["ZD_SERVICE"], "hello", "{entry}");
}

fn user(host: &Host, name: &str, argv: &[&str]) -> Said {
    let id = ["setpriv", "--reuid", name, "--regid", name, "--init-groups"];
    host.run(&[&id, argv].concat())
}

/// As a user would type it.
fn sudo(host: &Host, name: &str, argv: &[&str]) -> Said {
    user(host, name, &[&["sudo", "-n"], argv].concat())
}

fn an_operator_stays_within_the_role(host: &Host) {
    host.zd(&["operator", "add", "nobody-here", "--role", "operator"]).fails(2, "usage", &["nobody-here"]);
    host.zd(&["operator", "add", "root", "--role", "viewer"]).fails(2, "usage", &["needs no role"]);
    host.zd(&["operator", "add", "kim", "--role", "operator", "--reason", "shift B"]).ok();
    is(&last(host), "operator", "done", "add kim, operator");
    host.sh("visudo -c -q; test $(stat -c '%a %U' /etc/sudoers.d/zd-operator | tr -d ' ') = 440root");

    let active = host.active();
    sudo(host, "kim", &["zd", "as", "operator", "switch", "--reason", "ticket --to /etc"]).ok();
    assert_ne!(host.active(), active);
    let record = last(host);
    assert_eq!((&record["by"], &record["who"]["sudo_user"]), (&json!("root"), &json!("kim")), "{record}");
    sudo(host, "kim", &["zd", "as", "operator", "rollback"]).ok();
    assert_eq!(host.active(), active);

    host.sh("touch /tmp/before");
    for words in [
        &["uninstall", "--yes"][..],
        &["backup", "--to", "/etc"],
        &["backup", "--recipient", "/etc/shadow"],
        &["support", "--out", "/etc/cron.d/x"],
        &["upgrade", "/tmp/bad", "--yes"],
        &["install", "--key", "/tmp/bad/zd.pub"],
        &["rollback", "--generation", "1"],
        &["operator", "add", "kim", "--role", "admin"],
    ] {
        let said = sudo(host, "kim", &[&["zd", "as", "operator"], words].concat());
        said.fails(2, "not-allowed", &[words[0], "operator"]);
        is(&last(host), words[0], "refused", "not-allowed: ");
    }
    // Here sudo says no.
    for words in [
        &["zd", "switch"][..],
        &["zd", "as", "admin", "uninstall", "--yes"],
        &["zd", "as operator", "x", "as", "admin", "uninstall"],
        &["/opt/zd/bin/zd", "uninstall", "--yes"],
        &["PATH=/tmp", "zd", "as", "operator", "status"],
        &["-E", "zd", "as", "operator", "status"],
        &["-D", "/tmp", "zd", "as", "operator", "status"],
        &["sh", "-c", "id"],
    ] {
        let said = sudo(host, "kim", words);
        assert_ne!(said.code, 0, "{words:?}: {said:?}");
        assert!(!said.out.contains("uid=0"), "{said:?}");
    }
    let found = host.sh("find /etc -newer /tmp/before -type f ! -name '*.lock'");
    assert_eq!(found, "", "an operator writes nothing there");
    assert_eq!(host.active(), active);
}

fn a_viewer_cannot_switch(host: &Host) {
    host.zd(&["operator", "add", "lee", "--role", "viewer"]).ok();
    sudo(host, "lee", &["zd", "as", "viewer", "status"]).ok();
    sudo(host, "lee", &["zd", "as", "viewer", "history", "--last", "1"]).ok();
    let active = host.active();
    sudo(host, "lee", &["zd", "as", "viewer", "switch"]).fails(2, "not-allowed", &["switch"]);
    assert_ne!(sudo(host, "lee", &["zd", "as", "operator", "switch"]).code, 0);
    assert_eq!(host.active(), active);
    let list = host.zd(&["operator", "list", "--json"]).ok().json();
    assert_eq!(list["operators"], json!({ "kim": "operator", "lee": "viewer" }), "{list}");
    assert_eq!(list["altered"], json!([]), "{list}");
}

fn a_role_that_was_taken_is_gone_in_open_sessions(host: &Host) {
    let gid = host.sh("getent group zd-operator | cut -d: -f3");
    host.zd(&["operator", "remove", "kim"]).ok();
    assert_ne!(sudo(host, "kim", &["zd", "as", "operator", "status"]).code, 0);
    // A session from before has the group until it ends.
    let session = ["setpriv", "--reuid", "kim", "--regid", "kim", "--groups", gid.trim()];
    let said = host.run(&[&session[..], &["sudo", "-n", "zd", "as", "operator", "switch"]].concat());
    assert_ne!(said.code, 0, "{said:?}");
    host.zd(&["operator", "remove", "kim"]).fails(2, "usage", &["no role"]);
}
