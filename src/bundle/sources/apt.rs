//! OS packages with their closure for the target release, resolved and checked by apt itself, with a
//! private state folder: this machine's own apt is neither read (but for its sources) nor changed.
//!
//! The closure is what a bare host may lack: everything but the packages that every installation of
//! the release has (Essential or priority required). On the host apt resolves again, against the
//! host's own state, with the carried packages as its only source (apt-get(8), sources.list(5)).

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cache::{Cache, hash_file};
use super::{Blobs, archive};
use crate::bundle::lock::{Deb, Role};
use crate::bundle::manifest::Packages;
use crate::bundle::target::Target;
use crate::error::{At, Code, Error, Result};
use crate::ids::Digest;
use crate::ui::Ui;

/// Beside `status`: of which package lists that is the base.
const BASE_OF: &str = "status.of";
/// Whoever packs decides nothing by it: which program is apt must not depend on where it is called.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Resolves and downloads; returns the apt index over the packages and the packages.
pub fn resolve(
    packages: &Packages,
    target: &Target,
    cache: &Cache,
    ui: &Ui,
) -> Result<(Option<Digest>, Vec<Deb>, Blobs)> {
    let wanted: Vec<&String> = packages.all().collect();
    let mut blobs = Blobs::default();
    if wanted.is_empty() {
        return Ok((None, Vec::new(), blobs));
    }
    which::which("apt-get").map_err(|_| {
        Code::Source.err("apt-get is not on this machine").cure("run `zd pack` on a Debian or Ubuntu machine")
    })?;
    let apt = Apt::prepare(packages, target, cache)?;
    let wait = ui.wait(format!("apt: package lists of {target}"));
    apt.run("apt-get", &["update", "-qq", "-o", "APT::Update::Error-Mode=any"])?;
    apt.assume_base()?;
    wait.finish_and_clear();

    // Asked over an empty archive folder: apt leaves out what it has downloaded already.
    let nothing_yet = format!("Dir::Cache::archives={}", apt.root.join("none").display());
    let mut install = vec!["install", "-qq", "--print-uris", "-o", &nothing_yet];
    install.extend(wanted.iter().map(|s| s.as_str()));
    let listing = apt.run("apt-get", &install)?;
    // 'URI' FILE SIZE HASH
    let listed = |line| {
        let mut fields = str::split_whitespace(line);
        Some((fields.next()?.trim_matches('\''), fields.next()?, fields.next()?.parse().ok()?))
    };
    let files: Vec<(&str, &str, u64)> = listing.lines().filter_map(listed).collect();
    if files.is_empty() {
        return Err(Code::Source
            .err(format!(
                "every installation of {target} has {} already",
                wanted.iter().map(|s| s.as_str()).collect::<Vec<_>>().join(", ")
            ))
            .cure("leave these out of the manifest's packages"));
    }
    if !files.iter().all(|(_, file, size)| apt.archive(file).metadata().is_ok_and(|m| m.len() == *size)) {
        apt.download(&wanted, files.len(), ui)?;
    }
    let files: Vec<(&str, &str)> = files.into_iter().map(|(uri, file, _)| (uri, file)).collect();
    let (index, debs) = apt.index(&files, cache, &mut blobs)?;
    ui.done(format!("{} packages for {target}", debs.len()));
    Ok((Some(index), debs, blobs))
}

struct Apt {
    root: PathBuf,
    config: PathBuf,
    /// Held while this state is used: another pack may have other sources.
    _lock: fs::File,
}

