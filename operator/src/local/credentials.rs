//! The trust of one run: a CA and a token root that live in this process alone, and what
//! daemons need of them, written into their memory-backed folders. Never writes a CA's key.

use std::time::{Duration, SystemTime};

use super::plan::Daemon;
use super::runtime_dir::{RuntimeDir, RuntimeDirError, write_private};
use crate::api::OverlayNode;
use crate::build::{PEER_TOKEN, TLS_CA, TLS_CERTIFICATE, TLS_KEY, TOKEN_KEYS};
use crate::trust::{Ca, Leaf, TokenRoot, TrustError, Zeroizing, local_claims, peer_claims};

/// Certificates and tokens outlive any run, and become worthless with it: what signed them is
/// gone. So nothing renews them.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why a run has no files.
#[derive(Debug, thiserror::Error)]
pub(super) enum CredentialsError {
    /// A key, certificate or token was not made.
    #[error("credentials cannot be made: {0}")]
    Trust(#[from] TrustError),
    /// A file was not written.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
}

/// What the replicas of an OverlayNode share.
struct Shared {
    leaf: Leaf,
    peer: Zeroizing<String>,
    local: Zeroizing<String>,
}

/// Makes every daemon's folder with its configuration, certificate, key and tokens.
///
/// # Errors
/// The first that could not be made or written.
pub(super) fn write(
    dir: &mut RuntimeDir,
    nodes: &[OverlayNode],
    daemons: &[Daemon],
    now: SystemTime,
) -> Result<(), CredentialsError> {
    let ca = Ca::generate(now)?;
    let root = TokenRoot::generate()?;
    let keys = root.jwks();
    let mut shared: Option<(usize, Shared)> = None;
    for daemon in daemons {
        let of_node = match shared.take() {
            Some((node, shared)) if node == daemon.node => shared,
            _ => make(&ca, &root, daemon, &nodes[daemon.node], now)?,
        };
        dir.make(&daemon.folder)?;
        dir.make(&daemon.trust)?;
        let files: [(&str, &str); 5] = [
            (TLS_CERTIFICATE, &of_node.leaf.cert_pem),
            (TLS_KEY, &of_node.leaf.key_pem),
            (TLS_CA, ca.cert_pem()),
            (TOKEN_KEYS, &keys),
            (PEER_TOKEN, &of_node.peer),
        ];
        for (name, text) in files {
            write_private(&daemon.trust.join(name), text)?;
        }
        write_private(&daemon.token, &of_node.local)?;
        write_private(&daemon.config_file, &daemon.config)?;
        write_private(&daemon.peers_file, &daemon.peers)?;
        shared = Some((daemon.node, of_node));
    }
    Ok(())
}

fn make(ca: &Ca, root: &TokenRoot, daemon: &Daemon, node: &OverlayNode, now: SystemTime) -> Result<Shared, TrustError> {
    let (id, tenants) = (&daemon.identity, &node.spec.auth.tenants);
    Ok(Shared {
        leaf: ca.issue_leaf(id, now, LIFETIME)?,
        peer: root.mint(&peer_claims(id, tenants, now, LIFETIME))?,
        local: root.mint(&local_claims(id, tenants, now, LIFETIME))?,
    })
}
