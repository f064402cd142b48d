//! One daemon's decisions, all sessions together: what each frame does, what goes out next,
//! and when to look again. The shell feeds it frames and the time, and moves what it gives.
//!
//! Reading order: `entry` (one session's place here), `places` (who may have a session), `peers`
//! (who is a peer, links), `streams` (what a START opens), `tokens` (when it ends by its token),
//! `renewal` (how it goes on by another), `pubsub` (publish, subscribe, delivery), `pace`
//! (windows, budgets, delays), `report` (its state).

mod entry;
mod pace;
mod places;
mod peers;
mod pubsub;
mod renewal;
mod report;
mod streams;
mod tokens;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

use crate::Millis;
use crate::admission::Quota;
use crate::backoff::Jitter;
use crate::budget::FRAMES_PER_START;
use crate::config::{DaemonConfig, PeersConfig, Places, Transport};
use crate::control::{DaemonHello, Hello, HelloReply, Incarnation};
use crate::frame::{AppProto, Flags, Frame};
use crate::gossip::{Counts, Engine, LinkId, Me};
use crate::grant::{Grant, Holder};
use crate::identity::SpiffeId;
use crate::lanes::Class;
use crate::memory::{Budget, FRAME_BYTES, QUIC_BYTES, WRITE_BYTES};
use crate::readiness::Report;
use crate::session::{Event, Role, Session, State, Tick, Timers};
use crate::status::{Reason, Refusal, Status};

use entry::{Entry, Kind, Party, Wire};
use pubsub::Subscriptions;
use tokens::{Believed, Leases};

/// A session, for as long as the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// The time, by both clocks that the shell has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Since the process began; deadlines and rates use it.
    pub now: Millis,
    /// Milliseconds since 1970; tokens and messages carry it.
    pub unix_ms: u64,
}

/// How a session came to be, once its transport is up.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Who is at the other end.
    pub holder: Holder,
    /// The configured peer that was dialled, by its place ([`Places`]).
    pub dialled: Option<usize>,
    /// What carries it; nothing but the Unix socket, if none.
    pub transport: Option<Transport>,
    /// The key exchange, as the report of sessions names it: `hybrid`, `classical`, or `none`.
    pub group: &'static str,
    /// Until when HELLO must be answered: one deadline from the connection's first moment,
    /// of which TLS has used some already.
    pub handshake_ends: Millis,
}

impl Opening {
    /// Bytes that its transport may hold in this process, both ways: QUIC's windows are here,
    /// TCP's are the kernel's.
    fn buffers(&self) -> u64 {
        match self.transport {
            Some(Transport::Quic) => QUIC_BYTES,
            Some(Transport::Tcp | Transport::Tor) | None => 0,
        }
    }
}

/// What the shell is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Close the connection: everything queued was handed to its writer.
    Close(SessionId),
    /// A configured peer has a session, or has none any more; by its place.
    Peer {
        /// Its place.
        peer: usize,
        /// Whether it has one.
        up: bool,
    },
    /// Count a refusal.
    Rejected(Reason),
    /// HELLO made the session active.
    Opened(SessionId),
    /// Read nothing more of the session until then: too much of it was useless. Of one that is
    /// closing, read nothing more at all.
    Pause(SessionId, Millis),
}

/// Bytes that one batch for a writer holds at the most.
pub const BATCH_BYTES: usize = 256 * 1024;
/// And while the memory budget is used up.
const LEAN_BATCH_BYTES: usize = 4 * 1024;
/// How often uploads that stand still, and peers that had time to leave, are looked for.
const HOUSEKEEPING_MS: u64 = 1_000;

/// The daemon.
#[derive(Debug)]
pub struct Node {
    config: DaemonConfig,
    places: Places,
    identity: SpiffeId,
    hello: DaemonHello,
    /// What START frames to peers carry.
    token: Bytes,
    /// Which of them it is: each replaces the one before.
    token_generation: u64,
    believed: Believed,
    leases: Leases,
    /// In boxes: a tree's nodes are half empty where numbers rise.
    sessions: BTreeMap<SessionId, Box<Entry>>,
    /// Of which so many are there only to be told that there is no place.
    turned_away: usize,
    links: BTreeMap<LinkId, SessionId>,
    /// Sessions whose peer is no longer configured, and until when they may go on.
    leaving: BTreeMap<SessionId, Millis>,
    engine: Engine,
    subscriptions: Subscriptions,
    quota: Quota,
    memory: Budget,
    /// Bytes that the shell's readers have allocated.
    reading: u64,
    shedding: bool,
    draining: bool,
    report: Report,
    /// Sessions whose lanes have something and whose writer waits.
    sendable: VecDeque<SessionId>,
    /// When to look at a session again; never later than its machine asks.
    deadlines: BTreeSet<(Millis, SessionId)>,
    outputs: VecDeque<Output>,
    jitter: Jitter,
    /// Answers given so far.
    answers: u64,
    /// When to look for those again.
    housekeeping_at: Millis,
}

