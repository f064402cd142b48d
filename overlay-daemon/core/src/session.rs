//! One session's state machine (C-3) and its table of streams. Decides which frames are
//! legal now; what a legal frame means is `node`'s. An illegal one changes nothing.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::Millis;
use crate::control::{Hello, HelloReply, json, parse};
use crate::frame::{AppProto, Flags, Frame};
use crate::identity::TenantId;
use crate::status::{Reason, Refusal, Status};

/// Streams that one side may have open in a session.
pub const MAX_STREAMS: usize = 256;
/// Bytes of a ping's payload.
pub const MAX_PING: usize = 64;

/// Where a session stands (C-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Connected, TLS not done.
    Idle,
    /// TLS done, HELLO not yet answered.
    Handshake,
    /// Streams may be opened.
    Active,
    /// The other side refused for now, or there is pressure here: nothing new is opened by this
    /// side until a delay is over. What is open goes on.
    Backoff,
    /// Over; nothing is accepted or sent any more.
    Closed,
}

impl State {
    /// The state's name in the report of sessions.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Handshake => "handshake",
            Self::Active => "active",
            Self::Backoff => "backoff",
            Self::Closed => "closed",
        }
    }
}

/// Which side opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// This one: it says HELLO, uses odd stream numbers and pings.
    Dialler,
    /// The other one.
    Acceptor,
}

/// Deadlines.
#[derive(Clone, Copy, Debug)]
pub struct Timers {
    /// Until when HELLO must be answered.
    pub handshake_ends: Millis,
    /// Milliseconds without a frame either way.
    pub idle_ms: u64,
}

/// A stream of a session, with what `node` keeps for it.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Stream<K> {
    /// The protocol it speaks.
    pub app: AppProto,
    /// Whose it is.
    pub tenant: TenantId,
    /// What it is for.
    pub kind: K,
    /// Whether this side opened it.
    pub ours: bool,
}

/// What a legal frame asks of `node`.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The dialler's HELLO; answer with [`Session::answer_hello`].
    Hello(Frame, Hello),
    /// The answer to ours: the session is Active.
    Welcomed(HelloReply),
    /// Ours was refused: the session is of no use.
    TurnedAway,
    /// Answer with the same payload.
    Ping(Frame),
    /// A stream is asked for; [`Session::open_theirs`] accepts it.
    Start(Frame),
    /// A frame of a stream that the other side opened.
    Request(Frame),
    /// It closed its side of such a stream; it is off the table.
    Ended(Frame),
    /// An answer on a stream of ours; with END, it is off the table.
    Answer(Frame),
    /// Nothing to do: a pong, or a late frame of a stream that has ended.
    Nothing,
}

/// A session over a connection whose bytes somebody else moves.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Session<K> {
    role: Role,
    state: State,
    timers: Timers,
    opened: Millis,
    heard: Millis,
    active: Millis,
    resume: Option<Millis>,
    /// Nothing once the last number was given out.
    next_ours: Option<u64>,
    last_theirs: u64,
    pinged: Option<Millis>,
    streams: BTreeMap<u64, Stream<K>>,
}

impl<K> Session<K> {
    /// A session in Idle.
    #[must_use]
    pub fn new(role: Role, timers: Timers, now: Millis) -> Self {
        Self {
            role,
            state: State::Idle,
            timers,
            opened: now,
            heard: now,
            active: now,
            resume: None,
            next_ours: Some(if role == Role::Dialler { 1 } else { 2 }),
            last_theirs: 0,
            pinged: None,
            streams: BTreeMap::new(),
        }
    }

