//! What the whole-program tests share: where the built programs are, a child process that
//! never outlives its test, polling to a deadline, a Kubernetes control plane on loopback, a Kubernetes node, and a Tor network.
//! It asserts nothing; the test targets beside it do.

pub mod cases;
pub mod cluster;
pub mod control_plane;
pub mod daemon;
pub mod files;
pub mod http;
pub mod kubectl;
pub mod oap;
pub mod operator;
pub mod packets;
pub mod process;
pub mod profile;
pub mod programs;
pub mod quic;
pub mod status;
pub mod subscriber;
#[cfg(test)]
mod tables;
pub mod tor;
pub mod trust;
pub mod wait;
pub mod watch;
