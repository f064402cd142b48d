//! When to ask again what was refused for now (C-3): exponential, with jitter, and not for
//! ever. Draws no randomness: whoever seeds [`Jitter`] does.

use crate::Millis;

/// Milliseconds before the first attempt after a refusal that names no time.
pub const FIRST_MS: u64 = 250;
/// Milliseconds before any attempt, at the most: what the other side asks for is clamped to it.
pub const MOST_MS: u64 = 60_000;
/// Milliseconds after the first of refusals in a row when no further one is waited out: the
/// session ends, and a new one is dialled.
pub const GIVE_UP_MS: u64 = 300_000;
/// A delay is longer than it must be by at most its share of this: a mesh that was refused at
/// once does not come back at once.
const JITTER_SHARE: u64 = 4;

/// Refusals in a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    refused: u32,
    since: Option<Millis>,
}

impl Backoff {
    /// Refused once more: milliseconds to wait, at least `asked` as far as that is at most
    /// [`MOST_MS`], and at most a quarter over. Nothing after [`GIVE_UP_MS`].
    pub fn handle_refusal(&mut self, asked: u64, now: Millis, jitter: &mut Jitter) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        if now.since(since) >= GIVE_UP_MS {
            return None;
        }
        let doubled = FIRST_MS.saturating_mul(1 << self.refused.min(16));
        self.refused = self.refused.saturating_add(1);
        let wait = doubled.max(asked).min(MOST_MS);
        Some(wait + jitter.below(wait / JITTER_SHARE + 1))
    }

    /// Accepted: the next refusal is the first.
    pub fn handle_success(&mut self) {
        *self = Self::default();
    }
}

/// A row of numbers that is another for each seed: SplitMix64 (Steele, Lea and Flood,
/// OOPSLA 2014). Spreads retries; nothing secret may rest on it.
#[derive(Clone, Debug)]
pub struct Jitter(u64);

impl Jitter {
    /// The row of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number under `bound`; 0 where that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).checked_rem(bound).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C-3: doubles to its cap, never sooner than asked, each a little later than it must.
    #[test]
    fn delays_double_to_a_cap() {
        let (mut backoff, mut jitter) = (Backoff::default(), Jitter::new(1));
        let mut delay = |asked| backoff.handle_refusal(asked, Millis(0), &mut jitter).unwrap();
        for (asked, least) in [
            (0, 250),
            (0, 500),
            (4_000, 4_000),
            (0, 2_000),
            (0, 4_000),
            (0, 8_000),
            (0, 16_000),
            (0, 32_000),
            (0, 60_000),
            (1, 60_000),
        ] {
            let got = delay(asked);
            assert!((least..=least + least / 4).contains(&got), "{got} for at least {least}");
        }
        backoff.handle_success();
        assert!(backoff.handle_refusal(0, Millis(0), &mut jitter).unwrap() <= 312, "from the first again");
    }

    #[test]
    fn it_gives_up() {
        let (mut backoff, mut jitter) = (Backoff::default(), Jitter::new(1));
        assert!(backoff.handle_refusal(0, Millis(7), &mut jitter).is_some());
        assert!(backoff.handle_refusal(0, Millis(GIVE_UP_MS + 6), &mut jitter).is_some());
        assert_eq!(backoff.handle_refusal(0, Millis(GIVE_UP_MS + 7), &mut jitter), None);
    }

    #[test]
    fn seeds_differ() {
        let rows = [1, 2, 3].map(|seed| {
            let mut jitter = Jitter::new(seed);
            [(); 8].map(|()| jitter.below(1_000))
        });
        assert!(rows[0] != rows[1] && rows[1] != rows[2] && rows[0].iter().any(|n| *n != rows[0][0]));
        assert_eq!(Jitter::new(9).below(0), 0);
    }

    /// F4: a delay at its maximum is the cap, at any time.
    #[test]
    fn f4_the_longest_delay_is_clamped() {
        for (asked, now) in [(u64::MAX, 0), (u64::MAX - 1, u64::MAX), (u64::MAX, u64::MAX / 2)] {
            let mut backoff = Backoff::default();
            for _ in 0..100 {
                let got = backoff.handle_refusal(asked, Millis(now), &mut Jitter::new(asked)).unwrap();
                assert!((MOST_MS..=MOST_MS + MOST_MS / 4).contains(&got), "{got}");
            }
        }
    }
}
