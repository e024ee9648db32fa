//! The gate configuration of a service: rendered from one place, checked by nginx itself.

use serde_json::{Value, json};

use super::config::Installed;
use super::paths;
use crate::assets;
use crate::bundle::manifest::{Engine, Service};
use crate::error::Result;
use crate::ids::Slot;

/// Idle connections kept to each pool, per worker.
const KEEPALIVE: u32 = 256;

/// Both pools of a service: the address and weight of each instance.
pub fn pools(installed: &Installed, service: &Service) -> Value {
    let pool = |slot: Slot| -> Vec<Value> {
        let weight = |i: usize| service.weights.get(i).copied().unwrap_or(1);
        let addresses = installed.addresses(service, slot).into_iter().enumerate();
        addresses.map(|(i, at)| json!({ "address": at.to_string(), "weight": weight(i) })).collect()
    };
    json!({ "blue": pool(Slot::Blue), "green": pool(Slot::Green) })
}

/// How nginx treats the servers of a pool.
pub fn pool_settings(service: &Service) -> Value {
    json!({
        "service": service.name,
        "max_fails": service.max_fails,
        "fail_timeout_s": service.fail_timeout,
        "keepalive": KEEPALIVE,
    })
}

pub fn render(installed: &Installed, service: &Service) -> Result<String> {
    let name = &service.name;
    // With Consul, the pools are what consul-template makes of it.
    let pools_file = (installed.lock.engine == Engine::Nomad).then(|| paths::nginx_pools(name));
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
            "pools_file": pools_file,
            "pools": pools(installed, service),
            "max_fails": service.max_fails,
            "fail_timeout_s": service.fail_timeout,
            "keepalive": KEEPALIVE,
            "read_timeout_s": service.read_timeout,
            "max_body": "0",
        }),
    )
}
