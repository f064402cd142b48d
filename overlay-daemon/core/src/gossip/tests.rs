//! The engine against links that lie.

mod hostile;

use super::*;
use crate::config::Profile;
use crate::record::Envelope;

const TENANT: TenantId = TenantId(0);
const UNIX_MS: u64 = 1_700_000_000_000;

/// Takes everything.
#[derive(Default)]
struct Sent(Vec<(LinkId, Record)>);

impl Outlet for Sent {
    fn has_stream(&self, _: LinkId, _: TenantId) -> bool {
        true
    }
    fn room(&self, _: LinkId, _: TenantId, _: Class, _: Side) -> usize {
        usize::MAX
    }
    fn send(&mut self, link: LinkId, _: TenantId, _: (Class, Side), payload: Bytes) -> bool {
        self.0.extend(Record::decode(payload).map(|record| (link, record)));
        true
    }
    fn has_memory(&self, _: u64) -> bool {
        true
    }
}

/// An engine with an honest link and one that lies, and a message of two chunks.
fn scene() -> (Engine, LinkId, LinkId, Envelope, Bytes) {
    let identity: SpiffeId = "spiffe://example.org/ns/a/overlaynode/mesh".parse().unwrap();
    let me = Me { identity: identity.clone(), incarnation: Incarnation(1) };
    let mut engine = Engine::new(me, Gossip::defaults(Profile::Micronode), vec![TENANT], Millis(0));
    let liar = engine.handle_link_up(Millis(0)).unwrap();
    let honest = engine.handle_link_up(Millis(0)).unwrap();
    let payload = Bytes::from(vec![7; 70_000]);
    let envelope = Envelope {
        attributes: 0,
        topic: "news".parse().unwrap(),
        origin: identity,
        incarnation: Incarnation(2),
        sequence: 1,
        time_ms: UNIX_MS,
        size: 70_000,
        hash: digest(&payload),
    };
    (engine, honest, liar, envelope, payload)
}

/// Lets time pass; the honest link answers a Graft with the whole message. What was delivered.
fn run(engine: &mut Engine, honest: LinkId, envelope: &Envelope, payload: &Bytes, ms: u64) -> usize {
    let mut delivered = 0;
    for now in (1..=ms).map(Millis) {
        let mut out = Sent::default();
        engine.handle_timeout(now, &mut out);
        for (link, record) in out.0 {
            if link == honest && matches!(record, Record::Graft { chunks: 0, .. }) {
                for record in whole(envelope, payload) {
                    delivered += give(engine, honest, record, now).map_or(0, |deliveries| deliveries.len());
                }
            }
        }
    }
    delivered
}

fn whole(envelope: &Envelope, payload: &Bytes) -> Vec<Record> {
    let begin = Record::Begin { hops: 0, envelope: envelope.clone() };
    std::iter::once(begin).chain(pieces(payload, envelope.hash).map(Record::Piece)).collect()
}

fn give(engine: &mut Engine, link: LinkId, record: Record, now: Millis) -> Result<Vec<Delivery>, Reason> {
    engine.handle_record(link, TENANT, record, (UNIX_MS, now), &mut Sent::default())
}

/// I-4: a false chunk spoils what was put together, not the message.
#[test]
fn a_false_chunk_does_not_lose_the_message() {
    let (mut engine, honest, liar, envelope, payload) = scene();
    let mut records = whole(&envelope, &payload).into_iter();
    for record in records.by_ref().take(2) {
        assert_eq!(give(&mut engine, honest, record, Millis(0)).map(|d| d.len()), Ok(0));
    }
    let false_chunk = crate::record::Piece { hash: envelope.hash, index: 1, bytes: vec![8; 70_000 - 65_536].into() };
    let spoilt = give(&mut engine, liar, Record::Piece(false_chunk), Millis(0));
    assert_eq!(spoilt.map(|d| d.len()), Err(Reason::Protocol));
    for record in records {
        assert_eq!(give(&mut engine, honest, record, Millis(0)).map(|d| d.len()), Ok(0));
    }
    assert_eq!(run(&mut engine, honest, &envelope, &payload, 1_000), 1);
}

/// A Begin with another size has the same id, and waits for chunks that do not exist: the true one
/// is put together beside it.
#[test]
fn a_false_size_does_not_lose_the_message() {
    let (mut engine, honest, liar, envelope, payload) = scene();
    let large = Envelope { size: 1_048_576, ..envelope.clone() };
    assert!(give(&mut engine, liar, Record::Begin { hops: 0, envelope: large }, Millis(0)).is_ok());
    let delivered = whole(&envelope, &payload).into_iter().map(|record| give(&mut engine, honest, record, Millis(0)));
    assert_eq!(delivered.map(|given| given.unwrap().len()).sum::<usize>(), 1);
}
