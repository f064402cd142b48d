//! Accepting over TCP and TLS. A connection costs a descriptor until its ClientHello is whole,
//! then one of a bounded number of handshakes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use overlay_core::config::Transport;
use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{LazyConfigAcceptor, TlsStream};

use super::pace::{Pace, is_callers};
use super::pending::{Pending, Place};
use super::{Connection, Descriptors, HandshakeError, TLS_BYTES, Timing};
use crate::clock::Clock;
use crate::kms::{ALPN, KeySet};

/// Handshakes that may wait for their turn, for each that may be under way: at a thousand a
/// second, a fraction of their deadline. Who comes later is refused at once, since it would wait
/// for nothing.
const WAITING: usize = 16;

/// Why a connection was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// No descriptor was left for it, and no silent connection to take one from.
    #[error("as many connections are open as descriptors allow")]
    Crowded,
    /// The system refuses.
    #[error(transparent)]
    Failed(#[from] io::Error),
}

impl AcceptError {
    /// Whether the daemon cannot accept anybody for now, for want of what the system gives.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed(error) if !is_callers(error))
    }
}

/// Handshakes under way, and those that wait. Other bounds are another pair: handshakes that have
/// begun finish under the old one.
pub(super) struct Handshakes {
    pub(super) most: usize,
    running: Semaphore,
    waiting: Semaphore,
    most_waiting: usize,
    /// Somebody has begun to wait.
    wanted: Notify,
}

impl Handshakes {
    /// `most` under way, and as many for each that wait, but at most `most_waiting`.
    pub(super) fn new(most: usize, most_waiting: usize) -> Arc<Self> {
        let most_waiting = most.saturating_mul(WAITING).min(most_waiting).clamp(1, Semaphore::MAX_PERMITS);
        let running = Semaphore::new(most.clamp(1, Semaphore::MAX_PERMITS));
        Arc::new(Self { most, running, waiting: Semaphore::new(most_waiting), most_waiting, wanted: Notify::new() })
    }

    /// A turn. It is given back when it is dropped.
    ///
    /// # Errors
    /// As many wait for theirs as may.
    pub(super) async fn turn(&self) -> Result<SemaphorePermit<'_>, HandshakeError> {
        let waiting = self.waiting.try_acquire().map_err(|_| HandshakeError::Busy)?;
        self.wanted.notify_waiters();
        let turn = self.running.acquire().await.map_err(|_| HandshakeError::Gone)?;
        drop(waiting);
        Ok(turn)
    }

    /// Returns once somebody waits for a turn.
    pub(super) async fn wanted(&self) {
        loop {
            // Before the look: who comes after it is heard.
            let wanted = self.wanted.notified();
            if self.waiting.available_permits() < self.most_waiting {
                return;
            }
            wanted.await;
        }
    }

    /// Whether more than half of them are under way.
    pub(super) fn are_many(&self) -> bool {
        self.running.available_permits() <= self.most / 2
    }
}

/// Connections that the system holds until they are accepted; it may hold fewer
/// (`net.core.somaxconn`). tokio's own 128 are full after a burst that lasts as long as one hub's
/// turn, and who comes then waits for a second before the system asks again.
const BACKLOG: u32 = 4_096;

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Or a restart would wait for the connections of the process before it.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A listening TCP socket.
pub struct Listener {
    socket: TcpListener,
    timing: Timing,
    clock: Clock,
    handshakes: Arc<Handshakes>,
    pending: Pending,
    descriptors: Descriptors,
    pace: Pace,
}

impl Listener {
    /// Binds `address`, for the sessions of the transport that `timing` is of.
    ///
    /// # Errors
    /// The system refuses the address.
    pub async fn bind(
        address: SocketAddr,
        timing: impl Into<Timing>,
        descriptors: Descriptors,
        clock: Clock,
    ) -> io::Result<Self> {
        let timing = timing.into();
        let handshakes = Handshakes::new(timing.now().max_handshakes_in_flight, usize::MAX);
        Ok(Self {
            socket: listen(address)?,
            timing,
            clock,
            handshakes,
            pending: Pending::default(),
            descriptors,
            pace: Pace::default(),
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

    /// The next connection. Cancellation loses none. After an error call it again: it pauses by
    /// itself where that is called for.
    ///
    /// # Errors
    /// Nobody was accepted, which is worth counting; the listener stays usable.
    pub async fn accept(&mut self) -> Result<Accepted, AcceptError> {
        self.pace.ready().await;
        let (stream, address) = self.socket.accept().await.inspect_err(|error| self.pace.failed(error, self.clock))?;
        // Frames are gathered into few writes by their writer; none should wait for another. Where
        // that fails the caller has gone already, which its handshake will notice.
        let _gone = stream.set_nodelay(true);
        let config = self.timing.now();
        if config.max_handshakes_in_flight != self.handshakes.most {
            self.handshakes = Handshakes::new(config.max_handshakes_in_flight, usize::MAX);
        }
        let place = self.pending.enter(config.max_pending, self.descriptors.take()).ok_or(AcceptError::Crowded)?;
        Ok(Accepted {
            stream,
            address,
            transport: self.timing.transport,
            deadline: self.clock.deadline(config.handshake),
            place,
            handshakes: Arc::clone(&self.handshakes),
        })
    }
}

/// A TCP connection that has not shown anything yet.
pub struct Accepted {
    stream: TcpStream,
    address: SocketAddr,
    transport: Transport,
    deadline: Instant,
    place: Place,
    handshakes: Arc<Handshakes>,
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
        let Self { stream, transport, deadline, mut place, handshakes, .. } = self;
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
        let descriptor = place.leave().ok_or(HandshakeError::Crowded)?;
        let offers = hello.client_hello().alpn().is_some_and(|mut offered| offered.any(|name| name == ALPN));
        if !offers {
            // TLS itself lets a client that offers none through.
            return Err(HandshakeError::Alpn);
        }
        let turn = handshakes.turn().await?;
        let mut behind = Ok(());
        let handshake = hello.into_stream_with(Arc::clone(keys.server()), |tls| {
            behind = tls.process_new_packets().map(drop);
        });
        // What came with the hello is judged now: TLS would look once more had come, and who said
        // goodbye in it (T2) would keep a turn until the deadline.
        behind.map_err(HandshakeError::Tls)?;
        let mut stream = Box::pin(handshake).await?;
        stream.get_mut().1.set_buffer_limit(Some(TLS_BYTES));
        drop(turn);
        let connection = Connection::of_tls(TlsStream::from(stream), transport, deadline)?;
        Ok(Connection { descriptor: Some(descriptor), ..connection })
    }
}
