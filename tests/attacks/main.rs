//! The rows of the attack catalogue (`../ATTACKS.md`) against a real daemon process. Each
//! test is named by its row. While it attacks, an honest probe goes on publishing and
//! subscribing (**H**), and afterwards the daemon is asked whether it is whole (**P**).
//!
//! Nothing passes or fails by the clock: what is asserted is counts, and ratios measured in
//! the same run, such as the probe's latency beside its own before the attack. `OVERLAY_SOAK=1` (`tests/run soak`) attacks in full size.

mod admin;
mod exhaustion;
mod framing;
mod handshake;
mod probe;
mod quic;
mod sessions;
mod shutdown;
mod target;
mod tokens;
