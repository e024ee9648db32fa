//! Hosts that are not fit: a clear error before anything is changed.

use crate::host::{Host, differences, stick};

#[test]
#[ignore = "boots a host"]
fn bad_hosts_are_refused_before_anything_changes() {
    let host = Host::bare("bad", stick());
    // Something of the site's on our port, and an address that is not here: all problems at once.
    host.sh(
        "printf '[Socket]\\nListenStream=0.0.0.0:80\\nAccept=yes\\n' > /etc/systemd/system/site.socket; \
             printf '[Service]\\nExecStart=/bin/true\\n' > /etc/systemd/system/site@.service; \
             systemctl daemon-reload; systemctl start site.socket",
    );
    let before = host.picture();
    let install = |args: &[&str]| host.run(&[&["/stick/zd", "install"], args].concat());
    let unchanged = || assert_eq!(differences(&before, &host.picture()), "");

    install(&["--ip", "10.99.99.99"]).fails(
        5,
        "preflight",
        &[
            "2 to mend",
            "80 for the service is taken by systemd",
            "10.99.99.99 is not an address of this host",
        ],
    );
    install(&["--ip", "300.1.1.1"]).fails(2, "usage", &["300.1.1.1"]);
    unchanged();

    host.sh("useradd -M tester");
    let with_tester = host.picture();
    host.run(&["setpriv", "--reuid", "tester", "--clear-groups", "/stick/zd", "install"]).fails(
        5,
        "preflight",
        &["root"],
    );
    assert_eq!(differences(&with_tester, &host.picture()), "");
    host.sh("userdel tester");

    // A clock that is years behind: certificates made now would not be valid.
    host.sh("systemctl stop site.socket; rm /etc/systemd/system/site*; systemctl daemon-reload");
    let before = host.picture();
    // The package manager is busy.
    let busy = host.spawn(&[
        "perl",
        "-e",
        "open F, '+<', '/var/lib/dpkg/lock-frontend'; use Fcntl; \
        my $l = pack('s s x!8 l! l! i', F_WRLCK, 0, 0, 0, 0); fcntl(F, F_SETLK, $l) or die; \
        open L, '>', '/tmp/locked'; close L; sleep 60",
    ]);
    host.comes("test -e /tmp/locked");
    install(&[]).fails(5, "preflight", &["package manager", "perl"]);
    host.sh("pkill perl; rm /tmp/locked");
    let _ = busy.wait();

    // Two plausible addresses and no route out.
    host.sh("ip link add eth7 type veth peer name veth7 && ip addr add 10.77.0.5/24 dev eth7 && ip link set eth7 up");
    install(&[]).fails(5, "preflight", &["10.77.0.5 (eth7)", &host.ip, "--ip"]);
    host.sh("ip link del eth7");

    // No room: the exact need is named.
    host.sh("mkdir -p /opt/zd && mount -t tmpfs -o size=64m tmpfs /opt/zd");
    install(&[]).fails(5, "preflight", &["disk", "/opt/zd", "needed"]);
    host.sh("umount /opt/zd; rmdir /opt/zd");
    assert_eq!(differences(&before, &host.picture()), "");

    // A disk that fills in the middle, against the forecast: an error, and a way on.
    host.sh("mkdir -p /opt/zd && mount -t tmpfs -o size=480m tmpfs /opt/zd");
    let said = host.run(&[
        "sh",
        "-c",
        "/stick/zd install & p=$!; while [ ! -d /opt/zd/generations ]; do :; done; \
             kill -STOP $p; fallocate -l 440M /opt/zd/fill; kill -CONT $p; wait $p",
    ]);
    if said.code != 0 {
        assert!(said.err.contains("error[disk-full]") && said.code == 6, "{said:?}");
    } else {
        panic!("the disk did not fill in time: the test proves nothing");
    }
    host.sh("rm /opt/zd/fill");
    host.run(&["/stick/zd", "-q", "install"]).ok();

    // Docker stopped: deploy says so, what serves goes on.
    host.sh("systemctl stop docker.socket docker");
    host.zd(&["deploy", "v2"]).fails(7, "docker", &["systemctl status docker"]);
    host.sh("systemctl start docker");
    host.zd(&["deploy", "v2"]).ok();
}
