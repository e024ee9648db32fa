//! The command line from outside. Nothing here changes this machine.

mod support;

use std::path::Path;

use assert_cmd::Command;
use support::*;

const VERBS: [&str; 29] = [
    "keygen",
    "pack",
    "inspect",
    "verify",
    "doctor",
    "install",
    "upgrade",
    "generations",
    "gc",
    "reconfigure",
    "status",
    "deploy",
    "switch",
    "rollback",
    "scale",
    "secrets",
    "trust",
    "backup",
    "restore",
    "repair",
    "history",
    "logs",
    "support",
    "loadtest",
    "operator",
    "undo",
    "uninstall",
    "completions",
    "man",
];

#[test]
fn every_verb_is_listed_and_shows_an_example() {
    let help = zd(&["--help"]).good().stdout;
    let listed: Vec<&str> = help
        .lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.strip_prefix("  ").filter(|l| !l.starts_with(' '))?.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    assert_eq!(listed, VERBS);
    assert!(help.contains("Exit codes"), "{help}");
    for verb in VERBS {
        let help = zd(&[verb, "--help"]).good().stdout;
        assert!(help.contains("Example") && help.contains(&format!("zd {verb}")), "{verb}:\n{help}");
    }
    assert!(zd(&["--version"]).good().stdout.starts_with("zd 0."));
}

#[test]
fn what_does_not_exist_is_a_usage_error() {
    for args in [
        &["swich"][..],
        &[],
        &["switch", "--to", "red"],
        &["pack"],
        &["reconfigure"],
        &["status", "--colour"],
    ] {
        let out = zd(args);
        assert_eq!(out.code, Some(2), "{args:?}: {out:#?}");
        assert!(out.stdout.is_empty() && out.stderr.contains("--help"), "{args:?}: {out:#?}");
    }
    assert!(zd(&["swich"]).stderr.contains("'switch'"), "the verb that was meant is shown");
}

#[test]
fn an_address_that_is_none_is_a_usage_error() {
    let Some(target) = this_host() else {
        return skipped("install --ip 300.1.1.1", "zd packs for no system like this one");
    };
    let site = Site::new();
    site.pack("", &["--target", &target]).good();
    let before = host_snapshot();
    let install = ["install", "stick/demo-1.zd.tar", "--key", "zd.pub", "--dry-run"];
    for (flag, value) in
        [("--ip", "300.1.1.1"), ("--ip", "here"), ("--subnet", "300.1"), ("--registry-port", "70000")]
    {
        let out = site.zd(&[&install[..], &[flag, value]].concat());
        assert_eq!(out.code, Some(2), "{flag} {value}: {out:#?}");
        assert!(out.stderr.contains(flag) && out.stderr.contains(value), "{out:#?}");
    }
    assert_eq!(host_snapshot(), before);
}

/// True where zd is installed: these tests are about a machine without it.
fn installed() -> bool {
    let there = Path::new("/opt/zd").exists() || Path::new("/etc/zd").exists();
    if there {
        skipped("verbs without an install", "zd is installed on this machine");
    }
    there
}

#[test]
fn without_an_install_there_is_nothing_to_show_or_change() {
    if installed() {
        return;
    }
    let before = host_snapshot();
    let dry: [&[&str]; 6] = [
        &["backup", "--dry-run"],
        &["status"],
        &["switch", "--dry-run"],
        &["deploy", "v2", "--dry-run"],
        &["reconfigure", "--ip", "auto", "--dry-run"],
        &["uninstall", "--dry-run"],
    ];
    for args in dry {
        let out = zd(args).refused(NOT_INSTALLED, &["zd is not installed on this host", "do: "]);
        assert!(out.stdout.is_empty(), "{args:?}: {out:#?}");
    }
    let json = zd(&["status", "--json"]).refused(NOT_INSTALLED, &[]).json();
    assert_eq!(json["error"]["code"], "not-installed");
    assert_eq!(json["error"]["exit"], 10);
    assert_eq!(host_snapshot(), before);

    // The lock these take goes to a /run of their own.
    if !is_root() || !has("unshare") {
        return skipped(
            "switch and deploy without --dry-run",
            "needs root and unshare for a /run of their own",
        );
    }
    let changing: [&[&str]; 4] = [&["switch"], &["deploy", "v2"], &["rollback"], &["uninstall", "--yes"]];
    for args in changing {
        let mut command = isolated("/usr/bin/unshare");
        let script = "mount -t tmpfs none /run || exit 99; exec \"$0\" \"$@\"";
        let out = Outcome::of(command.args(["--mount", "sh", "-c", script, ZD]).args(args));
        if out.code == Some(99) {
            return skipped("switch and deploy without --dry-run", "root may not mount a tmpfs here");
        }
        out.refused(NOT_INSTALLED, &["zd is not installed on this host", "do: "]);
    }
    assert_eq!(host_snapshot(), before);
}

