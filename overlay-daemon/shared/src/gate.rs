//! Two words from one task to another, read before each frame: that it may, and until when it may
//! not.

use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// Closed until it is opened, which is for good, and shut for a while now and then.
#[derive(Debug)]
pub struct Gate {
    greeted: AtomicBool,
    pause: AtomicU64,
}

impl Default for Gate {
    fn default() -> Self {
        Self { greeted: AtomicBool::new(false), pause: AtomicU64::new(0) }
    }
}

impl Gate {
    /// Opens it. Who learns by whatever way of something that was done after this finds it open.
    pub fn greet(&self) {
        self.greeted.store(true, Ordering::Release);
    }

    /// Whether it was opened.
    #[must_use]
    pub fn is_greeted(&self) -> bool {
        self.greeted.load(Ordering::Acquire)
    }

    /// Shuts it until then, milliseconds of the caller's clock.
    pub fn pause(&self, until: u64) {
        self.pause.store(until, Ordering::Release);
    }

    /// Until when it was last shut; 0 where it never was.
    #[must_use]
    pub fn paused(&self) -> u64 {
        self.pause.load(Ordering::Acquire)
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::Arc;
    use loom::thread;

    /// The hub opens the gate, says until when to wait, and only then lets the answer leave; the
    /// reader hears of the answer from the network alone, which orders nothing by itself.
    #[test]
    fn what_comes_after_the_answer_finds_the_gate_open() {
        loom::model(|| {
            let (gate, answered) = (Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
            let hub = thread::spawn({
                let (gate, answered) = (Arc::clone(&gate), Arc::clone(&answered));
                move || {
                    gate.greet();
                    gate.pause(7);
                    answered.store(true, Ordering::Release); // a write to a socket
                }
            });
            assert!([0, 7].contains(&gate.paused()));
            if answered.load(Ordering::Acquire) {
                assert!(gate.is_greeted());
                assert_eq!(gate.paused(), 7);
            }
            hub.join().unwrap();
        });
    }
}
