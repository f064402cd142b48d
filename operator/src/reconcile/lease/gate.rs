//! The gate before the API server: whether a mutating request may be sent now. It stands in the
//! client itself, so that no write can be forgotten. Decides nothing about who leads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hyper::{Method, Request};
use prometheus::IntCounter;
use tokio::time::Instant;
use tower::BoxError;
use tower::filter::{FilterLayer, Predicate};

/// No lease is needed: the gate stands open.
const FOR_EVER: u64 = u64::MAX;

/// Closed until a lease is held, and again once it may have run out.
pub(in crate::reconcile) struct Gate {
    started: Instant,
    /// Milliseconds from `started` until which writes are sent.
    until: AtomicU64,
    refused: IntCounter,
}

/// A write that was not sent.
#[derive(Debug, thiserror::Error)]
#[error("not sent: this operator's lease may have run out, and another may lead by now")]
pub(in crate::reconcile) struct NotLeading;

impl Gate {
    /// A closed one, which counts in `refused` what it holds back.
    #[must_use]
    pub(in crate::reconcile) fn new(now: Instant, refused: IntCounter) -> Self {
        Self { started: now, until: AtomicU64::new(0), refused }
    }

    /// Writes are sent until `until`.
    pub(super) fn open_until(&self, until: Instant) {
        self.until.store(self.millis(until), Ordering::Release);
    }

    /// For an operator that runs alone.
    pub(in crate::reconcile) fn open_for_ever(&self) {
        self.until.store(FOR_EVER, Ordering::Release);
    }

    /// Nothing more is sent.
    pub(super) fn close(&self) {
        self.until.store(0, Ordering::Release);
    }

    fn is_open(&self, now: Instant) -> bool {
        self.millis(now) < self.until.load(Ordering::Acquire)
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_millis()).unwrap_or(FOR_EVER - 1)
    }

    /// Reads pass; writes pass while the gate is open.
    ///
    /// # Errors
    /// It is closed.
    fn admit<B>(&self, request: Request<B>, now: Instant) -> Result<Request<B>, NotLeading> {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        if reads || self.is_open(now) {
            return Ok(request);
        }
        self.refused.inc();
        Err(NotLeading)
    }
}

/// A layer of a client with `gate` before it.
#[must_use]
pub(in crate::reconcile) fn layer(gate: &Arc<Gate>) -> FilterLayer<Admission> {
    FilterLayer::new(Admission(gate.clone()))
}

/// What [`layer`] asks for every request.
#[derive(Clone)]
pub(in crate::reconcile) struct Admission(Arc<Gate>);

impl<B> Predicate<Request<B>> for Admission {
    type Request = Request<B>;
    fn check(&mut self, request: Request<B>) -> Result<Request<B>, BoxError> {
        Ok(self.0.admit(request, Instant::now())?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn writes_pass_while_the_lease_holds() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let gate = Gate::new(start, IntCounter::new("refused", "refused").unwrap());
        let passes = |method: Method, seconds| {
            let request = Request::builder().method(method).uri("/").body(()).unwrap();
            gate.admit(request, at(seconds)).is_ok()
        };
        let writes = [Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
        assert!(writes.iter().all(|w| !passes(w.clone(), 0)), "closed before a lease is held");
        assert!(passes(Method::GET, 0));
        gate.open_until(at(10));
        assert!(writes.iter().all(|w| passes(w.clone(), 9) && !passes(w.clone(), 10)));
        gate.open_until(at(12));
        assert!(passes(Method::PATCH, 11), "renewed");
        gate.close();
        assert!(!passes(Method::PATCH, 11) && passes(Method::GET, 11));
        gate.open_for_ever();
        assert!(passes(Method::PATCH, 1_000_000));
        assert_eq!(gate.refused.get(), 9);
    }
}
