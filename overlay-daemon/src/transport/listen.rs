//! Accepting over TCP and TLS. A connection costs a descriptor until its ClientHello is whole,
//! then one of a bounded number of handshakes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_rustls::{LazyConfigAcceptor, TlsStream};

use super::pending::{MAX_PENDING, Pending, Place};
use super::{Connection, EXHAUSTED_PAUSE, HandshakeError, Timing};
use crate::clock::Clock;
use crate::kms::{ALPN, KeySet};

/// A listening TCP socket.
pub struct Listener {
    socket: TcpListener,
    timing: Timing,
    clock: Clock,
    /// As many permits as handshakes may be in flight, and that number. Another number is
    /// another semaphore: handshakes that have begun finish under the old one.
    handshakes: (usize, Arc<Semaphore>),
    pending: Pending,
    not_before: Option<Instant>,
}

impl Listener {
    /// Binds `address`.
    ///
    /// # Errors
    /// The system refuses the address.
    pub async fn bind(address: SocketAddr, timing: impl Into<Timing>, clock: Clock) -> io::Result<Self> {
        let timing = timing.into();
        let handshakes = semaphore(timing.now().max_handshakes_in_flight);
        Ok(Self {
            socket: TcpListener::bind(address).await?,
            timing,
            clock,
            handshakes,
            pending: Pending::default(),
            not_before: None,
        })
    }

    /// Where it listens: with port 0 in its configuration, the one it was given.
    ///
    /// # Errors
    /// The system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    #[cfg(test)]
    pub(super) fn pending(&self) -> &Pending {
        &self.pending
    }

    /// The next connection. Cancellation loses none. After an error call it again: when
    /// descriptors have run out, the next call pauses by itself.
    ///
    /// # Errors
    /// Accepting failed, which is worth counting; the listener stays usable.
    pub async fn accept(&mut self) -> io::Result<Accepted> {
        if let Some(not_before) = self.not_before {
            sleep_until(not_before).await;
            self.not_before = None;
        }
        match self.socket.accept().await {
            Ok((stream, address)) => {
                // Frames are gathered into few writes by their writer; none should wait for another.
                stream.set_nodelay(true)?;
                let config = self.timing.now();
                if config.max_handshakes_in_flight != self.handshakes.0 {
                    self.handshakes = semaphore(config.max_handshakes_in_flight);
                }
                Ok(Accepted {
                    stream,
                    address,
                    deadline: self.clock.deadline(config.handshake),
                    place: self.pending.enter(MAX_PENDING),
                    handshakes: Arc::clone(&self.handshakes.1),
                })
            }
            Err(error) => {
                if !is_callers(&error) {
                    self.not_before = Some(self.clock.deadline(EXHAUSTED_PAUSE));
                }
                Err(error)
            }
        }
    }
}

fn semaphore(permits: usize) -> (usize, Arc<Semaphore>) {
    (permits, Arc::new(Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS))))
}

/// Whether accepting failed for the caller's sake (it had gone already) and not for ours.
fn is_callers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// A TCP connection that has not shown anything yet.
pub struct Accepted {
    stream: TcpStream,
    address: SocketAddr,
    deadline: Instant,
    place: Place,
    handshakes: Arc<Semaphore>,
}

impl Accepted {
    /// Where it comes from: for logs, never for decisions.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// TLS, within the deadline that began with the accept.
    ///
    /// # Errors
    /// [`HandshakeError::reason`] says what to count.
    pub async fn handshake(self, keys: &KeySet) -> Result<Connection, HandshakeError> {
        let deadline = self.deadline;
        timeout_at(deadline, self.run(keys)).await.map_err(|_| HandshakeError::Timeout)?
    }

    async fn run(self, keys: &KeySet) -> Result<Connection, HandshakeError> {
        let Self { stream, deadline, mut place, handshakes, .. } = self;
        let hello = async {
            stream.readable().await?;
            // TLS's state is boxed: until the first byte a connection is its descriptor and a
            // few words.
            Box::pin(LazyConfigAcceptor::new(Acceptor::default(), stream)).await
        };
        let hello = tokio::select! {
            hello = hello => Box::new(hello?),
            () = place.evicted() => return Err(HandshakeError::Crowded),
        };
        drop(place);
        let offers = hello.client_hello().alpn().is_some_and(|mut offered| offered.any(|name| name == ALPN));
        if !offers {
            // TLS itself lets a client that offers none through.
            return Err(HandshakeError::Alpn);
        }
        let permit = handshakes.acquire().await.map_err(|_| HandshakeError::Gone)?;
        let stream = Box::pin(hello.into_stream(Arc::clone(keys.server()))).await?;
        drop(permit);
        Connection::establish(TlsStream::from(stream), deadline)
    }
}
