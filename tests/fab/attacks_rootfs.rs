//! What a service account or a local user tries against root: names in its own folders, process ids, locks, environment.

use crate::host::{Host, Pack, SERVICE, stick};

/// A command's first words, with which it has the rights of nginx's account, or of nobody's.
const NGINX: &str = "setpriv --reuid=zd-nginx --regid=zd-nginx --clear-groups --";
const NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups --";
/// Only root may read it.
const SECRET: &str = "known-to-root-alone";

#[test]
#[ignore = "boots a host"]
fn no_account_of_a_service_and_no_local_user_becomes_root() {
    let host = Host::installed_from("attacks-rootfs", stick());
    host.zd(&["deploy", "v2"]).ok();
    host.sh(&format!("umask 077; echo {SECRET} >/root/secret"));
    nothing_is_open_to_others(&host);
    nobody_holds_the_lock(&host);
    renames_in_nginxs_folder_give_it_no_socket(&host);
    links_among_logs_show_nothing(&host);
    the_environment_decides_nothing(&host);
    traffic_that_moved_is_not_called_failed(&host);
    a_foreign_pid_gets_no_signal(&host);
    what_does_not_stop_loses_no_data(&host);
}

/// All that anybody may read of what is zd's; the reasons stand in ARCHITECTURE.md.
const OPEN: [&str; 13] = [
    "/run/zd",
    "/etc/zd/logrotate.conf",
    "/etc/zd/signing/host.pub",
    "/etc/zd/trust",
    "/etc/zd/trust/first.pub",
    "/etc/zd/trust/trust.toml",
    "/opt/zd",
    "/opt/zd/bin",
    "/opt/zd/programs",
    "/opt/zd/programs/zd-*",
    "/var/lib/zd/audit.head",
    "/var/lib/zd/reports",
    "/var/lib/zd/reports/*",
];

fn nothing_is_open_to_others(host: &Host) {
    host.zd(&["switch"]).ok();
    let found = host.sh(&format!(
        "find /run/zd /run/zd-gate /etc/zd /opt/zd /var/lib/zd ! -type l | {NOBODY} perl -nle 'print if -r || -w'"
    ));
    let is_listed = |path: &str| {
        OPEN.iter().any(|open| match open.strip_suffix('*') {
            Some(start) => path.starts_with(start),
            None => path == *open,
        })
    };
    let more: Vec<&str> = found.lines().filter(|path| !is_listed(path)).collect();
    assert_eq!(more, Vec::<&str>::new());
    assert!(found.lines().count() >= OPEN.len(), "{found}");
    // Env of services stands in the lock.
    assert_eq!(host.sh("stat -c %a /opt/zd/generations/1/zd-lock.json /run/zd/lock"), "600\n600\n");
    assert_eq!(
        host.sh("stat -c '%a %U %G' /run/zd-gate /etc/zd/nginx"),
        "2750 root zd-nginx\n750 root zd-nginx\n"
    );
    // They still do what is said to need no root.
    for verb in ["history", "verify"] {
        let said = host
            .sh(&format!("{NOBODY} zd {verb} $([ {verb} = verify ] && echo /stick/*.zd.tar) 2>&1 || true"));
        assert!(!said.contains("error["), "{verb}: {said}");
    }
    let status = host.run(&["sh", "-c", &format!("{NOBODY} zd generations")]);
    status.fails(6, "io", &["permission denied", "sudo zd"]);
}

