//! `zd inspect`: what is in a bundle, without touching anything.

use std::collections::BTreeSet;

use serde::Serialize;

use super::verify::{BundleArgs, Trust};
use crate::bundle::Lock;
use crate::bundle::manifest::Inlet;
use crate::error::Result;
use crate::ids::Digest;
use crate::ui::Ui;

/// Show what a bundle holds (its signature and lock are checked, the blobs are not: see verify)
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  zd inspect demo-1.zd.tar\n  zd inspect demo-1\n  zd inspect --json | jq .lock.images"
)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
}

#[derive(Serialize)]
struct Report {
    id: Digest,
    bytes: u64,
    fingerprint: String,
    trust: Trust,
    lock: Lock,
}

pub fn run(args: Args, ui: &Ui) -> Result<()> {
    let (bundle, trust) = args.bundle.open()?;
    let report = Report {
        id: bundle.id.clone(),
        bytes: bundle.len(),
        fingerprint: bundle.key.fingerprint(),
        trust,
        lock: bundle.lock,
    };
    ui.report(&report, text);
    Ok(())
}

fn text(r: &Report) -> String {
    let lock = &r.lock;
    let mut out = format!(
        "{} for {}, {}, packed {} by zd {}\nlock {}\nsigned by {}\n",
        lock.title(),
        lock.target,
        bytesize::ByteSize(r.bytes),
        lock.created,
        lock.packed_by,
        r.id,
        r.fingerprint
    );
    for s in &lock.services {
        out.push_str(&format!(
            "\nservice {}: {}:{} on port {}, standby entry {}, {} container(s) per slot",
            s.name, s.image, s.version, s.listen, s.standby_listen, s.instances
        ));
        for Inlet { door, sessions, .. } in s.inlets() {
            out.push_str(&format!(", {door} ({sessions})"));
        }
    }
    for s in lock.services.iter().filter(|s| !s.rights().is_empty()) {
        out.push_str(&format!("\nservice {} is given: {}", s.name, s.rights().join(", ")));
    }
    for release in lock.programs() {
        out.push_str(&format!("\n{release}"));
    }
    for (image, index) in lock.images.iter().filter_map(|i| Some((&i.reference, i.index.as_ref()?))) {
        out.push_str(&format!("\nimage {image}: one platform of the index {index}"));
    }
    let signers: BTreeSet<_> = lock.debs.iter().filter_map(|d| d.signed_by.as_ref()).flatten().collect();
    for key in signers {
        let of =
            lock.debs.iter().filter(|d| d.signed_by.as_ref().is_some_and(|keys| keys.contains(key))).count();
        out.push_str(&format!("\narchive key {key}: {of} of {} packages", lock.debs.len()));
    }
    let mut table = super::status::table(["what", "version", "size", "digest"]);
    for image in &lock.images {
        let size: u64 = image.layers.iter().map(|l| lock.size_of(l)).sum();
        table.add_row([
            format!("image {}", image.reference.name),
            image.reference.version.to_string(),
            bytesize::ByteSize(size).to_string(),
            image.manifest.short().into(),
        ]);
    }
    let files = lock.files.iter().map(|f| (format!("file {}", f.name), String::new(), &f.digest));
    let debs = lock.debs.iter().map(|d| {
        let mark = if d.signed_by.as_ref().is_some_and(Vec::is_empty) { " (UNSIGNED)" } else { "" };
        (format!("package {}{mark}", d.name), d.version.clone(), &d.digest)
    });
    let releases = lock.programs().map(|r| {
        let mark = if r.unsigned { " (UNSIGNED)" } else { "" };
        (format!("release {}{mark}", r.product), r.version.to_string(), &r.digest)
    });
    for (what, version, digest) in files.chain(releases).chain(debs) {
        table.add_row([
            what,
            version,
            bytesize::ByteSize(lock.size_of(digest)).to_string(),
            digest.short().into(),
        ]);
    }
    out.push_str(&format!("\n{table}"));
    out
}
