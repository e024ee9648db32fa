//! `zd generations`: what was installed on this host and can be gone back to.

use crate::error::Result;
use crate::host::config::Installed;
use crate::host::generation;
use crate::ui::Ui;

/// List the installed generations; `zd rollback --generation N` goes back to one
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd generations\n  zd generations --json")]
pub struct Args {}

pub fn run(_: Args, ui: &Ui) -> Result<()> {
    Installed::require()?;
    ui.report(&generation::all()?, |all| {
        let lines = all.iter().map(|g| {
            let mark = if g.current { "*" } else { " " };
            let packed = g.packed.strftime("%F");
            format!("{mark} {:>3}  {:<24} packed {packed}  {}\n", g.number, g.bundle, g.id.short())
        });
        lines.collect()
    });
    Ok(())
}
