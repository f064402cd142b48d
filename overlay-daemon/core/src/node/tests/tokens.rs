//! Streams and their tokens: when they end, and how they go on by another.

use std::sync::Arc;

use proptest::prelude::*;

use super::sim::{SIGNED_BY, UNIX_MS};
use super::*;
use crate::grant::{Action, Claims, SignedBy, TokenKey};
use crate::record::Piece;

const END: u16 = 1;

/// Code, corr_id and whether END stands, of every answer.
fn answers(frames: &[Frame]) -> Vec<(u16, u64, u16)> {
    let answers = frames.iter().filter(|frame| frame.flags.has(Flags::RESP));
    answers.map(|frame| (frame.code, frame.corr_id, u16::from(frame.flags.has(Flags::END)))).collect()
}

fn until(seconds: u64) -> impl Fn(&mut Claims) {
    move |claims| claims.exp = UNIX_MS / 1_000 + seconds
}

fn renewal(old: u64, new: u64) -> Frame {
    let open = json(&Open::Renew { stream: old });
    Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), new, open)
}

fn subscribe() -> Open {
    Open::Subscribe { topics: vec![TOPIC.parse().unwrap()] }
}

fn publishing() -> Open {
    Open::Publish { topic: TOPIC.parse().unwrap() }
}

/// Sends on the stream that is named; the simulator's own always sends on 3.
fn send(sim: &mut Sim, client: SessionId, corr_id: u64, record: &Publish) {
    let frame = Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(0), corr_id, record.encode());
    let clock = sim.clock();
    sim.nodes[0].handle_frame(client, frame, None, clock);
}

/// M1: a token's lists may be long, and no budget counts them: streams keep none.
#[test]
fn m1_a_stream_keeps_only_when_its_token_is_good() {
    let mut sim = Sim::new(1);
    let claims = Arc::new(sim.claims());
    let grant = || Grant::new(Arc::clone(&claims), SIGNED_BY, &claims.aud, &Holder::Local, UNIX_MS).unwrap();
    for open in [publishing(), subscribe()] {
        let client = sim.opened_by(0, &open, grant());
        sim.client_starts(0, client, renewal(3, 5), Some(grant()));
        sim.run(1);
        assert_eq!(answers(&sim.client_frames(0, client)), [(200, 3, 0), (200, 5, 0), (200, 3, END)]);
    }
    assert_eq!(Arc::strong_count(&claims), 1);
}

/// K1: a token that dies mid-stream cuts the stream, whatever it is for, at its time and not
/// before; nothing is kept of it.
#[test]
fn k1_expiry_cuts_every_kind_of_stream() {
    let mut sim = Sim::new(2);
    sim.peers_expire = UNIX_MS / 1_000 + 10;
    sim.dial(1, 0);
    sim.run(100);
    let grant = sim.granted(SIGNED_BY, until(10));
    let clients = [subscribe(), publishing()].map(|open| sim.opened_by(0, &open, grant.clone()));
    let gossip_in = |sim: &Sim| {
        let streams = sim.nodes[0].sessions.values().flat_map(|entry| entry.session.streams());
        streams.filter(|(_, stream)| matches!(stream.kind, Kind::GossipIn)).count()
    };
    let left = 9_999 - sim.clock().now.0;
    sim.run(left);
    assert_eq!((sim.nodes[0].leases.len(), gossip_in(&sim)), (3, 1), "a millisecond before");
    sim.run(1);
    assert_eq!((sim.nodes[0].leases.len(), gossip_in(&sim)), (0, 0));
    sim.run(1);
    for client in clients {
        assert_eq!(answers(&sim.client_frames(0, client)), [(200, 3, 0), (401, 3, END)]);
    }
    assert!(sim.nodes[0].subscriptions.is_empty());
    let publisher = clients[1];
    send(&mut sim, publisher, 3, &Publish::Message("late".into()));
    sim.run(10);
    assert_eq!(answers(&sim.client_frames(0, publisher)).len(), 2, "dropped: its sender could not know");
    sim.peers_expire = u64::MAX / 1_000;
    sim.run(15_000);
    assert_eq!(gossip_in(&sim), 1, "a peer asks again, by the token that it has then");
}

