//! Two sessions joined, and any sequence of what their owners may do, of what else may come by the
//! wire, and of time passing. It keeps each side's rules the way `node` does.

use std::collections::VecDeque;

use bytes::Bytes;
use overlay_core::Millis;
use overlay_core::control::{DaemonHello, Hello, HelloReply, Incarnation};
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::TenantId;
use overlay_core::session::{Event, MAX_STREAMS, Role, Session, State, Tick, Timers};
use overlay_core::status::{Refusal, Status};

/// Each two bytes are one step: what is done, and to which of what there is.
pub fn streams(data: &[u8]) {
    let mut pair = Pair::new();
    for step in data.chunks_exact(2) {
        pair.step(step[0], step[1]);
    }
    pair.settle();
}

struct Pair {
    now: Millis,
    sides: [Side; 2],
}

struct Side {
    session: Session<()>,
    /// Frames on their way to this side.
    wire: VecDeque<Frame>,
    /// A frame that nobody sent came by the wire: what the other side sends may be illegal now.
    disturbed: bool,
}

const TIMERS: Timers = Timers { handshake_ends: Millis(3_000), idle_ms: 15_000 };

impl Pair {
    fn new() -> Self {
        let side =
            |role| Side { session: Session::new(role, TIMERS, Millis(0)), wire: VecDeque::new(), disturbed: false };
        let mut pair = Self { now: Millis(0), sides: [side(Role::Dialler), side(Role::Acceptor)] };
        for from in [1, 0] {
            if let Some(hello) = pair.sides[from].session.handle_connected(&Hello::default(), Millis(0)) {
                pair.sides[1 - from].wire.push_back(hello);
            }
        }
        pair
    }

    fn step(&mut self, what: u8, which: u8) {
        let side = usize::from(what & 1);
        match what >> 1 & 0x0f {
            0..=3 => self.deliver(side),
            4 | 5 => self.open(side, which),
            6 => self.send(side, which, Flags::REQ),
            7 => self.send(side, which, Flags::REQ | Flags::END),
            8 => self.answer(side, which, false),
            9 => self.answer(side, which, true),
            10 => self.disturb(side, what, which),
            11 => self.sides[side].session.back_off(u64::from(which) * 10, self.now),
            12 => self.pass(u64::from(which) * 100),
            13 => self.timeout(side),
            14 if which == 0xff => self.close(side),
            _ => self.repeat(side, which),
        }
    }

    /// The owner opens a stream, as it may in Active.
    fn open(&mut self, side: usize, which: u8) {
        if self.sides[side].session.state() != State::Active {
            return;
        }
        let app = [AppProto::PUBSUB, AppProto::GOSSIP, AppProto::ADMIN][usize::from(which % 3)];
        let tenant = TenantId(u128::from(which & 1));
        let start = self.sides[side].session.open_ours(app, tenant, Bytes::new(), Bytes::new(), ());
        self.sides[1 - side].wire.extend(start);
    }

    /// One of the streams of this side, its own or the other's.
    fn pick(&self, side: usize, which: u8, ours: bool) -> Option<Frame> {
        let mut streams = self.sides[side].session.streams().filter(|(_, stream)| stream.ours == ours);
        let (corr_id, stream) = streams.nth(usize::from(which))?;
        Some(Frame::new(Flags::REQ, stream.app, stream.tenant, corr_id, Bytes::new()))
    }

    fn send(&mut self, side: usize, which: u8, flags: Flags) {
        if let Some(frame) = self.pick(side, which, true) {
            self.sides[1 - side].wire.push_back(Frame { flags, ..frame });
        }
    }

    fn answer(&mut self, side: usize, which: u8, end: bool) {
        if let Some(frame) = self.pick(side, which, false) {
            if end {
                assert!(self.sides[side].session.close_stream(frame.corr_id).is_some());
            }
            self.sides[1 - side].wire.push_back(Frame::response(&frame, 200, end, Bytes::new()));
        }
    }

    /// Anything may come.
    fn disturb(&mut self, side: usize, what: u8, which: u8) {
        let app = AppProto(u16::from(what >> 5));
        let tenant = TenantId(u128::from(which & 1));
        let code = if which & 2 == 0 { 0 } else { 200 + u16::from(which >> 2) * 10 };
        let frame = Frame::new(Flags::from_bits(which.into()), app, tenant, u64::from(which % 13), Bytes::new());
        self.sides[side].disturbed = true;
        self.sides[side].wire.push_back(Frame { code, ..frame });
    }

    /// A frame on its way comes once more.
    fn repeat(&mut self, side: usize, which: u8) {
        let wire = &mut self.sides[side].wire;
        if let Some(frame) = wire.get(usize::from(which)).cloned() {
            wire.push_back(frame);
            self.sides[side].disturbed = true;
        }
    }

