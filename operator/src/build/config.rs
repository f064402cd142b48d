//! The whole spec as a daemon's configuration. Defaults by profile come from
//! [`overlay_core::config`]; nothing is defaulted here.

use overlay_core::config::{self, DaemonConfig, FORMAT, Peer, PeersConfig, Transport};
use overlay_core::identity::SpiffeId;

use super::names;
use super::placement::{PEER_TOKEN, Placement, TOKEN_KEYS};
use crate::api::{
    self, Effective, EffectiveLimits, KeyExchange, LogFormat, LogLevel, OverlayNode, PeerTransport, Profile, Size,
    TlsSource,
};

/// Pods that a rolling change takes away at once.
const MAX_UNAVAILABLE: u32 = 1;

/// `overlay.toml` of the node's daemons.
#[must_use]
pub fn daemon_config(node: &OverlayNode, at: &Placement) -> DaemonConfig {
    let spec = &node.spec;
    let profile = match spec.profile {
        Profile::Micronode => config::Profile::Micronode,
        Profile::Macronode => config::Profile::Macronode,
    };
    let tls = config::Tls {
        certificate: at.certificate.clone(),
        key: at.key.clone(),
        ca: at.ca.clone(),
        key_exchange: match spec.tls.key_exchange {
            KeyExchange::RequireHybrid => config::KeyExchange::RequireHybrid,
            KeyExchange::PreferHybrid => config::KeyExchange::PreferHybrid,
            KeyExchange::Classical => config::KeyExchange::Classical,
        },
    };
    let token = config::Token { keys: at.token.join(TOKEN_KEYS), file: at.token.join(PEER_TOKEN) };
    let mut out = DaemonConfig::with_defaults(profile, at.listen, at.admin, tls, token, at.socket.clone());
    out.overlay.listen_quic = spec.transports.quic.enabled.then_some(at.listen_quic);
    out.tor = tor(&spec.transports.tor, at);
    limits(node, &mut out.overlay);
    gossip(node, &mut out.gossip);
    out.gossip.store_bytes = out.gossip.store_bytes.min(out.overlay.memory_bytes / 2);
    out.observability.log_level = match spec.logging.level {
        LogLevel::Error => config::LogLevel::Error,
        LogLevel::Warn => config::LogLevel::Warn,
        LogLevel::Info => config::LogLevel::Info,
        LogLevel::Debug => config::LogLevel::Debug,
        LogLevel::Trace => config::LogLevel::Trace,
    };
    out.observability.log_format = match spec.logging.format {
        LogFormat::Json => config::LogFormat::Json,
        LogFormat::Text => config::LogFormat::Text,
    };
    out.readiness = config::Readiness {
        min_peers: min_peers(node),
        peer_loss_grace_ms: spec.readiness.peer_loss_grace.as_millis(),
        shed_at_percent: spec.readiness.shed_at_percent,
        unready_at_percent: spec.readiness.unready_at_percent,
        recover_at_percent: spec.readiness.recover_at_percent,
    };
    out.drain = config::Drain { delay_ms: spec.drain.delay.as_millis(), timeout_ms: spec.drain.timeout.as_millis() };
    out
}

fn limits(node: &OverlayNode, out: &mut config::Overlay) {
    let (spec, limits) = (&node.spec, &node.spec.limits);
    out.amnesia = spec.amnesia;
    out.tenants.clear();
    for tenant in &spec.auth.tenants {
        // Two spellings of one tenant are one tenant.
        if !out.tenants.contains(tenant) {
            out.tenants.push(*tenant);
        }
    }
    out.max_sessions = limits.max_sessions.unwrap_or(out.max_sessions);
    out.max_handshakes_in_flight = limits.max_handshakes_in_flight.unwrap_or(out.max_handshakes_in_flight);
    out.max_pending = limits.max_pending;
    out.memory_bytes = limits.memory.as_ref().map_or(out.memory_bytes, Size::bytes);
    out.inflight = limits.inflight;
    out.rps = limits.requests_per_second;
    // A total below the profile's share of one peer narrows that share with it.
    out.per_peer_inflight = limits.per_peer_inflight.unwrap_or(out.per_peer_inflight).min(out.inflight);
    out.per_peer_rps = limits.per_peer_requests_per_second.unwrap_or(out.per_peer_rps).min(out.rps);
    out.decompression_ratio = limits.decompression_ratio;
    out.handshake_timeout_ms = limits.timeouts.handshake.as_millis();
    out.read_timeout_ms = limits.timeouts.read.as_millis();
    out.write_timeout_ms = limits.timeouts.write.as_millis();
    out.idle_timeout_ms = limits.timeouts.idle.as_millis();
}

