//! The private registry takes no pushes but zd's own, and those only while zd pushes.

use std::process::Command;

use crate::host::{Host, differences};

/// Status of a request from this machine to the host's registry, with the account that the engine pulls with.
fn asks(host: &Host, method: &str, path: &str) -> String {
    let password = host.sh("cat /etc/zd/registry/password");
    let out = Command::new("curl")
        .args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, "-u", &format!("zd:{password}")])
        .args(["-H", "Accept: application/vnd.oci.image.manifest.v1+json"])
        .arg(format!("https://{}:5443{path}", host.ip))
        .output()
        .expect("curl");
    String::from_utf8(out.stdout).expect("text")
}

fn only_reads(host: &Host) {
    let digest = host.sh("docker inspect -f '{{.Config.Image}}' zd-hello-blue-1 | sed 's/.*@//'");
    let manifest = format!("/v2/hello/manifests/{}", digest.trim());
    assert_eq!(asks(host, "GET", &manifest), "200");
    for (method, path) in [
        ("POST", "/v2/hello/blobs/uploads/"),
        ("POST", "/v2/other/blobs/uploads/"),
        ("PUT", "/v2/hello/manifests/v1"),
        ("DELETE", &manifest),
    ] {
        assert_eq!(asks(host, method, path), "405", "{method} {path}");
    }
    assert_eq!(asks(host, "GET", &manifest), "200");
    host.sh("docker rmi -f $(docker images -q hello) >/dev/null 2>&1; true");
    host.zd(&["deploy", "v2"]).ok();
    host.zd(&["deploy", "v1"]).ok();
    let running = "systemctl is-active zd-registry-push; ls /run/zd-registry-push 2>&1 | wc -l; \
                   pgrep -c docker-registry; true";
    assert_eq!(host.sh(running).lines().collect::<Vec<_>>(), ["inactive", "1", "1"]);
}

#[test]
#[ignore = "boots a host"]
fn registry_takes_pushes_from_zd_only() {
    let host = Host::installed("registry");
    only_reads(&host);

    // A zd that was killed left it open, and an upload broken off: nobody but root gets at it, and the next run
    // with the bundle puts both away.
    let whole = host.picture();
    let uploads = "/var/lib/zd/registry/docker/registry/v2/repositories/hello/_uploads";
    host.sh(&format!(
        "systemctl start zd-registry-push; runuser -u zd-registry -- mkdir -p {uploads}/1; \
         runuser -u zd-registry -- touch {uploads}/1/data"
    ));
    host.comes("test -d /run/zd-registry-push");
    assert_eq!(host.sh("stat -c '%a %U' /run/zd-registry-push"), "700 zd-registry\n");
    let denied = host.sh("runuser -u zd-nginx -- ls /run/zd-registry-push 2>&1 || true");
    assert!(denied.contains("Permission denied"), "{denied}");
    host.run(&["/stick/zd", "-q", "install"]).ok();
    only_reads(&host);
    assert_eq!(host.sh(&format!("ls -d {uploads} 2>/dev/null || true")), "");

    // A registry that takes pushes (so the first zd set it up) is made to read only, with the same password.
    let sums = || host.sh("sha256sum /etc/zd/registry/password /etc/zd/registry/htpasswd");
    let before = sums();
    host.sh("sed -i 's/\"enabled\": true/\"enabled\": false/' /etc/zd/registry/config.json; \
         rm /etc/zd/registry/push.json /etc/systemd/system/zd-registry-push.service; \
         sed -i '/^User=/a ReadWritePaths=/var/lib/zd/registry' /etc/systemd/system/zd-registry.service; \
         systemctl daemon-reload; systemctl restart zd-registry");
    host.comes("ss -Hltn | grep -q :5443");
    assert_eq!(asks(&host, "PUT", "/v2/zd/manifests/v1"), "400", "it is made to take pushes");
    host.run(&["/stick/zd", "-q", "install"]).ok();
    only_reads(&host);
    assert_eq!(sums(), before);
    let moving = [
        "/var/log/zd",
        "/var/lib/zd/receipts",
        "/var/lib/docker",
        "/var/lib/containerd",
        "state.json",
        "audit.head",
    ];
    let still = |picture: &str| {
        let lines = picture.lines().filter(|l| !moving.iter().any(|m| l.contains(m)));
        lines.map(|l| format!("{l}\n")).collect::<String>()
    };
    assert_eq!(differences(&still(&whole), &still(&host.picture())), "");

    // Uninstall ends one that a killed zd left.
    host.sh("systemctl start zd-registry-push");
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    assert_eq!(host.sh("pgrep -c docker-registry || true").trim(), "0");
    assert_eq!(host.sh("systemctl list-units --all --no-legend 'zd-*' | grep -v not-found || true"), "");
}
