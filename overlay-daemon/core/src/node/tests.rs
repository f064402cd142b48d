//! Whole daemons joined in virtual time: every frame takes a millisecond, nothing is real.

mod hostile;
mod joined;
mod oracle;
mod pace;
mod pressure;
mod sim;
mod tokens;

use sim::{Sim, TOPIC};

use super::*;
use crate::control::{Open, json};
use crate::identity::TenantId;
use crate::record::{Publish, Record, pieces};

/// Publishes and subscribes through a client session like any other.
fn publish(sim: &mut Sim, node: usize, client: SessionId, corr_id: u64, record: &Publish) {
    sim.client_sends(node, client, Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(0), corr_id, record.encode()));
}

fn delivered(frames: &[Frame]) -> Vec<Record> {
    frames.iter().filter(|f| f.flags.has(Flags::EVENT)).map(|f| Record::decode(f.payload.clone()).unwrap()).collect()
}

fn texts(frames: &[Frame]) -> Vec<String> {
    delivered(frames)
        .into_iter()
        .map(|record| match record {
            Record::Message { payload, .. } => String::from_utf8(payload.to_vec()).unwrap(),
            other => format!("{other:?}"),
        })
        .collect()
}

#[test]
fn two_daemons_become_peers_by_one_session() {
    let mut sim = Sim::new(2);
    sim.dial(0, 1);
    sim.dial(1, 0);
    sim.run(100);
    assert_eq!((sim.nodes[0].peers_up(), sim.nodes[1].peers_up()), (1, 1));
    assert_eq!((sim.nodes[0].sessions.len(), sim.nodes[1].sessions.len()), (1, 1), "of the two, one stayed");
}

#[test]
fn a_session_with_oneself_is_closed() {
    let mut sim = Sim::new(1);
    sim.dial(0, 0);
    sim.run(100);
    assert_eq!((sim.nodes[0].sessions.len(), sim.nodes[0].peers_up()), (0, 0));
}

/// P-5: with a fan-out far below the number of peers, every message still reaches everyone.
#[test]
fn a_message_reaches_every_daemon_once() {
    let mut sim = Sim::with(8, |config| config.gossip.fanout = 2);
    sim.full_mesh();
    let subscribers: Vec<_> = (0..8).map(|node| sim.subscriber(node)).collect();
    let publisher = sim.publisher(3);
    for n in 0..50 {
        publish(&mut sim, 3, publisher, 1, &Publish::Message(format!("m{n}").into()));
        sim.run(10);
    }
    sim.run(2_000);
    let want: Vec<String> = (0..50).map(|n| format!("m{n}")).collect();
    for (node, client) in subscribers.iter().enumerate() {
        let mut got = texts(&sim.client_frames(node, *client));
        got.sort_by_key(|text| text[1..].parse::<u32>().unwrap());
        assert_eq!(got, want, "daemon {node}");
    }
    let duplicates: u64 = sim.nodes.iter().map(|node| node.counts().duplicates).sum();
    assert!(duplicates < 50 * 8 / 4, "the tree settles: {duplicates} duplicates for 350 deliveries");
}

