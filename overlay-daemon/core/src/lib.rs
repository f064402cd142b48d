//! What overlay-daemon decides, without sockets, clocks or randomness.
//!
//! Every machine here takes `(input, now)` and returns its outputs as data; the shell
//! around it (`overlay-daemon/src`) moves bytes and tells the time. Modules stand in the
//! order in which a byte from the network meets them.

pub mod frame;
pub mod codec;

pub mod identity;
pub mod status;
pub mod control;
pub mod grant;
pub mod record;
pub mod compress;

pub mod admission;
pub mod backoff;
pub mod budget;
pub mod session;
pub mod gossip;
pub mod lanes;
pub mod memory;
pub mod readiness;
pub mod node;

pub mod config;

/// A point on the shell's one monotonic clock, in milliseconds since the process began.
///
/// Milliseconds because no deadline in the protocol is finer; an integer because its
/// arithmetic saturates and never panics whatever the clock does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

impl Millis {
    /// The end of time.
    pub const NEVER: Self = Self(u64::MAX);

    /// This time plus `ms` milliseconds, at most the end of time.
    #[must_use]
    pub fn after(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to this time, 0 if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
