//! The hub: one task that owns the core's `Node`. It feeds it what happens, carries out what
//! it decides, and never waits for a session: a writer gets a batch when it has said that it
//! is free, and a channel of one place is then always open.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use bytes::Bytes;
use overlay_core::Millis;
use overlay_core::config::{DaemonConfig, Places};
use overlay_core::control::{Open, parse};
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::gossip::Counts;
use overlay_core::grant::{Grant, TokenKey};
use overlay_core::node::{Node, Opening, Output, SessionId};
use overlay_core::readiness::Report;
use overlay_core::status::{Refusal, Status};
use prometheus::IntGauge;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::gate::Gate;
use crate::kms::KeyExchangeGroup;
use crate::metrics::{ActiveSession, Metrics, Route};
use crate::session::{ReadBytes, Reading};

/// Things that may wait for the hub. When it is full, readers wait and TCP pushes back.
pub const QUEUE: usize = 256;
/// Things handled before what they caused is sent: one write then carries all of it. While less
/// waits a turn is shorter, so that it only ever gathers what would have waited anyway.
const TURN: usize = QUEUE;
/// Room for at least so many sessions is kept when they are gone.
const KEPT_ROOM: usize = 256;
/// How often the hub says that it is alive.
const HEARTBEAT_MS: u64 = 200;

/// What a session's writer is given: frames to send in order.
pub type Batch = Vec<Frame>;

/// Where a writer that is free waits for its next batch. One for each batch: a channel that stays
/// has room for 32, some 1.3 KiB for every session at rest.
pub type Place = oneshot::Sender<Batch>;

/// What happened.
pub enum Input {
    /// A transport is up. Dropping its writer's place is how the hub closes it.
    Open {
        /// Its number, of no session before it.
        id: SessionId,
        /// What it is.
        opening: Opening,
        /// The key exchange; none on the Unix socket.
        group: Option<KeyExchangeGroup>,
        /// Where its writer waits.
        writer: Place,
        /// What the reader is told by.
        gate: Arc<Gate>,
    },
    /// A frame was read.
    Frame {
        /// From whom.
        id: SessionId,
        /// The frame.
        frame: Frame,
        /// The verdict on its capability, where it is a START.
        grant: Option<Result<Grant, Refusal>>,
        /// When its last byte was read.
        at: Instant,
        /// What it takes while it waits here.
        held: ReadBytes,
    },
    /// A frame was read whose payload could not be inflated, and is not there.
    Unread(SessionId, Frame, Refusal),
    /// What was read cannot be a frame.
    Broken(SessionId, Status),
    /// The connection is gone.
    Closed(SessionId),
    /// The keys changed: which set it is, whose tokens it believes, and the token for peers.
    Keys(u64, BTreeSet<TokenKey>, Bytes),
    /// The configuration changed, as far as it can while the daemon runs.
    Config(Box<DaemonConfig>),
    /// The configured peers changed.
    Peers(Peers),
    /// The drain began: no new sessions, no writes.
    Drain,
    /// The drain is over: every session ends.
    Finish,
}

/// The configured peers, and how the hub tells of each, by place.
#[derive(Clone, Default)]
pub struct Peers {
    /// Who they are.
    pub places: Places,
    /// Gauges of requests in flight: one a place, then everyone else's.
    pub inflight: Vec<IntGauge>,
    /// Whether each has a session.
    pub up: Vec<watch::Sender<bool>>,
}

/// What the hub says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heartbeat {
    /// When it last turned.
    pub at: Millis,
    /// See [`Node::pressure`].
    pub pressure: u8,
    /// Distinct daemons with an active session.
    pub peers: u32,
    /// See [`Node::memory_percent`].
    pub memory: u8,
    /// Draining, and nothing is queued anywhere.
    pub drained: bool,
    /// Draining, and no session is left.
    pub deserted: bool,
}

/// What readiness was judged to be, and whether writes are shed.
pub type Judged = (Report, bool);

struct Live {
    /// None while the writer has a batch to send.
    writer: Option<Place>,
    gate: Arc<Gate>,
    group: Option<KeyExchangeGroup>,
    counted: Option<ActiveSession>,
}

/// The hub, before it runs.
pub struct Hub {
    /// What it decides with.
    pub node: Node,
    /// The one clock.
    pub clock: Clock,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// What readers hold.
    pub reading: Reading,
    /// Whom the node knows, and how to tell of them.
    pub peers: Peers,
    /// What happens.
    pub inputs: mpsc::Receiver<Input>,
    /// Whose writer sent its batch, and where it waits for another. A way of its own: behind a flood
    /// of frames that fill the readers' it would come too late.
    pub sent: mpsc::Receiver<(SessionId, Place)>,
    /// What readiness was judged to be. A way of its own too: who fills the queue must not keep
    /// from the hub that it is to shed.
    pub judged: watch::Receiver<Judged>,
    /// That it is alive.
    pub heartbeat: watch::Sender<Heartbeat>,
}

