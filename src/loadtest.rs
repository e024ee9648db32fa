//! An open-loop HTTP load generator: request i is due at start + i/rate, whatever became of the others.
//!
//! All requests are made by one thread with its own single-threaded runtime, so nothing is shared and
//! the zd process around it cannot disturb the timing. A second thread does nothing but sleep until
//! requests are due and then wake the first: tokio's own timers are a millisecond coarse, which would
//! show in every latency. Nothing is ever retried. Above 2,000 requests a second they are due in
//! bursts, every 500 µs (due times round up to that grid); latencies count from there, so whatever
//! lateness this machine adds is in them.

mod failure;
mod load;
mod mixed;
mod plan;
mod report;
mod schedule;
mod tally;

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::LocalSet;

use load::Load;
use plan::Plan;
pub use report::{FailureSample, Report};
use tally::Tally;

/// How often the progress is told.
const TICK: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Connections are used again and again
    Keepalive,
    /// Each request opens its own connection
    Fresh,
    /// Every other request opens its own connection
    Mixed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    Get,
    Post,
    /// GET and POST in turn
    Mixed,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub target: SocketAddr,
    /// The Host header.
    pub host: String,
    pub path: String,
    /// Requests per second.
    pub rate: u32,
    pub duration: Duration,
    pub mode: Mode,
    pub method: Method,
    /// The size of a POST's body.
    pub body_bytes: usize,
    /// For one request, opening its connection included.
    pub timeout: Duration,
    /// How many requests may be under way at once, so also how many connections are kept open. Beyond
    /// it requests wait; their latency counts from their due time all the same.
    pub connections: usize,
    pub version_header: String,
    pub expect_changes: Option<usize>,
}

/// How far a run is; for a progress bar.
#[derive(Debug, Default)]
pub struct Tick {
    pub done: u64,
    pub failed: u64,
    /// The version that the newest answer named.
    pub version: String,
}

impl Options {
    /// What is wrong with these options, if anything is.
    pub fn check(&self) -> Result<(), String> {
        Plan::new(self).map(drop)
    }

    /// How many requests the run makes.
    pub fn requests(&self) -> u64 {
        u64::try_from(u128::from(self.rate) * self.duration.as_micros() / 1_000_000).unwrap_or(u64::MAX)
    }
}

/// Makes the load and reports what came of it; `tick` is called five times a second meanwhile.
///
/// An interrupt (SIGINT) is the end of the load: what is under way is waited for, and the report made.
/// Dropping the future ends it without one.
pub async fn run(o: &Options, tick: impl Fn(&Tick)) -> Report {
    let live = Arc::new(Live::default());
    let _stop = StopOnDrop(Arc::clone(&live));
    let (report, mut reported) = oneshot::channel();
    let thread = {
        let (o, live) = (o.clone(), Arc::clone(&live));
        thread::Builder::new().name("loadtest".to_owned()).spawn(move || {
            // The receiver is gone only when nobody wants the report any more.
            let _ = report.send(generate(&o, live));
        })
    };
    if let Err(e) = thread {
        return nothing_sent(o, format!("no thread for the load: {e}"));
    }
    let mut ticks = tokio::time::interval(TICK);
    let mut interrupt = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            biased;
            _ = &mut interrupt, if !live.enough.load(Relaxed) => live.enough.store(true, Relaxed),
            done = &mut reported => break match done {
                Ok(Ok(report)) => report,
                Ok(Err(what)) => nothing_sent(o, what),
                Err(_) => nothing_sent(o, "the load's thread died".to_owned()),
            },
            _ = ticks.tick() => tick(&live.tick()),
        }
    }
}

/// The report of a run that could not begin.
fn nothing_sent(o: &Options, detail: String) -> Report {
    let mut tally = Tally::new(0);
    tally.not_sent = o.requests();
    tally.show(FailureSample {
        at_s: 0.0,
        kind: "not-sent".to_owned(),
        detail,
        method: "-",
        connection: "-",
    });
    tally.report(o)
}

/// What the generating thread tells the outside while it runs.
#[derive(Default)]
struct Live {
    done: AtomicU64,
    failed: AtomicU64,
    version: Mutex<String>,
    /// No more requests; the answers to those before are waited for.
    enough: AtomicBool,
    /// Nobody wants to know any more.
    stop: AtomicBool,
}

impl Live {
    fn goes_on(&self) -> bool {
        !self.enough.load(Relaxed) && !self.stop.load(Relaxed)
    }

    fn tick(&self) -> Tick {
        Tick {
            done: self.done.load(Relaxed),
            failed: self.failed.load(Relaxed),
            version: self.version.lock().map(|v| v.clone()).unwrap_or_default(),
        }
    }
}

struct StopOnDrop(Arc<Live>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop.store(true, Relaxed);
    }
}

/// The whole run, on the thread made for it.
fn generate(o: &Options, live: Arc<Live>) -> Result<Report, String> {
    let plan = Plan::new(o)?;
    allow_many_files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("no runtime for the load: {e}"))?;
    LocalSet::new().block_on(&runtime, async {
        let idle = plan.warm_up(o).await;
        Load::new(plan, idle, live, o).make(o).await
    })
}

/// Sockets are files, and many systems allow 1,024 by default. What is refused shows as `not_sent`.
fn allow_many_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}
