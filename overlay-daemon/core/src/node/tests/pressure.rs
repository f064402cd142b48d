//! Memory, places and the drain: what happens when there is too much of everything.

use proptest::prelude::*;

use super::*;
use crate::config::Gossip;
use crate::frame::{CHUNK, MAX_BODY};
use crate::record::Piece;

const MIB: u64 = 1 << 20;

fn small_memory(config: &mut DaemonConfig) {
    config.overlay.memory_bytes = 8 * MIB;
    config.gossip = Gossip { store_bytes: 2 * MIB, ..config.gossip.clone() };
    config.overlay.per_peer_rps = 100_000;
    config.overlay.rps = 100_000;
    config.overlay.per_peer_inflight = 512;
}

fn codes(sim: &Sim, node: usize, client: SessionId) -> Vec<u16> {
    let answers = sim.client_frames(node, client);
    answers.iter().filter(|f| f.flags.has(Flags::RESP)).map(|f| f.code).collect()
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Publisher,
    Subscriber,
    Message(usize, usize),
    Begin(usize, u32),
    Piece(usize),
    End(usize),
    Stall(usize, bool),
    Run(u64),
    Close(usize),
    Reading(u64),
    Drain,
}

fn op() -> impl Strategy<Value = Op> {
    let who = || 0..8_usize;
    prop_oneof![
        2 => Just(Op::Publisher),
        3 => Just(Op::Subscriber),
        8 => (who(), 0..=CHUNK + 1).prop_map(|(who, size)| Op::Message(who, size)),
        4 => (who(), 0..=MAX_BODY as u32 + 1).prop_map(|(who, size)| Op::Begin(who, size)),
        8 => who().prop_map(Op::Piece),
        1 => who().prop_map(Op::End),
        4 => (who(), any::<bool>()).prop_map(|(who, stalled)| Op::Stall(who, stalled)),
        6 => prop_oneof![1..20_u64, 5_000..8_000_u64].prop_map(Op::Run),
        2 => who().prop_map(Op::Close),
        1 => any::<u32>().prop_map(|bytes| Op::Reading(bytes.into())),
        1 => Just(Op::Drain),
    ]
}

fn apply(sim: &mut Sim, clients: &mut Vec<SessionId>, op: Op) {
    let (tenant, hash) = (TenantId(0), [7; 32]);
    let at = |n: usize| clients.get(n % clients.len().max(1)).copied();
    match op {
        Op::Publisher if clients.len() < 8 => clients.push(sim.client(0)),
        Op::Subscriber if clients.len() < 8 => clients.push(sim.client(0)),
        Op::Publisher | Op::Subscriber => {}
        Op::Message(n, size) => {
            let Some(client) = at(n) else { return };
            publish(sim, 0, client, 1, &Publish::Message(vec![0; size].into()));
        }
        Op::Begin(n, size) => {
            let Some(client) = at(n) else { return };
            publish(sim, 0, client, 1, &Publish::Begin { size, hash });
        }
        Op::Piece(n) => {
            let Some(client) = at(n) else { return };
            publish(sim, 0, client, 1, &Publish::Piece(Piece { hash, index: 0, bytes: vec![0; CHUNK].into() }));
        }
        Op::End(n) => {
            let Some(client) = at(n) else { return };
            sim.client_sends(0, client, Frame::new(Flags::REQ | Flags::END, AppProto::PUBSUB, tenant, 3, Bytes::new()));
        }
        Op::Stall(n, stalled) => {
            let Some(client) = at(n) else { return };
            sim.stall(0, client, stalled);
        }
        Op::Run(ms) => sim.run(ms),
        Op::Close(n) => {
            let Some(client) = at(n) else { return };
            clients.retain(|other| *other != client);
            sim.nodes[0].handle_closed(client);
        }
        Op::Reading(bytes) => sim.nodes[0].handle_reading(bytes),
        Op::Drain => sim.nodes[0].handle_drain(),
    }
    // What they are is decided by their stream, opened once there is a session.
    if let (Op::Publisher | Op::Subscriber, Some(client)) = (op, clients.last().copied()) {
        let topic: crate::identity::Topic = TOPIC.parse().unwrap();
        let open = match op {
            Op::Publisher => Open::Publish { topic },
            _ => Open::Subscribe { topics: vec![topic] },
        };
        let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, tenant, 3, json(&open));
        let grant = sim.grant();
        sim.client_starts(0, client, start, Some(grant));
    }
}

