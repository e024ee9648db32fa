//! Backups of a host: one file per run, a tar encrypted by age (age-encryption.org/v1) to a key whose secret half
//! is not on the host. `index` says what is in it, `writer` writes it, `reader` reads it and believes no byte unseen.

pub mod index;
pub mod key;
pub mod reader;
pub mod settings;
pub mod writer;

pub use index::Index;
pub use reader::Backup;
pub use settings::Settings;
