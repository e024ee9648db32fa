//! Services: slots, pointer, state, health, and the gate that makes a switch atomic for clients.

pub mod cluster;
pub mod gate;
pub mod health;
pub mod pointer;
pub mod reload;
pub mod state;
pub mod switch;
