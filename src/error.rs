//! What zd says when it cannot go on: the thing, what was expected, and the cure.
//!
//! Every error carries a [`Code`]. Its name is stable and meant for scripts and for searching
//! INSTALL.md; its exit code comes from the one table in [`Code::exit`].

use std::fmt;
use std::path::Path;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of thing went wrong. Names are stable; `exit()` is the documented table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A state that zd's own code should have made impossible.
    Bug,
    /// The command line asks for something that does not exist or does not fit together.
    Usage,
    /// A manifest that cannot be read as one.
    Manifest,
    /// A source named by a manifest could not be had as described.
    Source,
    /// A bundle whose bytes are not what its lock says, or that is no bundle.
    Bundle,
    /// A signature that is missing, broken, or made by a key this host does not trust.
    Signature,
    /// A bundle made for another operating system, release or architecture.
    Target,
    /// The host is not fit for what was asked; nothing was changed.
    Preflight,
    /// A file operation failed.
    Io,
    /// A file system is full.
    DiskFull,
    /// A command zd ran on the host failed.
    Command,
    /// The Docker daemon does not answer, or refused.
    Docker,
    /// The private registry does not answer, or refused.
    Registry,
    /// Nomad, Consul or consul-template does not answer, or refused.
    Stack,
    /// nginx refused its configuration or does not serve.
    Nginx,
    /// A service did not become healthy in time.
    Unhealthy,
    /// A switch could not drain the old slot in time; the old slot serves on.
    NotDrained,
    /// After a switch, clients did not see what they should.
    Unverified,
    /// Another zd holds the lock.
    Locked,
    /// An earlier plan was interrupted and has to be finished or undone first.
    Unfinished,
    /// Another bundle is installed here.
    OtherBundle,
    /// Nothing is installed here, or not the service that was named.
    NotInstalled,
    /// The version is not known to this host's registry.
    UnknownVersion,
    /// The audit log's chain is broken, or the signature of its head is not as it should be.
    Audit,
    /// A load test saw failed requests or mixed versions.
    LoadFailed,
    /// The person said no, or there was nobody to ask.
    NotConfirmed,
    /// Not in the role that the person has on this host.
    NotAllowed,
}

impl Code {
    /// Stable name, as shown in `error[name]` and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Code::Bug => "bug",
            Code::Usage => "usage",
            Code::Manifest => "manifest",
            Code::Source => "source",
            Code::Bundle => "bundle",
            Code::Signature => "signature",
            Code::Target => "target",
            Code::Preflight => "preflight",
            Code::Io => "io",
            Code::DiskFull => "disk-full",
            Code::Command => "command",
            Code::Docker => "docker",
            Code::Registry => "registry",
            Code::Stack => "stack",
            Code::Nginx => "nginx",
            Code::Unhealthy => "unhealthy",
            Code::NotDrained => "not-drained",
            Code::Unverified => "unverified",
            Code::Locked => "locked",
            Code::Unfinished => "unfinished",
            Code::OtherBundle => "other-bundle",
            Code::NotInstalled => "not-installed",
            Code::UnknownVersion => "unknown-version",
            Code::Audit => "audit",
            Code::LoadFailed => "load-failed",
            Code::NotConfirmed => "not-confirmed",
            Code::NotAllowed => "not-allowed",
        }
    }

    /// Process exit code. 0 is success; this is the whole table (README, "Exit codes").
    pub fn exit(self) -> u8 {
        match self {
            Code::Bug => 1,
            Code::Usage | Code::NotConfirmed | Code::NotAllowed => 2,
            Code::Manifest | Code::Source => 3,
            Code::Bundle | Code::Signature | Code::Target => 4,
            Code::Preflight => 5,
            Code::Io | Code::DiskFull | Code::Command => 6,
            Code::Docker | Code::Registry | Code::Stack | Code::Nginx => 7,
            Code::Unhealthy | Code::NotDrained | Code::Unverified => 8,
            Code::Locked | Code::Unfinished | Code::OtherBundle => 9,
            Code::NotInstalled | Code::UnknownVersion => 10,
            Code::Audit => 11,
            Code::LoadFailed => 12,
        }
    }

    /// An error of this kind: `what` names the thing and what was expected of it.
    pub fn err(self, what: impl Into<String>) -> Error {
        Error { code: self, what: what.into(), cure: None }
    }
}

#[derive(Debug)]
pub struct Error {
    pub code: Code,
    pub what: String,
    pub cure: Option<String>,
}

impl Error {
    /// Adds what the person can do about it.
    pub fn cure(mut self, cure: impl Into<String>) -> Self {
        self.cure = Some(cure.into());
        self
    }

    /// Puts what was being done before what went wrong.
    pub fn during(mut self, doing: impl fmt::Display) -> Self {
        self.what = format!("{doing}: {}", self.what);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {}

/// The cure of a disk that is full.
pub const FREE_SOME: &str = "zd gc, docker image prune -a, journalctl --vacuum-size=200M, then look for what grows: du -xh / | sort -h | tail";

/// An I/O error at a path; a full disk gets its own code and cure.
pub fn io(path: impl AsRef<Path>, e: std::io::Error) -> Error {
    let path = path.as_ref().display();
    match e.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Code::DiskFull
            .err(format!("{path}: the disk is full"))
            .cure("free some space there (df -h shows how much is left), then run the same command again"),
        std::io::ErrorKind::PermissionDenied => {
            Code::Io.err(format!("{path}: permission denied")).cure("run it as root: sudo zd …")
        }
        _ => Code::Io.err(format!("{path}: {e}")),
    }
}

/// `result.at(path)?` for I/O that names its file.
pub trait At<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| io(path, e))
    }
}

/// `result.code(Code::Docker, || "what was being done")?` for errors of libraries.
pub trait OrCode<T> {
    fn or_code(self, code: Code, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> OrCode<T> for std::result::Result<T, E> {
    /// The library's error becomes ours, behind `what`.
    fn or_code(self, code: Code, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| code.err(format!("{what}: {e}")))
    }
}

/// A file that a manifest names: missing is the manifest's fault, not the disk's.
pub fn source_file(path: &Path, e: std::io::Error) -> Error {
    if e.kind() != std::io::ErrorKind::NotFound {
        return io(path, e);
    }
    Code::Source
        .err(format!("{}: there is no such file", path.display()))
        .cure("correct the path in the manifest (it is relative to the manifest)")
}
