//! Who may have a session: `max_sessions` of them, of which a configured peer that is missing
//! keeps one, and as many as memory takes. Who finds no place is told so at HELLO.

use super::streams::STOPPING;
use super::{Entry, Node, Opening, SessionId};
use crate::Millis;
use crate::config::Transport;
use crate::grant::Holder;
use crate::identity::SpiffeId;
use crate::memory::{FRAME_BYTES, SESSION_BYTES};
use crate::status::{Reason, Refusal, Status};

/// Callers that wait to be told that there is no place, at once: they hold no place meanwhile,
/// and past it the rest is closed without a word.
pub(super) const MAX_TURNED_AWAY: usize = 256;

/// Answers that a client who reads may have waiting: some it asked for at once, while its writer
/// is busy.
const UNREAD_BYTES: u64 = 64 * FRAME_BYTES;

const FULL: Refusal = Refusal::later(Status::QuotaExhausted, "the daemon has as many sessions as it may", 1_000);
pub(super) const NO_MEMORY: Refusal = Refusal::later(Status::Unavailable, "the daemon's memory is used up", 1_000);

impl Node {
    /// Whether there is a place.
    ///
    /// # Errors
    /// What HELLO is answered with.
    pub(super) fn find_place(&self, opening: &Opening) -> Result<(), Refusal> {
        if self.draining {
            return Err(STOPPING);
        }
        let is_peer = match &opening.holder {
            _ if opening.dialled.is_some() => true,
            Holder::Certificate(identity) => self.expects(identity),
            Holder::Local => false,
        };
        // Peers are as few as the configuration says, and clients must not keep them out.
        if is_peer {
            return Ok(());
        }
        if !self.memory.has_room(self.others(), SESSION_BYTES + opening.buffers(), 100) {
            return Err(NO_MEMORY);
        }
        let taken = self.sessions.len() - self.turned_away;
        let most = self.config.overlay.max_sessions as usize;
        if taken + self.missing_peers() < most { Ok(()) } else { Err(FULL) }
    }

    /// All places are taken, or all memory: the oldest session that had time to open a stream, has
    /// none, and holds what a newcomer lacks, gives it up. HELLO takes no token, so that whoever may
    /// connect could keep every place otherwise. Whether there was one.
    pub(super) fn take_over_place(&mut self, refusal: &Refusal, newcomer: &Opening, now: Millis) -> bool {
        let lacks = match refusal {
            _ if *refusal == FULL => 0,
            _ if *refusal == NO_MEMORY => SESSION_BYTES + newcomer.buffers(),
            _ => return false,
        };
        let found = self.idle(now).find(|(_, entry)| entry.claimed >= lacks).map(|(id, _)| id);
        if let Some(id) = found {
            self.drop_session(id, Some(Reason::Quota));
        }
        found.is_some()
    }

    /// Memory is as short as has writes shed (I-6): sessions over QUIC that had time to open a
    /// stream and have none go, the oldest first, until those that stay have enough. They claim so
    /// much that they could otherwise, without a token, keep a daemon from all its work. All others
    /// together claim a third of the budget, unless `max_sessions` was raised.
    pub(super) fn close_idle_under_pressure(&mut self, now: Millis) {
        if self.memory_percent() < self.config.readiness.shed_at_percent {
            return;
        }
        let enough = self.memory.limit() / 100 * u64::from(self.config.readiness.shed_at_percent);
        let going: u64 = self
            .sessions
            .values()
            .filter(|entry| entry.closing || entry.turned_away.is_some())
            .map(|entry| entry.claimed)
            .sum();
        let mut used = self.memory_used().saturating_sub(going);
        let mut gone = Vec::new();
        for (id, entry) in self.idle(now).filter(|(_, entry)| entry.transport == Some(Transport::Quic)) {
            if used < enough {
                break;
            }
            used = used.saturating_sub(entry.claimed);
            gone.push(id);
        }
        gone.into_iter().for_each(|id| self.drop_session(id, Some(Reason::Quota)));
    }

    /// Clients that had time to open a stream, have none, and are still due nothing of one that
    /// ended, the oldest first.
    fn idle(&self, now: Millis) -> impl Iterator<Item = (SessionId, &Entry)> {
        let patience = self.config.overlay.handshake_timeout_ms;
        let is_idle = move |entry: &Entry| {
            let stays = entry.turned_away.is_none() && !entry.closing;
            let is_served = entry.lanes.has_messages() || (!entry.writer_idle && entry.delivering);
            entry.is_client()
                && stays
                && !is_served
                && entry.session.ages(now).0 >= patience
                && entry.session.streams().next().is_none()
        };
        self.sessions.iter().map(|(id, entry)| (*id, entry.as_ref())).filter(move |(_, entry)| is_idle(entry))
    }

    /// Whether a session may leave `more` unread of its answers. Once memory is used up, a client
    /// from elsewhere may do so to an equal part of all that there is, beside what a session takes,
    /// and to [`UNREAD_BYTES`] at the least.
    pub(super) fn takes_unread(&self, id: SessionId, more: u64) -> bool {
        let Some(entry) = self.sessions.get(&id) else { return false };
        let part = || {
            let part = self.memory.limit() / u64::from(self.config.overlay.max_sessions);
            part.saturating_sub(SESSION_BYTES).max(UNREAD_BYTES)
        };
        entry.holder == Holder::Local
            || !entry.is_client()
            || entry.lanes.unread() + more <= part()
            || self.memory.has_room(self.others(), more, 100)
    }

    /// Whether this is a configured peer's identity, with a session to come: each may have two,
    /// since it dials anew before the old one is gone.
    fn expects(&self, identity: &SpiffeId) -> bool {
        let own = self.places.iter().filter(|(_, peer)| peer.identity.covers(identity)).count();
        let same = |entry: &&Entry| matches!(&entry.holder, Holder::Certificate(holder) if holder == identity);
        own > 0 && self.sessions.values().map(Box::as_ref).filter(same).take(2 * own).count() < 2 * own
    }

    /// Configured peers without a session.
    fn missing_peers(&self) -> usize {
        let here = |id| self.sessions.get(id).and_then(|entry| entry.remote()?.configured);
        let here: std::collections::BTreeSet<usize> = self.links.values().filter_map(here).collect();
        self.places.iter().filter(|(place, _)| !here.contains(place)).count()
    }
}
