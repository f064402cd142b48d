//! Publishing, subscribing and delivery, for one daemon's own clients.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};

use super::entry::{Entry, Upload, Wire};
use super::streams::STOPPING;
use super::{Clock, Kind, Node, Output, SessionId};
use crate::Millis;
use crate::frame::{AppProto, CHUNK, Flags, Frame, MAX_BODY};
use crate::gossip::{Draft, Held, class_of, digest};
use crate::identity::{TenantId, Topic};
use crate::lanes::{Class, Side};
use crate::record::{Piece, Publish, Record};
use crate::status::{Reason, Refusal, Status};

/// Who subscribed to what. Sets: one session may have hundreds of streams that name the same
/// topics, and its end must not look through everyone else's for each.
#[derive(Debug, Default)]
pub(super) struct Subscriptions(BTreeMap<(TenantId, Topic), BTreeSet<(SessionId, u64)>>);

impl Subscriptions {
    pub(super) fn add(&mut self, id: SessionId, start: &Frame, topics: &[Topic]) {
        for topic in topics {
            self.0.entry((start.tenant, topic.clone())).or_default().insert((id, start.corr_id));
        }
    }

    pub(super) fn remove(&mut self, id: SessionId, tenant: TenantId, corr_id: u64, topics: &[Topic]) {
        for topic in topics {
            let key = (tenant, topic.clone());
            if let Some(subscribers) = self.0.get_mut(&key) {
                subscribers.remove(&(id, corr_id));
                if subscribers.is_empty() {
                    self.0.remove(&key);
                }
            }
        }
    }

