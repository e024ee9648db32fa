//! `zd secrets rotate`: every secret that zd has made on this host is made anew. Traffic needs none of
//! them. A run that was broken off is simply run again: only then are the secrets before it worth nothing.

use std::path::Path;

use serde::Serialize;

use super::ChangeArgs;
use super::deploy::settle_interrupted;
use crate::audit::{self, Event};
use crate::bundle::manifest::Engine;
use crate::error::{At, Result};
use crate::facts::Facts;
use crate::failpoint;
use crate::host::config::Installed;
use crate::host::lock::HostLock;
use crate::host::registry::Registry;
use crate::host::secrets::Secret;
use crate::host::{Host, consul, fs, nomad, paths, signing, systemd};
use crate::plan::{preflight, stack};
use crate::ui::Ui;

/// Make the secrets of this host anew
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  zd secrets rotate --reason 'quarterly'\n  zd secrets rotate --dry-run")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// New password, certificates, tokens and gossip keys; the old ones are worth nothing afterwards
    Rotate(ChangeArgs),
}

#[derive(Serialize)]
struct Report {
    rotated: Vec<&'static str>,
    restarted: Vec<&'static str>,
}

const REGISTRY: [&str; 3] = ["private CA", "registry certificate", "registry password"];
const STACK: [&str; 6] = [
    "Nomad certificate",
    "Consul tokens",
    "Consul gossip key",
    "Nomad token",
    "Nomad gossip key",
    "registry account of Nomad",
];

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let Command::Rotate(change) = args.command;
    let _lock = if change.dry_run { None } else { Some(HostLock::take("secrets rotate", ui)?) };
    if !change.dry_run {
        settle_interrupted(&Host::new(ui)).await?;
    }
    let installed = Installed::require()?;
    let facts = Facts::gather().await?;
    preflight::refuse(&[preflight::address(&facts, installed.host.ip, false)])?;
    let full_stack = installed.lock.engine == Engine::Nomad;
    let mut report = Report { rotated: REGISTRY.into(), restarted: vec!["zd-registry"] };
    if full_stack {
        report.rotated.extend(STACK);
        report.rotated.extend(Path::new(paths::CONSUL_CERT).exists().then_some("Consul certificate"));
        report.restarted.extend(["consul", "nomad", "consul-template"]);
    }
    report.rotated.push("signing key");
    if change.dry_run {
        ui.report(&report, |r| {
            format!("rotate {}\nrestart {}", r.rotated.join(", "), r.restarted.join(", "))
        });
        return Ok(());
    }
    let question = "make all secrets anew, and restart what uses them? What serves goes on";
    ui.confirm(question, change.yes)?;
    let event = |outcome, detail| {
        let reason = change.reason.as_str();
        audit::append(Event { verb: "secrets rotate", outcome, reason, detail, ..Event::default() })
    };
    let rotated = async {
        if full_stack {
            tokens(&installed, ui).await?;
        }
        certificates(&installed, full_stack, ui).await?;
        if full_stack {
            forget_old_tokens().await?;
        }
        signing::rotate()
    };
    let (before, now) = match rotated.await {
        Ok(keys) => keys,
        Err(e) => {
            event("failed", e.what.clone())?;
            return Err(e);
        }
    };
    event("done", format!("{} {} -> {now}", report.rotated.join(", "), before.as_deref().unwrap_or("none")))?;
    ui.done(format!(
        "the log and reports are signed with key {now} from now on: change control needs {}",
        paths::SIGNING_PUB
    ));
    ui.report(&report, |r| {
        format!(
            "rotated {}\nrestarted {}; what serves was not touched",
            r.rotated.join(", "),
            r.restarted.join(", ")
        )
    });
    Ok(())
}

/// New tokens and gossip keys beside the old ones, which hold until the end.
async fn tokens(installed: &Installed, ui: &Ui) -> Result<()> {
    if nomad::version().await.is_err() {
        // A run that was broken off has left it with a certificate of the CA before.
        Secret::NomadCertificate.make()?;
        nomad::restart().await?;
    }
    consul::renew_tokens(&installed.host.node()).await?;
    nomad::renew_token().await?;
    Secret::ConsulPrivate { management: stack::management(&installed.lock)? }.make()?;
    Secret::ConsulTemplatePrivate.make()?;
    Secret::NomadPrivate.make()?;
    consul::renew_gossip_key().await?;
    nomad::renew_gossip_key().await?;
    consul::restart(&installed.host.node()).await?;
    systemd::restart("consul-template.service").await?;
    ui.done("Consul and Nomad have new tokens and gossip keys");
    Ok(())
}

async fn certificates(installed: &Installed, full_stack: bool, ui: &Ui) -> Result<()> {
    let host = &installed.host;
    for secret in [
        Secret::Ca,
        Secret::RegistryCertificate { ip: host.ip.into() },
        Secret::RegistryPassword,
        Secret::Htpasswd,
    ] {
        secret.make()?;
        if secret == Secret::Ca {
            failpoint::reach("rotate:ca");
        }
    }
    fs::write(&paths::docker_ca(&host.registry()), &std::fs::read(paths::CA).at(paths::CA)?, 0o644, None)?;
    systemd::restart("zd-registry.service").await?;
    Registry::ready(host).await?;
    ui.done("the registry has its new certificate and password");
    if full_stack {
        // Also one that is of no use just now: after the next upgrade it may be.
        if Path::new(paths::CONSUL_CERT).exists() {
            Secret::ConsulCertificate { ip: host.ip.into() }.make()?;
            consul::restart(&host.node()).await?;
            ui.done("Consul has its new certificate");
        }
        Secret::DockerAuth { registry: host.registry() }.make()?;
        Secret::NomadCertificate.make()?;
        nomad::restart().await?;
        ui.done("Nomad has its new certificate and registry account");
    }
    Ok(())
}

async fn forget_old_tokens() -> Result<()> {
    consul::forget_old_tokens().await?;
    nomad::forget_old_tokens().await
}