/// zd as a user without rights.
fn as_nobody(program: &Path) -> Option<Command> {
    if !is_root() {
        return Some(isolated(program));
    }
    if !has("setpriv") {
        skipped("zd without root", "setpriv is not installed");
        return None;
    }
    let mut command = isolated("/usr/bin/setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(program).current_dir("/");
    Some(command)
}

#[test]
fn without_root_nothing_is_changed_and_said_so() {
    let site = Site::new();
    let target = this_host();
    // The folder's own zd: the build folder may be closed to others.
    site.pack("", target.as_deref().map(|t| ["--target", t]).as_ref().map_or(&[][..], |a| a)).good();
    let tool = site.path("stick/zd");
    let before = host_snapshot();
    let verbs: [&[&str]; 7] = [
        &["backup"],
        &["switch"],
        &["deploy", "v2"],
        &["rollback"],
        &["reconfigure", "--ip", "auto"],
        &["undo", "--yes"],
        &["uninstall", "--yes"],
    ];
    for args in verbs {
        let Some(mut command) = as_nobody(&tool) else { return };
        Outcome::of(command.args(args)).refused(PREFLIGHT, &["needs root", &format!("sudo zd {}", args[0])]);
    }
    let Some(mut command) = as_nobody(&tool) else { return };
    if target.is_some() {
        let key = site.text("zd.pub");
        let out = Outcome::of(command.args(["install", "--dry-run", "--ip", "127.0.0.1", "--key", &key]));
        out.refused(PREFLIGHT, &["nothing was changed", "root: not running as root", "sudo zd"]);
    } else {
        skipped("install without root", "zd packs for no system like this one");
    }
    assert_eq!(host_snapshot(), before);
}

#[test]
fn completions_and_manuals_are_written() {
    for shell in ["bash", "zsh", "fish"] {
        let text = zd(&["completions", shell]).good().stdout;
        assert!(text.contains("zd") && text.contains("rollback"), "{shell}:\n{text}");
    }
    let site = Site::new();
    site.zd(&["man", "man1"]).good();
    for verb in VERBS {
        let page = std::fs::read_to_string(site.path(&format!("man1/zd-{verb}.1"))).unwrap();
        assert!(page.starts_with(".ie") || page.contains(".TH zd"), "{verb}:\n{page}");
    }
    assert!(site.path("man1/zd.1").exists());
}

#[test]
fn off_a_terminal_there_are_no_escapes() {
    let site = Site::packed();
    let runs: [&[&str]; 8] = [
        &["--help"],
        &["switch", "--help"],
        &["swich"],
        &["status"],
        &["doctor"],
        &["verify", "stick/demo-1.zd.tar", "--key", "zd.pub"],
        &["inspect", "stick/demo-1.zd.tar"],
        &["pack", "demo.toml", "--out", "again"],
    ];
    for args in runs {
        let out = Outcome::of(site.command().args(args).env("TERM", "xterm-256color"));
        assert!(!out.stdout.contains('\x1b') && !out.stderr.contains('\x1b'), "{args:?}: {out:#?}");
    }
    let quiet = site.zd(&["-q", "pack", "demo.toml", "--out", "again"]).good();
    assert!(quiet.stderr.is_empty(), "{quiet:#?}");
}

#[test]
fn colours_on_a_terminal_can_be_switched_off() {
    if !has("script") {
        return skipped("colours on a terminal", "script (util-linux) is not installed");
    }
    if installed() {
        return;
    }
    let on_terminal = |variables: &[(&str, &str)]| {
        let mut command = isolated("/usr/bin/script");
        command.args(["-qec", &format!("{ZD} status"), "/dev/null"]).envs(variables.iter().copied());
        let out = Outcome::of(&mut command);
        assert!(out.stdout.contains("error[not-installed]"), "{out:#?}");
        out.stdout
    };
    assert!(on_terminal(&[("TERM", "xterm")]).contains("\x1b[1;31m"));
    let plain = on_terminal(&[("TERM", "xterm"), ("NO_COLOR", "1")]);
    assert!(!plain.contains("\x1b[1") && !plain.contains("\x1b[3"), "{plain:?}");
    let dumb = on_terminal(&[("TERM", "dumb")]);
    assert!(!dumb.contains('\x1b'), "{dumb:?}");
}
