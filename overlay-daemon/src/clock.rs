//! The one clock. Everything else is told the time; nothing else asks for it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use overlay_core::Millis;
use overlay_core::node::Clock as CoreClock;
use tokio::time::Instant;

/// Time since the process began, and time of day. Copies share their zero.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    zero: Instant,
}

impl Clock {
    /// A clock whose zero is now: one a process, made by the composition root.
    #[must_use]
    pub fn start() -> Self {
        // tokio's, so that a test's paused time stops this clock too.
        Self { zero: Instant::now() }
    }

    /// Now, on the monotonic clock that the core is told.
    #[must_use]
    pub fn now(&self) -> Millis {
        Millis(u64::try_from(self.zero.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Now, on both clocks that the core is told.
    #[must_use]
    pub fn time(&self) -> CoreClock {
        CoreClock { now: self.now(), unix_ms: self.unix_ms() }
    }

    /// The instant for a timer that fires at `at`.
    #[must_use]
    pub fn instant(&self, at: Millis) -> Instant {
        // Past a century nothing fires anyway, and an Instant must not overflow.
        const FAR: u64 = 100 * 365 * 86_400_000;
        self.zero + Duration::from_millis(at.0.min(FAR))
    }

    /// The time on the monotonic clock that `at` is, for the core.
    #[must_use]
    pub fn millis(&self, at: Instant) -> Millis {
        Millis(u64::try_from(at.saturating_duration_since(self.zero).as_millis()).unwrap_or(u64::MAX))
    }

    /// Now, for what is measured rather than decided on.
    #[must_use]
    pub fn stamp(&self) -> Instant {
        Instant::now()
    }

    /// The instant `after` from now.
    #[must_use]
    pub fn deadline(&self, after: Duration) -> Instant {
        Instant::now() + after
    }

    /// Milliseconds since 1970 by the system's clock, 0 if that stands before it.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_clock_goes_with_the_runtime_and_never_overflows() {
        let clock = Clock::start();
        assert_eq!(clock.now(), Millis(0));
        tokio::time::advance(Duration::from_millis(1_500)).await;
        assert_eq!(clock.now(), Millis(1_500));
        assert_eq!(clock.instant(Millis(1_500)), clock.deadline(Duration::ZERO));
        assert!(clock.instant(Millis(u64::MAX)) > clock.instant(Millis(1_500)));
        assert!(clock.unix_ms() > 1_700_000_000_000);
    }
}
