//! Links that know the protocol and use it against the others.

use super::*;
use crate::gossip::wanted::Key;

const OTHER: TenantId = TenantId(9);

/// An engine with so many links, which carries two tenants.
fn engine(links: usize) -> (Engine, Vec<LinkId>) {
    let identity: SpiffeId = "spiffe://example.org/ns/a/overlaynode/mesh".parse().unwrap();
    let me = Me { identity, incarnation: Incarnation(1) };
    let mut engine = Engine::new(me, Gossip::defaults(Profile::Micronode), vec![TENANT, OTHER], Millis(0));
    let links = (0..links).map(|_| engine.handle_link_up(Millis(0)).unwrap()).collect();
    (engine, links)
}

fn message(sequence: u64) -> (Envelope, Bytes) {
    let payload = Bytes::from(format!("message {sequence}"));
    let envelope = Envelope {
        attributes: 0,
        topic: "news".parse().unwrap(),
        origin: "spiffe://example.org/ns/a/overlaynode/origin".parse().unwrap(),
        incarnation: Incarnation(2),
        sequence,
        time_ms: UNIX_MS,
        size: u32::try_from(payload.len()).unwrap(),
        hash: digest(&payload),
    };
    (envelope, payload)
}

fn announce(engine: &mut Engine, link: LinkId, tenant: TenantId, ids: &[MessageId], now: Millis) {
    for ids in ids.chunks(crate::record::MAX_ANNOUNCED) {
        let record = Record::Announce(ids.to_vec());
        engine.handle_record(link, tenant, record, (UNIX_MS, now), &mut Sent::default()).unwrap();
    }
}

/// Lets time pass. Who was asked for what, of the links that `counts`.
fn asked(engine: &mut Engine, (from, to): (u64, u64), link: LinkId) -> Vec<Key> {
    let mut asks = Vec::new();
    for now in (from..to).map(Millis) {
        let mut out = Tenants::default();
        engine.handle_timeout(now, &mut out);
        asks.extend(out.0.into_iter().filter_map(|(to, tenant, record)| match record {
            Record::Graft { id, .. } if to == link => Some((tenant, id)),
            _ => None,
        }));
    }
    asks
}

/// Takes everything, and notes for which tenant.
#[derive(Default)]
struct Tenants(Vec<(LinkId, TenantId, Record)>);

impl Outlet for Tenants {
    fn has_stream(&self, _: LinkId, _: TenantId) -> bool {
        true
    }
    fn room(&self, _: LinkId, _: TenantId, _: Class, _: Side) -> usize {
        usize::MAX
    }
    fn send(&mut self, link: LinkId, tenant: TenantId, _: (Class, Side), payload: Bytes) -> bool {
        self.0.extend(Record::decode(payload).map(|record| (link, tenant, record)));
        true
    }
    fn has_memory(&self, _: u64) -> bool {
        true
    }
}

/// F10, G1: an id that a link announces for another tenant does not keep the message from being
/// asked for where it is.
#[test]
fn f10_an_id_announced_for_another_tenant_is_asked_for_all_the_same() {
    let (mut engine, links) = engine(2);
    let id = message(1).0.id(TENANT);
    announce(&mut engine, links[0], OTHER, &[id], Millis(0));
    announce(&mut engine, links[1], TENANT, &[id], Millis(1));
    assert_eq!(asked(&mut engine, (2, 1_000), links[1]).first(), Some(&(TENANT, id)));
}

/// G3, G5: as many links that announce and never give as there may be, and silent at that: the
/// one that would give is asked before the message is given up.
#[test]
fn g5_silent_holders_do_not_outlast_the_patience() {
    let (mut engine, links) = engine(MAX_LINKS);
    let id = message(1).0.id(TENANT);
    links.iter().for_each(|link| announce(&mut engine, *link, TENANT, &[id], Millis(0)));
    assert!(!asked(&mut engine, (1, 30_000), links[MAX_LINKS - 1]).is_empty());
    asked(&mut engine, (30_000, 60_000), links[0]);
    assert_eq!((engine.counts().lost, engine.wanted.next()), (1, None), "and is given up in the end");
}

/// G3: what a link announced counts against it no longer than it lives: the next link of its
/// number is heard.
#[test]
fn g3_a_link_does_not_inherit_anothers_quota() {
    let (mut engine, links) = engine(2);
    let ids: Vec<MessageId> = (0..8_192).map(|n| message(n).0.id(TENANT)).collect();
    links.iter().for_each(|link| announce(&mut engine, *link, TENANT, &ids, Millis(0)));
    engine.handle_link_down(links[0]);
    let next = engine.handle_link_up(Millis(1)).unwrap();
    assert_eq!(next, links[0]);
    let id = message(100_000).0.id(TENANT);
    announce(&mut engine, next, TENANT, &[id], Millis(2));
    assert_eq!(asked(&mut engine, (3, 1_000), next).first(), Some(&(TENANT, id)));
}