impl Apt {
    fn prepare(packages: &Packages, target: &Target, cache: &Cache) -> Result<Self> {
        let root = cache.dir(&format!("apt/{target}"))?;
        let lock = root.join("zd.lock");
        let held = fs::File::create(&lock).at(&lock)?;
        held.lock().at(&lock)?;
        for dir in
            ["lists/partial", "archives/partial", "none/partial", "etc/apt.conf.d", "etc/preferences.d"]
        {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).at(&dir)?;
        }
        let sources = match &packages.sources {
            Some(path) => fs::read_to_string(path).at(path)?,
            None => own_sources(target)?,
        };
        if let Some(line) = archive::unsigned_option(&sources).filter(|_| !packages.unsigned_packages) {
            return Err(archive::refused(line));
        }
        let deb822 = sources.lines().any(|l| l.starts_with("Types:"));
        for (name, here) in [("zd.sources", deb822), ("zd.list", !deb822)] {
            let path = root.join("etc").join(name);
            if here {
                write(&path, &sources)?;
            } else if path.exists() {
                fs::remove_file(&path).at(&path)?;
            }
        }
        for name in ["status", BASE_OF] {
            let path = root.join(name);
            fs::OpenOptions::new().append(true).create(true).open(&path).at(&path)?;
        }
        let dir = root.display();
        let arch = target.deb_arch()?;
        let config = root.join("apt.conf");
        write(
            &config,
            &format!(
                "Dir::State \"{dir}\";\nDir::State::status \"{dir}/status\";\nDir::Cache \"{dir}\";\n\
                 Dir::Etc \"{dir}/etc\";\nDir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{dir}/etc\";\n\
                 Dir::Etc::trusted \"/etc/apt/trusted.gpg\";\nDir::Etc::trustedparts \"/etc/apt/trusted.gpg.d\";\n\
                 APT::Architecture \"{arch}\";\nAPT::Architectures {{ \"{arch}\"; }};\n\
                 APT::Install-Recommends \"false\";\nAPT::Install-Suggests \"false\";\n\
                 Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nAPT::Sandbox::User \"root\";\n"
            ),
        )?;
        Ok(Self { root, config, _lock: held })
    }

    /// A package's file, once it is downloaded.
    fn archive(&self, file: &str) -> PathBuf {
        self.root.join("archives").join(file)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("PATH", PATH).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let out = self.command(program).args(args).output().map_err(|e| failed(program, &e.to_string()))?;
        if !out.status.success() {
            return Err(failed(
                &format!("{program} {}", args.join(" ")),
                &String::from_utf8_lossy(&out.stderr),
            ));
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Takes the base system of the release as installed, so that the closure leaves it out. That takes apt longer than
    /// all else; nothing comes of it while the package lists are those of the last time.
    fn assume_base(&self) -> Result<()> {
        let (note, lists) = (self.root.join(BASE_OF), self.lists()?);
        if fs::read_to_string(&note).at(&note)? == lists.as_str() {
            return Ok(());
        }
        write(&note, "")?;
        write(&self.root.join("status"), "")?;
        let plan = self.run("apt-get", &["-s", "-qq", "install", "?essential", "?priority(required)"])?;
        let base: Vec<String> = simulated(&plan).map(|(name, version)| format!("{name}={version}")).collect();
        let mut args = vec!["show"];
        args.extend(base.iter().map(String::as_str));
        let mut status = String::new();
        for line in self.run("apt-cache", &args)?.lines() {
            status.push_str(line);
            status.push('\n');
            if line.starts_with("Package:") {
                status.push_str("Status: install ok installed\n");
            }
        }
        write(&self.root.join("status"), &status)?;
        write(&note, lists.as_str())
    }

    /// Names the package lists: by the sources, and by the Release files, which have the sums of all lists.
    fn lists(&self) -> Result<Digest> {
        let mut paths = Vec::new();
        for dir in ["etc", "lists"] {
            let dir = self.root.join(dir);
            for entry in fs::read_dir(&dir).at(&dir)? {
                let path = entry.at(&dir)?.path();
                let name = path.to_string_lossy();
                if [".list", ".sources", "Release"].iter().any(|end| name.ends_with(end)) {
                    paths.push(path);
                }
            }
        }
        paths.sort();
        let mut all = Vec::new();
        for path in paths {
            all.extend(fs::read(&path).at(&path)?);
        }
        Ok(Digest::of(&all))
    }

    fn download(&self, wanted: &[&String], count: usize, ui: &Ui) -> Result<()> {
        let bar = ui.count(format!("apt: {count} packages"), 100);
        let mut child = self
            .command("apt-get")
            .args(["install", "-y", "-qq", "--download-only", "-o", "APT::Status-Fd=1"])
            .args(wanted)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| failed("apt-get", &e.to_string()))?;
        let out = child.stdout.take().expect("piped");
        for line in BufReader::new(out).lines().map_while(std::result::Result::ok) {
            // dlstatus:3:41.2:Retrieving file 3 of 9 (apt's README.progress-reporting)
            if let Some(percent) = line.strip_prefix("dlstatus:").and_then(|l| l.split(':').nth(1)) {
                bar.set_position(percent.parse::<f64>().unwrap_or(0.0) as u64);
            }
        }
        let done = child.wait_with_output().map_err(|e| failed("apt-get", &e.to_string()))?;
        bar.finish_and_clear();
        if !done.status.success() {
            return Err(failed("apt-get --download-only", &String::from_utf8_lossy(&done.stderr)));
        }
        Ok(())
    }

    /// The index that apt reads on the host, and each package as a blob.
    fn index(&self, files: &[(&str, &str)], cache: &Cache, blobs: &mut Blobs) -> Result<(Digest, Vec<Deb>)> {
        let packages =
            files.iter().map(|(uri, file)| PackageFile::parse(uri, file)).collect::<Result<Vec<_>>>()?;
        let archives = archive::archives(&self.run("apt-get", &["indextargets"])?)?;
        let mut madison = vec!["madison"];
        madison.extend(packages.iter().map(|p| p.name));
        let madison = self.run("apt-cache", &madison)?;
        let mut show = vec!["show".to_owned()];
        show.extend(packages.iter().map(|p| format!("{}={}", p.name, p.version)));
        let shown = self.run("apt-cache", &show.iter().map(String::as_str).collect::<Vec<_>>())?;
        let mut stanzas = HashMap::new();
        for stanza in shown.split("\n\n") {
            let field = |key: &str| stanza.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
            stanzas.entry((field("Package: "), field("Version: "))).or_insert(stanza);
        }
        let mut debs = Vec::new();
        let mut index = String::new();
        for PackageFile { uri, file, name, version, arch } in packages {
            let stanza = stanzas.get(&(name, version.as_str())).copied().unwrap_or_default();
            let plain = format!("{name}_{}_{arch}.deb", version.replace(':', "."));
            for line in stanza.lines() {
                let line =
                    if line.starts_with("Filename:") { format!("Filename: ./{plain}") } else { line.into() };
                index.push_str(&line);
                index.push('\n');
            }
            index.push('\n');
            let path = self.archive(file);
            let (digest, size) = hash_file(&path)?;
            if !stanza.contains(digest.hex()) {
                return Err(Code::Source
                    .err(format!("{} does not have the SHA256 of the release's index", path.display()))
                    .cure("delete it and run `zd pack` again"));
            }
            blobs.add(digest.clone(), size, Role::Deb, path);
            let archive = archive::of_package(&archives, &madison, name, &version, uri)?;
            let signed_by = Some(archive.signed_by.clone());
            debs.push(Deb { name: name.into(), version, file: plain, digest, signed_by });
        }
        let (digest, size, path) = cache.put(index.as_bytes())?;
        blobs.add(digest.clone(), size, Role::AptIndex, path);
        Ok((digest, debs))
    }
}

