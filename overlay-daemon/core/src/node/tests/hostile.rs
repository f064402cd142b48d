//! Clients with a valid token, and peers, that use what they may against the others.

use super::*;
use crate::identity::Topic;

/// M1: subscriptions are memory. Sessions that open all the streams that they may, each with as
/// many and as long topics as there may be, are refused once the budget is used up; and what they
/// took is given back.
#[test]
fn m1_subscriptions_claim_what_they_take() {
    let mut sim = Sim::with(1, |config| {
        config.overlay.memory_bytes = 16 << 20;
        config.gossip.store_bytes = 1 << 20;
        config.overlay.per_peer_rps = 100_000;
        config.overlay.rps = 100_000;
    });
    let topics = |n: u64| -> Vec<Topic> {
        (0..64).map(|topic| format!("{n:03}-{topic:02}-{}", "x".repeat(240)).parse().unwrap()).collect()
    };
    let grant = sim.granted(sim::SIGNED_BY, |claims| claims.topics = vec!["*".into()]);
    let mut codes = Vec::new();
    let clients: Vec<SessionId> = (0..8).map(|_| sim.client(0)).collect();
    for client in &clients {
        for n in 0..200 {
            let open = Open::Subscribe { topics: topics(n) };
            let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), 3 + 2 * n, json(&open));
            sim.client_starts(0, *client, start, Some(grant.clone()));
            sim.run(1);
        }
        codes.extend(sim.client_frames(0, *client).iter().skip(1).map(|frame| frame.code));
    }
    let opened = codes.iter().filter(|code| **code == 200).count();
    assert!((200..400).contains(&opened) && codes.len() == 1_600, "{opened} of {}", codes.len());
    assert!(codes.iter().all(|code| [200, 503].contains(code)));
    assert!(sim.nodes[0].memory_used() <= 16 << 20);
    let ended = Frame::new(Flags::REQ | Flags::END, AppProto::PUBSUB, TenantId(0), 3, Bytes::new());
    let before = sim.nodes[0].memory_used();
    sim.client_starts(0, clients[0], ended, None);
    sim.run(5);
    assert!(sim.nodes[0].memory_used() + 30_000 < before);
    clients.into_iter().for_each(|client| sim.nodes[0].handle_closed(client));
    assert_eq!(sim.nodes[0].memory_used(), 0);
}

/// The session by which a node has its one peer, and the stream by which that sends gossip.
fn gossip_in(sim: &Sim, node: usize) -> (SessionId, u64) {
    let streams = |(id, entry): (&SessionId, &Entry)| {
        entry.session.streams().find(|(_, s)| matches!(s.kind, Kind::GossipIn)).map(|(corr_id, _)| (*id, corr_id))
    };
    sim.nodes[node].sessions.iter().map(|(id, entry)| (id, entry.as_ref())).find_map(streams).unwrap()
}

fn gossips(sim: &mut Sim, node: usize, record: &Record) {
    let (id, corr_id) = gossip_in(sim, node);
    let frame = Frame::new(Flags::REQ, AppProto::GOSSIP, TenantId(0), corr_id, record.encode());
    sim.client_starts(node, id, frame, None);
}

/// G3, F6: a peer that floods with well-formed records of any kind is read ever more slowly, and
/// not cut off; one that sends all that its bucket lets it, and asks as much as it may, is not.
#[test]
fn f6_a_peer_that_floods_is_slowed_and_an_honest_one_is_not() {
    let announce = |n: u64| {
        let ids =
            (0..1_024).map(|id| crate::record::MessageId(blake3::hash(&[n, id].map(u64::to_be_bytes).concat()).into()));
        Record::Announce(ids.collect())
    };
    let graft = |n: u64| Record::Graft { id: crate::record::MessageId([n as u8; 32]), chunks: 0 };
    for flood in [announce as fn(u64) -> Record, graft, |_| Record::Prune] {
        let mut sim = Sim::new(2);
        sim.full_mesh();
        let (id, _) = gossip_in(&sim, 0);
        let (mut until, mut read) = (Millis(0), 0_u64);
        for n in 0..20_000 {
            if sim.clock().now >= until {
                gossips(&mut sim, 0, &flood(n));
                read += 1;
            }
            if n % 20 == 0 {
                sim.run(1);
                until = sim.paused(0, id).unwrap_or(until);
            }
        }
        assert!(until > Millis(0) && read < 6_000, "{read} of 20 a millisecond");
        assert_eq!((sim.nodes[0].peers_up(), sim.rejected(0, Reason::Quota)), (1, 0));
    }
    let mut sim = Sim::with(2, |config| {
        config.overlay.per_peer_rps = 10_000;
        config.overlay.rps = 10_000;
    });
    sim.full_mesh();
    let publisher = sim.publisher(1);
    for n in 0..4_000 {
        publish(&mut sim, 1, publisher, 1, &Publish::Message(format!("m{n}").into()));
        sim.run(1);
    }
    let (id, _) = gossip_in(&sim, 0);
    assert_eq!(sim.paused(0, id), None);
}

