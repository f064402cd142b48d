//! From OverlayNodes to daemons on loopback: names, addresses, folders and both configuration
//! files, by the same `build` as in a cluster. Pure: it opens no port and no file.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use overlay_core::identity::SpiffeId;

use super::runtime_dir::RuntimeDir;
use crate::api::OverlayNode;
use crate::build::{self, Placement, SOCKET_TOKEN, names};

/// Bytes of a Unix socket's path, unix(7): 108 with the zero at its end.
const MAX_SOCKET_PATH: usize = 107;
/// After drain, for closing down; as a pod's grace period has it.
const CLOSING: Duration = Duration::from_secs(5);
/// Ports of one daemon: sessions and admin HTTP.
pub(super) const PORTS_EACH: usize = 2;

/// Why manifests that are valid cannot run here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PlanError {
    /// The kernel's bound.
    #[error(
        "OverlayNode {node}: metadata.name: its daemons' sockets would have the path {path}, and a socket's path has at most {MAX_SOCKET_PATH} bytes; \
         use a shorter name, namespace or XDG_RUNTIME_DIR"
    )]
    SocketPath { node: String, path: String },
    /// Not an id.
    #[error("--trust-domain {trust_domain}: must be lowercase letters, digits, '-', '_' and '.'")]
    TrustDomain { trust_domain: String },
    /// Every `replicas` is 0.
    #[error("nothing to run: spec.replicas is 0 in every OverlayNode")]
    Nothing,
    /// Too few ports were given.
    #[error("{needed} ports are needed, and {given} are free")]
    Ports { needed: usize, given: usize },
    /// A file cannot be written as TOML.
    #[error("the configuration of {node} cannot be written: {error}")]
    Toml { node: String, error: String },
}

/// One daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Daemon {
    pub(super) namespace: String,
    /// As a pod of the StatefulSet would be called.
    pub(super) name: String,
    /// The OverlayNode's identity, which its daemons share.
    pub(super) identity: SpiffeId,
    /// The OverlayNode that it belongs to, by its place in the plan's input.
    pub(super) node: usize,
    /// Its files.
    pub(super) folder: PathBuf,
    pub(super) trust: PathBuf,
    pub(super) socket: PathBuf,
    /// The token of local clients, beside the socket.
    pub(super) token: PathBuf,
    pub(super) config_file: PathBuf,
    pub(super) config: String,
    pub(super) peers_file: PathBuf,
    pub(super) peers: String,
    pub(super) address: SocketAddr,
    pub(super) admin: SocketAddr,
    /// From SIGTERM to SIGKILL.
    pub(super) grace: Duration,
}

/// Daemons that `nodes` call for.
pub(super) fn count(nodes: &[OverlayNode]) -> usize {
    nodes.iter().map(|node| names::replicas(node) as usize).sum()
}

