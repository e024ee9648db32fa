//! `zd operator`: who may run zd without being root, and in which role.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::audit::{self, Event};
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::operators;
use crate::role::Role;
use crate::ui::Ui;

const VERB: &str = "operator";

/// Let users run zd without root, each in a role: viewer, operator or admin
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd operator add kim --role operator     from kim's next login on: sudo zd as operator switch\n  \
                        zd operator remove kim\n  zd operator list --json"
)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Give a user a role, instead of the one he has
    Add {
        /// A user that this host knows
        name: String,
        #[arg(long)]
        role: Role,
        /// Why; goes to the audit log
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
    },
    /// Take a user's role; it ends at once, in open sessions too
    Remove {
        name: String,
        /// Why; goes to the audit log
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
    },
    /// Show who has which role
    List,
}

#[derive(Serialize)]
struct Report {
    operators: BTreeMap<String, Role>,
    /// Roles whose file for sudo is not the one that zd writes.
    altered: Vec<Role>,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    match args.what {
        What::List => {}
        What::Add { name, role, reason } => {
            let _lock = HostLock::take(VERB, ui)?;
            Installed::require()?;
            operators::check_sudo()?;
            operators::check(&name).await?;
            written("add", &reason, &name, role, operators::add(&name, role).await)?;
            ui.done(format!("from the next login of {name} on: sudo zd as {} status", role.name()));
        }
        What::Remove { name, reason } => {
            let _lock = HostLock::take(VERB, ui)?;
            let mut had = None;
            for role in Role::ALL {
                if operators::take(&name, role).await? {
                    written("remove", &reason, &name, role, Ok(()))?;
                    had = Some(role);
                }
            }
            if had.is_none() {
                return Err(Code::Usage
                    .err(format!("{name} has no role here"))
                    .cure("zd operator list shows who has one"));
            }
        }
    }
    let mut report = Report { operators: BTreeMap::new(), altered: Vec::new() };
    for role in Role::ALL {
        let Some(members) = operators::members(role)? else { continue };
        report.operators.extend(members.into_iter().map(|name| (name, role)));
        // Only root reads it.
        if rustix::process::geteuid().is_root() && !operators::rule_stands(role)? {
            report.altered.push(role);
        }
    }
    ui.report(&report, text);
    Ok(())
}

fn written(what: &str, reason: &str, name: &str, role: Role, done: Result<()>) -> Result<()> {
    let (outcome, why) = match &done {
        Ok(()) => ("done", String::new()),
        Err(e) => ("failed", format!(": {}", e.what)),
    };
    let detail = format!("{what} {name}, {}{why}", role.name());
    audit::append(Event { verb: VERB, outcome, reason, detail, ..Event::default() })?;
    done
}

fn text(r: &Report) -> String {
    let mut table = super::status::table(["user", "role"]);
    for (name, role) in &r.operators {
        table.add_row([name.as_str(), role.name()]);
    }
    let altered = r.altered.iter().map(|role| {
        let name = role.name();
        format!("\nthe file of role {name} in /etc/sudoers.d was altered: zd operator add USER --role {name} writes it anew")
    });
    format!("{table}{}", altered.collect::<String>())
}