impl Hub {
    /// Runs until `stop`, or until nobody is left to say anything.
    pub async fn run(self, stop: CancellationToken) {
        let Self { node, clock, metrics, reading, peers, mut inputs, mut sent, mut judged, heartbeat } = self;
        let mut turn =
            Turn { node, clock, metrics, reading, peers, heartbeat, live: HashMap::new(), counted: Counts::default() };
        loop {
            let beat = clock.now().after(HEARTBEAT_MS);
            let wake = turn.node.poll_timeout().map_or(beat, |at| at.min(beat));
            let input = tokio::select! {
                () = stop.cancelled() => return,
                Some((id, writer)) = sent.recv() => {
                    turn.sent(id, writer);
                    None
                }
                input = inputs.recv() => match input {
                    Some(input) => Some(input),
                    None => return,
                },
                () = sleep_until(clock.instant(wake)) => None,
            };
            turn.node.handle_reading(turn.reading.bytes());
            if judged.has_changed().unwrap_or(false) {
                let (report, shedding) = judged.borrow_and_update().clone();
                turn.node.handle_readiness(report, shedding);
            }
            if let Some(input) = input {
                turn.handle(input);
                for _ in 1..TURN {
                    let Ok(input) = inputs.try_recv() else { break };
                    turn.handle(input);
                }
            }
            while let Ok((id, writer)) = sent.try_recv() {
                turn.sent(id, writer);
            }
            turn.finish();
        }
    }
}

struct Turn {
    node: Node,
    clock: Clock,
    metrics: Arc<Metrics>,
    reading: Reading,
    peers: Peers,
    heartbeat: watch::Sender<Heartbeat>,
    live: HashMap<SessionId, Live>,
    counted: Counts,
}

impl Turn {
    fn handle(&mut self, input: Input) {
        match input {
            Input::Open { id, opening, group, writer, gate } => {
                // Known before the node decides: HELLO may go out at once.
                self.live.insert(id, Live { writer: Some(writer), gate, group, counted: None });
                if !self.node.handle_open(id, opening, self.clock.now())
                    && let Some(live) = self.forget(id)
                {
                    // What it still sends is thrown away, and not looked at.
                    live.gate.pause(Millis::NEVER);
                }
            }
            Input::Frame { id, frame, grant, at, held } => {
                let (route, answers) = (self.route(id, &frame), self.node.answers());
                self.node.handle_frame(id, frame, grant, self.clock.time());
                drop(held);
                self.greet(id);
                // A chunk that awaits others is no request.
                if let Some(route) = route.filter(|_| self.node.answers() != answers) {
                    self.metrics.latency(route).observe(at.elapsed().as_secs_f64());
                }
            }
            Input::Unread(id, frame, refusal) => self.node.handle_unread(id, frame, &refusal, self.clock.time()),
            Input::Broken(id, status) => self.node.handle_framing_error(id, status),
            Input::Closed(id) => {
                self.node.handle_closed(id);
                self.forget(id);
            }
            Input::Keys(generation, keys, token) => {
                self.node.handle_keys(generation, keys);
                self.node.handle_token(token);
            }
            Input::Config(config) => self.node.handle_config(&config, self.clock.now()),
            Input::Peers(peers) => {
                // What was decided is about the places as they were.
                self.carry_out_all();
                self.peers = peers;
                self.node.handle_peers(self.peers.places.clone(), self.clock.time());
                for (place, up) in self.peers.up.iter().enumerate() {
                    up.send_replace(self.node.is_up(place));
                }
            }
            Input::Drain => self.node.handle_drain(),
            Input::Finish => self.node.handle_finish(),
        }
    }

    /// Lets go of a session.
    fn forget(&mut self, id: SessionId) -> Option<Live> {
        let live = self.live.remove(&id);
        give_room_back(&mut self.live);
        live
    }

    /// Opens the gate of a session whose HELLO was just answered.
    fn greet(&mut self, id: SessionId) {
        if let Some(live) = self.live.get(&id).filter(|live| live.counted.is_none())
            && self.node.is_greeted(id)
        {
            live.gate.greet();
        }
    }

    fn sent(&mut self, id: SessionId, writer: Place) {
        // One that is closed by now is told so by the place that goes.
        let Some(live) = self.live.get_mut(&id) else { return };
        live.writer = Some(writer);
        self.node.handle_sent(id, self.clock.now());
    }

