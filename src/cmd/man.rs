//! `zd man`: manual pages, one per verb.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::error::{At, Result};

/// Write the manual pages (zd.1, zd-install.1, …) into a folder
#[derive(clap::Args)]
#[command(after_help = "Example:\n  zd man /usr/local/share/man/man1 && man zd-switch")]
pub struct Args {
    dir: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    std::fs::create_dir_all(&args.dir).at(&args.dir)?;
    clap_mangen::generate_to(super::Cli::command(), &args.dir).at(&args.dir)
}
