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
mod service;
mod ui;
mod units;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // Whatever its caller's, no file of zd's is for others to write.
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(umask | rustix::fs::Mode::from_raw_mode(0o022));
    let cli = cmd::Cli::parse();
    let ui = ui::Ui::new(cli.json, cli.quiet);
    host::raise_open_files();
    // The one TLS provider; must stand before the first client is built.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            ui.error(&error::Code::Io.err(format!("starting the runtime: {e}")));
            return ExitCode::from(error::Code::Io.exit());
        }
    };
    match runtime.block_on(cmd::run(cli.command, &ui)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            ui.error(&e);
            ExitCode::from(e.code.exit())
        }
    }
}