/// K1: what a reader had queued when its token died comes before the END, in full.
#[test]
fn k1_what_is_queued_comes_before_the_end() {
    let mut sim = Sim::new(1);
    let reader = sim.opened_by(0, &subscribe(), sim.granted(SIGNED_BY, until(10)));
    let publisher = sim.publisher(0);
    sim.stall(0, reader, true);
    let payload = Bytes::from(vec![5; 100_000]);
    let hash = crate::gossip::digest(&payload);
    publish(&mut sim, 0, publisher, 3, &Publish::Begin { size: 100_000, hash });
    pieces(&payload, hash).for_each(|piece| publish(&mut sim, 0, publisher, 3, &Publish::Piece(piece)));
    (0..20).for_each(|n| publish(&mut sim, 0, publisher, 3, &Publish::Message(format!("m{n}").into())));
    sim.run(10_100);
    sim.stall(0, reader, false);
    sim.run(100);
    let frames = sim.client_frames(0, reader);
    assert_eq!(delivered(&frames).len(), 3 + 20);
    assert_eq!(answers(&frames[frames.len() - 1..]), [(401, 3, END)], "the last of all");
}

/// K1: the system's clock steps. Forward past the expiry: ended within a second. Backward: by
/// that clock it goes on, and no deadline is lost.
#[test]
fn k1_a_stepped_clock_cuts_within_a_second() {
    for (step, ends_by_ms) in [(86_400_000, 1_001), (0, 10_001), (-5_000, 15_001)] {
        let mut sim = Sim::new(1);
        let reader = sim.opened_by(0, &subscribe(), sim.granted(SIGNED_BY, until(10)));
        sim.unix_zero = UNIX_MS.checked_add_signed(step).unwrap();
        let earlier = if step > 0 { 0 } else { ends_by_ms - 10 - sim.clock().now.0 };
        sim.run(earlier);
        assert_eq!(answers(&sim.client_frames(0, reader)), [(200, 3, 0)], "{step}");
        let rest = ends_by_ms - earlier;
        sim.run(rest);
        assert_eq!(answers(&sim.client_frames(0, reader)), [(200, 3, 0), (401, 3, END)], "{step}");
    }
}

/// K1: a key that is taken away takes its streams along, and theirs only; a START that was
/// verified before and handled after opens nothing.
#[test]
fn k1_a_key_that_is_removed_cuts_its_streams() {
    let mut sim = Sim::new(1);
    let other = SignedBy { key: TokenKey([8; 32]), ..SIGNED_BY };
    let grants = [SIGNED_BY, other].map(|by| sim.granted(by, |_| {}));
    let [removed, stays] = grants.clone().map(|grant| sim.opened_by(0, &subscribe(), grant));
    sim.nodes[0].handle_keys(2, [other.key].into());
    sim.run(1);
    assert_eq!(answers(&sim.client_frames(0, removed)), [(200, 3, 0), (401, 3, END)]);
    assert_eq!(answers(&sim.client_frames(0, stays)), [(200, 3, 0)]);
    assert_eq!(sim.rejected(0, Reason::Auth), 1);
    for (grant, want) in grants.into_iter().zip([401, 200]) {
        let late = sim.opened_by(0, &subscribe(), grant);
        assert_eq!(answers(&sim.client_frames(0, late))[0].0, want);
    }
    // Verified with a set of which word has not come yet.
    let newer = SignedBy { key: TokenKey([9; 32]), generation: 3 };
    let early = sim.opened_by(0, &subscribe(), sim.granted(newer, |_| {}));
    sim.nodes[0].handle_keys(3, [other.key, newer.key].into());
    sim.run(1);
    assert_eq!(answers(&sim.client_frames(0, early)), [(200, 3, 0)]);
}

