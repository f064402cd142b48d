//! Dialling over Tor: TCP from a SOCKS proxy on, TLS inside as everywhere. Tor is a program of its
//! own beside the daemon; none of it is linked in.

use std::sync::Arc;

use overlay_core::config::Transport;
use rustls::ClientConfig;
use tokio::net::TcpStream;
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
