//! What can be reached from another host of the network: the manifest's ports and the registry, nothing else.

use crate::host::Host;

/// Connects to every TCP port of the host from another one, and to its containers by way of it.
pub fn seen_from_another_host(host: &Host, name: &str, ports: &[&str]) -> Host {
    let other = Host::booted(name);
    let open = other.run(&[
        "bash",
        "-c",
        "for p in {1..65535}; do { exec 3<>/dev/tcp/$0/$p; } 2>/dev/null && { echo $p; exec 3>&-; }; done; true",
        &host.ip,
    ]);
    assert_eq!(open.ok().out.split_whitespace().collect::<Vec<_>>(), ports);
    let status = |port: u16, path: &str| {
        let ask = "exec 3<>/dev/tcp/$0/$1; printf 'GET %s HTTP/1.0\\r\\n\\r\\n' $2 >&3; head -1 <&3";
        other.run(&["timeout", "5", "bash", "-c", ask, &host.ip, &port.to_string(), path]).ok().out
    };
    assert!(status(80, "/hello").contains(" 200 "), "{}", status(80, "/hello"));
    assert!(status(8081, "/hello").contains(" 403 "), "{}", status(8081, "/hello"));
    // A neighbour that knows the containers' network.
    let container = host.sh("docker inspect -f '{{(index .NetworkSettings.Networks \"zd\").IPAddress}}' zd-hello-blue-1 2>/dev/null || \
                             docker inspect -f '{{(index .NetworkSettings.Networks \"zd\").IPAddress}}' $(docker ps -q -f label=zd.slot=blue | head -1)");
    let container = container.trim().lines().last().expect("an address").to_owned();
    assert!(host.run(&["bash", "-c", "exec 3<>/dev/tcp/$0/8080", &container]).code == 0, "{container}");
    other.sh(&format!("ip route add {container}/32 via {}", host.ip));
    let reached = other.run(&["timeout", "3", "bash", "-c", "exec 3<>/dev/tcp/$0/8080", &container]);
    assert_ne!(reached.code, 0, "{container} is reached");
    other
}

#[test]
#[ignore = "boots two hosts"]
fn only_the_manifests_ports_answer_another_host() {
    let host = Host::installed("ports");
    seen_from_another_host(&host, "ports-other", &["80", "5443", "8081"]);

    let said = host.zd(&["doctor"]).ok().out;
    assert!(
        said.contains("beyond loopback zd listens on 80 (hello), 5443 (registry), 8081 (standby of hello)"),
        "{said}"
    );
    assert!(!said.contains("others listen"), "{said}");
    // The site's own is named and left alone; one of zd's that should not is a fault.
    host.sh(
        "printf '[Socket]\\nListenStream=0.0.0.0:2222\\nAccept=yes\\n' > /etc/systemd/system/site.socket; \
         printf '[Service]\\nExecStart=/bin/true\\n' > /etc/systemd/system/site@.service; \
         systemctl daemon-reload; systemctl start site.socket",
    );
    let said = host.zd(&["doctor"]).ok().out;
    assert!(said.contains("others listen on 2222 of systemd"), "{said}");
    host.sh("sed -i 's/:5443\"/:5444\"/' /etc/zd/registry/config.json; systemctl restart zd-registry");
    host.comes("ss -Hltn | grep -q :5444");
    let said = host.zd(&["doctor"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.out.contains("5444 of docker-registry"), "{}", said.out);
    assert!(said.out.contains("should not"), "{}", said.out);
    host.run(&["/stick/zd", "-q", "install"]).ok();
    host.zd(&["doctor"]).ok();
}
