//! `zd repair`: stores of Consul and Nomad that are broken are begun anew, while the services serve.
//! diagnose -> plan -> confirm -> apply.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use jiff::Timestamp;
use serde::Serialize;

use super::{ChangeArgs, restore, upgrade};
use crate::apply;
use crate::audit::{self, Event};
use crate::bundle::manifest::Engine;
use crate::error::{Code, OrCode, Result};
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::stores::{self, Broken};
use crate::host::{Host, fs, jobs, nomad, paths};
use crate::ids::Name;
use crate::plan::Step;
use crate::plan::repair::{self as planner, Goal, Goals, Rebuild};
use crate::plan::restore::Serving;
use crate::receipt::{self, Receipt};
use crate::service::cluster;
use crate::ui::Ui;

pub const VERB: &str = "repair";

/// Begin broken stores of Consul and Nomad anew, from what zd knows, while the services serve
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  sudo zd repair --dry-run\n  sudo zd repair\n  \
                        sudo zd repair nomad      though no store of it looks broken\n\n\
                        What was there is put aside in /var/lib/zd/aside. Tokens, keys and values that others than zd have made \
                        in Consul or Nomad come back with zd restore.")]
pub struct Args {
    /// Begin the stores of these anew, broken or not
    #[arg(value_parser = ["nomad", "consul"], value_name = "nomad|consul")]
    products: Vec<String>,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Report {
    /// Stores that were broken, and how.
    broken: Vec<String>,
    /// Where what was there is now.
    aside: Vec<PathBuf>,
    changed: usize,
    same: usize,
    seconds: f64,
    steps: Vec<apply::Done>,
    /// The last backup: it has what others than zd have made.
    backup: Option<super::backup::Last>,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let start = Instant::now();
    let _lock = if args.change.dry_run { None } else { Some(HostLock::take(VERB, ui)?) };
    let installed = Installed::require()?;
    if installed.lock.engine == Engine::Docker {
        return Err(Code::Usage
            .err("the docker engine has no stores of Consul and Nomad")
            .cure("zd doctor says what is wrong with this host"));
    }
    let resumed = receipt::resumed(|header| header.verb == VERB)?;
    let broken = stores::diagnose(&installed).await?;
    let rebuild = rebuild(&args.products, &broken, resumed.as_ref());
    let host = Host { verb: VERB, ..Host::new(ui) };
    let standing = upgrade::standing(&installed, &[]).await?;
    let serving = serving(&installed, &rebuild, resumed.is_some()).await?;
    let goals = goals(&serving, resumed.is_some())?;
    let plan = planner::plan(&installed, &rebuild, &broken, &goals, &serving, standing)?;
    if args.change.dry_run {
        let preview = apply::preview(&plan, &host).await?;
        ui.report(&preview, apply::Preview::text);
        return Ok(());
    }
    let mut report = Report {
        broken: broken.iter().map(Broken::what).collect(),
        aside: Vec::new(),
        changed: 0,
        same: 0,
        seconds: 0.0,
        steps: Vec::new(),
        backup: super::backup::last()?,
    };
    if !rebuild.is_empty() {
        report.broken.iter().for_each(|what| ui.warn(what));
        let question = format!("begin the stores of {} anew, while it serves?", plan.about);
        ui.confirm(&question, args.change.yes)?;
        let event = |outcome, detail| {
            let reason = args.change.reason.as_str();
            audit::append(Event { verb: VERB, outcome, reason, detail, ..Event::default() })
        };
        let detail = format!("{}: {}", plan.about, report.broken.join("; "));
        event("begun", detail.clone())?;
        let summary = match apply::apply(&plan, &host, None).await {
            Ok(summary) => summary,
            Err(e) => {
                event("failed", e.what.clone())?;
                let cure = e.cure.clone().unwrap_or_default();
                return Err(e.cure(format!("{cure}; then zd repair again: it goes on where it stopped")));
            }
        };
        event("done", detail)?;
        report.aside = plan.steps.iter().filter_map(aside).filter(|path| path.is_dir()).collect();
        (report.changed, report.same, report.steps) = (summary.done.len(), summary.same, summary.done);
    }
    // Also where a run was killed behind the end of its receipt.
    cluster::tell_all(&installed, ui).await?;
    report.seconds = start.elapsed().as_secs_f64();
    ui.report(&report, text);
    Ok(())
}

/// What each service has now. A server of Nomad that begins anew has never heard of the allocations before it; one that an
/// interrupted run has begun anew knows those of the slots that were filled since.
async fn serving(
    installed: &Installed,
    rebuild: &[Rebuild],
    resumed: bool,
) -> Result<BTreeMap<Name, Serving>> {
    let mut all = restore::serving(installed).await?;
    if !rebuild.contains(&Rebuild::Nomad) {
        return Ok(all);
    }
    for (name, service) in &mut all {
        service.adopted.clear();
        for (slot, containers) in service.containers.iter().filter(|_| resumed) {
            let known = jobs::allocation_ids(&nomad::connect()?, &paths::job(name, *slot)).await;
            let known = known.unwrap_or_default();
            if !containers.is_empty() && containers.iter().all(|c| known.contains(&c.allocation)) {
                service.adopted.insert(*slot);
            }
        }
    }
    Ok(all)
}

/// Where each service comes back to: where it is, or what an interrupted run found.
fn goals(serving: &BTreeMap<Name, Serving>, resumed: bool) -> Result<Goals> {
    let path = planner::goals_file();
    if let Some(bytes) = fs::read_if_any(&path)?.filter(|_| resumed) {
        return serde_json::from_slice(&bytes).or_code(Code::Io, path.display());
    }
    let goal = |(name, service): (&Name, &Serving)| {
        let active = service.active.ok_or_else(|| {
            Code::Io
                .err(format!("{name} has no pointer: what serves is not known"))
                .cure("zd restore of a backup brings it back")
        })?;
        Ok((name.clone(), Goal { active, state: service.state.clone() }))
    };
    Ok(Goals { begun: Timestamp::now(), services: serving.iter().map(goal).collect::<Result<_>>()? })
}

/// What an interrupted run has begun goes on: by then its stores may look whole.
fn rebuild(asked: &[String], broken: &[Broken], resumed: Option<&Receipt>) -> Vec<Rebuild> {
    let mut all: BTreeSet<Rebuild> = broken.iter().map(Rebuild::of).collect();
    let begun = |rebuild: &Rebuild| {
        let title =
            Step::Rebuild { product: rebuild.product(), stores: Vec::new(), aside: PathBuf::new() }.title();
        resumed.is_some_and(|receipt| receipt.steps.iter().any(|step| step.step == title))
    };
    let asked = |rebuild: &Rebuild| asked.iter().any(|product| product == rebuild.product().as_str());
    all.extend(
        [Rebuild::Consul, Rebuild::Nomad].into_iter().filter(|rebuild| asked(rebuild) || begun(rebuild)),
    );
    if all.contains(&Rebuild::Nomad) {
        all.remove(&Rebuild::NomadClient);
    }
    all.into_iter().collect()
}

fn aside(step: &Step) -> Option<PathBuf> {
    match step {
        Step::Rebuild { aside, .. } => Some(aside.clone()),
        _ => None,
    }
}

fn text(r: &Report) -> String {
    if r.changed == 0 {
        return "no store of Consul or Nomad is broken: nothing was changed".into();
    }
    let aside = r.aside.iter().map(|path| format!("\naside   {}", path.display()));
    let backup = r.backup.as_ref().map_or(String::new(), |last| {
        format!(
            "\nbackup  {} of {} has what others have made in Consul and Nomad: zd restore brings it back",
            last.file.display(),
            last.at.strftime("%F %T")
        )
    });
    format!(
        "repaired in {:.1} s ({} steps done, {} found){}{backup}\nnext    zd status; what is aside in {} may be removed then",
        r.seconds,
        r.changed,
        r.same,
        aside.collect::<String>(),
        paths::ASIDE
    )
}