fn nobody_holds_the_lock(host: &Host) {
    let holder = host.spawn(&["sh", "-c", &format!("{NOBODY} flock --shared /run/zd/lock sleep 3")]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    host.zd(&["switch"]).ok();
    let said = holder.wait();
    assert!(said.code != 0 && said.err.contains("Permission denied"), "{said:?}");
}

/// The race that gave nginx's account Docker's socket: root bound its own, and changed owner and mode by its name.
fn renames_in_nginxs_folder_give_it_no_socket(host: &Host) {
    let owners = || host.sh("stat -L -c '%n %a %u %g' /run/docker.sock /run/zd/lock /run/zd-gate");
    let before = owners();
    let race = "chdir '/run/zd/hello'; my $end = time + 60; while (time < $end && !-e 'stop') {
        if (-S 'gate.sock' && !-l 'gate.sock') { symlink '/run/docker.sock', 'x'; rename 'x', 'gate.sock' } }";
    let racing = host.spawn(&["sh", "-c", &format!("{NGINX} perl -e \"{}\"", race.replace('$', "\\$"))]);
    let load = host.load(300, 10, &["--mode", "mixed"]);
    std::thread::sleep(std::time::Duration::from_secs(1));
    for _ in 0..10 {
        host.zd(&["switch"]).ok();
    }
    host.sh(&format!("{NGINX} touch /run/zd/hello/stop"));
    racing.wait().ok();
    host.clean(load);
    assert_eq!(owners(), before);
    assert_eq!(host.sh(&format!("{NGINX} test -w /run/docker.sock || echo denied")), "denied\n");
    for line in
        ["touch /run/zd-gate/x", "ln -s /run/docker.sock /run/zd-gate/hello.sock", "mv /run/zd-gate /run/x"]
    {
        assert_ne!(host.run(&["sh", "-c", &format!("{NGINX} {line}")]).code, 0, "{line}");
    }
    // Neither does root speak to a socket that it has put in the place of its own.
    host.sh(&format!("{NGINX} sh -c 'cd /run/zd/hello && rm stop && mv status.sock s && ln -s /run/docker.sock status.sock'"));
    host.zd(&["switch"]).fails(7, "nginx", &["status.sock is no socket"]);
    host.sh(&format!("{NGINX} mv /run/zd/hello/s /run/zd/hello/status.sock"));
    host.zd(&["switch"]).ok();
}

fn links_among_logs_show_nothing(host: &Host) {
    let swap = "chdir '/var/log/zd/hello'; my $end = time + 60; while (time < $end && !-e '/run/zd/hello/stop') {
        symlink '/root/secret', 'x'; rename 'x', 'swap.log'; open F, '>', 'y'; close F; rename 'y', 'swap.log' }";
    host.sh(&format!(
        "cd /var/log/zd/hello && {NGINX} sh -c 'ln -s /root/secret link.log; ln -s /root dir; mkfifo fifo.log; \
         truncate -s 1T endless.log'"
    ));
    let swapping = host.spawn(&["sh", "-c", &format!("{NGINX} perl -e \"{}\"", swap.replace('$', "\\$"))]);
    for _ in 0..10 {
        host.sh("timeout 60 zd -q support --out /tmp/support.tar.gz");
        let told = host.sh(&format!("tar -xzOf /tmp/support.tar.gz | grep -c {SECRET} || true"));
        assert_eq!(told, "0\n");
    }
    host.sh(&format!("{NGINX} touch /run/zd/hello/stop"));
    swapping.wait().ok();
    let log = "/var/log/zd/hello/error.log";
    host.sh(&format!("{NGINX} sh -c 'mv {log} {log}.1; ln -s /root/secret {log}'"));
    let said = host.zd(&["logs", "nginx"]);
    assert!(said.code != 0 && !said.out.contains(SECRET), "{said:?}");
    host.sh(&format!("{NGINX} sh -c 'mv {log}.1 {log}; cd /var/log/zd/hello; rm -f *link.log dir fifo.log endless.log swap.log x y'"));
    host.sh("rm /run/zd/hello/stop /tmp/support.tar.gz");
    host.zd(&["logs", "access", "-n", "1"]).ok();
}

fn the_environment_decides_nothing(host: &Host) {
    host.sh("mkdir /root/bin; for p in systemctl setpriv nginx dpkg-query tail; do \
         printf '#!/bin/sh\\ntouch /root/ran\\n' >/root/bin/$p; chmod +x /root/bin/$p; done");
    let path = "PATH=/root/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    for line in ["zd status", "zd logs audit", "zd switch"] {
        host.sh(&format!("env {path} LC_ALL=xx ZD_FAILPOINT=switch:held {line}"));
    }
    host.sh("test ! -e /root/ran; rm -r /root/bin");
}

