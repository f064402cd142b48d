//! Whole programs over loopback: what a person without a cluster does, and what happens when
//! processes die.

mod amnesia;
mod authorities;
mod local;
mod metrics;
mod parity;
mod protocol;
mod reload;
mod sessions;
mod shutdown;
mod status;
mod tokens;
