//! Transports (the seam `ron-transport`): from an address or a listening socket to an
//! authenticated byte stream, under one deadline. What is said on the stream, and whether its
//! peer is welcome, is decided above.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use overlay_core::config::{DaemonConfig, Transport};
use overlay_core::identity::SpiffeId;
use overlay_core::memory::WRITE_BYTES;
use overlay_core::status::Reason;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_rustls::TlsStream;

use crate::kms::{ALPN, IdentityError, KeyExchangeGroup, Leaf};

mod descriptors;
mod dial;
mod listen;
mod pace;
mod pending;
mod quic;
mod socks;
mod stream;
mod tor;
mod unix;

#[cfg(test)]
pub(crate) mod tests;

pub use descriptors::{Descriptor, Descriptors};
pub use dial::{DialError, dial};
pub use listen::{AcceptError, Accepted, Listener};
pub use pace::{EXHAUSTED_PAUSE, is_callers};
pub use quic::{Endpoints, QuicAccepted, QuicListener, QuicStream, dial_quic};
pub use socks::{Isolation, Reply, SocksError};
pub use stream::Stream;
pub use tor::{Proxy, Via, dial_tor};
pub use unix::{LocalConnection, LocalError, LocalListener};

/// Bytes that TLS takes from a session's writer before they must leave: what a writer hands over at a
/// time, and the largest frame of a message. With rustls's own 64 KiB the end of each such
/// frame would be a record, a packet and a system call of its own.
const TLS_BYTES: usize = WRITE_BYTES + 8 * 1024;

/// The timeouts and caps of a transport (I-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransportConfig {
    /// From TCP accept, or from the first lookup of a dial, to HELLO answered, all of it.
    pub handshake: Duration,
    /// From a frame's first byte to its last.
    pub read: Duration,
    /// Bytes that are queued must leave within it.
    pub write: Duration,
    /// No frame either way for so long ends a session: kept by the core's session machine.
    pub idle: Duration,
    /// TLS handshakes at once, counted from a complete ClientHello.
    pub max_handshakes_in_flight: usize,
    /// Connections without a complete ClientHello.
    pub max_pending: usize,
    /// Bytes that readers' buffers may take in all before a frame over 64 KiB is refused.
    pub max_reading: u64,
    /// An inflated payload as a multiple of the compressed one, at the most.
    pub decompression_ratio: u8,
}

/// The configuration of every transport; QUIC and the Unix socket have TCP's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transports {
    tcp: TransportConfig,
    tor: TransportConfig,
    /// Tor's SOCKS proxy.
    socks: Arc<str>,
}

impl Transports {
    fn of(&self, transport: Transport) -> TransportConfig {
        match transport {
            Transport::Tcp | Transport::Quic => self.tcp,
            Transport::Tor => self.tor,
        }
    }
}

/// The [`TransportConfig`] of one transport, which may change: each connection takes what holds
/// when it begins.
#[derive(Clone, Debug)]
pub struct Timing {
    all: watch::Receiver<Transports>,
    transport: Transport,
}

impl Timing {
    /// What holds now.
    #[must_use]
    pub fn now(&self) -> TransportConfig {
        self.all.borrow().of(self.transport)
    }

    /// Where Tor's proxy is now, `HOST:PORT`.
    #[must_use]
    pub fn socks(&self) -> Arc<str> {
        Arc::clone(&self.all.borrow().socks)
    }

    /// The same of another transport.
    #[must_use]
    pub fn of(&self, transport: Transport) -> Self {
        Self { transport, ..self.clone() }
    }
}

/// TCP's.
impl From<watch::Receiver<Transports>> for Timing {
    fn from(all: watch::Receiver<Transports>) -> Self {
        Self { all, transport: Transport::Tcp }
    }
}

/// One that never changes, whatever the transport.
impl From<TransportConfig> for Timing {
    fn from(config: TransportConfig) -> Self {
        let all = Transports { tcp: config, tor: config, socks: Arc::from("") };
        Self::from(watch::channel(all).1)
    }
}

impl From<&DaemonConfig> for Transports {
    fn from(config: &DaemonConfig) -> Self {
        let (tcp, tor) = (TransportConfig::tcp(config), &config.tor);
        let tor_config = TransportConfig {
            handshake: Duration::from_millis(tor.handshake_timeout_ms),
            read: Duration::from_millis(tor.read_timeout_ms),
            write: Duration::from_millis(tor.write_timeout_ms),
            idle: Duration::from_millis(tor.idle_timeout_ms),
            ..tcp
        };
        Self { tcp, tor: tor_config, socks: tor.socks.as_str().into() }
    }
}

