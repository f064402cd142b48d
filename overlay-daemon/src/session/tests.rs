//! Sessions over pipes in memory, with the hub that a daemon runs: what the reader inflates, and
//! when it reads nothing.

mod slow;

use overlay_core::config::{DaemonConfig, FORMAT, KeyExchange, PeersConfig, Profile};
use overlay_core::control::{Hello, Incarnation, Open, json};
use overlay_core::frame::AppProto;
use overlay_core::identity::TenantId;
use overlay_core::node::Node;
use overlay_core::record::{Piece, Publish, Record};
use tokio::io::DuplexStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::hub::{Heartbeat, Hub, Judged, Peers, QUEUE};
use crate::kms::Keys;
use crate::kms::authority::{Authority, LeafOptions, TokenRoot, Volume, local_claims};
use crate::transport::TransportConfig;

/// A daemon without listeners, and a token that it believes.
struct Bench {
    context: Context,
    token: Bytes,
    judged: watch::Sender<Judged>,
    tasks: JoinSet<()>,
}

impl Bench {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut DaemonConfig)) -> Self {
        let (clock, root) = (Clock::start(), TokenRoot::new());
        let volume = Volume::new(&Volume::files(&Authority::new(), &root, LeafOptions::default()));
        let (tls, token) = volume.config(KeyExchange::RequireHybrid);
        let keys = Keys::load(&tls, &token, clock.unix_ms()).unwrap();
        let any = "127.0.0.1:1".parse().unwrap();
        let mut config = DaemonConfig::with_defaults(Profile::Micronode, any, any, tls, token, "s".into());
        change(&mut config);
        let peers = PeersConfig { format: FORMAT, name: "mesh-0".into(), peers: Vec::new() };
        let identity = keys.current().identity().clone();
        let node = Node::new(config.clone(), &peers, identity, Incarnation(7), clock.now());
        let metrics = Arc::new(Metrics::new(true, "").unwrap());
        let ((hub, inputs), (sender, sent)) = (mpsc::channel(QUEUE), mpsc::channel(QUEUE));
        let heartbeat = watch::channel(Heartbeat::default()).0;
        let timing = Timing::from(TransportConfig::tcp(&config));
        let context = Context::new(hub, sender, keys.verifier(), timing, clock, Arc::clone(&metrics));
        let reading = context.reading.clone();
        let (judged, is_judged) = watch::channel(Judged::default());
        let peers = Peers::default();
        let hub = Hub { node, clock, metrics, reading, peers, inputs, sent, judged: is_judged, heartbeat };
        let mut tasks = JoinSet::new();
        tasks.spawn(hub.run(CancellationToken::new()));
        let mut claims = local_claims();
        claims["exp"] = 4_000_000_000_u64.into();
        claims["nbf"] = 0.into();
        Self { context, token: root.mint(&claims).into(), judged, tasks }
    }

    fn connect(&mut self) -> Client {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let context = self.context.clone();
        self.tasks.spawn(async move {
            let handshake_ends = context.clock.now().after(3_000);
            let opening =
                Opening { holder: Holder::Local, dialled: None, transport: None, group: "none", handshake_ends };
            context.run(theirs, opening, None, std::future::pending()).await;
        });
        Client { stream: ours, inbox: BytesMut::new() }
    }
}

struct Client {
    stream: DuplexStream,
    inbox: BytesMut,
}

impl Client {
    async fn send(&mut self, frame: &Frame) -> bool {
        self.stream.write_all(&codec::encoded(frame).unwrap()).await.is_ok()
    }

    /// The next frame, or nothing once the daemon has closed.
    async fn receive(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = codec::decode(&mut self.inbox).unwrap() {
                return Some(frame);
            }
            if !matches!(self.stream.read_buf(&mut self.inbox).await, Ok(1..)) {
                return None;
            }
        }
    }

    /// Sends the same frame over and over, and reads until the daemon has closed: how many were
    /// taken. What it answered is in the inbox.
    async fn flood(&mut self, bytes: Bytes) -> usize {
        let (mut read, mut write) = tokio::io::split(&mut self.stream);
        let sends = async {
            let mut sent = 0;
            while sent < 300_000 && write.write_all(&bytes).await.is_ok() {
                sent += 1;
            }
            sent
        };
        let reads = async { while matches!(read.read_buf(&mut self.inbox).await, Ok(1..)) {} };
        tokio::join!(sends, reads).0
    }

    async fn ask(&mut self, frame: &Frame) -> u16 {
        self.send(frame).await;
        self.receive().await.map_or(0, |answer| answer.code)
    }
}

fn frame(flags: Flags, app: AppProto, corr_id: u64, payload: Bytes) -> Frame {
    Frame::new(Flags::REQ | flags, app, TenantId(0), corr_id, payload)
}

fn hello() -> Frame {
    frame(Flags::default(), AppProto::CONTROL, 1, json(&Hello::default()))
}

