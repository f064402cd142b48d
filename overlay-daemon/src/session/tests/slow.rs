//! Sessions over streams that are slow, broken or worse. Time is paused: nothing here waits.

use std::pin::Pin;
use std::task::Poll;

use overlay_core::config::KeyExchange;
use overlay_core::frame::AppProto;
use overlay_core::identity::TenantId;
use tokio::io::{DuplexStream, ReadBuf, duplex};

use super::super::*;
use crate::kms::Keys;
use crate::kms::authority::{Authority, LeafOptions, TokenRoot, Volume};
use crate::transport::TransportConfig;

const CONFIG: TransportConfig = TransportConfig {
    handshake: Duration::from_secs(3),
    read: Duration::from_secs(5),
    write: Duration::from_secs(5),
    idle: Duration::from_secs(15),
    max_handshakes_in_flight: 64,
    max_pending: 64,
    max_reading: 32 << 20,
    decompression_ratio: overlay_core::compress::MAX_RATIO,
};

/// Sessions, and the hub's side of them.
struct Scene {
    context: Context,
    inputs: mpsc::Receiver<Input>,
    sent: mpsc::Receiver<(SessionId, Place)>,
    sessions: JoinSet<()>,
}

impl Scene {
    fn new(config: TransportConfig) -> Self {
        let (hub, inputs) = mpsc::channel(64);
        let (sender, sent) = mpsc::channel(64);
        let clock = Clock::start();
        let volume = Volume::new(&Volume::files(&Authority::new(), &TokenRoot::new(), LeafOptions::default()));
        let (tls, token) = volume.config(KeyExchange::RequireHybrid);
        let verifier = Keys::load(&tls, &token, clock.unix_ms()).unwrap().verifier();
        let metrics = Arc::new(Metrics::new(true, "0123456789abcdef").unwrap());
        let context = Context::new(hub, sender, verifier, config.into(), clock, metrics);
        Self { context, inputs, sent, sessions: JoinSet::new() }
    }

    /// A session over `stream`: its number, and where its writer waits for what the hub gives it.
    async fn open<S: AsyncRead + AsyncWrite + Send + 'static>(&mut self, stream: S) -> (SessionId, Place) {
        let context = self.context.clone();
        let handshake_ends = context.clock.now();
        let opening = Opening { holder: Holder::Local, dialled: None, transport: None, group: "none", handshake_ends };
        self.sessions.spawn(async move { context.run(stream, opening, None, std::future::pending()).await });
        match self.inputs.recv().await {
            Some(Input::Open { id, writer, .. }) => (id, writer),
            _ => panic!("not opened"),
        }
    }

    /// Milliseconds from now until the session is closed.
    async fn closed(&mut self, id: SessionId) -> u64 {
        let from = self.context.clock.now();
        match self.inputs.recv().await {
            Some(Input::Closed(closed)) if closed == id => self.context.clock.now().since(from),
            _ => panic!("another input than the close"),
        }
    }

    fn metric(&self, line: &str) -> bool {
        String::from_utf8(self.context.metrics.render().unwrap()).unwrap().contains(line)
    }
}

fn frame(len: usize) -> Frame {
    Frame::new(Flags::EVENT, AppProto::PUBSUB, TenantId(0), 1, vec![0; len].into())
}

const TIMED_OUT: &str = "overlay_rejected_total{reason=\"timeout\",amnesia=\"on\"} 1\n";

/// Reads `bytes` every `pause`, until the other side is gone.
async fn read_slowly(mut stream: DuplexStream, bytes: usize, pause: Duration) {
    let mut buf = vec![0; bytes];
    while stream.read_exact(&mut buf).await.is_ok() {
        tokio::time::sleep(pause).await;
    }
}

#[tokio::test(start_paused = true)]
async fn s1_who_reads_a_byte_a_second_is_dropped() {
    let mut scene = Scene::new(CONFIG);
    let (stream, other) = duplex(1_024);
    let (id, writer) = scene.open(stream).await;
    scene.sessions.spawn(read_slowly(other, 1, Duration::from_secs(1)));
    writer.send((0..64).map(|_| frame(4_000)).collect()).unwrap();
    let ms = scene.closed(id).await;
    assert!((5_000..5_100).contains(&ms), "{ms}");
    assert!(scene.metric(TIMED_OUT));
}

