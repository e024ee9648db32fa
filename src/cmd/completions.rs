//! `zd completions`: for the shell.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::error::Result;

/// Print completions for a shell
#[derive(clap::Args)]
#[command(after_help = "Example:\n  zd completions bash > /etc/bash_completion.d/zd")]
pub struct Args {
    shell: Shell,
}

pub fn run(args: Args) -> Result<()> {
    clap_complete::generate(args.shell, &mut super::Cli::command(), "zd", &mut std::io::stdout());
    Ok(())
}
