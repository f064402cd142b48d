//! COMP, ACK_REQ, Backoff and the frame budget, in whole daemons.

use super::sim::identity;
use super::*;
use crate::backoff::{GIVE_UP_MS, MOST_MS};
use crate::budget::{EXCESS_MS, FRAMES_AT_ONCE, FRAMES_PER_SECOND, FRAMES_PER_START};
use crate::frame::CHUNK;
use crate::record::Piece;

fn compressed(payload: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(zstd_safe::compress_bound(payload.len()));
    zstd_safe::compress(&mut out, payload, 3).unwrap();
    out.into()
}

fn request(flags: Flags, payload: Bytes) -> Frame {
    Frame::new(Flags::REQ | flags, AppProto::PUBSUB, TenantId(0), 3, payload)
}

/// What a client was answered from its `skip`th frame on: code, bytes, and whether with END.
fn answers(sim: &Sim, client: SessionId, skip: usize) -> Vec<(u16, usize, bool)> {
    let frames = sim.client_frames(0, client);
    frames.iter().skip(skip).map(|f| (f.code, f.payload.len(), f.flags.has(Flags::END))).collect()
}

/// COMP is outermost: what is stored, hashed and passed on is what was inflated, and what the
/// application encrypted in it is as it was.
#[test]
fn a_compressed_message_is_delivered_inflated() {
    let mut sim = Sim::new(1);
    let (subscriber, publisher) = (sim.subscriber(0), sim.publisher(0));
    let text = "text ".repeat(9);
    let record = Publish::Message(text.clone().into()).encode();
    sim.client_sends(0, publisher, request(Flags::COMP | Flags::APP_E2E, compressed(&record)));
    sim.run(20);
    assert_eq!(texts(&sim.client_frames(0, subscriber)), [text.as_str()]);
    let event = sim.client_frames(0, subscriber).pop().unwrap();
    assert!(event.flags.has(Flags::APP_E2E) && !event.flags.has(Flags::COMP));
    let [Record::Message { envelope, .. }] = &delivered(&[event])[..] else { panic!("no message") };
    assert_eq!((envelope.attributes, envelope.hash), (1, crate::gossip::digest(text.as_bytes())));
}

/// Z3, Z1: what cannot be inflated is refused on its stream, a message under way with it, each
/// with one answer; the stream and the session go on.
#[test]
fn z1_z3_a_payload_that_cannot_be_inflated_is_refused_once() {
    let mut sim = Sim::new(1);
    let publisher = sim.publisher(0);
    let payload: Bytes = vec![9; CHUNK + 1].into();
    let hash = crate::gossip::digest(&payload);
    publish(&mut sim, 0, publisher, 1, &Publish::Begin { size: 65_537, hash });
    sim.client_sends(0, publisher, request(Flags::COMP, Bytes::from_static(b"broken")));
    for piece in pieces(&payload, hash) {
        publish(&mut sim, 0, publisher, 1, &Publish::Piece(piece));
    }
    assert_eq!(sim.nodes[0].quota.inflight(), 0, "nothing is under way any more");
    let bomb = compressed(&Publish::Message(vec![0; CHUNK].into()).encode());
    sim.client_sends(0, publisher, request(Flags::COMP, bomb));
    publish(&mut sim, 0, publisher, 1, &Publish::Message("after".into()));
    sim.run(20);
    let codes: Vec<u16> = answers(&sim, publisher, 1).iter().map(|(code, ..)| *code).collect();
    assert_eq!(codes, [400, 413, 200]);
}