/// A write that fails after the pointer has moved: nothing can be written over a mount point.
fn traffic_that_moved_is_not_called_failed(host: &Host) {
    let (before, state) = (host.active(), "/var/lib/zd/services/hello/state.json");
    let load = host.load(300, 2, &[]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    host.sh(&format!("mount --bind {state} {state}"));
    host.zd(&["switch"]).fails(6, "io", &["all traffic is on", "power cut", "zd switch --to"]);
    let now = host.active();
    assert_ne!(now, before);
    assert!(host.zd(&["history", "--last", "1"]).ok().out.contains("moved, not on disk"));
    host.sh(&format!("umount {state}"));
    assert_eq!(host.zd(&["switch", "--to", &now, "--json"]).ok().json()["changed"], false);
    assert!(host.zd(&["history", "--last", "1"]).ok().out.contains("recovered"));
    assert_eq!(host.drift(), serde_json::json!([]));
    host.zd(&["switch"]).ok();
    host.clean(load);
}

/// nginx's account names a process of root's in the files in which nginx keeps process ids.
fn a_foreign_pid_gets_no_signal(host: &Host) {
    let next = Pack {
        folder: "attacks-rootfs-next",
        name: Some("fab"),
        version: Some("2"),
        service: SERVICE,
        ..Pack::default()
    };
    host.copy_in(&next.make(), "/stick2");
    host.sh("nohup sleep 1000 >/dev/null 2>&1 & echo $! >/tmp/victim");
    let pid = host.sh("cat /tmp/victim");
    let alive = || host.sh("kill -0 $(cat /tmp/victim) && ps -o comm= -p $(cat /tmp/victim)");
    host.sh(&format!(
        "{NGINX} sh -c 'cd /run/zd/hello; for f in nginx.pid nginx.pid.oldbin; do echo {} >$f; done'",
        pid.trim()
    ));
    let load = host.load(300, 0, &["--mode", "mixed"]);
    let workers = "pgrep -u zd-nginx -f 'nginx: worker process$' | sort";
    // A reload, and then another program of nginx's.
    let first = host.sh(workers);
    host.zd(&["scale", "hello", "1"]).ok();
    assert_ne!(host.sh(workers), first);
    host.sh("cp /usr/sbin/nginx /usr/sbin/nginx.new; printf x >>/usr/sbin/nginx.new; mv /usr/sbin/nginx.new /usr/sbin/nginx");
    let main = host.sh("systemctl show -p MainPID --value zd-nginx@hello");
    host.run(&["/stick2/zd", "-q", "upgrade", "--yes"]).ok();
    host.clean(load);
    assert_eq!(alive(), "sleep\n");
    let now = host.sh("systemctl show -p MainPID --value zd-nginx@hello");
    assert_ne!(now, main, "nginx has its new program");
    assert_eq!(
        host.sh("cmp /proc/$(systemctl show -p MainPID --value zd-nginx@hello)/exe /usr/sbin/nginx"),
        ""
    );
    host.sh("kill $(cat /tmp/victim)");
    host.settles();
}

fn what_does_not_stop_loses_no_data(host: &Host) {
    let folder = "/etc/systemd/system/zd-nginx@hello.service.d";
    host.sh(&format!(
        "mkdir {folder}; printf '[Unit]\\nRefuseManualStop=yes\\n' >{folder}/x.conf; systemctl daemon-reload"
    ));
    host.zd(&["uninstall", "--yes"]).fails(6, "command", &["zd-nginx@hello.service does not stop"]);
    assert_eq!(
        host.sh("systemctl is-active zd-nginx@hello; ls -d /var/lib/zd/services/hello"),
        "active\n/var/lib/zd/services/hello\n"
    );
    host.sh(&format!("rm -r {folder}; systemctl daemon-reload"));
    host.zd(&["uninstall", "--purge", "--yes"]).ok();
    assert_eq!(host.sh("ls -d /run/zd-gate /var/lib/zd 2>/dev/null || true"), "");
}
