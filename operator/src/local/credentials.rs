//! The trust of one run: a CA that lives in this process alone, a token root, and what daemons
//! need of them, written into their memory-backed folders. Decides when tokens are rewritten.
//! Never writes a CA's key; the token root's is kept beside the folders, for `token create`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use overlay_core::identity::{SpiffeId, TenantId};

use super::plan::Daemon;
use super::runtime_dir::{RuntimeDir, RuntimeDirError, replace_private, write_private};
use crate::api::OverlayNode;
use crate::build::{PEER_TOKEN, TLS_CA, TLS_CERTIFICATE, TLS_KEY, TOKEN_KEYS, names};
use crate::trust::{Ca, Leaf, TOKEN_LIFETIME, TokenRoot, TrustError, Zeroizing, local_claims, peer_claims, renew_at};

/// Certificates outlive any run, and become worthless with it: what signed them is gone. So
/// nothing renews them.
const LEAF_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Tokens that could not be rewritten are tried again so much later.
const TRY_AGAIN: Duration = Duration::from_secs(60);

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

/// The tokens of a run's daemons, to be rewritten after a third of their life, as in a cluster.
pub(super) struct Tokens {
    root: TokenRoot,
    holders: Vec<TokenFiles>,
    due: SystemTime,
}

/// The tokens of one daemon.
struct TokenFiles {
    identity: SpiffeId,
    tenants: Vec<TenantId>,
    peer: PathBuf,
    local: PathBuf,
}

impl Tokens {
    /// When [`Self::rewrite`] is due.
    pub(super) fn due(&self) -> SystemTime {
        self.due
    }

    /// Writes every token anew. Daemons and clients notice, and renew what they have open.
    ///
    /// # Errors
    /// One could not be made or written; it is due again in a minute.
    pub(super) fn rewrite(&mut self, now: SystemTime) -> Result<(), CredentialsError> {
        self.due = now + TRY_AGAIN;
        for TokenFiles { identity, tenants, peer, local } in &self.holders {
            replace_private(peer, &self.root.mint(&peer_claims(identity, tenants, now, TOKEN_LIFETIME))?)?;
            replace_private(local, &self.root.mint(&local_claims(identity, tenants, now, TOKEN_LIFETIME))?)?;
        }
        self.due = renew_at(now, now + TOKEN_LIFETIME);
        Ok(())
    }
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
) -> Result<Tokens, CredentialsError> {
    let ca = Ca::generate(now)?;
    let root = TokenRoot::generate()?;
    let keys = root.jwks();
    let mut shared: Option<(usize, Shared)> = None;
    let mut holders = Vec::with_capacity(daemons.len());
    for node in nodes {
        dir.keep_token_root(names::namespace(node), names::name(node), &root.to_pem())?;
    }
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
        holders.push(TokenFiles {
            identity: daemon.identity.clone(),
            tenants: nodes[daemon.node].spec.auth.tenants.clone(),
            peer: daemon.trust.join(PEER_TOKEN),
            local: daemon.token.clone(),
        });
    }
    Ok(Tokens { root, holders, due: renew_at(now, now + TOKEN_LIFETIME) })
}

fn make(ca: &Ca, root: &TokenRoot, daemon: &Daemon, node: &OverlayNode, now: SystemTime) -> Result<Shared, TrustError> {
    let (id, tenants) = (&daemon.identity, &node.spec.auth.tenants);
    Ok(Shared {
        leaf: ca.issue_leaf(id, now, LEAF_LIFETIME)?,
        peer: root.mint(&peer_claims(id, tenants, now, TOKEN_LIFETIME))?,
        local: root.mint(&local_claims(id, tenants, now, TOKEN_LIFETIME))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// While a run goes on its tokens are rewritten in time: after a third of their life, so
    /// before half of it, by the same root, and each file whole.
    #[test]
    fn tokens_are_rewritten_before_half_their_life() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("overlay");
        let node: OverlayNode = serde_json::from_value(serde_json::json!({
            "apiVersion": "overlay.rustyonions.io/v1alpha1",
            "kind": "OverlayNode",
            "metadata": { "namespace": "default", "name": "mesh" },
            "spec": { "replicas": 2 },
        }))
        .unwrap();
        let nodes = [node];
        let uid = rustix::process::geteuid().as_raw();
        let daemons = super::super::plan::daemons(&nodes, &root, "overlay.local", &[1, 2, 3, 4]).unwrap();
        let mut dir = RuntimeDir::take(&root, &[("default".to_owned(), "mesh".to_owned())], uid).unwrap();
        let began = SystemTime::now();
        let mut tokens = write(&mut dir, &nodes, &daemons, began).unwrap();
        let pem = std::fs::read_to_string(super::super::runtime_dir::token_root(&root, "default", "mesh")).unwrap();
        let key = TokenRoot::from_pem(&pem).unwrap();
        let expiries = || -> Vec<u64> {
            let files = daemons.iter().flat_map(|daemon| [daemon.trust.join(PEER_TOKEN), daemon.token.clone()]);
            files.map(|file| key.read(&std::fs::read_to_string(file).unwrap()).unwrap().exp).collect()
        };
        let (first, due) = (expiries(), tokens.due());
        assert!(due > began && due.duration_since(began).unwrap() <= TOKEN_LIFETIME / 2, "{due:?}");
        tokens.rewrite(due).unwrap();
        let third = TOKEN_LIFETIME.as_secs() / 3;
        assert!(first.iter().zip(expiries()).all(|(before, after)| after == before + third), "{first:?}");
        assert!(tokens.due() > due);
        std::fs::remove_dir_all(&daemons[1].trust).unwrap();
        assert!(tokens.rewrite(due).is_err() && tokens.due() == due + TRY_AGAIN);
        std::fs::create_dir(&daemons[1].trust).unwrap();
        dir.remove().unwrap();
        assert!(!root.exists());
    }
}
