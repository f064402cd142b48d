//! Names of everything that belongs to an OverlayNode, in a cluster and on loopback.

use overlay_core::identity::{NameError, SpiffeId};

use crate::api::{OverlayNode, PeerTransport};

/// The namespace of a manifest that names none.
pub const DEFAULT_NAMESPACE: &str = "default";
/// The trust domain of an installation that sets none.
pub const DEFAULT_TRUST_DOMAIN: &str = "overlay.local";
/// The Secret of the installation's certificate authority, in the operator's namespace.
pub const CA_SECRET: &str = "overlay-ca";
/// The Secret of the installation's token root, in the operator's namespace.
pub const TOKEN_ROOT_SECRET: &str = "overlay-token-root";
/// The signer that pods ask for their certificates, which is the operator.
pub const SIGNER: &str = "overlay.rustyonions.io/mesh";
/// The daemon's container.
pub const CONTAINER: &str = "overlay-daemon";
/// The port name of sessions.
pub const SESSION_PORT: &str = "overlay";
/// The port name of sessions over QUIC.
pub const QUIC_PORT: &str = "overlay-quic";
/// The port name of what an onion service forwards.
pub const TOR_PORT: &str = "overlay-tor";
/// The port name of admin HTTP.
pub const ADMIN_PORT: &str = "overlay-admin";
/// The shared configuration file.
pub const CONFIG_FILE: &str = "overlay.toml";
/// Bytes of a trust domain (the SPIFFE-ID specification, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;

/// The OverlayNode's own name: its StatefulSet, its ServiceAccount and its client Service
/// have it too.
#[must_use]
pub fn name(node: &OverlayNode) -> &str {
    node.metadata.name.as_deref().unwrap_or_default()
}

/// Its namespace.
#[must_use]
pub fn namespace(node: &OverlayNode) -> &str {
    node.metadata.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE)
}

/// Its daemons; none where the number makes no sense.
#[must_use]
pub fn replicas(node: &OverlayNode) -> u32 {
    u32::try_from(node.spec.replicas).unwrap_or(0)
}

/// A trust domain as an option gives it.
///
/// # Errors
/// What it must be.
pub fn trust_domain(text: &str) -> Result<String, String> {
    if text.len() <= MAX_TRUST_DOMAIN && SpiffeId::overlay_node(text, "namespace", "name").is_ok() {
        return Ok(text.to_owned());
    }
    Err(format!("must be 1 to {MAX_TRUST_DOMAIN} lowercase letters, digits, '.', '-' and '_', such as example.org"))
}

/// Its identity, which its daemons share.
///
/// # Errors
/// The trust domain, the namespace or the name has a character that an id does not allow;
/// for an admitted node it can only be the trust domain.
pub fn identity(node: &OverlayNode, trust_domain: &str) -> Result<SpiffeId, NameError> {
    SpiffeId::overlay_node(trust_domain, namespace(node), name(node))
}

/// The daemon of an ordinal: the pod's name, the peer's name in configuration and metrics.
#[must_use]
pub fn daemon(node: &OverlayNode, ordinal: u32) -> String {
    format!("{}-{ordinal}", name(node))
}

/// The headless Service, by which daemons find one another.
#[must_use]
pub fn peers_service(node: &OverlayNode) -> String {
    format!("{}-peers", name(node))
}

/// The ConfigMap.
#[must_use]
pub fn config_map(node: &OverlayNode) -> String {
    format!("{}-config", name(node))
}

/// The Secret of the leaf certificate.
#[must_use]
pub fn tls_secret(node: &OverlayNode) -> String {
    format!("{}-tls", name(node))
}

/// The Secret of tokens and token keys.
#[must_use]
pub fn token_secret(node: &OverlayNode) -> String {
    format!("{}-token", name(node))
}

/// The peers file of a daemon, in the ConfigMap and on loopback.
#[must_use]
pub fn peers_file(daemon: &str) -> String {
    format!("peers-{daemon}.toml")
}

/// Where other pods reach the daemon of an ordinal.
#[must_use]
pub fn pod_address(node: &OverlayNode, ordinal: u32) -> String {
    let port = match node.spec.peers.transport {
        PeerTransport::Tcp | PeerTransport::Tor => node.spec.transports.tcp.port,
        PeerTransport::Quic => node.spec.transports.quic.port,
    };
    format!("{}.{}.{}.svc:{port}", daemon(node, ordinal), peers_service(node), namespace(node))
}
