//! A client's end of one session: HELLO, pings, streams and bounded buffers over any byte
//! stream. Decides when the daemon is gone; what a stream's frames mean is its caller's.
//!
//! The connection is one value that one task drives: [`Connection::next`] reads, writes what
//! is queued and keeps the session alive, and may be cancelled at any point without loss.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use overlay_core::codec::{self, FrameError};
use overlay_core::control::{Hello, HelloReply, Open, json, parse};
use overlay_core::frame::{AppProto, CHUNK, Flags, Frame, HEADER_LEN, MAX_BODY};
use overlay_core::identity::TenantId;
use overlay_core::status::ErrorBody;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::time::{Instant, sleep_until, timeout};

use super::locate::TokenFile;
use super::renewal::{Renewal, Sorted};
use crate::clock::Clock;

/// From HELLO to its answer.
pub(super) const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// From a request to its answer.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// From END to the daemon's END: what is late here changes nothing any more.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Nothing heard for so long, a ping included, and the daemon is gone.
const IDLE: Duration = Duration::from_secs(15);
/// Nothing heard for so long, and a ping goes out.
const PING_AFTER: Duration = Duration::from_secs(5);
/// Bytes of a ping that is answered.
const MAX_PING: usize = 64;
/// Bytes queued beyond which [`Connection::has_room`] is false.
const OUTBOX_BYTES: usize = 1 << 20;
/// Bytes queued beyond which a frame is refused: room for one message more, in its pieces.
const OUTBOX_LIMIT: usize = OUTBOX_BYTES + MAX_BODY + CHUNK;
/// Bytes that one read asks for, unless a frame under way needs more.
const READ_BYTES: usize = 16 * 1024;
/// Events that are kept until the START of their stream is answered.
const MAX_EARLY: usize = 64;
/// Parts that one write gathers.
const GATHER: usize = 32;

/// Why a session, or a request in it, came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The daemon answered with a refusal.
    #[error("{0}")]
    Refused(Refused),
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// What arrived is no frame.
    #[error("the daemon sent what is not OAP/1: {0}")]
    Frame(#[from] FrameError),
    /// What arrived, or was to be sent, breaks the protocol.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// The daemon did not answer.
    #[error("the daemon did not answer {0} within {seconds} s", seconds = .1.as_secs())]
    Timeout(&'static str, Duration),
}

/// A refusal as the daemon worded it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Its code: 400 to 599.
    pub code: u16,
    /// Its error object's `code`, or nothing where there was none.
    pub name: String,
    /// Its error object's `message`.
    pub message: String,
    /// When it may be tried again; nothing where that is of no use.
    pub retry_after: Option<Duration>,
}

impl Refused {
    /// The wait where a refusal that may be repeated names none.
    const DEFAULT_WAIT: Duration = Duration::from_secs(1);
    /// The longest that a daemon makes this client wait.
    const LONGEST_WAIT: Duration = Duration::from_secs(30);

    /// Reads a refusal off a RESP frame; its payload may be anything.
    #[must_use]
    pub fn of(frame: &Frame) -> Self {
        let body: Option<ErrorBody> = parse(&frame.payload);
        let wait = body.as_ref().and_then(|body| body.retry_after_ms).map_or(Self::DEFAULT_WAIT, Duration::from_millis);
        let (name, message) = body.map_or_else(Default::default, |body| (body.code, body.message));
        let retry_after = matches!(frame.code, 429 | 503).then(|| wait.min(Self::LONGEST_WAIT));
        Self { code: frame.code, name: printable(&name), message: printable(&message), retry_after }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "refused by the daemon: {}", self.code)?;
        for (mark, text) in [(" ", &self.name), (": ", &self.message)] {
            if !text.is_empty() {
                write!(f, "{mark}{text}")?;
            }
        }
        Ok(())
    }
}

/// Text of the other side, without what would move a terminal's cursor.
#[must_use]
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A stream that this side opened: what every frame of it repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    app: AppProto,
    tenant: TenantId,
    corr_id: u64,
}

impl Stream {
    /// Whether `frame` belongs to it.
    ///
    /// # Errors
    /// It does not: a refusal of the whole session, or nonsense.
    pub fn expect(&self, frame: &Frame) -> Result<(), ConnectionError> {
        if (frame.corr_id, frame.app, frame.tenant) == (self.corr_id, self.app, self.tenant) {
            return Ok(());
        }
        Err(stray(frame))
    }
}

