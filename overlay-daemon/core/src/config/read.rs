//! From text to a validated configuration, every error at once. Opens no file.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use super::{
    DaemonConfig, Drain, FORMAT, Gossip, KeyExchange, LogFormat, LogLevel, MAX_PEERS, Observability, Overlay, Peer,
    PeersConfig, Profile, Readiness, Tls, Token, Transport, Unix,
};
use crate::compress::MAX_RATIO;
use crate::identity::{SpiffeId, TenantId};

mod table;
mod transports;

pub use table::ConfigError;
use table::{Errors, Table};
use transports::{onion, tor};

/// Where admin HTTP is served if the file does not say (C-6).
const DEFAULT_METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9600);
/// Bytes of a Unix socket's path: `sockaddr_un` has 108, the last is 0.
const MAX_SOCKET_PATH: usize = 107;

/// Reads `overlay.toml`.
///
/// # Errors
/// Everything wrong with it: syntax, unknown fields, types, bounds, what is missing, and
/// rules across fields.
pub fn daemon(text: &str) -> Result<DaemonConfig, Vec<ConfigError>> {
    let (mut errors, entries) = Errors::parse(text);
    let e = &mut errors;
    let mut root = Table::root(&entries);
    let format = root.integer("format", FORMAT..=FORMAT, FORMAT, e);
    let overlay = overlay(root.table("overlay", e), e);
    // The defaults of everything else follow the profile; while that is wrong, either will do.
    let profile = overlay.as_ref().map_or(Profile::Micronode, |overlay| overlay.profile);
    let listen = overlay.as_ref().map(|overlay| overlay.listen);
    let observability = observability(root.table("observability", e), listen, e);
    let metrics = observability.as_ref().map(|observability| observability.metrics);
    let tor = tor(root.table("tor", e), [("overlay.listen", listen), ("observability.metrics", metrics)], e);
    let quic = overlay.as_ref().is_some_and(|overlay| overlay.listen_quic.is_some());
    let tls = tls(root.table("tls", e), quic, e);
    let token = token(root.table("token", e), e);
    let unix = unix(root.table("unix", e), e);
    let memory = overlay.as_ref().map(|overlay| overlay.memory_bytes);
    let gossip = gossip(root.table("gossip", e), profile, memory, e);
    let readiness = readiness(root.table("readiness", e), e);
    let drain = drain(root.table("drain", e), e);
    root.finish(e);
    let config = (|| {
        Some(DaemonConfig {
            format: format?,
            overlay: overlay?,
            tor: tor?,
            observability: observability?,
            tls: tls?,
            token: token?,
            unix: unix?,
            gossip: gossip?,
            readiness: readiness?,
            drain: drain?,
        })
    })();
    errors.finish(config)
}

/// Reads a peers file.
///
/// # Errors
/// As [`daemon`].
pub fn peers(text: &str) -> Result<PeersConfig, Vec<ConfigError>> {
    peers_beside(text, None)
}

/// Reads a peers file, by the rules across both files too where the other one is given.
///
/// # Errors
/// As [`daemon`].
pub fn peers_beside(text: &str, daemon: Option<&DaemonConfig>) -> Result<PeersConfig, Vec<ConfigError>> {
    let may_use_quic = daemon.is_none_or(|daemon| daemon.tls.key_exchange == KeyExchange::RequireHybrid);
    let (mut errors, entries) = Errors::parse(text);
    let e = &mut errors;
    let mut root = Table::root(&entries);
    let format = root.integer("format", FORMAT..=FORMAT, FORMAT, e);
    let name = root.parsed("name", NAME, None, e).map(|Name(name)| name);
    let mut list: Vec<Peer> = Vec::new();
    for mut table in root.tables("peer", MAX_PEERS, e) {
        let peer_name = table.parsed("name", NAME, None, e).map(|Name(name)| name);
        let address = table.parsed("address", HOST_PORT, None, e).map(|Address(address)| address);
        let identity: Option<SpiffeId> = table.parsed("identity", IDENTITY, None, e);
        let transport = table.choice("transport", &Transport::ALL, Transport::default(), e);
        if transport == Some(Transport::Quic) && !may_use_quic {
            table.broken_rule(
                "transport",
                format!("must be TCP, or tls.key_exchange RequireHybrid: {QUIC_IS_HYBRID}"),
                e,
            );
        }
        if let (Some(address), Some(transport)) = (&address, transport) {
            onion(&table, address, transport, e);
        }
        if let Some(peer) = peer_name.as_deref() {
            let taken = match peer {
                "other" => Some("\"other\" is taken: it is what metrics call the peers that are not configured"),
                _ if name.as_deref() == Some(peer) => Some("is this daemon's own name"),
                _ if list.iter().any(|known| known.name == peer) => Some("is the name of another peer too"),
                _ => None,
            };
            if let Some(message) = taken {
                table.broken_rule("name", message, e);
            }
        }
        table.finish(e);
        if let (Some(name), Some(address), Some(identity), Some(transport)) = (peer_name, address, identity, transport)
        {
            list.push(Peer { name, address, identity, transport });
        }
    }
    root.finish(e);
    let config = format.zip(name).map(|(format, name)| PeersConfig { format, name, peers: list });
    errors.finish(config)
}

