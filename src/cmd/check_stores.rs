//! `zd check-stores`, run by Nomad's unit before Nomad starts: a client of Nomad that remembers allocations of which the
//! server beside it has never heard stops all of them, and so what serves. Better that Nomad does not start.

use std::path::Path;

use crate::error::{Code, Result};
use crate::host::{nomad, paths, stores};

/// Refuse a start of Nomad that would stop what serves
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_: Args) -> Result<()> {
    nomad::put_back_ids()?;
    match stores::nomad(Path::new(paths::NOMAD_DATA))?.first() {
        Some(broken) => Err(Code::Stack.err(broken.what()).cure(broken.cure())),
        None => Ok(()),
    }
}
