//! What clients see while something is changed: a request every so often to each service's health path, on a
//! new connection, never repeated. One that fails is the end of the change.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;
use tokio::task::JoinHandle;

use super::switch;
use crate::bundle::manifest::Service;
use crate::error::{Code, Result};
use crate::ids::Name;

const EVERY: Duration = Duration::from_millis(50);

/// One probe.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    pub at: Timestamp,
    pub service: Name,
    pub ms: f64,
    /// Why it was no good answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

pub struct Watch {
    samples: Arc<Mutex<Vec<Sample>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Watch {
    pub fn start(services: &[Service]) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let tasks = services.iter().map(|service| {
            let (service, samples) = (service.clone(), Arc::clone(&samples));
            tokio::spawn(async move {
                loop {
                    let (at, start) = (Timestamp::now(), Instant::now());
                    let failure = switch::answers(&service).await.err();
                    let ms = start.elapsed().as_secs_f64() * 1000.0;
                    let sample = Sample { at, service: service.name.clone(), ms, failure };
                    samples.lock().expect("no panic while held").push(sample);
                    tokio::time::sleep(EVERY).await;
                }
            })
        });
        Self { tasks: tasks.collect(), samples }
    }

    /// An error as soon as one probe has failed.
    pub fn verdict(&self) -> Result<()> {
        let samples = self.samples();
        let failed: Vec<&Sample> = samples.iter().filter(|s| s.failure.is_some()).collect();
        let Some(first) = failed.first() else { return Ok(()) };
        Err(Code::Unhealthy.err(format!(
            "{} of {} requests to {} failed, the first at {}: {}",
            failed.len(),
            samples.len(),
            first.service,
            first.at,
            first.failure.as_deref().unwrap_or_default()
        )))
    }

    pub fn samples(&self) -> Vec<Sample> {
        self.samples.lock().expect("no panic while held").clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