/// Z4: COMP before HELLO is answered is refused like anything else, and ends the session.
#[test]
fn z4_comp_before_hello_closes() {
    let mut sim = Sim::new(1);
    let hello = Hello::default();
    let early = sim.client_as(0, Holder::Local, &hello);
    let opening =
        Opening { holder: Holder::Local, dialled: None, transport: None, group: "none", handshake_ends: Millis(3_000) };
    let (late, now) = (SessionId(77), sim.clock().now);
    assert!(sim.nodes[0].handle_open(late, opening, now));
    let greeting = Frame::new(Flags::REQ | Flags::COMP, AppProto::CONTROL, TenantId(0), 1, compressed(&json(&hello)));
    assert!(sim.nodes[0].is_greeted(early) && !sim.nodes[0].is_greeted(late));
    sim.client_says(0, late, greeting, None);
    assert!(!sim.nodes[0].is_greeted(late));
    sim.run(5);
    assert!(!sim.nodes[0].sessions.contains_key(&late), "closed");
}

/// A START may be compressed, within the bound of a START.
#[test]
fn a_start_may_be_compressed() {
    let mut sim = Sim::new(1);
    let client = sim.client(0);
    let start = |corr_id, payload: &[u8]| {
        let flags = Flags::REQ | Flags::START | Flags::COMP;
        Frame::new(flags, AppProto::PUBSUB, TenantId(0), corr_id, compressed(payload))
    };
    let open = json(&Open::Publish { topic: TOPIC.parse().unwrap() });
    let grant = Some(sim.grant());
    sim.client_says(0, client, start(3, &open), grant.clone());
    sim.client_says(0, client, start(5, &[b'x'; 16_385]), grant);
    sim.run(5);
    assert_eq!(
        answers(&sim, client, 1).iter().map(|(code, _, end)| (*code, *end)).collect::<Vec<_>>(),
        [(200, false), (413, true)]
    );
}

/// ACK_REQ: behind the frame's own answer, the window of its stream; nobody's request.
#[test]
fn ack_req_is_answered_by_the_window() {
    let mut sim = Sim::new(1);
    let publisher = sim.publisher(0);
    let payload: Bytes = vec![9; CHUNK + 1].into();
    let hash = crate::gossip::digest(&payload);
    let mut asks = pieces(&payload, hash).map(Publish::Piece).collect::<Vec<_>>();
    asks.insert(0, Publish::Begin { size: 65_537, hash });
    asks.insert(0, Publish::Message("small".into()));
    asks.push(Publish::Piece(Piece { hash, index: 0, bytes: "x".into() }));
    for ask in &asks {
        sim.client_sends(0, publisher, request(Flags::ACK_REQ, ask.encode()));
    }
    sim.run(20);
    let windows: Vec<(u16, u32)> = sim.client_frames(0, publisher)[1..]
        .iter()
        .map(|f| (f.code, f.payload[..].try_into().map_or(0, u32::from_be_bytes)))
        .collect();
    let all = 1_048_576;
    let want = [(200, 0), (206, all), (206, all), (206, all - 65_536), (200, 0), (206, all), (400, 0), (206, all)];
    assert_eq!(windows, want);
    assert_eq!(sim.nodes[0].quota.inflight(), 0);
    sim.client_sends(0, publisher, request(Flags::ACK_REQ | Flags::END, Bytes::new()));
    sim.client_sends(0, publisher, request(Flags::ACK_REQ, Bytes::new()));
    sim.run(5);
    assert_eq!(answers(&sim, publisher, 1 + want.len()), [(200, 0, true)], "after END there is no window");

    let subscriber = sim.subscriber(0);
    sim.client_sends(0, subscriber, request(Flags::ACK_REQ, Bytes::new()));
    sim.run(5);
    let codes: Vec<u16> = answers(&sim, subscriber, 1).iter().map(|(code, ..)| *code).collect();
    assert_eq!(codes, [400], "a subscription takes no requests, so it has no window");
}

/// A daemon that dialled node 0 as its peer node-1, and answers nothing by itself.
struct FakePeer(SessionId);

impl FakePeer {
    fn new(sim: &mut Sim) -> Self {
        let daemon = DaemonHello { name: "node-1".into(), incarnation: Incarnation(99) };
        let hello = Hello { ua: None, daemon: Some(daemon) };
        Self(sim.client_as(0, Holder::Certificate(identity(1)), &hello))
    }