fn compressed(payload: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(zstd_safe::compress_bound(payload.len()));
    zstd_safe::compress(&mut out, payload, 3).unwrap();
    out.into()
}

/// C-5: what is counted of a route is its requests: a message in chunks is one, an END is none.
#[tokio::test(start_paused = true)]
async fn a_message_is_one_request() {
    let mut bench = Bench::new();
    let token = bench.token.clone();
    let mut client = bench.connect();
    assert_eq!(client.ask(&hello()).await, 200);
    let start = frame(Flags::START, AppProto::PUBSUB, 3, json(&Open::Publish { topic: "news".parse().unwrap() }));
    assert_eq!(client.ask(&Frame { cap: token.clone(), ..start }).await, 200);
    let publish = |record: Publish| frame(Flags::default(), AppProto::PUBSUB, 3, record.encode());
    assert_eq!(client.ask(&publish(Publish::Message("small".into()))).await, 200);
    let payload = vec![7; 65_537];
    let hash = *blake3::hash(&payload).as_bytes();
    client.send(&publish(Publish::Begin { size: 65_537, hash })).await;
    for (index, bytes) in (0..).zip(payload.chunks(65_536).map(Bytes::copy_from_slice)) {
        client.send(&publish(Publish::Piece(Piece { hash, index, bytes }))).await;
    }
    assert_eq!(client.receive().await.map_or(0, |answer| answer.code), 200);
    let renewal = frame(Flags::START, AppProto::PUBSUB, 5, json(&Open::Renew { stream: 3 }));
    assert_eq!(client.ask(&Frame { cap: token, ..renewal }).await, 200);
    assert_eq!(client.receive().await.map_or(0, |end| end.corr_id), 3);
    assert_eq!(client.ask(&frame(Flags::END, AppProto::PUBSUB, 5, Bytes::new())).await, 200);
    let text = String::from_utf8(bench.context.metrics.render().unwrap()).unwrap();
    for (route, count) in [("hello", 1), ("publish", 3), ("renew", 1), ("ping", 0)] {
        let line = format!("request_latency_seconds_count{{route=\"{route}\",amnesia=\"on\"}} {count}\n");
        assert!(text.contains(&line), "{line}{text}");
    }
}

/// COMP from the byte that is read to the subscriber that gets it, and a frame that HELLO's
/// answer allowed is never too early for the gate.
#[tokio::test(start_paused = true)]
async fn compressed_requests_are_inflated_by_the_reader() {
    let mut bench = Bench::new();
    let topic: overlay_core::identity::Topic = "news".parse().unwrap();
    let start = |corr_id, open: &Open| {
        let start = frame(Flags::START | Flags::COMP, AppProto::PUBSUB, corr_id, compressed(&json(open)));
        Frame { cap: bench.token.clone(), ..start }
    };
    let starts = [start(3, &Open::Subscribe { topics: vec![topic.clone()] }), start(5, &Open::Publish { topic })];
    for n in 0..50 {
        let mut client = bench.connect();
        assert_eq!(client.ask(&hello()).await, 200);
        assert_eq!(client.ask(&starts[0]).await, 200, "session {n}");
        assert_eq!(client.ask(&starts[1]).await, 200, "session {n}");
        let text = Bytes::from("a text that repeats ".repeat(4));
        let message = compressed(&Publish::Message(text.clone()).encode());
        client.send(&frame(Flags::COMP, AppProto::PUBSUB, 5, message)).await;
        let mut got = [client.receive().await.unwrap(), client.receive().await.unwrap()];
        got.sort_by_key(|frame| frame.corr_id);
        assert!(
            matches!(Record::decode(got[0].payload.clone()), Some(Record::Message { payload, .. }) if payload == text)
        );
        assert_eq!(got[1].code, 200);
        let bomb = compressed(&vec![0; 65_537]);
        assert_eq!(client.ask(&frame(Flags::COMP, AppProto::PUBSUB, 5, bomb)).await, 413);
        let broken = Bytes::from_static(b"\x28\xb5\x2f\xfd");
        assert_eq!(client.ask(&frame(Flags::COMP, AppProto::PUBSUB, 5, broken)).await, 400);
        assert_eq!(client.ask(&frame(Flags::default(), AppProto::CONTROL, 7, Bytes::new())).await, 200, "it goes on");
    }
}

/// Z4: before HELLO is answered a compressed frame is refused, and the connection closes.
#[tokio::test(start_paused = true)]
async fn z4_comp_before_hello_closes_the_connection() {
    let mut bench = Bench::new();
    for early in [
        Frame { flags: Flags::REQ | Flags::COMP, payload: compressed(&hello().payload), ..hello() },
        frame(Flags::COMP, AppProto::PUBSUB, 3, compressed(b"early")),
    ] {
        let mut client = bench.connect();
        assert_eq!(client.ask(&early).await, 400);
        assert_eq!(client.receive().await, None);
    }
}

