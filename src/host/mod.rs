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

use crate::bundle::Bundle;
use crate::ui::Ui;

/// What carrying out a step needs besides the step itself.
pub struct Host<'a> {
    pub ui: &'a Ui,
    /// Present while a bundle is being applied.
    pub bundle: Option<&'a Bundle>,
}
