//! The full stack: the real Nomad, Consul and consul-template on a booted host.

use std::time::{Duration, Instant};

use crate::host::{Host, SERVICE, differences, pack_nomad, stack, zd_stack};
use crate::ports::seen_from_another_host;
use crate::traffic::scales;

#[test]
#[ignore = "boots a host"]
fn full_stack() {
    let Some(stick) = stack() else { return };
    let host = Host::bare("stack", stick);
    let before = host.picture();

    let start = Instant::now();
    let first = host.run(&["/stick/zd", "install", "--ip", "auto"]).ok();
    println!("nomad engine: installed in {:.1} s", start.elapsed().as_secs_f32());
    assert!(first.out.contains("serving"), "{}", first.out);
    host.settles();

    again_changes_nothing(&host);
    secured(&host);
    deploys(&host);
    bad_versions(&host);
    drift_is_shown(&host);
    pools_are_checked(&host);
    logs_and_support(&host);
    scales(&host);
    secrets_are_rotated(&host);
    without_consul_and_nomad(&host);
    killed(&host);
    reboot(&host);

    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    assert_eq!(differences(&before, &host.picture()), "", "as it was before");
}

fn again_changes_nothing(host: &Host) {
    let containers = host.containers();
    assert_eq!(containers.lines().count(), 4);
    let start = Instant::now();
    let again = host.run(&["/stick/zd", "install", "--ip", "auto", "--json"]).ok().json();
    assert!(start.elapsed().as_secs_f64() < 5.0, "took {:?}", start.elapsed());
    assert_eq!(again["changed"], 0, "{again}");
    assert_eq!(host.containers(), containers);
}

fn secured(host: &Host) {
    host.is_hardened(&[
        "consul",
        "nomad",
        "consul-template",
        "zd-registry",
        "zd-nginx@hello",
        "zd-publish",
        "zd-pools@hello",
    ]);
    for (unit, user) in [("consul", "zd-consul"), ("consul-template", "zd-consul-template")] {
        assert_eq!(
            host.sh(&format!("ps -o user:32= -p $(systemctl show -p MainPID --value {unit})")).trim(),
            user
        );
    }
    // Without a token nothing is told; without a certificate Nomad does not even listen.
    let status = |url: &str| {
        host.sh(&format!("zd loadtest {url} --rate 1 --duration 1s --json | tr -d ' \\n' || true"))
    };
    assert!(status("http://127.0.0.1:8500/v1/agent/self").contains("status-403"));
    // Beyond loopback only the registry, Consul's HTTPS and the service's two entries listen.
    let ports =
        host.sh("ss -Hltn | awk '{print $4}' | grep -v '^127\\.' | sed 's/.*://' | sort -un | tr '\\n' ' '");
    assert_eq!(ports.trim(), "80 5443 8081 8501", "{}", host.sh("ss -ltnp"));
    for token in ["consul-management", "consul-zd", "nomad-management"] {
        let path = format!("/etc/zd/secrets/{token}");
        assert_eq!(host.sh(&format!("stat -c '%a %U' {path}")), "600 root\n");
        let secret = host.sh(&format!("cat {path}"));
        let found = host.sh(&format!(
            "grep -rlF -- '{secret}' /var/log /var/lib/zd/receipts /etc/systemd /run/log 2>/dev/null; \
             journalctl --no-pager | grep -cF -- '{secret}' || true"
        ));
        assert_eq!(found.trim(), "0", "{token}");
    }
}