/// What a link is sent of a record's kind, while the engine is given `record` by `from`.
fn give_and_take(engine: &mut Engine, from: LinkId, record: Record, now: Millis) -> Vec<(LinkId, TenantId, Record)> {
    let mut out = Tenants::default();
    let _ = engine.handle_record(from, TENANT, record, (UNIX_MS, now), &mut out);
    out.0
}

/// G3: the same message asked for a thousand times is sent three times, chunked or not; who asks
/// again much later, having had no room, is sent it again.
#[test]
fn g3_the_same_request_a_thousand_times_is_answered_three_times() {
    for payload in [Bytes::from_static(b"small"), Bytes::from(vec![7; 200_000])] {
        let (mut engine, links) = engine(3);
        let hash = digest(&payload);
        let draft = Draft { tenant: TENANT, topic: "news".parse().unwrap(), attributes: 0, payload, hash };
        let held = engine.publish(draft, UNIX_MS, Millis(0), &mut Tenants::default()).unwrap();
        let ask = |engine: &mut Engine, link, chunks, now| {
            let sent = give_and_take(engine, link, Record::Graft { id: held.id, chunks }, Millis(now));
            sent.iter().filter(|(_, _, record)| !matches!(record, Record::Prune)).count()
        };
        let frames: usize = (0..1_000).map(|now| ask(&mut engine, links[0], 0, now)).sum();
        assert_eq!(frames, 3 * held.frames.len());
        assert_eq!((1..8).map(|chunks| ask(&mut engine, links[0], chunks, 1_000)).sum::<usize>(), 0);
        assert_eq!(ask(&mut engine, links[1], 0, 1_000), held.frames.len(), "another link's are its own");
        assert_eq!(ask(&mut engine, links[0], 0, 5_001), held.frames.len());
        engine.handle_dropped(links[1], Millis(5_002));
        assert_eq!((0..4).map(|_| ask(&mut engine, links[1], 0, 5_003)).sum::<usize>(), 3 * held.frames.len());
    }
}

/// G1, G7: a link that passes a message on as if it had gone round almost too often does not keep
/// it from those behind this daemon: it goes on once another link shows it with fewer hops, be it
/// by pushing it or, asked, after an announcement.
#[test]
fn g7_too_many_hops_said_by_one_do_not_end_a_message() {
    for announced in [false, true] {
        let (mut engine, links) = engine(3);
        let (envelope, payload) = message(1);
        let id = envelope.id(TENANT);
        let most = engine.config.max_hops;
        let by = |hops| Record::Message { hops, envelope: envelope.clone(), payload: payload.clone() };
        let mut out = Tenants::default();
        let got = engine.handle_record(links[0], TENANT, by(most - 1), (UNIX_MS, Millis(1)), &mut out).unwrap();
        assert_eq!((got.len(), out.0.len()), (1, 0), "delivered here, and not passed on");
        if announced {
            announce(&mut engine, links[1], TENANT, &[id], Millis(2));
            assert_eq!(asked(&mut engine, (3, 1_000), links[1]).first(), Some(&(TENANT, id)));
        }
        let mut out = Tenants::default();
        let again = engine.handle_record(links[1], TENANT, by(0), (UNIX_MS, Millis(1_000)), &mut out).unwrap();
        assert!(again.is_empty(), "not delivered twice");
        assert_eq!(out.0, [(links[2], TENANT, by(1))]);
        assert!(give_and_take(&mut engine, links[1], by(0), Millis(1_001)).iter().all(|(_, _, r)| *r == Record::Prune));
        assert_eq!(asked(&mut engine, (1_002, 3_000), links[1]), []);
    }
}

/// The same where nobody is pushed to: those who were told of all that is held are told of it.
#[test]
fn g7_what_goes_on_late_is_announced() {
    let (mut engine, links) = engine(3);
    for link in &links {
        engine.links.make_lazy(*link);
    }
    let (envelope, payload) = message(1);
    let by = |hops| Record::Message { hops, envelope: envelope.clone(), payload: payload.clone() };
    let most = engine.config.max_hops;
    give_and_take(&mut engine, links[0], by(most - 1), Millis(1));
    let mut out = Tenants::default();
    (2..1_000).for_each(|now| engine.handle_timeout(Millis(now), &mut out));
    assert_eq!(out.0, []);
    give_and_take(&mut engine, links[1], by(0), Millis(1_000));
    (1_000..2_000).for_each(|now| engine.handle_timeout(Millis(now), &mut out));
    assert_eq!(out.0, [(links[2], TENANT, Record::Announce(vec![envelope.id(TENANT)]))]);
}

