//! `zd doctor`: what is wrong with this host, and what to do; before an install and after.

use serde::Serialize;

use super::verify::BundleArgs;
use crate::audit;
use crate::error::{Code, Result};
use crate::facts::Facts;
use crate::host::config::Installed;
use crate::plan::preflight::{self, Finding};
use crate::receipt;
use crate::ui::Ui;

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
    found.push(if facts.has_ip(ip) {
        Finding::ok("address", ip.to_string())
    } else {
        Finding::bad(
            "address",
            format!("{ip}, which zd was installed with, is not on this host"),
            "give it back to an interface",
        )
    });
    let status = super::status::gather(installed).await?;
    for drift in &status.drift {
        found.push(Finding::bad("state", &drift.what, &drift.cure));
    }
    if status.drift.is_empty() {
        found.push(Finding::ok("state", "all is as recorded"));
    }
    found.push(match audit::read() {
        Ok(records) => Finding::ok("audit", format!("{} records, chain whole", records.len())),
        Err(e) => Finding::bad("audit", e.what, e.cure.unwrap_or_default()),
    });
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
