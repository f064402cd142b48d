//! Rate and in-flight caps (I-9), checked before anything costs. Integer arithmetic over the
//! caller's clock: a clock that stands still or jumps grants at most one bucket.

use crate::Millis;
use crate::status::{Refusal, Status};

/// A token bucket: `per_second` tokens a second, at most `burst` of them saved up.
///
/// Counts in thousandths of a token, so that a millisecond of the lowest rate still counts.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    per_second: u64,
    capacity: u64,
    level: u64,
    at: Millis,
}

impl TokenBucket {
    /// A full bucket.
    #[must_use]
    pub fn new(per_second: u32, burst: u32, now: Millis) -> Self {
        let capacity = u64::from(burst) * 1000;
        Self { per_second: u64::from(per_second), capacity, level: capacity, at: now }
    }

    /// The same with another rate: what is saved up stays, as far as the new burst holds it.
    #[must_use]
    pub fn resized(&self, per_second: u32, burst: u32, now: Millis) -> Self {
        let mut old = self.clone();
        old.refill(now);
        let new = Self::new(per_second, burst, now);
        Self { level: old.level.min(new.capacity), ..new }
    }

    /// Takes one token if there is one.
    pub fn take(&mut self, now: Millis) -> bool {
        self.refill(now);
        let enough = self.level >= 1000;
        if enough {
            self.level -= 1000;
        }
        enough
    }

    /// Milliseconds until there is a token; 0 if there is one.
    #[must_use]
    pub fn wait_ms(&self, now: Millis) -> u64 {
        self.wait_for(1, now)
    }

    /// Milliseconds until there are `tokens`, if none is taken; 0 if there are.
    #[must_use]
    pub fn wait_for(&self, tokens: u32, now: Millis) -> u64 {
        let level = self.level.saturating_add(now.since(self.at).saturating_mul(self.per_second));
        (u64::from(tokens) * 1000).saturating_sub(level).div_ceil(self.per_second.max(1))
    }

    fn refill(&mut self, now: Millis) {
        let gained = now.since(self.at).saturating_mul(self.per_second);
        self.level = self.level.saturating_add(gained).min(self.capacity);
        self.at = self.at.max(now);
    }
}

const ANSWER_SOON_MS: u64 = 50;
const FULL: Refusal = Refusal::later(Status::QuotaExhausted, "too many requests in flight", ANSWER_SOON_MS);

/// Requests that one side may have: so many a second, so many unanswered.
#[derive(Clone, Debug)]
pub struct Quota {
    bucket: TokenBucket,
    inflight: u32,
    most: u32,
}

impl Quota {
    /// A quota of `rps` requests a second, as many at once, and `inflight` unanswered.
    #[must_use]
    pub fn new(rps: u32, inflight: u32, now: Millis) -> Self {
        Self { bucket: TokenBucket::new(rps, rps, now), inflight: 0, most: inflight }
    }

    /// Other caps from now on; what is in flight stays counted.
    pub fn resize(&mut self, rps: u32, inflight: u32, now: Millis) {
        self.bucket = self.bucket.resized(rps, rps, now);
        self.most = inflight;
    }

    /// Whether one request more may begin.
    ///
    /// # Errors
    /// 429 with the time to wait.
    pub fn admit(&mut self, now: Millis) -> Result<(), Refusal> {
        if self.inflight >= self.most {
            return Err(FULL);
        }
        if !self.bucket.take(now) {
            let wait = self.bucket.wait_ms(now);
            return Err(Refusal::later(Status::QuotaExhausted, "too many requests a second", wait));
        }
        Ok(())
    }

    /// Whether one may begin that its sender takes its time with: half of the places are for
    /// those.
    ///
    /// # Errors
    /// 429 with the time to wait.
    pub fn admit_long(&self) -> Result<(), Refusal> {
        if self.inflight >= self.most.div_ceil(2) { Err(FULL) } else { Ok(()) }
    }

    /// Counts a request in: it is in flight until its answer is handed to the writer.
    pub fn enter(&mut self) {
        self.inflight = self.inflight.saturating_add(1);
    }

    /// Counts `answered` requests out.
    pub fn leave(&mut self, answered: u32) {
        self.inflight = self.inflight.saturating_sub(answered);
    }

    /// Requests not yet answered.
    #[must_use]
    pub fn inflight(&self) -> u32 {
        self.inflight
    }

    /// How full it is, 0 to 100.
    #[must_use]
    pub fn percent(&self) -> u8 {
        percent(u64::from(self.inflight), u64::from(self.most))
    }
}

/// `part` of `whole` as 0 to 100; an empty whole is full.
#[must_use]
pub fn percent(part: u64, whole: u64) -> u8 {
    let share = part.saturating_mul(100).checked_div(whole).unwrap_or(100);
    u8::try_from(share.min(100)).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// I-9, G-6: the cap answers 429 and says when to come back.
    #[test]
    fn a_bucket_refills_with_time() {
        let mut bucket = TokenBucket::new(200, 3, Millis(0));
        let taken = (0..10).filter(|_| bucket.take(Millis(0))).count();
        assert_eq!((taken, bucket.wait_ms(Millis(0))), (3, 5));
        assert!(!bucket.take(Millis(4)) && bucket.take(Millis(5)));
    }

    /// G9: no clock, however it jumps, grants more than one bucket or panics.
    #[test]
    fn a_jumping_clock_grants_one_bucket() {
        for jump in [0, 86_400_000, u64::MAX] {
            let mut bucket = TokenBucket::new(u32::MAX, 4, Millis(1_000));
            while bucket.take(Millis(1_000)) {}
            assert_eq!((0..10).filter(|_| bucket.take(Millis(jump))).count(), if jump > 1_000 { 4 } else { 0 });
        }
    }

    #[test]
    fn in_flight_is_capped_and_given_back() {
        let mut quota = Quota::new(100, 2, Millis(0));
        for _ in 0..2 {
            assert!(quota.admit(Millis(0)).is_ok());
            quota.enter();
        }
        assert_eq!(quota.admit(Millis(0)).unwrap_err().status.code(), 429);
        assert_eq!((quota.inflight(), quota.percent()), (2, 100));
        quota.leave(1);
        assert!(quota.admit(Millis(0)).is_ok());
    }
}
