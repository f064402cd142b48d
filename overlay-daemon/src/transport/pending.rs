//! Connections that have not yet sent a ClientHello. They are bounded: past the bound the
//! oldest goes, so that silent connections cannot keep honest ones out.

use overlay_shared::Places;
use tokio::sync::oneshot;

use super::Descriptor;

/// The silent connections of one listener, oldest first. Full: the oldest is told to close, by
/// dropping what it waits for.
#[derive(Clone, Default)]
pub(super) struct Pending(Places<oneshot::Sender<()>, Descriptor>);

/// One place among them, given back when it is dropped.
pub(super) struct Place {
    place: overlay_shared::Place<oneshot::Sender<()>, Descriptor>,
    evicted: oneshot::Receiver<()>,
}

impl Pending {
    /// A place for one more connection, at the cost of the oldest if there are `most`, or if no
    /// `descriptor` was left: then it takes over the oldest's. None: nobody is silent, and what
    /// has spoken is not closed for a newcomer.
    pub(super) fn enter(&self, most: usize, descriptor: Option<Descriptor>) -> Option<Place> {
        let (keep, evicted) = oneshot::channel();
        let place = self.0.enter(most, keep, descriptor)?;
        Some(Place { place, evicted })
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Place {
    /// Returns once another connection needed the place.
    pub(super) async fn evicted(&mut self) {
        // The sender never sends: this ends when it is dropped.
        let _ = (&mut self.evicted).await;
    }

    /// Its connection has spoken: it takes its descriptor along. None where it was evicted at the
    /// same time.
    pub(super) fn leave(self) -> Option<Descriptor> {
        self.place.leave()
    }
}
