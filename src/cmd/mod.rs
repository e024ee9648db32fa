//! The command line: one file per verb, each with its `Args` and a `run` that reads as its pipeline.

pub mod backup;
pub mod check_stores;
pub mod completions;
pub mod deploy;
pub mod doctor;
pub mod gc;
pub mod generations;
pub mod history;
pub mod inspect;
pub mod install;
pub mod keygen;
pub mod loadtest;
pub mod logs;
pub mod man;
pub mod operator;
pub mod pack;
pub mod publish;
pub mod reconfigure;
pub mod reload;
pub mod repair;
pub mod restore;
pub mod rollback;
pub mod scale;
pub mod secrets;
pub mod settle;
pub mod status;
pub mod support;
pub mod switch;
pub mod trust;
pub mod undo;
pub mod uninstall;
pub mod upgrade;
pub mod verify;
mod watched;

use clap::{Parser, Subcommand};

use crate::error::Result;
use crate::ui::Ui;

#[derive(Parser)]
#[command(
    name = "zd",
    version,
    about = "Carries a zero-downtime stack into places without a network",
    after_help = "Exit codes: 0 done; 1 fault of zd; 2 usage, or not in the role; 3 manifest or source; 4 bundle or signature; \
                  5 host not fit; 6 file, disk or command; 7 docker, registry, Nomad, Consul or nginx; \
                  8 unhealthy, not drained, unverified; 9 locked, unfinished, or another bundle is installed; 10 not installed, unknown version; \
                  11 audit chain broken; 12 load test failed",
    max_term_width = 110
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Print the report as JSON on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Say nothing but warnings and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

#[derive(Subcommand)]
pub enum Command {
    Keygen(keygen::Args),
    Pack(pack::Args),
    Inspect(inspect::Args),
    Verify(verify::Args),
    Doctor(doctor::Args),
    Install(install::Args),
    Upgrade(upgrade::Args),
    Generations(generations::Args),
    Gc(gc::Args),
    Reconfigure(reconfigure::Args),
    Status(status::Args),
    Deploy(deploy::Args),
    Switch(switch::Args),
    Rollback(rollback::Args),
    Scale(scale::Args),
    Secrets(secrets::Args),
    Trust(trust::Args),
    Backup(backup::Args),
    Restore(restore::Args),
    Repair(repair::Args),
    History(history::Args),
    Logs(logs::Args),
    Support(support::Args),
    Loadtest(loadtest::Args),
    Operator(operator::Args),
    Undo(undo::Args),
    Uninstall(uninstall::Args),
    #[command(hide = true)]
    CheckStores(check_stores::Args),
    #[command(hide = true)]
    Publish(publish::Args),
    #[command(hide = true)]
    Reload(reload::Args),
    #[command(hide = true)]
    Settle(settle::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Flags of every verb that changes the host.
#[derive(clap::Args, Clone, Default)]
pub struct ChangeArgs {
    /// Print the plan that the run would apply, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Why; goes to the audit log
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub reason: String,
}

/// Indented, one below the other.
fn lines(differences: &[String]) -> String {
    differences.iter().map(|line| format!("  {line}\n")).collect()
}

pub async fn run(command: Command, ui: &Ui) -> Result<()> {
    match command {
        Command::Keygen(args) => keygen::run(args, ui),
        Command::Pack(args) => pack::run(args, ui).await,
        Command::Inspect(args) => inspect::run(args, ui),
        Command::Verify(args) => verify::run(args, ui),
        Command::Doctor(args) => doctor::run(args, ui).await,
        Command::Install(args) => install::run(args, ui).await,
        Command::Upgrade(args) => upgrade::run(args, ui).await,
        Command::Gc(args) => gc::run(args, ui).await,
        Command::Reconfigure(args) => reconfigure::run(args, ui).await,
        Command::Generations(args) => generations::run(args, ui),
        Command::Status(args) => status::run(args, ui).await,
        Command::Deploy(args) => deploy::run(args, ui).await,
        Command::Switch(args) => switch::run(args, ui).await,
        Command::Rollback(args) => rollback::run(args, ui).await,
        Command::Scale(args) => scale::run(args, ui).await,
        Command::Secrets(args) => secrets::run(args, ui).await,
        Command::Trust(args) => trust::run(args, ui),
        Command::Backup(args) => backup::run(args, ui).await,
        Command::Restore(args) => restore::run(args, ui).await,
        Command::Repair(args) => repair::run(args, ui).await,
        Command::CheckStores(args) => check_stores::run(args).await,
        Command::History(args) => history::run(args, ui),
        Command::Logs(args) => logs::run(args, ui).await,
        Command::Support(args) => support::run(args, ui).await,
        Command::Loadtest(args) => loadtest::run(args, ui).await,
        Command::Operator(args) => operator::run(args, ui).await,
        Command::Undo(args) => undo::run(args, ui).await,
        Command::Uninstall(args) => uninstall::run(args, ui).await,
        Command::Publish(args) => publish::run(args, ui).await,
        Command::Reload(args) => reload::run(args, ui).await,
        Command::Settle(args) => settle::run(args, ui).await,
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
    }
}