/// I-3, I-4: over 64 KiB a payload travels as chunks and arrives whole, at publisher's,
/// neighbour's and the far end of a chain.
#[test]
fn a_mebibyte_travels_as_chunks() {
    let mut sim = Sim::new(3);
    sim.dial(0, 1);
    sim.dial(1, 2);
    sim.run(100);
    let subscribers: Vec<_> = (0..3).map(|node| sim.subscriber(node)).collect();
    let publisher = sim.publisher(0);
    let payload: Bytes = (0..1_048_576_u32).map(|n| (n % 251) as u8).collect::<Vec<_>>().into();
    let hash = crate::gossip::digest(&payload);
    publish(&mut sim, 0, publisher, 1, &Publish::Begin { size: 1_048_576, hash });
    for piece in pieces(&payload, hash) {
        publish(&mut sim, 0, publisher, 1, &Publish::Piece(piece));
    }
    sim.run(1_000);
    assert_eq!(sim.client_frames(0, publisher).last().map(|f| (f.code, f.payload.len())), Some((200, 32)));
    for (node, client) in subscribers.iter().enumerate() {
        let mut bytes = Vec::new();
        for record in delivered(&sim.client_frames(node, *client)) {
            match record {
                Record::Begin { envelope, hops } => assert_eq!((envelope.hash, hops as usize), (hash, node)),
                Record::Piece(piece) => bytes.extend_from_slice(&piece.bytes),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(bytes, payload, "daemon {node}");
    }
}

/// G-1: one byte over 1 MiB is refused from its announced size, before any chunk.
#[test]
fn a_byte_over_a_mebibyte_is_413() {
    let mut sim = Sim::new(1);
    let publisher = sim.publisher(0);
    publish(&mut sim, 0, publisher, 1, &Publish::Begin { size: 1_048_577, hash: [0; 32] });
    let piece = crate::record::Piece { hash: [0; 32], index: 0, bytes: vec![0; 65_536].into() };
    publish(&mut sim, 0, publisher, 1, &Publish::Piece(piece));
    publish(&mut sim, 0, publisher, 1, &Publish::Message("after".into()));
    sim.run(50);
    let codes: Vec<u16> = sim.client_frames(0, publisher).iter().map(|frame| frame.code).collect();
    assert_eq!(codes, [200, 413, 200], "START, the refusal, and the stream goes on");
    assert_eq!(sim.rejected(0, Reason::Size), 1);
}

/// G-6: past the rate, 429 with the time to wait.
#[test]
fn past_the_rate_is_429() {
    let mut sim = Sim::with(1, |config| config.overlay.per_peer_rps = 10);
    let publisher = sim.publisher(0);
    for _ in 0..20 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message("x".into()));
    }
    sim.run(50);
    let codes: Vec<u16> = sim.client_frames(0, publisher).iter().map(|frame| frame.code).collect();
    assert_eq!((codes.iter().filter(|c| **c == 200).count(), codes.iter().filter(|c| **c == 429).count()), (10, 11));
}

/// What is accepted while the mesh is apart reaches those who join later.
#[test]
fn what_was_accepted_alone_reaches_later_peers() {
    let mut sim = Sim::new(2);
    let publisher = sim.publisher(0);
    publish(&mut sim, 0, publisher, 1, &Publish::Message("early".into()));
    let subscriber = sim.subscriber(1);
    sim.run(5_000);
    assert_eq!(delivered(&sim.client_frames(1, subscriber)), []);
    sim.dial(1, 0);
    sim.run(1_000);
    assert_eq!(texts(&sim.client_frames(1, subscriber)), ["early"]);
}

/// Losing any frame of a link that is then cut loses no message.
#[test]
fn a_cut_link_loses_nothing() {
    let mut sim = Sim::with(3, |config| config.gossip.fanout = 1);
    sim.full_mesh();
    let subscriber = sim.subscriber(2);
    let publisher = sim.publisher(0);
    for n in 0..40 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
        if n % 10 == 5 {
            sim.cut(n as usize / 10 % 2, 2);
        }
        sim.run(3);
        if n % 10 == 9 {
            sim.dial(2, n as usize / 10 % 2);
            sim.run(20);
        }
    }
    sim.run(5_000);
    let mut got = texts(&sim.client_frames(2, subscriber));
    got.sort_by_key(|text| text[1..].parse::<u32>().unwrap());
    assert_eq!(got, (0..40).map(|n| format!("m{n}")).collect::<Vec<_>>());
}

