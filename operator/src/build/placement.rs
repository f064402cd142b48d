//! Where a daemon's files lie and what it listens on: in a pod, and on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::api::{OverlayNode, TlsSource};

/// The leaf certificate and what follows it, PEM.
pub const TLS_CERTIFICATE: &str = "tls.crt";
/// The leaf's private key, PEM.
pub const TLS_KEY: &str = "tls.key";
/// A pod's own private key with its leaf certificate and what follows it, PEM: one file, so
/// that the two always belong together.
pub const TLS_BUNDLE: &str = "bundle.pem";
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
    /// Where QUIC sessions are accepted, if they are.
    pub listen_quic: SocketAddr,
    /// Where an onion service forwards to, if not to `listen`.
    pub listen_tor: Option<SocketAddr>,
    /// Where admin HTTP is served.
    pub admin: SocketAddr,
    /// The leaf certificate.
    pub certificate: PathBuf,
    /// Its private key; may be in the same file.
    pub key: PathBuf,
    /// The accepted authorities.
    pub ca: PathBuf,
    /// The folder of [`TOKEN_KEYS`] and [`PEER_TOKEN`].
    pub token: PathBuf,
    /// The socket of local clients.
    pub socket: PathBuf,
}

impl Placement {
    /// In a pod: mounted volumes, all addresses.
    #[must_use]
    pub fn pod(node: &OverlayNode, source: TlsSource) -> Self {
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let tls = Path::new(POD_TLS);
        let (certificate, key) = match source {
            TlsSource::PodCertificate => (TLS_BUNDLE, TLS_BUNDLE),
            TlsSource::SelfManaged => (TLS_CERTIFICATE, TLS_KEY),
        };
        Self {
            listen: any(node.spec.transports.tcp.port),
            listen_quic: any(node.spec.transports.quic.port),
            listen_tor: node.spec.transports.tor.port.map(any),
            admin: any(ADMIN_PORT),
            certificate: tls.join(certificate),
            key: tls.join(key),
            ca: tls.join(TLS_CA),
            token: POD_TOKEN.into(),
            socket: Path::new(POD_RUN).join(SOCKET),
        }
    }

    /// On loopback: the socket in the daemon's own `folder`, certificates and tokens in
    /// `trust`, and the addresses that the caller found free; `listen` for TCP and UDP.
    #[must_use]
    pub fn local(folder: &Path, trust: &Path, listen: SocketAddr, admin: SocketAddr) -> Self {
        Self {
            listen,
            listen_quic: listen,
            listen_tor: None,
            admin,
            certificate: trust.join(TLS_CERTIFICATE),
            key: trust.join(TLS_KEY),
            ca: trust.join(TLS_CA),
            token: trust.to_owned(),
            socket: folder.join(SOCKET),
        }
    }
}