const HOST_PORT: &str = "HOST:PORT";
const NAME: &str = "1 to 63 of a-z, 0-9, '.' and '-', beginning and ending with a letter or digit";
const IDENTITY: &str = "spiffe://TRUST-DOMAIN/ns/NAMESPACE/overlaynode/NAME, optionally followed by /pod/POD";
const TENANT: &str = "0, a UUID, a ULID or 32 hexadecimal digits";
const SOCKET_ADDRESS: &str = "IP:PORT";
const PATH: &str = "a path";
/// Why QUIC and another policy do not go together.
const QUIC_IS_HYBRID: &str =
    "QUIC does not tell what was agreed on, and is known to be hybrid only where nothing else is offered";

/// Reads `[overlay]`.
fn overlay(mut t: Table<'_, '_>, e: &mut Errors<'_>) -> Option<Overlay> {
    let choices = [("Micronode", Profile::Micronode), ("Macronode", Profile::Macronode)];
    let profile = t.choice("profile", &choices, Profile::Micronode, e);
    let listen = t.parsed("listen", SOCKET_ADDRESS, None, e);
    let listen_quic = t.optional("listen_quic", SOCKET_ADDRESS, e);
    let d = Overlay::defaults(profile.unwrap_or(Profile::Micronode), listen.unwrap_or(DEFAULT_METRICS));
    let amnesia = t.boolean("amnesia", d.amnesia, e);
    if (profile, amnesia) == (Some(Profile::Micronode), Some(false)) {
        t.broken_rule("amnesia", "must be true: profile Micronode never writes to a disk", e);
    }
    let tenants = t.list("tenants", 1..=64, d.tenants, |value| table::parse::<TenantId>(value, TENANT), e);
    let max_sessions = t.integer("max_sessions", 1..=1_000_000, d.max_sessions, e);
    let max_handshakes_in_flight = t.integer("max_handshakes_in_flight", 1..=65_536, d.max_handshakes_in_flight, e);
    let max_pending = t.integer("max_pending", 1..=65_536, d.max_pending, e);
    let memory_bytes = t.integer("memory_bytes", (8 << 20)..=(1 << 40), d.memory_bytes, e);
    let inflight = t.integer("inflight", 1..=1_000_000, d.inflight, e);
    let rps = t.integer("rps", 1..=10_000_000, d.rps, e);
    let per_peer_inflight = within(&mut t, "per_peer_inflight", d.per_peer_inflight, ("inflight", inflight), e);
    let per_peer_rps = within(&mut t, "per_peer_rps", d.per_peer_rps, ("rps", rps), e);
    let decompression_ratio = t.integer("decompression_ratio", 1..=MAX_RATIO, d.decompression_ratio, e);
    let handshake_timeout_ms = t.integer("handshake_timeout_ms", 100..=600_000, d.handshake_timeout_ms, e);
    let read_timeout_ms = t.integer("read_timeout_ms", 100..=600_000, d.read_timeout_ms, e);
    let write_timeout_ms = t.integer("write_timeout_ms", 100..=600_000, d.write_timeout_ms, e);
    let idle_timeout_ms = t.integer("idle_timeout_ms", 300..=3_600_000, d.idle_timeout_ms, e);
    t.finish(e);
    Some(Overlay {
        profile: profile?,
        amnesia: amnesia?,
        listen: listen?,
        listen_quic: listen_quic?,
        tenants: tenants?,
        max_sessions: max_sessions?,
        max_handshakes_in_flight: max_handshakes_in_flight?,
        max_pending: max_pending?,
        memory_bytes: memory_bytes?,
        inflight: inflight?,
        rps: rps?,
        per_peer_inflight: per_peer_inflight?,
        per_peer_rps: per_peer_rps?,
        decompression_ratio: decompression_ratio?,
        handshake_timeout_ms: handshake_timeout_ms?,
        read_timeout_ms: read_timeout_ms?,
        write_timeout_ms: write_timeout_ms?,
        idle_timeout_ms: idle_timeout_ms?,
    })
}

