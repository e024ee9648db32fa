//! How zd talks: stderr is talk (steps, bars, warnings), stdout is data (one report, text or JSON).

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::error::{Code, Error, Result};

/// Cheap to clone: every part that talks holds one.
#[derive(Clone)]
pub struct Ui {
    json: bool,
    quiet: bool,
    color: bool,
    bars: MultiProgress,
    live: bool,
    /// A report stands on stdout: there is one JSON value, not two.
    reported: Arc<AtomicBool>,
}

impl Ui {
    pub fn new(json: bool, quiet: bool) -> Self {
        let term = std::io::stderr().is_terminal();
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        let live = term && !dumb && !quiet;
        let color = live && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let target = if live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bars = MultiProgress::with_draw_target(target);
        Ui { json, quiet, color, bars, live, reported: Arc::default() }
    }

    fn paint(&self, ansi: &str, text: &str) -> String {
        if self.color { format!("\x1b[{ansi}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn line(&self, text: &str) {
        if self.live {
            let _ = self.bars.println(text);
        } else {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// A line of talk about what is being done.
    pub fn say(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.line(text.as_ref());
        }
    }

    /// A step that is finished: `ok   text`.
    pub fn done(&self, text: impl AsRef<str>) {
        self.say(format!("{} {}", self.paint("32", "ok  "), text.as_ref()));
    }

    /// Shown even when quiet: something the person should know though zd goes on.
    pub fn warn(&self, text: impl AsRef<str>) {
        self.line(&format!("{} {}", self.paint("33", "warning:"), text.as_ref()));
    }

    /// Marks of a check list.
    pub fn mark(&self, good: Option<bool>) -> String {
        match good {
            Some(true) => self.paint("32", "ok  "),
            Some(false) => self.paint("31", "BAD "),
            None => self.paint("33", "note"),
        }
    }

    /// A bar over `total` bytes; hidden off a terminal. Finish it with `finish_and_clear`.
    pub fn bytes(&self, label: impl Into<String>, total: u64) -> ProgressBar {
        self.bar(
            label,
            total,
            "{msg:28!} {bar:24} {bytes:>10}/{total_bytes:<10} {bytes_per_sec:>12} {eta:>4}",
        )
    }

    /// A bar over `total` things.
    pub fn count(&self, label: impl Into<String>, total: u64) -> ProgressBar {
        self.bar(label, total, "{msg:28!} {bar:24} {pos}/{len} {elapsed:>4}")
    }

    /// A spinner for a wait whose length is not known.
    pub fn wait(&self, label: impl Into<String>) -> ProgressBar {
        let bar = self.bar(label, 0, "{spinner} {msg} {elapsed}");
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn bar(&self, label: impl Into<String>, total: u64, template: &str) -> ProgressBar {
        let style = ProgressStyle::with_template(template).expect("template is a constant");
        let bar = self.bars.add(ProgressBar::new(total).with_style(style));
        bar.set_message(label.into());
        bar
    }

    /// The report of a command on stdout: one JSON value with `--json`, else `text`.
    pub fn report<T: Serialize>(&self, report: &T, text: impl FnOnce(&T) -> String) {
        self.reported.store(true, Ordering::Relaxed);
        let mut out = std::io::stdout().lock();
        let shown = if self.json {
            serde_json::to_string_pretty(report).expect("reports are plain data")
        } else {
            text(report)
        };
        let shown = shown.trim_end();
        if !shown.is_empty() {
            // A closed pipe (`zd status | head`) is not an error.
            let _ = writeln!(out, "{shown}");
        }
    }

    /// The error, on stderr; with `--json` also as one JSON object on stdout, unless a report stands there.
    pub fn error(&self, e: &Error) {
        self.line(&format!("{} {}", self.paint("1;31", &format!("error[{}]:", e.code.name())), e.what));
        if let Some(cure) = &e.cure {
            self.line(&format!("  {} {cure}", self.paint("1", "do:")));
        }
        if e.code == Code::Bug {
            self.line("  this is a fault of zd itself: please keep the output and report it");
        }
        if self.json && !self.reported.load(Ordering::Relaxed) {
            let body = serde_json::json!({
                "error": { "code": e.code.name(), "exit": e.code.exit(), "what": e.what, "cure": e.cure }
            });
            let _ = writeln!(std::io::stdout(), "{body:#}");
        }
    }

    /// Asks on a terminal; `yes` answers beforehand. Off a terminal a script has decided already.
    pub fn confirm(&self, question: &str, yes: bool) -> Result<()> {
        if yes || !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
            return Ok(());
        }
        let answer = dialoguer::Confirm::new().with_prompt(question).default(false).interact();
        match answer {
            Ok(true) => Ok(()),
            _ => Err(Code::NotConfirmed
                .err("not confirmed; nothing was changed")
                .cure("--yes skips the question")),
        }
    }
}