/// I-5: who does not read misses messages, is told how many, and costs others nothing.
#[test]
fn a_slow_subscriber_is_told_of_its_gap() {
    let mut sim = Sim::with(1, |config| {
        config.gossip.lane_depth_frames = 8;
        config.overlay.per_peer_rps = 500;
    });
    let slow = sim.subscriber(0);
    let quick = sim.subscriber(0);
    sim.stall(0, slow, true);
    let publisher = sim.publisher(0);
    for n in 0..30 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
        sim.run(2);
    }
    assert_eq!(texts(&sim.client_frames(0, quick)).len(), 30);
    sim.stall(0, slow, false);
    sim.run(100);
    let got = delivered(&sim.client_frames(0, slow));
    let missed: u32 = got.iter().map(|r| if let Record::Gap { missed } = r { *missed } else { 0 }).sum();
    let received = got.iter().filter(|r| matches!(r, Record::Message { .. })).count();
    assert_eq!(missed as usize + received, 30);
    assert!(missed > 0 && sim.rejected(0, Reason::Overflow) == u64::from(missed));
}

/// P-4: no capability, no stream; and a stream keeps to what its capability allows.
#[test]
fn a_start_without_a_grant_is_401() {
    let mut sim = Sim::new(1);
    let client = sim.client(0);
    let start = |corr_id, open: &Open| {
        Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), corr_id, json(open))
    };
    let topic: crate::identity::Topic = TOPIC.parse().unwrap();
    sim.client_starts(0, client, start(3, &Open::Publish { topic: topic.clone() }), None);
    sim.client_starts(0, client, start(5, &Open::Publish { topic: "other".parse().unwrap() }), Some(sim.grant()));
    let foreign = Frame { tenant: TenantId(7), ..start(7, &Open::Publish { topic: topic.clone() }) };
    sim.client_starts(0, client, foreign, Some(sim.grant()));
    let gossip = Frame { app: AppProto::GOSSIP, payload: json(&Open::Gossip {}), ..start(9, &Open::Publish { topic }) };
    sim.client_starts(0, client, gossip, Some(sim.grant()));
    sim.run(20);
    let codes: Vec<(u64, u16)> = sim.client_frames(0, client).iter().map(|f| (f.corr_id, f.code)).collect();
    assert_eq!(codes, [(1, 200), (3, 401), (5, 403), (7, 403), (9, 403)]);
}

/// I-6: shedding refuses writes and goes on delivering; draining ends subscriptions after
/// what they have queued.
#[test]
fn shedding_and_draining() {
    let mut sim = Sim::new(1);
    let subscriber = sim.subscriber(0);
    let publisher = sim.publisher(0);
    publish(&mut sim, 0, publisher, 1, &Publish::Message("a".into()));
    sim.nodes[0].handle_readiness(Report::default(), true);
    publish(&mut sim, 0, publisher, 1, &Publish::Message("b".into()));
    sim.nodes[0].handle_readiness(Report::default(), false);
    sim.nodes[0].handle_drain();
    publish(&mut sim, 0, publisher, 1, &Publish::Message("c".into()));
    sim.run(50);
    let codes: Vec<u16> = sim.client_frames(0, publisher).iter().map(|frame| frame.code).collect();
    assert_eq!(codes, [200, 200, 503, 503], "START, a, b, c");
    let last = sim.client_frames(0, subscriber);
    assert_eq!(
        (texts(&last), last.last().map(|f| (f.code, f.flags.has(Flags::END)))),
        (vec!["a".to_owned()], Some((503, true)))
    );
    assert!(sim.drained(0));
}

#[test]
fn a_silent_peer_is_dropped_and_its_link_with_it() {
    let mut sim = Sim::new(2);
    sim.dial(0, 1);
    sim.run(100);
    sim.blackhole(0, 1);
    sim.run(40_000);
    assert_eq!((sim.nodes[0].peers_up(), sim.nodes[0].links.len()), (0, 0));
    assert_eq!(sim.rejected(0, Reason::Timeout) + sim.rejected(1, Reason::Timeout), 1, "whoever noticed first");
}