    fn starts(&self, sim: &Sim) -> Vec<Frame> {
        sim.client_frames(0, self.0).into_iter().filter(|frame| frame.flags.has(Flags::START)).collect()
    }

    /// Answers its latest START.
    fn answers(&self, sim: &mut Sim, code: u16, retry_after_ms: Option<u64>) {
        let start = self.starts(sim).pop().unwrap();
        let wait = retry_after_ms.map_or(String::new(), |ms| format!(",\"retry_after_ms\":{ms}"));
        let body = format!("{{\"code\":\"x\",\"message\":\"x\",\"retryable\":true,\"corr_id\":\"2\"{wait}}}");
        let flags = if code < 400 { Flags::RESP } else { Flags::RESP | Flags::END };
        let answer = Frame { code, ..Frame::new(flags, AppProto::GOSSIP, TenantId(0), start.corr_id, body.into()) };
        sim.client_says(0, self.0, answer, None);
    }

    fn state(&self, sim: &Sim) -> Option<State> {
        sim.nodes[0].sessions.get(&self.0).map(|entry| entry.session.state())
    }
}

/// C-3: 429 and 503 put the session into Backoff, which opens nothing and goes on reading and
/// delivering; it asks again after the delay, later each time, and in Active once accepted.
#[test]
fn a_refusal_for_now_is_waited_out_in_backoff() {
    let mut sim = Sim::new(2);
    let peer = FakePeer::new(&mut sim);
    sim.run(5);
    for (code, asked, least) in [(503, Some(2_000), 2_000), (429, None, 500), (429, Some(1), 1_000), (503, None, 2_000)]
    {
        let before = peer.starts(&sim).len();
        peer.answers(&mut sim, code, asked);
        assert_eq!(peer.state(&sim), Some(State::Backoff));
        let (subscriber, publisher) = (sim.subscriber(0), sim.publisher(0));
        publish(&mut sim, 0, publisher, 1, &Publish::Message("on".into()));
        sim.client_says(0, peer.0, Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 9, "hi".into()), None);
        sim.run(least - 11);
        assert_eq!((peer.starts(&sim).len(), peer.state(&sim)), (before, Some(State::Backoff)), "at least {least} ms");
        assert_eq!(texts(&sim.client_frames(0, subscriber)), ["on"]);
        assert_eq!(sim.client_frames(0, peer.0).pop().map(|f| (f.code, f.payload)), Some((200, "hi".into())));
        sim.run(least / 4 + 12);
        assert_eq!((peer.starts(&sim).len(), peer.state(&sim)), (before + 1, Some(State::Active)));
    }
    peer.answers(&mut sim, 200, None);
    sim.run(100);
    assert_eq!(peer.state(&sim), Some(State::Active));
    assert!(sim.client_frames(0, peer.0).iter().any(|f| f.app == AppProto::GOSSIP && !f.flags.has(Flags::START)));
}

/// C-3: refused without end, the session is closed, and a new one may do better.
#[test]
fn refused_for_too_long_the_session_closes() {
    let mut sim = Sim::with(2, |config| config.overlay.idle_timeout_ms = 3_600_000);
    let peer = FakePeer::new(&mut sim);
    sim.run(5);
    let (mut refused, mut waited) = (0, 0);
    while peer.state(&sim).is_some() {
        if peer.starts(&sim).len() > refused {
            refused += 1;
            peer.answers(&mut sim, 429, None);
        }
        sim.run(100);
        waited += 100;
        assert!(waited < 2 * GIVE_UP_MS);
    }
    assert!(waited >= GIVE_UP_MS && (9..20).contains(&refused), "{refused} in {waited} ms");
    assert_eq!((sim.nodes[0].sessions.len(), sim.nodes[0].links.len(), sim.rejected(0, Reason::Timeout)), (0, 0, 1));
}

