//! The OverlayNode: what a person writes, what the operator answers, and the CRD that both
//! follow. Decides shapes, defaults and bounds; what follows from them is [`crate::build`]'s.
//!
//! A field is here from the day it works. What depends on the profile has no default in the
//! schema and shows in `status.effective`.

// KubeSchema's derive puts a public copy of the struct inside a function.
#![allow(unreachable_pub)]

mod crd;
mod duration;
mod gossip;
mod peers;
mod pod;
mod size;
mod status;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::{CustomResource, KubeSchema};
use overlay_core::identity::TenantId;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

pub use crd::{CrdError, crd, crd_json, crd_yaml};
pub use duration::{Duration, DurationError};
pub use gossip::{Dedupe, Gossip};
pub use peers::{MAX_PEERS, StaticPeer, Tor, TorTimeouts};
pub use pod::{Image, PullPolicy, Quantity, Resources, SecretName};
pub use size::Size;
pub use status::{Effective, EffectiveLimits, OverlayNodeStatus, TlsSource, TlsStatus};

use duration::within;

/// The API group.
pub const GROUP: &str = "overlay.rustyonions.io";
/// The version of it.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of a manifest.
pub const API_VERSION: &str = "overlay.rustyonions.io/v1alpha1";
/// `kind` of a manifest.
pub const KIND: &str = "OverlayNode";

