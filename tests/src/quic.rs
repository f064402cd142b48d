//! A QUIC connection with one stream, for blocking tests: quinn behind `Read` and `Write`. What
//! is said on it is [`crate::oap`]'s.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Result;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, Endpoint, ReadError, RecvStream, SendStream, WriteError};
use rustls::{AlertDescription, ClientConfig};
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// Who is dialled is told apart by certificate.
const NO_NAME: &str = "overlay.invalid";
/// A TLS alert as an error code of QUIC, RFC 9001 section 4.8: 0x100 and the alert.
const ALERTS: u64 = 0x100;

/// One runtime and one socket for all connections of a test's process.
fn shared() -> Result<&'static (Runtime, Endpoint)> {
    static SHARED: OnceLock<(Runtime, Endpoint)> = OnceLock::new();
    if let Some(shared) = SHARED.get() {
        return Ok(shared);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let endpoint = {
        let _inside = runtime.enter();
        Endpoint::client((Ipv4Addr::LOCALHOST, 0).into())?
    };
    Ok(SHARED.get_or_init(|| (runtime, endpoint)))
}

/// The one stream of a connection. Dropped, the connection is closed.
#[derive(Debug)]
pub struct Stream {
    send: SendStream,
    recv: RecvStream,
    wait: Duration,
}

/// Connects, with TLS as `config` has it; a read waits for `wait` at the most.
///
/// # Errors
/// The handshake failed.
pub fn connect(config: ClientConfig, address: SocketAddr, wait: Duration) -> Result<Stream> {
    let (runtime, endpoint) = shared()?;
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config)?));
    runtime.block_on(async {
        let connection = endpoint.connect_with(config, address, NO_NAME)?.await?;
        let (send, recv) = connection.open_bi().await?;
        Ok(Stream { send, recv, wait })
    })
}

/// Whether a second connection by the same configuration could send early data, once a first one
/// has been greeted by `greet`, which keeps it open.
///
/// # Errors
/// A handshake failed.
pub fn could_send_early_data(
    mut config: ClientConfig,
    address: SocketAddr,
    greet: impl FnOnce(Stream) -> Result<()>,
    wait: Duration,
) -> Result<bool> {
    config.enable_early_data = true;
    let (runtime, endpoint) = shared()?;
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config)?));
    let first = runtime.block_on(async {
        let connection = endpoint.connect_with(config.clone(), address, NO_NAME)?.await?;
        anyhow::Ok(connection.open_bi().await?)
    })?;
    greet(Stream { send: first.0, recv: first.1, wait })?;
    let _inside = runtime.enter();
    Ok(endpoint.connect_with(config, address, NO_NAME)?.into_0rtt().is_ok())
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let (runtime, _) = shared().map_err(io::Error::other)?;
        let read = runtime.block_on(async { timeout(self.wait, self.recv.read(buf)).await });
        match read.map_err(|_| io::Error::from(ErrorKind::TimedOut))? {
            Ok(bytes) => Ok(bytes.unwrap_or(0)),
            Err(ReadError::ConnectionLost(error)) => Err(lost(error)),
            Err(error) => Err(io::Error::new(ErrorKind::ConnectionAborted, error)),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let (runtime, _) = shared().map_err(io::Error::other)?;
        let written = runtime.block_on(async { timeout(self.wait, self.send.write(buf)).await });
        match written.map_err(|_| io::Error::from(ErrorKind::TimedOut))? {
            Ok(bytes) => Ok(bytes),
            Err(WriteError::ConnectionLost(error)) => Err(lost(error)),
            Err(error) => Err(io::Error::new(ErrorKind::ConnectionAborted, error)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An end is an end; what broke a rule of QUIC or TLS is no end.
fn lost(error: ConnectionError) -> io::Error {
    match error {
        ConnectionError::ApplicationClosed(_) | ConnectionError::Reset => {
            io::Error::new(ErrorKind::ConnectionAborted, error)
        }
        error => io::Error::other(error),
    }
}

/// The alert that a connection ended with, whoever sent it.
#[must_use]
pub fn alert_of(error: &ConnectionError) -> Option<AlertDescription> {
    let code = match error {
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        ConnectionError::TransportError(error) => u64::from(error.code),
        _ => return None,
    };
    code.checked_sub(ALERTS).and_then(|alert| u8::try_from(alert).ok()).map(AlertDescription::from)
}
