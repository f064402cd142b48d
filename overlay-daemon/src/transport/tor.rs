//! Dialling over Tor: TCP from a SOCKS proxy on, TLS inside as everywhere. Tor is a program of its
//! own beside the daemon; none of it is linked in.

use std::sync::Arc;

use overlay_core::Millis;
use overlay_core::config::Transport;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout_at;

use super::dial::{late, secure};
use super::socks::{self, Isolation, SocksError};
use super::{Connection, DialError, TransportConfig};
use crate::clock::Clock;

/// By which proxy, and by whose circuits.
#[derive(Clone, Copy, Debug)]
pub struct Via<'a> {
    /// `HOST:PORT`; a name is looked up each time.
    pub proxy: &'a str,
    /// What no other peer shares.
    pub isolation: &'a Isolation,
}

/// How dialling last found the proxy; clones share it. Where nobody dials over Tor any more, what
/// was found is forgotten after a while.
#[derive(Clone, Debug)]
pub struct Proxy(watch::Sender<Option<(Millis, String)>>);

impl Default for Proxy {
    fn default() -> Self {
        Self(watch::channel(None).0)
    }
}

impl Proxy {
    /// Longer than any pause between two dials of one peer.
    const REMEMBERED_MS: u64 = 60_000;

    /// A dial went through the proxy, or did not.
    pub fn handle_dial<T>(&self, dialled: &Result<T, DialError>, now: Millis) {
        self.0.send_replace(match dialled {
            Err(error @ DialError::Proxy { .. }) => Some((now, error.to_string())),
            _ => None,
        });
    }

    /// Why it cannot be used, if that is so.
    #[must_use]
    pub fn problem(&self, now: Millis) -> Option<String> {
        let last = self.0.borrow();
        last.as_ref().filter(|(at, _)| now.since(*at) < Self::REMEMBERED_MS).map(|(_, why)| why.clone())
    }
}

/// As [`super::dial`], through Tor: the deadline covers circuits too, and `address` is the proxy's
/// to look up.
///
/// # Errors
/// What failed, with the proxy and the address.
pub async fn dial_tor(
    address: &str,
    via: Via<'_>,
    tls: &Arc<ClientConfig>,
    config: &TransportConfig,
    clock: Clock,
) -> Result<Connection, DialError> {
    let deadline = clock.deadline(config.handshake);
    let proxy = || via.proxy.to_owned();
    let connect = timeout_at(deadline, TcpStream::connect(via.proxy)).await.unwrap_or_else(|_| Err(late()));
    let mut stream = connect.map_err(|source| DialError::Proxy { proxy: proxy(), source: source.into() })?;
    let asked = timeout_at(deadline, socks::connect(&mut stream, address, via.isolation)).await;
    match asked {
        Ok(Ok(())) => secure(stream, Transport::Tor, address, tls, deadline).await,
        Ok(Err(source @ (SocksError::Refused(_) | SocksError::Address))) => {
            Err(DialError::Refused { address: address.to_owned(), proxy: proxy(), source })
        }
        Ok(Err(source)) => Err(DialError::Proxy { proxy: proxy(), source }),
        Err(_) => Err(DialError::Refused { address: address.to_owned(), proxy: proxy(), source: late().into() }),
    }
}

#[cfg(test)]
mod tests;