/// A closed session and a closed stream leave no lease behind.
#[test]
fn leases_go_with_their_streams() {
    let mut sim = Sim::new(1);
    let ended = sim.subscriber(0);
    let closed = sim.publisher(0);
    assert_eq!(sim.nodes[0].leases.len(), 2);
    let end = Frame::new(Flags::REQ | Flags::END, AppProto::PUBSUB, TenantId(0), 3, Bytes::new());
    sim.client_sends(0, ended, end);
    assert_eq!(sim.nodes[0].leases.len(), 1);
    sim.nodes[0].handle_closed(closed);
    assert_eq!(sim.nodes[0].leases.len(), 0);
}

/// A renewed subscription misses nothing and gets nothing twice, whatever was queued; frames
/// under the old number come before its END, and the old token's expiry is nothing to it.
#[test]
fn a_subscription_is_renewed_without_a_break() {
    let mut sim = Sim::new(1);
    let reader = sim.opened_by(0, &subscribe(), sim.granted(SIGNED_BY, until(10)));
    let publisher = sim.publisher(0);
    sim.stall(0, reader, true);
    for n in 0..30 {
        publish(&mut sim, 0, publisher, 3, &Publish::Message(format!("m{n}").into()));
        sim.run(1);
        if n == 15 {
            let grant = sim.granted(SIGNED_BY, until(20));
            sim.client_starts(0, reader, renewal(3, 5), Some(grant));
        }
    }
    sim.run(11_000);
    sim.stall(0, reader, false);
    sim.run(100);
    let frames = sim.client_frames(0, reader);
    assert_eq!(texts(&frames), (0..30).map(|n| format!("m{n}")).collect::<Vec<_>>());
    assert_eq!(answers(&frames), [(200, 3, 0), (200, 5, 0), (200, 3, END)]);
    let over = frames.iter().position(|f| f.corr_id == 3 && f.flags.has(Flags::END)).unwrap();
    assert!(frames[over..].iter().all(|f| f.corr_id == 5 || f.flags.has(Flags::END)));
    sim.run(9_000);
    assert_eq!(answers(&sim.client_frames(0, reader)).last(), Some(&(401, 5, END)), "the new token's expiry");
}

/// The gap counter moves too.
#[test]
fn a_gap_is_told_on_the_renewed_stream() {
    let mut sim = Sim::with(1, |config| config.gossip.lane_depth_frames = 8);
    let (reader, publisher) = (sim.subscriber(0), sim.publisher(0));
    sim.stall(0, reader, true);
    for n in 0..20 {
        publish(&mut sim, 0, publisher, 3, &Publish::Message(format!("m{n}").into()));
        sim.run(1);
    }
    let grant = sim.grant();
    sim.client_starts(0, reader, renewal(3, 5), Some(grant));
    sim.stall(0, reader, false);
    sim.run(100);
    let frames = sim.client_frames(0, reader);
    let missed: u32 = delivered(&frames).iter().map(|r| if let Record::Gap { missed } = r { *missed } else { 0 }).sum();
    let messages = delivered(&frames).iter().filter(|r| matches!(r, Record::Message { .. })).count();
    assert_eq!(messages + missed as usize, 20);
    assert!(missed > 0 && frames.last().unwrap().corr_id == 5, "{missed}");
}

