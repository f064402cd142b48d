//! Bytes that all readers' buffers take: a sum, of which each part is known to one task alone.

use crate::sync::{Arc, AtomicU64, Ordering};

/// Bytes that all readers' buffers take, and the frames that wait for the hub.
#[derive(Clone, Debug)]
pub struct Reading(Arc<AtomicU64>);

impl Default for Reading {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(0)))
    }
}

impl Reading {
    /// How many. Never less than what is held; while a part changes, both its old and its new
    /// size may count.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// A part of them.
    #[must_use]
    pub fn hold(&self, bytes: usize) -> ReadBytes {
        let mut held = ReadBytes { all: self.clone(), bytes: 0 };
        held.set(bytes);
        held
    }
}

/// A part of them, given back when it is dropped.
#[derive(Debug)]
pub struct ReadBytes {
    all: Reading,
    bytes: u64,
}

impl ReadBytes {
    /// It is this much from now on.
    pub fn set(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        // First more, then less: the sum is never under what is held, so it never wraps.
        self.all.0.fetch_add(bytes, Ordering::Relaxed);
        self.all.0.fetch_sub(std::mem::replace(&mut self.bytes, bytes), Ordering::Relaxed);
    }
}

impl Drop for ReadBytes {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::thread;

    /// A reader's buffer grows and shrinks while the hub looks, and drops a frame.
    #[test]
    fn the_sum_is_never_short_and_ends_at_nothing() {
        loom::model(|| {
            let all = Reading::default();
            let mut buffer = all.hold(10);
            let frame = all.hold(100);
            let reader = thread::spawn(move || {
                buffer.set(30);
                drop(buffer);
            });
            let bytes = all.bytes();
            assert!((100..=100 + 10 + 30).contains(&bytes), "{bytes}");
            drop(frame);
            assert!(all.bytes() <= 10 + 30, "and never wraps");
            reader.join().unwrap();
            assert_eq!(all.bytes(), 0);
        });
    }
}