/// A message of two chunks, and what its holder sends of it.
fn chunked() -> (Envelope, Vec<Record>) {
    let payload = Bytes::from(vec![7; 70_000]);
    let envelope = Envelope { size: 70_000, hash: digest(&payload), ..message(1).0 };
    let records = whole(&envelope, &payload);
    (envelope, records)
}

/// G1: a link that knows a chunked message before the others do, and begins it, of the true size
/// or another, with false chunks, whenever it may: the true message arrives, from a link that
/// answers what it is asked.
#[test]
fn g1_false_chunks_do_not_keep_a_message_out() {
    for sizes in [vec![70_000], vec![1_048_576], vec![70_000, 1_048_576, 80_000]] {
        let (mut engine, links) = engine(3);
        let (envelope, records) = chunked();
        let mut delivered = 0;
        let mut owed = Vec::new();
        for now in (1..5_000).map(Millis) {
            for liar in &links[..2] {
                let size = sizes[now.0 as usize % sizes.len()];
                let begin = Record::Begin { hops: 0, envelope: Envelope { size, ..envelope.clone() } };
                let piece = |index, len| {
                    let bytes = vec![8; len].into();
                    Record::Piece(crate::record::Piece { hash: envelope.hash, index, bytes })
                };
                for record in [begin, piece(0, 65_536), piece(1, 4_464), piece(1, 65_536)] {
                    let _ = give(&mut engine, *liar, record, now);
                }
            }
            if now == Millis(1) {
                announce(&mut engine, links[2], TENANT, &[envelope.id(TENANT)], now);
            }
            if let Some(record) = owed.pop() {
                delivered += give(&mut engine, links[2], record, now).map_or(0, |given| given.len());
            }
            let mut out = Sent::default();
            engine.handle_timeout(now, &mut out);
            let asks = out.0.iter().filter(|(link, _)| *link == links[2]);
            if asks.filter(|(_, record)| matches!(record, Record::Graft { chunks: 0, .. })).count() > 0 {
                owed = records.iter().rev().cloned().collect();
            }
        }
        assert_eq!(delivered, 1, "{sizes:?}");
        assert_eq!(engine.assemblies.bytes(), 0);
    }
}

/// G1: links that begin as many messages as they may and send no chunk: one that has something to
/// send finds a place, and they no second one for it.
#[test]
fn g1_links_that_begin_much_leave_places_for_others() {
    let (mut engine, links) = engine(8);
    let begin = |engine: &mut Engine, link, n| {
        let envelope = Envelope { size: 70_000, ..message(n).0 };
        give(engine, link, Record::Begin { hops: 0, envelope }, Millis(n))
    };
    for n in 1..500 {
        links[1..].iter().for_each(|liar| drop(begin(&mut engine, *liar, n * 10 + u64::from(*liar == links[1]))));
    }
    let (_, records) = chunked();
    let given: Vec<usize> =
        records.into_iter().map(|record| give(&mut engine, links[0], record, Millis(9_999)).unwrap().len()).collect();
    assert_eq!(given, [0, 0, 1]);
    assert!(engine.assemblies.bytes() <= 64 * 70_000);
}

/// M1: what is remembered of messages counts as memory and is bounded in bytes, however long the
/// names in them are.
#[test]
fn m1_what_is_remembered_is_bounded_in_bytes() {
    let (mut engine, links) = engine(2);
    engine.handle_config(&Gossip { dedupe_entries: 1_024, store_bytes: 1 << 20, ..engine.config.clone() });
    let mut most = 0;
    for n in 1..=5_000 {
        let (envelope, payload) = message(n);
        let origin = format!("spiffe://example.org/ns/a/overlaynode/{}{n:04}", "x".repeat(2_000)).parse().unwrap();
        let envelope = Envelope { origin, topic: "y".repeat(255).parse().unwrap(), ..envelope };
        let record = Record::Message { hops: 0, envelope, payload };
        assert_eq!(give(&mut engine, links[0], record, Millis(n)).unwrap().len(), 1);
        most = most.max(engine.memory());
    }
    assert!(((8 << 20)..(10 << 20)).contains(&most), "held, remembered, and of origins: {most}");
    assert!((150..250).contains(&engine.store.remembered()), "of 2.6 KiB each: {}", engine.store.remembered());
    (0..400).for_each(|n| engine.handle_timeout(Millis(5_000 + n * 1_000), &mut Sent::default()));
    assert_eq!((engine.memory(), engine.store.remembered()), (0, 0));
}