/// F4: a peer that says never: clamped, and every timer of an hour fires.
#[test]
fn f4_retry_after_at_its_maximum_is_clamped() {
    for asked in [u64::MAX, u64::MAX - 1, 1 << 53, i64::MAX as u64] {
        let mut sim = Sim::with(2, |config| config.overlay.idle_timeout_ms = 3_600_000);
        let peer = FakePeer::new(&mut sim);
        sim.run(5);
        peer.answers(&mut sim, 503, Some(asked));
        sim.run(MOST_MS - 1);
        assert_eq!((peer.starts(&sim).len(), peer.state(&sim)), (1, Some(State::Backoff)));
        sim.run(MOST_MS / 4 + 2);
        assert_eq!((peer.starts(&sim).len(), peer.state(&sim)), (2, Some(State::Active)));
        let mut clock = sim.clock();
        for _ in 0..36_000 {
            clock.now = clock.now.after(100);
            sim.nodes[0].handle_timeout(clock);
            while sim.nodes[0].poll_transmit(clock.now).is_some() {}
        }
        clock.now = Millis(u64::MAX);
        sim.nodes[0].handle_timeout(clock);
    }
}

/// I-6, C-3: under pressure of its own a daemon opens nothing at its peers; what is open goes on.
#[test]
fn pressure_is_backoff() {
    let mut sim = Sim::new(2);
    sim.full_mesh();
    let states =
        |sim: &Sim| sim.nodes[0].links.values().map(|id| sim.nodes[0].sessions[id].session.state()).collect::<Vec<_>>();
    assert_eq!(states(&sim), [State::Active]);
    sim.nodes[0].handle_readiness(Report::default(), true);
    let (subscriber, publisher) = (sim.subscriber(0), sim.publisher(1));
    for n in 0..6 {
        sim.run(1_001);
        assert_eq!(states(&sim), [State::Backoff]);
        publish(&mut sim, 1, publisher, 1, &Publish::Message(format!("m{n}").into()));
    }
    sim.nodes[0].handle_readiness(Report::default(), false);
    sim.run(2_500);
    assert_eq!(states(&sim), [State::Active]);
    assert_eq!(texts(&sim.client_frames(0, subscriber)).len(), 6);
}

/// Sends as fast as the reader lets it, until the session is closed: how many frames were read,
/// and in how many milliseconds. An honest client publishes meanwhile, once a second.
fn flood(sim: &mut Sim, attacker: SessionId, most: u64, mut next: impl FnMut(u64) -> Frame) -> (u64, u64) {
    let (subscriber, publisher) = (sim.subscriber(0), sim.publisher(0));
    let (began, mut sent, mut read) = (sim.clock().now, 0, 0);
    while read < most && sim.nodes[0].sessions.contains_key(&attacker) {
        match sim.paused(0, attacker) {
            Some(until) if until > sim.clock().now => sim.run(1),
            _ => {
                let grant = Some(sim.grant());
                sim.client_says(0, attacker, next(read), grant);
                let _ = sim.rejected_after(0, Reason::Quota); // sends what there is to send
                read += 1;
            }
        }
        while sim.clock().now.since(began) / 1_000 > sent {
            publish(sim, 0, publisher, 1, &Publish::Message(format!("m{sent}").into()));
            sent += 1;
        }
    }
    sim.run(10);
    assert_eq!(texts(&sim.client_frames(0, subscriber)).len() as u64, sent, "H");
    (read, sim.clock().now.since(began))
}

/// What may be read of a flood: the budget, until the pauses have gone on for too long.
const MOST_READ: u64 = FRAMES_AT_ONCE as u64 + FRAMES_PER_SECOND as u64 * (EXCESS_MS + 1_000) / 1_000;

