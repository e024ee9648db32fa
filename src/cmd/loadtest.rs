//! `zd loadtest`: a steady load on a service, with or without switches under it, and what clients saw.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytesize::ByteSize;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::error::{Code, OrCode, Result};
use crate::loadtest::{self, Method, Mode, Options, Report};
use crate::ui::Ui;
use crate::units;

const EXAMPLES: &str = "\
Examples:
  zd loadtest http://10.0.0.5/hello
  zd loadtest http://localhost:8080/hello --rate 10000 --duration 10s
  zd loadtest http://localhost/hello --mode mixed --method mixed --body 16KiB
  zd loadtest http://localhost/hello --switch-at 5s,10s --service hello

The load is open: each request is sent when it is due, however slow the earlier answers are, and \
nothing is retried. Ctrl-C ends it early, with its report. Exit code 12 says that a request failed, that one could not be sent, that versions \
were mixed, or that there were not as many changes of version as expected.";

#[derive(Debug, clap::Args)]
/// Load a service: open loop, no retries; report failures, versions seen, mixed answers
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// http://ADDRESS[:PORT]/PATH; the address is an IP address or localhost
    url: String,
    /// Requests per second
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// How long: 500ms, 30s, 5m, 2h
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    duration: Duration,
    /// How connections are used
    #[arg(long, value_enum, default_value = "keepalive")]
    mode: Mode,
    /// The requests' method
    #[arg(long, value_enum, default_value = "get")]
    method: Method,
    /// Size of a POST's body
    #[arg(long, value_name = "SIZE", default_value = "1KiB")]
    body: ByteSize,
    /// How long a request may take
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    timeout: Duration,
    /// How many requests may be under way at once; more wait for their turn
    #[arg(long, value_name = "N", default_value_t = 1000)]
    connections: usize,
    /// The Host header, where it is not the URL's
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// The header in which answers name their version
    #[arg(long, value_name = "NAME", default_value = "X-Version")]
    version_header: String,
    /// How many changes of version there must be [default: as many as --switch-at makes]
    #[arg(long, value_name = "N")]
    expect_changes: Option<usize>,
    /// Run `zd switch` at these times of the run, like 5s,10s
    #[arg(long, value_name = "TIME", value_delimiter = ',', value_parser = units::duration)]
    switch_at: Vec<Duration>,
    /// The service that --switch-at switches
    #[arg(long, value_name = "NAME", requires = "switch_at")]
    service: Option<String>,
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let options = options(&args)?;
    let mut at = args.switch_at;
    at.sort();
    let ended = Notify::new();
    let load = async {
        let report = load(&options, ui).await;
        ended.notify_one();
        report
    };
    let (mut report, switches) = tokio::join!(load, switches(&at, args.service.as_deref(), &ended, ui));
    report.switches = switches;
    ui.report(&report, Report::text);
    if report.passed() { Ok(()) } else { Err(failed(&report)) }
}

fn options(args: &Args) -> Result<Options> {
    let url = Url::parse(&args.url)?;
    if let Some(at) = args.switch_at.iter().find(|at| **at >= args.duration) {
        return Err(Code::Usage
            .err(format!("--switch-at {at:?} is not before the end of the load ({:?})", args.duration))
            .cure("give an earlier time, or a longer --duration"));
    }
    let switches = (!args.switch_at.is_empty()).then_some(args.switch_at.len());
    let options = Options {
        target: url.target,
        host: args.host.clone().unwrap_or(url.host),
        path: url.path,
        rate: args.rate,
        duration: args.duration,
        mode: args.mode,
        method: args.method,
        body_bytes: usize::try_from(args.body.as_u64()).unwrap_or(usize::MAX),
        timeout: args.timeout,
        connections: args.connections,
        version_header: args.version_header.clone(),
        expect_changes: args.expect_changes.or(switches),
    };
    options.check().map_err(|what| Code::Usage.err(what))?;
    Ok(options)
}

async fn load(options: &Options, ui: &Ui) -> Report {
    let bar = ui.count("requests", options.requests());
    let report = loadtest::run(options, |tick| {
        bar.set_position(tick.done);
        bar.set_message(match tick.failed {
            0 => format!("requests, {}", tick.version),
            failed => format!("{failed} FAILED, {}", tick.version),
        });
    });
    let report = report.await;
    bar.finish_and_clear();
    report
}

