//! The daemon's configuration: what the operator writes and the daemon reads. Types, their
//! defaults by profile and their bounds; files are opened by the shell.
//!
//! Two files: `overlay.toml`, which the replicas of a mesh share, and a peers file, one a
//! daemon. [`daemon`] and [`peers`] turn text into these types and report every error at once.
//! A running daemon takes up new peers and what [`DaemonConfig::with_live`] names; the rest
//! waits for a restart.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Serialize;

use crate::identity::{SpiffeId, TenantId};

mod live;
mod places;
mod read;
mod transport;

pub use places::Places;
pub use read::{ConfigError, daemon, peers, peers_beside};
pub use transport::{Tor, Transport, is_onion};

/// The number in a file's `format`; a daemon refuses any other.
pub const FORMAT: u32 = 1;

/// Which scaling knobs apply (P-3: the semantics are the same).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Profile {
    /// Small, and always without persistence.
    Micronode,
    /// Large.
    Macronode,
}

/// Which key exchanges a TLS handshake may use. Hybrid is X25519MLKEM768.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum KeyExchange {
    /// Hybrid or no session (I-11).
    RequireHybrid,
    /// Hybrid where the other side can, else X25519.
    PreferHybrid,
    /// X25519 only.
    Classical,
}

/// A log's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One object a line.
    Json,
    /// For a person.
    Text,
}

/// A log's threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // the names say it
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// `overlay.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DaemonConfig {
    /// [`FORMAT`].
    pub format: u32,
    /// Listening, limits and timeouts (C-6).
    pub overlay: Overlay,
    /// The proxy and the timeouts of sessions over Tor.
    pub tor: Tor,
    /// Admin HTTP and logs.
    pub observability: Observability,
    /// Certificates and key exchange.
    pub tls: Tls,
    /// Capability tokens.
    pub token: Token,
    /// The socket of local clients.
    pub unix: Unix,
    /// Gossip caps.
    pub gossip: Gossip,
    /// When `/readyz` says so, and when writes are shed.
    pub readiness: Readiness,
    /// What SIGTERM does.
    pub drain: Drain,
}

/// `[overlay]`: the keys of C-6, and their kin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Overlay {
    /// Sets the defaults of the limits.
    pub profile: Profile,
    /// Nothing is written to a disk (I-8); Micronode requires it.
    pub amnesia: bool,
    /// Where TCP+TLS sessions are accepted. Required.
    pub listen: SocketAddr,
    /// Where QUIC sessions are accepted, if anywhere: a UDP address, so its port may be that of
    /// `listen`. Takes [`KeyExchange::RequireHybrid`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen_quic: Option<SocketAddr>,
    /// Tenants that this daemon originates and carries; 1 to 64.
    pub tenants: Vec<TenantId>,
    /// Sessions at once, peers and clients; 1 to 1,000,000. Clients leave one for each
    /// configured peer that is missing.
    pub max_sessions: u32,
    /// TLS handshakes at once; 1 to 65,536.
    pub max_handshakes_in_flight: u32,
    /// Connections that have sent no ClientHello yet; past it the oldest of them is closed. 1 to
    /// 65,536.
    pub max_pending: u32,
    /// Bytes that sessions, queues, uploads and messages held may take in all: see
    /// [`crate::memory`]. 8 MiB to 1 TiB.
    pub memory_bytes: u64,
    /// Requests not yet answered, all sessions; 1 to 1,000,000 (I-9).
    pub inflight: u32,
    /// Requests a second, all sessions; 1 to 10,000,000 (I-9).
    pub rps: u32,
    /// Requests not yet answered, one session; 1 to `inflight`.
    pub per_peer_inflight: u32,
    /// Requests a second, one session; 1 to `rps`.
    pub per_peer_rps: u32,
    /// An inflated payload as a multiple of the compressed one, at the most; 1 to 10.
    pub decompression_ratio: u8,
    /// From TCP accept to HELLO answered, all of it; 100 to 600,000.
    pub handshake_timeout_ms: u64,
    /// From a frame's first byte to its last; 100 to 600,000.
    pub read_timeout_ms: u64,
    /// Bytes that are queued must leave within it; 100 to 600,000.
    pub write_timeout_ms: u64,
    /// No byte either way for so long ends a session; 300 to 3,600,000.
    pub idle_timeout_ms: u64,
}

