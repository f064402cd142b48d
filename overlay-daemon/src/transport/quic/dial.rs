//! Dialling over QUIC.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use quinn::{ConnectError, Connecting, Endpoint};
use tokio::net::lookup_host;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::dial::{DialError, NO_NAME};
use super::{Connection, HandshakeError, TransportConfig, establish, parameters};
use crate::clock::Clock;
use crate::kms::KeySet;

/// For how long goodbyes may take to leave.
const GOODBYE: Duration = Duration::from_millis(500);

/// The UDP sockets from which peers are dialled: one an address family, made when it is first
/// needed, since each takes room for what it receives.
#[derive(Debug, Default)]
pub struct Endpoints(Mutex<[Option<Endpoint>; 2]>);

impl Endpoints {
    /// The one from which `to` is reached.
    fn get(&self, to: SocketAddr) -> io::Result<Endpoint> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut made[usize::from(to.is_ipv6())];
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let from: SocketAddr =
            if to.is_ipv6() { (Ipv6Addr::UNSPECIFIED, 0).into() } else { (Ipv4Addr::UNSPECIFIED, 0).into() };
        Ok(slot.insert(Endpoint::client(from)?).clone())
    }

    /// One has failed for good: the next dial makes another.
    fn forget(&self, to: SocketAddr) {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        made[usize::from(to.is_ipv6())] = None;
    }

    /// Waits until who was dialled has been told that it is over, or could have been.
    pub async fn finish(&self) {
        let made = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for endpoint in made.into_iter().flatten() {
            let _late = timeout(GOODBYE, endpoint.wait_idle()).await;
        }
    }
}

/// Connects to `address`, as [`super::super::dial`] does.
///
/// # Errors
/// As there.
pub async fn dial_quic(
    address: &str,
    keys: &KeySet,
    config: &TransportConfig,
    clock: Clock,
    endpoints: &Endpoints,
) -> Result<Connection, DialError> {
    let deadline = clock.deadline(config.handshake);
    let late = || io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
    let unreachable = |source| DialError::Connect { address: address.to_owned(), source };
    let found =
        timeout_at(deadline, lookup_host(address)).await.unwrap_or_else(|_| Err(late())).map_err(unreachable)?;
    let none = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut last = unreachable(none);
    for to in found {
        let endpoint = match endpoints.get(to) {
            Ok(endpoint) => endpoint,
            Err(error) => {
                last = unreachable(error);
                continue;
            }
        };
        let dialled = match begin(&endpoint, to, keys) {
            Ok(dialled) => dialled,
            Err(error) => {
                if matches!(error, HandshakeError::Gone) {
                    endpoints.forget(to);
                }
                last = DialError::Handshake { address: address.to_owned(), source: error };
                continue;
            }
        };
        let shaken = timeout_at(deadline, handshake(dialled, deadline)).await;
        match shaken.unwrap_or(Err(HandshakeError::Timeout)) {
            Ok(connection) => return Ok(connection),
            Err(source) => last = DialError::Handshake { address: address.to_owned(), source },
        }
    }
    Err(last)
}

fn begin(endpoint: &Endpoint, to: SocketAddr, keys: &KeySet) -> Result<Connecting, HandshakeError> {
    let client = keys.quic().ok_or(HandshakeError::NotHybrid)?.client();
    let mut dialling = quinn::ClientConfig::new(client.clone());
    dialling.transport_config(parameters(0));
    endpoint.connect_with(dialling, to, NO_NAME).map_err(|error| match error {
        ConnectError::EndpointStopping => HandshakeError::Gone,
        error => HandshakeError::Io(io::Error::other(error)),
    })
}

async fn handshake(connecting: Connecting, deadline: Instant) -> Result<Connection, HandshakeError> {
    let connection = connecting.await?;
    let stream = connection.open_bi().await?;
    establish(&connection, stream, deadline)
}