/// F6: ten million empty frames.
#[test]
fn f6_a_flood_of_empty_frames_is_throttled_then_closed() {
    for (flags, app) in
        [(Flags::REQ, AppProto::PUBSUB), (Flags::REQ, AppProto::CONTROL), (Flags::default(), AppProto::CONTROL)]
    {
        let mut sim = Sim::new(1);
        let attacker = sim.client(0);
        let (read, ms) =
            flood(&mut sim, attacker, 10_000_000, |n| Frame::new(flags, app, TenantId(0), 2 * n + 1, Bytes::new()));
        assert!(read <= MOST_READ && (EXCESS_MS..EXCESS_MS + 1_000).contains(&ms), "{read} frames in {ms} ms");
        let last = sim.client_frames(0, attacker).pop().unwrap();
        assert_eq!((last.code, last.corr_id, last.flags.has(Flags::END)), (429, 0, true));
    }
}

/// K6, P-2: a token costs a signature before its START is refused, so that STARTs which are
/// refused are throttled sooner than frames that cost nothing, and few are verified for one session.
#[test]
fn k6_starts_that_are_refused_are_throttled_sooner() {
    let mut sim = Sim::new(1);
    let attacker = sim.client(0);
    let (read, _) = flood(&mut sim, attacker, 1_000_000, |n| {
        Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), 3 + 2 * n, Bytes::new())
    });
    assert!(read <= MOST_READ / u64::from(FRAMES_PER_START) + EXCESS_MS / 100, "{read} STARTs");
}

/// F7: a million streams, opened and ended at once.
#[test]
fn f7_rapid_reset_is_capped_then_closed() {
    let mut sim = Sim::new(1);
    let attacker = sim.client(0);
    let open = json(&Open::Subscribe { topics: vec![TOPIC.parse().unwrap()] });
    let (read, _) = flood(&mut sim, attacker, 2_000_000, |n| {
        let corr_id = 3 + n / 2 * 2;
        let flags = if n % 2 == 0 { Flags::START } else { Flags::END };
        let payload = if n % 2 == 0 { open.clone() } else { Bytes::new() };
        Frame::new(Flags::REQ | flags, AppProto::PUBSUB, TenantId(0), corr_id, payload)
    });
    // An accepted START is none of it; the rate allows 200 a second.
    assert!(read <= MOST_READ + 200 * 13, "{read} frames");
    assert!(sim.nodes[0].subscriptions.is_empty() || sim.nodes[0].sessions.len() == 2, "only the honest are left");
    let accepted = sim.client_frames(0, attacker).iter().filter(|f| f.code == 200 && !f.flags.has(Flags::END)).count();
    assert!(accepted <= 200 * 13, "{accepted} were opened");
}

/// F7: a stream that never ends holds what one message may, and for as long as a chunk may take.
#[test]
fn f7_a_stream_that_never_ends_is_bounded() {
    let mut sim = Sim::new(1);
    let publisher = sim.publisher(0);
    publish(&mut sim, 0, publisher, 1, &Publish::Begin { size: 1_048_576, hash: [1; 32] });
    for index in 0..17 {
        let piece = Piece { hash: [1; 32], index, bytes: vec![0; CHUNK].into() };
        publish(&mut sim, 0, publisher, 1, &Publish::Piece(piece));
        sim.run(1_000);
    }
    let codes: Vec<u16> = answers(&sim, publisher, 1).iter().map(|(code, ..)| *code).collect();
    assert_eq!(codes, [400, 400], "not what was named; then a chunk of no message");
    assert_eq!(sim.nodes[0].quota.inflight(), 0);
}

/// What is taken is not counted: a client that only publishes is never paused.
#[test]
fn useful_frames_are_free() {
    let mut sim = Sim::with(1, |config| {
        config.overlay.rps = 1_000_000;
        config.overlay.per_peer_rps = 1_000_000;
    });
    let publisher = sim.publisher(0);
    for _ in 0..4 * FRAMES_AT_ONCE {
        publish(&mut sim, 0, publisher, 1, &Publish::Message("x".into()));
        let _ = sim.rejected_after(0, Reason::Quota);
    }
    assert_eq!((sim.paused(0, publisher), sim.rejected(0, Reason::Quota)), (None, 0));
}

