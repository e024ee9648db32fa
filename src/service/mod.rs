//! Services: slots, pointer, state, health, and the gate that makes a switch atomic for clients.

pub mod cluster;
pub mod gate;
pub mod health;
pub mod in_flight;
pub mod pointer;
pub mod reload;
pub mod remaining;
pub mod renew;
pub mod sessions;
pub mod state;
pub mod switch;
pub mod watch;