#[test]
fn the_report_names_every_session() {
    let mut sim = Sim::new(2);
    sim.dial(0, 1);
    sim.run(100);
    let client = sim.client(0);
    let start = Frame::new(Flags::REQ | Flags::START, AppProto::ADMIN, TenantId(0), 3, json(&Open::Sessions {}));
    sim.client_starts(0, client, start, Some(sim.grant()));
    sim.run(20);
    let report: serde_json::Value = serde_json::from_slice(&sim.client_frames(0, client)[1].payload).unwrap();
    let kinds: Vec<_> =
        report["sessions"].as_array().unwrap().iter().map(|s| (s["kind"].clone(), s["peer"].clone())).collect();
    assert_eq!(kinds, [("peer".into(), "node-1".into()), ("local".into(), serde_json::Value::Null)]);
}

/// What was accepted while a peer was away reaches it, however much more that is than its
/// lane takes at once or than a second's frames.
#[test]
fn a_long_absence_is_made_good() {
    let mut sim = Sim::with(2, |config| config.overlay.per_peer_rps = 500);
    let publisher = sim.publisher(0);
    for n in 0..6_000 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
        sim.run(2);
    }
    let subscriber = sim.subscriber(1);
    sim.dial(1, 0);
    sim.run(40_000);
    assert_eq!(texts(&sim.client_frames(1, subscriber)).len(), 6_000);
    assert_eq!(sim.nodes[1].counts().lost, 0);
}

/// I-9: uploads that stand still hold no place among the requests in flight for ever.
#[test]
fn f7_an_upload_that_stands_still_is_refused() {
    let mut sim = Sim::new(1);
    let publisher = sim.publisher(0);
    publish(&mut sim, 0, publisher, 1, &Publish::Begin { size: 1_048_576, hash: [0; 32] });
    sim.run(4_000);
    assert_eq!(sim.nodes[0].quota.inflight(), 1);
    sim.run(2_500);
    assert_eq!(sim.nodes[0].quota.inflight(), 0);
    let piece = crate::record::Piece { hash: [0; 32], index: 0, bytes: vec![0; 65_536].into() };
    publish(&mut sim, 0, publisher, 1, &Publish::Piece(piece));
    publish(&mut sim, 0, publisher, 1, &Publish::Message("after".into()));
    sim.run(50);
    let codes: Vec<u16> = sim.client_frames(0, publisher).iter().map(|frame| frame.code).collect();
    assert_eq!(codes, [200, 400, 200], "START, the refusal, and the stream goes on");
}

/// A session that ends takes its own subscriptions along, and no other's.
#[test]
fn subscriptions_end_with_their_session() {
    let mut sim = Sim::new(1);
    let (gone, stays) = (sim.subscriber(0), sim.subscriber(0));
    sim.nodes[0].handle_closed(gone);
    let publisher = sim.publisher(0);
    publish(&mut sim, 0, publisher, 1, &Publish::Message("x".into()));
    sim.run(20);
    assert_eq!((texts(&sim.client_frames(0, gone)).len(), texts(&sim.client_frames(0, stays)).len()), (0, 1));
    sim.nodes[0].handle_closed(stays);
    assert!(sim.nodes[0].subscriptions.is_empty());
}

/// A peer that refuses the gossip stream for now is asked again, and then gets everything.
#[test]
fn a_refused_gossip_stream_is_asked_for_again() {
    let mut sim = Sim::new(2);
    let publisher = sim.publisher(0);
    publish(&mut sim, 0, publisher, 1, &Publish::Message("x".into()));
    let subscriber = sim.subscriber(1);
    sim.dial(0, 1);
    sim.refuse_starts = true;
    sim.run(5_000);
    assert_eq!((sim.nodes[0].peers_up(), texts(&sim.client_frames(1, subscriber)).len()), (1, 0));
    sim.refuse_starts = false;
    sim.run(10_000);
    assert_eq!(texts(&sim.client_frames(1, subscriber)), ["x"]);
}

