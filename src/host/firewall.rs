//! The host's firewall, whichever is active. zd reports what must be open and opens it only when told.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::exec;
use crate::error::{Code, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firewall {
    Ufw,
    Firewalld,
    /// A base chain on the input hook that drops by policy.
    Nftables,
}

impl Firewall {
    pub fn name(self) -> &'static str {
        match self {
            Firewall::Ufw => "ufw",
            Firewall::Firewalld => "firewalld",
            Firewall::Nftables => "nftables",
        }
    }

    /// The one that is active, if any.
    pub async fn active() -> Result<Option<Self>> {
        let has = |program: &str| which::which(program).is_ok();
        if has("ufw") && exec::try_run(&["ufw", "status"]).await?.stdout.contains("Status: active") {
            return Ok(Some(Firewall::Ufw));
        }
        if has("firewall-cmd")
            && exec::try_run(&["firewall-cmd", "--state"]).await?.stdout.trim() == "running"
        {
            return Ok(Some(Firewall::Firewalld));
        }
        Ok(input_chain().await?.map(|_| Firewall::Nftables))
    }

    pub async fn is_open(self, port: u16) -> Result<bool> {
        let port_tcp = format!("{port}/tcp");
        Ok(match self {
            Firewall::Ufw => {
                let status = exec::try_run(&["ufw", "status"]).await?.stdout;
                status.lines().any(|l| l.starts_with(&format!("{port_tcp} ")) && l.contains("ALLOW"))
            }
            Firewall::Firewalld => {
                exec::try_run(&["firewall-cmd", "--permanent", &format!("--query-port={port_tcp}")]).await?.ok
            }
            Firewall::Nftables => rule_handle(port).await?.is_some(),
        })
    }

    pub async fn open(self, port: u16) -> Result<()> {
        let port_tcp = format!("{port}/tcp");
        match self {
            Firewall::Ufw => exec::run(&["ufw", "allow", &port_tcp]).await.map(drop),
            Firewall::Firewalld => firewalld("add", &port_tcp).await,
            Firewall::Nftables => {
                let chain = input_chain()
                    .await?
                    .ok_or_else(|| Code::Command.err("nftables has no input chain any more"))?;
                let rule = format!("tcp dport {port} accept comment \"{}\"", comment(port));
                let mut argv = vec!["nft", "insert", "rule"];
                argv.extend(chain.iter().map(String::as_str));
                argv.push(&rule);
                exec::run(&argv).await.map(drop)
            }
        }
    }

    pub async fn close(self, port: u16) -> Result<()> {
        let port_tcp = format!("{port}/tcp");
        match self {
            Firewall::Ufw => exec::run(&["ufw", "delete", "allow", &port_tcp]).await.map(drop),
            Firewall::Firewalld => firewalld("remove", &port_tcp).await,
            Firewall::Nftables => {
                let (Some(chain), Some(handle)) = (input_chain().await?, rule_handle(port).await?) else {
                    return Ok(());
                };
                let mut argv = vec!["nft", "delete", "rule"];
                argv.extend(chain.iter().map(String::as_str));
                let handle = handle.to_string();
                argv.extend(["handle", &handle]);
                exec::run(&argv).await.map(drop)
            }
        }
    }
}

async fn firewalld(verb: &str, port: &str) -> Result<()> {
    let option = format!("--{verb}-port={port}");
    exec::run(&["firewall-cmd", "--permanent", &option]).await?;
    exec::run(&["firewall-cmd", &option]).await.map(drop)
}

fn comment(port: u16) -> String {
    format!("zd {port}")
}

async fn ruleset() -> Result<Vec<Value>> {
    if which::which("nft").is_err() {
        return Ok(Vec::new());
    }
    let out = exec::try_run(&["nft", "-j", "list", "ruleset"]).await?;
    let parsed: Value = serde_json::from_str(&out.stdout).unwrap_or_default();
    Ok(parsed["nftables"].as_array().cloned().unwrap_or_default())
}

/// Family, table and name of the input chain that drops (libnftables-json(5)).
async fn input_chain() -> Result<Option<[String; 3]>> {
    let found = ruleset().await?.into_iter().find_map(|item| {
        let chain = item.get("chain")?;
        let text = |key: &str| Some(chain.get(key)?.as_str()?.to_owned());
        (text("hook")? == "input" && text("policy")? == "drop")
            .then(|| Some([text("family")?, text("table")?, text("name")?]))?
    });
    Ok(found)
}

async fn rule_handle(port: u16) -> Result<Option<u64>> {
    let wanted = comment(port);
    Ok(ruleset().await?.into_iter().find_map(|item| {
        let rule = item.get("rule")?;
        (rule.get("comment")?.as_str()? == wanted).then(|| rule.get("handle")?.as_u64())?
    }))
}
