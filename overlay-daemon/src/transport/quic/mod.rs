//! QUIC, over UDP: one bidirectional stream a session, opened by the side that dials. The same
//! TLS configurations as over TCP, so the same verifiers, ALPN, no tickets and no early data.
//!
//! QUIC's TLS does not tell the key exchange, so keys are for QUIC only under a policy that
//! leaves no choice: then it is known to be hybrid. What TCP has the kernel hold is held in this
//! process, and bounded by flow control ([`QUIC_WINDOW_BYTES`] each way).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use overlay_core::config::Transport;
use overlay_core::memory::QUIC_WINDOW_BYTES;
use quinn::{ConnectionError, IdleTimeout, RecvStream, SendStream, StoppedError, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::{Connection, HandshakeError, Stream, TransportConfig};
use crate::kms::{ALPN, KeyExchangeGroup, Leaf};

mod dial;
mod listen;
#[cfg(test)]
mod tests;

pub use dial::{Endpoints, dial_quic};
pub use listen::{QuicAccepted, QuicListener};

/// Bytes of TLS that may come ahead of what it waits for: a chain of certificates, out of order.
const CRYPTO_BYTES: usize = 16 * 1024;

/// What both sides hold a connection to. `streams` is how many the other side may open.
fn parameters(config: &TransportConfig, streams: u8) -> Arc<quinn::TransportConfig> {
    let window = u32::try_from(QUIC_WINDOW_BYTES).unwrap_or(u32::MAX);
    let mut parameters = quinn::TransportConfig::default();
    parameters
        .max_concurrent_bidi_streams(VarInt::from(streams))
        .max_concurrent_uni_streams(VarInt::from(0_u8))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from(window))
        .receive_window(VarInt::from(window))
        .send_window(QUIC_WINDOW_BYTES)
        .crypto_buffer_size(CRYPTO_BYTES)
        // Sessions ping by themselves; this is for who is gone without a word.
        .max_idle_timeout(IdleTimeout::try_from(config.idle).ok());
    Arc::new(parameters)
}

/// The one stream of a session, and its connection with it: dropped, the other side is told.
#[derive(Debug)]
pub struct QuicStream {
    send: SendStream,
    recv: RecvStream,
    closing: Closing,
}

/// Over once the other side has acknowledged all that was sent.
type Acknowledged = Pin<Box<dyn Future<Output = Result<Option<VarInt>, StoppedError>> + Send + Sync>>;

/// What is waited for since this side has sent its last byte.
#[derive(Default)]
struct Closing(Option<Acknowledged>);

impl std::fmt::Debug for Closing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Closing").field(&self.0.is_some()).finish()
    }
}

impl QuicStream {
    fn new((send, recv): (SendStream, RecvStream)) -> Self {
        Self { send, recv, closing: Closing::default() }
    }
}

impl AsyncRead for QuicStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().recv).poll_read(cx, buf)
    }
}

impl AsyncWrite for QuicStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.get_mut().send), cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.get_mut().send), cx)
    }

    /// Over once what was sent is acknowledged: a connection that is dropped before takes back
    /// what is still on its way.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let send = &mut this.send;
        let acknowledged = this.closing.0.get_or_insert_with(|| {
            let _already = send.finish();
            Box::pin(send.stopped())
        });
        let ended = ready!(acknowledged.as_mut().poll(cx));
        Poll::Ready(ended.map(drop).map_err(io::Error::other))
    }
}

/// Judges a finished handshake, of keys that offer the hybrid key exchange alone.
fn establish(
    connection: &quinn::Connection,
    stream: (SendStream, RecvStream),
    deadline: Instant,
) -> Result<Connection, HandshakeError> {
    let data =
        connection.handshake_data().and_then(|data| data.downcast::<quinn::crypto::rustls::HandshakeData>().ok());
    if data.and_then(|data| data.protocol).as_deref() != Some(ALPN) {
        return Err(HandshakeError::Alpn);
    }
    let chain = connection.peer_identity().and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
    let chain = chain.map(|chain| *chain).unwrap_or_default();
    let leaf = Leaf::of_chain(Some(&chain))?;
    Ok(Connection {
        stream: Stream::Quic(QuicStream::new(stream)),
        transport: Transport::Quic,
        peer: leaf.identity,
        chain,
        peer_not_after_ms: leaf.not_after_ms,
        group: KeyExchangeGroup::Hybrid,
        deadline,
        descriptor: None,
    })
}

impl From<ConnectionError> for HandshakeError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::Timeout,
            ConnectionError::Reset | ConnectionError::LocallyClosed | ConnectionError::ApplicationClosed(_) => {
                Self::Gone
            }
            ConnectionError::CidsExhausted => Self::Busy,
            ConnectionError::VersionMismatch
            | ConnectionError::TransportError(_)
            | ConnectionError::ConnectionClosed(_) => Self::Quic(error),
        }
    }
}