/// A publisher renews between the chunks of a message: it goes on with the next chunk, and the
/// answer comes where it ended.
#[test]
fn an_upload_goes_on_after_a_renewal() {
    let mut sim = Sim::new(1);
    let reader = sim.subscriber(0);
    let publisher = sim.opened_by(0, &publishing(), sim.granted(SIGNED_BY, until(10)));
    let payload = Bytes::from(vec![5; 200_000]);
    let hash = crate::gossip::digest(&payload);
    let chunks: Vec<Piece> = pieces(&payload, hash).collect();
    send(&mut sim, publisher, 3, &Publish::Begin { size: 200_000, hash });
    send(&mut sim, publisher, 3, &Publish::Piece(chunks[0].clone()));
    let grant = sim.granted(SIGNED_BY, until(60));
    sim.client_starts(0, publisher, renewal(3, 5), Some(grant));
    chunks[1..].iter().for_each(|chunk| send(&mut sim, publisher, 5, &Publish::Piece(chunk.clone())));
    sim.run(100);
    assert_eq!(answers(&sim.client_frames(0, publisher)), [(200, 3, 0), (200, 5, 0), (200, 3, END), (200, 5, 0)]);
    assert_eq!(delivered(&sim.client_frames(0, reader)).len(), 1 + chunks.len());
    assert_eq!(sim.nodes[0].quota.inflight(), 0);
}

/// F10, K2: a renewal that is refused leaves the old stream as it was.
#[test]
fn f10_a_refused_renewal_leaves_the_old_stream() {
    let other = TenantId(5);
    let renew = renewal;
    let end = |frame: Frame| Frame { flags: frame.flags | Flags::END, ..frame };
    type Change = fn(&mut Claims);
    let none: Change = |_| {};
    let table: [(&str, Frame, Change, u16); 8] = [
        ("another topic", renew(3, 5), |c| c.topics = vec!["other".into()], 403),
        ("another action", renew(3, 5), |c| c.actions = vec![Action::Publish], 403),
        ("another tenant's token", renew(3, 5), |c| c.tenants = vec![TenantId(5)], 403),
        ("another tenant", Frame { tenant: other, ..renew(3, 5) }, |c| c.tenants = vec![TenantId(5)], 400),
        ("another protocol", Frame { app: AppProto::GOSSIP, ..renew(3, 5) }, none, 400),
        ("no such stream", renew(1, 5), none, 404),
        ("itself", renew(5, 5), none, 404),
        ("that ends", end(renew(3, 5)), none, 400),
    ];
    for (case, start, change, want) in table {
        let mut sim = Sim::with(1, |config| config.overlay.tenants = vec![TenantId(0), TenantId(5)]);
        let reader = sim.subscriber(0);
        let publisher = sim.publisher(0);
        let grant = sim.granted(SIGNED_BY, change);
        sim.client_starts(0, reader, start, Some(grant));
        publish(&mut sim, 0, publisher, 3, &Publish::Message("still".into()));
        sim.run(10);
        let frames = sim.client_frames(0, reader);
        assert_eq!(answers(&frames), [(200, 3, 0), (want, 5, END)], "{case}");
        assert!(texts(&frames) == ["still"] && frames.iter().filter(|f| f.corr_id == 3).count() == 2, "{case}");
        assert_eq!(sim.nodes[0].leases.len(), 2, "{case}");
    }
}

