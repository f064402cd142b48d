//! One session's place in the node: its machine, its lanes, its quota, what it turned out
//! to be. And the lanes of all links as the gossip engine sees them.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::{Opening, SessionId};
use crate::Millis;
use crate::admission::{Quota, TokenBucket};
use crate::backoff::Backoff;
use crate::budget::FrameBudget;
use crate::config::{DaemonConfig, Transport};
use crate::control::{DaemonHello, Incarnation};
use crate::frame::{AppProto, Flags, Frame};
use crate::gossip::{Held, LinkId, Outlet};
use crate::grant::{Holder, Validity};
use crate::identity::{SpiffeId, TenantId, Topic};
use crate::lanes::{Class, Lanes, Side};
use crate::memory::{Budget, FRAME_BYTES, SESSION_BYTES, STREAM_BYTES, TOPIC_BYTES, WRITE_BYTES};
use crate::record::Digest;
use crate::session::Session;
use crate::status::Refusal;

/// What a session turned out to be, by HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Party {
    /// Not known yet, or not a daemon.
    Client,
    /// A daemon that is configured as a peer.
    Peer(Remote),
}

/// A daemon at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) identity: SpiffeId,
    pub(super) incarnation: Incarnation,
    pub(super) name: String,
    /// Its place in the peers file; none where it only shares a peer's identity.
    pub(super) configured: Option<usize>,
    pub(super) link: LinkId,
    /// Our gossip streams to it that were accepted.
    pub(super) streams: BTreeMap<TenantId, u64>,
    /// A renewal of one of them was refused: when to ask again.
    pub(super) renew_at: Option<Millis>,
}

/// What a stream is for.
#[derive(Debug)]
pub(super) enum Kind {
    Publish {
        topic: Topic,
        /// Of the token that opened it, or renewed it last.
        valid: Validity,
        upload: Upload,
    },
    Subscribe {
        topics: Vec<Topic>,
        missed: u32,
    },
    GossipIn,
    /// One of ours, by our token of that number; `renews` names the stream that it takes over.
    GossipOut {
        token: u64,
        renews: Option<u64>,
    },
}

impl Kind {
    /// What a stream takes of memory: itself, and the names of its topics, which stand in the
    /// table of subscriptions too.
    pub(super) fn cost(&self) -> u64 {
        let topics = match self {
            Self::Subscribe { topics, .. } => topics.as_slice(),
            Self::Publish { topic, .. } => std::slice::from_ref(topic),
            Self::GossipIn | Self::GossipOut { .. } => &[],
        };
        let of = |topic: &Topic| TOPIC_BYTES + 2 * topic.as_str().len() as u64;
        STREAM_BYTES + topics.iter().map(of).sum::<u64>()
    }
}

/// A publisher's chunked message.
#[derive(Debug)]
pub(super) enum Upload {
    /// None is under way.
    None,
    /// Chunks are coming, in order.
    Open {
        hash: Digest,
        size: u32,
        attributes: u8,
        got: Vec<Bytes>,
        bytes: usize,
        hasher: Box<blake3::Hasher>,
        progress: Millis,
    },
    /// It was refused; its chunks are dropped.
    Refused { hash: Digest },
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) session: Session<Kind>,
    pub(super) holder: Holder,
    pub(super) dialled: Option<usize>,
    pub(super) transport: Option<Transport>,
    /// Bytes that its transport may hold.
    pub(super) buffers: u64,
    pub(super) group: &'static str,
    pub(super) party: Party,
    /// What a daemon said of itself that is no configured peer: it may become one.
    pub(super) stranger: Option<DaemonHello>,
    pub(super) lanes: Lanes,
    pub(super) quota: Quota,
    pub(super) backoff: Backoff,
    pub(super) budget: FrameBudget,
    /// Gossip that a peer may send.
    pub(super) gossip: Option<TokenBucket>,
    /// Useless frames that the budget has not been told of.
    pub(super) useless: u32,
    pub(super) writer_idle: bool,
    /// What its writer was given last has messages.
    pub(super) delivering: bool,
    pub(super) sendable: bool,
    pub(super) closing: bool,
    /// There was no place for it: it is only here to be told so, and counts as no session.
    pub(super) turned_away: Option<Refusal>,
    /// Subscriptions that end once nothing of them is queued.
    pub(super) ends: Vec<(u64, TenantId)>,
    /// Bytes: of what its writer has, and of its uploads under way.
    pub(super) writing: u64,
    pub(super) uploading: u64,
    /// Bytes that the streams take that the other side opened.
    pub(super) streams: u64,
    /// Bytes that the account holds for it.
    pub(super) claimed: u64,
    pub(super) deadline: Option<Millis>,
}