/// What a mesh of overlay daemons should be.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "overlay.rustyonions.io",
    version = "v1alpha1",
    kind = "OverlayNode",
    plural = "overlaynodes",
    singular = "overlaynode",
    shortname = "onode",
    category = "overlay",
    namespaced,
    status = "OverlayNodeStatus",
    derive = "PartialEq",
    doc = "A mesh of overlay daemons: each replica holds sessions with the others and with clients, and passes messages on.",
    validation = Rule::new("size(self.metadata.name) <= 48")
        .message("metadata.name: must be at most 48 characters")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name: must be lowercase letters, digits and '-', start with a letter and end with a letter or digit")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.spec.peers.static) || !self.spec.peers.static.exists(peer, peer.name.matches('-[0-9]+$') && peer.name.substring(0, peer.name.lastIndexOf('-')) == self.metadata.name)")
        .message("spec.peers.static: must not have the name of a replica")
        .reason(Reason::FieldValueInvalid),
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Profile", type_ = "string", json_path = ".spec.profile"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".spec.replicas"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "PQ", type_ = "string", json_path = ".status.effective.keyExchange"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message"),
    printcolumn(name = "Image", type_ = "string", json_path = ".status.effective.image", priority = 1)
)]
#[x_kube(
    validation = Rule::new("self.profile != 'Micronode' || self.amnesia")
        .message("must be true with profile Micronode, which keeps nothing; use profile Macronode to turn it off")
        .field_path(".amnesia")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("!self.transports.quic.enabled || self.tls.keyExchange == 'RequireHybrid'")
        .message("must be false unless tls.keyExchange is RequireHybrid: QUIC does not tell what was agreed on, and is known to be hybrid only where nothing else is offered")
        .field_path(".transports.quic.enabled")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.peers.transport != 'QUIC' || self.transports.quic.enabled")
        .message("must be TCP unless transports.quic.enabled is true")
        .field_path(".peers.transport")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.peers.transport != 'Tor'")
        .message("must be TCP or QUIC: replicas have no onion services; Tor is for peers.static")
        .field_path(".peers.transport")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.transports.tor.enabled || !has(self.peers.static) || !self.peers.static.exists(peer, has(peer.transport) && peer.transport == 'Tor')")
        .message("must be true where one of peers.static has transport Tor")
        .field_path(".transports.tor.enabled")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.tls.keyExchange == 'RequireHybrid' || !has(self.peers.static) || !self.peers.static.exists(peer, has(peer.transport) && peer.transport == 'QUIC')")
        .message("must not have transport QUIC unless tls.keyExchange is RequireHybrid: QUIC does not tell what was agreed on, and is known to be hybrid only where nothing else is offered")
        .field_path(".peers.static")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.peers.static) || self.replicas + size(self.peers.static) <= 65")
        .message("must not be more than 64 together with the other replicas")
        .field_path(".peers.static")
        .reason(Reason::FieldValueInvalid),
    validation = Rule::new("!has(self.transports.tor.port) || self.transports.tor.port != self.transports.tcp.port")
        .message("must differ from transports.tcp.port")
        .field_path(".transports.tor.port")
        .reason(Reason::FieldValueInvalid)
)]
#[serde(rename_all = "camelCase")]
pub struct OverlayNodeSpec {
    /// The size of deployment that limits default to; the semantics are the same.
    #[serde(default)]
    pub profile: Profile,
    /// Nothing is written to a disk, and the kernel enforces it (Landlock) where it can. Every
    /// metric carries it as the label `amnesia`. Micronode requires it.
    #[serde(default = "yes")]
    pub amnesia: bool,
    /// Daemons of the mesh, each of them a peer of every other.
    #[serde(default = "replicas")]
    #[schemars(range(min = 0, max = 64))]
    pub replicas: i32,
    /// The daemon's image; without it, the one that belongs to the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    /// Secrets with credentials for the image's registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<SecretName>,
    /// Where sessions are accepted.
    #[serde(default)]
    pub transports: Transports,
    /// Session security.
    #[serde(default)]
    pub tls: Tls,
    /// What the mesh may carry.
    #[serde(default)]
    pub auth: Auth,
    /// How the daemons hold sessions with one another, and with whom else.
    #[serde(default)]
    pub peers: Peers,
    /// Caps of each daemon, changed without a restart. One request is a frame that expects an
    /// answer.
    #[serde(default)]
    #[x_kube(
        validation = Rule::new("!has(self.perPeerInflight) || self.perPeerInflight <= self.inflight")
            .message("must be at most inflight, which is the daemon's total (512 unless set)")
            .field_path(".perPeerInflight").reason(Reason::FieldValueInvalid),
        validation = Rule::new("!has(self.perPeerRequestsPerSecond) || self.perPeerRequestsPerSecond <= self.requestsPerSecond")
            .message("must be at most requestsPerSecond, which is the daemon's total (500 unless set)")
            .field_path(".perPeerRequestsPerSecond").reason(Reason::FieldValueInvalid)
    )]
    pub limits: Limits,
    /// How messages spread; changed without a restart.
    #[serde(default)]
    pub gossip: Gossip,
    /// When a daemon is ready, and when it sheds writes; changed without a restart. Pressure is the fullest of its
    /// bounded resources, in percent.
    #[serde(default)]
    #[x_kube(
        validation = Rule::new("self.shedAtPercent <= self.unreadyAtPercent")
            .message("must be at most unreadyAtPercent: writes are shed before the daemon says that it is not ready")
            .field_path(".shedAtPercent").reason(Reason::FieldValueInvalid),
        validation = Rule::new("self.recoverAtPercent < self.shedAtPercent")
            .message("must be less than shedAtPercent")
            .field_path(".recoverAtPercent").reason(Reason::FieldValueInvalid)
    )]
    pub readiness: Readiness,
    /// What a daemon does before it stops.
    #[serde(default)]
    pub drain: Drain,
    /// The daemons' logs.
    #[serde(default)]
    pub logging: Logging,
    /// Compute resources of each daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Labels of the nodes that daemons may run on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "pod::node_selector")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that daemons tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "pod::tolerations")]
    pub tolerations: Vec<Toleration>,
}

/// The size of a deployment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Profile {
    /// Small, and always without persistence.
    #[default]
    Micronode,
    /// Large.
    Macronode,
}

/// Transports of a mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Transports {
    /// TLS over TCP.
    pub tcp: Tcp,
    /// QUIC, besides.
    pub quic: Quic,
    /// Tor, besides.
    pub tor: Tor,
}

/// TLS over TCP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Tcp {
    /// The port that pods listen on. `local` gives each daemon a free port instead.
    #[schemars(schema_with = "port")]
    pub port: u16,
}

/// QUIC over UDP: the same certificates and key exchange, one stream a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Quic {
    /// Whether QUIC sessions are accepted. Takes tls.keyExchange RequireHybrid.
    pub enabled: bool,
    /// The UDP port that pods listen on. `local` uses the number of the daemon's TCP port instead.
    #[schemars(schema_with = "udp_port")]
    pub port: u16,
}