impl TransportConfig {
    pub(crate) fn tcp(config: &DaemonConfig) -> Self {
        let overlay = &config.overlay;
        Self {
            handshake: Duration::from_millis(overlay.handshake_timeout_ms),
            read: Duration::from_millis(overlay.read_timeout_ms),
            write: Duration::from_millis(overlay.write_timeout_ms),
            idle: Duration::from_millis(overlay.idle_timeout_ms),
            max_handshakes_in_flight: usize::try_from(overlay.max_handshakes_in_flight).unwrap_or(usize::MAX),
            max_pending: usize::try_from(overlay.max_pending).unwrap_or(usize::MAX),
            // A quarter: beside what is held, what is queued and the sessions themselves.
            max_reading: overlay.memory_bytes / 4,
            decompression_ratio: overlay.decompression_ratio,
        }
    }
}

/// A byte stream whose other end has shown who it is.
#[derive(Debug)]
pub struct Connection {
    /// The bytes.
    pub stream: Stream,
    /// What carries them.
    pub transport: Transport,
    /// Who the certificate says it is. The caller decides whether that is who it wants.
    pub peer: SpiffeId,
    /// The certificate, and what came with it: it may lose its authority while the session lives.
    pub chain: Vec<CertificateDer<'static>>,
    /// When that certificate ceases to be valid, milliseconds since 1970.
    pub peer_not_after_ms: u64,
    /// What the key exchange agreed on.
    pub group: KeyExchangeGroup,
    /// Until when HELLO must be answered: the handshake's deadline covers it too.
    pub deadline: Instant,
    /// What it costs, where it was accepted: held for as long as the connection is.
    pub descriptor: Option<Descriptor>,
}

impl Connection {
    /// Judges a finished TLS handshake.
    fn of_tls(stream: TlsStream<TcpStream>, transport: Transport, deadline: Instant) -> Result<Self, HandshakeError> {
        let (_, tls) = stream.get_ref();
        if tls.alpn_protocol() != Some(ALPN) {
            return Err(HandshakeError::Alpn);
        }
        let leaf = Leaf::of_chain(tls.peer_certificates())?;
        let group = KeyExchangeGroup::of(tls).ok_or(HandshakeError::KeyExchange)?;
        let chain = tls.peer_certificates().unwrap_or_default().iter().map(|c| c.clone().into_owned()).collect();
        Ok(Self {
            stream: Stream::Tcp(Box::new(stream)),
            transport,
            peer: leaf.identity,
            chain,
            peer_not_after_ms: leaf.not_after_ms,
            group,
            deadline,
            descriptor: None,
        })
    }
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It took longer than [`TransportConfig::handshake`].
    #[error("the handshake was not over in time")]
    Timeout,
    /// It said nothing while [`TransportConfig::max_pending`] others wanted in, and it was the
    /// oldest.
    #[error("closed to make room: it had sent no ClientHello")]
    Crowded,
    /// As many handshakes as may be were under way, and as many waited for their turn.
    #[error("too many handshakes wait for their turn")]
    Busy,
    /// The other side went away.
    #[error("the connection ended during the handshake")]
    Gone,
    /// TLS refused: the version, the key exchange, a certificate.
    #[error("{0}")]
    Tls(rustls::Error),
    /// QUIC refused, its TLS among it.
    #[error("{0}")]
    Quic(quinn::ConnectionError),
    /// The keys are for a policy under which QUIC's key exchange would not be known.
    #[error("QUIC takes tls.key_exchange RequireHybrid")]
    NotHybrid,
    /// The other side does not speak `ron/oap1`.
    #[error("the other side does not offer ALPN ron/oap1")]
    Alpn,
    /// The certificate is valid and names nobody.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS does not say what was agreed on; kept apart so that it can never pass for hybrid.
    #[error("the key exchange is not known")]
    KeyExchange,
    /// The socket failed.
    #[error(transparent)]
    Io(io::Error),
}

impl HandshakeError {
    /// Which `reason` of `overlay_rejected_total` counts it. A connection that just ended was
    /// not refused: load balancers and probes do that all day.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Timeout => Some(Reason::Timeout),
            Self::Crowded | Self::Busy => Some(Reason::Overflow),
            Self::Tls(_) | Self::Quic(_) | Self::NotHybrid | Self::Alpn | Self::Identity(_) | Self::KeyExchange => {
                Some(Reason::Tls)
            }
            Self::Gone | Self::Io(_) => None,
        }
    }
}

/// tokio-rustls wraps TLS's own errors; the rest are the socket's.
impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
        let kind = error.kind();
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match (tls, kind) {
            (Some(tls), _) => Self::Tls(tls.clone()),
            (None, BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof) => Self::Gone,
            (None, _) => Self::Io(error),
        }
    }
}
