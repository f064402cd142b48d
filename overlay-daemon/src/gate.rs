//! What the hub tells the reader of one session, without a word waiting in any queue: that HELLO
//! was answered, and until when nothing is to be read. Decides neither.

use overlay_core::Millis;

use crate::clock::Clock;

/// Closed to COMP until HELLO was answered, and shut for a while where too much was useless.
#[derive(Debug, Default)]
pub struct Gate(overlay_shared::Gate);

impl Gate {
    /// HELLO was answered: payloads may be inflated. Said before the answer leaves, so that
    /// what comes after it finds the gate open.
    pub fn greet(&self) {
        self.0.greet();
    }

    /// Whether HELLO was answered.
    #[must_use]
    pub fn is_greeted(&self) -> bool {
        self.0.is_greeted()
    }

    /// Nothing is read until then.
    pub fn pause(&self, until: Millis) {
        self.0.pause(until.0);
    }

    /// Until when nothing is read, if that lies ahead. Asked before every frame, so the clock is
    /// looked at only where there was ever a pause.
    #[must_use]
    pub fn paused(&self, clock: &Clock) -> Option<Millis> {
        let until = Millis(self.0.paused());
        (until > Millis(0) && until > clock.now()).then_some(until)
    }
}
