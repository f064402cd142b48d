//! Transports: what a peer is reached by, and the settings of those that TCP's do not fit.

use std::net::SocketAddr;

use serde::Serialize;

use super::DaemonConfig;

/// What carries a session between daemons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Transport {
    /// TLS over TCP.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// QUIC, over UDP. Its TLS does not say which key exchange was agreed on, so it takes
    /// [`super::KeyExchange::RequireHybrid`], with which there is only one.
    #[serde(rename = "QUIC")]
    Quic,
    /// TLS over TCP over Tor, through a SOCKS proxy.
    Tor,
}

impl Transport {
    /// Every transport, by the word that configuration has for it.
    pub const ALL: [(&str, Self); 3] = [("TCP", Self::Tcp), ("QUIC", Self::Quic), ("Tor", Self::Tor)];

    /// Its name in reports of sessions and in HELLO.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tcp => "tcp+tls",
            Self::Quic => "quic",
            Self::Tor => "tor",
        }
    }

    /// The name of what carries a session in reports and logs: the Unix socket, if none.
    #[must_use]
    pub fn label_of(transport: Option<Self>) -> &'static str {
        transport.map_or("unix", Self::label)
    }

    /// Whether it is what a peer has that does not say.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// `[tor]`. Every timeout is longer than TCP's: a circuit is six relays long, and may have to be
/// built first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tor {
    /// `HOST:PORT` of the SOCKS5 proxy that peers with [`Transport::Tor`] are dialled through; a
    /// host name is looked up at every dial.
    pub socks: String,
    /// Where an onion service forwards to: sessions that arrive there are named Tor's and have
    /// its timeouts. Without it an onion service forwards to `overlay.listen`, and its sessions
    /// are TCP's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// From the dial, circuits included, to HELLO answered, all of it; 100 to 600,000.
    pub handshake_timeout_ms: u64,
    /// From a frame's first byte to its last; 100 to 600,000.
    pub read_timeout_ms: u64,
    /// Bytes that are queued must leave within it; 100 to 600,000.
    pub write_timeout_ms: u64,
    /// No byte either way for so long ends a session; 300 to 3,600,000.
    pub idle_timeout_ms: u64,
}

impl Default for Tor {
    /// A dial may need the service's descriptor, its introduction point and two circuits: half a
    /// minute where relays are slow, of which C-tor itself allows two. `idle_timeout_ms` is such
    /// that the dialler's pings, at a third of it, also keep a session whose acceptor has TCP's.
    fn default() -> Self {
        Self {
            socks: "127.0.0.1:9050".to_owned(),
            listen: None,
            handshake_timeout_ms: 60_000,
            read_timeout_ms: 15_000,
            write_timeout_ms: 15_000,
            idle_timeout_ms: 30_000,
        }
    }
}

impl DaemonConfig {
    /// The transports by which sessions are accepted.
    #[must_use]
    pub fn accepts(&self) -> Vec<Transport> {
        let quic = self.overlay.listen_quic.map(|_| Transport::Quic);
        let tor = self.tor.listen.map(|_| Transport::Tor);
        [Some(Transport::Tcp), quic, tor].into_iter().flatten().collect()
    }

    /// For how long, in milliseconds, no byte either way ends a session; no transport is the Unix
    /// socket.
    #[must_use]
    pub fn idle_ms(&self, transport: Option<Transport>) -> u64 {
        match transport {
            Some(Transport::Tor) => self.tor.idle_timeout_ms,
            Some(Transport::Tcp | Transport::Quic) | None => self.overlay.idle_timeout_ms,
        }
    }

    /// The same of a frame's first byte to its last, and of an upload's chunk to the next.
    #[must_use]
    pub fn read_ms(&self, transport: Option<Transport>) -> u64 {
        match transport {
            Some(Transport::Tor) => self.tor.read_timeout_ms,
            Some(Transport::Tcp | Transport::Quic) | None => self.overlay.read_timeout_ms,
        }
    }
}

/// Whether `address`, `HOST:PORT`, is one that Tor alone can reach.
#[must_use]
pub fn is_onion(address: &str) -> bool {
    onion(address).is_some()
}

/// Whether it names a service as version 3 has it (rend-spec-v3, section 6): 35 bytes in base32,
/// key, checksum and the version, whose last five bits are the `d`.
pub(super) fn is_valid_onion(address: &str) -> bool {
    let Some(name) = onion(address) else { return false };
    let service = name.rsplit('.').next().unwrap_or(name);
    service.len() == 56 && service.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7')) && service.ends_with('d')
}

fn onion(address: &str) -> Option<&str> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.strip_suffix('.').unwrap_or(host);
    let (name, top) = host.rsplit_once('.')?;
    top.eq_ignore_ascii_case("onion").then_some(name)
}