/// `[observability]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Observability {
    /// Where `/metrics`, `/healthz`, `/readyz` and `/version` are served.
    pub metrics: SocketAddr,
    /// What is logged.
    pub log_level: LogLevel,
    /// And how.
    pub log_format: LogFormat,
}

/// `[tls]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tls {
    /// PEM: the leaf, then intermediates. Its URI SAN is the daemon's identity. Required.
    pub certificate: PathBuf,
    /// PEM, PKCS #8: the leaf's private key. Required. May be the same file as `certificate`,
    /// which then holds both, in any order, as the kubelet writes a pod's credential bundle: it
    /// is read as one, so that a renewal never shows one half new and one half old.
    pub key: PathBuf,
    /// PEM: the authorities whose certificates are accepted. Required.
    pub ca: PathBuf,
    /// Which key exchanges are accepted.
    pub key_exchange: KeyExchange,
}

/// `[token]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Token {
    /// A JSON Web Key Set of Ed25519 public keys, whose tokens are accepted. Required.
    pub keys: PathBuf,
    /// The token that this daemon presents to its peers. Required.
    pub file: PathBuf,
}

/// `[unix]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unix {
    /// The socket's path. Required.
    pub socket: PathBuf,
    /// Who may connect besides root and the daemon's own user; at most 64.
    pub allow_uids: Vec<u32>,
}

/// `[gossip]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gossip {
    /// Peers that a message is pushed to at once, the rest hear of it; 1 to 64 (P-5).
    pub fanout: u32,
    /// Frames that one lane of one session holds; 8 to 65,536 (I-5).
    pub lane_depth_frames: u32,
    /// Frames a second that one session is sent of gossip, as a burst; 1 to 65,536.
    pub burst_frames: u32,
    /// Times a message is passed on; 1 to 64.
    pub max_hops: u8,
    /// Milliseconds for which a message is remembered and held for repair; 1,000 to
    /// 3,600,000. What is older by its origin's clock is refused.
    pub dedupe_window_ms: u64,
    /// Messages remembered; 64 to 4,194,304.
    pub dedupe_entries: u32,
    /// Bytes of payload held for repair, beyond which the oldest go; 1 MiB to 16 GiB, and at
    /// most half of [`Overlay::memory_bytes`].
    pub store_bytes: u64,
}

/// `[readiness]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Distinct peers with an active session that ready takes; 0 to 500.
    pub min_peers: u32,
    /// For how long fewer are forgiven; 0 to 600,000.
    pub peer_loss_grace_ms: u64,
    /// Pressure at which writes get 503; 1 to 100, at most `unready_at_percent`.
    pub shed_at_percent: u8,
    /// Pressure at which `/readyz` is 503; 1 to 100.
    pub unready_at_percent: u8,
    /// Pressure below which both come back; 0 to `shed_at_percent` - 1.
    pub recover_at_percent: u8,
}

/// `[drain]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Drain {
    /// After SIGTERM, for how long everything is still served; 0 to 600,000.
    pub delay_ms: u64,
    /// After that, for how long queues may empty; 0 to 600,000.
    pub timeout_ms: u64,
}

/// The peers file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PeersConfig {
    /// [`FORMAT`].
    pub format: u32,
    /// This daemon's own name: a pod's name in a cluster. 1 to 63 of `[a-z0-9.-]`.
    pub name: String,
    /// Whom to hold sessions with; at most [`MAX_PEERS`], their names distinct.
    #[serde(rename = "peer", skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Peer>,
}

/// Configured peers that a daemon may have: the bound of the metric label `peer` too.
pub const MAX_PEERS: usize = 64;

/// `[[peer]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// What metrics and logs call it; 1 to 63 of `[a-z0-9.-]`. `other` is taken.
    pub name: String,
    /// `HOST:PORT`; a host name is looked up at every dial. An onion service's takes
    /// [`Transport::Tor`].
    pub address: String,
    /// The identity its certificate must have, or one below it.
    pub identity: SpiffeId,
    /// Over what it is dialled. Who dials here may come over any. Left out where it is TCP, so that
    /// older daemons read the file too.
    #[serde(skip_serializing_if = "Transport::is_default")]
    pub transport: Transport,
}