fn start_of(corr_id: u64, open: &Open) -> Frame {
    Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), corr_id, json(open))
}

fn accepted(sim: &Sim, client: SessionId) -> usize {
    let answers = sim.client_frames(0, client);
    answers
        .iter()
        .filter(|frame| frame.flags.has(Flags::RESP) && frame.code == 200 && frame.payload.len() == 32)
        .count()
}

/// I-9, P-2: those who have no token use up their own requests a second, and not the daemon's.
#[test]
fn who_has_no_token_takes_nothing_from_those_who_have() {
    let mut sim = Sim::new(1);
    let publisher = sim.publisher(0);
    let strangers: Vec<SessionId> = (0..5).map(|_| sim.client(0)).collect();
    let open = Open::Publish { topic: TOPIC.parse().unwrap() };
    for n in 0..1_000 {
        for stranger in &strangers {
            sim.client_says(0, *stranger, start_of(3 + 2 * n, &open), None);
        }
        if n % 10 == 0 {
            publish(&mut sim, 0, publisher, 1, &Publish::Message("m".into()));
        }
        sim.run(1);
    }
    assert_eq!(accepted(&sim, publisher), 100);
    assert_eq!((sim.nodes[0].peers_up(), sim.nodes[0].sessions.len()), (0, 6), "each within its useless frames");
}

/// F7, I-9: uploads whose chunks come as slowly as they may do not take every place in flight:
/// others publish and subscribe, and readiness stays.
#[test]
fn f7_slow_uploads_leave_places_for_others() {
    let mut sim = Sim::new(1);
    let slow: Vec<SessionId> = (0..20).map(|_| sim.client(0)).collect();
    let open = Open::Publish { topic: TOPIC.parse().unwrap() };
    let begin = Publish::Begin { size: 65_537, hash: [1; 32] }.encode();
    for client in &slow {
        for corr_id in (3..67).step_by(2) {
            let grant = sim.grant();
            sim.client_says(0, *client, start_of(corr_id, &open), Some(grant));
            sim.run(3);
            let frame = Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(0), corr_id, begin.clone());
            sim.client_says(0, *client, frame, None);
        }
    }
    assert!((200..=256).contains(&sim.nodes[0].quota.inflight()), "{}", sim.nodes[0].quota.inflight());
    assert!(sim.nodes[0].pressure() <= 50);
    let (subscriber, publisher) = (sim.subscriber(0), sim.publisher(0));
    publish(&mut sim, 0, publisher, 1, &Publish::Message("m".into()));
    sim.run(20);
    assert_eq!((accepted(&sim, publisher), texts(&sim.client_frames(0, subscriber)).len()), (1, 1));
    sim.run(7_000);
    assert_eq!(sim.nodes[0].quota.inflight(), 0);
}

/// F8: what a stranger says of itself in HELLO is kept for as long as its session lives, in case
/// that it becomes a peer: it is as short as a name may be.
#[test]
fn f8_a_daemons_name_is_bounded() {
    let mut sim = Sim::new(1);
    for (len, sessions) in [(63, 1), (64, 1), (16_000, 1)] {
        let holder = Holder::Certificate("spiffe://example.org/ns/a/overlaynode/stranger".parse().unwrap());
        let daemon = DaemonHello { name: "x".repeat(len), incarnation: Incarnation(9) };
        sim.client_as(0, holder, &Hello { ua: None, daemon: Some(daemon) });
        sim.run(5);
        assert_eq!(sim.nodes[0].sessions.len(), sessions, "{len}");
    }
}

/// S5: the one peer that was pushed what is accepted just before a daemon ends passes nothing on:
/// the others, who were to hear of it and ask, get it all the same.
#[test]
fn s5_a_peer_that_passes_nothing_on_loses_nothing_at_the_end() {
    let mut sim = Sim::with(3, |config| config.gossip.fanout = 1);
    sim.dial(0, 1); // first, so pushed to; and it has no other peer to pass anything on to
    sim.run(100);
    sim.dial(0, 2);
    sim.run(500);
    let (subscriber, publisher) = (sim.subscriber(2), sim.publisher(0));
    for n in 0..20 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
    }
    assert_eq!(accepted(&sim, publisher), 0);
    sim.nodes[0].handle_drain();
    while !sim.drained(0) {
        sim.run(1);
    }
    sim.nodes[0].handle_finish();
    sim.run(50);
    assert_eq!(accepted(&sim, publisher), 20);
    assert_eq!(texts(&sim.client_frames(2, subscriber)).len(), 20);
}