    /// The transport is up and authenticated: Idle to Handshake. A dialler gets the HELLO to
    /// send.
    pub fn handle_connected(&mut self, hello: &Hello, now: Millis) -> Option<Frame> {
        if self.state != State::Idle {
            return None;
        }
        self.state = State::Handshake;
        self.active = now;
        if self.role == Role::Acceptor {
            return None;
        }
        let corr_id = self.next_corr()?;
        Some(Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), corr_id, json(hello)))
    }

    /// A frame arrived.
    ///
    /// # Errors
    /// It is illegal in this state: the refusal goes back on its stream, and where the state
    /// is not Active or Backoff the session closes after it.
    pub fn handle_frame(&mut self, frame: Frame, now: Millis) -> Result<Event, Refusal> {
        self.heard = now;
        self.active = now;
        match self.state {
            State::Idle | State::Closed => Err(Refusal::new(Status::BadRequest, "no frame is legal in this state")),
            State::Handshake => self.greeting(frame),
            State::Active | State::Backoff => self.frame(frame),
        }
    }

    fn greeting(&mut self, frame: Frame) -> Result<Event, Refusal> {
        const HELLO_FIRST: Refusal = Refusal::new(Status::BadRequest, "HELLO comes first");
        let control = frame.app == AppProto::CONTROL;
        let answers = frame.flags.without(Flags::END) == Flags::RESP;
        match self.role {
            Role::Acceptor if control && frame.flags == Flags::REQ => {
                let hello = parse(&frame.payload).ok_or(HELLO_FIRST)?;
                self.last_theirs = frame.corr_id;
                Ok(Event::Hello(frame, hello))
            }
            Role::Dialler if control && answers && frame.corr_id == 1 && frame.code == 200 => {
                let reply = parse(&frame.payload).ok_or(HELLO_FIRST)?;
                self.state = State::Active;
                Ok(Event::Welcomed(reply))
            }
            // A refusal is never answered by another: there is no place, or none for us.
            Role::Dialler if control && frame.flags.has(Flags::RESP) && frame.code >= Status::BadRequest.code() => {
                Ok(Event::TurnedAway)
            }
            Role::Acceptor | Role::Dialler => Err(HELLO_FIRST),
        }
    }

    /// Answers a HELLO: Handshake to Active.
    pub fn answer_hello(&mut self, hello: &Frame, reply: &HelloReply) -> Frame {
        self.state = State::Active;
        Frame::response(hello, 200, false, json(reply))
    }

    fn frame(&mut self, frame: Frame) -> Result<Event, Refusal> {
        let bad = |message| Err(Refusal::new(Status::BadRequest, message));
        let kinds = [Flags::REQ, Flags::RESP, Flags::EVENT].iter().filter(|kind| frame.flags.has(**kind)).count();
        if kinds != 1 {
            return bad("a frame is exactly one of REQ, RESP and EVENT");
        }
        if frame.flags.has(Flags::COMP) {
            return bad("only requests of a stream may be compressed"); // theirs are inflated by now
        }
        if frame.flags.has(Flags::ACK_REQ) && !frame.flags.has(Flags::REQ) {
            return bad("only requests of a stream may ask for an acknowledgement");
        }
        if frame.flags.has(Flags::START) && !frame.flags.has(Flags::REQ) {
            return bad("only a request opens a stream");
        }
        if frame.flags.has(Flags::EVENT) {
            return bad("no subscription asked for this event");
        }
        if frame.flags.has(Flags::RESP) {
            return self.answer(frame);
        }
        if frame.app == AppProto::CONTROL {
            let ping = frame.flags == Flags::REQ && frame.payload.len() <= MAX_PING;
            return if ping { Ok(Event::Ping(frame)) } else { bad("not a ping") };
        }
        if frame.flags.has(Flags::START) { self.start(frame) } else { self.request(frame) }
    }

    fn start(&mut self, frame: Frame) -> Result<Event, Refusal> {
        let bad = |message| Err(Refusal::new(Status::BadRequest, message));
        if !self.is_theirs(frame.corr_id) {
            return bad("corr_id is of the other side's numbers");
        }
        if frame.corr_id <= self.last_theirs {
            return bad("corr_id was used before");
        }
        if ![AppProto::PUBSUB, AppProto::GOSSIP, AppProto::ADMIN].contains(&frame.app) {
            return bad("no such app_proto_id");
        }
        self.last_theirs = frame.corr_id;
        if self.streams.values().filter(|stream| !stream.ours).count() >= MAX_STREAMS {
            return Err(Refusal::later(Status::QuotaExhausted, "too many streams", 1_000));
        }
        Ok(Event::Start(frame))
    }

    /// Whether `corr_id` is of the row that the other side opens streams by.
    fn is_theirs(&self, corr_id: u64) -> bool {
        corr_id != 0 && (corr_id % 2 == 1) == (self.role == Role::Acceptor)
    }

    fn request(&mut self, frame: Frame) -> Result<Event, Refusal> {
        let bad = |message| Err(Refusal::new(Status::BadRequest, message));
        let Some(stream) = self.streams.get(&frame.corr_id).filter(|stream| !stream.ours) else {
            // Sent before the refusal or the end of its stream was heard.
            return if self.is_theirs(frame.corr_id) && frame.corr_id <= self.last_theirs {
                Ok(Event::Nothing)
            } else {
                bad("the stream never started")
            };
        };
        if (stream.app, stream.tenant) != (frame.app, frame.tenant) {
            return bad("a stream keeps its START's app_proto_id and tenant_id");
        }
        Ok(if frame.flags.has(Flags::END) { Event::Ended(frame) } else { Event::Request(frame) })
    }

    fn answer(&mut self, frame: Frame) -> Result<Event, Refusal> {
        if frame.app == AppProto::CONTROL && self.pinged.is_some() {
            self.pinged = None;
            return Ok(Event::Nothing);
        }
        let of = (frame.app, frame.tenant);
        let ours =
            self.streams.get(&frame.corr_id).is_some_and(|stream| stream.ours && (stream.app, stream.tenant) == of);
        match (ours, frame.code) {
            (true, _) => Ok(Event::Answer(frame)),
            // A refusal is never answered by another, or two sides would do so for ever.
            (false, 400..) => Ok(Event::Nothing),
            (false, _) => Err(Refusal::new(Status::BadRequest, "nothing was asked on this stream")),
        }
    }

    /// Puts the stream of a START that was accepted on the table.
    pub fn open_theirs(&mut self, start: &Frame, kind: K) {
        self.streams.insert(start.corr_id, Stream { app: start.app, tenant: start.tenant, kind, ours: false });
    }

    /// Opens a stream of our own: the START to send. Nothing once every `corr_id` was used: the
    /// session is then to be closed, and another to be dialled.
    pub fn open_ours(&mut self, app: AppProto, tenant: TenantId, cap: Bytes, payload: Bytes, kind: K) -> Option<Frame> {
        let corr_id = self.next_corr()?;
        self.streams.insert(corr_id, Stream { app, tenant, kind, ours: true });
        Some(Frame { cap, ..Frame::new(Flags::REQ | Flags::START, app, tenant, corr_id, payload) })
    }

    /// The stream `corr_id`, as it is.
    #[must_use]
    pub fn stream(&self, corr_id: u64) -> Option<&Stream<K>> {
        self.streams.get(&corr_id)
    }

    /// The stream `corr_id`.
    pub fn stream_mut(&mut self, corr_id: u64) -> Option<&mut Stream<K>> {
        self.streams.get_mut(&corr_id)
    }

    /// Takes the stream `corr_id` off the table.
    pub fn close_stream(&mut self, corr_id: u64) -> Option<Stream<K>> {
        self.streams.remove(&corr_id)
    }

    /// Stream `from` goes on under the number of a START that was accepted.
    pub fn move_stream(&mut self, from: u64, to: u64) {
        if let Some(stream) = self.streams.remove(&from) {
            self.streams.insert(to, stream);
        }
    }

    /// Every open stream.
    pub fn streams(&self) -> impl Iterator<Item = (u64, &Stream<K>)> {
        self.streams.iter().map(|(corr_id, stream)| (*corr_id, stream))
    }

    /// Bytes left towards the other side.
    pub fn handle_sent(&mut self, now: Millis) {
        self.active = now;
    }

    /// The other side refused for now, or there is pressure here: Active to Backoff, for
    /// `delay_ms` at the least.
    pub fn back_off(&mut self, delay_ms: u64, now: Millis) {
        if matches!(self.state, State::Active | State::Backoff) {
            self.state = State::Backoff;
            self.resume = self.resume.max(Some(now.after(delay_ms)));
        }
    }

    /// Ends the session. Its streams go.
    pub fn close(&mut self) {
        self.state = State::Closed;
        self.streams.clear();
    }

    /// A deadline passed.
    ///
    /// # Errors
    /// The session is over, with this reason.
    pub fn handle_timeout(&mut self, now: Millis) -> Result<Tick, Reason> {
        let idle = self.timers.idle_ms;
        match self.state {
            State::Closed => return Ok(Tick::Nothing),
            State::Idle | State::Handshake if now >= self.timers.handshake_ends => {
                return Err(Reason::Timeout);
            }
            State::Idle | State::Handshake => return Ok(Tick::Nothing),
            State::Active | State::Backoff => {}
        }
        // Whatever else is heard answers a ping as well, and `poll_timeout` counts from the same.
        let unanswered = self.pinged.is_some_and(|at| now.since(at.max(self.heard)) >= idle);
        if unanswered || now.since(self.active) >= idle {
            return Err(Reason::Timeout);
        }
        if self.resume.is_some_and(|at| now >= at) {
            self.resume = None;
            self.state = State::Active;
            return Ok(Tick::Resume);
        }
        if self.role == Role::Dialler && self.pinged.is_none() && now.since(self.heard) >= idle / 3 {
            let Some(corr_id) = self.next_corr() else { return Ok(Tick::Spent) };
            self.pinged = Some(now);
            return Ok(Tick::Ping(Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), corr_id, Bytes::new())));
        }
        Ok(Tick::Nothing)
    }

    /// Another idle timeout from now on.
    pub fn set_idle(&mut self, idle_ms: u64) {
        self.timers.idle_ms = idle_ms;
    }

    /// When [`Self::handle_timeout`] has something to do next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Millis> {
        let idle = self.timers.idle_ms;
        match self.state {
            State::Closed => None,
            State::Idle | State::Handshake => Some(self.timers.handshake_ends),
            State::Active | State::Backoff => {
                let end = self.active.after(idle);
                let ping = match (self.role, self.pinged) {
                    (Role::Dialler, None) => Some(self.heard.after(idle / 3)),
                    (Role::Dialler, Some(at)) => Some(at.max(self.heard).after(idle)),
                    (Role::Acceptor, _) => None,
                };
                [Some(end), ping, self.resume].into_iter().flatten().min()
            }
        }
    }

    /// As if every number of our own before `next` had been used.
    #[cfg(test)]
    pub(crate) fn skip_to(&mut self, next: u64) {
        self.next_ours = Some(next);
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Which side opened it.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Milliseconds since it began, and since a frame went either way.
    #[must_use]
    pub fn ages(&self, now: Millis) -> (u64, u64) {
        (now.since(self.opened), now.since(self.active))
    }

    fn next_corr(&mut self) -> Option<u64> {
        let corr_id = self.next_ours?;
        self.next_ours = corr_id.checked_add(2);
        Some(corr_id)
    }
}

/// What a deadline that is not an end asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Tick {
    /// Nothing.
    Nothing,
    /// Send this.
    Ping(Frame),
    /// The delay is over: ask again.
    Resume,
    /// Every `corr_id` was used: close, in good order.
    Spent,
}

#[cfg(test)]
mod tests;