impl Entry {
    pub(super) fn new(session: Session<Kind>, opening: Opening, config: &DaemonConfig, now: Millis) -> Self {
        Self {
            session,
            buffers: opening.buffers(),
            holder: opening.holder,
            dialled: opening.dialled,
            transport: opening.transport,
            group: opening.group,
            party: Party::Client,
            stranger: None,
            lanes: Lanes::new(config.gossip.lane_depth_frames),
            quota: Quota::new(config.overlay.per_peer_rps, config.overlay.per_peer_inflight, now),
            backoff: Backoff::default(),
            budget: FrameBudget::new(now),
            gossip: None,
            useless: 0,
            writer_idle: true,
            delivering: false,
            sendable: false,
            closing: false,
            turned_away: None,
            ends: Vec::new(),
            writing: 0,
            uploading: 0,
            streams: 0,
            claimed: 0,
            deadline: None,
        }
    }

    /// Brings the account in line with what it holds now.
    pub(super) fn settle(&mut self, memory: &mut Budget) {
        let holds = SESSION_BYTES + self.buffers + self.lanes.cost() + self.writing + self.uploading + self.streams;
        memory.give_back(std::mem::replace(&mut self.claimed, holds));
        memory.claim(holds);
    }

    /// It is gone: all of it is given back.
    pub(super) fn release(&mut self, memory: &mut Budget) {
        memory.give_back(std::mem::take(&mut self.claimed));
    }

    /// Its writer was given these.
    pub(super) fn hand_over(&mut self, batch: &[Frame]) {
        let (sum, largest) =
            batch.iter().map(Frame::wire_len).fold((0, 0), |(sum, most), len| (sum + len, len.max(most)));
        let encoded = sum.min(WRITE_BYTES.max(largest)) as u64;
        // TLS holds it once more, encrypted; QUIC's windows are in `buffers`.
        let copies = if matches!(self.transport, Some(Transport::Tcp | Transport::Tor)) { 2 } else { 1 };
        self.writing = copies * encoded + batch.len() as u64 * FRAME_BYTES;
        self.writer_idle = false;
        self.delivering = batch.iter().any(|frame| frame.flags.has(Flags::EVENT));
    }

    /// Whether it is neither a peer nor may become one.
    pub(super) fn is_client(&self) -> bool {
        self.dialled.is_none() && self.remote().is_none()
    }

    pub(super) fn remote(&self) -> Option<&Remote> {
        match &self.party {
            Party::Peer(remote) => Some(remote),
            Party::Client => None,
        }
    }

    pub(super) fn remote_mut(&mut self) -> Option<&mut Remote> {
        match &mut self.party {
            Party::Peer(remote) => Some(remote),
            Party::Client => None,
        }
    }
}

/// The sessions as the gossip engine reaches them.
pub(super) struct Wire<'a> {
    sessions: &'a mut BTreeMap<SessionId, Box<Entry>>,
    links: &'a BTreeMap<LinkId, SessionId>,
    sendable: &'a mut VecDeque<SessionId>,
    memory: &'a mut Budget,
    /// Bytes that others than sessions hold.
    others: u64,
}