/// Tor's settings; its defaults where it is not enabled, and then nobody asks for them.
fn tor(tor: &api::Tor, at: &Placement) -> config::Tor {
    if !tor.enabled {
        return config::Tor::default();
    }
    config::Tor {
        socks: tor.socks_address.clone(),
        listen: at.listen_tor,
        handshake_timeout_ms: tor.timeouts.handshake.as_millis(),
        read_timeout_ms: tor.timeouts.read.as_millis(),
        write_timeout_ms: tor.timeouts.write.as_millis(),
        idle_timeout_ms: tor.timeouts.idle.as_millis(),
    }
}

fn gossip(node: &OverlayNode, out: &mut config::Gossip) {
    let gossip = &node.spec.gossip;
    out.fanout = gossip.fanout;
    out.lane_depth_frames = gossip.lane_depth_frames.unwrap_or(out.lane_depth_frames);
    out.burst_frames = gossip.burst_frames.unwrap_or(out.burst_frames);
    out.max_hops = gossip.max_hops.unwrap_or(out.max_hops);
    out.dedupe_window_ms = gossip.dedupe.window.as_millis();
    out.dedupe_entries = gossip.dedupe.entries.unwrap_or(out.dedupe_entries);
}

/// Peers that each daemon needs to be ready: what the spec asks for, but never more than are
/// left while a rolling change replaces one, or the change could not go on.
#[must_use]
pub fn min_peers(node: &OverlayNode) -> u32 {
    let fixed = u32::try_from(node.spec.peers.fixed.len()).unwrap_or(u32::MAX);
    let peers = names::replicas(node).saturating_sub(1).saturating_add(fixed);
    node.spec.readiness.min_peers.min(peers.saturating_sub(MAX_UNAVAILABLE))
}

/// The peers file of the daemon with `ordinal`: every other replica, and those outside, which have
/// the identity of all, `identity`.
#[must_use]
pub fn peers_config(
    node: &OverlayNode,
    ordinal: u32,
    identity: &SpiffeId,
    identity_of: impl Fn(u32) -> SpiffeId,
    address_of: impl Fn(u32) -> String,
) -> PeersConfig {
    let peers = (0..names::replicas(node)).filter(|other| *other != ordinal).map(|other| Peer {
        name: names::daemon(node, other),
        address: address_of(other),
        identity: identity_of(other),
        transport: transport(node.spec.peers.transport),
    });
    let outside = node.spec.peers.fixed.iter().map(|peer| Peer {
        name: peer.name.clone(),
        address: peer.address.clone(),
        identity: identity.clone(),
        transport: transport(peer.transport.unwrap_or_default()),
    });
    PeersConfig { format: FORMAT, name: names::daemon(node, ordinal), peers: peers.chain(outside).collect() }
}

fn transport(transport: PeerTransport) -> Transport {
    match transport {
        PeerTransport::Tcp => Transport::Tcp,
        PeerTransport::Quic => Transport::Quic,
        PeerTransport::Tor => Transport::Tor,
    }
}

/// What profile and cluster decide, for the status.
#[must_use]
pub fn effective(node: &OverlayNode, image: Option<String>) -> Effective {
    // Where certificates lie shows in none of these.
    let config = daemon_config(node, &Placement::pod(node, TlsSource::SelfManaged));
    let (overlay, gossip) = (&config.overlay, &config.gossip);
    Effective {
        min_peers: i32::try_from(config.readiness.min_peers).unwrap_or(i32::MAX),
        key_exchange: node.spec.tls.key_exchange,
        image,
        limits: EffectiveLimits {
            max_sessions: overlay.max_sessions.into(),
            max_handshakes_in_flight: overlay.max_handshakes_in_flight.into(),
            memory_bytes: i64::try_from(overlay.memory_bytes).unwrap_or(i64::MAX),
            inflight: overlay.inflight.into(),
            requests_per_second: overlay.rps.into(),
            per_peer_inflight: overlay.per_peer_inflight.into(),
            per_peer_requests_per_second: overlay.per_peer_rps.into(),
            lane_depth_frames: gossip.lane_depth_frames.into(),
            burst_frames: gossip.burst_frames.into(),
            max_hops: gossip.max_hops.into(),
            dedupe_entries: gossip.dedupe_entries.into(),
        },
    }
}

#[cfg(test)]
mod tests;