/// What the name of a package file says: `name_version_arch.deb`, with `%3a` for the colon of an epoch.
struct PackageFile<'a> {
    uri: &'a str,
    file: &'a str,
    name: &'a str,
    version: String,
    arch: &'a str,
}

impl<'a> PackageFile<'a> {
    fn parse(uri: &'a str, file: &'a str) -> Result<Self> {
        let mut parts = file.trim_end_matches(".deb").splitn(3, '_');
        let (Some(name), Some(version), Some(arch)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(Code::Source.err(format!("apt named a package file {file:?} that zd cannot read")));
        };
        Ok(Self { uri, file, name, version: version.replace("%3a", ":"), arch })
    }
}

/// `Inst name [old] (version origin [arch])` lines of a simulation.
pub fn simulated(plan: &str) -> impl Iterator<Item = (&str, &str)> {
    plan.lines().filter_map(|line| {
        let rest = line.strip_prefix("Inst ")?;
        let name = rest.split_whitespace().next()?;
        let version = rest.split_once('(')?.1.split_whitespace().next()?;
        Some((name, version))
    })
}

fn failed(what: &str, why: &str) -> Error {
    // apt repeats itself with warnings; its errors say what matters.
    let errors: Vec<&str> = why.lines().filter(|l| l.starts_with("E:")).collect();
    let why = if errors.is_empty() { why.trim().to_owned() } else { errors.join("; ") };
    let what: String = what.chars().take(120).collect();
    Code::Source
        .err(format!("{what}: {why}"))
        .cure("check this machine's network and apt sources (apt-get update), and the package names in the manifest")
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).at(path)
}