    /// The subscription `from` of a session goes on as `to`, in its place.
    pub(super) fn rename(&mut self, id: SessionId, tenant: TenantId, (from, to): (u64, u64), topics: &[Topic]) {
        for topic in topics {
            let Some(subscribers) = self.0.get_mut(&(tenant, topic.clone())) else { continue };
            if subscribers.remove(&(id, from)) {
                subscribers.insert((id, to));
            }
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// By its own streams: what others subscribed to costs nothing here.
    pub(super) fn remove_session(&mut self, id: SessionId, entry: &Entry) {
        for (corr_id, stream) in entry.session.streams() {
            if let Kind::Subscribe { topics, .. } = &stream.kind {
                self.remove(id, stream.tenant, corr_id, topics);
            }
        }
    }
}

impl Node {
    /// A frame of a publisher's stream.
    pub(super) fn publish(&mut self, id: SessionId, frame: Frame, clock: Clock) {
        let about = Frame { payload: Bytes::new(), ..frame.clone() };
        match self.accept_publish(id, frame, clock) {
            Ok(None) => {}
            Ok(Some(message)) => self.push(id, Class::Control, Frame::response(&about, 200, false, message)),
            Err(refusal) => self.refuse(id, &about, &refusal, false),
        }
    }

    /// The id to answer with, once a message is whole and kept.
    fn accept_publish(&mut self, id: SessionId, frame: Frame, clock: Clock) -> Result<Option<Bytes>, Refusal> {
        let attributes = u8::from(frame.flags.has(Flags::APP_E2E));
        let publish =
            Publish::decode(frame.payload.clone()).ok_or(Refusal::new(Status::BadRequest, "not a publish record"))?;
        match publish {
            Publish::Message(payload) => {
                self.admit_message(id, frame.corr_id, payload.len() as u64, clock)?;
                if payload.len() > CHUNK {
                    return Err(Refusal::new(Status::PayloadTooLarge, "over 64 KiB a message is sent as chunks"));
                }
                let hash = digest(&payload);
                self.originate(id, &frame, attributes, payload, hash, clock).map(Some)
            }
            Publish::Begin { size, hash } => {
                let verdict = self.admit_upload(id, frame.corr_id, size, clock);
                let next = match &verdict {
                    Ok(()) => {
                        let hasher = Box::default();
                        Upload::Open { hash, size, attributes, got: Vec::new(), bytes: 0, hasher, progress: clock.now }
                    }
                    Err(_) => Upload::Refused { hash },
                };
                let replaced = self.set_upload(id, frame.corr_id, next);
                if let Some(Upload::Open { size, .. }) = replaced {
                    self.forget_upload(id, size);
                }
                verdict?;
                if let Some(entry) = self.sessions.get_mut(&id) {
                    entry.quota.enter();
                    entry.uploading += u64::from(size);
                    entry.settle(&mut self.memory);
                }
                self.quota.enter();
                Ok(None)
            }
            Publish::Piece(piece) => self.accept_piece(id, &frame, piece, clock),
        }
    }

    fn admit_message(&mut self, id: SessionId, corr_id: u64, size: u64, clock: Clock) -> Result<(), Refusal> {
        self.admit(id, clock)?;
        self.admit_write(size)?;
        let stream = self.sessions.get_mut(&id).and_then(|entry| entry.session.stream_mut(corr_id));
        match stream.map(|stream| &stream.kind) {
            Some(Kind::Publish { valid, .. }) => valid.check(clock.unix_ms),
            _ => Err(Refusal::new(Status::BadRequest, "not a publish stream")),
        }
    }

    /// G-6: 413 from the announced size, before any chunk.
    fn admit_upload(&mut self, id: SessionId, corr_id: u64, size: u32, clock: Clock) -> Result<(), Refusal> {
        if size as usize > MAX_BODY {
            return Err(Refusal::new(
                Status::PayloadTooLarge,
                "a published message is at most 1 MiB; larger objects are for put",
            ));
        }
        if size as usize <= CHUNK {
            return Err(Refusal::new(Status::BadRequest, "up to 64 KiB a message is sent whole"));
        }
        // An upload holds its place for as long as its chunks take: some are left for what is
        // answered at once, or a few clients that send slowly would keep all others out.
        self.quota.admit_long()?;
        self.admit_message(id, corr_id, size.into(), clock)
    }

    fn set_upload(&mut self, id: SessionId, corr_id: u64, next: Upload) -> Option<Upload> {
        match &mut self.sessions.get_mut(&id)?.session.stream_mut(corr_id)?.kind {
            Kind::Publish { upload, .. } => Some(std::mem::replace(upload, next)),
            Kind::Subscribe { .. } | Kind::GossipIn | Kind::GossipOut { .. } => None,
        }
    }

    fn accept_piece(
        &mut self,
        id: SessionId,
        frame: &Frame,
        piece: Piece,
        clock: Clock,
    ) -> Result<Option<Bytes>, Refusal> {
        let bad = |message| Err(Refusal::new(Status::BadRequest, message));
        match self.set_upload(id, frame.corr_id, Upload::None) {
            Some(Upload::Refused { hash }) if hash == piece.hash => {
                self.set_upload(id, frame.corr_id, Upload::Refused { hash });
                self.count_useless(id);
                Ok(None)
            }
            Some(Upload::Open { hash, size, attributes, mut got, bytes, mut hasher, .. }) => {
                let expected = (size as usize - bytes).min(CHUNK);
                if hash != piece.hash || piece.index as usize != got.len() || piece.bytes.len() != expected {
                    self.forget_upload(id, size);
                    self.set_upload(id, frame.corr_id, Upload::Refused { hash });
                    return bad("not the next chunk of the message");
                }
                hasher.update(&piece.bytes);
                let bytes = bytes + piece.bytes.len();
                got.push(piece.bytes);
                if bytes < size as usize {
                    self.set_upload(
                        id,
                        frame.corr_id,
                        Upload::Open { hash, size, attributes, got, bytes, hasher, progress: clock.now },
                    );
                    return Ok(None);
                }
                self.forget_upload(id, size);
                if hasher.finalize() != hash {
                    return bad("the chunks are not the payload that was named");
                }
                let mut payload = BytesMut::with_capacity(bytes);
                got.iter().for_each(|chunk| payload.extend_from_slice(chunk));
                self.originate(id, frame, attributes, payload.freeze(), hash, clock).map(Some)
            }
            Some(Upload::Refused { .. } | Upload::None) | None => bad("a chunk of no message"),
        }
    }

    /// An upload of `size` bytes is over: it counts no longer, neither as in flight nor as
    /// memory. Its answer counts for itself.
    pub(super) fn forget_upload(&mut self, id: SessionId, size: u32) {
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.quota.leave(1);
            entry.uploading = entry.uploading.saturating_sub(size.into());
            entry.settle(&mut self.memory);
        }
        self.quota.leave(1);
    }

    /// A frame of a stream could not be read: the message under way there, if any, lacks it.
    pub(super) fn refuse_upload(&mut self, id: SessionId, corr_id: u64) {
        let stream = self.sessions.get_mut(&id).and_then(|entry| entry.session.stream_mut(corr_id));
        let Some(Kind::Publish { upload, .. }) = stream.map(|stream| &mut stream.kind) else { return };
        if let Upload::Open { hash, size, .. } = *upload {
            *upload = Upload::Refused { hash };
            self.forget_upload(id, size);
        }
    }

    /// An upload whose next chunk does not come is refused: it holds memory, and a place among
    /// the requests in flight that others wait for.
    pub(super) fn refuse_stalled_uploads(&mut self, now: Millis) {
        let is_stalled = |upload: &Upload, patience| match upload {
            Upload::Open { hash, size, progress, .. } if now.since(*progress) >= patience => Some((*hash, *size)),
            Upload::Open { .. } | Upload::Refused { .. } | Upload::None => None,
        };
        let mut stalled = Vec::new();
        for (id, entry) in self.sessions.iter().filter(|(_, entry)| entry.quota.inflight() > 0) {
            let patience = self.config.read_ms(entry.transport);
            for (corr_id, stream) in entry.session.streams() {
                if let Kind::Publish { upload, .. } = &stream.kind {
                    stalled.extend(
                        is_stalled(upload, patience).map(|(hash, size)| (*id, corr_id, stream.tenant, hash, size)),
                    );
                }
            }
        }
        for (id, corr_id, tenant, hash, size) in stalled {
            self.set_upload(id, corr_id, Upload::Refused { hash });
            self.forget_upload(id, size);
            let to = Frame::new(Flags::REQ, AppProto::PUBSUB, tenant, corr_id, Bytes::new());
            self.refuse(id, &to, &Refusal::new(Status::BadRequest, "the next chunk did not come in time"), false);
        }
    }

    fn originate(
        &mut self,
        id: SessionId,
        frame: &Frame,
        attributes: u8,
        payload: Bytes,
        hash: [u8; 32],
        clock: Clock,
    ) -> Result<Bytes, Refusal> {
        let stream = self.sessions.get_mut(&id).and_then(|entry| entry.session.stream_mut(frame.corr_id));
        let Some(Kind::Publish { topic, .. }) = stream.map(|stream| &stream.kind) else {
            return Err(Refusal::new(Status::BadRequest, "not a publish stream"));
        };
        if self.draining {
            return Err(STOPPING); // an upload that began before: its subscribers are leaving
        }
        let draft = Draft { tenant: frame.tenant, topic: topic.clone(), attributes, payload, hash };
        let (mut wire, engine) = self.wire();
        let held = engine.publish(draft, clock.unix_ms, clock.now, &mut wire)?;
        self.deliver(&held);
        Ok(Bytes::copy_from_slice(&held.id.0))
    }

    /// Queues a message for everyone here who subscribed to its topic. Whose lane is full
    /// misses it, is counted, and is told by a Gap.
    pub(super) fn deliver(&mut self, held: &Held) {
        let Some(subscribers) = self.subscriptions.0.get(&(held.tenant, held.envelope.topic.clone())) else { return };
        let others = self.engine.memory().saturating_add(self.reading);
        let mut wire = Wire::new(&mut self.sessions, &self.links, &mut self.sendable, (&mut self.memory, others));
        let class = class_of(held);
        for (id, corr_id) in subscribers {
            if !wire.deliver(*id, *corr_id, class, held) {
                self.outputs.push_back(Output::Rejected(Reason::Overflow));
            }
        }
    }

    /// A session has room again: its subscriptions are told what they missed, in place of it.
    pub(super) fn tell_gaps(&mut self, id: SessionId) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        // With half the lane free the subscriber has caught up; sooner, a Gap would be
        // followed by the next one.
        let room = |lanes: &crate::lanes::Lanes| lanes.percent() < 50;
        if !room(&entry.lanes) {
            return;
        }
        let gaps: Vec<(u64, TenantId, u32)> = entry
            .session
            .streams()
            .filter_map(|(corr_id, stream)| match stream.kind {
                Kind::Subscribe { missed, .. } if missed > 0 => Some((corr_id, stream.tenant, missed)),
                _ => None,
            })
            .collect();
        for (corr_id, tenant, count) in gaps {
            let gap = Record::Gap { missed: count }.encode();
            let (mut wire, _) = self.wire();
            if !wire.push(
                id,
                (Class::Interactive, Side::Ours),
                Frame::new(Flags::EVENT, AppProto::PUBSUB, tenant, corr_id, gap),
            ) {
                return;
            }
            if let Some(stream) = self.sessions.get_mut(&id).and_then(|entry| entry.session.stream_mut(corr_id))
                && let Kind::Subscribe { missed, .. } = &mut stream.kind
            {
                *missed = 0;
            }
        }
    }

