//! The shell around `overlay-core`: sockets, TLS, keys, admin HTTP, tasks. Modules stand in
//! the order in which a connection meets them.

pub mod clock;
pub mod logging;
pub mod check;

pub mod kms;
pub mod transport;

pub mod session;
pub mod accept;
pub mod dial;
pub mod hub;
pub mod readiness;

pub mod metrics;
pub mod admin;

pub mod run;

pub mod client;
