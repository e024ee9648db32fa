//! Everything that enters the binary from the folders beside `src`, in one place.

use minijinja::{Environment, UndefinedBehavior};
use serde::Serialize;
use serde_json::Value;

use crate::error::{Code, OrCode, Result};

pub const NGINX_CONF: &str = include_str!("../nginx/nginx.conf.j2");
pub const NGINX_UNIT: &str = include_str!("../systemd-units/zd-nginx@.service");
pub const CONSUL_CONF: &str = include_str!("../nomad/consul.json.j2");
pub const NOMAD_CONF: &str = include_str!("../nomad/nomad.json.j2");
pub const CONSUL_TEMPLATE_CONF: &str = include_str!("../nomad/consul-template.json.j2");
pub const POOLS_TEMPLATE: &str = include_str!("../nomad/pools.ctmpl.j2");
pub const JOB: &str = include_str!("../nomad/job.json.j2");
pub const UNLIMITED_STARTS: &str = include_str!("../systemd-units/unlimited-starts.conf");
pub const DOCKER_BEFORE_NOMAD: &str = include_str!("../systemd-units/docker-before-nomad.conf");
pub const CONSUL_UNIT: &str = include_str!("../systemd-units/consul.service.j2");
pub const NOMAD_UNIT: &str = include_str!("../systemd-units/nomad.service.j2");
pub const CONSUL_TEMPLATE_UNIT: &str = include_str!("../systemd-units/consul-template.service.j2");
pub const PUBLISH_UNIT: &str = include_str!("../systemd-units/zd-publish.service");
pub const SETTLE_UNIT: &str = include_str!("../systemd-units/zd-settle.service");
pub const POOLS_UNIT: &str = include_str!("../systemd-units/zd-pools@.service");
pub const POOLS_PATH: &str = include_str!("../systemd-units/zd-pools@.path");
pub const LOGROTATE_CONF: &str = include_str!("../nginx/logrotate.conf.j2");
pub const LOGROTATE_UNIT: &str = include_str!("../systemd-units/zd-logrotate.service");
pub const LOGROTATE_TIMER: &str = include_str!("../systemd-units/zd-logrotate.timer");
pub const FIREWALL_UNIT: &str = include_str!("../systemd-units/zd-firewall.service.j2");
pub const BRIDGE_UNIT: &str = include_str!("../systemd-units/zd-bridge.service");
pub const BRIDGE_IP: &str = include_str!("../systemd-units/zd-bridge-ip.rules.j2");
pub const BRIDGE_FRAMES: &str = include_str!("../systemd-units/zd-bridge-frames.rules.j2");
pub const JOURNAL_CONF: &str = include_str!("../systemd-units/journald@zd.conf");
pub const BACKUP_UNIT: &str = include_str!("../systemd-units/zd-backup.service.j2");
pub const BACKUP_TIMER: &str = include_str!("../systemd-units/zd-backup.timer.j2");
pub const REGISTRY_UNIT: &str = include_str!("../systemd-units/zd-registry.service");
pub const REGISTRY_PUSH_UNIT: &str = include_str!("../systemd-units/zd-registry-push.service");
/// HashiCorp's public key, as HashiCorp publishes it; its fingerprint is pinned in `sources::openpgp`.
pub const HASHICORP_KEY: &str = include_str!("../bundle/hashicorp.asc");
/// Which versions of HashiCorp's programs may follow which; read by `bundle::versions`.
pub const VERSIONS: &str = include_str!("../bundle/versions.toml");
pub const REPORT: &str = include_str!("report.html.j2");
pub const INSTALL: &str = include_str!("../INSTALL.md");
pub const INSTALL_KO: &str = include_str!("../INSTALL.ko.md");

/// Renders a template of JSON.
pub fn json(name: &str, template: &str, variables: impl Serialize) -> Result<Value> {
    serde_json::from_str(&render(name, template, variables)?).or_code(Code::Bug, format!("template {name}"))
}

/// Renders a page; what is put into it is escaped.
pub fn html(template: &str, variables: impl Serialize) -> Result<String> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::SemiStrict);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::Html);
    env.render_str(template, variables).or_code(Code::Bug, "a page")
}

/// Renders a template; a variable it does not get is an error.
pub fn render(name: &str, template: &str, variables: impl Serialize) -> Result<String> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_keep_trailing_newline(true);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.render_str(template, variables).or_code(Code::Bug, format!("template {name}"))
}
