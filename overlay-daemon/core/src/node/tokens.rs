//! Until when a stream may stay open by its token: to the token's expiry, and for as long as
//! the key that signed it is believed. Decides when to look, and ends what is over. Whether a
//! token is good to begin with is `grant`'s.

use std::collections::{BTreeMap, BTreeSet};

use super::entry::Upload;
use super::{Class, Clock, Kind, Node, Output, SessionId};
use crate::Millis;
use crate::frame::{AppProto, Flags, Frame};
use crate::grant::{Lease, SignedBy, TokenKey};
use crate::session::Stream;
use crate::status::{Reason, Refusal, Status};

/// The keys whose tokens are believed.
#[derive(Debug, Default)]
pub(super) struct Believed {
    generation: u64,
    keys: BTreeSet<TokenKey>,
}

impl Believed {
    /// Whether a key still counts. A signature that was verified with a newer set than this
    /// one does: word of that set is on its way.
    fn holds(&self, by: SignedBy) -> bool {
        by.generation >= self.generation || self.keys.contains(&by.key)
    }
}

/// The leases of every stream that the other side opened; as many as there are streams.
#[derive(Debug, Default)]
pub(super) struct Leases {
    of: BTreeMap<(SessionId, u64), Lease>,
    by_end: BTreeSet<(u64, SessionId, u64)>,
    wake: Option<Millis>,
}

impl Leases {
    pub(super) fn insert(&mut self, id: SessionId, corr_id: u64, lease: Lease, clock: Clock) {
        self.remove(id, corr_id);
        self.of.insert((id, corr_id), lease);
        self.by_end.insert((lease.until_ms, id, corr_id));
        self.schedule(clock);
    }

    pub(super) fn remove(&mut self, id: SessionId, corr_id: u64) {
        if let Some(lease) = self.of.remove(&(id, corr_id)) {
            self.by_end.remove(&(lease.until_ms, id, corr_id));
        }
    }

    pub(super) fn remove_session(&mut self, id: SessionId) {
        let of_session: Vec<u64> = self.of.range((id, 0)..=(id, u64::MAX)).map(|((_, corr_id), _)| *corr_id).collect();
        of_session.into_iter().for_each(|corr_id| self.remove(id, corr_id));
    }

    /// The first lease that is over at `unix_ms`.
    fn over(&self, unix_ms: u64) -> Option<(SessionId, u64)> {
        self.by_end.first().filter(|(end, ..)| *end <= unix_ms).map(|(_, id, corr_id)| (*id, *corr_id))
    }

    /// Notes when the first lease ends by the clock as it stands. The system's clock may step:
    /// forward is noticed by whoever asks every second, backward by asking again then.
    fn schedule(&mut self, clock: Clock) {
        self.wake = self.by_end.first().map(|(end, ..)| clock.now.after(end.saturating_sub(clock.unix_ms)));
    }

    pub(super) fn poll_timeout(&self) -> Option<Millis> {
        self.wake
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.of.len(), self.by_end.len());
        self.of.len()
    }
}

impl Node {
    /// The token keys that are believed from now on, and the number of their set. Streams by
    /// another key end.
    pub fn handle_keys(&mut self, generation: u64, keys: BTreeSet<TokenKey>) {
        self.believed = Believed { generation, keys };
        let of_others = self.leases.of.iter().filter(|(_, lease)| !self.believed.holds(lease.signed_by));
        let of_others: Vec<_> = of_others.map(|(at, _)| *at).collect();
        for (id, corr_id) in of_others {
            self.outputs.push_back(Output::Rejected(Reason::Auth));
            self.cut(id, corr_id, &GONE);
        }
    }

    /// Ends every stream whose token has expired.
    pub(super) fn end_expired(&mut self, clock: Clock) {
        while let Some((id, corr_id)) = self.leases.over(clock.unix_ms) {
            self.outputs.push_back(Output::Rejected(Reason::Auth));
            self.cut(id, corr_id, &EXPIRED);
        }
        self.leases.schedule(clock);
    }

    /// Whether a grant's key is still believed: it was when its START was read, and keys may
    /// have changed while that waited.
    pub(super) fn check_key(&self, by: SignedBy) -> Result<(), Refusal> {
        if self.believed.holds(by) { Ok(()) } else { Err(GONE) }
    }

    /// Takes a stream off every table, with what is counted for it.
    pub(super) fn release(&mut self, id: SessionId, corr_id: u64) -> Option<Stream<Kind>> {
        self.leases.remove(id, corr_id);
        let entry = self.sessions.get_mut(&id)?;
        let stream = entry.session.close_stream(corr_id)?;
        entry.opened = entry.opened.saturating_sub(stream.kind.cost());
        entry.settle(&mut self.memory);
        match &stream.kind {
            Kind::Subscribe { topics, .. } => self.subscriptions.remove(id, stream.tenant, corr_id, topics),
            // The upload's own answer will not come: the count goes with it.
            Kind::Publish { upload: Upload::Open { size, .. }, .. } => self.forget_upload(id, *size),
            Kind::Publish { .. } | Kind::GossipIn | Kind::GossipOut { .. } => {}
        }
        Some(stream)
    }

    /// Ends a stream with a refusal, behind the events and answers that it has queued.
    pub(super) fn cut(&mut self, id: SessionId, corr_id: u64, refusal: &Refusal) {
        let Some(Stream { app, tenant, kind, .. }) = self.release(id, corr_id) else { return };
        let end = Frame {
            code: refusal.status.code(),
            ..Frame::new(Flags::RESP | Flags::END, app, tenant, corr_id, refusal.body(corr_id))
        };
        self.push_end(id, &kind, end);
    }

    /// Queues a stream's last frame.
    pub(super) fn push_end(&mut self, id: SessionId, kind: &Kind, end: Frame) {
        if end.app != AppProto::PUBSUB || !matches!(kind, Kind::Subscribe { .. }) {
            return self.push(id, Class::Control, end);
        }
        if let Some(entry) = self.sessions.get_mut(&id).filter(|entry| !entry.closing) {
            entry.lanes.push_last(end);
            entry.settle(&mut self.memory);
            self.mark_sendable(id);
        }
    }
}

/// What a stream is told whose token is over.
const EXPIRED: Refusal = Refusal::new(Status::Unauthorized, "the token has expired");
/// What a stream is told whose token's key was taken away.
const GONE: Refusal = Refusal::new(Status::Unauthorized, "the token's key is not known");