/// What the account must say, counted anew.
fn counted(node: &Node) -> u64 {
    let uploads = |entry: &Entry| {
        let open = entry.session.streams().map(|(_, stream)| match &stream.kind {
            Kind::Publish { upload: entry::Upload::Open { size, .. }, .. } => u64::from(*size),
            _ => 0,
        });
        open.sum::<u64>()
    };
    let streams = |entry: &Entry| {
        let theirs = entry.session.streams().filter(|(_, stream)| !stream.ours);
        theirs.map(|(_, stream)| stream.kind.cost()).sum::<u64>()
    };
    let own = |entry: &Entry| {
        let queued = entry.buffers + entry.lanes.cost() + entry.writing;
        crate::memory::SESSION_BYTES + queued + uploads(entry) + streams(entry)
    };
    node.sessions.values().map(Box::as_ref).map(own).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// After any sequence of operations the account is what is held, and 0 once all is closed.
    #[test]
    fn m1_the_account_is_exact(ops in proptest::collection::vec(op(), 1..60)) {
        let mut sim = Sim::with(1, small_memory);
        let mut clients = Vec::new();
        for op in ops {
            apply(&mut sim, &mut clients, op);
            prop_assert_eq!(sim.nodes[0].memory.used(), counted(&sim.nodes[0]), "after {:?}", op);
        }
        let ids: Vec<SessionId> = sim.nodes[0].sessions.keys().copied().collect();
        ids.into_iter().for_each(|id| sim.nodes[0].handle_closed(id));
        prop_assert_eq!((sim.nodes[0].memory.used(), sim.nodes[0].turned_away), (0, 0));
        sim.nodes[0].handle_reading(0);
        sim.run(250_000);
        prop_assert_eq!(sim.nodes[0].memory_used(), 0, "and what was held for repair, and its ids, are let go");
    }
}

/// I-5, I-6: many who do not read, and payloads that never repeat: the account stays within its
/// limit, writes are refused before it is used up, and whoever reads gets all that was accepted.
#[test]
fn m1_full_queues_shed_writes_and_stay_within_the_budget() {
    let mut sim = Sim::with(1, small_memory);
    let publisher = sim.publisher(0);
    let quick = sim.subscriber(0);
    let slow: Vec<_> = (0..20).map(|_| sim.subscriber(0)).collect();
    let base = sim.nodes[0].memory_used();
    let mut peak = 0;
    for n in 0..1_000_u32 {
        // One after the other stops reading, so that each holds other messages than the last.
        sim.stall(0, slow[n as usize / 20 % slow.len()], true);
        let payload = [&n.to_be_bytes()[..], &[0; 60_000]].concat();
        publish(&mut sim, 0, publisher, 1, &Publish::Message(payload.into()));
        sim.run(100);
        peak = peak.max(sim.nodes[0].memory_used());
    }
    let codes = codes(&sim, 0, publisher);
    let count = |code| codes.iter().filter(|c| **c == code).count();
    assert!(count(503) > 100 && count(200) > 50, "{} accepted, {} shed", count(200), count(503));
    assert_eq!(count(200) + count(503), 1_001, "nothing else, START included");
    assert!(peak <= 8 * MIB, "{peak}");
    let got = delivered(&sim.client_frames(0, quick));
    assert_eq!(got.iter().filter(|r| matches!(r, Record::Message { .. })).count(), count(200) - 1);
    assert_eq!(got.iter().filter(|r| matches!(r, Record::Gap { .. })).count(), 0, "who reads misses nothing");
    slow.iter().for_each(|client| sim.nodes[0].handle_closed(*client));
    sim.run(250_000);
    assert!(sim.nodes[0].memory_used() <= base, "all of it came back");
}

