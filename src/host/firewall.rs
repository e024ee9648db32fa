//! The host's firewall, whichever is active. zd reports what must be open and opens it only when told.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::exec;
use crate::error::Result;

/// Puts zd's ports into nftables' input chain.
pub const UNIT: &str = "zd-firewall.service";
/// Keeps containers to their own addresses, away from each other, and others away from them.
pub const BRIDGE_UNIT: &str = "zd-bridge.service";

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firewall {
    /// A base chain on the input hook that drops by policy: its family, table and name. Its ports are
    /// opened by a unit, for the chain's own file is loaded anew at each boot.
    Nftables { chain: String },
    #[serde(untagged)]
    Manager(Manager),
}

/// One that is told by command which ports are open, and remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Manager {
    Ufw,
    Firewalld,
}

impl Firewall {
    pub fn name(&self) -> &'static str {
        match self {
            Firewall::Manager(manager) => manager.name(),
            Firewall::Nftables { .. } => "nftables",
        }
    }

    /// The one that is active, if any.
    pub async fn active() -> Result<Option<Self>> {
        let has = |program: &str| which::which(program).is_ok();
        if has("ufw") && exec::try_run(&["ufw", "status"]).await?.stdout.contains("Status: active") {
            return Ok(Some(Firewall::Manager(Manager::Ufw)));
        }
        if has("firewall-cmd") && firewalld_runs().await? {
            return Ok(Some(Firewall::Manager(Manager::Firewalld)));
        }
        Ok(input_chain().await?.map(|chain| Firewall::Nftables { chain }))
    }
}

impl Manager {
    pub fn name(self) -> &'static str {
        match self {
            Manager::Ufw => "ufw",
            Manager::Firewalld => "firewalld",
        }
    }

    /// Whether clients get to a port.
    pub async fn is_open(self, port: u16) -> Result<bool> {
        let port_tcp = format!("{port}/tcp");
        Ok(match self {
            Manager::Ufw => {
                let status = exec::try_run(&["ufw", "status"]).await?.stdout;
                status.lines().any(|l| l.starts_with(&format!("{port_tcp} ")) && l.contains("ALLOW"))
            }
            Manager::Firewalld => {
                exec::try_run(&["firewall-cmd", "--permanent", &format!("--query-port={port_tcp}")]).await?.ok
            }
        })
    }

    pub async fn open(self, port: u16) -> Result<()> {
        let port_tcp = format!("{port}/tcp");
        match self {
            Manager::Ufw => exec::run(&["ufw", "allow", &port_tcp]).await.map(drop),
            Manager::Firewalld => firewalld("add", &port_tcp).await,
        }
    }

    /// Where the firewall is gone, so is its rule.
    pub async fn close(self, port: u16) -> Result<()> {
        let port_tcp = format!("{port}/tcp");
        match self {
            Manager::Ufw if which::which("ufw").is_err() => Ok(()),
            Manager::Firewalld if which::which("firewall-cmd").is_err() => Ok(()),
            Manager::Ufw => exec::run(&["ufw", "delete", "allow", &port_tcp]).await.map(drop),
            Manager::Firewalld => firewalld("remove", &port_tcp).await,
        }
    }
}

async fn firewalld(verb: &str, port: &str) -> Result<()> {
    let option = format!("--{verb}-port={port}");
    if !firewalld_runs().await? {
        // Its own way for when it does not run.
        return exec::run(&["firewall-offline-cmd", &option]).await.map(drop);
    }
    exec::run(&["firewall-cmd", "--permanent", &option]).await?;
    exec::run(&["firewall-cmd", &option]).await.map(drop)
}

async fn firewalld_runs() -> Result<bool> {
    Ok(exec::try_run(&["firewall-cmd", "--state"]).await?.stdout.trim() == "running")
}

/// Family, table and name of the input chain that drops (libnftables-json(5)).
async fn input_chain() -> Result<Option<String>> {
    if which::which("nft").is_err() {
        return Ok(None);
    }
    let out = exec::try_run(&["nft", "-j", "list", "ruleset"]).await?;
    let parsed: Value = serde_json::from_str(&out.stdout).unwrap_or_default();
    let found = parsed["nftables"].as_array().into_iter().flatten().find_map(|item| {
        let chain = item.get("chain")?;
        let text = |key: &str| chain.get(key)?.as_str();
        (text("hook")? == "input" && text("policy")? == "drop")
            .then(|| Some(format!("{} {} {}", text("family")?, text("table")?, text("name")?)))?
    });
    Ok(found)
}
