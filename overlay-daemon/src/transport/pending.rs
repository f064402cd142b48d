//! Connections that have not yet sent a ClientHello. They are bounded: past the bound the
//! oldest goes, so that silent connections cannot keep honest ones out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The silent connections of one listener, oldest first. Full: the oldest is told to close.
/// `D` is what each of them costs: a descriptor, or nothing.
pub(super) struct Pending<D>(Arc<Mutex<Waiting<D>>>);

impl<D> Clone for Pending<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D> Default for Pending<D> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Waiting { next: 0, oldest_first: BTreeMap::new() })))
    }
}

struct Waiting<D> {
    next: u64,
    oldest_first: BTreeMap<u64, Seat<D>>,
}

struct Seat<D> {
    /// Dropping it tells the connection to close.
    _keep: oneshot::Sender<()>,
    descriptor: D,
}

/// One place among them, given back when it is dropped.
pub(super) struct Place<D> {
    pending: Pending<D>,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl<D> Pending<D> {
    fn lock(&self) -> MutexGuard<'_, Waiting<D>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more connection, at the cost of the oldest if there are `most`, or if no
    /// `descriptor` was left: then it takes over the oldest's. None: nobody is silent, and what
    /// has spoken is not closed for a newcomer.
    pub(super) fn enter(&self, most: usize, descriptor: Option<D>) -> Option<Place<D>> {
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

    /// Has the oldest close, if there is one.
    pub(super) fn make_room(&self) {
        self.lock().oldest_first.pop_first();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().oldest_first.len()
    }
}

impl<D> Place<D> {
    /// Returns once another connection needed the place.
    pub(super) async fn evicted(&mut self) {
        // The sender never sends: this ends when it is dropped.
        let _ = (&mut self.evicted).await;
    }
}

impl<D> Place<D> {
    /// Its connection has spoken: it takes its descriptor along. None where it was evicted at the
    /// same time.
    pub(super) fn leave(self) -> Option<D> {
        self.pending.lock().oldest_first.remove(&self.number).map(|seat| seat.descriptor)
    }
}

impl<D> Drop for Place<D> {
    fn drop(&mut self) {
        self.pending.lock().oldest_first.remove(&self.number);
    }
}
