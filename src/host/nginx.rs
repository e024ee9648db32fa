//! The gate configuration of a service: rendered from one place, checked by nginx itself.

use serde_json::json;

use super::config::Installed;
use super::paths;
use crate::assets;
use crate::bundle::manifest::Service;
use crate::error::Result;
use crate::ids::Slot;

/// Idle connections kept to each pool, per worker.
const KEEPALIVE: u32 = 256;

pub fn render(installed: &Installed, service: &Service) -> Result<String> {
    let pool = |slot: Slot| -> Vec<_> {
        let weight = |i: usize| service.weights.get(i).copied().unwrap_or(1);
        let addresses = installed.addresses(service, slot).into_iter().enumerate();
        addresses.map(|(i, addr)| json!({ "addr": addr.to_string(), "weight": weight(i) })).collect()
    };
    let name = &service.name;
    assets::render(
        "nginx.conf",
        assets::NGINX_CONF,
        json!({
            "service": name,
            "run_dir": paths::run(name),
            "pointer_dir": paths::service(name),
            "log_dir": paths::log(name),
            "listen": service.listen,
            "standby_listen": service.standby_listen,
            "standby_allow": service.standby_allow,
            "paths": service.paths,
            "health": service.health,
            "server_names": service.server_names,
            "pools": { "blue": pool(Slot::Blue), "green": pool(Slot::Green) },
            "max_fails": service.max_fails,
            "fail_timeout_s": service.fail_timeout,
            "keepalive": KEEPALIVE,
            "read_timeout_s": service.read_timeout,
            "max_body": "0",
        }),
    )
}