/// F6: a flood of empty frames is read ever more slowly, then answered by 429 and closed, while
/// another client's requests are answered.
#[tokio::test(start_paused = true)]
async fn f6_a_flood_is_not_read_then_closed() {
    let mut bench = Bench::new();
    let (mut flood, mut honest) = (bench.connect(), bench.connect());
    assert_eq!((flood.ask(&hello()).await, honest.ask(&hello()).await), (200, 200));
    let empty = codec::encoded(&frame(Flags::default(), AppProto::PUBSUB, 9, Bytes::new())).unwrap();
    let (mut read, mut write) = tokio::io::split(flood.stream);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut sent = 0_u64;
        while sent < 10_000_000 && write.write_all(&empty).await.is_ok() {
            sent += 1;
        }
        sent
    });
    let mut answers = JoinSet::new();
    answers.spawn(async move {
        let (mut inbox, mut last) = (BytesMut::new(), 0);
        while matches!(read.read_buf(&mut inbox).await, Ok(1..)) {
            while let Some(frame) = codec::decode(&mut inbox).unwrap() {
                last = frame.code;
            }
        }
        last
    });
    let mut answered = 0;
    let last = loop {
        if let Some(last) = answers.try_join_next() {
            break last.unwrap();
        }
        assert_eq!(honest.ask(&frame(Flags::default(), AppProto::CONTROL, 3, Bytes::new())).await, 200);
        answered += 1;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await; // virtual, as all time here
    };
    assert_eq!(last, 429);
    let sent = tasks.join_next().await.unwrap().unwrap();
    // The burst; at each pause what was saved up since the last and what waited for the hub by
    // then; what pipe and buffer held; and what is thrown away after the close.
    let (a_pause, held) = (100 + QUEUE as u64, (2 * 64 * 1024 + DISCARDED as u64) / 38);
    assert!(sent <= 4_000 + 102 * a_pause + held, "{sent} frames were taken");
    assert!((95..130).contains(&answered), "after ten seconds: {answered}");
}

/// F6: of a session that the hub has closed no more is read than what may be on its way: whoever
/// floods on finds the pipe full, and the refusal that was sent last still comes.
#[tokio::test(start_paused = true)]
async fn f6_what_comes_after_the_close_is_not_read() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    // Before HELLO, anything else closes.
    let early = codec::encoded(&frame(Flags::default(), AppProto::PUBSUB, 9, Bytes::new())).unwrap();
    let held = (DISCARDED + 3 * READ_BYTES) / early.len();
    let sent = client.flood(early).await;
    let refusal = codec::decode(&mut client.inbox).unwrap().unwrap();
    assert_eq!((refusal.code, client.inbox.len()), (400, 0), "one refusal, and the end");
    assert!(sent <= held + QUEUE, "{sent} frames were taken, {held} fit");
}

/// F6: nor is one read that comes when so many are being turned away that it is not even told.
#[tokio::test(start_paused = true)]
async fn f6_who_is_not_even_turned_away_is_not_read() {
    let mut bench = Bench::with(|config| config.overlay.max_sessions = 1);
    let _first = bench.connect();
    let _turned_away: Vec<_> = (0..256).map(|_| bench.connect()).collect();
    let mut last = bench.connect();
    let start = codec::encoded(&frame(Flags::START, AppProto::PUBSUB, 9, Bytes::new())).unwrap();
    let held = (DISCARDED + 3 * READ_BYTES) / start.len();
    let sent = last.flood(start).await;
    assert!(last.inbox.is_empty(), "nothing is said");
    assert!(sent <= held + QUEUE, "{sent} frames were taken, {held} fit");
}

/// I-6: whoever keeps the hub's queue full does not keep from it that writes are to be shed, nor
/// that they are not any more: it hears so past the queue, before the next frame.
#[tokio::test(start_paused = true)]
async fn a_full_queue_does_not_keep_shedding_from_the_hub() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    assert_eq!(client.ask(&hello()).await, 200);
    let open = Open::Publish { topic: "news".parse().unwrap() };
    let start = Frame { cap: bench.token.clone(), ..frame(Flags::START, AppProto::PUBSUB, 3, json(&open)) };
    assert_eq!(client.ask(&start).await, 200);
    for _ in 0..4 {
        let hub = bench.context.hub.clone();
        bench.tasks.spawn(async move { while hub.send(Input::Closed(SessionId(u64::MAX))).await.is_ok() {} });
    }
    let message = frame(Flags::default(), AppProto::PUBSUB, 3, Publish::Message("m".into()).encode());
    for (shedding, code) in [(true, 503), (false, 200), (true, 503)] {
        bench.judged.send_replace((overlay_core::readiness::Report::default(), shedding));
        assert_eq!(client.ask(&message).await, code);
    }
}
