//! The only code that touches the machine.

pub mod api;
pub mod config;
pub mod consul;
pub mod docker;
pub mod exec;
pub mod firewall;
pub mod fs;
pub mod http;
pub mod lock;
pub mod nginx;
pub mod nomad;
pub mod packages;
pub mod paths;
pub mod registry;
#[cfg(test)]
mod replay;
pub mod secrets;
pub mod systemd;

use std::time::{Duration, Instant};

use crate::bundle::Bundle;
use crate::error::Result;
use crate::ui::Ui;

/// What carrying out a step needs besides the step itself.
pub struct Host<'a> {
    pub ui: &'a Ui,
    /// Present while a bundle is being applied.
    pub bundle: Option<&'a Bundle>,
}

/// Asks every so often until it goes well; after `limit` the last error stands.
pub async fn until<T>(
    limit: Duration,
    every: Duration,
    mut ask: impl AsyncFnMut() -> Result<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        match ask().await {
            Err(_) if start.elapsed() < limit => tokio::time::sleep(every).await,
            other => return other,
        }
    }
}