/// An upload claims what it announces: past the budget it is refused before its first chunk.
#[test]
fn m1_an_upload_claims_its_size_at_begin() {
    let mut sim = Sim::with(1, small_memory);
    let publishers: Vec<_> = (0..8).map(|_| sim.publisher(0)).collect();
    for client in &publishers {
        publish(&mut sim, 0, *client, 1, &Publish::Begin { size: MAX_BODY as u32, hash: [1; 32] });
    }
    sim.run(5);
    let refused = publishers.iter().filter(|client| codes(&sim, 0, **client).contains(&503)).count();
    assert_eq!(refused, 2, "six of 1 MiB fit below 80% of 8 MiB");
    for client in &publishers {
        sim.client_sends(
            0,
            *client,
            Frame::new(Flags::REQ | Flags::END, AppProto::PUBSUB, TenantId(0), 3, Bytes::new()),
        );
    }
    publish(&mut sim, 0, publishers[7], 1, &Publish::Begin { size: MAX_BODY as u32, hash: [1; 32] });
    assert!(sim.nodes[0].memory_percent() < 10, "given back when their streams end");
}

fn opening(of: &str, dialled: Option<usize>) -> Opening {
    let holder = Holder::Certificate(of.parse().unwrap());
    Opening { holder, dialled, transport: Some(Transport::Tcp), group: "hybrid", handshake_ends: Millis(u64::MAX) }
}

/// Whoever finds no place is told so at HELLO, with a time; clients never take a peer's place.
#[test]
fn m1_a_full_daemon_answers_and_keeps_places_for_its_peers() {
    let mut sim = Sim::with(3, |config| config.overlay.max_sessions = 5);
    let clock = sim.clock();
    let node = &mut sim.nodes[0];
    let client = "spiffe://example.org/ns/a/client/app";
    for n in 0..10 {
        assert!(node.handle_open(SessionId(100 + n), opening(client, None), clock.now));
    }
    assert_eq!((node.sessions.len(), node.turned_away), (10, 7), "three of five: two are the peers'");
    for n in 0..10 {
        let hello = Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 1, json(&Hello::default()));
        node.handle_frame(SessionId(100 + n), hello, None, clock);
    }
    let mut answers = BTreeMap::new();
    while let Some((id, frames)) = node.poll_transmit(clock.now) {
        let [frame] = &frames[..] else { panic!("{frames:?}") };
        let retry = crate::control::parse::<crate::status::ErrorBody>(&frame.payload).and_then(|b| b.retry_after_ms);
        answers.insert(id.0, (frame.code, frame.corr_id, retry));
        node.handle_sent(id, clock.now);
    }
    assert!((100..103).all(|id| answers[&id] == (200, 1, None)), "{answers:?}");
    assert!((103..110).all(|id| answers[&id] == (429, 1, Some(1_000))), "{answers:?}");
    let outputs: Vec<Output> = std::iter::from_fn(|| node.poll_output()).collect();
    assert_eq!(outputs.iter().filter(|o| matches!(o, Output::Close(_))).count(), 7, "and then closed");
    assert_eq!(outputs.iter().filter(|o| **o == Output::Rejected(Reason::Quota)).count(), 7);
    (103..110).for_each(|id| node.handle_closed(SessionId(id)));
    sim.dial(1, 0);
    sim.dial(0, 2);
    sim.run(100);
    assert_eq!((sim.nodes[0].peers_up(), sim.nodes[0].turned_away), (2, 0));
}

/// Telling many that there is no place takes a bounded number of places itself.
#[test]
fn m1_those_who_are_turned_away_are_bounded() {
    let mut sim = Sim::with(1, |config| config.overlay.max_sessions = 1);
    let node = &mut sim.nodes[0];
    let client = "spiffe://example.org/ns/a/client/app";
    let opened = (0..2_000).filter(|n| node.handle_open(SessionId(*n), opening(client, None), Millis(0))).count();
    assert_eq!((opened, node.turned_away), (places::MAX_TURNED_AWAY, places::MAX_TURNED_AWAY));
}

