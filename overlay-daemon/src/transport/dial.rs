//! Dialling over TCP and TLS; over Tor the connection is a proxy's, and the rest is the same.

use std::io;
use std::sync::Arc;

use overlay_core::config::{Transport, is_onion};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{TlsConnector, TlsStream};

use super::socks::SocksError;
use super::{Connection, HandshakeError, TLS_BYTES, TransportConfig};
use crate::clock::Clock;

/// TLS insists on a server's name. It is neither sent nor checked: who answers is judged by
/// the certificate's URI SAN.
pub(super) const NO_NAME: &str = "overlay.invalid";

/// Why dialling came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody answers there, or the name is not known.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// What was dialled.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Tor's proxy is down, or is no SOCKS proxy that keeps circuits apart.
    #[error("cannot use the SOCKS proxy {proxy} (tor.socks): {source}")]
    Proxy {
        /// Where it should be.
        proxy: String,
        /// Why.
        source: SocksError,
    },
    /// The proxy is there and did not connect.
    #[error("the SOCKS proxy {proxy} (tor.socks) cannot connect to {address}: {source}")]
    Refused {
        /// What was dialled.
        address: String,
        /// The proxy.
        proxy: String,
        /// Why.
        source: SocksError,
    },
    /// Somebody answers, and the handshake fails.
    #[error("handshake with {address}: {source}")]
    Handshake {
        /// What was dialled.
        address: String,
        /// Why.
        source: HandshakeError,
    },
}

/// Connects to `address` (`HOST:PORT`; a name is looked up each time), within the deadline
/// that covers lookup, connection, TLS and HELLO. Who answered is for the caller to compare.
///
/// With TLS 1.3 this side is done before the other has judged its certificate: a refusal of
/// that shows as an error of the first read.
///
/// # Errors
/// What failed, with the address.
pub async fn dial(
    address: &str,
    tls: &Arc<ClientConfig>,
    config: &TransportConfig,
    clock: Clock,
) -> Result<Connection, DialError> {
    let deadline = clock.deadline(config.handshake);
    let failed = |source| DialError::Connect { address: address.to_owned(), source };
    // Looked up, the name would be told to every resolver on the way (RFC 7686).
    if is_onion(address) {
        let tor_only = "an onion address is reached by transport Tor alone";
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, tor_only)));
    }
    let connect = timeout_at(deadline, TcpStream::connect(address)).await.unwrap_or_else(|_| Err(late()));
    secure(connect.map_err(failed)?, Transport::Tcp, address, tls, deadline).await
}

pub(super) fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
}

/// TLS over a connection to `address`, the deadline of all of it given.
pub(super) async fn secure(
    stream: TcpStream,
    transport: Transport,
    address: &str,
    tls: &Arc<ClientConfig>,
    deadline: Instant,
) -> Result<Connection, DialError> {
    let shaken = timeout_at(deadline, handshake(stream, transport, tls, deadline)).await;
    shaken
        .unwrap_or(Err(HandshakeError::Timeout))
        .map_err(|source| DialError::Handshake { address: address.to_owned(), source })
}

async fn handshake(
    stream: TcpStream,
    transport: Transport,
    tls: &Arc<ClientConfig>,
    deadline: Instant,
) -> Result<Connection, HandshakeError> {
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(NO_NAME).map_err(|error| HandshakeError::Io(io::Error::other(error)))?;
    let mut stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await?;
    stream.get_mut().1.set_buffer_limit(Some(TLS_BYTES));
    Connection::of_tls(TlsStream::from(stream), transport, deadline)
}
