//! What an operator without root may ask for. sudo runs `zd as ROLE …` for the role's group and nothing else; the rest is
//! decided here, where each option is an option: sudo compares arguments joined by spaces, in which a reason can hold
//! what looks like one, and before 1.9.10 (Ubuntu 20.04) it has no regular expressions.

use std::ffi::OsString;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory};

use crate::cmd::Cli;
use crate::error::{Code, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Looks: status, history, doctor, logs
    Viewer,
    /// Also deploy, switch, rollback, scale, and backup to the folder that is set
    Operator,
    /// All that root may ask zd for: as good as root
    Admin,
}

/// Verbs and their options; what is not named is refused, so a new option is, until somebody has thought about it.
type Allowed = [(&'static str, &'static [&'static str])];
const LOOKS: &Allowed = &[
    ("status", &[]),
    ("history", &["last"]),
    ("doctor", &[]),
    ("logs", &["component", "service", "lines", "follow"]),
];
const CHANGES: &Allowed = &[
    ("deploy", &["version", "service", "dry_run", "yes", "reason"]),
    ("switch", &["service", "to", "drain", "cut", "dry_run", "yes", "reason"]),
    ("rollback", &["service", "drain", "cut", "dry_run", "yes", "reason"]),
    ("scale", &["service", "instances", "dry_run", "yes", "reason"]),
    ("backup", &["dry_run", "yes", "reason"]),
];

impl Role {
    pub const ALL: [Role; 3] = [Role::Viewer, Role::Operator, Role::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }

    /// Takes `as ROLE` off the command line. It counts in front only, where the rule of sudo has put it.
    pub fn taken(words: &mut Vec<OsString>) -> Result<Option<Role>> {
        if words.get(1).is_none_or(|word| word != "as") {
            return Ok(None);
        }
        let role = Role::ALL.into_iter().find(|role| words.get(2).is_some_and(|word| word == role.name()));
        let role = role.ok_or_else(|| {
            Code::Usage
                .err("zd as: no such role")
                .cure("zd as viewer|operator|admin VERB, for example: sudo zd as operator switch")
        })?;
        words.drain(1..3);
        Ok(Some(role))
    }

    pub fn may(self, verb: &str, given: &ArgMatches) -> Result<()> {
        let allowed = match self {
            Role::Admin => return Ok(()),
            Role::Viewer => [LOOKS, &[]],
            Role::Operator => [LOOKS, CHANGES],
        };
        let name = self.name();
        let ask = "ask an admin of this host, or who has root there";
        let Some((_, options)) = allowed.into_iter().flatten().find(|(allowed, _)| *allowed == verb) else {
            return Err(Code::NotAllowed.err(format!("zd {verb} is not in the role {name}")).cure(ask));
        };
        let cli = Cli::command();
        let all = cli.find_subcommand(verb).into_iter().flat_map(|verb| verb.get_arguments());
        // Those of every verb, --json and --quiet, stand elsewhere.
        let mut refused = all.map(|argument| argument.get_id().as_str()).filter(|id| {
            !options.contains(id) && !matches!(given.value_source(id), None | Some(ValueSource::DefaultValue))
        });
        match refused.next() {
            None => Ok(()),
            Some(id) => {
                let option = id.replace('_', "-");
                Err(Code::NotAllowed
                    .err(format!("zd {verb} with --{option} is not in the role {name}"))
                    .cure(ask))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> std::result::Result<(), String> {
        let mut words: Vec<OsString> = line.split(' ').map(|word| word.replace('_', " ").into()).collect();
        let role = Role::taken(&mut words).map_err(|e| e.what)?.ok_or("no role")?;
        let given = Cli::command().try_get_matches_from(words).map_err(|e| e.kind().to_string())?;
        let (verb, options) = given.subcommand().unwrap();
        role.may(verb, options).map_err(|e| e.what)
    }

    #[test]
    fn a_viewer_changes_nothing() {
        for line in ["status", "status --json", "history --last 5", "doctor", "logs nginx -n 9 -f"] {
            asked(&format!("zd as viewer {line}")).unwrap();
        }
        for line in [
            "deploy v2",
            "switch",
            "rollback",
            "scale hello 2",
            "backup",
            "gc",
            "support",
            "uninstall",
            "undo",
        ] {
            let verb = line.split(' ').next().unwrap();
            let said = asked(&format!("zd as viewer {line}")).unwrap_err();
            assert_eq!(said, format!("zd {verb} is not in the role viewer"));
        }
    }

    #[test]
    fn an_operator_names_no_file_bundle_key_or_generation() {
        for line in
            ["deploy v2 hello", "switch --to blue --drain 1s --yes", "rollback", "scale hello 2", "backup"]
        {
            asked(&format!("zd as operator {line} --reason=ticket_--to_/etc")).unwrap();
        }
        asked("zd as operator logs nginx").unwrap();
        for line in [
            "backup --to /etc",
            "backup --recipient x",
            "backup --keep 1",
            "rollback --generation 1",
            "install",
            "upgrade /tmp/x",
            "restore x --identity y",
            "verify --key x",
            "support --out /etc/x",
            "secrets rotate",
            "reconfigure --ip auto",
            "uninstall --yes",
            "undo",
            "keygen --out /etc/x",
            "man x",
        ] {
            let said = asked(&format!("zd as operator {line}")).unwrap_err();
            assert!(said.ends_with("is not in the role operator"), "{line}: {said}");
        }
    }

    #[test]
    fn a_role_stands_in_front_and_once() {
        assert_eq!(asked("zd as root status").unwrap_err(), "zd as: no such role");
        assert_eq!(asked("zd as").unwrap_err(), "zd as: no such role");
        // What sudo's rule cannot tell from `as operator switch`.
        assert_eq!(asked("zd as operator_switch").unwrap_err(), "zd as: no such role");
        assert_eq!(asked("zd as_operator switch").unwrap_err(), "no role");
        assert!(asked("zd as operator as admin uninstall").is_err());
        assert!(asked("zd as operator switch as admin").is_err());
        asked("zd as admin uninstall --purge --yes").unwrap();
    }

    #[test]
    fn what_is_allowed_exists() {
        let cli = Cli::command();
        for (verb, options) in LOOKS.iter().chain(CHANGES) {
            let verb = cli.find_subcommand(verb).unwrap_or_else(|| panic!("{verb}"));
            for option in *options {
                assert!(verb.get_arguments().any(|argument| argument.get_id() == option), "{verb} {option}");
            }
        }
    }
}
