//! zd on booted hosts without a network. Run by `./test`, which prepares what they need:
//! `cargo test --release --test fab -- --ignored --test-threads=1 --nocapture`

mod host;

mod bad_hosts;
mod crash;
mod firewall;
mod install;
mod nomad;
mod traffic;