/// F10: a stream's tenant is its START's. A frame that says another changes nothing, whoever it
/// is from and whatever its token allows: no delivery across tenants, and a message that is
/// sent on under another tenant is another message, which nobody accepted.
#[test]
fn f10_a_tenant_does_not_change_within_a_stream() {
    let tenants = [TenantId(0), TenantId(5)];
    let mut sim = Sim::with(2, |config| config.overlay.tenants = tenants.to_vec());
    sim.full_mesh();
    let both = sim.granted(SIGNED_BY, |claims| claims.tenants = vec![TenantId(0), TenantId(5)]);
    let readers = tenants.map(|tenant| {
        let client = sim.client(0);
        let open = json(&subscribe());
        let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, tenant, 3, open);
        sim.client_starts(0, client, start, Some(both.clone()));
        client
    });
    let received = |sim: &Sim| readers.map(|reader| texts(&sim.client_frames(0, reader)));
    // By a publisher whose token allows both tenants.
    let publisher = sim.opened_by(0, &publishing(), both.clone());
    let record = |text: &str| Publish::Message(text.to_owned().into()).encode();
    let clock = sim.clock();
    let relabelled = Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(5), 3, record("relabelled"));
    sim.nodes[0].handle_frame(publisher, relabelled, None, clock);
    sim.run(20);
    assert_eq!(answers(&sim.client_frames(0, publisher)), [(200, 3, 0), (400, 3, 0)]);
    assert_eq!(received(&sim), [vec![], Vec::<String>::new()]);
    send(&mut sim, publisher, 3, &Publish::Message("honest".into()));
    sim.run(20);
    assert_eq!(received(&sim), [vec!["honest".to_owned()], vec![]]);
    // By a peer, whose token is for tenant 0: neither on that stream nor on one of its own.
    let peer = sim.nodes[0].sessions.iter().find(|(_, entry)| entry.remote().is_some()).map(|(id, _)| *id).unwrap();
    let stream = sim.nodes[0].sessions[&peer].session.streams().find(|(_, s)| matches!(s.kind, Kind::GossipIn));
    let corr_id = stream.map(|(corr_id, _)| corr_id).unwrap();
    let event = sim.client_frames(0, readers[0]).iter().find(|f| f.flags.has(Flags::EVENT)).unwrap().payload.clone();
    let Some(Record::Message { envelope, payload, hops }) = Record::decode(event) else { panic!("a message") };
    let before = envelope.id(TenantId(0));
    assert_ne!(before, envelope.id(TenantId(5)), "the tenant is part of what a message is");
    let clock = sim.clock();
    for (tenant, corr_id) in [(5, corr_id), (5, 999)] {
        let record = Record::Message { hops, envelope: envelope.clone(), payload: payload.clone() }.encode();
        let frame = Frame::new(Flags::REQ, AppProto::GOSSIP, TenantId(tenant), corr_id, record);
        sim.nodes[0].handle_frame(peer, frame, None, clock);
    }
    sim.run(50);
    assert_eq!(received(&sim), [vec!["honest".to_owned()], vec![]]);
    assert_eq!(sim.nodes[0].sessions[&readers[1]].lanes.len(), 0);
    assert!(sim.rejected(0, Reason::Protocol) >= 2, "{}", sim.rejected(0, Reason::Protocol));
}

/// Peers renew their gossip streams when their token is rewritten: while messages flow, none
/// is lost, none comes twice, and the old streams are gone.
#[test]
fn gossip_streams_are_renewed_while_messages_flow() {
    let mut sim = Sim::new(2);
    sim.full_mesh();
    let (publisher, reader) = (sim.publisher(0), sim.subscriber(1));
    for n in 0..100 {
        if n % 20 == 10 {
            for node in 0..2 {
                sim.nodes[node].handle_token(format!("token {n}").into());
            }
        }
        publish(&mut sim, 0, publisher, 3, &Publish::Message(format!("m{n}").into()));
        sim.run(if n % 3 == 0 { 0 } else { 10 });
    }
    sim.run(10);
    assert_eq!(texts(&sim.client_frames(1, reader)), (0..100).map(|n| format!("m{n}")).collect::<Vec<_>>());
    sim.run(1_000);
    assert_eq!(texts(&sim.client_frames(1, reader)).len(), 100, "nor does it come again later");
    for node in &sim.nodes {
        let peer = node.sessions.values().find(|entry| entry.remote().is_some()).unwrap();
        assert_eq!(peer.session.streams().count(), 2, "one each way");
        let current = peer.session.streams().find(|(_, stream)| stream.ours).unwrap().1;
        assert!(matches!(current.kind, Kind::GossipOut { token: 5, renews: None }), "{current:?}");
    }
}

