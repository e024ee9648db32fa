//! A run in progress: takes requests up when they are due, and books what becomes of them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::{HeaderMap, Request, Response};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::failure::{Failure, Kind};
use super::mixed::Sample;
use super::plan::{Plan, Sender};
use super::report::{FailureSample, Report};
use super::schedule::Schedule;
use super::tally::Tally;
use super::{Live, Method, Mode, Options};

const LATE_US: u64 = 100_000;
/// What an answer without the version header is counted as.
const NO_VERSION: &str = "(none)";

/// A request that is due or was.
#[derive(Clone, Copy)]
struct Due {
    at_us: u64,
    fresh: bool,
    post: bool,
}

/// A good answer, and when it was whole.
struct Answer {
    end_us: u64,
    sender: Sender,
}

/// A run in progress. Everything here lives on one thread.
pub struct Load {
    plan: Plan,
    live: Arc<Live>,
    start: Instant,
    /// Open connections that nobody uses; the one unused for longest is next.
    idle: RefCell<VecDeque<Sender>>,
    /// Due, but all connections are busy.
    waiting: RefCell<VecDeque<Due>>,
    under_way: Cell<usize>,
    tally: RefCell<Tally>,
}

impl Load {
    /// Starts the clock.
    pub fn new(plan: Plan, idle: VecDeque<Sender>, live: Arc<Live>, o: &Options) -> Rc<Load> {
        Rc::new(Load {
            plan,
            live,
            start: Instant::now(),
            idle: RefCell::new(idle),
            waiting: RefCell::default(),
            under_way: Cell::new(0),
            tally: RefCell::new(Tally::new(o.requests())),
        })
    }

    /// Takes up each request when it is due, waits for the last answers, and reports.
    pub async fn make(self: Rc<Self>, o: &Options) -> Result<Report, String> {
        let schedule = Schedule::new(o);
        let wake = schedule.waker(self.start, Arc::clone(&self.live))?;
        let mut next = 0;
        while next < schedule.requests && self.live.goes_on() {
            wake.notified().await;
            let now = self.now_us();
            while next < schedule.requests && schedule.due_us(next) <= now {
                let at_us = schedule.due_us(next);
                // With everything mixed, each four requests have all four combinations.
                let fresh = o.mode == Mode::Fresh || (o.mode == Mode::Mixed && next % 2 == 1);
                let post = o.method == Method::Post || (o.method == Method::Mixed && next / 2 % 2 == 1);
                self.waiting.borrow_mut().push_back(Due { at_us, fresh, post });
                next += 1;
            }
            self.take_up();
        }
        // Ends: whatever is under way or waits has a timeout.
        while self.under_way.get() > 0 && !self.live.stop.load(Relaxed) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(self.tally.replace(Tally::new(0)).report(o))
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    /// Starts those that wait, as far as connections are free; drops those that waited too long.
    fn take_up(self: &Rc<Self>) {
        while self.under_way.get() < self.plan.connections {
            let Some(due) = self.waiting.borrow_mut().pop_front() else { return };
            let begun_us = self.now_us();
            let waited_us = begun_us - due.at_us;
            if u128::from(waited_us) > self.plan.timeout.as_micros() {
                self.failed(due, Failure::new(Kind::NotSent, "no connection was free in time"));
                continue;
            }
            if waited_us > LATE_US {
                self.tally.borrow_mut().late += 1;
            }
            self.under_way.set(self.under_way.get() + 1);
            let load = Rc::clone(self);
            spawn_local(async move {
                load.exchange(due, begun_us).await;
                load.under_way.set(load.under_way.get() - 1);
                load.take_up();
            });
        }
    }

    /// One request with its answer, from taking it up to giving its connection back.
    async fn exchange(&self, due: Due, begun_us: u64) {
        match timeout(self.plan.timeout, self.attempt(due)).await {
            Ok(Ok(mut answer)) => {
                self.answered(due, begun_us, &answer);
                let ready = async { answer.sender.ready().await.is_ok() };
                if !due.fresh && timeout(self.plan.timeout, ready).await == Ok(true) {
                    self.idle.borrow_mut().push_back(answer.sender);
                }
            }
            Ok(Err(failure)) => self.failed(due, failure),
            Err(_) => {
                let what = format!("no answer within {:?}", self.plan.timeout);
                self.failed(due, Failure::new(Kind::Timeout, what));
            }
        }
    }

    async fn attempt(&self, due: Due) -> Result<Answer, Failure> {
        let [keepalive, fresh] = if due.post { &self.plan.post } else { &self.plan.get };
        if due.fresh {
            let sender = self.plan.connect(true).await?;
            let sent_us = self.now_us();
            return self.send(sender, fresh, sent_us).await.map_err(|unanswered| unanswered.failure);
        }
        while let Some(sender) = self.idle_connection() {
            let sent_us = self.now_us();
            match self.send(sender, keepalive, sent_us).await {
                // Found closed before a byte was written: not this request's failure, and no retry.
                Err(unanswered) if unanswered.unsent => continue,
                sent => return sent.map_err(|unanswered| unanswered.failure),
            }
        }
        let sender = self.plan.connect(false).await?;
        let sent_us = self.now_us();
        self.send(sender, keepalive, sent_us).await.map_err(|unanswered| unanswered.failure)
    }

    /// The next idle connection that is not known to be closed.
    fn idle_connection(&self) -> Option<Sender> {
        let mut idle = self.idle.borrow_mut();
        std::iter::from_fn(|| idle.pop_front()).find(|sender| sender.is_ready())
    }

    async fn send(
        &self,
        mut sender: Sender,
        request: &Request<Full<Bytes>>,
        sent_us: u64,
    ) -> Result<Answer, Unanswered> {
        let response = sender.try_send_request(request.clone()).await.map_err(|mut e| Unanswered {
            unsent: e.take_message().is_some(),
            failure: Failure::of(e.into_error()),
        })?;
        let status = response.status();
        let version = self.version_of(response.headers());
        let checked = self.check(request, &response);
        let drained = drain(response.into_body()).await;
        let end_us = self.now_us();
        let failed = |failure| Unanswered { unsent: false, failure };
        drained.map_err(|e| failed(Failure::of(e)))?;
        let good = status.is_success() || status.is_redirection();
        if good || version.is_some() {
            self.saw_version(version, sent_us, end_us);
        }
        if !good {
            return Err(failed(Failure::new(Kind::Status(status.as_u16()), status.to_string())));
        }
        checked.map_err(|what| failed(Failure::new(Kind::BadResponse, what)))?;
        Ok(Answer { end_us, sender })
    }
}

/// A request that got no good answer.
struct Unanswered {
    failure: Failure,
    /// Not a byte of it was written.
    unsent: bool,
}

async fn drain(mut body: Incoming) -> Result<(), hyper::Error> {
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(())
}

/// Keeping the books.
impl Load {
    fn version_of(&self, headers: &HeaderMap) -> Option<u16> {
        let value = headers.get(&self.plan.version_header)?;
        Some(self.tally.borrow_mut().version(&String::from_utf8_lossy(value.as_bytes())))
    }

