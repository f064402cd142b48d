//! One connection: a reader task that turns bytes into frames for the hub, and a writer task,
//! the socket's only one (I-2), that sends the batches that the hub gives it. Decides on
//! deadlines of bytes; every other decision is the hub's.
//!
//! A session that the hub closes is closed for writing first, and what still comes is read
//! until the other side has closed too: a socket that is closed with bytes unread resets the
//! connection, and what was sent last could be lost on its way (S5). A session that the other
//! side closes in order is closed in order here too: TLS libraries take anything else for an
//! attack (RFC 8446, 6.1).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use overlay_core::Millis;
use overlay_core::config::Transport;
use overlay_core::frame::{Flags, Frame, HEADER_LEN};
use overlay_core::grant::{Grant, Holder};
use overlay_core::memory::WRITE_BYTES;
use overlay_core::node::{Opening, SessionId};
use overlay_core::record::MAX_RECORD;
use overlay_core::status::{Reason, Refusal, Status};
use overlay_core::{codec, compress};
pub use overlay_shared::{ReadBytes, Reading};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::Instrument;

use crate::clock::Clock;
use crate::gate::Gate;
use crate::hub::{Batch, Input, Place};
use crate::kms::{KeyExchangeGroup, Verifier};
use crate::metrics::Metrics;
use crate::transport::{Connection, Endpoints, LocalConnection, Proxy, Timing};

/// Bytes that a read makes room for while much comes. A frame that claims more gets more as it
/// comes, never for its claim alone.
const READ_BYTES: usize = 64 * 1024;
/// And while little comes.
const SOME_BYTES: usize = 4 * 1024;
/// And while nothing does: a session at rest keeps no more. A ping fits, and most answers.
const REST_BYTES: usize = 256;
/// A frame with the largest record of gossip: what is larger holds nothing that cannot wait.
const LARGEST_RECORD: usize = HEADER_LEN + MAX_RECORD;
/// A payload of this size is sent as it lies: TLS reads it there, however many sessions share it.
/// To copy a smaller one behind others costs less than to look after one more piece.
const LARGE_BYTES: usize = 8 * 1024;
/// What is read of a closed session at the most.
const DISCARDED: usize = 1024 * 1024;
/// For how long the other side of a closed session may go on sending.
const LINGER: Duration = Duration::from_secs(1);

/// What every session needs.
#[derive(Clone)]
pub struct Context {
    /// Where what happens goes.
    pub hub: mpsc::Sender<Input>,
    /// Where writers say that they are free.
    pub sent: mpsc::Sender<(SessionId, Place)>,
    /// Judges capabilities.
    pub verifier: Verifier,
    /// Byte deadlines.
    pub timing: Timing,
    /// The one clock.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What readers hold.
    pub reading: Reading,
    /// From where QUIC is dialled.
    pub endpoints: Arc<Endpoints>,
    /// How Tor's proxy was last found.
    pub proxy: Proxy,
    ids: Arc<AtomicU64>,
}

