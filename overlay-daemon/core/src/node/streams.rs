//! What a START opens, what later frames of its stream do, and how it ends.

use super::entry::Upload;
use super::places::NO_MEMORY;
use super::{Clock, Kind, Node, Output, Party, SessionId};
use crate::control::{MAX_TOPICS, Open, parse};
use crate::frame::{AppProto, CHUNK, Flags, Frame};
use crate::grant::{Action, Grant, Holder};
use crate::lanes::Class;
use crate::record::Record;
use crate::status::{Reason, Refusal, Status};

/// What a daemon that drains answers.
pub(super) const STOPPING: Refusal = Refusal::later(Status::Unavailable, "the daemon is stopping", 1_000);

impl Node {
    pub(super) fn start(&mut self, id: SessionId, start: &Frame, grant: Option<Result<Grant, Refusal>>, clock: Clock) {
        let lease = grant.as_ref().and_then(|grant| grant.as_ref().ok()).map(Grant::lease);
        match self.open(id, start, grant, clock) {
            Ok(Some(kind)) => {
                let ended = start.flags.has(Flags::END);
                if let Some((entry, lease)) = self.sessions.get_mut(&id).zip(lease).filter(|_| !ended) {
                    entry.streams += kind.cost();
                    entry.session.open_theirs(start, kind);
                    entry.settle(&mut self.memory);
                    self.leases.insert(id, start.corr_id, lease, clock);
                }
                self.push(id, Class::Control, Frame::response(start, 200, ended, bytes::Bytes::new()));
            }
            Ok(None) => {} // answered and over
            Err(refusal) => self.refuse(id, start, &refusal, true),
        }
    }

