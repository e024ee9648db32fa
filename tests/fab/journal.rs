//! The journal of zd's units: bounded, and apart from the host's own.

use crate::host::Host;

/// Bytes of the journal that zd's units have for themselves.
pub fn used(host: &Host) -> u64 {
    bytes(host, "$(cat /etc/machine-id).zd")
}

fn bytes(host: &Host, folder: &str) -> u64 {
    let said = host.sh(&format!(
        "du -sb /var/log/journal/{folder} /run/log/journal/{folder} 2>/dev/null | cut -f1 || true"
    ));
    said.lines().map(|l| l.parse::<u64>().expect("bytes")).sum()
}

pub fn fills_neither_the_disk_nor_the_hosts_own(host: &Host) {
    host.sh("systemctl restart zd-registry");
    let lines = |options: &str| host.sh(&format!("journalctl {options} -q --no-pager -o cat | wc -l"));
    let of_zd = lines("--namespace=zd -u zd-registry");
    assert_ne!(of_zd.trim(), "0", "the registry writes to the journal of zd");
    assert!(!host.zd(&["logs", "registry"]).ok().out.is_empty());
    // The host's journal knows of it what systemd said.
    assert!(host.zd(&["logs", "registry", "-n", "500"]).ok().out.contains("Started zd-registry.service"));

    // A unit of zd's that does not stop writing, and nothing that keeps its rate down.
    host.sh("logger 'a line of the site'");
    let site = || bytes(host, "$(cat /etc/machine-id)");
    let before = site();
    host.sh("systemd-run -q --wait -p LogNamespace=zd -p LogRateLimitIntervalSec=0 \
         sh -c 'head -c 300000000 /dev/urandom | base64 -w 16000'");
    let (now, host_now) = (used(host), site());
    println!(
        "400 MB written: {} MB kept, the host's journal grew by {} kB",
        now >> 20,
        (host_now - before) >> 10
    );
    assert!(now > 150 << 20, "it was written: {now}");
    assert!(now <= 264 << 20, "{now} of at most 256 MB");
    assert!(host_now - before < 9 << 20, "{before} {host_now}");
    assert_eq!(host.sh("journalctl -q --no-pager -o cat | grep -c 'a line of the site'").trim(), "1");
}

/// Uninstall has ended it.
pub fn ended(host: &Host) {
    host.comes("test -z \"$(systemctl list-units --no-legend 'systemd-journald*@zd*')\"");
}
