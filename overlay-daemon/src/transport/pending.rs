//! Connections that have not yet sent a ClientHello. They are bounded: past the bound the
//! oldest goes, so that silent connections cannot keep honest ones out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::Descriptor;

/// The silent connections of one listener, oldest first. Full: the oldest is told to close.
#[derive(Clone, Default)]
pub(super) struct Pending(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    next: u64,
    oldest_first: BTreeMap<u64, Seat>,
}

struct Seat {
    /// Dropping it tells the connection to close.
    _keep: oneshot::Sender<()>,
    descriptor: Descriptor,
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

    /// A place for one more connection, at the cost of the oldest if there are `most`, or if no
    /// `descriptor` was left: then it takes over the oldest's. None: nobody is silent, and what
    /// has spoken is not closed for a newcomer.
    pub(super) fn enter(&self, most: usize, descriptor: Option<Descriptor>) -> Option<Place> {
        let (keep, evicted) = oneshot::channel();
        let mut waiting = self.lock();
        let mut oldest = || waiting.oldest_first.pop_first().map(|(_, seat)| seat.descriptor);
        let descriptor = descriptor.or_else(&mut oldest)?;
        while waiting.oldest_first.len() >= most.max(1) {
            waiting.oldest_first.pop_first();
        }
        let number = waiting.next;
        waiting.next = number.wrapping_add(1);
        waiting.oldest_first.insert(number, Seat { _keep: keep, descriptor });
        drop(waiting);
        Some(Place { pending: self.clone(), number, evicted })
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

impl Place {
    /// Its connection has spoken: it takes its descriptor along. None where it was evicted at the
    /// same time.
    pub(super) fn leave(self) -> Option<Descriptor> {
        self.pending.lock().oldest_first.remove(&self.number).map(|seat| seat.descriptor)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pending.lock().oldest_first.remove(&self.number);
    }
}
