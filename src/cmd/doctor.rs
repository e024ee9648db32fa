//! `zd doctor`: what is wrong with this host, and what to do; before an install and after.

use std::collections::BTreeMap;
use std::path::Path;

use bytesize::ByteSize;
use jiff::Timestamp;
use serde::Serialize;

use super::verify::BundleArgs;
use crate::audit;
use crate::error::{Code, FREE_SOME, Result};
use crate::facts::{self, Facts};
use crate::host::config::Installed;
use crate::host::paths;
use crate::host::secrets::{self, Secret};
use crate::plan::preflight::{self, Finding};
use crate::receipt;
use crate::ui::Ui;

/// A certificate that ends within so many days is a finding: there is a quarter between two visits.
const CERTIFICATE_DAYS: i64 = 120;
/// Less than this free, and the next deploy may not fit, or a log not be written.
const DISK_LOW: u64 = 512 << 20;

/// Look for what is wrong and say what to do
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd doctor\n  zd doctor --json")]
pub struct Args {}

#[derive(Serialize)]
struct Report {
    findings: Vec<Finding>,
    facts: Facts,
}

pub async fn run(_: Args, ui: &Ui) -> Result<()> {
    let facts = Facts::gather().await?;
    let mut findings = preflight::host(&facts);
    match receipt::unfinished()? {
        Some(r) => findings.push(Finding::bad(
            "receipt",
            format!("{} of {} was interrupted", r.header.verb, r.header.about),
            format!("run `zd {}` again to finish it, or `zd undo`", r.header.verb),
        )),
        None => findings.push(Finding::ok("receipt", "nothing is unfinished")),
    }
    match Installed::read()? {
        Some(installed) => findings.extend(installed_findings(&installed, &facts).await?),
        None => findings.extend(bundle_findings(&facts)),
    }
    let bad = findings.iter().filter(|f| f.good == Some(false)).count();
    ui.report(&Report { findings, facts }, |r| {
        let lines = r.findings.iter().map(|f| {
            let cure = if f.cure.is_empty() { String::new() } else { format!("\n       do: {}", f.cure) };
            format!("{} {}: {}{cure}\n", ui.mark(f.good), f.name, f.what)
        });
        lines.collect()
    });
    if bad == 0 {
        return Ok(());
    }
    Err(Code::Preflight
        .err(format!("{bad} of these are bad"))
        .cure("do what stands under each, from the top"))
}

async fn installed_findings(installed: &Installed, facts: &Facts) -> Result<Vec<Finding>> {
    let mut found = Vec::new();
    let ip = installed.host.ip;
    // Where it is not here, the status says so.
    if facts.has_ip(ip) {
        found.push(Finding::ok("address", ip.to_string()));
    }
    let status = super::status::gather(installed).await?;
    for drift in &status.drift {
        found.push(Finding::bad("state", &drift.what, &drift.cure));
    }
    if status.drift.is_empty() {
        found.push(Finding::ok("state", "all is as recorded"));
    }
    match audit::read() {
        Ok(records) => {
            found.extend(records.iter().map(|r| r.at).max().and_then(|at| clock_set_back(at, facts.now)));
            found.push(match audit::signed_by() {
                Ok(key) => {
                    let signed = key.map(|key| format!("signed with key {key}, ")).unwrap_or_default();
                    Finding::ok("audit", format!("{} records, {signed}chain whole", records.len()))
                }
                Err(e) => Finding::bad("audit", e.what, e.cure.unwrap_or_default()),
            });
        }
        Err(e) => found.push(Finding::bad("audit", e.what, e.cure.unwrap_or_default())),
    }
    for path in Secret::certificates().iter().filter(|path| path.exists()) {
        found.push(certificate(path, facts.now)?);
    }
    found.extend(disks()?);
    found.extend(ports(installed, facts));
    Ok(found)
}

