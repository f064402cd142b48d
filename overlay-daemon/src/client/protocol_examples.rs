//! `PROTOCOL.md` says what the code does: its examples are compared byte by byte, its limits
//! and timers number by number.

use bytes::Bytes;
use overlay_core::codec;
use overlay_core::config::{Overlay, Profile};
use overlay_core::control::{Hello, Incarnation, MAX_CONTROL, MAX_TOPICS, Open, json};
use overlay_core::frame::{AppProto, CHUNK, Flags, Frame, MAX_BODY, MAX_CAP, MAX_FRAME};
use overlay_core::gossip::{ANNOUNCE_MS, GRAFT_MS};
use overlay_core::identity::{MAX_ID, MAX_TOPIC, TenantId};
use overlay_core::lanes::LANE_BYTES;
use overlay_core::record::{Envelope, MAX_ANNOUNCED, Publish, Record};
use overlay_core::session::{MAX_PING, MAX_STREAMS};
use overlay_core::status::{Refusal, Status};

const TEXT: &str = include_str!("../../PROTOCOL.md");

fn request(flags: Flags, app: AppProto, corr_id: u64, payload: Bytes) -> Frame {
    Frame::new(flags, app, TenantId(0), corr_id, payload)
}

fn examples() -> [(&'static str, Frame); 7] {
    let hello = json(&Hello { ua: Some("example/1.0".into()), daemon: None });
    let open = Open::Subscribe { topics: vec!["news".parse().unwrap()] };
    let start = request(Flags::REQ | Flags::START, AppProto::PUBSUB, 3, json(&open));
    let renewal = request(Flags::REQ | Flags::START, AppProto::PUBSUB, 7, json(&Open::Renew { stream: 3 }));
    let payload = Bytes::from_static(b"hello");
    let publish = request(Flags::REQ, AppProto::PUBSUB, 5, Publish::Message(payload.clone()).encode());
    let envelope = Envelope {
        attributes: 0,
        topic: "news".parse().unwrap(),
        origin: "spiffe://overlay.local/ns/default/overlaynode/mesh".parse().unwrap(),
        incarnation: Incarnation(0x0123_4567_89ab_cdef),
        sequence: 1,
        time_ms: 1_700_000_000_000,
        size: 5,
        hash: blake3::hash(&payload).into(),
    };
    let id = Bytes::copy_from_slice(&envelope.id(TenantId(0)).0);
    let event = Record::Message { hops: 0, envelope, payload };
    let refusal =
        Refusal::new(Status::PayloadTooLarge, "a published message is at most 1 MiB; larger objects are for put");
    [
        ("hello", request(Flags::REQ, AppProto::CONTROL, 1, hello)),
        ("subscribe", Frame { cap: Bytes::from_static(b"header.claims.signature"), ..start }),
        ("renew", Frame { cap: Bytes::from_static(b"header.claims.signature"), ..renewal }),
        ("accepted", Frame::response(&publish, 200, false, id)),
        ("refused", Frame::response(&publish, 413, false, refusal.body(5))),
        ("event", request(Flags::EVENT, AppProto::PUBSUB, 3, event.encode())),
        ("publish", publish),
    ]
}

/// 32 bytes a line, as the page has them.
fn hex(bytes: &[u8]) -> String {
    let line = |chunk: &[u8]| chunk.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    bytes.chunks(32).map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn examples_are_what_is_sent() {
    let example = |(name, frame): (_, Frame)| {
        format!("<!-- example: {name} -->\n```text\n{}\n```\n", hex(&codec::encoded(&frame).unwrap()))
    };
    let differ: String = examples().map(example).into_iter().filter(|want| !TEXT.contains(want)).collect();
    assert!(differ.is_empty(), "PROTOCOL.md differs; it must say:\n{differ}");
    assert_eq!(TEXT.matches("<!-- example: ").count(), examples().len());
}

fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group));
    groups.collect::<Vec<_>>().join(",")
}

#[test]
fn limits_and_timers_are_those_of_the_code() {
    let timers = Overlay::defaults(Profile::Micronode, "127.0.0.1:0".parse().unwrap());
    let ms = |ms: u64| usize::try_from(ms).unwrap();
    for (row, value) in [
        ("bytes of a frame", MAX_FRAME),
        ("bytes of a token", MAX_CAP),
        ("bytes of a JSON payload", MAX_CONTROL),
        ("bytes of a chunk", CHUNK),
        ("bytes of a message", MAX_BODY),
        ("bytes of a topic", MAX_TOPIC),
        ("bytes of a SPIFFE id", MAX_ID),
        ("bytes of a ping", MAX_PING),
        ("topics of a subscription", MAX_TOPICS),
        ("streams that one side has open in a session", MAX_STREAMS),
        ("ids of an announcement", MAX_ANNOUNCED),
        ("bytes that wait in one queue of a session (there are three)", LANE_BYTES),
        ("from accept to HELLO answered, TLS included (`handshake_timeout_ms`)", ms(timers.handshake_timeout_ms)),
        (
            "from a frame's first byte to its last, and from a publisher's Begin or chunk to its next chunk (`read_timeout_ms`)",
            ms(timers.read_timeout_ms),
        ),
        (
            "queued bytes must leave, 65,536 of them or all that is queued (`write_timeout_ms`)",
            ms(timers.write_timeout_ms),
        ),
        ("without a frame either way the session ends (`idle_timeout_ms`)", ms(timers.idle_timeout_ms)),
        ("announcements wait for company, at most", ms(ANNOUNCE_MS)),
        ("without progress, the missing chunks of a begun message are asked for by Graft", ms(GRAFT_MS)),
    ] {
        let want = format!("| {row} | {} |", grouped(value));
        assert!(TEXT.contains(&want), "PROTOCOL.md must say: {want}");
    }
    for status in Status::ALL {
        let want = format!("| {} | `{}` |", status.code(), status.name());
        assert!(TEXT.contains(&want), "PROTOCOL.md must say: {want}");
    }
}
