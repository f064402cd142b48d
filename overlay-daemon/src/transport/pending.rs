//! Connections that have not yet sent a ClientHello. They are bounded: past the bound the
//! oldest goes, so that silent connections cannot keep honest ones out.

use overlay_shared::Places;
use tokio::sync::oneshot;

/// The silent connections of one listener, oldest first. Full: the oldest is told to close, by
/// dropping what it waits for. `D` is what each of them costs: a descriptor, or nothing.
pub(super) struct Pending<D>(Places<oneshot::Sender<()>, D>);

impl<D> Clone for Pending<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D> Default for Pending<D> {
    fn default() -> Self {
        Self(Places::default())
    }
}

/// One place among them, given back when it is dropped.
pub(super) struct Place<D> {
    place: overlay_shared::Place<oneshot::Sender<()>, D>,
    evicted: oneshot::Receiver<()>,
}

impl<D> Pending<D> {
    /// A place for one more connection, at the cost of the oldest if there are `most`, or if no
    /// `descriptor` was left: then it takes over the oldest's. None: nobody is silent, and what
    /// has spoken is not closed for a newcomer.
    pub(super) fn enter(&self, most: usize, descriptor: Option<D>) -> Option<Place<D>> {
        let (keep, evicted) = oneshot::channel();
        let place = self.0.enter(most, keep, descriptor)?;
        Some(Place { place, evicted })
    }

    /// Has the oldest close, if there is one.
    pub(super) fn make_room(&self) {
        self.0.evict_oldest();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl<D> Place<D> {
    /// Returns once another connection needed the place.
    pub(super) async fn evicted(&mut self) {
        // The sender never sends: this ends when it is dropped.
        let _ = (&mut self.evicted).await;
    }

    /// Its connection has spoken: it takes its descriptor along. None where it was evicted at the
    /// same time.
    pub(super) fn leave(self) -> Option<D> {
        self.place.leave()
    }
}
