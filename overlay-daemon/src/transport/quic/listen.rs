//! Accepting over QUIC. Until its first datagram is answered a caller costs nothing but that
//! datagram; from half of the handshakes on callers must show that their address is theirs
//! (Retry, which costs no memory), and a caller whose ClientHello is long in coming gives way once
//! another waits.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{Endpoint, EndpointConfig, Incoming, TokioRuntime};
use tokio::task::consume_budget;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::super::listen::Handshakes;
use super::{Connection, HandshakeError, TransportConfig, establish, parameters};
use crate::clock::Clock;
use crate::kms::{KeySet, QuicKeys};
use crate::transport::Timing;

/// Bytes that may come of one caller, besides its first datagram, before it is answered: the rest
/// of a ClientHello.
const INCOMING_BYTES: u64 = 4 * 1024;
/// The part of the handshake's deadline for which a ClientHello may be incomplete while others
/// wait: half of the deadline is over once all who may wait have had that long, 16 for each turn.
const SILENCE: u32 = 32;
/// And the part for which it may have no stream after it: a lost packet is sent again within that.
const STREAMLESS: u32 = 8;
/// For how long goodbyes may take to leave.
const GOODBYE: Duration = Duration::from_millis(500);

/// A UDP socket on which QUIC connections are accepted.
pub struct QuicListener {
    endpoint: Endpoint,
    accepting: quinn::ServerConfig,
    timing: Timing,
    clock: Clock,
    handshakes: Arc<Handshakes>,
    max_pending: usize,
}

/// Callers that are not answered yet, and what they may have sent.
fn bound(accepting: &mut quinn::ServerConfig, config: &TransportConfig) {
    accepting
        .max_incoming(config.max_pending)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES.saturating_mul(config.max_pending as u64) / 4);
}

impl QuicListener {
    /// Binds `address`, inside a runtime.
    ///
    /// # Errors
    /// The system refuses the address.
    pub fn bind(address: SocketAddr, keys: &QuicKeys, timing: impl Into<Timing>, clock: Clock) -> io::Result<Self> {
        let timing = timing.into();
        let config = timing.now();
        let mut accepting = quinn::ServerConfig::with_crypto(keys.server().clone());
        // A daemon stays where it is; who turns up elsewhere dials anew.
        accepting.migration(false);
        bound(&mut accepting, &config);
        let socket = UdpSocket::bind(address)?;
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new(EndpointConfig::default(), Some(accepting.clone()), socket, runtime)?;
        let handshakes = Handshakes::new(config.max_handshakes_in_flight, config.max_pending);
        Ok(Self { endpoint, accepting, timing, clock, handshakes, max_pending: config.max_pending })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next caller; none once the socket has failed for good. Cancellation loses none.
    pub async fn accept(&mut self) -> Option<QuicAccepted> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let config = self.timing.now();
            self.keep_to(&config);
            if self.handshakes.are_many() && !incoming.remote_address_validated() {
                // It may be asked: its address has not been shown.
                let _asked = incoming.retry();
                // While callers come faster than they are asked, this would not end.
                consume_budget().await;
                continue;
            }
            return Some(QuicAccepted {
                address: incoming.remote_address(),
                incoming,
                accepting: self.accepting.clone(),
                deadline: self.clock.deadline(config.handshake),
                config,
                handshakes: Arc::clone(&self.handshakes),
            });
        }
    }

    /// Takes up bounds that have changed.
    fn keep_to(&mut self, config: &TransportConfig) {
        let bounds = (config.max_handshakes_in_flight, config.max_pending);
        if bounds != (self.handshakes.most, self.max_pending) {
            self.max_pending = config.max_pending;
            self.handshakes = Handshakes::new(config.max_handshakes_in_flight, config.max_pending);
            bound(&mut self.accepting, config);
            self.endpoint.set_server_config(Some(self.accepting.clone()));
        }
    }

    /// Waits until who was connected has been told that it is over, or could have been.
    pub async fn finish(self) {
        self.endpoint.set_server_config(None);
        let _late = timeout(GOODBYE, self.endpoint.wait_idle()).await;
    }
}

/// A caller that has sent one datagram.
pub struct QuicAccepted {
    incoming: Incoming,
    address: SocketAddr,
    accepting: quinn::ServerConfig,
    config: TransportConfig,
    deadline: Instant,
    handshakes: Arc<Handshakes>,
}

impl QuicAccepted {
    /// Where it comes from: for logs, never for decisions.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Tells it to call no more: one datagram, less than its own.
    pub fn refuse(self) {
        self.incoming.refuse();
    }

    /// TLS, and the session's stream, within the deadline that began with the first datagram.
    ///
    /// # Errors
    /// [`HandshakeError::reason`] says what to count.
    pub async fn handshake(self, keys: &KeySet) -> Result<Connection, HandshakeError> {
        let deadline = self.deadline;
        timeout_at(deadline, self.run(keys)).await.map_err(|_| HandshakeError::Timeout)?
    }

    async fn run(self, keys: &KeySet) -> Result<Connection, HandshakeError> {
        let Self { incoming, mut accepting, config, deadline, handshakes, .. } = self;
        // Dropped, a caller is refused: one datagram, less than its own.
        accepting.crypto = keys.quic().ok_or(HandshakeError::NotHybrid)?.server().clone();
        accepting.transport = parameters(1);
        let turn = handshakes.turn().await?;
        let mut connecting = incoming.accept_with(Arc::new(accepting))?;
        let gives_way = async |part: u32| {
            sleep(config.handshake / part).await;
            handshakes.wanted().await;
        };
        tokio::select! {
            hello = connecting.handshake_data() => drop(hello?),
            () = gives_way(SILENCE) => return Err(HandshakeError::Crowded),
        }
        let connection = connecting.await?;
        // No session yet, so in no account but this one. A dialler says HELLO as soon as it can, so
        // that its stream comes with the end of its handshake unless a packet is lost.
        let stream = tokio::select! {
            stream = connection.accept_bi() => stream?,
            () = gives_way(STREAMLESS) => return Err(HandshakeError::Crowded),
        };
        drop(turn);
        establish(&connection, stream, deadline)
    }
}
