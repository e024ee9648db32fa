//! `zd reconfigure`: an installed host at another address, or with its registry on another port; with the services
//! at work, and back where a step or a request fails.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::install::{address, asked_ip};
use super::upgrade::standing;
use super::watched::{self, Seen, Told};
use super::{ChangeArgs, lines};
use crate::apply::{self, Preview};
use crate::error::Result;
use crate::facts::Facts;
use crate::host::Host;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::plan::preflight;
use crate::plan::reconfigure as planner;
use crate::receipt;
use crate::ui::Ui;

const VERB: &str = "reconfigure";

/// Give an installed host another address, with the services at work; go back where something fails
#[derive(clap::Args)]
#[command(
    group = clap::ArgGroup::new("settings").args(["ip", "registry_port"]).required(true).multiple(true),
    after_help = "Examples:\n  sudo zd reconfigure --ip 10.4.1.17 --dry-run\n  \
                  sudo zd reconfigure --ip auto --reason 'line 4 renumbered'\n  \
                  sudo zd reconfigure --registry-port 5444"
)]
pub struct Args {
    /// Address that this host has from now on: `auto`, or one of its interfaces'
    #[arg(long, value_name = "auto|ADDRESS")]
    ip: Option<String>,
    /// Port of the private registry from now on
    #[arg(long, value_name = "PORT")]
    registry_port: Option<u16>,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    ip: Ipv4Addr,
    /// Address and port of the private registry.
    registry: String,
    /// What became another, one line each.
    differences: Vec<String>,
    changed: usize,
    same: usize,
    #[serde(flatten)]
    seen: Seen,
    seconds: f64,
    steps: Vec<apply::Done>,
    /// Where clients find the services.
    urls: Vec<String>,
    /// The page for change control.
    report: Option<PathBuf>,
}

#[derive(Serialize)]
struct DryRun {
    differences: Vec<String>,
    #[serde(flatten)]
    plan: Preview,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    let asked = args.ip.as_deref().map(asked_ip).transpose()?;
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take(VERB, ui)?) };
    let from = Installed::require()?;
    let facts = Facts::gather().await?;
    let ip = match asked {
        Some(asked) => address(asked, &facts, ui)?,
        None => from.host.ip,
    };
    let host = from.host.moved(ip, args.registry_port.unwrap_or(from.host.registry_port));
    let to = Installed { host, lock: from.lock.clone() };
    let leads_there = format!(" to {}", to.host.registry());
    let resumed = receipt::resumed(|header| header.verb == VERB && header.about.ends_with(&leads_there))?;
    preflight::refuse(&preflight::moved(&facts, &to))?;
    let differences = planner::differences(&from.host, &to.host);
    let mut report = Report {
        ip: to.host.ip,
        registry: to.host.registry(),
        differences: differences.clone(),
        changed: 0,
        same: 0,
        seen: Seen::default(),
        seconds: 0.0,
        steps: Vec::new(),
        urls: to.urls(),
        report: None,
    };
    if to.host == from.host && resumed.is_none() {
        report.seconds = start.elapsed().as_secs_f64();
        ui.report(&report, text);
        return Ok(());
    }
    let about = match resumed {
        Some(receipt) => receipt.header.about,
        None => format!("{} to {}", from.host.registry(), to.host.registry()),
    };
    let plan = planner::plan(&from.host, &to, about, standing(&from, &[]).await?)?;
    let host = Host { coming: Some(&to), ..Host::new(ui) };
    if args.change.dry_run {
        let dry_run = DryRun { plan: apply::preview(&plan, &host).await?, differences };
        ui.report(&dry_run, |d| format!("{}{}", lines(&d.differences), d.plan.text()));
        return Ok(());
    }
    for line in &differences {
        ui.say(line);
    }
    ui.confirm(&format!("reconfigure {} while it serves?", plan.about), args.change.yes)?;
    let told = Told {
        detail: plan.about.clone(),
        differences: &differences,
        reason: &args.change.reason,
        before: from.host.registry(),
        numbers: BTreeMap::new(),
    };
    let applied = watched::apply(&plan, host, &from, &from.host.bundle, told).await?;
    report.seen = applied.seen;
    (report.changed, report.same) = (applied.summary.done.len(), applied.summary.same);
    report.steps = applied.summary.done;
    report.report = Some(applied.page);
    report.seconds = start.elapsed().as_secs_f64();
    ui.report(&report, text);
    Ok(())
}

fn text(r: &Report) -> String {
    let Some(page) = &r.report else {
        return format!(
            "{} is this host's address, its registry is {}: nothing was changed",
            r.ip, r.registry
        );
    };
    let urls: Vec<String> = r.urls.iter().map(|u| format!("\nserving  {u}")).collect();
    format!(
        "{} is this host's address now, its registry is {} ({:.1} s, {} steps done, {} found)\n\
         watched  {}{}\nreport   {}\n\
         next     zd status; containers take the new name of their image with their next deploy",
        r.ip,
        r.registry,
        r.seconds,
        r.changed,
        r.same,
        r.seen,
        urls.concat(),
        Path::new(page).display()
    )
}