/// Why Nomad does not run a job: what it has no room for, and what keeps ending.
#[test]
#[ignore = "boots a host"]
fn nomad_says_why_a_job_does_not_run() {
    let Some(stick) = stack() else { return };
    let host = Host::bare("why", stick);
    // More than there can be is refused before anything is changed.
    let large = SERVICE.replace("instances", "memory-mb = 400000\ninstances");
    let Some(large) = pack_nomad("large", &large) else { return };
    host.copy_in(&large, "/large");
    let parts = ["memory: ", "for 4 containers", "Nomad cannot place them all", "memory-mb"];
    host.run(&["/large/zd", "install"]).fails(5, "preflight", &parts);
    host.sh("rm -r /large; test ! -e /etc/zd");
    host.run(&["/stick/zd", "-q", "install"]).ok();
    let nomad = "NOMAD_ADDR=https://127.0.0.1:4646 NOMAD_CACERT=/etc/zd/tls/ca.crt \
                 NOMAD_CLIENT_CERT=/etc/zd/tls/nomad.crt NOMAD_CLIENT_KEY=/etc/zd/tls/nomad.key \
                 NOMAD_TOKEN=$(cat /etc/zd/secrets/nomad-management) /opt/zd/generations/1/bin/nomad";
    let job = |name: &str, version: &str, memory: u64, config: &str| {
        let text = format!(
            "job \"{name}\" {{\ndatacenters = [\"zd\"]\ngroup \"1\" {{\nrestart {{\nattempts = 10\ninterval = \"30s\"\n\
             delay = \"1s\"\nmode = \"delay\"\n}}\ntask \"hello\" {{\ndriver = \"docker\"\nconfig {{\n\
             image = \"{}:5443/hello:{version}\"\n{config}\n}}\nresources {{\nmemory = {memory}\n}}\n}}\n}}\n}}\n",
            host.ip
        );
        host.sh(&format!("cat >/tmp/job.hcl <<'EOF'\n{text}EOF\n{nomad} job run -detach /tmp/job.hcl"));
    };

    // A second operator's job takes nearly all the memory.
    let total: u64 = host.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").trim().parse().unwrap();
    job("site", "v1", total - 4 * 256 - 300, "");
    host.comes(&format!("{nomad} job status site | grep -q 'Status *= running'"));
    let said =
        host.zd(&["scale", "hello", "4", "--yes"]).fails(8, "unhealthy", &["memory exhausted on 1 node"]);
    assert!(said.err.contains("Nomad cannot place group") && said.err.contains("memory-mb"), "{}", said.err);
    host.settles();

    // No node at all: a deploy says so, and so do status and doctor until there is one again.
    host.sh(&format!("{nomad} node eligibility -disable -self"));
    host.zd(&["deploy", "v2"]).fails(
        8,
        "unhealthy",
        &["no node is ready and eligible", "eligibility -enable"],
    );
    for verb in ["status", "doctor"] {
        host.comes(&format!(
            "zd {verb} | grep 'Nomad cannot place group 1 of hello-green: no node is ready'"
        ));
    }
    host.sh(&format!("{nomad} node eligibility -enable -self"));
    host.settles();

    // A container that keeps ending: its events and its last lines.
    host.sh(&format!("{nomad} job stop -purge -detach hello-green; sleep 3"));
    job("hello-green", "dies", 64, "network_mode = \"zd\"\nipv4_address = \"172.31.1.21\"");
    let start = Instant::now();
    let said = loop {
        let said = host.zd(&["doctor"]).out;
        if said.contains("its last lines: ") && said.contains("Exit Code: ") {
            break said;
        }
        assert!(start.elapsed().as_secs() < 40, "{said}");
        std::thread::sleep(Duration::from_millis(500));
    };
    assert!(said.contains("hello-green.1[0]: ") && said.contains("do: zd logs green"), "{said}");
    host.zd(&["deploy", "v2"]).ok();
    host.settles();

    let other = seen_from_another_host(&host, "why-other", &["80", "5443", "8081", "8501"]);
    let said = host.zd(&["doctor"]).ok().out;
    let listens = "zd listens on 80 (hello), 5443 (registry), 8081 (standby of hello), 8501 (Consul)";
    assert!(said.contains(listens), "{said}");
    consul_tells_others(&host, &other);
}