/// A cap of one session, which the cap of the daemon bounds: the default too, so that
/// lowering the total alone is enough.
fn within(
    t: &mut Table<'_, '_>,
    key: &'static str,
    default: u32,
    (total_key, total): (&str, Option<u32>),
    e: &mut Errors<'_>,
) -> Option<u32> {
    let value = t.integer(key, 1..=10_000_000, default.min(total.unwrap_or(default)), e)?;
    if let Some(total) = total.filter(|total| value > *total) {
        t.broken_rule(key, format!("must be at most {} ({total}), is {value}", t.field(total_key)), e);
        return None;
    }
    Some(value)
}

/// Reads `[observability]`.
fn observability(mut t: Table<'_, '_>, listen: Option<SocketAddr>, e: &mut Errors<'_>) -> Option<Observability> {
    let metrics = t.parsed("metrics", SOCKET_ADDRESS, Some(DEFAULT_METRICS), e);
    if metrics.is_some() && metrics == listen && metrics.is_some_and(|address| address.port() != 0) {
        t.broken_rule("metrics", "must differ from overlay.listen", e);
    }
    let levels = [
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    let log_level = t.choice("log_level", &levels, LogLevel::Info, e);
    let formats = [("json", LogFormat::Json), ("text", LogFormat::Text)];
    let log_format = t.choice("log_format", &formats, LogFormat::Json, e);
    t.finish(e);
    Some(Observability { metrics: metrics?, log_level: log_level?, log_format: log_format? })
}

/// Reads `[tls]`. `quic` says that QUIC sessions are accepted.
fn tls(mut t: Table<'_, '_>, quic: bool, e: &mut Errors<'_>) -> Option<Tls> {
    let certificate = path(&mut t, "certificate", e);
    let key = path(&mut t, "key", e);
    let ca = path(&mut t, "ca", e);
    let choices = [
        ("RequireHybrid", KeyExchange::RequireHybrid),
        ("PreferHybrid", KeyExchange::PreferHybrid),
        ("Classical", KeyExchange::Classical),
    ];
    let key_exchange = t.choice("key_exchange", &choices, KeyExchange::RequireHybrid, e);
    if quic && key_exchange.is_some_and(|policy| policy != KeyExchange::RequireHybrid) {
        t.broken_rule("key_exchange", format!("must be RequireHybrid with overlay.listen_quic: {QUIC_IS_HYBRID}"), e);
    }
    t.finish(e);
    Some(Tls { certificate: certificate?, key: key?, ca: ca?, key_exchange: key_exchange? })
}

/// Reads `[token]`.
fn token(mut t: Table<'_, '_>, e: &mut Errors<'_>) -> Option<Token> {
    let keys = path(&mut t, "keys", e);
    let file = path(&mut t, "file", e);
    t.finish(e);
    Some(Token { keys: keys?, file: file? })
}

/// Reads `[unix]`.
fn unix(mut t: Table<'_, '_>, e: &mut Errors<'_>) -> Option<Unix> {
    let socket = path(&mut t, "socket", e);
    let length = socket.as_ref().map_or(0, |socket| socket.as_os_str().len());
    if length > MAX_SOCKET_PATH {
        t.broken_rule("socket", format!("must be at most {MAX_SOCKET_PATH} bytes, is {length}"), e);
    }
    let allow_uids = t.list("allow_uids", 0..=64, Vec::new(), |value| table::integer(value, &(0..=u32::MAX)), e);
    t.finish(e);
    Some(Unix { socket: socket?, allow_uids: allow_uids? })
}

/// Reads `[gossip]`. `memory` is the daemon's budget, of which messages held take half at the
/// most: they are queued and delivered from it too.
fn gossip(mut t: Table<'_, '_>, profile: Profile, memory: Option<u64>, e: &mut Errors<'_>) -> Option<Gossip> {
    let d = Gossip::defaults(profile);
    let fanout = t.integer("fanout", 1..=64, d.fanout, e);
    let lane_depth_frames = t.integer("lane_depth_frames", 8..=65_536, d.lane_depth_frames, e);
    let burst_frames = t.integer("burst_frames", 1..=65_536, d.burst_frames, e);
    let max_hops = t.integer("max_hops", 1..=64, d.max_hops, e);
    let dedupe_window_ms = t.integer("dedupe_window_ms", 1_000..=3_600_000, d.dedupe_window_ms, e);
    let dedupe_entries = t.integer("dedupe_entries", 64..=4_194_304, d.dedupe_entries, e);
    let half = memory.map_or(u64::MAX, |memory| memory / 2);
    let store_bytes = t.integer("store_bytes", (1 << 20)..=(16 << 30), d.store_bytes.min(half), e);
    if store_bytes.is_some_and(|store_bytes| store_bytes > half) {
        t.broken_rule("store_bytes", format!("must be at most half of overlay.memory_bytes ({half})"), e);
    }
    t.finish(e);
    Some(Gossip {
        fanout: fanout?,
        lane_depth_frames: lane_depth_frames?,
        burst_frames: burst_frames?,
        max_hops: max_hops?,
        dedupe_window_ms: dedupe_window_ms?,
        dedupe_entries: dedupe_entries?,
        store_bytes: store_bytes?,
    })
}

/// Reads `[readiness]`. Defaults give way to what is written, as in [`within`].
fn readiness(mut t: Table<'_, '_>, e: &mut Errors<'_>) -> Option<Readiness> {
    let d = Readiness::default();
    let min_peers = t.integer("min_peers", 0..=500, d.min_peers, e);
    let peer_loss_grace_ms = t.integer("peer_loss_grace_ms", 0..=600_000, d.peer_loss_grace_ms, e);
    let unready = t.integer("unready_at_percent", 1..=100, d.unready_at_percent, e);
    let shed = t.integer("shed_at_percent", 1..=100, d.shed_at_percent.min(unready.unwrap_or(100)), e);
    let most_recover = shed.unwrap_or(100).saturating_sub(1);
    let recover = t.integer("recover_at_percent", 0..=99, d.recover_at_percent.min(most_recover), e);
    if let (Some(shed), Some(unready)) = (shed, unready)
        && shed > unready
    {
        let message = format!("must be at most readiness.unready_at_percent ({unready}), is {shed}");
        t.broken_rule("shed_at_percent", message, e);
    }
    if let (Some(recover), Some(shed)) = (recover, shed)
        && recover >= shed
    {
        let message = format!("must be less than readiness.shed_at_percent ({shed}), is {recover}");
        t.broken_rule("recover_at_percent", message, e);
    }
    t.finish(e);
    Some(Readiness {
        min_peers: min_peers?,
        peer_loss_grace_ms: peer_loss_grace_ms?,
        shed_at_percent: shed?,
        unready_at_percent: unready?,
        recover_at_percent: recover?,
    })
}

/// Reads `[drain]`.
fn drain(mut t: Table<'_, '_>, e: &mut Errors<'_>) -> Option<Drain> {
    let d = Drain::default();
    let delay_ms = t.integer("delay_ms", 0..=600_000, d.delay_ms, e);
    let timeout_ms = t.integer("timeout_ms", 0..=600_000, d.timeout_ms, e);
    t.finish(e);
    Some(Drain { delay_ms: delay_ms?, timeout_ms: timeout_ms? })
}

fn path(t: &mut Table<'_, '_>, key: &'static str, e: &mut Errors<'_>) -> Option<PathBuf> {
    t.parsed(key, PATH, None, e).map(|FilePath(path)| path)
}

/// The text is not what was asked for; the message comes from who asked.
#[derive(Debug)]
struct Unfit;

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not of the form")
    }
}

