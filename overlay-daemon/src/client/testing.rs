//! A scripted daemon for tests: it reads and writes frames by the core's codec, and does
//! nothing of its own accord.

use bytes::{Bytes, BytesMut};
use overlay_core::codec;
use overlay_core::control::{DaemonHello, Hello, HelloReply, Incarnation, Open, json, parse};
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::TenantId;
use overlay_core::record::{Digest, Envelope, Record};
use overlay_core::status::Refusal;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::connection::Connection;

/// The daemon's end of a connection in memory.
pub(super) struct Daemon {
    stream: DuplexStream,
    inbox: BytesMut,
}

/// Both ends; the pipe between them holds `bytes`.
pub(super) fn pair(bytes: usize) -> (DuplexStream, Daemon) {
    let (client, stream) = tokio::io::duplex(bytes);
    (client, Daemon { stream, inbox: BytesMut::new() })
}

/// A connection that has been greeted, with `max_inflight` granted.
pub(super) async fn greeted(max_inflight: u32) -> (Connection<DuplexStream>, Daemon) {
    let (client, mut daemon) = pair(1 << 20);
    let (connection, ()) = tokio::join!(Connection::greet(client), daemon.greet(max_inflight));
    (connection.unwrap().0, daemon)
}

impl Daemon {
    /// The client's next frame, or nothing once it has closed.
    pub(super) async fn receive(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = codec::decode(&mut self.inbox).unwrap() {
                return Some(frame);
            }
            if self.stream.read_buf(&mut self.inbox).await.unwrap() == 0 {
                return None;
            }
        }
    }

    pub(super) async fn send(&mut self, frame: &Frame) {
        self.send_bytes(&codec::encoded(frame).unwrap()).await;
    }

    pub(super) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Takes HELLO and answers it.
    pub(super) async fn greet(&mut self, max_inflight: u32) {
        let hello = self.receive().await.unwrap();
        assert_eq!(
            (hello.flags, hello.app, hello.tenant, hello.corr_id),
            (Flags::REQ, AppProto::CONTROL, TenantId(0), 1)
        );
        assert!(parse::<Hello>(&hello.payload).is_some());
        let of = DaemonHello { name: "mesh-0".into(), incarnation: Incarnation(7) };
        self.send(&Frame::response(&hello, 200, false, json(&HelloReply::of(of, max_inflight)))).await;
    }

    /// Takes a START, and says what it asked for.
    pub(super) async fn start(&mut self) -> (Frame, Open) {
        let start = self.receive().await.unwrap();
        assert_eq!(start.flags, Flags::REQ | Flags::START);
        assert!(!start.cap.is_empty(), "a START carries a token");
        let open = parse(&start.payload).unwrap();
        (start, open)
    }

    pub(super) async fn ok(&mut self, to: &Frame, payload: impl Into<Bytes>) {
        self.send(&Frame::response(to, 200, false, payload.into())).await;
    }

    pub(super) async fn end(&mut self, to: &Frame) {
        self.send(&Frame::response(to, 200, true, Bytes::new())).await;
    }

    pub(super) async fn refuse(&mut self, to: &Frame, refusal: &Refusal, end: bool) {
        self.send(&Frame::response(to, refusal.status.code(), end, refusal.body(to.corr_id))).await;
    }

    /// Pushes a record on the subscription that `start` opened.
    pub(super) async fn push(&mut self, start: &Frame, record: &Record) {
        self.send(&Frame::new(Flags::EVENT, start.app, start.tenant, start.corr_id, record.encode())).await;
    }
}

/// The envelope of message `sequence` on `news`.
pub(super) fn envelope(sequence: u64, size: usize, hash: Digest) -> Envelope {
    Envelope {
        attributes: 0,
        topic: "news".parse().unwrap(),
        origin: "spiffe://overlay.local/ns/default/overlaynode/mesh".parse().unwrap(),
        incarnation: Incarnation(7),
        sequence,
        time_ms: 1_700_000_000_123,
        size: u32::try_from(size).unwrap(),
        hash,
    }
}

/// A message that fits one frame.
pub(super) fn message(sequence: u64, payload: &[u8]) -> Record {
    let envelope = envelope(sequence, payload.len(), blake3::hash(payload).into());
    Record::Message { hops: 0, envelope, payload: Bytes::copy_from_slice(payload) }
}
