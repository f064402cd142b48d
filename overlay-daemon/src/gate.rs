//! What the hub tells the reader of one session, without a word waiting in any queue: that HELLO
//! was answered, and until when nothing is to be read. Decides neither.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use overlay_core::Millis;

use crate::clock::Clock;

/// Closed to COMP until HELLO was answered, and shut for a while where too much was useless.
#[derive(Debug, Default)]
pub struct Gate {
    greeted: AtomicBool,
    pause: AtomicU64,
}

impl Gate {
    /// HELLO was answered: payloads may be inflated. Said before the answer leaves, so that
    /// what comes after it finds the gate open.
    pub fn greet(&self) {
        self.greeted.store(true, Ordering::Release);
    }

    /// Whether HELLO was answered.
    #[must_use]
    pub fn is_greeted(&self) -> bool {
        self.greeted.load(Ordering::Acquire)
    }

    /// Nothing is read until then.
    pub fn pause(&self, until: Millis) {
        self.pause.store(until.0, Ordering::Release);
    }

    /// Until when nothing is read, if that lies ahead. Asked before every frame, so the clock is
    /// looked at only where there was ever a pause.
    #[must_use]
    pub fn paused(&self, clock: &Clock) -> Option<Millis> {
        let until = Millis(self.pause.load(Ordering::Acquire));
        (until > Millis(0) && until > clock.now()).then_some(until)
    }
}
