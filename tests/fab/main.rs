//! zd on booted hosts without a network. Run by `./test`, which prepares what they need:
//! `cargo test --release --test fab -- --ignored --test-threads=1 --nocapture`

mod host;

// They start in the order of their names: what takes longest comes first, so that no core waits for it in the end.
mod another_bundle;
mod attacks_audit;
mod attacks_gate;
mod attacks_net;
mod attacks_rootfs;
mod attacks_trust;
mod backup;
mod bad_hosts;
mod crash;
mod engine;
mod firewall;
mod install;
mod journal;
mod long;
mod nomad;
mod ports;
mod reconfigure;
mod registry;
mod signed;
mod stones;
mod tcp;
mod traffic;
