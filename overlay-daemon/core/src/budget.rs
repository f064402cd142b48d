//! How many useless frames a session may send: what is refused, dropped, or costs an answer
//! and brings nothing. Decides when its reader pauses and when it has been too much; a
//! message, chunk or record that is taken is never counted, so that traffic is not slowed.

use crate::Millis;
use crate::admission::TokenBucket;

/// Useless frames a second, in the long run.
pub const FRAMES_PER_SECOND: u32 = 1_000;
/// As many at once: all chunks of two dozen messages, refused while they were under way.
pub const FRAMES_AT_ONCE: u32 = 4_000;
/// For how many of them a START counts that is refused: its token was verified, at the price of
/// a signature, before any quota could be asked.
pub const FRAMES_PER_START: u32 = 5;
/// Milliseconds for which nothing is read once they are used up.
pub const PAUSE_MS: u64 = 100;
/// Milliseconds of pauses after which the session ends.
pub const EXCESS_MS: u64 = 10_000;

/// What a useless frame leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Go,
    /// Nothing is read until then.
    Pause(Millis),
    /// The session ends.
    Close,
}

/// The budget of one session.
#[derive(Clone, Debug)]
pub struct FrameBudget {
    bucket: TokenBucket,
    /// Since when pauses follow each other: no half of the budget was saved up in between.
    excess: Option<Millis>,
}

impl FrameBudget {
    /// A full one.
    #[must_use]
    pub fn new(now: Millis) -> Self {
        Self { bucket: TokenBucket::new(FRAMES_PER_SECOND, FRAMES_AT_ONCE, now), excess: None }
    }

    /// Counts `frames` useless ones.
    pub fn spend(&mut self, frames: u32, now: Millis) -> Verdict {
        if self.bucket.wait_for(FRAMES_AT_ONCE / 2, now) == 0 {
            self.excess = None;
        }
        if (0..frames).all(|_| self.bucket.take(now)) {
            return Verdict::Go;
        }
        let since = *self.excess.get_or_insert(now);
        if now.since(since) < EXCESS_MS { Verdict::Pause(now.after(PAUSE_MS)) } else { Verdict::Close }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// F6: a flood is throttled to its rate, then ended; how much of it was read is bounded.
    #[test]
    fn f6_ten_million_frames_are_throttled_then_the_session_ends() {
        let (mut budget, mut now, mut read) = (FrameBudget::new(Millis(0)), Millis(0), 0_u64);
        while read < 10_000_000 {
            read += 1;
            match budget.spend(1, now) {
                Verdict::Go => {}
                Verdict::Pause(until) => now = until,
                Verdict::Close => break,
            }
        }
        let most = u64::from(FRAMES_AT_ONCE) + u64::from(FRAMES_PER_SECOND) * (EXCESS_MS + PAUSE_MS) / 1_000;
        assert!(read <= most + EXCESS_MS / PAUSE_MS + 1, "{read} frames");
        assert_eq!(now, Millis(EXCESS_MS));
    }

    /// What a busy session wastes now and then ends nothing, however long it goes on.
    #[test]
    fn waste_within_the_rate_is_free() {
        let mut budget = FrameBudget::new(Millis(0));
        for second in 0..10_000 {
            assert_eq!(budget.spend(FRAMES_PER_SECOND, Millis(second * 1_000)), Verdict::Go);
        }
    }

    /// A burst that pauses the reader is forgiven once the session is calm.
    #[test]
    fn a_burst_is_forgiven() {
        let mut budget = FrameBudget::new(Millis(0));
        for minute in 0..100 {
            let now = Millis(minute * 60_000);
            assert_eq!(budget.spend(FRAMES_AT_ONCE, now), Verdict::Go);
            assert_eq!(budget.spend(1, now), Verdict::Pause(now.after(PAUSE_MS)));
        }
    }
}
