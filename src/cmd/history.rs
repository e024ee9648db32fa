//! `zd history`: who did what, when, why, from which bytes to which; chain and signature are checked each time.

use serde::Serialize;

use crate::audit::{self, Record};
use crate::error::Result;
use crate::ui::Ui;

/// Show the audit log and check that nobody altered it
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd history\n  zd history --last 5\n  zd history --json | jq '.records[].to.digest'"
)]
pub struct Args {
    /// Only the last N records
    #[arg(long, value_name = "N")]
    last: Option<usize>,
}

#[derive(Serialize)]
struct Report {
    chain: &'static str,
    /// Id of the key that the last record is signed with.
    signed_by: Option<String>,
    total: usize,
    records: Vec<Record>,
}

pub fn run(args: Args, ui: &Ui) -> Result<()> {
    let mut records = audit::read()?;
    let total = records.len();
    if let Some(last) = args.last {
        records.drain(..total.saturating_sub(last));
    }
    let signed_by = audit::signed_by();
    let key = signed_by.as_ref().ok().cloned().flatten();
    ui.report(&Report { chain: "whole", signed_by: key, total, records }, text);
    signed_by.map(drop)
}

/// With whom sudo named, where that is somebody else.
fn who(record: &Record) -> String {
    let sudo_user = record.who.as_ref().and_then(|who| who.sudo_user.as_ref());
    match sudo_user.filter(|user| **user != record.by) {
        Some(user) => format!("{} (SUDO_USER {user})", record.by),
        None => record.by.clone(),
    }
}

fn text(r: &Report) -> String {
    let mut table = super::status::table(["#", "when (UTC)", "who", "what", "from", "to", "why"]);
    for record in &r.records {
        let side = |release: &Option<audit::Release>| match release {
            Some(r) => format!("{} {} {}", r.slot, r.version, r.digest.short()),
            None => String::new(),
        };
        let why = if record.reason.is_empty() { &record.detail } else { &record.reason };
        table.add_row([
            record.seq.to_string(),
            record.at.strftime("%F %T").to_string(),
            who(record),
            format!("{} {}", record.verb, record.outcome),
            side(&record.from),
            side(&record.to),
            why.lines().next().unwrap_or_default().chars().take(60).collect(),
        ]);
    }
    let signed = r.signed_by.iter().map(|key| format!("signed with key {key}, ")).collect::<String>();
    format!("{table}\n{} records, {signed}chain {}", r.total, r.chain)
}