    fn pass(&mut self, ms: u64) {
        self.now = self.now.after(ms);
        self.timeout(0);
        self.timeout(1);
    }

    fn timeout(&mut self, side: usize) {
        let (now, session) = (self.now, &mut self.sides[side].session);
        match session.handle_timeout(now) {
            Ok(Tick::Nothing) => assert!(session.poll_timeout().is_none_or(|at| at > now), "it would spin"),
            Ok(Tick::Ping(ping)) => self.sides[1 - side].wire.push_back(ping),
            Ok(Tick::Resume) => assert_eq!(session.state(), State::Active),
            Ok(Tick::Spent) | Err(_) => self.close(side),
        }
    }

    fn close(&mut self, side: usize) {
        let session = &mut self.sides[side].session;
        session.close();
        assert!(session.state() == State::Closed && session.streams().next().is_none());
        assert_eq!(session.poll_timeout(), None);
    }

    fn deliver(&mut self, side: usize) {
        let Some(frame) = self.sides[side].wire.pop_front() else { return };
        let sent = frame.clone();
        let receiver = &mut self.sides[side];
        let before = (receiver.session.state(), receiver.ids());
        match receiver.session.handle_frame(frame, self.now) {
            Ok(event) => self.handle(side, event),
            Err(refusal) => {
                assert_eq!((receiver.session.state(), receiver.ids()), before, "a refusal changes nothing");
                self.refuse(side, &sent, &refusal);
            }
        }
        let theirs = self.sides[side].session.streams().filter(|(_, stream)| !stream.ours).count();
        assert!(theirs <= MAX_STREAMS);
    }

    /// What `node` does on a refusal.
    fn refuse(&mut self, side: usize, frame: &Frame, refusal: &Refusal) {
        let undisturbed = self.sides.iter().all(|side| !side.disturbed);
        match self.sides[side].session.state() {
            State::Active | State::Backoff => {
                assert!(!undisturbed || refusal.status == Status::QuotaExhausted, "{refusal:?} to {frame:?}");
                let answer = Frame::response(frame, refusal.status.code(), true, refusal.body(frame.corr_id));
                self.sides[1 - side].wire.push_back(answer);
            }
            State::Idle | State::Handshake => {
                assert!(!undisturbed, "{refusal:?} to {frame:?}");
                self.close(side);
            }
            State::Closed => {}
        }
    }

    fn handle(&mut self, side: usize, event: Event) {
        let (receiver, other) = (side, 1 - side);
        let session = &mut self.sides[receiver].session;
        let answer = match event {
            Event::Hello(frame, _) => {
                let daemon = DaemonHello { name: "a".to_owned(), incarnation: Incarnation(1) };
                Some(session.answer_hello(&frame, &HelloReply::of(daemon, 32)))
            }
            Event::Ping(frame) => Some(Frame::response(&frame, 200, false, frame.payload.clone())),
            Event::Start(frame) => {
                session.open_theirs(&frame, ());
                assert!(session.stream(frame.corr_id).is_some());
                Some(Frame::response(&frame, 200, false, Bytes::new()))
            }
            Event::Ended(frame) => {
                session.close_stream(frame.corr_id);
                Some(Frame::response(&frame, 200, true, Bytes::new()))
            }
            Event::Answer(frame) => {
                if frame.flags.has(Flags::END) {
                    session.close_stream(frame.corr_id);
                }
                None
            }
            Event::Request(frame) => {
                assert!(session.stream(frame.corr_id).is_some_and(|stream| !stream.ours));
                None
            }
            Event::Welcomed(_) => {
                assert_eq!(session.state(), State::Active);
                None
            }
            Event::TurnedAway => {
                session.close();
                None
            }
            Event::Nothing => None,
        };
        self.sides[other].wire.extend(answer);
    }

    /// Nothing more is done: all that is under way arrives, and a session that nobody speaks on
    /// comes to its end.
    fn settle(&mut self) {
        let mut most = 4 * self.sides.iter().map(|side| side.wire.len() + 2).sum::<usize>();
        while self.sides.iter().any(|side| !side.wire.is_empty()) {
            self.deliver(0);
            self.deliver(1);
            most = most.saturating_sub(1);
            assert!(most > 0, "the two answer one another for ever");
        }
        for side in 0..2 {
            self.now = self.now.after(TIMERS.idle_ms);
            self.sides[1 - side].wire.clear();
            // At most resuming and a ping come before the end.
            for _ in 0..4 {
                let at = self.sides[side].session.poll_timeout();
                self.now = self.now.max(at.unwrap_or_default());
                self.timeout(side);
            }
            assert_eq!(self.sides[side].session.state(), State::Closed);
        }
    }
}

impl Side {
    fn ids(&self) -> Vec<u64> {
        self.session.streams().map(|(corr_id, _)| corr_id).collect()
    }
}