    /// What a request is for, as the latency histogram tells them apart.
    fn route(&self, id: SessionId, frame: &Frame) -> Option<Route> {
        if !frame.flags.has(Flags::REQ) {
            return None;
        }
        let (started, ended) = (frame.flags.has(Flags::START), frame.flags.has(Flags::END));
        match frame.app {
            AppProto::CONTROL if self.live.get(&id).is_some_and(|live| live.counted.is_none()) => Some(Route::Hello),
            AppProto::CONTROL => Some(Route::Ping),
            AppProto::PUBSUB if started => match parse(&frame.payload)? {
                Open::Subscribe { .. } => Some(Route::Subscribe),
                Open::Publish { .. } => Some(Route::Publish),
                Open::Renew { .. } => Some(Route::Renew),
                Open::Gossip {} | Open::Sessions {} => None,
            },
            AppProto::PUBSUB if !ended => Some(Route::Publish),
            AppProto::GOSSIP if started => Some(Route::Gossip),
            AppProto::ADMIN if started => Some(Route::Status),
            _ => None,
        }
    }

    /// Ends a turn: deadlines, then what goes out, then what is told.
    fn finish(&mut self) {
        let time = self.clock.time();
        if self.node.poll_timeout().is_some_and(|at| at <= time.now) {
            self.node.handle_timeout(time);
        }
        // Before what goes out: it may queue what no peer has yet.
        let drained = self.node.is_draining() && self.node.poll_drained(time.now);
        while let Some((id, batch)) = self.node.poll_transmit(time.now) {
            // The writer said that it is free, so there is a place. A writer that is gone is told
            // of by its session's end.
            if let Some(writer) = self.live.get_mut(&id).and_then(|live| live.writer.take()) {
                let _gone = writer.send(batch);
            }
        }
        self.carry_out_all();
        self.publish(time.now, drained);
    }

    fn carry_out_all(&mut self) {
        while let Some(output) = self.node.poll_output() {
            self.carry_out(output);
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Close(id) => {
                if let Some(live) = self.forget(id) {
                    live.gate.pause(Millis::NEVER);
                }
            }
            Output::Peer { peer, up } => {
                if let Some(sender) = self.peers.up.get(peer) {
                    sender.send_replace(up);
                }
            }
            Output::Rejected(reason) => self.metrics.rejected(reason).inc(),
            Output::Pause(id, until) => {
                if let Some(live) = self.live.get(&id) {
                    live.gate.pause(until);
                }
            }
            Output::Opened(id) => {
                if let Some(live) = self.live.get_mut(&id) {
                    live.counted = Some(self.metrics.session(live.group));
                }
            }
        }
    }

    fn publish(&mut self, now: Millis, drained: bool) {
        let counts = self.node.counts();
        self.metrics.gossip(self.counted, counts);
        self.counted = counts;
        let last = *self.heartbeat.borrow();
        let deserted = self.node.is_draining() && self.node.is_deserted();
        // Walking every session each turn would cost more than the turn: a heartbeat does.
        if now.since(last.at) < HEARTBEAT_MS / 2 && (drained, deserted) == (last.drained, last.deserted) {
            return;
        }
        for (gauge, value) in self.peers.inflight.iter().zip(self.node.inflight()) {
            gauge.set(i64::from(value));
        }
        self.metrics.memory(self.node.memory_used());
        self.heartbeat.send_replace(Heartbeat {
            at: now,
            pressure: self.node.pressure(),
            peers: self.node.peers_up(),
            memory: self.node.memory_percent(),
            drained,
            deserted,
        });
    }
}

/// Gives back what a table takes for many more than are in it. Seldom: it leaves room for twice what
/// is in it, so half of that has to go before it happens again.
fn give_room_back<K: Eq + Hash, V>(table: &mut HashMap<K, V>) {
    if table.capacity() > 4 * table.len().max(KEPT_ROOM) {
        table.shrink_to(2 * table.len().max(KEPT_ROOM));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// F1, M: the room that ten thousand sessions took goes with them, a few times and not at each.
    #[test]
    fn f1_a_table_gives_back_what_many_took() {
        let mut table: HashMap<_, _> = (0..10_000).map(|n| (n, ())).collect();
        let (mut room, mut times) = (table.capacity(), 0);
        for n in 0..10_000 {
            table.remove(&n);
            give_room_back(&mut table);
            times += usize::from(table.capacity() < room / 4 * 3);
            room = table.capacity();
            assert!(room <= 4 * table.len().max(KEPT_ROOM), "{room} for {}", table.len());
        }
        assert!((1..=5).contains(&times), "{times} times");
    }
}
