//! When requests are due, and the thread that says so.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Live, Options};

/// The finest grid on which requests are due: each wake-up costs two threads some microseconds.
const GRID: Duration = Duration::from_micros(500);

/// When requests are due.
#[derive(Clone, Copy)]
pub struct Schedule {
    pub requests: u64,
    rate: u64,
    grid_us: u64,
}

impl Schedule {
    pub fn new(o: &Options) -> Schedule {
        let grid_us = GRID.as_micros() as u64;
        let rate = u64::from(o.rate);
        Schedule {
            requests: o.requests(),
            rate,
            grid_us: if rate * grid_us > 1_000_000 { grid_us } else { 1 },
        }
    }

    pub fn due_us(self, request: u64) -> u64 {
        let us = (u128::from(request) * 1_000_000 / u128::from(self.rate)) as u64;
        us.next_multiple_of(self.grid_us)
    }

    /// A thread that wakes the load each time requests are due.
    pub fn waker(self, start: Instant, live: Arc<Live>) -> Result<Arc<Notify>, String> {
        let wake = Arc::new(Notify::new());
        let theirs = Arc::clone(&wake);
        let sleep = move || {
            let mut next = 0;
            while next < self.requests && live.goes_on() {
                let due = Duration::from_micros(self.due_us(next));
                thread::sleep(due.saturating_sub(start.elapsed()));
                // Read before waking the load: what it does not find due then is woken for again.
                let now = start.elapsed().as_micros() as u64;
                theirs.notify_one();
                while next < self.requests && self.due_us(next) <= now {
                    next += 1;
                }
            }
            // Told to stop: the load has to see it too.
            theirs.notify_one();
        };
        let thread = thread::Builder::new().name("loadtest-waker".to_owned()).spawn(sleep);
        thread.map_err(|e| format!("no thread for the schedule: {e}"))?;
        Ok(wake)
    }
}
