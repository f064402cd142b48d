//! Where a daemon's files lie and what it listens on: in a pod, and on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::api::OverlayNode;

/// The leaf certificate and what follows it, PEM.
pub const TLS_CERTIFICATE: &str = "tls.crt";
/// The leaf's private key, PEM.
pub const TLS_KEY: &str = "tls.key";
/// The accepted authorities, PEM.
pub const TLS_CA: &str = "ca.crt";
/// The accepted token keys, JWKS.
pub const TOKEN_KEYS: &str = "token-keys.json";
/// The private half of the token root, PEM; never beside a daemon.
pub const TOKEN_ROOT_KEY: &str = "token.key";
/// The token that a daemon presents to its peers.
pub const PEER_TOKEN: &str = "peer";
/// The token of a pod's local clients.
pub const LOCAL_TOKEN: &str = "local";
/// The token of local clients, beside the socket of a daemon on loopback.
pub const SOCKET_TOKEN: &str = "token";
/// The socket.
pub const SOCKET: &str = "overlay.sock";
/// The port of admin HTTP in a pod.
pub const ADMIN_PORT: u16 = 9600;
/// Where a pod mounts its ConfigMap.
pub const POD_CONFIG: &str = "/etc/overlay/config";
/// Where a pod mounts its certificate.
pub const POD_TLS: &str = "/etc/overlay/tls";
/// Where a pod mounts its tokens.
pub const POD_TOKEN: &str = "/etc/overlay/token";
/// The memory-backed folder of a pod's socket.
pub const POD_RUN: &str = "/run/overlay";

/// Where one daemon's files lie, and what it listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where TCP+TLS sessions are accepted.
    pub listen: SocketAddr,
    /// Where admin HTTP is served.
    pub admin: SocketAddr,
    /// The folder of [`TLS_CERTIFICATE`], [`TLS_KEY`] and [`TLS_CA`].
    pub tls: PathBuf,
    /// The folder of [`TOKEN_KEYS`] and [`PEER_TOKEN`].
    pub token: PathBuf,
    /// The socket of local clients.
    pub socket: PathBuf,
}

impl Placement {
    /// In a pod: mounted volumes, all addresses.
    #[must_use]
    pub fn pod(node: &OverlayNode) -> Self {
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        Self {
            listen: any(node.spec.transports.tcp.port),
            admin: any(ADMIN_PORT),
            tls: POD_TLS.into(),
            token: POD_TOKEN.into(),
            socket: Path::new(POD_RUN).join(SOCKET),
        }
    }

    /// On loopback: the socket in the daemon's own `folder`, certificates and tokens in
    /// `trust`, and the addresses that the caller found free.
    #[must_use]
    pub fn local(folder: &Path, trust: &Path, listen: SocketAddr, admin: SocketAddr) -> Self {
        Self { listen, admin, tls: trust.to_owned(), token: trust.to_owned(), socket: folder.join(SOCKET) }
    }
}
