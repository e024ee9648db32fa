//! From inside a container's network, as root there, and from outside this host: what none of them gets.

use crate::host::{Host, Pack, SECOND, SERVICE};

/// Claims the address $victim in the network of process $pid, by an answer that nobody asked for every quarter of a
/// second, while this host talks to whoever has it. Says whether the claim was believed.
const CLAIM: &str = "
inside() { nsenter -t $pid -n \"$@\"; }
mac=$(inside ip -o link show eth0 | sed 's/.*ether //; s/ .*//')
inside sysctl -qw net.ipv4.conf.eth0.arp_notify=1
inside ip addr add $victim/16 dev eth0
for i in $(seq 24); do
  timeout 0.1 bash -c \"exec 3<>/dev/tcp/$victim/8080\" || true
  inside ip link set eth0 address $mac
  sleep 0.15
  if ip neigh show $victim dev zd0 | grep -qi $mac; then believed=yes; fi
  case $((i % 8)) in 0) ip neigh flush dev zd0;; esac
done
inside ip addr del $victim/16 dev eth0
ip neigh flush dev zd0
echo ${believed:-no}
";

/// A machine beside this host, with a route to its containers, and a host that forwards all, as where something else
/// had made it forward before Docker came. In a namespace: the fab's own network lets only its hosts' addresses pass.
const BESIDE: &str = "
ip netns add beside
ip link add beside type veth peer name eth0 netns beside
ip addr add 10.99.0.1/30 dev beside
ip link set beside up
ip -n beside addr add 10.99.0.2/30 dev eth0
ip -n beside link set eth0 up
ip -n beside route add default via 10.99.0.1
iptables -P FORWARD ACCEPT
iptables -I FORWARD -j ACCEPT
";
const OUTSIDE: &str = "ip netns exec beside ";

struct Bridge {
    host: Host,
}

impl Bridge {
    fn of(&self, container: &str, what: &str) -> String {
        self.host.sh(&format!("docker inspect -f '{{{{{what}}}}}' {container}")).trim().to_owned()
    }

    fn ip(&self, container: &str) -> String {
        self.of(container, ".NetworkSettings.Networks.zd.IPAddress")
    }

    fn believes(&self, attacker: &str, victim: &str) -> bool {
        let (pid, victim) = (self.of(attacker, ".State.Pid"), self.ip(victim));
        self.host.sh(&format!("pid={pid}; victim={victim}; {CLAIM}")).trim() == "yes"
    }

    /// Whether one container gets to another, straight or by way of the host's address.
    fn reaches(&self, from: &str, to: &str) -> bool {
        let (pid, to) = (self.of(from, ".State.Pid"), self.ip(to));
        let direct = connects(&format!("nsenter -t {pid} -n "), &to);
        let by_host = format!(
            "nsenter -t {pid} -n ip neigh replace {to} dev eth0 nud permanent lladdr $(cat /sys/class/net/zd0/address)"
        );
        let forget = format!("nsenter -t {pid} -n ip neigh del {to} dev eth0");
        let line = format!("{direct} || {{ {by_host}; {direct}; got=$?; {forget}; exit $got; }}");
        self.host.run(&["bash", "-c", &line]).code == 0
    }

    fn keeps(&self) {
        assert!(!self.reaches("zd-hello-green-1", "zd-hello-blue-1"));
        assert!(!self.reaches("zd-hello-green-1", "zd-second-blue-1"));
        assert!(!self.reaches("zd-second-green-1", "zd-hello-blue-1"));
        let blue = self.ip("zd-hello-blue-1");
        assert_ne!(self.host.run(&["bash", "-c", &connects(OUTSIDE, &blue)]).code, 0, "reached from outside");
        assert_eq!(self.host.run(&["bash", "-c", &connects("", &blue)]).code, 0, "reached from its host");
        self.host.serves();
    }
}

fn connects(inside: &str, ip: &str) -> String {
    format!("{inside}timeout 1 bash -c 'exec 3<>/dev/tcp/{ip}/8080'")
}

#[test]
#[ignore = "boots a host"]
fn no_container_has_rights_takes_an_address_or_is_reached() {
    let rights = "capabilities = [\"CHOWN\"]\nread-only = true\nuser = \"1000:1000\"\n";
    let service = format!("{SERVICE}{SECOND}{rights}");
    let stick = Pack { folder: "attacks-net", service: &service, ..Pack::default() }.make();
    let bridge = Bridge { host: Host::installed_from("attacks-net", &stick) };
    let host = &bridge.host;
    host.zd(&["deploy", "v2", "hello"]).ok();
    assert!(
        host.run(&["/stick/zd", "inspect", "/stick"]).ok().out.contains("second is given: capability CHOWN")
    );

    let status = |container: &str, key: &str| {
        let pid = bridge.of(container, ".State.Pid");
        host.sh(&format!("sed -n 's/^{key}:\\s*//p' /proc/{pid}/status")).trim().to_owned()
    };
    for container in ["zd-hello-blue-1", "zd-hello-green-1"] {
        for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
            assert_eq!(status(container, set), "0000000000000000", "{container} {set}");
        }
        assert_eq!(status(container, "NoNewPrivs"), "1");
        assert_eq!(bridge.of(container, ".HostConfig.PidsLimit"), "4096");
        assert_eq!(bridge.of(container, ".HostConfig.ReadonlyRootfs"), "false");
    }
    let second = "zd-second-blue-1";
    assert_eq!(status(second, "CapBnd"), "0000000000000001", "CHOWN and no other");
    assert_eq!(status(second, "Uid"), "1000\t1000\t1000\t1000");
    assert_eq!(bridge.of(second, ".HostConfig.ReadonlyRootfs"), "true");

    host.sh(BESIDE);
    bridge.keeps();
    let load = host.load(500, 0, &["--mode", "mixed"]);
    assert!(!bridge.believes("zd-hello-green-1", "zd-hello-blue-1"));
    let report = host.clean(load);
    assert_eq!(report["versions"].as_object().expect("versions").len(), 1, "{}", report["versions"]);
    println!("under the claim: latency {}, {}", report["latency_ms"], report["versions"]);

    // The same attacks are none without the rules.
    host.sh("systemctl stop zd-bridge");
    let blue = bridge.ip("zd-hello-blue-1");
    assert_eq!(host.run(&["bash", "-c", &connects(OUTSIDE, &blue)]).code, 0);
    assert!(bridge.reaches("zd-hello-green-1", "zd-hello-blue-1"));
    assert!(bridge.believes("zd-hello-green-1", "zd-hello-blue-1"));
    host.sh("systemctl start zd-bridge");
    bridge.keeps();

    host.sh("systemctl restart docker");
    bridge.keeps();
    host.sh("systemctl reload zd-bridge");
    let rules = "iptables -t raw -S; ebtables-nft -t nat -L; ebtables-nft -t filter -L";
    assert_eq!(
        host.sh(&format!("({rules}) | grep -c -- '-j zd$'")).trim(),
        "3",
        "each once: {}",
        host.sh(rules)
    );
    host.is_hardened(&["zd-bridge"]);
    host.restart();
    host.settles();
    host.sh(BESIDE);
    bridge.keeps();
    assert_eq!(host.run(&["/stick/zd", "install", "--json"]).ok().json()["changed"], 0);

    host.zd(&["uninstall", "--yes"]).ok();
    assert!(!host.sh(rules).contains("zd"), "{}", host.sh(rules));
}