    /// A service that says what it received must have received what was sent.
    fn check(&self, sent: &Request<Full<Bytes>>, response: &Response<Incoming>) -> Result<(), String> {
        let said = |name| response.headers().get(name).map(HeaderValue::as_bytes);
        if let Some(method) = said("x-method")
            && method != sent.method().as_str().as_bytes()
        {
            return Err(format!("{} arrived as {}", sent.method(), String::from_utf8_lossy(method)));
        }
        if sent.method() == hyper::Method::POST
            && let Some(bytes) = said("x-body-bytes")
            && bytes != self.plan.body_bytes.to_string().as_bytes()
        {
            let arrived = String::from_utf8_lossy(bytes);
            return Err(format!("{arrived} of {} bytes of body arrived", self.plan.body_bytes));
        }
        Ok(())
    }

    fn saw_version(&self, version: Option<u16>, sent_us: u64, end_us: u64) {
        let tally = &mut *self.tally.borrow_mut();
        let version = version.unwrap_or_else(|| tally.version(NO_VERSION));
        let (name, count) = &mut tally.versions[usize::from(version)];
        *count += 1;
        if tally.samples.last().is_none_or(|last| last.version != version)
            && let Ok(mut shown) = self.live.version.lock()
        {
            shown.clone_from(name);
        }
        tally.samples.push(Sample::new(sent_us, end_us, version));
    }

    fn answered(&self, due: Due, begun_us: u64, answer: &Answer) {
        let mut tally = self.tally.borrow_mut();
        tally.ok += 1;
        tally.latency.saturating_record(answer.end_us - due.at_us);
        tally.service.saturating_record(answer.end_us - begun_us);
        tally.gap_until(answer.end_us);
        tally.last_good_us = answer.end_us;
        tally.last_end_us = answer.end_us;
        self.live.done.fetch_add(1, Relaxed);
    }

    fn failed(&self, due: Due, failure: Failure) {
        let now = self.now_us();
        let mut tally = self.tally.borrow_mut();
        let kind = failure.kind.name();
        if failure.kind == Kind::NotSent {
            tally.not_sent += 1;
        } else {
            tally.failed += 1;
            *tally.failures.entry(kind.clone()).or_default() += 1;
        }
        tally.show(FailureSample {
            at_s: now as f64 / 1e6,
            kind,
            detail: failure.detail,
            method: if due.post { "POST" } else { "GET" },
            connection: if due.fresh { "fresh" } else { "keepalive" },
        });
        tally.last_end_us = now;
        self.live.done.fetch_add(1, Relaxed);
        self.live.failed.fetch_add(1, Relaxed);
    }
}