/// Lays out `nodes` under `root`, in their order and then by ordinal; each daemon takes
/// [`PORTS_EACH`] of `ports`.
pub(super) fn daemons(
    nodes: &[OverlayNode],
    root: &Path,
    trust_domain: &str,
    ports: &[u16],
) -> Result<Vec<Daemon>, PlanError> {
    let needed = count(nodes) * PORTS_EACH;
    if needed == 0 {
        return Err(PlanError::Nothing);
    }
    if ports.len() < needed {
        return Err(PlanError::Ports { needed, given: ports.len() });
    }
    let mut pairs = ports.chunks_exact(PORTS_EACH).map(|pair| (loopback(pair[0]), loopback(pair[1])));
    let mut daemons = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let identity = names::identity(node, trust_domain)
            .map_err(|_| PlanError::TrustDomain { trust_domain: trust_domain.to_owned() })?;
        let addresses: Vec<_> = pairs.by_ref().take(names::replicas(node) as usize).collect();
        for (ordinal, at) in (0..).zip(&addresses) {
            daemons.push(daemon(node, index, &identity, ordinal, &addresses, *at, root)?);
        }
    }
    Ok(daemons)
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn daemon(
    node: &OverlayNode,
    index: usize,
    identity: &SpiffeId,
    ordinal: u32,
    addresses: &[(SocketAddr, SocketAddr)],
    (address, admin): (SocketAddr, SocketAddr),
    root: &Path,
) -> Result<Daemon, PlanError> {
    let namespace = names::namespace(node);
    let name = names::daemon(node, ordinal);
    let folder = RuntimeDir::folder(root, namespace, &name);
    let trust = folder.join("trust");
    let placement = Placement::local(&folder, &trust, address, admin);
    let shown = || format!("{namespace}/{}", names::name(node));
    if placement.socket.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(PlanError::SocketPath { node: shown(), path: placement.socket.display().to_string() });
    }
    let config = build::daemon_config(node, &placement);
    let peers = build::peers_config(
        node,
        ordinal,
        identity,
        |_| identity.clone(),
        |other| {
            // Ordinals are those of `addresses`; another one has no address to give.
            addresses.get(other as usize).map(|(address, _)| address.to_string()).unwrap_or_default()
        },
    );
    let unwritable = |error: String| PlanError::Toml { node: shown(), error };
    Ok(Daemon {
        node: index,
        identity: identity.clone(),
        grace: Duration::from_millis(config.drain.delay_ms.saturating_add(config.drain.timeout_ms)) + CLOSING,
        config_file: folder.join(names::CONFIG_FILE),
        config: config.to_toml().map_err(|e| unwritable(e.to_string()))?,
        peers_file: folder.join(names::peers_file(&name)),
        peers: peers.to_toml().map_err(|e| unwritable(e.to_string()))?,
        token: folder.join(SOCKET_TOKEN),
        socket: placement.socket,
        namespace: namespace.to_owned(),
        name,
        folder,
        trust,
        address,
        admin,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use overlay_core::config;
    use std::collections::BTreeSet;

    const ROOT: &str = "/run/user/1000/overlay";

    fn node(namespace: &str, name: &str, replicas: i32) -> OverlayNode {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "overlay.rustyonions.io/v1alpha1",
            "kind": "OverlayNode",
            "metadata": { "namespace": namespace, "name": name },
            "spec": { "replicas": replicas, "drain": { "delay": "1s", "timeout": "2s" } },
        }))
        .unwrap()
    }

    fn plan(nodes: &[OverlayNode]) -> Result<Vec<Daemon>, PlanError> {
        let ports: Vec<u16> = (20_000..20_100).collect();
        daemons(nodes, Path::new(ROOT), "overlay.local", &ports)
    }

    #[test]
    fn daemons_are_named_and_placed_like_pods() {
        let daemons = plan(&[node("default", "mesh", 2), node("default", "none", 0), node("edge", "mesh", 1)]).unwrap();
        let want = [
            (0, "default", "mesh-0", "127.0.0.1:20000", "127.0.0.1:20001"),
            (0, "default", "mesh-1", "127.0.0.1:20002", "127.0.0.1:20003"),
            (2, "edge", "mesh-0", "127.0.0.1:20004", "127.0.0.1:20005"),
        ];
        assert_eq!(daemons.len(), want.len());
        for (daemon, (node, namespace, name, address, admin)) in daemons.iter().zip(want) {
            assert_eq!((daemon.node, daemon.namespace.as_str(), daemon.name.as_str()), (node, namespace, name));
            assert_eq!((daemon.address.to_string().as_str(), daemon.admin.to_string().as_str()), (address, admin));
            let folder = Path::new(ROOT).join(format!("{namespace}.{name}"));
            assert_eq!(daemon.socket, folder.join("overlay.sock"));
            assert_eq!(daemon.token, folder.join("token"), "clients look for it beside the socket");
            assert_eq!(daemon.grace, Duration::from_secs(8), "drain, and five seconds to close");
        }
        let folders: BTreeSet<_> = daemons.iter().map(|d| &d.folder).collect();
        assert_eq!(folders.len(), daemons.len());
    }

    /// The files are what the daemon reads; each OverlayNode is a mesh of its own (I-1).
    #[test]
    fn the_files_read_back_and_peers_stay_in_their_mesh() {
        let daemons = plan(&[node("default", "mesh", 3), node("default", "other", 1)]).unwrap();
        let want: [&[&str]; 4] = [
            &["127.0.0.1:20002", "127.0.0.1:20004"],
            &["127.0.0.1:20000", "127.0.0.1:20004"],
            &["127.0.0.1:20000", "127.0.0.1:20002"],
            &[],
        ];
        for (daemon, want) in daemons.iter().zip(want) {
            let config = config::daemon(&daemon.config).unwrap();
            assert_eq!((config.overlay.listen, config.observability.metrics), (daemon.address, daemon.admin));
            assert_eq!(
                (config.unix.socket.as_path(), config.tls.key.as_path()),
                (daemon.socket.as_path(), daemon.trust.join("tls.key").as_path())
            );
            let peers = config::peers(&daemon.peers).unwrap();
            assert_eq!(peers.name, daemon.name);
            assert_eq!(peers.peers.iter().map(|p| p.address.as_str()).collect::<Vec<_>>(), want, "{}", daemon.name);
            assert!(peers.peers.iter().all(|p| p.identity == daemon.identity));
        }
    }

    #[test]
    fn what_cannot_run_here_says_why() {
        let long = "a".repeat(48);
        let table = [
            (plan(&[node("default", "mesh", 0)]), "spec.replicas is 0"),
            (plan(&[node(&"n".repeat(63), &long, 1)]), "at most 107 bytes"),
            (
                daemons(&[node("default", "mesh", 2)], Path::new(ROOT), "overlay.local", &[1, 2, 3]),
                "4 ports are needed",
            ),
            (
                daemons(&[node("default", "mesh", 1)], Path::new(ROOT), "Not/A/Domain", &[1, 2]),
                "--trust-domain Not/A/Domain",
            ),
        ];
        for (got, part) in table {
            let message = got.unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
