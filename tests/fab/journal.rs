//! The journal of zd's units: bounded, and apart from the host's own.

use crate::host::Host;

#[test]
#[ignore = "boots a host"]
fn units_fill_neither_the_disk_nor_the_hosts_journal() {
    let host = Host::installed("journal");
    host.sh("systemctl restart zd-registry");
    let lines = |options: &str| host.sh(&format!("journalctl {options} -q --no-pager -o cat | wc -l"));
    let of_zd = lines("--namespace=zd -u zd-registry");
    assert_ne!(of_zd.trim(), "0", "the registry writes to the journal of zd");
    assert!(!host.zd(&["logs", "registry"]).ok().out.is_empty());
    // The host's journal knows of it what systemd said.
    assert!(host.zd(&["logs", "registry", "-n", "500"]).ok().out.contains("Started zd-registry.service"));

    // A unit of zd's that does not stop writing, and nothing that keeps its rate down.
    host.sh("logger 'a line of the site'");
    let used = |options: &str| -> u64 {
        let said = host.sh(&format!(
            "du -sb /var/log/journal/{options} /run/log/journal/{options} 2>/dev/null | cut -f1 || true"
        ));
        said.lines().map(|l| l.parse::<u64>().expect("bytes")).sum()
    };
    let (zd, site) = ("$(cat /etc/machine-id).zd", "$(cat /etc/machine-id)");
    let before = used(site);
    host.sh("systemd-run -q --wait -p LogNamespace=zd -p LogRateLimitIntervalSec=0 \
         sh -c 'head -c 420000000 /dev/urandom | base64 -w 16000'");
    let (now, host_now) = (used(zd), used(site));
    println!(
        "560 MB written: {} MB kept, the host's journal grew by {} kB",
        now >> 20,
        (host_now - before) >> 10
    );
    assert!(now > 150 << 20, "it was written: {now}");
    assert!(now <= 264 << 20, "{now} of at most 256 MB");
    assert!(host_now - before < 9 << 20, "{before} {host_now}");
    assert_eq!(host.sh("journalctl -q --no-pager -o cat | grep -c 'a line of the site'").trim(), "1");

    host.zd(&["uninstall", "--yes"]).ok();
    host.comes("test -z \"$(systemctl list-units --no-legend 'systemd-journald*@zd*')\"");
    assert!(used(zd) > 0, "data stays");
    host.run(&["/stick/zd", "-q", "install"]).ok();
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    host.comes("test -z \"$(systemctl list-units --no-legend 'systemd-journald*@zd*')\"");
    assert_eq!(host.sh("ls -d /var/log/journal/*.zd /run/log/journal/*.zd 2>/dev/null || true"), "");
}
