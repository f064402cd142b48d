//! The shell around `overlay-core`: sockets, TLS, keys, admin HTTP, tasks.
//!
//! [`run`] puts it together, after [`confine`] gave up what a daemon does not need. A
//! connection meets [`transport`] and [`kms`] when it is accepted
//! ([`accept`]) or dialled ([`dial`]), then its own [`session`], whose frames go to the one
//! [`hub`]. [`readiness`], [`metrics`] and [`admin`] tell of it. [`check`] reads configuration
//! and [`inspect`] a token without starting anything; [`client`] is the other end.

pub mod check;
pub mod clock;
pub mod confine;
pub mod inspect;
pub mod logging;
pub mod notice;

pub mod kms;
pub mod transport;

pub mod accept;
pub mod dial;
pub mod gate;
pub mod hub;
pub mod readiness;
pub mod reload;
pub mod session;

pub mod admin;
pub mod metrics;

pub mod run;
pub mod runtime;

pub mod client;