/// What a frame that no stream of ours expects says of the session.
fn stray(frame: &Frame) -> ConnectionError {
    if frame.flags.has(Flags::RESP) && frame.code >= 400 {
        return ConnectionError::Refused(Refused::of(frame));
    }
    ConnectionError::Protocol("the daemon sent a frame on a stream that is not open")
}

/// A session that HELLO has opened.
#[derive(Debug)]
pub struct Connection<S> {
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    inbox: BytesMut,
    /// Events that overtook the answer to their START: lanes have weights, not ranks.
    early: VecDeque<Frame>,
    outbox: Outbox,
    heard: Instant,
    /// The ping that is not answered yet, and when it was sent.
    pinged: Option<(u64, Instant)>,
    next_corr: u64,
    kept: Option<Kept>,
}

/// A stream that is renewed as its token's file changes.
#[derive(Debug)]
struct Kept {
    stream: Stream,
    file: TokenFile,
    clock: Clock,
    renewal: Renewal,
}

impl<S: AsyncRead + AsyncWrite> Connection<S> {
    /// Says HELLO over a stream that is ready, and returns its answer.
    ///
    /// # Errors
    /// The daemon refuses, does not answer, or does not speak the protocol.
    pub async fn greet(stream: S) -> Result<(Self, HelloReply), ConnectionError> {
        let (reader, writer) = split(stream);
        let mut connection = Self {
            reader,
            writer,
            inbox: BytesMut::new(),
            early: VecDeque::new(),
            outbox: Outbox::default(),
            heard: Instant::now(),
            pinged: None,
            next_corr: 1,
            kept: None,
        };
        let hello = Hello { ua: Some(concat!("overlay-daemon/", env!("CARGO_PKG_VERSION")).to_owned()), daemon: None };
        let stream = connection.stream(AppProto::CONTROL, TenantId(0));
        connection.send(stream, Flags::REQ, json(&hello))?;
        let answer = connection.answer(stream, "HELLO", HELLO_TIMEOUT).await?;
        let reply: HelloReply =
            parse(&answer.payload).ok_or(ConnectionError::Protocol("the answer to HELLO is not understood"))?;
        if (reply.max_frame as usize) < HEADER_LEN + 37 + CHUNK {
            return Err(ConnectionError::Protocol("the daemon's max_frame is too small for a chunk of 64 KiB"));
        }
        Ok((connection, reply))
    }

    /// Opens a stream with `token`, and returns it with its first answer.
    ///
    /// # Errors
    /// The daemon refuses or does not answer.
    pub async fn open(
        &mut self,
        app: AppProto,
        tenant: TenantId,
        token: &Bytes,
        open: &Open,
    ) -> Result<(Stream, Frame), ConnectionError> {
        let stream = self.stream(app, tenant);
        let start = Frame::new(Flags::REQ | Flags::START, app, tenant, stream.corr_id, json(open));
        self.outbox.push(&Frame { cap: token.clone(), ..start })?;
        let answer = self.answer(stream, "START", ANSWER_TIMEOUT).await?;
        Ok((stream, answer))
    }

    /// From now on `stream`, which was opened with `token`, goes on by whatever token `file`
    /// comes to hold. The last stream that this is said of is the one that is kept.
    pub(super) fn keep(&mut self, stream: Stream, token: &Bytes, file: TokenFile) {
        let clock = Clock::start();
        let renewal = Renewal::new(stream.corr_id, token.clone(), Instant::now(), clock.unix_ms());
        self.kept = Some(Kept { stream, file, clock, renewal });
    }

    /// Queues a frame of `stream`.
    ///
    /// # Errors
    /// The queue is full: ask [`Self::has_room`] before each message.
    pub fn send(&mut self, stream: Stream, flags: Flags, payload: Bytes) -> Result<(), ConnectionError> {
        let kept = self.kept.as_ref().filter(|kept| kept.renewal.is_of(stream.corr_id));
        let corr_id = kept.map_or(stream.corr_id, |kept| kept.renewal.current());
        self.outbox.push(&Frame::new(flags, stream.app, stream.tenant, corr_id, payload))
    }