/// As INSTALL.md tells the site: by TLS, with a token that reads; and nothing can be changed that way.
fn consul_tells_others(host: &Host, other: &Host) {
    let here =
        "CONSUL_HTTP_TOKEN=$(cat /etc/zd/secrets/consul-management) /opt/zd/generations/current/bin/consul";
    let rules = r#"service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }"#;
    host.sh(&format!("{here} acl policy create -name site -rules '{rules}'"));
    let token = host.sh(&format!(
        "{here} acl token create -description site -policy-name site -format json | sed -n 's/.*\"SecretID\": \"\\(.*\\)\".*/\\1/p'"
    ));
    let management = host.sh("cat /etc/zd/secrets/consul-management");
    let (_, programs) = zd_stack().expect("it is installed");
    other.copy_in(&programs.join("consul"), "/consul");
    let take_ca = || other.sh(&format!("cat >/ca.crt <<'EOF'\n{}EOF", host.sh("cat /etc/zd/tls/ca.crt")));
    take_ca();
    let ask = |scheme: &str, token: &str, argv: &[&str]| {
        let address = format!("{scheme}://{}:8501", host.ip);
        let env = [
            ("CONSUL_HTTP_ADDR", address.as_str()),
            ("CONSUL_HTTP_TOKEN", token.trim()),
            ("CONSUL_CACERT", "/ca.crt"),
        ];
        other.run_env(&env, &[&["/consul"], argv].concat())
    };
    let told = ask("https", &token, &["catalog", "services", "-tags"]).ok().out;
    assert!(told.contains("hello") && told.contains("green"), "{told}");
    assert_eq!(ask("https", "", &["catalog", "services"]).out.trim(), "", "without a token");
    assert_ne!(ask("http", &token, &["catalog", "services"]).code, 0, "without TLS");
    other.sh(": >/ca.crt");
    assert_ne!(ask("https", &token, &["catalog", "services"]).code, 0, "of a CA that it does not know");
    take_ca();
    let change = ask("https", &management, &["kv", "put", "zd/services/hello/pointer", "x"]);
    assert!(change.code != 0 && change.err.contains("403"), "{change:?}");
    assert_eq!(host.drift(), serde_json::json!([]));
    // Secrets made anew: another certificate of another CA, and the site's token goes on.
    host.zd(&["secrets", "rotate", "--yes"]).ok();
    assert_ne!(ask("https", &token, &["catalog", "services"]).code, 0, "the CA before");
    take_ca();
    assert!(ask("https", &token, &["catalog", "services"]).ok().out.contains("hello"));
}