impl Context {
    /// A context whose sessions are numbered from 1.
    #[must_use]
    pub fn new(
        hub: mpsc::Sender<Input>,
        sent: mpsc::Sender<(SessionId, Place)>,
        verifier: Verifier,
        timing: Timing,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            hub,
            sent,
            verifier,
            timing,
            clock,
            metrics,
            reading: Reading::default(),
            endpoints: Arc::default(),
            proxy: Proxy::default(),
            ids: Arc::new(AtomicU64::new(1)),
        }
    }

    /// Holds a session with the other end of `connection`, until either side ends it, the
    /// certificate that it showed does, or its authority leaves the bundle. `dialled` is the
    /// configured peer that was dialled, `bundle` the authorities that the handshake went by.
    pub async fn hold(&self, connection: Connection, dialled: Option<usize>, bundle: blake3::Hash) {
        let context = Self { timing: self.timing.of(connection.transport), ..self.clone() };
        let opening = Opening {
            holder: Holder::Certificate(connection.peer),
            dialled,
            transport: Some(connection.transport),
            group: connection.group.label(),
            handshake_ends: self.clock.millis(connection.deadline),
        };
        let left = connection.peer_not_after_ms.saturating_sub(self.clock.unix_ms());
        let ends = self.clock.instant(self.clock.now().after(left));
        // In a box: it would else lie in each of the futures that it is handed through.
        let over = Box::pin(async {
            tokio::select! {
                () = sleep_until(ends) => {}
                () = self.distrusted(connection.chain, dialled.is_some(), bundle) => {}
            }
        });
        context.run(connection.stream, opening, Some(connection.group), over).await;
        drop(connection.descriptor);
    }

    /// Waits until no authority vouches for a chain any more. `bundle` is the one that the
    /// handshake went by.
    async fn distrusted(&self, chain: Vec<CertificateDer<'static>>, server: bool, mut bundle: blake3::Hash) {
        let mut keys = self.verifier.keys();
        loop {
            let current = Arc::clone(&keys.borrow_and_update());
            if current.bundle() != bundle && !current.vouches_for(&chain, server, self.clock.unix_ms()) {
                return;
            }
            bundle = current.bundle();
            drop(current);
            if keys.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Holds a session with a local process.
    pub async fn hold_local(&self, connection: LocalConnection) {
        let handshake_ends = self.clock.millis(connection.deadline);
        let opening = Opening { holder: Holder::Local, dialled: None, transport: None, group: "none", handshake_ends };
        self.run(connection.stream, opening, None, std::future::pending()).await;
        drop(connection.descriptor);
    }

    /// Runs a session over `stream`, at the longest until `over`. The hub hears of its
    /// beginning and, in every case, of its end.
    async fn run<S>(&self, stream: S, opening: Opening, group: Option<KeyExchangeGroup>, over: impl Future<Output = ()>)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let id = SessionId(self.ids.fetch_add(1, Ordering::Relaxed));
        let holder = opening.holder.clone();
        // What is logged on behalf of a session says which. Of level `debug`, as all of that is: the
        // room that a span takes is kept for spans to come, for good. Sessions that are older than
        // a change to that level are logged without.
        let span = tracing::debug_span!("session", session = id.0);
        span.in_scope(|| {
            let (transport, dialled) = (Transport::label_of(opening.transport), opening.dialled.is_some());
            tracing::debug!(identity = %holder, transport, group = opening.group, dialled, "session opened");
        });
        let (writer, batch) = oneshot::channel();
        let gate = Arc::<Gate>::default();
        // A place first, here and wherever a session tells the hub something: what waits for one
        // keeps room for all that it will say, for as long as the session lives.
        let Ok(place) = self.hub.reserve().await else { return };
        place.send(Input::Open { id, opening, group, writer, gate: Arc::clone(&gate) });
        let (read, write) = tokio::io::split(stream);
        let mut tasks = JoinSet::new();
        tasks.spawn(Reader { id, holder, gate, context: self.clone() }.run(read).instrument(span.clone()));
        tasks.spawn(send_batches(id, write, batch, self.clone()).instrument(span.clone()));
        let why = tokio::select! {
            why = self.first_end(id, &mut tasks) => why,
            () = over => "the other side's certificate ended, or its authority left",
        };
        span.in_scope(|| tracing::debug!(why, "session closed"));
        tasks.shutdown().await;
        self.closed(id).await;
    }

    async fn closed(&self, id: SessionId) {
        // Where there is none the daemon stops.
        if let Ok(place) = self.hub.reserve().await {
            place.send(Input::Closed(id));
        }
    }

    /// Waits until a session's tasks are of no more use; why they are. Whichever ends first ends
    /// the other: a half-open session helps nobody. Only the reader's end waits for the writer, to
    /// tell of a broken frame or to say goodbye, and the writer's end for what the other side still
    /// sends.
    async fn first_end(&self, id: SessionId, tasks: &mut JoinSet<Ended>) -> &'static str {
        loop {
            match tasks.join_next().await {
                None => return "both sides are done",
                Some(Ok(Ended::Gone(why))) => return why,
                Some(Ok(Ended::BrokenFrame)) => {}
                Some(Ok(Ended::Left)) => {
                    // The hub lets go of the writer, which then closes its side.
                    self.closed(id).await;
                    drop(timeout(LINGER, tasks.join_next()).await);
                    return "the other side left";
                }
                Some(Ok(Ended::Closed)) => {
                    drop(timeout(LINGER, tasks.join_next()).await);
                    return "this side closed it";
                }
                Some(Err(error)) => {
                    // This session alone ends (S6); the panic itself is in the log already.
                    if error.is_panic() {
                        self.metrics.session_panic();
                    }
                    return "a fault of its own";
                }
            }
        }
    }
}

