//! Which archive a package comes from, and who signed that (sources.list(5), apt-secure(8)).

use std::fs;
use std::path::Path;

use pgp::composed::{CleartextSignedMessage, Deserializable, DetachedSignature};
use pgp::packet::Signature;

use crate::error::{Code, Error, Result};
use crate::ids::Fingerprint;

/// Options of a source with which apt takes packages that nobody signed; in a `.sources` file they are fields.
const UNSIGNED: [&str; 3] = ["trusted", "allow-insecure", "allow-downgrade-to-insecure"];

/// What of a sources file takes packages without a signature: the first such option, and its line. What apt would read
/// in another way than it looks (quotes, %xx, a value on the next line) counts as one.
pub fn unsigned_option(sources: &str) -> Option<&str> {
    let is_one = |key: &str, value: &str| {
        let no = ["no", "false", "without", "off", "disable", "0"];
        UNSIGNED.iter().any(|option| key.eq_ignore_ascii_case(option))
            && !no.contains(&value.trim().to_ascii_lowercase().as_str())
    };
    sources.lines().map(str::trim).filter(|line| !line.starts_with('#')).find(|line| {
        let field = line.split_once(':').is_some_and(|(key, value)| is_one(key.trim_end(), value));
        let options = line.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("", |o| o.0);
        let option = options
            .split_whitespace()
            .filter_map(|o| o.split_once('='))
            .any(|(key, value)| is_one(key.trim_end_matches(['+', '-']), value));
        field || option || (line.starts_with("deb") && options.contains(['"', '%']))
    })
}

pub fn refused(line: &str) -> Error {
    Code::Source
        .err(format!("an apt source takes packages that nobody signed: {line}"))
        .cure("take the option out, with the archive's key in Signed-By; or say that you mean it: `unsigned-packages = true` in [packages]")
}

/// One list of packages as apt has it (a stanza of apt-get indextargets).
pub struct Archive {
    /// As `apt-cache madison` names it.
    description: String,
    /// Packages lie beneath it.
    uri: String,
    /// Keys whose signatures its Release file carries; none where nothing is signed.
    pub signed_by: Vec<Fingerprint>,
}

/// Whether apt did not insist on a signature: `FILE:N`, the Nth stanza of a `.sources` file or line of a `.list`.
fn may_be_unsigned(entry: &str) -> bool {
    let source = || {
        let (path, n) = entry.rsplit_once(':')?;
        let (text, n) = (fs::read_to_string(path).ok()?, n.parse::<usize>().ok()?.checked_sub(1)?);
        if path.ends_with(".list") {
            return text.lines().nth(n).map(|line| unsigned_option(line).is_some());
        }
        // apt does not count a stanza of comments.
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let text = lines.join("\n");
        let mut stanzas = text.split("\n\n").filter(|stanza| !stanza.trim().is_empty());
        stanzas.nth(n).map(|stanza| unsigned_option(stanza).is_some())
    };
    source().unwrap_or(true)
}

/// Of all that apt has fetched.
pub fn archives(index_targets: &str) -> Result<Vec<Archive>> {
    let mut found = Vec::new();
    for stanza in index_targets.split("\n\n") {
        let field = |key: &str| {
            stanza.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(": ")).unwrap_or_default()
        };
        if field("Created-By") != "Packages" {
            continue;
        }
        let (list, name) = (field("Filename"), field("MetaKey").replace('/', "_"));
        // What follows the name is how the list is compressed.
        let Some((beside, _)) = list.rsplit_once(&name) else { continue };
        found.push(Archive {
            description: field("Description").to_owned(),
            uri: field("Repo-URI").to_owned(),
            signed_by: if may_be_unsigned(field("Sourcesentry")) { Vec::new() } else { signers(beside)? },
        });
    }
    Ok(found)
}

/// Of the package whose file is at `uri`, given what `apt-cache madison` says of it (`name | version | archive`).
pub fn of_package<'a>(
    archives: &'a [Archive],
    madison: &str,
    name: &str,
    version: &str,
    uri: &str,
) -> Result<&'a Archive> {
    let named = madison.lines().filter_map(|line| {
        let mut fields = line.split('|').map(str::trim);
        (fields.next()? == name && fields.next()? == version).then_some(())?;
        archives.iter().find(|a| fields.clone().next() == Some(&a.description))
    });
    let mut of_it = named.filter(|archive| uri.starts_with(&archive.uri));
    of_it
        .next()
        .ok_or_else(|| Code::Source.err(format!("apt does not say where {name} {version} comes from")))
}