    /// Whether one more message may be queued, of whatever size.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let is_renewing = self.kept.as_ref().is_some_and(|kept| kept.renewal.is_asked());
        self.outbox.bytes < OUTBOX_BYTES && !is_renewing
    }

    /// The next frame that is not a ping's. Everything queued goes out meanwhile.
    ///
    /// # Errors
    /// The session is over.
    pub async fn next(&mut self) -> Result<Frame, ConnectionError> {
        match self.early.pop_front() {
            Some(frame) => Ok(frame),
            None => self.receive().await,
        }
    }

    async fn receive(&mut self) -> Result<Frame, ConnectionError> {
        loop {
            while let Some(frame) = codec::decode(&mut self.inbox)? {
                if let Some(frame) = self.handle_frame(frame)? {
                    return Ok(frame);
                }
            }
            self.step().await?;
        }
    }

    /// Closes `stream` and waits a moment for the daemon to agree. Frames that it sent before
    /// are dropped.
    ///
    /// # Errors
    /// The session is over.
    pub async fn end(&mut self, stream: Stream) -> Result<(), ConnectionError> {
        self.send(stream, Flags::REQ | Flags::END, Bytes::new())?;
        let ended = async {
            loop {
                let frame = self.next().await?;
                stream.expect(&frame)?;
                if frame.flags.has(Flags::RESP | Flags::END) {
                    return Ok(());
                }
            }
        };
        timeout(END_TIMEOUT, ended).await.unwrap_or(Ok(()))
    }

    /// Says goodbye to the transport. The session is over in any case.
    pub async fn close(mut self) {
        let _ = timeout(END_TIMEOUT, self.writer.shutdown()).await;
    }

    fn stream(&mut self, app: AppProto, tenant: TenantId) -> Stream {
        let corr_id = self.next_corr;
        self.next_corr = self.next_corr.saturating_add(2);
        Stream { app, tenant, corr_id }
    }

    /// The first answer on `stream`, unless it is a refusal.
    async fn answer(&mut self, stream: Stream, what: &'static str, within: Duration) -> Result<Frame, ConnectionError> {
        let answered = async {
            loop {
                let frame = self.receive().await?;
                stream.expect(&frame)?;
                if !frame.flags.has(Flags::EVENT) {
                    return Ok(frame);
                }
                if self.early.len() >= MAX_EARLY {
                    return Err(ConnectionError::Protocol("the daemon sent events and no answer to START"));
                }
                self.early.push_back(frame);
            }
        };
        let frame = timeout(within, answered).await.unwrap_or(Err(ConnectionError::Timeout(what, within)))?;
        match (frame.flags.has(Flags::RESP), frame.code) {
            (true, 200) => Ok(frame),
            (true, 400..) => Err(ConnectionError::Refused(Refused::of(&frame))),
            _ => Err(ConnectionError::Protocol("a request was not answered by 200 or a refusal")),
        }
    }

    /// Deals with what belongs to the session; gives back what belongs to a stream.
    fn handle_frame(&mut self, frame: Frame) -> Result<Option<Frame>, ConnectionError> {
        let kinds = [Flags::REQ, Flags::RESP, Flags::EVENT].iter().filter(|kind| frame.flags.has(**kind)).count();
        if kinds != 1 || frame.flags.has(Flags::COMP) {
            return Err(ConnectionError::Protocol("the daemon sent a frame with flags that it may not use"));
        }
        if frame.flags.has(Flags::REQ) {
            if frame.app != AppProto::CONTROL || frame.payload.len() > MAX_PING {
                return Err(ConnectionError::Protocol("the daemon sent a request that is not a ping"));
            }
            self.outbox.push(&Frame::response(&frame, 200, true, frame.payload.clone()))?;
            return Ok(None);
        }
        if self.pinged.is_some_and(|(corr_id, _)| corr_id == frame.corr_id) {
            self.pinged = None;
            return Ok(None);
        }
        let Some(kept) = &mut self.kept else { return Ok(Some(frame)) };
        match kept.renewal.sort(frame, Instant::now(), kept.clock.unix_ms()) {
            Sorted::User(frame) => Ok(Some(frame)),
            Sorted::Ours => Ok(None),
            Sorted::Refused(refused) => {
                crate::notice::tell(format_args!("warning: the stream goes on with its old token: {refused}"));
                Ok(None)
            }
        }
    }

    /// Looks at the token's file, and asks for the stream to go on by what it holds.
    fn renew(&mut self) -> Result<(), ConnectionError> {
        let corr_id = self.next_corr;
        let Some(Kept { stream, file, renewal, .. }) = &mut self.kept else { return Ok(()) };
        let now = Instant::now();
        // A file that cannot be read now is being written, or will be missed at the expiry.
        let Some(token) = renewal.handle_time(file.read().ok(), now)? else { return Ok(()) };
        let open = Open::Renew { stream: renewal.current() };
        let start = Frame::new(Flags::REQ | Flags::START, stream.app, stream.tenant, corr_id, json(&open));
        renewal.handle_asked(corr_id, token.clone(), now);
        self.next_corr = self.next_corr.saturating_add(2);
        self.outbox.push(&Frame { cap: token, ..start })
    }

    /// Reads some, writes some, or lets time pass: whichever comes first.
    async fn step(&mut self) -> Result<(), ConnectionError> {
        let missing = codec::frame_len(&self.inbox)?.map_or(0, |whole| whole.saturating_sub(self.inbox.len()));
        self.inbox.reserve(missing.max(READ_BYTES));
        let deadline = match self.pinged {
            None => self.heard + PING_AFTER,
            Some((_, sent)) => sent.max(self.heard) + (IDLE - PING_AFTER),
        };
        let renewal = self.kept.as_ref().map(|kept| kept.renewal.due());
        tokio::select! {
            // Writing first, so that a flood of events does not hold an END back; the clock
            // last, so that what has arrived counts before it: the caller may have been busy.
            biased;
            () = self.outbox.write(&mut self.writer), if self.outbox.is_due() => {}
            read = self.reader.read_buf(&mut self.inbox) => match read? {
                0 => return Err(ConnectionError::Closed),
                _ => self.heard = Instant::now(),
            },
            () = sleep_until(deadline) => return self.handle_timeout(),
            () = sleep_until(renewal.unwrap_or(deadline)), if renewal.is_some() => return self.renew(),
        }
        Ok(())
    }

    fn handle_timeout(&mut self) -> Result<(), ConnectionError> {
        if self.pinged.is_some() {
            return Err(ConnectionError::Timeout("a ping", IDLE - PING_AFTER));
        }
        let stream = self.stream(AppProto::CONTROL, TenantId(0));
        self.pinged = Some((stream.corr_id, Instant::now()));
        self.send(stream, Flags::REQ, Bytes::new())
    }
}