impl<'a> Wire<'a> {
    pub(super) fn new(
        sessions: &'a mut BTreeMap<SessionId, Box<Entry>>,
        links: &'a BTreeMap<LinkId, SessionId>,
        sendable: &'a mut VecDeque<SessionId>,
        memory: (&'a mut Budget, u64),
    ) -> Self {
        let (memory, others) = memory;
        Self { sessions, links, sendable, memory, others }
    }

    /// Notes that a session has something to send, once.
    pub(super) fn mark(&mut self, id: SessionId) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        if entry.writer_idle && !entry.sendable && !entry.lanes.is_empty() {
            entry.sendable = true;
            self.sendable.push_back(id);
        }
    }

    /// Queues one frame of an event or of gossip.
    pub(super) fn push(&mut self, id: SessionId, (class, side): (Class, Side), frame: Frame) -> bool {
        let Some(entry) = self.sessions.get_mut(&id).filter(|entry| !entry.closing) else { return false };
        let taken = entry.lanes.push_for(class, frame, side).is_ok();
        if taken {
            entry.settle(self.memory);
            self.mark(id);
        }
        taken
    }

    /// Queues a message for a subscription, whole or not at all. False where it is left out:
    /// there is no room for it in the session's lane, or in memory, or the subscription has yet
    /// to be told of one that was. One look at the session for all of it: this is what a daemon
    /// does most.
    pub(super) fn deliver(&mut self, id: SessionId, corr_id: u64, class: Class, held: &Held) -> bool {
        let has_memory = self.has_memory(WRITE_BYTES as u64);
        let Some(entry) = self.sessions.get_mut(&id) else { return true };
        let fits = has_memory && entry.lanes.room(class) >= held.frames.len();
        let stream = entry.session.stream_mut(corr_id);
        let Some(Kind::Subscribe { missed, .. }) = stream.map(|stream| &mut stream.kind) else { return true };
        if *missed > 0 || !fits {
            *missed = missed.saturating_add(1);
            return false;
        }
        if entry.closing {
            return true;
        }
        for payload in held.frames.iter() {
            // There is room: it was looked for.
            let _queued = entry.lanes.push(class, event(held, corr_id, payload.clone()));
        }
        entry.settle(self.memory);
        if entry.writer_idle && !entry.sendable {
            entry.sendable = true;
            self.sendable.push_back(id);
        }
        true
    }

    fn stream(&self, link: LinkId, tenant: TenantId) -> Option<(SessionId, &Entry, u64)> {
        let id = *self.links.get(&link)?;
        let entry = self.sessions.get(&id)?;
        Some((id, entry, *entry.remote()?.streams.get(&tenant)?))
    }
}

impl Outlet for Wire<'_> {
    fn has_stream(&self, link: LinkId, tenant: TenantId) -> bool {
        self.stream(link, tenant).is_some()
    }

    fn room(&self, link: LinkId, tenant: TenantId, class: Class, side: Side) -> usize {
        let room = self.stream(link, tenant).map_or(0, |(_, entry, _)| entry.lanes.room_for(class, side));
        if self.has_memory(WRITE_BYTES as u64) { room } else { 0 }
    }

    fn send(&mut self, link: LinkId, tenant: TenantId, (class, side): (Class, Side), payload: Bytes) -> bool {
        let Some((id, _, corr_id)) = self.stream(link, tenant) else { return false };
        self.push(id, (class, side), Frame::new(Flags::REQ, AppProto::GOSSIP, tenant, corr_id, payload))
    }

    fn has_memory(&self, bytes: u64) -> bool {
        self.memory.has_room(self.others, bytes, 100)
    }
}

fn event(held: &Held, corr_id: u64, payload: Bytes) -> Frame {
    let e2e = if held.envelope.attributes & 1 == 1 { Flags::APP_E2E } else { Flags::default() };
    Frame::new(Flags::EVENT | e2e, AppProto::PUBSUB, held.tenant, corr_id, payload)
}