impl DaemonConfig {
    /// Every default of `profile`, for files in the places given.
    #[must_use]
    pub fn with_defaults(
        profile: Profile,
        listen: SocketAddr,
        metrics: SocketAddr,
        tls: Tls,
        token: Token,
        socket: PathBuf,
    ) -> Self {
        Self {
            format: FORMAT,
            overlay: Overlay::defaults(profile, listen),
            tor: Tor::default(),
            observability: Observability { metrics, log_level: LogLevel::Info, log_format: LogFormat::Json },
            tls,
            token,
            unix: Unix { socket, allow_uids: Vec::new() },
            gossip: Gossip::defaults(profile),
            readiness: Readiness::default(),
            drain: Drain::default(),
        }
    }

    /// The file's text. [`daemon`] reads it back to an equal value.
    ///
    /// # Errors
    /// A path is not UTF-8.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// What tells one configuration from another: the first 16 hexadecimal digits of the
    /// BLAKE3 of its effective text, so that comments and key order do not count.
    ///
    /// # Errors
    /// As [`Self::to_toml`].
    pub fn hash(&self) -> Result<String, toml::ser::Error> {
        Ok(short_hash(&self.to_toml()?))
    }
}

fn short_hash(text: &str) -> String {
    let mut hex = blake3::hash(text.as_bytes()).to_hex().to_string();
    hex.truncate(16);
    hex
}

impl PeersConfig {
    /// The file's text. [`peers`] reads it back to an equal value.
    ///
    /// # Errors
    /// None in practice: every member has a TOML form.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// What tells one list of peers from another, as [`DaemonConfig::hash`] does.
    ///
    /// # Errors
    /// As [`Self::to_toml`].
    pub fn hash(&self) -> Result<String, toml::ser::Error> {
        Ok(short_hash(&self.to_toml()?))
    }
}

impl Overlay {
    /// I-9's caps, narrowed per peer as C-6 has them; Macronode holds more sessions and lets
    /// one peer use what the daemon has.
    ///
    /// `memory_bytes` is four times what is held for repair by default: a quarter for that, the
    /// rest for full numbers of sessions at rest (20 KiB each), their queues and uploads. A
    /// Micronode so fits the 256 MiB that a small pod is usually given.
    #[must_use]
    pub fn defaults(profile: Profile, listen: SocketAddr) -> Self {
        let micro = profile == Profile::Micronode;
        Self {
            profile,
            amnesia: true,
            listen,
            listen_quic: None,
            tenants: vec![TenantId(0)],
            max_sessions: if micro { 1_024 } else { 16_384 },
            max_handshakes_in_flight: if micro { 64 } else { 256 },
            max_pending: 4_096,
            memory_bytes: if micro { 128 << 20 } else { 1 << 30 },
            inflight: 512,
            rps: 500,
            per_peer_inflight: if micro { 32 } else { 128 },
            per_peer_rps: if micro { 200 } else { 500 },
            decompression_ratio: crate::compress::MAX_RATIO,
            handshake_timeout_ms: 3_000,
            read_timeout_ms: 5_000,
            write_timeout_ms: 5_000,
            idle_timeout_ms: 15_000,
        }
    }
}

impl Gossip {
    /// `fanout` 6 is the size that the epidemic broadcast literature gives an active view for
    /// ten thousand nodes (Leitão et al., HyParView, 2007: log10 n + 1, one to spare).
    #[must_use]
    pub fn defaults(profile: Profile) -> Self {
        let micro = profile == Profile::Micronode;
        Self {
            fanout: 6,
            lane_depth_frames: if micro { 256 } else { 1_024 },
            burst_frames: if micro { 256 } else { 1_024 },
            max_hops: 16,
            dedupe_window_ms: 120_000,
            dedupe_entries: if micro { 65_536 } else { 1_048_576 },
            store_bytes: if micro { 32 << 20 } else { 256 << 20 },
        }
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self {
            min_peers: 0,
            peer_loss_grace_ms: 10_000,
            shed_at_percent: 80,
            unready_at_percent: 90,
            recover_at_percent: 60,
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self { delay_ms: 5_000, timeout_ms: 30_000 }
    }
}

#[cfg(test)]
mod tests;