impl Node {
    /// A daemon of this identity, without sessions. The incarnation seeds what it needs of
    /// randomness: how far its attempts are spread.
    #[must_use]
    pub fn new(
        config: DaemonConfig,
        peers: &PeersConfig,
        identity: SpiffeId,
        incarnation: Incarnation,
        now: Millis,
    ) -> Self {
        let me = Me { identity: identity.clone(), incarnation };
        let tenants = config.overlay.tenants.clone();
        Self {
            engine: Engine::new(me, config.gossip.clone(), tenants, now),
            quota: Quota::new(config.overlay.rps, config.overlay.inflight, now),
            memory: Budget::new(config.overlay.memory_bytes),
            reading: 0,
            hello: DaemonHello { name: peers.name.clone(), incarnation },
            config,
            places: Places::new(&peers.peers),
            identity,
            token: Bytes::new(),
            token_generation: 0,
            believed: Believed::default(),
            leases: Leases::default(),
            sessions: BTreeMap::new(),
            turned_away: 0,
            links: BTreeMap::new(),
            leaving: BTreeMap::new(),
            subscriptions: Subscriptions::default(),
            shedding: false,
            draining: false,
            report: Report::default(),
            sendable: VecDeque::new(),
            deadlines: BTreeSet::new(),
            outputs: VecDeque::new(),
            jitter: Jitter::new(incarnation.0),
            answers: 0,
            housekeeping_at: now.after(HOUSEKEEPING_MS),
        }
    }

    /// Other limits and caps from now on; only what [`DaemonConfig::with_live`] takes from
    /// `new` is heeded. Sessions, queues and what is held stay; what a bound no longer allows
    /// goes the way it always does.
    pub fn handle_config(&mut self, new: &DaemonConfig, now: Millis) {
        self.config = self.config.with_live(new);
        let (overlay, gossip) = (&self.config.overlay, &self.config.gossip);
        self.quota.resize(overlay.rps, overlay.inflight, now);
        self.memory.resize(overlay.memory_bytes);
        self.engine.handle_config(gossip);
        for entry in self.sessions.values_mut() {
            entry.quota.resize(overlay.per_peer_rps, overlay.per_peer_inflight, now);
            entry.session.set_idle(self.config.idle_ms(entry.transport));
            entry.lanes.resize(gossip.lane_depth_frames);
            if entry.lanes.is_limited() {
                entry.lanes.limit(gossip.burst_frames, now);
                entry.gossip = Some(pace::gossip_bucket(gossip.burst_frames, now));
            }
        }
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        ids.into_iter().for_each(|id| self.reschedule(id));
    }

    /// What readiness was judged to be, and whether writes are shed.
    pub fn handle_readiness(&mut self, report: Report, shedding: bool) {
        self.report = report;
        self.shedding = shedding;
    }

    /// Bytes that the shell's readers have allocated, all sessions.
    pub fn handle_reading(&mut self, bytes: u64) {
        self.reading = bytes;
    }

    /// A transport is up and its other end authenticated. Where there is no place for it, its
    /// HELLO will be refused with a code and a time; false, and nothing done, where too many
    /// wait for that already.
    pub fn handle_open(&mut self, id: SessionId, opening: Opening, now: Millis) -> bool {
        let mut turned_away = self.find_place(&opening).err();
        let given = turned_away.as_ref().is_some_and(|refusal| self.take_over_place(refusal, &opening, now));
        if given {
            turned_away = None;
        }
        if let Some(refusal) = &turned_away
            && (opening.dialled.is_some() || self.turned_away >= places::MAX_TURNED_AWAY)
        {
            self.outputs.push_back(Output::Rejected(refusal.status.reason()));
            return false;
        }
        let role = if opening.dialled.is_some() { Role::Dialler } else { Role::Acceptor };
        let idle_ms = self.config.idle_ms(opening.transport);
        let timers = Timers { handshake_ends: opening.handshake_ends, idle_ms };
        let mut session = Session::new(role, timers, now);
        let hello = Hello {
            ua: Some(concat!("overlay-daemon/", env!("CARGO_PKG_VERSION")).into()),
            daemon: Some(self.hello.clone()),
        };
        let greeting = session.handle_connected(&hello, now);
        let mut entry = Entry::new(session, opening, &self.config, now);
        self.turned_away += usize::from(turned_away.is_some());
        entry.turned_away = turned_away;
        entry.settle(&mut self.memory);
        entry.deadline = entry.session.poll_timeout();
        self.deadlines.extend(entry.deadline.map(|at| (at, id)));
        self.sessions.insert(id, Box::new(entry));
        if let Some(frame) = greeting {
            self.push(id, Class::Control, frame);
        }
        true
    }