    /// Draining: every subscription ends, after what it already has queued.
    pub(super) fn end_subscriptions(&mut self) {
        self.subscriptions = Subscriptions::default();
        for entry in self.sessions.values_mut() {
            let open = entry.session.streams().filter(|(_, stream)| matches!(stream.kind, Kind::Subscribe { .. }));
            entry.ends = open.map(|(corr_id, stream)| (corr_id, stream.tenant)).collect();
        }
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        ids.into_iter().for_each(|id| self.tell_ends(id));
    }

    /// Ends a session's subscriptions once nothing of them is queued: lanes overtake each other,
    /// and whoever heard of the end would not wait for the rest.
    pub(super) fn tell_ends(&mut self, id: SessionId) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        if entry.ends.is_empty() || !entry.lanes.is_empty() {
            return;
        }
        for (corr_id, tenant) in std::mem::take(&mut entry.ends) {
            let Some(stream) = self.release(id, corr_id) else { continue };
            if let Kind::Subscribe { missed: missed @ 1.., .. } = stream.kind {
                let gap = Record::Gap { missed }.encode();
                self.push(id, Class::Control, Frame::new(Flags::EVENT, AppProto::PUBSUB, tenant, corr_id, gap));
            }
            let end = Frame {
                code: STOPPING.status.code(),
                ..Frame::new(Flags::RESP | Flags::END, AppProto::PUBSUB, tenant, corr_id, STOPPING.body(corr_id))
            };
            self.push(id, Class::Control, end);
        }
    }
}