fn deploys(host: &Host) {
    let blue = |all: &str| {
        let slots = host.sh("docker ps -q -f label=zd.slot=blue --no-trunc");
        all.lines().filter(|l| slots.lines().any(|id| l.contains(id))).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = blue(&host.containers());
    assert_eq!(before.len(), 2);
    let load = host.load(1000, 0, &["--mode", "mixed", "--method", "mixed"]);
    let report = host.zd(&["deploy", "v2", "--reason", "ticket 1", "--json"]).ok().json();
    assert_eq!((&report["slot"], &report["changed"]), (&"green".into(), &true.into()));
    assert_eq!(blue(&host.containers()), before, "same ids, same start times");
    host.clean(load);
    let load = host.load(1000, 3, &["--mode", "mixed", "--method", "mixed"]);
    std::thread::sleep(Duration::from_secs(2));
    host.zd(&["switch", "--reason", "ticket 2"]).ok();
    std::thread::sleep(Duration::from_secs(2));
    host.zd(&["switch"]).ok();
    std::thread::sleep(Duration::from_secs(2));
    let back = host.zd(&["rollback", "--json"]).ok().json();
    assert_eq!(back["to"]["version"], "v2");
    host.clean(load);
    host.settles();
    let token = "$(cat /etc/zd/secrets/consul-zd)";
    let key =
        |k: &str| host.sh(&format!("CONSUL_HTTP_TOKEN={token} /opt/zd/generations/1/bin/consul kv get {k}"));
    assert!(key("zd/services/hello/pointer").contains("\"active\":\"green\""));
    assert!(key("-recurse zd/audit/hello/").contains("ticket 2"));
    host.zd(&["switch", "--to", "blue"]).ok();
}

/// Images that never become healthy, one after the other, under load: the active slot does not notice.
fn bad_versions(host: &Host) {
    let active = host.sh("docker ps -q -f label=zd.slot=blue --no-trunc | sort");
    let load = host.load(500, 0, &["--mode", "mixed"]);
    host.zd(&["deploy", "sick"]).fails(8, "unhealthy", &["green", "status 503"]);
    host.zd(&["deploy", "dies"]).fails(8, "unhealthy", &["green"]);
    host.clean(load);
    assert_eq!(host.sh("docker ps -q -f label=zd.slot=blue --no-trunc | sort"), active);
    host.settles();
    assert_eq!(host.zd(&["status", "--json"]).ok().json()["services"][0]["slots"][1]["version"], "v2");
}

fn drift_is_shown(host: &Host) {
    let token = "$(cat /etc/zd/secrets/consul-zd)";
    let consul = format!("CONSUL_HTTP_TOKEN={token} /opt/zd/generations/1/bin/consul");
    host.sh(&format!("{consul} kv put zd/services/hello/pointer '{{\"active\":\"green\"}}'"));
    assert!(host.drift().to_string().contains("says green, this host serves blue"), "{}", host.drift());
    host.zd(&["switch", "--to", "blue"]).ok();
    host.settles();

    let nomad = "NOMAD_ADDR=https://127.0.0.1:4646 NOMAD_CACERT=/etc/zd/tls/ca.crt \
                 NOMAD_CLIENT_CERT=/etc/zd/tls/nomad.crt NOMAD_CLIENT_KEY=/etc/zd/tls/nomad.key \
                 NOMAD_TOKEN=$(cat /etc/zd/secrets/nomad-management) /opt/zd/generations/1/bin/nomad";
    host.sh(&format!("{nomad} job stop -detach hello-green >/dev/null"));
    assert!(host.drift().to_string().contains("Nomad job hello-green"), "{}", host.drift());
    host.zd(&["deploy", "v2"]).ok();
    host.settles();
}

/// Somebody edits the pools in Consul: nginx loads what is good, and keeps what it has where it is not.
fn pools_are_checked(host: &Host) {
    let consul = "CONSUL_HTTP_TOKEN=$(cat /etc/zd/secrets/consul-zd) /opt/zd/generations/1/bin/consul";
    let put = |edit: &str| {
        host.sh(&format!(
            "{consul} kv get zd/services/hello/pools | sed '{edit}' >/tmp/pools; \
             {consul} kv put zd/services/hello/pools @/tmp/pools; rm /tmp/pools"
        ));
    };
    let reloaded = |outcome: &str| {
        let start = Instant::now();
        while !host.zd(&["history"]).ok().out.contains(outcome) {
            assert!(start.elapsed().as_secs() < 30, "no {outcome}");
            std::thread::sleep(Duration::from_millis(500));
        }
    };
    put("s/\"weight\":1/\"weight\":2/g");
    reloaded("reload done");
    assert!(host.sh("cat /etc/zd/nginx/hello.pools").contains("weight=2"));
    assert!(host.drift().to_string().contains("zd/services/hello/pools"), "{}", host.drift());
    put("s/172[.]/no such host /g");
    reloaded("reload failed");
    host.sh("systemctl restart zd-nginx@hello");
    host.serves();
    host.run(&["/stick/zd", "-q", "install"]).ok();
    host.settles();
}

fn logs_and_support(host: &Host) {
    for part in ["nomad", "consul", "consul-template", "registry", "docker", "access", "audit"] {
        assert!(!host.zd(&["logs", part, "-n", "5"]).ok().out.is_empty(), "{part}");
    }
    assert!(host.zd(&["logs", "green"]).ok().out.contains("listens on"));
    host.zd(&["logs", "grean"]).fails(2, "usage", &["blue, green", "consul-template"]);
    let report = host.zd(&["support", "--out", "/tmp/s.tar.gz", "--json"]).ok().json();
    assert!(report["bytes"].as_u64().unwrap() < 50 << 20, "{report}");
    host.sh("mkdir /tmp/s && tar xzf /tmp/s.tar.gz -C /tmp/s");
    assert!(host.sh("cat /tmp/s/zd-support/status.json").contains("\"active\""));
    assert!(!host.sh("cat /tmp/s/zd-support/commands/journal-nomad.txt").is_empty());
    let secrets = "/etc/zd/secrets/consul-* /etc/zd/secrets/nomad-* /etc/zd/registry/password";
    let leaks = host.sh(&format!("for f in {secrets}; do grep -rlF -- \"$(cat $f)\" /tmp/s || true; done"));
    assert_eq!(leaks, "", "no secret is in it");
    assert_eq!(host.sh("grep -rl 'PRIVATE KEY' /tmp/s || true"), "");
    host.sh("rm -r /tmp/s /tmp/s.tar.gz");
}

/// Everything secret is new, nothing old is worth anything, and no request notices.
fn secrets_are_rotated(host: &Host) {
    let read = || {
        host.sh(
            "cd /etc/zd && for f in secrets/* tls/* registry/[!cp]* registry/password consul.d/private.json nomad.d/private.json \
             consul-template.d/private.json; do echo \"$f $(sha256sum <$f)\"; done",
        )
    };
    let status = |token: &str| {
        let curl = format!("printf 'GET /v1/agent/self HTTP/1.0\r\nX-Consul-Token: {token}\r\n\r\n'");
        host.sh(&format!(
            "{curl} | timeout 5 bash -c 'exec 3<>/dev/tcp/127.0.0.1/8500; cat >&3; head -1 <&3'"
        ))
    };
    let (before, containers) = (read(), host.containers());
    let tokens: Vec<String> = ["consul-zd", "consul-agent", "consul-management", "nomad-management"]
        .map(|name| host.sh(&format!("cat /etc/zd/secrets/{name}")))
        .into();
    assert!(status(&tokens[0]).contains("200"), "{}", status(&tokens[0]));
    let load = host.load(1000, 0, &["--mode", "mixed", "--method", "mixed"]);
    let start = Instant::now();
    host.zd(&["secrets", "rotate", "--reason", "quarterly", "--yes"]).ok();
    println!("nomad engine: secrets rotated in {:.1} s", start.elapsed().as_secs_f32());
    host.clean(load);
    let after = read();
    let same: Vec<&str> = after.lines().filter(|l| before.contains(*l)).collect();
    assert!(same.is_empty(), "not rotated: {same:?}");
    for old in &tokens[..3] {
        assert!(status(old).contains("403"), "an old token still works: {}", status(old));
    }
    let nomad = "NOMAD_ADDR=https://127.0.0.1:4646 NOMAD_CACERT=/etc/zd/tls/ca.crt \
                 NOMAD_CLIENT_CERT=/etc/zd/tls/nomad.crt NOMAD_CLIENT_KEY=/etc/zd/tls/nomad.key";
    let bin = "/opt/zd/generations/1/bin";
    let old = &tokens[3];
    assert!(host.sh(&format!("{nomad} NOMAD_TOKEN={old} {bin}/nomad status 2>&1 || true")).contains("403"));
    host.settles();
    assert_eq!(host.containers(), containers, "nothing was restarted");
    host.zd(&["deploy", "v3"]).ok();
    host.zd(&["deploy", "v2"]).ok();
    // Broken off when the CA was new and Nomad's certificate not yet: it is run again.
    let died = host.run_env(&[("ZD_FAILPOINT", "rotate:ca")], &["zd", "secrets", "rotate", "--yes"]);
    assert_ne!(died.code, 0, "{died:?}");
    host.zd(&["secrets", "rotate", "--yes"]).ok();
    host.settles();
    assert!(host.zd(&["doctor", "--json"]).ok().out.contains("is valid until"));
}

/// Traffic and switches need neither.
fn without_consul_and_nomad(host: &Host) {
    let containers = host.containers();
    host.sh("systemctl stop nomad consul");
    let load = host.load(500, 1, &["--mode", "mixed"]);
    std::thread::sleep(Duration::from_secs(2));
    let switched = host.zd(&["switch", "--to", "green"]).ok();
    assert!(switched.err.contains("it is told when it is back"), "{}", switched.err);
    assert!(host.drift().to_string().contains("Consul does not answer"), "{}", host.drift());
    host.clean(load);
    host.sh("systemctl start consul nomad");
    host.settles();
    assert_eq!(host.containers(), containers, "nothing was restarted");
    host.zd(&["switch", "--to", "blue"]).ok();
}

fn killed(host: &Host) {
    let containers = host.containers();
    let load = host.load(500, 0, &["--mode", "mixed"]);
    host.sh(
        "systemctl kill -s KILL nomad consul consul-template; sleep 2; systemctl stop docker.socket docker",
    );
    std::thread::sleep(Duration::from_secs(3));
    host.sh("systemctl start docker.socket docker");
    host.clean(load);
    host.settles();
    assert_eq!(host.containers(), containers, "nothing was restarted");
}

fn reboot(host: &Host) {
    let start = Instant::now();
    host.restart();
    let url = format!("http://{}/hello", host.ip);
    while host.run(&["zd", "loadtest", &url, "--rate", "20", "--duration", "1s"]).code != 0 {
        assert!(start.elapsed().as_secs() < 120, "does not serve after a reboot");
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("nomad engine: serving {:.1} s after a boot", start.elapsed().as_secs_f32());
    host.settles();
}