    /// The connection of a session is gone.
    pub fn handle_closed(&mut self, id: SessionId) {
        let Some(mut entry) = self.sessions.remove(&id) else { return };
        if let Some(at) = entry.deadline {
            self.deadlines.remove(&(at, id));
        }
        self.leaving.remove(&id);
        self.subscriptions.remove_session(id, &entry);
        self.leases.remove_session(id);
        entry.session.close();
        entry.release(&mut self.memory);
        self.turned_away -= usize::from(entry.turned_away.is_some());
        self.quota.leave(entry.quota.inflight());
        self.unlink(id, &entry);
    }

    /// The bytes of a session cannot be a frame, or there is no memory for all of it: the session
    /// is told why, then closed.
    pub fn handle_framing_error(&mut self, id: SessionId, status: Status) {
        let refusal = match status {
            Status::Unavailable => places::NO_MEMORY,
            _ => Refusal::new(status, "the bytes are not an OAP/1 frame"),
        };
        self.refuse_session(id, &refusal);
    }

    /// Answers and refusals given so far, all sessions: whether a frame was answered shows by it.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.answers
    }

    /// A frame arrived. `grant` is the verdict on its capability, where it is a START.
    pub fn handle_frame(&mut self, id: SessionId, frame: Frame, grant: Option<Result<Grant, Refusal>>, clock: Clock) {
        let about = Frame { payload: Bytes::new(), cap: Bytes::new(), ..frame.clone() };
        let Some(event) = self.judge(id, frame, &about, clock) else { return };
        match event {
            Event::Nothing => self.count_useless(id),
            Event::Ping(ping) => {
                self.count_useless(id);
                // A copy: a slice of what was read would keep all of it while it waits.
                let pong = Frame::response(&ping, 200, true, Bytes::copy_from_slice(&ping.payload));
                self.push(id, Class::Control, pong);
            }
            Event::Hello(frame, hello) => self.welcome(id, &frame, hello, clock),
            Event::Welcomed(reply) => self.welcomed(id, reply, clock),
            Event::TurnedAway => self.drop_session(id, None),
            Event::Start(start) => self.start(id, &start, grant, clock),
            Event::Request(frame) => self.request(id, frame, clock),
            Event::Ended(frame) => {
                self.count_useless(id);
                self.end(id, &frame);
            }
            Event::Answer(frame) => {
                self.count_useless(id);
                self.answered(id, &frame, clock);
            }
        }
        self.acknowledge(id, &about);
        self.settle_budget(id, clock.now);
    }

    /// What a frame asks for where it is legal; else it is refused, and that is all.
    fn judge(&mut self, id: SessionId, frame: Frame, about: &Frame, clock: Clock) -> Option<Event> {
        let entry = self.sessions.get_mut(&id).filter(|entry| !entry.closing)?;
        let was = entry.session.state();
        match entry.session.handle_frame(frame, clock.now) {
            Ok(event) => Some(event),
            Err(refusal) => {
                // A START is answered with END, but not where that would end another stream.
                let fresh = entry.session.stream(about.corr_id).is_none();
                self.refuse(id, about, &refusal, fresh && about.flags.has(Flags::START));
                if was == State::Handshake {
                    self.close_when_sent(id);
                }
                self.settle_budget(id, clock.now);
                None
            }
        }
    }

    fn welcome(&mut self, id: SessionId, frame: &Frame, hello: Hello, clock: Clock) {
        if let Some(refusal) = self.sessions.get(&id).and_then(|entry| entry.turned_away.clone()) {
            self.refuse(id, frame, &refusal, true);
            self.close_when_sent(id);
            return;
        }
        let reply =
            HelloReply::of(self.hello.clone(), self.config.overlay.per_peer_inflight).over(&self.config.accepts());
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let answer = entry.session.answer_hello(frame, &reply);
        self.push(id, Class::Control, answer);
        self.outputs.push_back(Output::Opened(id));
        self.reschedule(id);
        self.meet(id, hello.daemon, clock);
    }

    fn welcomed(&mut self, id: SessionId, reply: HelloReply, clock: Clock) {
        self.outputs.push_back(Output::Opened(id));
        self.reschedule(id);
        self.meet(id, reply.daemon, clock);
    }

    /// The writer of a session sent all that it was given.
    pub fn handle_sent(&mut self, id: SessionId, now: Millis) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        entry.writer_idle = true;
        entry.writing = 0;
        entry.settle(&mut self.memory);
        entry.session.handle_sent(now);
        self.tell_gaps(id);
        self.tell_ends(id);
        self.mark_sendable(id);
        self.close_if_sent(id);
    }

    /// The next batch for a writer that waits: frames in order, at most [`BATCH_BYTES`].
    pub fn poll_transmit(&mut self, now: Millis) -> Option<(SessionId, Vec<Frame>)> {
        let others = self.others();
        while let Some(id) = self.sendable.pop_front() {
            let Some(entry) = self.sessions.get_mut(&id) else { continue };
            entry.sendable = false;
            // Used up: what is queued leaves in small pieces, never stops.
            let ample = self.memory.has_room(others, WRITE_BYTES as u64, 100);
            let batch = entry.lanes.take(if ample { BATCH_BYTES } else { LEAN_BATCH_BYTES }, now);
            if batch.is_empty() {
                if let Some(at) = entry.lanes.poll_timeout(now) {
                    self.deadlines.insert((at, id));
                }
                continue;
            }
            entry.hand_over(&batch);
            entry.settle(&mut self.memory);
            let answers = batch.iter().filter(|frame| counts_as_answer(frame)).count();
            let answers = u32::try_from(answers).unwrap_or(u32::MAX);
            entry.quota.leave(answers);
            self.quota.leave(answers);
            return Some((id, batch));
        }
        None
    }

    /// Something for the shell to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// A deadline passed.
    pub fn handle_timeout(&mut self, clock: Clock) {
        let now = clock.now;
        while let Some((at, id)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop_first();
            self.session_timeout(id, clock);
        }
        if now >= self.housekeeping_at {
            self.housekeeping_at = now.after(HOUSEKEEPING_MS);
            self.refuse_stalled_uploads(now);
            self.back_off_under_pressure(now);
            self.close_idle_under_pressure(now);
            self.close_leaving(now);
            self.renew_again(now);
        }
        self.end_expired(clock);
        let (mut wire, engine) = self.wire();
        engine.handle_timeout(now, &mut wire);
    }

    fn session_timeout(&mut self, id: SessionId, clock: Clock) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        match entry.session.handle_timeout(clock.now) {
            Err(reason) => {
                entry.closing = true;
                self.outputs.push_back(Output::Rejected(reason));
                self.outputs.push_back(Output::Close(id));
                return;
            }
            Ok(Tick::Ping(frame)) => self.push(id, Class::Control, frame),
            Ok(Tick::Resume) => {
                self.open_gossip(id);
                self.renew_gossip(id);
            }
            Ok(Tick::Spent) => return self.close_when_sent(id), // and no deadline any more
            Ok(Tick::Nothing) => {}
        }
        self.mark_sendable(id);
        self.reschedule(id);
    }

    /// When [`Self::handle_timeout`] has something to do next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Millis> {
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        [deadline, self.leases.poll_timeout(), self.engine.poll_timeout(), Some(self.housekeeping_at)]
            .into_iter()
            .flatten()
            .min()
    }

    /// SIGTERM, after the delay: no new sessions, no new writes, and subscribers are told once
    /// they have what was accepted for them.
    pub fn handle_drain(&mut self) {
        self.draining = true;
        self.end_subscriptions();
    }

    /// While it drains: whether every queue is empty, every writer waits, and every message that
    /// was accepted here is with a peer, where there is one to have it. What is not is queued.
    pub fn poll_drained(&mut self, now: Millis) -> bool {
        let (mut wire, engine) = self.wire();
        let spread = engine.poll_spread(now, &mut wire);
        let sent = |entry: &Entry| entry.lanes.is_empty() && entry.writer_idle && entry.ends.is_empty();
        spread && self.sessions.values().map(Box::as_ref).all(sent)
    }

    /// Whether no session is left.
    #[must_use]
    pub fn is_deserted(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Drained, or out of time: every session ends, once its writer has sent what it has.
    pub fn handle_finish(&mut self) {
        self.outputs.extend(self.sessions.keys().map(|id| Output::Close(*id)));
        self.sessions.values_mut().for_each(|entry| entry.closing = true);
    }

    /// Whether the drain began.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// What gossip did so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.engine.counts()
    }

    /// How full what writes wait for is, 0 to 100: requests in flight, or the lanes of every
    /// link. Not the fullest lane: one slow peer is its own matter, as long as another takes what
    /// is pushed, and a slow subscriber is told of a Gap; either could otherwise have everybody's
    /// writes refused by not reading.
    #[must_use]
    pub fn pressure(&self) -> u8 {
        let lanes = self.links.values().filter_map(|id| self.sessions.get(id)).map(|entry| entry.lanes.percent()).min();
        self.quota.percent().max(lanes.unwrap_or(0))
    }

    /// How much of the memory budget is used, 0 to 100: see [`crate::memory`].
    #[must_use]
    pub fn memory_percent(&self) -> u8 {
        self.memory.percent(self.others())
    }

    /// Bytes of the memory budget that are used.
    #[must_use]
    pub fn memory_used(&self) -> u64 {
        self.memory.used() + self.others()
    }

    /// What is used by others than sessions: messages, and readers.
    fn others(&self) -> u64 {
        self.engine.memory().saturating_add(self.reading)
    }

    fn reschedule(&mut self, id: SessionId) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        if let Some(old) = entry.deadline.take() {
            self.deadlines.remove(&(old, id));
        }
        entry.deadline = entry.session.poll_timeout();
        self.deadlines.extend(entry.deadline.map(|at| (at, id)));
    }

    /// Queues a frame; a session whose control lane is full does not read its answers, and
    /// is closed. Full is also what holds more than [memory takes](Self::takes_unread).
    fn push(&mut self, id: SessionId, class: Class, frame: Frame) {
        let fits = self.takes_unread(id, FRAME_BYTES + frame.payload.len() as u64);
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let counted = counts_as_answer(&frame);
        self.answers += u64::from(frame.flags.has(Flags::RESP) && frame.code != pace::PARTIAL);
        if !fits || entry.lanes.push(class, frame).is_err() {
            if !entry.closing {
                entry.closing = true;
                self.outputs.push_back(Output::Rejected(Reason::Overflow));
                self.outputs.push_back(Output::Close(id));
            }
            return;
        }
        entry.settle(&mut self.memory);
        if counted {
            entry.quota.enter();
            self.quota.enter();
        }
        self.mark_sendable(id);
    }

    fn mark_sendable(&mut self, id: SessionId) {
        let (mut wire, _) = self.wire();
        wire.mark(id);
    }

    /// Answers with a refusal. `end` closes the stream.
    fn refuse(&mut self, id: SessionId, to: &Frame, refusal: &Refusal, end: bool) {
        let frames = if to.flags.has(Flags::START) { FRAMES_PER_START } else { 1 };
        (0..frames).for_each(|_| self.count_useless(id));
        self.outputs.push_back(Output::Rejected(refusal.status.reason()));
        let frame = Frame::response(to, refusal.status.code(), end, refusal.body(to.corr_id));
        self.push(id, Class::Control, frame);
    }

    /// Refuses the session itself: it is told why, then closed.
    fn refuse_session(&mut self, id: SessionId, refusal: &Refusal) {
        let code = refusal.status.code();
        let tenant = crate::identity::TenantId(0);
        let end = Frame::new(Flags::RESP | Flags::END, AppProto::CONTROL, tenant, 0, refusal.body(0));
        self.outputs.push_back(Output::Rejected(refusal.status.reason()));
        self.push(id, Class::Control, Frame { code, ..end });
        self.close_when_sent(id);
    }

    fn close_when_sent(&mut self, id: SessionId) {
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.closing = true;
            // A flood would be read, and every frame looked at, for as long as it is not closed.
            self.outputs.push_back(Output::Pause(id, Millis::NEVER));
        }
        self.close_if_sent(id);
    }

    fn close_if_sent(&mut self, id: SessionId) {
        if self.sessions.get(&id).is_some_and(|entry| entry.closing && entry.writer_idle && entry.lanes.is_empty()) {
            self.outputs.push_back(Output::Close(id));
        }
    }
}

/// Whether a queued frame answers a request that was taken, which is in flight until the writer
/// has it. A refused one never was, and an END is not asked a place for: whoever sends many and reads
/// nothing takes no place from others, and ends by its full lane. An acknowledgement answers nothing.
fn counts_as_answer(frame: &Frame) -> bool {
    let taken = frame.code < Status::BadRequest.code() && frame.code != pace::PARTIAL;
    frame.flags.has(Flags::RESP) && !frame.flags.has(Flags::END) && frame.app != AppProto::CONTROL && taken
}

#[cfg(test)]
mod tests;
