//! Who is acting: what the kernel says and what the caller says, side by side. Only the kernel's word counts.

use std::fs;

use procfs::process::Process;
use serde::{Deserialize, Serialize};

/// More would be a loop, or nobody's session.
const ANCESTORS: usize = 16;
/// Of what a caller says about himself.
const LONGEST: usize = 64;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// Set once at login by PAM, kept by su and sudo (proc_pid_loginuid(5)). None where no login came before, as with timers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loginuid: Option<u32>,
    pub uid: u32,
    /// Of the environment: root can set it to anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sudo_user: Option<String>,
    /// The controlling terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<String>,
    /// Of the environment of this process or of one above it, for sudo takes it away: a hint, as `sudo_user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_connection: Option<String>,
}

impl Who {
    pub fn now() -> Self {
        let loginuid = fs::read_to_string("/proc/self/loginuid").ok().and_then(|t| t.trim().parse().ok());
        Self {
            loginuid: loginuid.filter(|uid| *uid != u32::MAX),
            uid: rustix::process::getuid().as_raw(),
            sudo_user: std::env::var("SUDO_USER").ok().as_deref().and_then(clean),
            tty: Process::myself().and_then(|p| p.stat()).ok().and_then(|s| terminal(s.tty_nr)),
            ssh_connection: ssh_connection(),
        }
    }

    /// The name of the first that the kernel vouches for.
    pub fn name(&self) -> String {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        self.name_in(&passwd)
    }

    fn name_in(&self, passwd: &str) -> String {
        let uid = self.loginuid.unwrap_or(self.uid);
        let name_of = |line: &str| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            (fields.nth(1)? == uid.to_string()).then_some(name)
        };
        passwd.lines().find_map(name_of).and_then(|name| clean(&name)).unwrap_or_else(|| format!("uid {uid}"))
    }
}

/// Short, on one line, and something.
fn clean(text: &str) -> Option<String> {
    let text: String = text.chars().filter(|c| !c.is_control()).take(LONGEST).collect();
    Some(text).filter(|text| !text.is_empty())
}

/// By number (proc_pid_stat(5), Linux devices.txt).
fn terminal(number: i32) -> Option<String> {
    let number = number as u32;
    let (major, minor) = ((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xfff00));
    match major {
        0 => None,
        4 if minor < 64 => Some(format!("tty{minor}")),
        4 => Some(format!("ttyS{}", minor - 64)),
        136..=143 => Some(format!("pts/{}", (major - 136) * 256 + minor)),
        _ => Some(format!("{major}:{minor}")),
    }
}

fn ssh_connection() -> Option<String> {
    let mut process = Process::myself().ok()?;
    for _ in 0..ANCESTORS {
        if let Some(value) = process.environ().ok()?.get(std::ffi::OsStr::new("SSH_CONNECTION")) {
            return clean(&value.to_string_lossy());
        }
        process = Process::new(process.stat().ok()?.ppid).ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nkim:x:1001:1001::/home/kim:/bin/sh\n";

    #[test]
    fn what_the_environment_says_never_outranks_the_kernel() {
        let who = Who { sudo_user: Some("lee".into()), ..Who::default() };
        assert_eq!(who.name_in(PASSWD), "root");
        assert_eq!(Who { loginuid: Some(1001), ..who.clone() }.name_in(PASSWD), "kim");
        assert_eq!(Who { loginuid: Some(1009), ..who }.name_in(PASSWD), "uid 1009");
    }

    #[test]
    fn what_a_caller_says_stays_on_one_short_line() {
        assert_eq!(clean("a\nb\u{1b}[0m"), Some("ab[0m".into()));
        assert_eq!(clean(&"x".repeat(1000)).unwrap().len(), LONGEST);
        assert_eq!(clean("\n"), None);
    }

    #[test]
    fn terminals_by_their_numbers() {
        let names = [0, 0x401, 0x440, 0x8800, 0x8903].map(terminal);
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(names, [None, some("tty1"), some("ttyS0"), some("pts/0"), some("pts/259")]);
    }
}