/// The least progress is 64 KiB in each write timeout, not a batch of 256 KiB.
#[tokio::test(start_paused = true)]
async fn s1_who_makes_progress_stays() {
    let mut scene = Scene::new(CONFIG);
    let (stream, other) = duplex(1_024);
    let (id, writer) = scene.open(stream).await;
    scene.sessions.spawn(read_slowly(other, 16 * 1_024, Duration::from_secs(1)));
    writer.send((0..64).map(|_| frame(4_000)).collect()).unwrap();
    assert!(scene.sent.recv().await.is_some_and(|(sent, _)| sent == id), "all of it was taken, in 16 seconds");
    assert!(scene.inputs.try_recv().is_err());
}

/// One deadline for a whole frame, however its bytes drip; and its claim takes no memory.
#[tokio::test(start_paused = true)]
async fn s1_a_frame_at_38_bytes_a_second_is_cut() {
    let mut scene = Scene::new(CONFIG);
    let (stream, mut other) = duplex(1_024);
    let (id, _writer) = scene.open(stream).await;
    let header = codec::encoded(&frame(1_048_576 - 38)).unwrap().slice(..38);
    scene.sessions.spawn(async move {
        other.write_all(&header).await.unwrap();
        while other.write_all(&[0; 38]).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    tokio::time::sleep(Duration::from_secs(3)).await;
    let held = scene.context.reading.bytes();
    assert!((1..=64 * 1_024).contains(&held), "F1: at most 64 KiB a connection, is {held}");
    let ms = scene.closed(id).await;
    assert!((1_900..2_100).contains(&ms), "5 s from its first byte: {ms} more");
    assert!(scene.metric(TIMED_OUT));
    assert_eq!(scene.context.reading.bytes(), 0, "given back");
}

/// Past what readers may hold, a large frame is refused; small ones go on.
#[tokio::test(start_paused = true)]
async fn m1_large_frames_are_refused_where_readers_hold_too_much() {
    let mut scene = Scene::new(TransportConfig { max_reading: 50_000, ..CONFIG });
    let (stream, mut other) = duplex(1 << 20);
    let (_, _writer) = scene.open(stream).await;
    other.write_all(&codec::encoded(&frame(1_000)).unwrap()).await.unwrap();
    assert!(matches!(scene.inputs.recv().await, Some(Input::Frame { .. })));
    // The largest record of gossip, of which most has come: not one of them.
    let record = codec::encoded(&frame(MAX_RECORD)).unwrap();
    let (begun, rest) = record.split_at(READ_BYTES + 50);
    other.write_all(begun).await.unwrap();
    tokio::task::yield_now().await;
    other.write_all(rest).await.unwrap();
    assert!(matches!(scene.inputs.recv().await, Some(Input::Frame { .. })));
    other.write_all(&codec::encoded(&frame(400_000)).unwrap()).await.unwrap();
    assert!(matches!(scene.inputs.recv().await, Some(Input::Broken(_, Status::Unavailable))));
}

/// A frame is counted until the hub has handled it; a session at rest holds little.
#[tokio::test(start_paused = true)]
async fn m1_readers_count_what_they_hold() {
    let mut scene = Scene::new(CONFIG);
    let (stream, mut other) = duplex(1 << 20);
    let (id, _writer) = scene.open(stream).await;
    other.write_all(&codec::encoded(&frame(60_000)).unwrap()).await.unwrap();
    let input = scene.inputs.recv().await;
    assert!(matches!(&input, Some(Input::Frame { .. })) && scene.context.reading.bytes() >= 60_000);
    drop(input);
    tokio::task::yield_now().await;
    assert!(scene.context.reading.bytes() <= READ_BYTES as u64, "{}", scene.context.reading.bytes());
    other.write_all(&codec::encoded(&frame(10)).unwrap()).await.unwrap();
    drop(scene.inputs.recv().await);
    tokio::task::yield_now().await;
    assert_eq!(scene.context.reading.bytes(), REST_BYTES as u64, "at rest");
    drop(other);
    scene.closed(id).await;
    assert_eq!(scene.context.reading.bytes(), 0);
}

/// What the hub closes is closed for writing, and read until the other side has closed too.
#[tokio::test(start_paused = true)]
async fn s5_what_was_sent_last_arrives_though_the_other_side_still_sends() {
    let mut scene = Scene::new(CONFIG);
    let (stream, mut other) = duplex(4_096);
    let (id, writer) = scene.open(stream).await;
    writer.send(vec![frame(10_000)]).unwrap();
    let mut got = vec![0; 10_038];
    other.read_exact(&mut got).await.unwrap();
    drop(scene.sent.recv().await); // and the place with it, as the hub does with one that it has closed
    assert_eq!(other.read(&mut [0; 1]).await.unwrap(), 0, "closed for writing");
    for _ in 0..10 {
        other.write_all(&codec::encoded(&frame(4_000)).unwrap()).await.expect("it still reads");
        assert!(matches!(scene.inputs.recv().await, Some(Input::Frame { .. })));
    }
    let ms = scene.closed(id).await;
    assert!((900..=1_000).contains(&ms), "and not for ever: {ms}");
}

/// What is broken is read to its end, unseen: left on the socket it would have the refusal reset.
#[tokio::test(start_paused = true)]
async fn f1_the_rest_of_a_broken_frame_does_not_keep_its_refusal_from_arriving() {
    let mut scene = Scene::new(CONFIG);
    let (stream, mut other) = duplex(4_096);
    let (id, writer) = scene.open(stream).await;
    let mut oversize = codec::encoded(&frame(10)).unwrap().to_vec();
    oversize[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    other.write_all(&oversize).await.unwrap();
    assert!(matches!(scene.inputs.recv().await, Some(Input::Broken(_, Status::PayloadTooLarge))));
    writer.send(vec![frame(100)]).unwrap();
    let rest = vec![0; 500_000];
    timeout(Duration::from_secs(1), other.write_all(&rest)).await.expect("it still reads").unwrap();
    assert_eq!(scene.context.reading.bytes(), 0, "and keeps nothing");
    let mut got = vec![0; 138];
    other.read_exact(&mut got).await.unwrap();
    drop(scene.sent.recv().await);
    assert_eq!(other.read(&mut [0; 1]).await.unwrap(), 0, "closed for writing");
    drop(other);
    assert_eq!(scene.closed(id).await, 0);
}

/// A stream whose reads are worse than errors.
struct Panics;

impl AsyncRead for Panics {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        panic!("a fault that this test makes")
    }
}

impl AsyncWrite for Panics {
    fn poll_write(self: Pin<&mut Self>, _: &mut std::task::Context<'_>, _: &[u8]) -> Poll<std::io::Result<usize>> {
        Poll::Pending
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut std::task::Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Pending
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut std::task::Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Pending
    }
}

/// It is counted, the hub hears of the end, and every other session goes on.
#[tokio::test(start_paused = true)]
async fn s6_a_panic_in_one_session_ends_it_alone() {
    let mut scene = Scene::new(CONFIG);
    let (stream, mut other) = duplex(4_096);
    let (_, healthy) = scene.open(stream).await;
    let (id, _writer) = scene.open(Panics).await;
    assert_eq!(scene.closed(id).await, 0);
    assert!(scene.metric("overlay_session_panics_total{amnesia=\"on\"} 1\n"));
    assert!(scene.sessions.join_next().await.unwrap().is_ok(), "its owner did not panic");
    healthy.send(vec![frame(100)]).unwrap();
    other.read_exact(&mut [0; 138]).await.unwrap();
    other.write_all(&codec::encoded(&frame(100)).unwrap()).await.unwrap();
    assert!(matches!(scene.inputs.recv().await, Some(Input::Frame { .. })));
}
