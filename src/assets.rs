//! Everything that enters the binary from the folders beside `src`, in one place.

use minijinja::{Environment, UndefinedBehavior};
use serde::Serialize;

use crate::error::{Code, OrCode, Result};

pub const NGINX_CONF: &str = include_str!("../nginx/nginx.conf.j2");
pub const NGINX_UNIT: &str = include_str!("../systemd-units/zd-nginx@.service");
pub const REGISTRY_UNIT: &str = include_str!("../systemd-units/zd-registry.service");
pub const INSTALL: &str = include_str!("../INSTALL.md");
pub const INSTALL_KO: &str = include_str!("../INSTALL.ko.md");

/// Renders a template; a variable it does not get is an error.
pub fn render(name: &str, template: &str, variables: impl Serialize) -> Result<String> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_keep_trailing_newline(true);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.render_str(template, variables).or_code(Code::Bug, format!("template {name}"))
}