/// The shallowest lane takes the largest message.
#[test]
fn a_mebibyte_fits_the_shallowest_lane() {
    let mut sim = Sim::with(2, |config| config.gossip.lane_depth_frames = 8);
    sim.dial(0, 1);
    sim.run(100);
    let subscriber = sim.subscriber(1);
    let publisher = sim.publisher(0);
    let payload = Bytes::from(vec![5; 1_048_576]);
    let hash = crate::gossip::digest(&payload);
    publish(&mut sim, 0, publisher, 1, &Publish::Begin { size: 1_048_576, hash });
    for piece in pieces(&payload, hash) {
        publish(&mut sim, 0, publisher, 1, &Publish::Piece(piece));
    }
    sim.run(1_000);
    let chunks =
        delivered(&sim.client_frames(1, subscriber)).iter().filter(|record| matches!(record, Record::Piece(_))).count();
    assert_eq!(chunks, 16);
}

/// I-9: refusals that are not read are nobody's requests in flight, nor are streams that ended.
#[test]
fn unread_refusals_take_no_place_in_flight() {
    let mut sim = Sim::new(1);
    let client = sim.publisher(0);
    let grant = sim.grant();
    let frame = |flags, corr_id| {
        Frame::new(
            Flags::REQ | flags,
            AppProto::PUBSUB,
            TenantId(0),
            corr_id,
            json(&Open::Publish { topic: TOPIC.parse().unwrap() }),
        )
    };
    for stream in 0..20 {
        sim.client_starts(0, client, frame(Flags::START, 5 + 2 * stream), Some(grant.clone()));
    }
    sim.run(100);
    sim.stall(0, client, true);
    for stream in 0..20 {
        sim.client_starts(0, client, frame(Flags::END, 5 + 2 * stream), None);
    }
    assert_eq!(sim.nodes[0].sessions[&client].session.streams().count(), 1);
    for _ in 0..200 {
        publish(
            &mut sim,
            0,
            client,
            1,
            &Publish::Piece(crate::record::Piece { hash: [0; 32], index: 0, bytes: vec![0; 1].into() }),
        );
    }
    assert_eq!((sim.nodes[0].quota.inflight(), sim.nodes[0].pressure()), (0, 0));
}

/// Many sessions of one peer leave a link for every other that is configured.
#[test]
fn one_peer_does_not_take_every_link() {
    let mut sim = Sim::new(3);
    let clock = sim.clock();
    for n in 0..100 {
        let id = SessionId(1_000 + n);
        let holder = Holder::Certificate(sim.nodes[1].identity.clone());
        assert!(sim.nodes[0].handle_open(
            id,
            Opening {
                holder,
                dialled: None,
                transport: Some(Transport::Tcp),
                group: "hybrid",
                handshake_ends: Millis(3_000)
            },
            clock.now
        ));
        let daemon = DaemonHello { name: "node-1".into(), incarnation: Incarnation(1_000 + n) };
        let hello = json(&Hello { ua: None, daemon: Some(daemon) });
        sim.nodes[0].handle_frame(id, Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 1, hello), None, clock);
    }
    sim.dial(2, 0);
    sim.run(100);
    assert_eq!(sim.nodes[2].peers_up(), 1);
    assert_eq!(sim.nodes[0].links.len(), crate::gossip::MAX_LINKS);
}

/// Caps change under traffic: nothing that was accepted is lost.
#[test]
fn caps_change_while_messages_flow() {
    let mut sim = Sim::with(6, |config| config.gossip.fanout = 5);
    sim.full_mesh();
    let subscribers: Vec<_> = (0..6).map(|node| sim.subscriber(node)).collect();
    let publisher = sim.publisher(0);
    for n in 0..40 {
        if n == 20 {
            sim.configure(|config| {
                config.gossip.fanout = 1;
                config.gossip.lane_depth_frames = 8;
                config.gossip.burst_frames = 64;
            });
        }
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
        sim.run(20);
    }
    sim.run(3_000);
    for (node, subscriber) in subscribers.into_iter().enumerate() {
        assert_eq!(texts(&sim.client_frames(node, subscriber)).len(), 40, "daemon {node}");
    }
}

