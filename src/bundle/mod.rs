//! The bundle: what a manifest asks for, as one signed file (bundle/FORMAT.md). Knows no host.

pub mod gzip;
pub mod hashing;
pub mod layout;
pub mod lock;
pub mod manifest;
pub mod medium;
mod parallel;
pub mod reader;
pub mod service;
pub mod signature;
pub mod sources;
pub mod target;
pub mod versions;
pub mod writer;

pub use lock::Lock;
pub use reader::Bundle;