/// This machine's own sources, if it runs the target's release: only those of the distribution.
fn own_sources(target: &Target) -> Result<String> {
    let codename = target.codename()?;
    let mut files: Vec<PathBuf> = vec!["/etc/apt/sources.list".into()];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<_> = dir.flatten().map(|e| e.path()).collect();
        more.sort();
        files.extend(more);
    }
    let mut deb822 = String::new();
    let mut lines = String::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => deb822.push_str(&of_release_deb822(&text, codename)),
            Some("list") => lines.push_str(&of_release_lines(&text, codename)),
            _ => {}
        }
    }
    let found = if deb822.is_empty() { lines } else { deb822 };
    if found.is_empty() {
        return Err(Code::Source
            .err(format!("this machine's apt sources have none for {target} ({codename})"))
            .cure("pack on a machine of that release, or name a sources file: packages.sources = \"debian.sources\""));
    }
    Ok(found)
}

fn of_release(suite: &str, codename: &str) -> bool {
    suite == codename || suite.strip_prefix(codename).is_some_and(|rest| rest.starts_with('-'))
}

fn of_release_deb822(text: &str, codename: &str) -> String {
    let stanzas = text.split("\n\n").filter(|stanza| {
        let suites = stanza.lines().find_map(|l| l.strip_prefix("Suites:")).unwrap_or_default();
        let mut suites = suites.split_whitespace().peekable();
        suites.peek().is_some() && suites.all(|s| of_release(s, codename))
    });
    stanzas.map(|s| format!("{}\n\n", s.trim())).collect()
}

fn of_release_lines(text: &str, codename: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| {
        let Some(rest) = line.strip_prefix("deb ") else { return false };
        let rest = rest.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']').map_or("", |(_, r)| r) } else { rest };
        rest.split_whitespace().nth(1).is_some_and(|suite| of_release(suite, codename))
    });
    lines.map(|l| format!("{l}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sources_of_the_release_are_taken() {
        let text = "Types: deb\nURIs: http://a.example/debian\nSuites: bookworm bookworm-updates\n\n\
                    Types: deb\nURIs: http://b.example\nSuites: nodistro\n";
        let own = of_release_deb822(text, "bookworm");
        assert!(own.contains("a.example") && !own.contains("b.example"), "{own}");
        let text = "deb [signed-by=/x y=z] http://a.example/debian bookworm main\ndeb http://c.example cloud-bookworm main\n# deb";
        assert_eq!(
            of_release_lines(text, "bookworm"),
            "deb [signed-by=/x y=z] http://a.example/debian bookworm main\n"
        );
    }

    #[test]
    fn a_simulation_is_read() {
        let plan = "Inst libc6 (2.36-9 Debian:12 [amd64]) []\nInst tar [1.0] (1.34 Debian:12 [amd64])\nConf tar (1.34)";
        assert_eq!(simulated(plan).collect::<Vec<_>>(), [("libc6", "2.36-9"), ("tar", "1.34")]);
    }
}