/// apt has checked these signatures; it trusts one of the keys at least.
fn signers(beside: &str) -> Result<Vec<Fingerprint>> {
    let read = |name: &str| fs::read_to_string(Path::new(&format!("{beside}{name}"))).ok();
    let bad = |e: pgp::errors::Error| Code::Source.err(format!("{beside}InRelease: {e}"));
    let signatures: Vec<Signature> = if let Some(text) = read("InRelease") {
        CleartextSignedMessage::from_string(&text).map_err(bad)?.0.signatures().to_vec()
    } else if let Some(text) = read("Release.gpg") {
        let (many, _) = DetachedSignature::from_armor_many(text.as_bytes()).map_err(bad)?;
        many.map(|one| one.map(|s| s.signature)).collect::<Result<_, _>>().map_err(bad)?
    } else {
        Vec::new()
    };
    let fingerprints = signatures.iter().flat_map(Signature::issuer_fingerprint);
    let mut found: Vec<Fingerprint> = fingerprints
        .map(|f| format!("{f:X}").parse())
        .collect::<Result<_, String>>()
        .map_err(|e| Code::Source.err(e))?;
    found.sort();
    found.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_take_what_nobody_signed_are_found() {
        for bad in [
            "deb [trusted=yes] http://a.example/debian bookworm main",
            "deb [ arch=amd64 Allow-Insecure=true ] http://a.example bookworm main",
            "deb [allow-downgrade-to-insecure=yes] http://a.example bookworm main",
            "Types: deb\nURIs: copy:/x\nSuites: ./\nTrusted: yes\n",
            "Types: deb\ntrusted:  1\n",
            "Types: deb\nTrusted:\n yes\n",
            "deb [\"trusted=yes\"] http://a.example bookworm main",
            "deb [%74rusted=yes] http://a.example bookworm main",
        ] {
            assert!(unsigned_option(bad).is_some(), "{bad}");
        }
        for good in [
            "deb [trusted=no signed-by=/x] http://a.example/trusted=yes bookworm main",
            "# deb [trusted=yes] http://a.example bookworm main",
            "Types: deb\nURIs: http://trusted: yes\nSuites: bookworm\nTrusted: no\n",
        ] {
            assert_eq!(unsigned_option(good), None);
        }
    }

    #[test]
    fn a_source_is_found_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let entry = |name: &str, text: &str, n: u32| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            may_be_unsigned(&format!("{}:{n}", path.display()))
        };
        let list = "# of the site\ndeb [trusted=yes] copy:/x ./\ndeb http://a.example bookworm main\n";
        assert!(entry("zd.list", list, 2) && !entry("zd.list", list, 3) && entry("zd.list", list, 9));
        let stanzas =
            "# of the site\n\nTypes: deb\nTrusted: yes\n\n\n# signed\nTypes: deb\nSuites: bookworm\n";
        assert!(entry("zd.sources", stanzas, 1) && !entry("zd.sources", stanzas, 2));
        assert!(may_be_unsigned("/none/zd.list:1") && may_be_unsigned(""));
    }

    #[test]
    fn an_archive_is_known_by_version_and_address() {
        let targets = "MetaKey: Packages\nDescription: copy:/site ./ Packages\nFilename: /none/_site_._Packages\n\
                       Created-By: Packages\nRepo-URI: copy:/site/\n\n\
                       MetaKey: main/binary-amd64/Packages\nDescription: http://a.example/debian bookworm/main amd64 Packages\n\
                       Filename: /none/a_debian_dists_bookworm_main_binary-amd64_Packages\nCreated-By: Packages\n\
                       Repo-URI: http://a.example/debian/\n";
        let archives = archives(targets).unwrap();
        let madison = " tar | 1.34 | copy:/site ./ Packages\n tar | 1.34 | http://a.example/debian bookworm/main amd64 Packages\n";
        let of = |version, uri| of_package(&archives, madison, "tar", version, uri);
        assert_eq!(
            of("1.34", "http://a.example/debian/pool/t/tar.deb").unwrap().uri,
            "http://a.example/debian/"
        );
        assert_eq!(of("1.34", "copy:/site/./tar.deb").unwrap().uri, "copy:/site/");
        assert!(of("1.35", "copy:/site/./tar.deb").is_err());
    }
}