/// A drain ends a subscription behind everything that is queued for it, in whatever lanes, and
/// says what a slow reader missed.
#[test]
fn s5_a_subscription_ends_behind_its_messages() {
    let mut sim = Sim::with(1, |config| config.overlay.per_peer_rps = 500);
    let subscriber = sim.subscriber(0);
    let publisher = sim.publisher(0);
    sim.stall(0, subscriber, true);
    let payload = Bytes::from(vec![3; MAX_BODY]);
    let hash = crate::gossip::digest(&payload);
    for n in 0..100 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
        if n % 5 == 0 {
            publish(&mut sim, 0, publisher, 1, &Publish::Begin { size: MAX_BODY as u32, hash });
            pieces(&payload, hash).for_each(|p| publish(&mut sim, 0, publisher, 1, &Publish::Piece(p)));
        }
        sim.run(5);
    }
    let accepted = codes(&sim, 0, publisher).iter().filter(|c| **c == 200).count() - 1;
    sim.nodes[0].handle_drain();
    assert!(!sim.drained(0));
    sim.stall(0, subscriber, false);
    sim.run(500);
    assert!(sim.drained(0));
    let frames = sim.client_frames(0, subscriber);
    let last = frames.last().unwrap();
    assert_eq!((last.code, last.flags), (503, Flags::RESP | Flags::END), "nothing comes after the end");
    let got = delivered(&frames);
    let whole = got.iter().filter(|r| matches!(r, Record::Message { .. } | Record::Begin { .. })).count();
    let missed: u32 = got.iter().map(|r| if let Record::Gap { missed } = r { *missed } else { 0 }).sum();
    assert_eq!((whole + missed as usize, missed > 0), (accepted, true));
}

/// SIGTERM at one instant: what got 200 is with every subscriber, here and at a peer, by the time
/// that the daemon says that it is drained; and it does say so.
fn sigterm_comes(sigterm: u64, depth: u32, fanout: u32, burst: u32) -> Result<(), TestCaseError> {
    let mut sim = Sim::with(3, |config| {
        config.gossip.lane_depth_frames = depth;
        config.gossip.fanout = fanout;
        config.gossip.burst_frames = burst;
        config.overlay.per_peer_rps = 500;
    });
    sim.full_mesh();
    let subscribers: Vec<_> = (0..3).map(|node| sim.subscriber(node)).collect();
    let publisher = sim.publisher(0);
    let mut sent = 0;
    for now in 0..400 {
        if now == sigterm {
            sim.nodes[0].handle_drain();
        }
        if now % 2 == 0 {
            publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{sent}").into()));
            sent += 1;
        }
        sim.run(1);
    }
    let mut waited = 0;
    while !sim.drained(0) {
        sim.run(10);
        waited += 10;
        prop_assert!(waited < 30_000, "it never drains");
    }
    sim.run(2); // what left is on its way
    sim.cut(0, 1);
    sim.cut(0, 2);
    sim.run(5_000);
    let accepted: Vec<String> = codes(&sim, 0, publisher)[1..]
        .iter()
        .enumerate()
        .filter(|(_, code)| **code == 200)
        .map(|(n, _)| format!("m{n}"))
        .collect();
    prop_assert!(accepted.len() >= usize::try_from(sigterm / 2).unwrap());
    for (node, client) in subscribers.iter().enumerate() {
        let frames = sim.client_frames(node, *client);
        let mut got = texts(&frames);
        got.sort_by_key(|text| text[1..].parse::<u32>().unwrap_or(u32::MAX));
        if node == 0 {
            let gaps = delivered(&frames).iter().filter(|r| matches!(r, Record::Gap { .. })).count();
            prop_assert_eq!(gaps, 0);
        }
        prop_assert_eq!(&got, &accepted, "daemon {}: {:?}", node, sim.nodes[node].counts());
    }
    Ok(())
}