/// A path that names something.
struct FilePath(PathBuf);

impl FromStr for FilePath {
    type Err = Unfit;
    fn from_str(s: &str) -> Result<Self, Unfit> {
        if s.is_empty() || s.contains('\0') { Err(Unfit) } else { Ok(Self(s.into())) }
    }
}

/// The name of a daemon: what a pod may be called.
struct Name(String);

impl FromStr for Name {
    type Err = Unfit;
    fn from_str(s: &str) -> Result<Self, Unfit> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = s.as_bytes();
        let fits = bytes.len() <= 63 && edge(bytes.first()) && edge(bytes.last()) && s.bytes().all(inner);
        if fits { Ok(Self(s.to_owned())) } else { Err(Unfit) }
    }
}

/// `HOST:PORT`, the host a name or an address (IPv6 in brackets); looked up when it is dialled.
struct Address(String);

impl FromStr for Address {
    type Err = Unfit;
    fn from_str(s: &str) -> Result<Self, Unfit> {
        let (host, port) = s.rsplit_once(':').ok_or(Unfit)?;
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = digits && port.parse::<u16>().is_ok_and(|port| port != 0);
        let named = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        let v6 = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let v6 = v6.is_some_and(|host| host.parse::<std::net::Ipv6Addr>().is_ok());
        if port && (named || v6) { Ok(Self(s.to_owned())) } else { Err(Unfit) }
    }
}
