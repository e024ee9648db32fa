//! zd carries a zero-downtime stack into places without a network. See ARCHITECTURE.md.

mod apply;
mod assets;
mod audit;
mod backup;
mod bundle;
mod cmd;
mod error;
mod facts;
mod failpoint;
mod host;
mod ids;
mod loadtest;
mod plan;
mod receipt;
mod report;
mod role;
mod service;
mod ui;
mod units;
mod who;

use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches};

use crate::error::{Code, OrCode, Result};

fn main() -> ExitCode {
    // Whatever its caller's, no file of zd's is for others to write.
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(umask | rustix::fs::Mode::from_raw_mode(0o022));
    let mut words = std::env::args_os().collect();
    let role = match role::Role::taken(&mut words) {
        Ok(role) => role,
        Err(e) => {
            ui::Ui::new(false, false).error(&e);
            return ExitCode::from(e.code.exit());
        }
    };
    let matches = cmd::Cli::command().get_matches_from(words);
    let cli = cmd::Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let ui = ui::Ui::new(cli.json, cli.quiet);
    let (verb, given) = matches.subcommand().expect("clap asks for one");
    match run(role, verb, given, cli.command, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            ui.error(&e);
            audit::refused(verb, &e, &ui);
            ExitCode::from(e.code.exit())
        }
    }
}

fn run(
    role: Option<role::Role>,
    verb: &str,
    given: &ArgMatches,
    command: cmd::Command,
    ui: &ui::Ui,
) -> Result<()> {
    if let Some(role) = role {
        role.may(verb, given)?;
        host::operators::check_caller(role)?;
    }
    host::raise_open_files();
    // The one TLS provider; must stand before the first client is built.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.or_code(Code::Io, "starting the runtime")?;
    if let Ok(Some(key)) = given.try_get_one::<String>("key") {
        audit::key_given(verb, key, ui);
    }
    runtime.block_on(cmd::run(command, ui))
}
