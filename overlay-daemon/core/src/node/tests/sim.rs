//! The simulator: nodes, clients and wires. Frames travel one millisecond.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::config::{FORMAT, KeyExchange, Peer, Profile, Tls, Token, Transport};
use crate::control::{Open, json};
use crate::grant::{Action, Claims, LOCAL_HOLDER, SignedBy, TokenKey};
use crate::identity::TenantId;

pub(super) const TOPIC: &str = "news";
pub(super) const UNIX_MS: u64 = 1_700_000_000_000;
pub(super) const SIGNED_BY: SignedBy = SignedBy { key: TokenKey([7; 32]), generation: 1 };

/// Where one end of a wire is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct End {
    node: usize,
    session: SessionId,
}

pub(super) struct Sim {
    pub(super) nodes: Vec<Node>,
    now: u64,
    next: u64,
    wires: BTreeMap<End, End>,
    in_flight: Vec<(u64, End, Frame)>,
    clients: BTreeMap<End, Vec<Frame>>,
    stalled: BTreeSet<End>,
    /// Refused and not closed yet.
    ending: BTreeSet<End>,
    /// The other end does not hear of a close: what it sends goes nowhere.
    pub(super) half_open: bool,
    black: BTreeSet<usize>,
    /// Until when a session is not read.
    paused: BTreeMap<End, Millis>,
    rejected: BTreeMap<(usize, Reason), u64>,
    /// Peers' tokens do not verify.
    pub(super) refuse_starts: bool,
    /// What the system's clock says when a simulation begins; a test steps it.
    pub(super) unix_zero: u64,
    /// When tokens of peers expire, seconds since 1970.
    pub(super) peers_expire: u64,
}

pub(super) fn identity(node: usize) -> SpiffeId {
    format!("spiffe://example.org/ns/a/overlaynode/mesh/pod/node-{node}").parse().unwrap()
}

impl Sim {
    pub(super) fn new(nodes: usize) -> Self {
        Self::with(nodes, |_| {})
    }

    pub(super) fn with(count: usize, change: impl Fn(&mut DaemonConfig)) -> Self {
        let nodes = (0..count).map(|n| {
            let any = "127.0.0.1:1".parse().unwrap();
            let tls = Tls {
                certificate: "c".into(),
                key: "k".into(),
                ca: "a".into(),
                key_exchange: KeyExchange::RequireHybrid,
            };
            let token = Token { keys: "k".into(), file: "t".into() };
            let mut config = DaemonConfig::with_defaults(Profile::Micronode, any, any, tls, token, "s".into());
            change(&mut config);
            let others = (0..count).filter(|other| *other != n || count == 1);
            let peers = others
                .map(|p| Peer {
                    name: format!("node-{p}"),
                    address: "x:1".into(),
                    identity: identity(p),
                    transport: Transport::Tcp,
                })
                .collect();
            let peers = PeersConfig { format: FORMAT, name: format!("node-{n}"), peers };
            Node::new(config, &peers, identity(n), Incarnation(n as u64 + 1), Millis(0))
        });
        Self {
            nodes: nodes.collect(),
            now: 0,
            next: 1,
            wires: BTreeMap::new(),
            in_flight: Vec::new(),
            clients: BTreeMap::new(),
            stalled: BTreeSet::new(),
            ending: BTreeSet::new(),
            half_open: false,
            black: BTreeSet::new(),
            paused: BTreeMap::new(),
            rejected: BTreeMap::new(),
            refuse_starts: false,
            unix_zero: UNIX_MS,
            peers_expire: u64::MAX / 1000,
        }
    }

    /// Changes the configuration of every daemon, as a reload does.
    pub(super) fn configure(&mut self, change: impl Fn(&mut DaemonConfig)) {
        for node in &mut self.nodes {
            let mut config = node.config.clone();
            change(&mut config);
            node.handle_config(&config, Millis(self.now));
        }
    }

    pub(super) fn clock(&self) -> Clock {
        Clock { now: Millis(self.now), unix_ms: self.unix_zero + self.now }
    }

    /// Whether a node that drains has nothing left.
    pub(super) fn drained(&mut self, node: usize) -> bool {
        let now = self.clock().now;
        self.nodes[node].poll_drained(now)
    }

    fn end(&mut self, node: usize) -> End {
        self.next += 1;
        End { node, session: SessionId(self.next) }
    }

    pub(super) fn full_mesh(&mut self) {
        for a in 0..self.nodes.len() {
            (a + 1..self.nodes.len()).for_each(|b| self.dial(a, b));
        }
        self.run(200);
    }