/// F3: a START that is refused, whatever for, leaves no stream, and costs its sender only.
#[test]
fn f3_a_refused_start_leaves_no_stream() {
    let mut sim = Sim::new(1);
    let client = sim.client(0);
    let topics = vec!["news".parse().unwrap(); 65];
    for (n, payload) in [
        json(&Open::Subscribe { topics }),
        json(&Open::Subscribe { topics: vec![] }),
        Bytes::from(vec![b' '; 16_385]),
        Bytes::from_static(b"{\"op\":\"publish\",\"topic\":\"news\",\"more\":1}"),
        Bytes::from_static(b"{\"op\":\"nothing\"}"),
        Bytes::new(),
    ]
    .into_iter()
    .enumerate()
    {
        let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), 3 + 2 * n as u64, payload);
        let grant = Some(sim.grant());
        sim.client_says(0, client, start, grant);
        assert_eq!(sim.nodes[0].sessions[&client].session.streams().count(), 0);
    }
    sim.run(5);
    assert!(answers(&sim, client, 1).iter().all(|(code, _, end)| (*code, *end) == (400, true)));
    assert!(sim.nodes[0].subscriptions.is_empty());
}

/// F3, F7: refused for its header or for the number of streams, a START is answered with END like
/// any other; one that takes the number of an open stream does not end that.
#[test]
fn f3_a_refused_start_ends_what_it_began() {
    let mut sim = Sim::new(1);
    let client = sim.client(0);
    let open = json(&Open::Publish { topic: TOPIC.parse().unwrap() });
    let start = |corr_id, app| Frame::new(Flags::REQ | Flags::START, app, TenantId(0), corr_id, open.clone());
    let mut starts: Vec<Frame> = (0..257).map(|n| start(3 + 2 * n, AppProto::PUBSUB)).collect();
    starts.extend([start(3, AppProto::PUBSUB), start(4, AppProto::PUBSUB), start(1_001, AppProto(77))]);
    for (n, frame) in starts.into_iter().enumerate() {
        sim.run(if n % 30 == 0 { 1_000 } else { 0 }); // within the rate
        let grant = Some(sim.grant());
        sim.client_says(0, client, frame, grant);
    }
    sim.run(5);
    let answers: Vec<_> = answers(&sim, client, 1).iter().map(|(code, _, end)| (*code, *end)).collect();
    assert!(answers[..256].iter().all(|answer| *answer == (200, false)));
    assert_eq!(answers[256..], [(429, true), (400, false), (400, true), (400, true)]);
    assert_eq!(sim.nodes[0].sessions[&client].session.streams().count(), 256);
}

/// S6: a session whose numbers are used up closes in good order, and nothing is lost by it.
#[test]
fn s6_a_session_without_numbers_closes_and_another_takes_over() {
    let mut sim = Sim::new(2);
    sim.full_mesh();
    let subscriber = sim.subscriber(1);
    let publisher = sim.publisher(0);
    for node in &mut sim.nodes {
        for entry in node.sessions.values_mut() {
            let last = if entry.session.role() == Role::Dialler { u64::MAX } else { u64::MAX - 1 };
            entry.session.skip_to(last);
        }
    }
    for n in 0..4 {
        publish(&mut sim, 0, publisher, 1, &Publish::Message(format!("m{n}").into()));
        sim.run(5_100); // two pings
    }
    assert_eq!((sim.nodes[0].peers_up(), sim.nodes[1].peers_up()), (0, 0), "closed, on both sides");
    sim.dial(0, 1);
    sim.run(2_000);
    let mut got = texts(&sim.client_frames(1, subscriber));
    got.sort();
    assert_eq!(got, ["m0", "m1", "m2", "m3"]);
}