/// How the daemons of a mesh hold sessions with one another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Peers {
    /// Over what they dial one another; changed without a restart, for new sessions. QUIC takes
    /// transports.quic.enabled.
    pub transport: PeerTransport,
    /// Peers of every replica besides the others, changed without a restart. They list the replicas
    /// too.
    #[serde(rename = "static", skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "peers::static_peers")]
    pub fixed: Vec<StaticPeer>,
}

/// Over what a daemon dials another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PeerTransport {
    /// TLS over TCP.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// QUIC over UDP.
    #[serde(rename = "QUIC")]
    Quic,
    /// TLS over TCP over Tor.
    Tor,
}

/// Session security: TLS 1.3 with certificates on both sides, always.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Tls {
    /// Which key exchanges are accepted; hybrid is X25519MLKEM768. Changed without a restart,
    /// for new sessions.
    pub key_exchange: KeyExchange,
    /// Where the daemons' certificates come from. `Auto` is PodCertificate where the API server
    /// serves PodCertificateRequests, every node's kubelet is 1.37 or newer and the operator may
    /// sign, else SelfManaged; what it chose stands in `status.tls.source` and is chosen anew
    /// only when the pods are rolled anyway. `local` runs Auto as SelfManaged. Whoever may create
    /// pods in a namespace may join its meshes, with either.
    pub source: CertificateSource,
}

/// Where the daemons' certificates come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CertificateSource {
    /// What the cluster allows of the two others.
    #[default]
    Auto,
    /// The kubelet makes a key for each pod, in the pod's memory only, and the operator signs
    /// for it: each pod has an identity of its own.
    PodCertificate,
    /// The operator makes one key and certificate for all pods, in Secret NAME-tls.
    SelfManaged,
}

/// Which key exchanges a session may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KeyExchange {
    /// Hybrid or no session.
    #[default]
    RequireHybrid,
    /// Hybrid where the other side can, else X25519.
    PreferHybrid,
    /// X25519 only.
    Classical,
}

/// What a mesh may carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Auth {
    /// Tenants whose messages the daemons originate and pass on: `0`, a UUID, a ULID or 32
    /// hexadecimal digits.
    #[schemars(schema_with = "tenants")]
    pub tenants: Vec<TenantId>,
}

/// Caps of one daemon; what is left out follows from the profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Limits {
    /// Sessions at once, peers and clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_sessions: Option<u32>,
    /// TLS handshakes at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_536))]
    pub max_handshakes_in_flight: Option<u32>,
    /// Connections that have not begun a handshake; past it the oldest of them is closed.
    #[schemars(range(min = 1, max = 65_536))]
    pub max_pending: u32,
    /// What sessions, queues, uploads and messages held may take in all, such as 128Mi or 2Gi:
    /// writes are shed as it fills. What is held for repair is bounded by half of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Requests not yet answered, all sessions.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub inflight: u32,
    /// Requests a second, all sessions.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub requests_per_second: u32,
    /// Requests not yet answered, one session.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub per_peer_inflight: Option<u32>,
    /// Requests a second, one session.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub per_peer_requests_per_second: Option<u32>,
    /// An inflated payload as a multiple of the compressed one, at the most.
    #[schemars(range(min = 1, max = 10))]
    pub decompression_ratio: u8,
    /// Timeouts of a session.
    pub timeouts: Timeouts,
}

/// Timeouts of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Timeouts {
    /// From accepting to the session's first answer, all of it.
    #[schemars(schema_with = "within::<100, 600_000>")]
    pub handshake: Duration,
    /// From a frame's first byte to its last.
    #[schemars(schema_with = "within::<100, 600_000>")]
    pub read: Duration,
    /// Bytes that are queued must leave within it.
    #[schemars(schema_with = "within::<100, 600_000>")]
    pub write: Duration,
    /// No frame either way for so long ends a session.
    #[schemars(schema_with = "within::<300, 3_600_000>")]
    pub idle: Duration,
}

