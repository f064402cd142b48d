//! The memory that a daemon's peers can make it take: one account for all sessions, against
//! `overlay.memory_bytes`. Integers, claimed before and given back exactly; decides what is
//! refused, never allocates.
//!
//! | what | counted as | where it is bounded |
//! | --- | --- | --- |
//! | a session | [`SESSION_BYTES`] | refused at HELLO once the budget is used up |
//! | a session over QUIC | [`QUIC_BYTES`] more | its flow control |
//! | a queued frame | [`FRAME_BYTES`]; its own payload too where it answers | `lanes` |
//! | what a writer has | its bytes encoded, at most [`WRITE_BYTES`] | `Lanes::take` |
//! | a stream | [`STREAM_BYTES`], and [`TOPIC_BYTES`] and twice its name for each topic | refused at its START |
//! | an upload under way | the size that it announced | refused at its Begin |
//! | messages held, and chunks being put together | their bytes, once | the gossip engine |
//! | ids that are remembered | their names, and their places in tables | the gossip engine |
//! | a payload that only queues hold any more | its bytes, once | the gossip engine |
//! | readers' buffers | what they have allocated | one frame each |
//!
//! A payload that thousands of queues share stands in memory once, so it is counted once, by
//! the engine, for as long as any queue holds it. Counting it once a queue would shed a
//! fan-out of 64 KiB to a thousand subscribers as 64 MiB.
//!
//! Used up, the budget refuses what would take more: sessions, uploads, messages to queues, and
//! answers to who leaves more than a part of it unread (`Node::push`).
//! Writes are refused sooner, at `readiness.shed_at_percent` of it (I-6).

use crate::admission::percent;

/// A session at rest: its tasks, TLS state and maps; 18.2 KiB as measured (`tests/bench idle`).
pub const SESSION_BYTES: u64 = 20 * 1024;
/// Bytes that a QUIC session may hold each way besides: what was sent and not acknowledged, and
/// what has come and was not read. TCP has the kernel hold them.
pub const QUIC_WINDOW_BYTES: u64 = 64 * 1024;
/// What a QUIC session takes more than another, at the most: both windows, claimed whole since
/// QUIC does not tell what it holds, and the connection's own state, 40 KiB as measured.
pub const QUIC_BYTES: u64 = 2 * QUIC_WINDOW_BYTES + 40 * 1024;
/// A stream that the other side opened: its place among the session's and its token's lease.
pub const STREAM_BYTES: u64 = 512;
/// A topic of a stream besides its name: its place in the stream, and among all that is
/// subscribed to.
pub const TOPIC_BYTES: u64 = 256;
/// A queued frame besides its payload: the frame itself, and its part of the queue's spare room.
pub const FRAME_BYTES: u64 = 2 * size_of::<crate::frame::Frame>() as u64;
/// Bytes that a writer encodes at a time; a larger frame goes alone.
pub const WRITE_BYTES: usize = 64 * 1024;

/// What is used of so many bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    limit: u64,
    used: u64,
}

impl Budget {
    /// An unused budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self { limit, used: 0 }
    }

    /// Another limit from now on; what is used stays used.
    pub fn resize(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Bytes that there are in all.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Uses `bytes`, whatever the limit: they are taken already, or too few to matter.
    pub fn claim(&mut self, bytes: u64) {
        self.used = self.used.saturating_add(bytes);
    }

    /// Gives back what was claimed.
    pub fn give_back(&mut self, bytes: u64) {
        debug_assert!(bytes <= self.used, "more given back than was claimed");
        self.used = self.used.saturating_sub(bytes);
    }

    /// Bytes claimed and not given back.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Whether `more` on top of what is used and of `others`, counted elsewhere, stays within
    /// `share` percent of the limit.
    #[must_use]
    pub fn has_room(&self, others: u64, more: u64, share: u8) -> bool {
        let sum = self.used.saturating_add(others).saturating_add(more);
        u128::from(sum) * 100 <= u128::from(self.limit) * u128::from(share)
    }

    /// How much is used together with `others`, 0 to 100.
    #[must_use]
    pub fn percent(&self, others: u64) -> u8 {
        percent(self.used.saturating_add(others), self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The edges, where a sum could wrap: nothing has room past the limit.
    #[test]
    fn m1_the_budget_has_edges() {
        let mut budget = Budget::new(1_000);
        assert!(budget.has_room(0, 1_000, 100) && !budget.has_room(0, 1_001, 100));
        assert!(budget.has_room(300, 500, 80) && !budget.has_room(301, 500, 80));
        assert!(!budget.has_room(u64::MAX, u64::MAX, 100));
        budget.claim(600);
        assert_eq!(
            (budget.used(), budget.percent(0), budget.percent(400), budget.percent(u64::MAX)),
            (600, 60, 100, 100)
        );
        budget.resize(300);
        assert_eq!((budget.used(), budget.percent(0), budget.has_room(0, 0, 100)), (600, 100, false));
        budget.give_back(600);
        assert_eq!((budget.used(), budget.percent(0)), (0, 0));
    }
}
