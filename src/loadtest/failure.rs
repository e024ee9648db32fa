//! What can become of a request instead of a good answer.

use std::error::Error as _;
use std::io;

pub struct Failure {
    pub kind: Kind,
    pub detail: String,
}

/// Kinds of failure; `status-503` and the like are made from the number.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Connect,
    /// Torn down by the server, or while we wrote.
    Reset,
    /// Ended by the server before the answer was complete.
    ClosedEarly,
    Timeout,
    Status(u16),
    /// Not HTTP, or an answer to another request than was sent.
    BadResponse,
    /// This machine could not even try.
    NotSent,
}

impl Failure {
    pub fn new(kind: Kind, detail: impl Into<String>) -> Failure {
        Failure { kind, detail: detail.into() }
    }

    /// Failing to connect; where this machine ran out of ports or files, the server is not to blame.
    pub fn connect(e: io::Error) -> Failure {
        use rustix::io::Errno;
        let local = [Errno::ADDRNOTAVAIL, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
        let ours = e.raw_os_error().is_some_and(|n| local.iter().any(|errno| errno.raw_os_error() == n));
        Failure::new(if ours { Kind::NotSent } else { Kind::Connect }, e.to_string())
    }

    pub fn of(e: hyper::Error) -> Failure {
        let mut detail = e.to_string();
        let mut kind = if e.is_incomplete_message() || e.is_canceled() || e.is_closed() {
            Kind::ClosedEarly
        } else if e.is_parse() {
            Kind::BadResponse
        } else {
            Kind::Reset
        };
        let mut source = e.source();
        while let Some(cause) = source {
            detail.push_str(&format!(": {cause}"));
            if let Some(e) = cause.downcast_ref::<io::Error>() {
                match e.kind() {
                    io::ErrorKind::UnexpectedEof => kind = Kind::ClosedEarly,
                    io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe => kind = Kind::Reset,
                    _ => {}
                }
            }
            source = cause.source();
        }
        Failure { kind, detail }
    }
}

impl Kind {
    pub fn name(self) -> String {
        match self {
            Kind::Connect => "connect".to_owned(),
            Kind::Reset => "reset".to_owned(),
            Kind::ClosedEarly => "closed-early".to_owned(),
            Kind::Timeout => "timeout".to_owned(),
            Kind::Status(n) => format!("status-{n}"),
            Kind::BadResponse => "bad-response".to_owned(),
            Kind::NotSent => "not-sent".to_owned(),
        }
    }
}
