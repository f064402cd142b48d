//! Connections that have not yet sent a ClientHello. They are bounded: past the bound the
//! oldest goes, so that silent connections cannot keep honest ones out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Silent connections that a listener holds.
pub const MAX_PENDING: usize = 4_096;

/// The silent connections of one listener, oldest first. Full: the oldest is told to close.
#[derive(Clone, Default)]
pub(super) struct Pending(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    next: u64,
    /// Dropping a sender tells its connection to close.
    oldest_first: BTreeMap<u64, oneshot::Sender<()>>,
}

/// One place among them, given back when it is dropped.
pub(super) struct Place {
    pending: Pending,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more connection, at the cost of the oldest if there are `most`.
    pub(super) fn enter(&self, most: usize) -> Place {
        let (keep, evicted) = oneshot::channel();
        let mut waiting = self.lock();
        while waiting.oldest_first.len() >= most.max(1) {
            waiting.oldest_first.pop_first();
        }
        let number = waiting.next;
        waiting.next = number.wrapping_add(1);
        waiting.oldest_first.insert(number, keep);
        drop(waiting);
        Place { pending: self.clone(), number, evicted }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().oldest_first.len()
    }
}

impl Place {
    /// Returns once another connection needed the place.
    pub(super) async fn evicted(&mut self) {
        // The sender never sends: this ends when it is dropped.
        let _ = (&mut self.evicted).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pending.lock().oldest_first.remove(&self.number);
    }
}
