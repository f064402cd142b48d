//! What a START opens, what later frames of its stream do, and how it ends.

use super::entry::Upload;
use super::{Clock, Kind, Node, Output, Party, SessionId};
use crate::control::{MAX_TOPICS, Open, parse};
use crate::frame::{AppProto, CHUNK, Flags, Frame};
use crate::grant::{Action, Grant, Holder};
use crate::lanes::Class;
use crate::record::Record;
use crate::status::{Reason, Refusal, Status};

impl Node {
    pub(super) fn start(&mut self, id: SessionId, start: &Frame, grant: Option<Result<Grant, Refusal>>, clock: Clock) {
        match self.open(id, start, grant, clock) {
            Ok(Some(kind)) => {
                let ended = start.flags.has(Flags::END);
                if let Some(entry) = self.sessions.get_mut(&id).filter(|_| !ended) {
                    entry.session.open_theirs(start, kind);
                }
                self.push(id, Class::Control, Frame::response(start, 200, ended, bytes::Bytes::new()));
            }
            Ok(None) => {} // answered and over
            Err(refusal) => self.refuse(id, start, &refusal, true),
        }
    }

    /// Decides on a START: quota first, then the capability, then what it asks for.
    fn open(
        &mut self,
        id: SessionId,
        start: &Frame,
        grant: Option<Result<Grant, Refusal>>,
        clock: Clock,
    ) -> Result<Option<Kind>, Refusal> {
        self.admit(id, clock)?;
        let grant = grant.unwrap_or(Err(Refusal::new(Status::Unauthorized, "START carries no capability token")))?;
        if !self.config.overlay.tenants.contains(&start.tenant) {
            return Err(Refusal::new(Status::Forbidden, "this daemon does not carry that tenant"));
        }
        let open: Open =
            parse(&start.payload).ok_or(Refusal::new(Status::BadRequest, "the START's payload names no operation"))?;
        match (start.app, open) {
            (AppProto::PUBSUB, Open::Publish { topic }) => {
                grant.permit(Action::Publish, start.tenant, Some(&topic))?;
                self.admit_write()?;
                Ok(Some(Kind::Publish { topic, grant: Box::new(grant), upload: Upload::None }))
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
                    return Err(Refusal::later(Status::Unavailable, "the daemon is stopping", 1_000));
                }
                self.subscriptions.add(id, start, &topics);
                Ok(Some(Kind::Subscribe { topics, missed: 0 }))
            }
            (AppProto::GOSSIP, Open::Gossip {}) => {
                grant.permit(Action::Publish, start.tenant, None)?;
                let is_peer = self.sessions.get(&id).is_some_and(|entry| matches!(entry.party, Party::Peer(_)));
                if !is_peer {
                    return Err(Refusal::new(Status::Forbidden, "this identity is not a configured peer"));
                }
                Ok(Some(Kind::GossipIn))
            }
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

    /// I-6: writes fail first.
    pub(super) fn admit_write(&self) -> Result<(), Refusal> {
        match (self.draining, self.shedding) {
            (true, _) => Err(Refusal::later(Status::Unavailable, "the daemon is stopping", 1_000)),
            (false, true) => Err(Refusal::later(Status::Unavailable, "the daemon sheds writes under pressure", 500)),
            (false, false) => Ok(()),
        }
    }

    pub(super) fn request(&mut self, id: SessionId, frame: Frame, clock: Clock) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let Some(stream) = entry.session.stream_mut(frame.corr_id) else { return };
        match &stream.kind {
            Kind::Publish { .. } => self.publish(id, frame, clock),
            Kind::GossipIn => self.gossip(id, frame, clock),
            Kind::Subscribe { .. } | Kind::GossipOut => {
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
        let (mut wire, engine) = self.wire();
        match engine.handle_record(link, tenant, record, (clock.unix_ms, clock.now), &mut wire) {
            Ok(deliveries) => deliveries.iter().for_each(|held| self.deliver(held)),
            // Not counted as useless: what is stale, or went round too often, is not its
            // neighbour's fault, and an honest peer is never to be cut off for it.
            Err(reason) => self.outputs.push_back(Output::Rejected(reason)),
        }
    }

    pub(super) fn end(&mut self, id: SessionId, frame: &Frame) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let Some(stream) = entry.session.close_stream(frame.corr_id) else { return };
        match stream.kind {
            Kind::Subscribe { topics, .. } => self.subscriptions.remove(id, frame.tenant, frame.corr_id, &topics),
            // The upload's own answer will not come: the count goes with it.
            Kind::Publish { upload: Upload::Open { .. }, .. } => self.forget_upload(id),
            Kind::Publish { .. } | Kind::GossipIn | Kind::GossipOut => {}
        }
        self.push(id, Class::Control, Frame::response(frame, 200, true, bytes::Bytes::new()));
    }
}