/// P-2, I-9: sessions that open nothing, having no token, do not keep out those who have one; who
/// has a stream keeps its place, and so does who has just come.
#[test]
fn who_opens_no_stream_gives_its_place_up() {
    let mut sim = Sim::with(1, |config| config.overlay.max_sessions = 11); // one is kept for the peer
    let subscriber = sim.subscriber(0);
    let idle: Vec<SessionId> = (0..9).map(|_| sim.client(0)).collect();
    sim.run(100);
    let early = sim.client(0);
    sim.run(100);
    assert_eq!(sim.client_frames(0, early)[0].code, 429, "they may be about to open one");
    sim.run(3_000);
    let publishers: Vec<SessionId> = (0..9).map(|_| sim.publisher(0)).collect();
    sim.run(100);
    assert!(idle.iter().all(|id| !sim.nodes[0].sessions.contains_key(id)));
    assert_eq!((sim.nodes[0].sessions.len(), sim.rejected(0, Reason::Quota)), (10, 10));
    publishers.iter().for_each(|client| publish(&mut sim, 0, *client, 1, &Publish::Message("m".into())));
    sim.run(4_000);
    let late = sim.client(0);
    sim.run(100);
    assert_eq!(sim.client_frames(0, late)[0].code, 429, "all of them have a stream");
    assert_eq!(texts(&sim.client_frames(0, subscriber)).len(), 9);
}

/// I-6: whose stream has ended, with messages for it still under way, keeps its place for them.
#[test]
fn who_is_due_messages_keeps_its_place() {
    let mut sim = Sim::with(1, |config| config.overlay.max_sessions = 3); // one is kept for the peer
    let (subscriber, publisher) = (sim.subscriber(0), sim.publisher(0));
    sim.run(100);
    sim.stall(0, subscriber, true);
    for n in 0..5 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
        sim.run(10);
    }
    let stream = sim.nodes[0].sessions[&subscriber].session.streams().next().unwrap().0;
    let end = Frame::new(Flags::REQ | Flags::END, AppProto::PUBSUB, TenantId(0), stream, Bytes::new());
    sim.client_starts(0, subscriber, end, None);
    sim.run(4_000);
    assert_eq!(sim.nodes[0].sessions[&subscriber].session.streams().count(), 0);
    let early = sim.client(0);
    sim.run(100);
    sim.stall(0, subscriber, false);
    sim.run(100);
    assert_eq!(texts(&sim.client_frames(0, subscriber)).len(), 5);
    let late = sim.client(0);
    sim.run(100);
    assert_eq!((sim.client_frames(0, early)[0].code, sim.client_frames(0, late)[0].code), (429, 200));
}

/// I-5: a peer that sends more to be passed on than lanes take leaves room for what a daemon's own
/// clients publish: they are told 200, and nobody else has it.
#[test]
fn g1_a_peers_flood_leaves_room_for_what_is_accepted_here() {
    let mut sim = Sim::with(3, |config| config.gossip.burst_frames = 64);
    sim.dial(1, 0);
    sim.run(10);
    let (flooder, stream) = gossip_in(&sim, 0);
    sim.dial(2, 0);
    sim.run(100);
    let (publisher, subscriber) = (sim.publisher(0), sim.subscriber(2));
    sim.run(100);
    let (identity, payload) = (sim.nodes[1].identity.clone(), Bytes::from_static(b"flood"));
    let mut sequence = 0;
    for n in 0..600 {
        for _ in 0..10 {
            sequence += 1;
            let envelope = crate::record::Envelope {
                attributes: 0,
                topic: TOPIC.parse().unwrap(),
                origin: identity.clone(),
                incarnation: Incarnation(77),
                sequence,
                time_ms: sim.clock().unix_ms,
                size: 5,
                hash: crate::gossip::digest(&payload),
            };
            let record = Record::Message { hops: 0, envelope, payload: payload.clone() };
            let frame = Frame::new(Flags::REQ, AppProto::GOSSIP, TenantId(0), stream, record.encode());
            sim.client_starts(0, flooder, frame, None);
        }
        if n % 10 == 0 {
            publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("own {n}").into()));
        }
        sim.run(10);
    }
    sim.run(10_000);
    let accepted = sim.client_frames(0, publisher).iter().filter(|f| f.code == 200).count() - 1;
    let got = texts(&sim.client_frames(2, subscriber));
    let own = got.iter().filter(|text| text.starts_with("own")).count();
    assert_eq!((accepted, own), (60, 60), "of {} in all", got.len());
    assert!(sim.nodes[0].counts().rx > 5_000 && got.len() < 3_000, "it was a flood: {}", got.len());
}