/// Readiness and shedding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Readiness {
    /// Peers with an active session that ready takes; never more than may be expected while
    /// one replica is replaced.
    #[schemars(range(min = 0, max = 500))]
    pub min_peers: u32,
    /// For how long fewer are forgiven.
    #[schemars(schema_with = "within::<0, 600_000>")]
    pub peer_loss_grace: Duration,
    /// Pressure from which writes are refused.
    #[schemars(range(min = 1, max = 100))]
    pub shed_at_percent: u8,
    /// Pressure from which the daemon is not ready.
    #[schemars(range(min = 1, max = 100))]
    pub unready_at_percent: u8,
    /// Pressure below which both come back.
    #[schemars(range(min = 0, max = 99))]
    pub recover_at_percent: u8,
}

/// What a daemon does before it stops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Drain {
    /// For how long everything is still served.
    #[schemars(schema_with = "within::<0, 600_000>")]
    pub delay: Duration,
    /// After that, for how long queues may empty.
    #[schemars(schema_with = "within::<0, 600_000>")]
    pub timeout: Duration,
}

/// Logs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Logging {
    /// The least severe level that is logged; changed without a restart.
    pub level: LogLevel,
    /// One JSON object a line, or text.
    pub format: LogFormat,
}

/// A log's threshold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each name says it; a doc would change the schema")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// A log's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "each name says it; a doc would change the schema")]
pub enum LogFormat {
    #[default]
    #[serde(rename = "JSON")]
    Json,
    Text,
}

const fn yes() -> bool {
    true
}

const fn replicas() -> i32 {
    3
}

impl Default for Tcp {
    fn default() -> Self {
        Self { port: 9500 }
    }
}

impl Default for Quic {
    fn default() -> Self {
        Self { enabled: false, port: 9500 }
    }
}

impl Default for Auth {
    fn default() -> Self {
        Self { tenants: vec![TenantId(0)] }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_sessions: None,
            max_handshakes_in_flight: None,
            max_pending: 4_096,
            memory: None,
            inflight: 512,
            requests_per_second: 500,
            per_peer_inflight: None,
            per_peer_requests_per_second: None,
            decompression_ratio: 10,
            timeouts: Timeouts::default(),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(3),
            read: Duration::from_secs(5),
            write: Duration::from_secs(5),
            idle: Duration::from_secs(15),
        }
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self {
            min_peers: 0,
            peer_loss_grace: Duration::from_secs(10),
            shed_at_percent: 80,
            unready_at_percent: 90,
            recover_at_percent: 60,
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self { delay: Duration::from_secs(5), timeout: Duration::from_secs(30) }
    }
}

impl Default for OverlayNodeSpec {
    fn default() -> Self {
        Self {
            profile: Profile::default(),
            amnesia: true,
            replicas: replicas(),
            image: None,
            image_pull_secrets: Vec::new(),
            transports: Transports::default(),
            tls: Tls::default(),
            auth: Auth::default(),
            peers: Peers::default(),
            limits: Limits::default(),
            gossip: Gossip::default(),
            readiness: Readiness::default(),
            drain: Drain::default(),
            logging: Logging::default(),
            resources: None,
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
        }
    }
}

/// 9600 is the port of the admin server, in the same pod.
fn port(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "integer", "format": "int32", "minimum": 1, "maximum": 65_535,
        "x-kubernetes-validations": [{ "rule": "self != 9600", "message": "must not be 9600, which the daemon's admin server has" }],
    })
}

fn udp_port(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "integer", "format": "int32", "minimum": 1, "maximum": 65_535 })
}

fn tenants(_: &mut SchemaGenerator) -> Schema {
    let id = "^(0|[0-9A-Fa-f]{32}|[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}|[0-7][0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{25})$";
    json_schema!({
        "type": "array", "minItems": 1, "maxItems": 64, "x-kubernetes-list-type": "set",
        "items": {
            "type": "string", "maxLength": 36,
            "x-kubernetes-validations": [{
                "rule": format!("self.matches('{id}')"),
                "message": "must be 0, a UUID, a ULID or 32 hexadecimal digits",
            }],
        },
    })
}

#[cfg(test)]
mod tests;