    pub(super) fn dial(&mut self, from: usize, to: usize) {
        let (a, b) = (self.end(from), self.end(to));
        self.wires.insert(a, b);
        self.wires.insert(b, a);
        let place =
            self.nodes[from].places.iter().find(|(_, peer)| peer.identity == identity(to)).map(|(place, _)| place);
        let handshake_ends = self.clock().now.after(3_000);
        let opening = |of, dialled| Opening {
            holder: Holder::Certificate(identity(of)),
            dialled,
            transport: Some(Transport::Quic),
            group: "hybrid",
            handshake_ends,
        };
        let now = self.clock().now;
        assert!(self.nodes[to].handle_open(b.session, opening(from, None), now));
        assert!(self.nodes[from].handle_open(a.session, opening(to, place), now));
    }

    /// Breaks every session between two nodes; what was under way is lost.
    pub(super) fn cut(&mut self, a: usize, b: usize) {
        let between = |x: &End, y: &End| (x.node, y.node) == (a, b) || (x.node, y.node) == (b, a);
        let ends: Vec<End> = self.wires.iter().filter(|(x, y)| between(x, y)).map(|(x, _)| *x).collect();
        ends.into_iter().for_each(|end| self.close(end));
    }

    /// From now on nothing passes between two nodes, and neither is told.
    pub(super) fn blackhole(&mut self, a: usize, b: usize) {
        self.black.extend([a, b]);
    }

    fn close(&mut self, end: End) {
        if let Some(other) = self.close_one(end) {
            self.close(other);
        }
    }

    /// Closes one end, and tells which the other is.
    fn close_one(&mut self, end: End) -> Option<End> {
        self.nodes[end.node].handle_closed(end.session);
        self.in_flight.retain(|(_, to, _)| *to != end);
        self.ending.remove(&end);
        self.wires.remove(&end)
    }

    /// A client closes its connection.
    pub(super) fn leave(&mut self, node: usize, client: SessionId) {
        self.close(End { node, session: client });
    }

    /// Something comes by a session that is no frame: it is told so, and closes.
    pub(super) fn refuse(&mut self, node: usize, session: SessionId, status: Status) {
        if self.nodes[node].sessions.contains_key(&session) {
            self.ending.insert(End { node, session });
            self.nodes[node].handle_framing_error(session, status);
        }
    }

    /// Sessions that were refused, have not closed, and are read at their other end.
    pub(super) fn unclosed(&self) -> usize {
        self.ending.difference(&self.stalled).count()
    }

    /// A client on the Unix socket, its HELLO answered.
    pub(super) fn client(&mut self, node: usize) -> SessionId {
        self.client_as(node, Holder::Local, &Hello::default())
    }

