//! Commands of the host: argument vectors, never shell strings; output captured; environment fixed. Whoever called zd
//! decides neither which program runs nor what it reads out of its environment.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use crate::error::{Code, Result};

/// Not /usr/local, which users of Debian's group staff may write to.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A program of the host by its name.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs([
        ("PATH", PATH),
        ("HOME", "/root"),
        ("LC_ALL", "C.UTF-8"),
        ("DEBIAN_FRONTEND", "noninteractive"),
    ]);
    command
}

pub struct Output {
    pub ok: bool,
    pub stdout: String,
    pub stderr: String,
}

/// Runs to its end whatever its exit code; only not being able to start is an error.
pub async fn try_run<S: AsRef<OsStr>>(argv: &[S]) -> Result<Output> {
    let shown = show(argv);
    let (program, args) = argv.split_first().ok_or_else(|| Code::Bug.err("an empty command"))?;
    let output = tokio::process::Command::from(command(program))
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| {
            Code::Command
                .err(format!("{shown}: {e}"))
                .cure(format!("install the missing program; it is looked for in {PATH}"))
        })?;
    Ok(Output {
        ok: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs; a non-zero exit is an error with the last lines it said. Returns stdout.
pub async fn run<S: AsRef<OsStr>>(argv: &[S]) -> Result<String> {
    let out = try_run(argv).await?;
    if out.ok {
        return Ok(out.stdout);
    }
    let said = if out.stderr.trim().is_empty() { &out.stdout } else { &out.stderr };
    Err(Code::Command.err(format!("{} failed: {}", show(argv), last_lines(said, 6))))
}

pub fn last_lines(text: &str, n: usize) -> String {
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(n)..].join(" | ")
}

fn show<S: AsRef<OsStr>>(argv: &[S]) -> String {
    let words: Vec<_> = argv.iter().map(|a| a.as_ref().to_string_lossy().into_owned()).collect();
    let text = words.join(" ");
    if text.len() > 160 { format!("{} …", text.chars().take(160).collect::<String>()) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_of_the_callers_environment_gets_through() {
        let told = run(&["env"]).await.unwrap();
        let mut names: Vec<&str> = told.lines().filter_map(|l| Some(l.split_once('=')?.0)).collect();
        names.sort_unstable();
        assert_eq!(names, ["DEBIAN_FRONTEND", "HOME", "LC_ALL", "PATH"]);
    }
}