    /// Decides on a START: the session's quota first, then the capability, then the daemon's
    /// quota, then what it asks for. Whoever has no capability uses up none but their own. The
    /// signature was looked at before, by the session's own reader and at its own cost: what does
    /// not hold counts as five useless frames, so that a reader that is sent nothing else looks
    /// at 200 a second, and closes after ten seconds (F6).
    fn open(
        &mut self,
        id: SessionId,
        start: &Frame,
        grant: Option<Result<Grant, Refusal>>,
        clock: Clock,
    ) -> Result<Option<Kind>, Refusal> {
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.quota.admit(clock.now)?;
        }
        let grant = grant.unwrap_or(Err(Refusal::new(Status::Unauthorized, "START carries no capability token")))?;
        self.check_key(grant.lease().signed_by)?;
        if !self.config.overlay.tenants.contains(&start.tenant) {
            return Err(Refusal::new(Status::Forbidden, "this daemon does not carry that tenant"));
        }
        self.quota.admit(clock.now)?;
        let open: Open =
            parse(&start.payload).ok_or(Refusal::new(Status::BadRequest, "the START's payload names no operation"))?;
        match (start.app, open) {
            (AppProto::PUBSUB, Open::Publish { topic }) => {
                grant.permit(Action::Publish, start.tenant, Some(&topic))?;
                self.admit_write(0)?;
                self.admit_stream(Kind::Publish { topic, valid: grant.validity(), upload: Upload::None }).map(Some)
            }
            (AppProto::PUBSUB, Open::Subscribe { topics }) => {
                if start.flags.has(Flags::END) {
                    return Err(Refusal::new(Status::BadRequest, "a subscription that ends with its START"));
                }
                if topics.is_empty() || topics.len() > MAX_TOPICS {
                    return Err(Refusal::new(Status::BadRequest, "a subscription names 1 to 64 topics"));
                }
                for topic in &topics {
                    grant.permit(Action::Subscribe, start.tenant, Some(topic))?;
                }
                if self.draining {
                    return Err(STOPPING);
                }
                let kind = self.admit_stream(Kind::Subscribe { topics: topics.clone(), missed: 0 })?;
                self.subscriptions.add(id, start, &topics);
                Ok(Some(kind))
            }
            (AppProto::GOSSIP, Open::Gossip {}) => {
                grant.permit(Action::Publish, start.tenant, None)?;
                let is_peer = self.sessions.get(&id).is_some_and(|entry| matches!(entry.party, Party::Peer(_)));
                if !is_peer {
                    return Err(Refusal::new(Status::Forbidden, "this identity is not a configured peer"));
                }
                Ok(Some(Kind::GossipIn))
            }
            (_, Open::Renew { stream }) => self.renew(id, start, stream, grant, clock).map(|()| None),
            (AppProto::ADMIN, Open::Sessions {}) => {
                grant.permit(Action::Admin, start.tenant, None)?;
                if self.sessions.get(&id).is_none_or(|entry| entry.holder != Holder::Local) {
                    return Err(Refusal::new(Status::Forbidden, "only on the Unix socket"));
                }
                // In frames like any bulk payload: thousands of sessions are over 1 MiB of text.
                let mut report = self.sessions_report(clock.now);
                while !report.is_empty() {
                    let part = report.split_to(report.len().min(CHUNK));
                    self.push(id, Class::Control, Frame::response(start, 200, report.is_empty(), part));
                }
                Ok(None)
            }
            (_, _) => Err(Refusal::new(Status::BadRequest, "this app_proto_id has no such operation")),
        }
    }

    /// I-9: both quotas, before anything costs.
    pub(super) fn admit(&mut self, id: SessionId, clock: Clock) -> Result<(), Refusal> {
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.quota.admit(clock.now)?;
        }
        self.quota.admit(clock.now)
    }

    /// I-6: writes fail first. `bytes` is what this one takes; memory is asked here, at once,
    /// since much can be taken between two judgements of readiness.
    pub(super) fn admit_write(&self, bytes: u64) -> Result<(), Refusal> {
        const SHEDDING: Refusal = Refusal::later(Status::Unavailable, "the daemon sheds writes under pressure", 500);
        if self.draining {
            return Err(STOPPING);
        }
        let fits = self.memory.has_room(self.others(), bytes, self.config.readiness.shed_at_percent);
        if self.shedding || !fits { Err(SHEDDING) } else { Ok(()) }
    }

    /// Streams are memory too: hundreds of them a session, each with its list of topics, are more
    /// than the session itself.
    fn admit_stream(&self, kind: Kind) -> Result<Kind, Refusal> {
        if self.memory.has_room(self.others(), kind.cost(), 100) { Ok(kind) } else { Err(NO_MEMORY) }
    }

    pub(super) fn request(&mut self, id: SessionId, frame: Frame, clock: Clock) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let Some(stream) = entry.session.stream_mut(frame.corr_id) else { return };
        match &stream.kind {
            Kind::Publish { .. } => self.publish(id, frame, clock),
            Kind::GossipIn => self.gossip(id, frame, clock),
            Kind::Subscribe { .. } | Kind::GossipOut { .. } => {
                let refusal = Refusal::new(Status::BadRequest, "a subscription takes no more requests");
                self.refuse(id, &frame, &refusal, false);
            }
        }
    }

    fn gossip(&mut self, id: SessionId, frame: Frame, clock: Clock) {
        let Some(link) = self.sessions.get(&id).and_then(|entry| entry.remote()).map(|remote| remote.link) else {
            return;
        };
        let tenant = frame.tenant;
        let Some(record) = Record::decode(frame.payload) else {
            self.outputs.push_back(Output::Rejected(Reason::Protocol));
            self.count_useless(id);
            return;
        };
        self.pace_gossip(id, &record, clock.now);
        let (mut wire, engine) = self.wire();
        match engine.handle_record(link, tenant, record, (clock.unix_ms, clock.now), &mut wire) {
            Ok(deliveries) => deliveries.iter().for_each(|held| self.deliver(held)),
            // Not counted as useless: what is stale, or went round too often, is not its
            // neighbour's fault, and an honest peer is never to be cut off for it.
            Err(reason) => self.outputs.push_back(Output::Rejected(reason)),
        }
    }

    pub(super) fn end(&mut self, id: SessionId, frame: &Frame) {
        if self.release(id, frame.corr_id).is_some() {
            self.push(id, Class::Control, Frame::response(frame, 200, true, bytes::Bytes::new()));
        }
    }
}