/// Runs `zd switch` at each of these times, and collects what it reports. A switch that fails does not
/// end the load: it shows in the report, and as a change of version that is missing. After the load there is none.
async fn switches(at: &[Duration], service: Option<&str>, ended: &Notify, ui: &Ui) -> Vec<Value> {
    let start = tokio::time::Instant::now();
    let mut reports = Vec::new();
    for at in at {
        tokio::select! {
            () = tokio::time::sleep_until(start + *at) => {}
            () = ended.notified() => break,
        }
        let report = switch(service).await.unwrap_or_else(|e| json!({ "exit": null, "report": e.what }));
        if report["exit"] != 0 {
            ui.warn(format!("zd switch failed {at:?} into the load: {report}"));
        }
        reports.push(report);
    }
    reports
}

/// One `zd switch`, as a process of its own, just as a person would run it.
async fn switch(service: Option<&str>) -> Result<Value> {
    let exe = std::env::current_exe().or_code(Code::Command, "finding zd's own file to run zd switch")?;
    let output = tokio::process::Command::new(exe)
        .arg("switch")
        .args(service)
        .args(["--json", "--yes"])
        .stdin(std::process::Stdio::null())
        .output()
        .await
        .or_code(Code::Command, "running zd switch")?;
    // On failure this is the error as JSON; if it is neither, what it said is all there is.
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&output.stderr).trim()));
    Ok(json!({ "exit": output.status.code(), "report": report }))
}

fn failed(report: &Report) -> crate::error::Error {
    let mut what = Vec::new();
    let mut note = |n: u64, text: &str| {
        if n > 0 {
            what.push(format!("{n} {text}"));
        }
    };
    note(report.failed, "requests failed");
    note(report.not_sent, "requests could not be sent");
    note(report.mixed, "answers were of a version already replaced");
    let seen = report.changes.len();
    if let Some(expected) = report.expected_changes.filter(|n| *n != seen) {
        what.push(format!("{seen} changes of version instead of {expected}"));
    }
    let e = Code::LoadFailed.err(format!("{}: {}", report.target, what.join(", ")));
    if report.failed == 0 && report.mixed == 0 && report.not_sent > 0 {
        return e.cure("this says nothing about the service: lower --rate, or raise --connections");
    }
    e
}

/// The parts of an `http://` URL that a load needs.
#[derive(Debug, PartialEq)]
struct Url {
    target: SocketAddr,
    host: String,
    path: String,
}

impl Url {
    fn parse(url: &str) -> Result<Url> {
        let Some(rest) = url.strip_prefix("http://") else {
            return Err(Code::Usage
                .err(format!("{url}: not an http:// URL"))
                .cure("write it like http://10.0.0.5:8080/hello (the load test speaks plain HTTP)"));
        };
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (host, path) = rest.split_at(end);
        let target = address(host).ok_or_else(|| {
            Code::Usage
                .err(format!(
                    "{url}: {host:?} is neither an IP address nor localhost, with or without a port"
                ))
                .cure("zd looks up no names: write the address, and the name with --host if it matters")
        })?;
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Url { target, host: host.to_owned(), path: format!("{slash}{path}") })
    }
}

/// `1.2.3.4`, `[::1]` or `localhost`, with a port or without (80).
fn address(host: &str) -> Option<SocketAddr> {
    if let Ok(address) = host.parse() {
        return Some(address);
    }
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, port.parse().ok()?),
        _ => (host, 80),
    };
    let ip = match name {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        _ => match name.strip_prefix('[') {
            Some(v6) => IpAddr::V6(v6.strip_suffix(']')?.parse().ok()?),
            None => IpAddr::V4(name.parse().ok()?),
        },
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let read = |url| Url::parse(url).map(|u| format!("{} {} {}", u.target, u.host, u.path)).ok();
        let is = |url, expected: &str| assert_eq!(read(url).as_deref(), Some(expected), "{url}");
        is("http://10.0.0.5/hello", "10.0.0.5:80 10.0.0.5 /hello");
        is("http://10.0.0.5:8080", "10.0.0.5:8080 10.0.0.5:8080 /");
        is("http://localhost:81/a?b=c/d", "127.0.0.1:81 localhost:81 /a?b=c/d");
        is("http://localhost?b", "127.0.0.1:80 localhost /?b");
        is("http://[::1]/", "[::1]:80 [::1] /");
        is("http://[::1]:81/", "[::1]:81 [::1]:81 /");
        for bad in [
            "localhost/hello",
            "https://10.0.0.5/",
            "http://fab-host/",
            "http://::1/",
            "http:///hello",
            "http://10.0.0.5:99999/",
            "http://10.0.0.5:/",
            "http://me@10.0.0.5/",
        ] {
            assert_eq!(Url::parse(bad).map_err(|e| e.code), Err(Code::Usage), "{bad}");
        }
    }
}