    /// Whoever dials as `holder` and greets with `hello`: what it is sent is kept, and nothing
    /// is done about it.
    pub(super) fn client_as(&mut self, node: usize, holder: Holder, hello: &Hello) -> SessionId {
        let end = self.end(node);
        self.clients.insert(end, Vec::new());
        let handshake_ends = self.clock().now.after(3_000);
        let opening = Opening { holder, dialled: None, transport: None, group: "none", handshake_ends };
        let now = self.clock().now;
        assert!(self.nodes[node].handle_open(end.session, opening, now));
        let hello = Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 1, json(hello));
        self.client_sends(node, end.session, hello);
        end.session
    }

    pub(super) fn grant(&self) -> Grant {
        self.granted(SIGNED_BY, |_| {})
    }

    /// A grant for the local client, of a token that differs in something.
    pub(super) fn granted(&self, signed_by: SignedBy, change: impl Fn(&mut Claims)) -> Grant {
        let mut claims = self.claims();
        change(&mut claims);
        Grant::new(claims, signed_by, &identity(0).without_pod(), &Holder::Local, UNIX_MS).unwrap()
    }

    /// Of a token for the local client.
    pub(super) fn claims(&self) -> Claims {
        Claims {
            aud: identity(0).without_pod(),
            sub: LOCAL_HOLDER.into(),
            tenants: vec![TenantId(0)],
            topics: vec![TOPIC.into()],
            actions: vec![Action::Publish, Action::Subscribe, Action::Admin],
            nbf: 0,
            exp: u64::MAX / 1000,
        }
    }

    fn opened(&mut self, node: usize, open: &Open) -> SessionId {
        self.opened_by(node, open, self.grant())
    }

    /// A client with a stream by this grant; its HELLO's answer is out of the way.
    pub(super) fn opened_by(&mut self, node: usize, open: &Open, grant: Grant) -> SessionId {
        let client = self.client(node);
        let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), 3, json(open));
        self.client_starts(node, client, start, Some(grant));
        self.run(5);
        self.clients.get_mut(&End { node, session: client }).unwrap().remove(0);
        client
    }

    /// A client with a subscription; its HELLO's answer is out of the way.
    pub(super) fn subscriber(&mut self, node: usize) -> SessionId {
        self.opened(node, &Open::Subscribe { topics: vec![TOPIC.parse().unwrap()] })
    }

    /// A client with a publish stream.
    pub(super) fn publisher(&mut self, node: usize) -> SessionId {
        self.opened(node, &Open::Publish { topic: TOPIC.parse().unwrap() })
    }

    pub(super) fn client_sends(&mut self, node: usize, client: SessionId, mut frame: Frame) {
        if frame.app == AppProto::PUBSUB {
            frame.corr_id = 3;
        }
        self.client_says(node, client, frame, None);
    }

    /// A frame as its reader hands it on.
    pub(super) fn client_says(&mut self, node: usize, client: SessionId, mut frame: Frame, grant: Option<Grant>) {
        let clock = self.clock();
        let node = &mut self.nodes[node];
        match crate::compress::receive(&mut frame, node.is_greeted(client), crate::compress::MAX_RATIO) {
            Ok(()) => node.handle_frame(client, frame, grant.map(Ok), clock),
            Err(refusal) => node.handle_unread(client, frame, &refusal, clock),
        }
    }

    /// Until when a session is not read.
    pub(super) fn paused(&self, node: usize, session: SessionId) -> Option<Millis> {
        self.paused.get(&End { node, session }).copied()
    }

    pub(super) fn client_starts(&mut self, node: usize, client: SessionId, frame: Frame, grant: Option<Grant>) {
        let clock = self.clock();
        self.nodes[node].handle_frame(client, frame, grant.map(Ok), clock);
    }

    /// What a client was sent so far.
    pub(super) fn client_frames(&self, node: usize, client: SessionId) -> Vec<Frame> {
        self.clients[&End { node, session: client }].clone()
    }

    /// A client that stops reading, or reads again.
    pub(super) fn stall(&mut self, node: usize, client: SessionId, stalled: bool) {
        let end = End { node, session: client };
        if stalled {
            self.stalled.insert(end);
        } else if self.stalled.remove(&end) {
            let now = self.clock().now;
            self.nodes[node].handle_sent(client, now);
        }
    }

    pub(super) fn rejected(&self, node: usize, reason: Reason) -> u64 {
        self.rejected.get(&(node, reason)).copied().unwrap_or(0)
    }

    /// [`Self::rejected`], once what was decided is carried out.
    pub(super) fn rejected_after(&mut self, node: usize, reason: Reason) -> u64 {
        let clock = self.clock();
        self.transmit(node, clock);
        self.rejected(node, reason)
    }

    /// Lets `ms` milliseconds pass.
    pub(super) fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now += 1;
            let clock = self.clock();
            let due: Vec<_> = self.in_flight.extract_if(.., |(at, ..)| *at <= clock.now.0).collect();
            for (_, to, frame) in due {
                let grant = frame.flags.has(Flags::START).then(|| match self.refuse_starts {
                    true => Err(Refusal::new(Status::Unauthorized, "the token's key is not known")),
                    false => Ok(self.peer_grant(to)),
                });
                self.nodes[to.node].handle_frame(to.session, frame, grant, clock);
            }
            for node in 0..self.nodes.len() {
                if self.nodes[node].poll_timeout().is_some_and(|at| at <= clock.now) {
                    self.nodes[node].handle_timeout(clock);
                }
                self.transmit(node, clock);
            }
        }
    }

    fn transmit(&mut self, node: usize, clock: Clock) {
        while let Some((session, frames)) = self.nodes[node].poll_transmit(clock.now) {
            let end = End { node, session };
            // A wire carries bytes: what arrives shares nothing with what was queued.
            let copy = |frame: Frame| Frame { payload: Bytes::copy_from_slice(&frame.payload), ..frame };
            let frames = frames.into_iter().map(copy);
            if let Some(received) = self.clients.get_mut(&end) {
                received.extend(frames);
            } else if let Some(to) =
                self.wires.get(&end).filter(|to| !(self.black.contains(&node) && self.black.contains(&to.node)))
            {
                self.in_flight.extend(frames.map(|frame| (clock.now.0 + 1, *to, frame)));
            }
            if !self.stalled.contains(&end) {
                self.nodes[node].handle_sent(session, clock.now);
            }
        }
        while let Some(output) = self.nodes[node].poll_output() {
            match output {
                Output::Close(session) if self.half_open => drop(self.close_one(End { node, session })),
                Output::Close(session) => self.close(End { node, session }),
                Output::Rejected(reason) => *self.rejected.entry((node, reason)).or_default() += 1,
                Output::Pause(session, until) => drop(self.paused.insert(End { node, session }, until)),
                Output::Peer { .. } | Output::Opened(_) => {}
            }
        }
    }

    fn peer_grant(&self, to: End) -> Grant {
        let node = identity(to.node).without_pod();
        let claims = Claims {
            aud: node.clone(),
            sub: node.to_string(),
            tenants: vec![TenantId(0)],
            topics: vec!["*".into()],
            actions: vec![Action::Publish],
            nbf: 0,
            exp: self.peers_expire,
        };
        Grant::new(claims, SIGNED_BY, &node, &Holder::Certificate(identity(to.node)), 0).unwrap()
    }
}