/// I-9: a lower rate holds for sessions that are there, and a higher one too.
#[test]
fn a_rate_changes_for_sessions_that_are_there() {
    let mut sim = Sim::new(1);
    let publisher = sim.publisher(0);
    let three = |sim: &mut Sim| (0..3).for_each(|_| publish(sim, 0, publisher, 1, &Publish::Message("m".into())));
    sim.configure(|config| config.overlay.per_peer_rps = 1);
    three(&mut sim);
    assert_eq!(sim.rejected_after(0, Reason::Quota), 2, "one was left of what was saved up");
    sim.configure(|config| config.overlay.per_peer_rps = 200);
    sim.run(100);
    three(&mut sim);
    assert_eq!(sim.rejected_after(0, Reason::Quota), 2);
}

/// A scale-down: who is no longer configured keeps its session while it may be draining, and
/// loses it after. Who is configured anew at the free place is somebody else.
#[test]
fn a_peer_that_is_no_longer_configured_may_drain() {
    let mut sim = Sim::new(3);
    sim.full_mesh();
    let mut places = sim.nodes[0].places.clone();
    let left: Vec<_> = places.iter().filter(|(_, peer)| peer.name != "node-2").map(|(_, peer)| peer.clone()).collect();
    places.update(&left);
    let everyone = sim.nodes[0].places.clone();
    let clock = sim.clock();
    sim.nodes[0].handle_peers(places.clone(), clock);
    let subscriber = sim.subscriber(0);
    let publisher = sim.publisher(2);
    publish(&mut sim, 2, publisher, 1, &Publish::Message("still here".into()));
    sim.run(1_000);
    assert_eq!(texts(&sim.client_frames(0, subscriber)), ["still here"]);
    assert_eq!(sim.nodes[0].peers_up(), 2);
    sim.run(40_000);
    assert_eq!(sim.nodes[0].peers_up(), 1, "after drain delay and timeout it is closed");
    sim.dial(2, 0);
    sim.run(200);
    assert_eq!(sim.nodes[0].peers_up(), 1, "and a new session of it is no peer's");
    let clock = sim.clock();
    sim.nodes[0].handle_peers(everyone, clock);
    sim.run(200);
    assert_eq!(sim.nodes[0].peers_up(), 2, "until it is configured again");
    sim.cut(1, 2); // no way but this session
    let (subscriber, publisher) = (sim.subscriber(0), sim.publisher(2));
    publish(&mut sim, 2, publisher, 1, &Publish::Message("back".into()));
    sim.run(11_000);
    assert!(texts(&sim.client_frames(0, subscriber)).contains(&"back".to_owned()));
}

/// Taken out and put back while it may drain: the session goes on, past the time to drain too.
#[test]
fn a_peer_that_is_configured_again_keeps_its_session() {
    let mut sim = Sim::new(2);
    sim.full_mesh();
    let everyone = sim.nodes[0].places.clone();
    for places in [Places::default(), everyone] {
        let clock = sim.clock();
        sim.nodes[0].handle_peers(places, clock);
        sim.run(1_000);
        assert_eq!(sim.nodes[0].peers_up(), 1);
    }
    sim.run(60_000);
    assert!(sim.nodes[0].is_up(0) && sim.nodes[0].sessions.len() == 1);
}

/// The same name with another identity is another peer: its session goes, and its place is
/// free to be dialled.
#[test]
fn another_identity_is_another_peer() {
    let mut sim = Sim::new(2);
    sim.full_mesh();
    let everyone = sim.nodes[0].places.clone();
    let mut places = everyone.clone();
    let (_, peer) = everyone.iter().next().unwrap();
    let other = "spiffe://td/ns/a/overlaynode/other".parse().unwrap();
    places.update(&[crate::config::Peer { identity: other, ..peer.clone() }]);
    let clock = sim.clock();
    sim.nodes[0].handle_peers(places, clock);
    assert!(!sim.nodes[0].is_up(0), "at once, so that it is dialled");
    sim.run(100);
    assert_eq!((sim.nodes[0].peers_up(), sim.nodes[0].sessions.len()), (0, 0));
    let clock = sim.clock();
    sim.nodes[0].handle_peers(everyone, clock);
    sim.dial(0, 1);
    sim.run(200);
    assert!(sim.nodes[0].is_up(0));
}