/// Lanes that carry a seventh of what is published: nobody's patience with them ends.
#[test]
fn s5_slow_lanes_lose_nothing_after_sigterm() {
    sigterm_comes(323, 24, 1, 22).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn s5_what_was_accepted_is_delivered_whenever_sigterm_comes(
        sigterm in 0..400_u64, depth in 8..32_u32, fanout in 1..3_u32, burst in 20..300_u32,
    ) {
        sigterm_comes(sigterm, depth, fanout, burst)?;
    }
}

/// M1: answers that nobody reads stay within the budget too, whoever leaves them; who reads has
/// them, and a session that leaves more than its part is closed.
#[test]
fn m1_unread_answers_stay_within_the_budget() {
    let mut sim = Sim::with(1, |config| {
        small_memory(config);
        config.overlay.max_sessions = 200;
    });
    let reader = sim.client(0);
    let holder = Holder::Certificate("spiffe://example.org/ns/a/client/app".parse().unwrap());
    let clients: Vec<SessionId> = (0..150).map(|_| sim.client_as(0, holder.clone(), &Hello::default())).collect();
    sim.run(10);
    clients.iter().for_each(|client| sim.stall(0, *client, true));
    let useless = || Frame::new(Flags::EVENT, AppProto::PUBSUB, TenantId(0), 9, Bytes::new());
    for _ in 0..400 {
        clients.iter().for_each(|client| sim.client_sends(0, *client, useless()));
        assert!(sim.nodes[0].memory_used() <= 8 * MIB, "{}", sim.nodes[0].memory_used());
    }
    let (full, closed) = (sim.nodes[0].memory_percent(), sim.rejected_after(0, Reason::Overflow));
    assert!(closed > 0 && full >= 95, "{closed} closed, {full} %");
    sim.client_sends(0, reader, useless());
    sim.run(10);
    assert_eq!(codes(&sim, 0, reader), [200, 400]);
}

/// P-2, I-6: over QUIC a session claims so much that memory is short before places are. Those
/// that open no stream, having no token, go then; who has a stream stays, and who has just come.
#[test]
fn m1_who_opens_no_stream_leaves_memory_to_others() {
    let mut sim = Sim::with(1, small_memory);
    let (publisher, local) = (sim.publisher(0), sim.client(0));
    let mut clock = sim.clock();
    let (node, client) = (&mut sim.nodes[0], "spiffe://example.org/ns/a/client/app");
    let comes = |node: &mut Node, n: u64, clock: Clock| {
        let opening = Opening { transport: Some(Transport::Quic), ..opening(client, None) };
        let opened = node.handle_open(SessionId(1_000 + n), opening, clock.now);
        let hello = Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 1, json(&Hello::default()));
        node.handle_frame(SessionId(1_000 + n), hello, None, clock);
        opened && node.sessions.get(&SessionId(1_000 + n)).is_some_and(|entry| entry.turned_away.is_none())
    };
    let came = (0..100).filter(|n| comes(node, *n, clock)).count();
    assert!((40..45).contains(&came) && node.memory_percent() > 95, "{came}");
    clock.now = clock.now.after(2_000);
    node.handle_timeout(clock);
    assert!(
        node.sessions.values().all(|entry| !entry.closing || entry.turned_away.is_some()) && !comes(node, 100, clock),
        "they may be about to"
    );
    clock.now = clock.now.after(2_000);
    assert!(comes(node, 101, clock), "the oldest gives its memory to who comes");
    node.handle_timeout(clock);
    let gone: Vec<SessionId> = node.sessions.iter().filter(|(_, entry)| entry.closing).map(|(id, _)| *id).collect();
    gone.into_iter().for_each(|id| node.handle_closed(id));
    assert!((75..80).contains(&node.memory_percent()), "as few as will do: {} %", node.memory_percent());
    // Who claims little is left alone, though it is the oldest.
    assert!([publisher, local, SessionId(1_101)].iter().all(|id| node.sessions.contains_key(id)));
}