/// What listens where others can reach it: what should, what should not, and what is not zd's.
fn ports(installed: &Installed, facts: &Facts) -> Vec<Finding> {
    let services = installed.lock.services.iter();
    let mut expected: BTreeMap<u16, String> = services
        .flat_map(|s| [(s.listen, s.name.to_string()), (s.standby_listen, format!("standby of {}", s.name))])
        .collect();
    for service in &installed.lock.services {
        expected.extend(service.tcp.iter().map(|t| (t.listen(), format!("tcp of {}", service.name))));
    }
    expected.insert(installed.host.registry_port, "registry".into());
    expected.extend(installed.lock.consul_https.map(|port| (port, "Consul".into())));
    let mut found = Vec::new();
    let (mut wanted, mut others) = (BTreeMap::new(), BTreeMap::new());
    for l in facts.listeners.iter().filter(|l| !l.ip.to_canonical().is_loopback()) {
        match expected.get(&l.port) {
            Some(what) if l.is_zds() => _ = wanted.insert(l.port, format!("{} ({what})", l.port)),
            None if !l.is_zds() => _ = others.insert(l.port, format!("{} of {}", l.port, l.owner)),
            _ => {
                let what = format!("{} of {} can be reached from outside and should not", l.port, l.owner);
                let cure = match l.unit.as_str() {
                    "" => "stop it, or give it another port".to_owned(),
                    unit => format!(
                        "systemctl cat {unit} and its configuration show what was changed by hand; zd install with the \
                         bundle puts it right, then systemctl restart {unit}"
                    ),
                };
                found.push(Finding::bad("port", what, cure));
            }
        }
    }
    let list = |all: BTreeMap<u16, String>| all.into_values().collect::<Vec<_>>().join(", ");
    found.push(Finding::ok("port", format!("beyond loopback zd listens on {}", list(wanted))));
    if !others.is_empty() {
        let what = format!("beyond loopback others listen on {}", list(others));
        found.push(Finding::note("port", what, "nothing, if the site wants it: zd leaves it alone"));
    }
    found
}

/// What was recorded lies in the future: certificates, tokens and Nomad go by the clock.
fn clock_set_back(recorded: Timestamp, now: Timestamp) -> Option<Finding> {
    (now < recorded).then(|| {
        Finding::bad(
            "clock",
            format!("this host says {now}, its own latest record is of {recorded}: the clock was set back"),
            preflight::SET_CLOCK,
        )
    })
}

fn certificate(path: &Path, now: Timestamp) -> Result<Finding> {
    let (from, until) = secrets::validity(path)?;
    let shown = path.display();
    let days = until.duration_since(now).as_hours() / 24;
    Ok(if now < from {
        let what = format!("{shown} is valid from {from}, this host says {now}");
        Finding::bad("certificate", what, preflight::SET_CLOCK)
    } else if days < CERTIFICATE_DAYS {
        let what = format!("{shown} ends {until}, in {days} days");
        Finding::bad("certificate", what, "zd secrets rotate makes it anew; what serves goes on")
    } else {
        Finding::ok("certificate", format!("{shown} is valid until {until}"))
    })
}

/// File systems that are filling, by what zd keeps on them.
fn disks() -> Result<Vec<Finding>> {
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for path in [paths::VAR, paths::LOG, paths::DOCKER_DATA, paths::OPT] {
        let (device, free) = facts::space(Path::new(path))?;
        if seen.contains(&device) {
            continue;
        }
        seen.push(device);
        let what = format!("{} free for {path}", ByteSize(free));
        found.push(if free < DISK_LOW {
            Finding::bad("disk", what, FREE_SOME)
        } else {
            Finding::ok("disk", what)
        });
    }
    Ok(found)
}

/// Before an install: against the bundle beside zd, if there is one.
fn bundle_findings(facts: &Facts) -> Vec<Finding> {
    let opened = BundleArgs::default().open();
    let address = match facts.auto_ip() {
        Ok(found) => Finding::ok("address", format!("--ip auto takes {} of {}", found.ip, found.name)),
        Err(e) => Finding::bad("address", e.what, e.cure.unwrap_or_default()),
    };
    let mut found = vec![address];
    match opened {
        Ok((bundle, _)) => match super::install::assess_before(&bundle, facts) {
            Ok(findings) => found.extend(findings.into_iter().filter(|f| f.name != "address")),
            Err(e) => found.push(Finding::bad("bundle", e.what, e.cure.unwrap_or_default())),
        },
        Err(e) => found.push(Finding::note("bundle", e.what, e.cure.unwrap_or_default())),
    }
    found
}