/// How a task of a session ended.
enum Ended {
    /// Nothing more will come, or can be sent: why.
    Gone(&'static str),
    /// The other side closed in order.
    Left,
    /// The writer has a refusal to send, and then closes; nothing more comes meanwhile.
    BrokenFrame,
    /// The hub closed the session, and all that it had to send has left.
    Closed,
}

/// Why a session was gone.
const STOPPING: &str = "the daemon stops";
const BROKE: &str = "the connection broke";
const READ_TIMEOUT: &str = "the rest of a frame did not come within the read timeout";
const WRITE_TIMEOUT: &str = "the other side took too little within the write timeout";

struct Reader {
    id: SessionId,
    holder: Holder,
    gate: Arc<Gate>,
    context: Context,
}

impl Reader {
    async fn run<R: AsyncRead + Unpin>(self, mut read: R) -> Ended {
        let mut buf = BytesMut::new();
        let mut held = self.context.reading.hold(0);
        // Set while part of a frame is there: until when the rest must be (I-2).
        let mut deadline: Option<Instant> = None;
        let mut room = REST_BYTES;
        let status = loop {
            // What was read already waits too, and what was not fills the other side's window.
            while let Some(until) = self.gate.paused(&self.context.clock) {
                if until == Millis::NEVER {
                    return discard(read).await;
                }
                sleep_until(self.context.clock.instant(until)).await;
            }
            match codec::decode(&mut buf) {
                Ok(Some(frame)) => {
                    deadline = None;
                    if !self.hand_over(frame).await {
                        return Ended::Gone(STOPPING);
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => break error.status(),
            }
            if !buf.is_empty() && deadline.is_none() {
                deadline = Some(self.context.clock.deadline(self.context.timing.now().read));
            }
            if buf.len() > LARGEST_RECORD && self.context.reading.bytes() > self.context.timing.now().max_reading {
                break Status::Unavailable;
            }
            if buf.is_empty() && buf.capacity() > room {
                buf = BytesMut::new(); // at rest, or after a large frame
            }
            buf.reserve(room);
            held.set(buf.capacity());
            let space = buf.capacity() - buf.len();
            let bytes = match deadline {
                // Between frames there is no hurry: silence is the idle timer's matter.
                None => read.read_buf(&mut buf).await,
                Some(at) => match timeout_at(at, read.read_buf(&mut buf)).await {
                    Ok(read) => read,
                    Err(_) => {
                        self.context.metrics.rejected(Reason::Timeout).inc();
                        return Ended::Gone(READ_TIMEOUT);
                    }
                },
            };
            let bytes = match bytes {
                Ok(0) => return Ended::Left,
                Ok(bytes) => bytes,
                Err(_) => return Ended::Gone(BROKE),
            };
            room = match room {
                _ if bytes < space => REST_BYTES,
                REST_BYTES => SOME_BYTES,
                _ => READ_BYTES,
            };
        };
        drop((buf, held));
        tracing::debug!(code = status.code(), "broken frame");
        if let Ok(place) = self.context.hub.reserve().await {
            place.send(Input::Broken(self.id, status));
        }
        // The rest of it comes still, and would have the refusal reset.
        discard(read).await;
        Ended::BrokenFrame
    }

    async fn hand_over(&self, mut frame: Frame) -> bool {
        let at = self.context.clock.stamp();
        if frame.flags.has(Flags::COMP) {
            // Here and not in the hub, which all sessions wait for: inflating takes CPU.
            let ratio = self.context.timing.now().decompression_ratio;
            if let Err(refusal) = compress::receive(&mut frame, self.gate.is_greeted(), ratio) {
                frame.cap = Bytes::new();
                let Ok(place) = self.context.hub.reserve().await else { return false };
                place.send(Input::Unread(self.id, frame, refusal));
                return true;
            }
        }
        let grant = frame.flags.has(Flags::START).then(|| self.judge(&frame));
        frame.cap = Bytes::new();
        let held = self.context.reading.hold(frame.wire_len());
        let Ok(place) = self.context.hub.reserve().await else { return false };
        place.send(Input::Frame { id: self.id, frame, grant, at, held });
        true
    }

    fn judge(&self, frame: &Frame) -> Result<Grant, Refusal> {
        self.context.verifier.verify(&frame.cap, &self.holder, self.context.clock.time())
    }
}

/// What still comes of a session that the hub has closed is taken off the socket, or it would be
/// reset under what was sent last, and thrown away unseen. Past [`DISCARDED`] it is left where it
/// is: this is a flood, and the session ends without it.
async fn discard<R: AsyncRead + Unpin>(mut read: R) -> Ended {
    let (mut buf, mut left) = (BytesMut::with_capacity(SOME_BYTES), DISCARDED);
    while left > 0 {
        buf.clear();
        match read.read_buf(&mut buf).await {
            Ok(0) => return Ended::Left,
            Ok(bytes) => left = left.saturating_sub(bytes),
            Err(_) => return Ended::Gone(BROKE),
        }
    }
    std::future::pending().await
}

/// Sends batches until the hub has no more to give, which closes the connection, or until
/// the other side does not take them in time: [`WRITE_BYTES`] in each write timeout, or what is
/// left, is the least progress that keeps a session (S1).
async fn send_batches<W: AsyncWrite + Unpin>(
    id: SessionId,
    mut write: W,
    mut next: oneshot::Receiver<Batch>,
    context: Context,
) -> Ended {
    while let Ok(batch) = next.await {
        let mut bytes = BytesMut::new(); // one for all of the batch; at rest there is none
        let mut frames = batch.into_iter();
        while !frames.as_slice().is_empty() {
            let Ok(payload) = encode(&mut frames, &mut bytes) else {
                return Ended::Gone("a frame of its own does not fit the format");
            };
            let mut rest = Buf::chain(bytes.as_ref(), payload);
            let sent = async {
                write.write_all_buf(&mut rest).await?;
                write.flush().await
            };
            match timeout(context.timing.now().write, sent).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ended::Gone(BROKE),
                Err(_) => {
                    context.metrics.rejected(Reason::Timeout).inc();
                    return Ended::Gone(WRITE_TIMEOUT);
                }
            }
        }
        let (place, batch) = oneshot::channel();
        next = batch;
        if context.sent.send((id, place)).await.is_err() {
            break;
        }
    }
    match timeout(context.timing.now().write, write.shutdown()).await {
        Ok(Ok(())) => Ended::Closed,
        Ok(Err(_)) | Err(_) => Ended::Gone(BROKE),
    }
}

/// The next frames, to be sent at once: at most [`WRITE_BYTES`], or one frame that is larger.
/// They are gathered in `out`, all but the last one's payload where it is large: that is returned.
fn encode(frames: &mut std::vec::IntoIter<Frame>, out: &mut BytesMut) -> Result<Bytes, codec::FrameError> {
    let (mut count, mut bytes, mut large) = (0, 0, false);
    for frame in frames.as_slice() {
        if large || (count > 0 && bytes + frame.wire_len() > WRITE_BYTES) {
            break;
        }
        large = frame.payload.len() >= LARGE_BYTES;
        (count, bytes) = (count + 1, bytes + frame.wire_len() - if large { frame.payload.len() } else { 0 });
    }
    out.clear();
    out.reserve(bytes);
    frames.by_ref().take(count - usize::from(large)).try_for_each(|frame| codec::encode(&frame, out))?;
    let Some(last) = large.then(|| frames.next()).flatten() else { return Ok(Bytes::new()) };
    out.extend_from_slice(&codec::header(&last)?);
    out.extend_from_slice(&last.cap);
    Ok(last.payload)
}

#[cfg(test)]
mod tests;
