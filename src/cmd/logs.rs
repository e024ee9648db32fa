//! `zd logs`: the last lines of any part, wherever it writes them.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use crate::bundle::manifest::Engine;
use crate::error::{Code, Result};
use crate::host::config::Installed;
use crate::host::docker::Docker;
use crate::host::paths::NGINX_USER;
use crate::host::{exec, paths, systemd};
use crate::ids::{Name, Slot};
use crate::ui::Ui;

/// Show the last lines of a part: registry, docker, nginx, access, consul, a slot, …
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd logs                 the names there are\n  zd logs nginx -n 100\n  \
                        zd logs green           what the containers of green wrote\n  zd logs access --follow"
)]
pub struct Args {
    /// Which part; the list of them where not given
    component: Option<String>,
    /// The service, for its nginx and slots; the only one where not given
    #[arg(long, value_name = "NAME")]
    service: Option<Name>,
    /// How many lines
    #[arg(short = 'n', long, default_value_t = 50, value_name = "N")]
    lines: u32,
    /// Go on with what is written from now on
    #[arg(short, long)]
    follow: bool,
}

/// Where a part writes.
enum Log {
    Unit(String),
    File(PathBuf),
    Slot(Name, Slot),
}

pub async fn run(args: Args, ui: &Ui) -> Result<()> {
    let installed = Installed::read()?;
    let service = match &installed {
        Some(installed) => Some(installed.service(args.service.as_ref())?.name.clone()),
        None => None,
    };
    let engine = installed.map(|installed| installed.lock.engine);
    let logs = logs(engine, service.as_ref());
    let names: Vec<&str> = logs.iter().map(|(name, _)| *name).collect();
    let Some(wanted) = &args.component else {
        ui.report(&names, |names| format!("{}\nnext  zd logs NAME", names.join("\n")));
        return Ok(());
    };
    let Some((_, log)) = logs.iter().find(|(name, _)| name == wanted) else {
        return Err(Code::Usage
            .err(format!("there is no part {wanted:?}"))
            .cure(format!("use one of: {}", names.join(", "))));
    };
    let lines = args.lines.to_string();
    match log {
        Log::Unit(unit) => {
            let mut argv = vec!["journalctl", systemd::JOURNALS, "--no-pager", "-u", unit, "-n", &lines];
            argv.extend(args.follow.then_some("--follow"));
            become_program(&argv)
        }
        Log::File(path) => {
            let path = path.to_string_lossy();
            // -F: goes on in the new file after a rotation.
            let how = if args.follow { "-F" } else { "-q" };
            let tail = ["tail", "-n", &lines, how, "--", path.as_ref()];
            // With no more rights than nginx, who may have put anything there.
            let (uid, gid) = (format!("--reuid={NGINX_USER}"), format!("--regid={NGINX_USER}"));
            let as_nginx = ["setpriv", &uid, &gid, "--clear-groups", "--"];
            let is_nginxs = path != paths::AUDIT && rustix::process::geteuid().is_root();
            become_program(&[if is_nginxs { &as_nginx[..] } else { &[] }, &tail].concat())
        }
        Log::Slot(service, slot) => {
            let docker = Docker::connect().await?;
            let containers = docker.of_slot(service, *slot).await?;
            docker.print_logs(&containers, args.lines, args.follow).await
        }
    }
}

/// Before an install has come to its end there are units only; which, its engine would say.
fn logs(engine: Option<Engine>, service: Option<&Name>) -> Vec<(&'static str, Log)> {
    let unit = |name: &str| Log::Unit(format!("{name}.service"));
    let mut logs = Vec::new();
    if let Some(service) = service {
        let log = paths::log(service);
        logs.extend([
            ("blue", Log::Slot(service.clone(), Slot::Blue)),
            ("green", Log::Slot(service.clone(), Slot::Green)),
            ("nginx", Log::File(log.join("error.log"))),
            ("access", Log::File(log.join("access.log"))),
            ("tcp", Log::File(log.join("tcp.log"))),
            ("nginx-unit", Log::Unit(paths::nginx_unit(service))),
        ]);
    }
    // A pattern: the process that is pushed to as well.
    logs.extend([("registry", unit("zd-registry*")), ("docker", unit("docker"))]);
    logs.extend([("audit", Log::File(paths::AUDIT.into())), ("backup", unit("zd-backup"))]);
    if engine != Some(Engine::Docker) {
        logs.extend(["consul", "nomad", "consul-template"].map(|name| (name, unit(name))));
    }
    logs
}

/// journalctl and tail do it better than we could: zd steps aside.
fn become_program(argv: &[&str]) -> Result<()> {
    let e = exec::command(argv[0]).args(&argv[1..]).exec();
    Err(Code::Command.err(format!("{}: {e}", argv[0])).cure("install the missing program"))
}
