//! Names of everything that belongs to an OverlayNode, in a cluster and on loopback.

use overlay_core::identity::{NameError, SpiffeId};

use crate::api::OverlayNode;

/// The namespace of a manifest that names none.
pub const DEFAULT_NAMESPACE: &str = "default";
/// The trust domain of an installation that sets none.
pub const DEFAULT_TRUST_DOMAIN: &str = "overlay.local";
/// The Secret of the installation's certificate authority, in the operator's namespace.
pub const CA_SECRET: &str = "overlay-ca";
/// The Secret of the installation's token root, in the operator's namespace.
pub const TOKEN_ROOT_SECRET: &str = "overlay-token-root";
/// The daemon's container.
pub const CONTAINER: &str = "overlay-daemon";
/// The port name of sessions.
pub const SESSION_PORT: &str = "overlay";
/// The port name of admin HTTP.
pub const ADMIN_PORT: &str = "overlay-admin";
/// The shared configuration file.
pub const CONFIG_FILE: &str = "overlay.toml";
/// The label that says whose an object is; its value is the OverlayNode's name.
pub const NAME_LABEL: &str = "overlay.rustyonions.io/name";
/// The label that says what looks after an object.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// Its value, and the field manager of every write.
pub const MANAGED_BY: &str = "overlay-operator";
/// The annotation with the hash of the configuration that a pod is to run.
pub const CONFIG_HASH_ANNOTATION: &str = "overlay.rustyonions.io/config-hash";

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
    let port = node.spec.transports.tcp.port;
    format!("{}.{}.{}.svc:{port}", daemon(node, ordinal), peers_service(node), namespace(node))
}