/// A renewal that a peer refuses for now: gossip goes on over the old stream, what was sent
/// ahead is repaired, and it is asked for again.
#[test]
fn a_refused_renewal_of_gossip_goes_back() {
    let mut sim = Sim::new(2);
    sim.full_mesh();
    let (publisher, reader) = (sim.publisher(0), sim.subscriber(1));
    sim.refuse_starts = true;
    sim.nodes[0].handle_token("another".into());
    for n in 0..20 {
        publish(&mut sim, 0, publisher, 3, &Publish::Message(format!("m{n}").into()));
        sim.run(1);
    }
    sim.run(2_000);
    let mut got = texts(&sim.client_frames(1, reader));
    got.sort_by_key(|text| text[1..].parse::<u32>().unwrap());
    assert_eq!(got, (0..20).map(|n| format!("m{n}")).collect::<Vec<_>>());
    sim.refuse_starts = false;
    sim.run(12_000);
    let peer = sim.nodes[0].sessions.values().find(|entry| entry.remote().is_some()).unwrap();
    let ours: Vec<_> = peer.session.streams().filter(|(_, stream)| stream.ours).map(|(_, s)| &s.kind).collect();
    assert!(matches!(ours[..], [Kind::GossipOut { token: 1, renews: None }]), "{ours:?}");
}

/// What may happen to a subscription and its reader.
#[derive(Clone, Copy, Debug)]
enum Step {
    Publish,
    PublishChunks,
    Stall(bool),
    Renew,
    Run(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Publish),
        1 => Just(Step::PublishChunks),
        2 => any::<bool>().prop_map(Step::Stall),
        2 => Just(Step::Renew),
        2 => (0..5_u64).prop_map(Step::Run),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// However publishing, reading and renewing interleave: every event comes once, messages of
    /// one size in their order, and none under a number that has had its END.
    #[test]
    fn renewals_lose_and_double_nothing(steps in steps()) {
        // A seventeenth renewal at once would be refused, and its stream go on.
        let mut sim = Sim::with(1, |config| config.overlay.per_peer_inflight = 512);
        let (reader, publisher) = (sim.subscriber(0), sim.publisher(0));
        let (mut published, mut uploads, mut current) = (0_u8, 0_usize, 3);
        for step in steps {
            match step {
                Step::Publish => {
                    publish(&mut sim, 0, publisher, 3, &Publish::Message(format!("m{published}").into()));
                    published += 1;
                }
                Step::PublishChunks => {
                    let payload = Bytes::from(vec![published; 70_000 + uploads]);
                    let hash = crate::gossip::digest(&payload);
                    let size = u32::try_from(payload.len()).unwrap();
                    publish(&mut sim, 0, publisher, 3, &Publish::Begin { size, hash });
                    pieces(&payload, hash).for_each(|piece| publish(&mut sim, 0, publisher, 3, &Publish::Piece(piece)));
                    uploads += 1;
                }
                Step::Stall(stalled) => sim.stall(0, reader, stalled),
                Step::Renew => {
                    let grant = sim.grant();
                    sim.client_starts(0, reader, renewal(current, current + 2), Some(grant));
                    current += 2;
                }
                Step::Run(ms) => sim.run(ms),
            }
        }
        sim.run(5);
        sim.stall(0, reader, false);
        sim.run(50);
        let frames = sim.client_frames(0, reader);
        let messages: Vec<String> = texts(&frames).into_iter().filter(|text| text.starts_with('m')).collect();
        prop_assert_eq!(messages, (0..published).map(|n| format!("m{n}")).collect::<Vec<_>>());
        let records = delivered(&frames);
        let count = |is: fn(&Record) -> bool| records.iter().filter(|record| is(record)).count();
        prop_assert_eq!(count(|r| matches!(r, Record::Begin { .. })), uploads);
        prop_assert_eq!(count(|r| matches!(r, Record::Piece(_))), 2 * uploads);
        let mut ended = Vec::new();
        for frame in frames {
            prop_assert!(!ended.contains(&frame.corr_id), "{:?}", frame);
            if frame.flags.has(Flags::END) {
                ended.push(frame.corr_id);
            }
        }
        prop_assert_eq!(ended, (3..current).step_by(2).collect::<Vec<_>>());
    }
}
