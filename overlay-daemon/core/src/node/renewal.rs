//! A stream that goes on by another token: the other side's, which asks for it by a START that
//! names the old stream, and our own gossip streams. Decides what moves and in which order.
//! Nothing that was accepted or queued is lost or comes twice.

use bytes::Bytes;

use super::peers::wait_ms;
use super::streams::STOPPING;
use super::{Class, Clock, Entry, Kind, Node, SessionId, State};
use crate::Millis;
use crate::backoff::{FIRST_MS, MOST_MS};
use crate::control::{Open, json};
use crate::frame::{AppProto, Flags, Frame};
use crate::grant::{Action, Grant};
use crate::identity::TenantId;
use crate::status::{Refusal, Status};

impl Node {
    /// From now on, STARTs to peers carry this token, and streams that carry another are
    /// renewed.
    pub fn handle_token(&mut self, token: Bytes) {
        if token == self.token {
            return;
        }
        self.token = token;
        self.token_generation += 1;
        let links: Vec<SessionId> = self.links.values().copied().collect();
        links.into_iter().for_each(|id| self.renew_gossip(id));
    }

    /// A START asks for an open stream to go on by its token. Everything of the old stream is
    /// the new one's when this returns: what is queued is sent under the new number, and what
    /// the writer has already leaves before the answer.
    pub(super) fn renew(
        &mut self,
        id: SessionId,
        start: &Frame,
        old: u64,
        grant: Grant,
        clock: Clock,
    ) -> Result<(), Refusal> {
        if start.flags.has(Flags::END) {
            return Err(Refusal::new(Status::BadRequest, "a renewal that ends with its START"));
        }
        if self.draining {
            return Err(STOPPING); // it is about to end, under the number that it has
        }
        let Some(entry) = self.sessions.get_mut(&id) else { return Ok(()) };
        let stream = entry.session.stream_mut(old).filter(|stream| !stream.ours);
        let stream = stream.ok_or(Refusal::new(Status::NotFound, "no such stream is open to be renewed"))?;
        if (stream.app, stream.tenant) != (start.app, start.tenant) {
            return Err(Refusal::new(Status::BadRequest, "a stream keeps its START's app_proto_id and tenant_id"));
        }
        let (tenant, lease) = (stream.tenant, grant.lease());
        match &mut stream.kind {
            Kind::Publish { topic, valid, .. } => {
                grant.permit(Action::Publish, tenant, Some(topic))?;
                *valid = grant.validity();
            }
            Kind::Subscribe { topics, .. } => {
                topics.iter().try_for_each(|topic| grant.permit(Action::Subscribe, tenant, Some(topic)))?;
                let topics = topics.clone();
                self.subscriptions.rename(id, tenant, (old, start.corr_id), &topics);
            }
            Kind::GossipIn => grant.permit(Action::Publish, tenant, None)?,
            Kind::GossipOut { .. } => return Err(Refusal::new(Status::NotFound, "no such stream is open")),
        }
        entry.session.move_stream(old, start.corr_id);
        entry.lanes.relabel(old, start.corr_id);
        self.leases.remove(id, old);
        self.leases.insert(id, start.corr_id, lease, clock);
        self.push(id, Class::Control, Frame::response(start, 200, false, Bytes::new()));
        let over = Frame { corr_id: old, ..Frame::response(start, 200, true, Bytes::new()) };
        self.push(id, Class::Control, over);
        Ok(())
    }

    /// Asks for every gossip stream of ours by an older token to go on by this one. From the
    /// START on what we send, and what waits to be sent, is the new stream's.
    pub(super) fn renew_gossip(&mut self, id: SessionId) {
        // In Backoff nothing is asked for: the end of the delay does.
        let is_active = |entry: &&mut Box<Entry>| !entry.closing && entry.session.state() == State::Active;
        let Some(entry) = self.sessions.get_mut(&id).filter(is_active) else { return };
        let Some(remote) = entry.remote_mut().filter(|remote| remote.renew_at.is_none()) else { return };
        let accepted: Vec<(TenantId, u64)> = remote.streams.iter().map(|(tenant, old)| (*tenant, *old)).collect();
        for (tenant, old) in accepted {
            let kind = entry.session.stream(old).map(|stream| &stream.kind);
            // One that is asked for and not answered yet is looked at when it is.
            let Some(Kind::GossipOut { token, renews: None }) = kind else { continue };
            if *token == self.token_generation {
                continue;
            }
            let start = entry.session.open_ours(
                AppProto::GOSSIP,
                tenant,
                self.token.clone(),
                json(&Open::Renew { stream: old }),
                Kind::GossipOut { token: self.token_generation, renews: Some(old) },
            );
            let Some(start) = start else { return self.close_when_sent(id) };
            let new = start.corr_id;
            entry.lanes.relabel(old, new);
            entry.lanes.push_first(start);
            if let Some(remote) = entry.remote_mut() {
                remote.streams.insert(tenant, new);
            }
        }
        entry.settle(&mut self.memory);
        self.mark_sendable(id);
    }

    /// Our renewal was taken: the old stream's END follows.
    pub(super) fn renewed(&mut self, id: SessionId, new: u64) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        entry.backoff.handle_success();
        let stream = entry.session.stream_mut(new);
        if let Some(Kind::GossipOut { renews, .. }) = stream.map(|stream| &mut stream.kind) {
            *renews = None;
        }
        self.renew_gossip(id); // the token may have changed again meanwhile
    }

    /// Our renewal was refused: the old stream is as it was. What was sent ahead of the answer
    /// was dropped, so all that is held is announced again.
    pub(super) fn renewal_refused(&mut self, id: SessionId, refusal: &Frame, old: u64, clock: Clock) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        entry.session.close_stream(refusal.corr_id);
        entry.lanes.relabel(refusal.corr_id, old);
        let is_open = entry.session.stream(old).is_some();
        let Some(remote) = entry.remote_mut() else { return };
        let link = remote.link;
        if is_open {
            remote.streams.insert(refusal.tenant, old);
            remote.renew_at = Some(clock.now.after(wait_ms(refusal).clamp(FIRST_MS, MOST_MS)));
            self.engine.handle_dropped(link, clock.now);
        } else {
            // It ended while the question was on its way: asked for like one that never was.
            remote.streams.remove(&refusal.tenant);
            self.back_off(id, wait_ms(refusal), clock.now);
        }
    }

    /// Asks again for renewals that were refused and have waited.
    pub(super) fn renew_again(&mut self, now: Millis) {
        let links: Vec<SessionId> = self.links.values().copied().collect();
        for id in links {
            let remote = self.sessions.get_mut(&id).and_then(|entry| entry.remote_mut());
            if let Some(remote) = remote.filter(|remote| remote.renew_at.is_some_and(|at| at <= now)) {
                remote.renew_at = None;
                self.renew_gossip(id);
            }
        }
    }
}
