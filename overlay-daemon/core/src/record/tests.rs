//! Every record survives its encoding; what is cut, stretched or out of bounds is none.

use super::*;

fn envelope(size: u32) -> Envelope {
    Envelope {
        attributes: 1,
        topic: "news".parse().unwrap(),
        origin: "spiffe://example.org/ns/a/overlaynode/mesh".parse().unwrap(),
        incarnation: Incarnation(7),
        sequence: 9,
        time_ms: 1_700_000_000_000,
        size,
        hash: [3; 32],
    }
}

fn all() -> Vec<Record> {
    let piece = Piece { hash: [4; 32], index: 2, bytes: Bytes::from_static(b"chunk") };
    vec![
        Record::Message { hops: 3, envelope: envelope(5), payload: Bytes::from_static(b"hello") },
        Record::Message { hops: 0, envelope: envelope(0), payload: Bytes::new() },
        Record::Begin { hops: 1, envelope: envelope(1_048_576) },
        Record::Piece(piece),
        Record::Gap { missed: 12 },
        Record::Announce(vec![MessageId([1; 32]), MessageId([2; 32])]),
        Record::Graft { id: MessageId([1; 32]), chunks: 0b101 },
        Record::Prune,
    ]
}

#[test]
fn records_survive_encoding() {
    for record in all() {
        assert_eq!(Record::decode(record.encode()).as_ref(), Some(&record));
    }
}

#[test]
fn a_record_cut_short_or_too_long_is_none() {
    for record in all() {
        let whole = record.encode();
        for cut in 0..whole.len() {
            let part = Record::decode(whole.slice(..cut));
            // A chunk or a list of ids may be shorter; it is then another record, never the same.
            assert_ne!(part.as_ref(), Some(&record), "{record:?} cut at {cut}");
        }
        let mut long = BytesMut::from(&whole[..]);
        long.put_u8(0);
        assert_ne!(Record::decode(long.freeze()), Some(record));
    }
}

/// I-3: bounds are checked before anything is kept.
#[test]
fn sizes_past_their_bounds_are_refused() {
    let mut message = BytesMut::from(&Record::Begin { hops: 0, envelope: envelope(65_537) }.encode()[..]);
    assert!(Record::decode(message.clone().freeze()).is_some());
    let size = message.len() - 36;
    message[size..size + 4].copy_from_slice(&1_048_577_u32.to_be_bytes());
    assert_eq!(Record::decode(message.clone().freeze()), None, "over 1 MiB");
    message[size..size + 4].copy_from_slice(&65_536_u32.to_be_bytes());
    assert_eq!(Record::decode(message.freeze()), None, "a Begin that should be a Message");
}

/// F8: what repeats is counted by its bytes before one of it is decoded; at its most it takes
/// no more room than it had on the wire.
#[test]
fn f8_announced_ids_are_counted_before_they_are_decoded() {
    let announce = |ids: usize| {
        let mut bytes = BytesMut::from(&[ANNOUNCE][..]);
        bytes.put_bytes(7, 32 * ids);
        bytes.freeze()
    };
    let Some(Record::Announce(ids)) = Record::decode(announce(MAX_ANNOUNCED)) else { panic!("{MAX_ANNOUNCED} ids") };
    assert_eq!((ids.len(), size_of::<MessageId>()), (MAX_ANNOUNCED, 32));
    assert!(ids.capacity() * size_of::<MessageId>() <= 2 * announce(MAX_ANNOUNCED).len());
    for ids in [0, MAX_ANNOUNCED + 1, 32_767] {
        assert_eq!(Record::decode(announce(ids)), None, "{ids} ids");
    }
}

/// F8: no record is longer than one whose names and payload are as long as they may be.
#[test]
fn f8_the_longest_record_is_a_message() {
    let origin = format!("spiffe://{}/ns/a/overlaynode/mesh", "d".repeat(MAX_ID - 31)).parse().unwrap();
    let topic = "t".repeat(MAX_TOPIC).parse().unwrap();
    let envelope = Envelope { topic, origin, ..envelope(CHUNK as u32) };
    let record = Record::Message { hops: 0, envelope, payload: vec![0; CHUNK].into() };
    assert_eq!(record.encode().len(), MAX_RECORD);
    let piece = Piece { hash: [0; 32], index: 0, bytes: vec![0; CHUNK].into() };
    assert_eq!(Publish::Piece(piece).encode().len(), MAX_PUBLISH);
}

#[test]
fn a_payload_is_cut_into_chunks_and_back() {
    for (size, want) in [(65_536, 0), (65_537, 2), (131_072, 2), (1_048_576, 16)] {
        let payload = Bytes::from(vec![7; size as usize]);
        assert_eq!(chunks(size), want);
        let joined: Vec<u8> = pieces(&payload, [0; 32]).flat_map(|p| p.bytes.to_vec()).collect();
        assert_eq!(joined, payload);
    }
}

#[test]
fn every_field_changes_the_id() {
    let base = envelope(5);
    let id = |e: &Envelope, t| e.id(TenantId(t));
    let changed = [
        Envelope { attributes: 0, ..base.clone() },
        Envelope { topic: "new".parse().unwrap(), ..base.clone() },
        Envelope { origin: "spiffe://example.org/ns/a/overlaynode/mesh/pod/a".parse().unwrap(), ..base.clone() },
        Envelope { incarnation: Incarnation(8), ..base.clone() },
        Envelope { sequence: 10, ..base.clone() },
        Envelope { time_ms: 0, ..base.clone() },
        Envelope { hash: [4; 32], ..base.clone() },
    ];
    for other in &changed {
        assert_ne!(id(&base, 0), id(other, 0), "{other:?}");
    }
    assert_ne!(id(&base, 0), id(&base, 1));
}