/// What is still to be written, in order. Full is an error: its users ask for room first.
#[derive(Debug, Default)]
struct Outbox {
    parts: VecDeque<Bytes>,
    bytes: usize,
    /// Written, but perhaps still in the transport's own buffer.
    unflushed: bool,
    /// Nothing can be written any more. What the daemon said before it closed is still read:
    /// it is the reason.
    broken: bool,
}

impl Outbox {
    fn push(&mut self, frame: &Frame) -> Result<(), ConnectionError> {
        let header = codec::header(frame).map_err(|_| ConnectionError::Protocol("a frame to send is too large"))?;
        if self.bytes + frame.wire_len() > OUTBOX_LIMIT {
            return Err(ConnectionError::Protocol("the daemon does not read what it is sent"));
        }
        self.bytes += frame.wire_len();
        let parts = [Bytes::copy_from_slice(&header), frame.cap.clone(), frame.payload.clone()];
        self.parts.extend(parts.into_iter().filter(|part| !part.is_empty()));
        Ok(())
    }

    fn is_due(&self) -> bool {
        !self.broken && (self.unflushed || !self.parts.is_empty())
    }

    /// One write, or a flush. Cancelled, it has written nothing.
    async fn write(&mut self, to: &mut (impl AsyncWrite + Unpin)) {
        let written = if self.parts.is_empty() {
            to.flush().await.map(|()| {
                self.unflushed = false;
                0
            })
        } else {
            let slices: Vec<IoSlice<'_>> = self.parts.iter().take(GATHER).map(|part| IoSlice::new(part)).collect();
            to.write_vectored(&slices)
                .await
                .and_then(|n| if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) })
        };
        match written {
            Ok(0) => {}
            Ok(written) => self.advance(written),
            Err(_) => {
                self.broken = true;
                self.parts.clear();
            }
        }
    }

    fn advance(&mut self, mut written: usize) {
        self.unflushed = true;
        self.bytes = self.bytes.saturating_sub(written);
        while let Some(part) = self.parts.front_mut() {
            let here = written.min(part.len());
            part.advance(here);
            written -= here;
            if !part.is_empty() {
                return;
            }
            self.parts.pop_front();
        }
    }
}

#[cfg(test)]
mod tests;
