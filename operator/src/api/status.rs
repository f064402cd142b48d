//! What the operator says of an OverlayNode.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::KeyExchange;

/// The observed state of an OverlayNode.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OverlayNodeStatus {
    /// The generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Daemon pods that exist.
    pub replicas: i32,
    /// Daemon pods that are ready.
    pub ready_replicas: i32,
    /// Daemon pods of the newest revision.
    pub updated_replicas: i32,
    /// The label selector of the daemon pods, as the scale subresource serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The hash of the configuration last written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_hash: Option<String>,
    /// The hash of configuration and peers that every daemon was seen to run; absent while a
    /// change is on its way to them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running_hash: Option<String>,
    /// Ready, Reconciling, Stalled, Degraded and TrustReady.
    #[schemars(schema_with = "conditions")]
    pub conditions: Vec<Condition>,
    /// What profile and cluster decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effective: Option<Effective>,
    /// The certificate in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsStatus>,
}

/// Values in force, whether they stand in the spec or follow from profile and cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Effective {
    /// Active peers that each daemon needs to be ready.
    pub min_peers: i32,
    /// Which key exchanges are accepted.
    pub key_exchange: KeyExchange,
    /// The daemon's image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Caps of each daemon.
    pub limits: EffectiveLimits,
}

/// Caps in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EffectiveLimits {
    /// Sessions at once.
    pub max_sessions: i64,
    /// TLS handshakes at once.
    pub max_handshakes_in_flight: i64,
    /// Bytes that sessions, queues, uploads and messages held may take.
    #[serde(default)]
    pub memory_bytes: i64,
    /// Requests not yet answered, all sessions.
    pub inflight: i64,
    /// Requests a second, all sessions.
    pub requests_per_second: i64,
    /// Requests not yet answered, one session.
    pub per_peer_inflight: i64,
    /// Requests a second, one session.
    pub per_peer_requests_per_second: i64,
    /// Frames that one lane of one session holds.
    pub lane_depth_frames: i64,
    /// Messages and chunks a second that one peer is sent, and at most at once.
    pub burst_frames: i64,
    /// Times a message is passed on.
    pub max_hops: i64,
    /// Messages remembered.
    pub dedupe_entries: i64,
}

/// Where the daemons' certificate comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TlsStatus {
    /// Who made it.
    pub source: TlsSource,
    /// When it expires; only of a certificate that all pods share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "time")]
    pub not_after: Option<Time>,
    /// The Secret that holds it, with SelfManaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_name: Option<String>,
}

/// Who makes a leaf certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TlsSource {
    /// The operator, a leaf for each pod, whose key the kubelet made.
    PodCertificate,
    /// The operator, one leaf for all replicas.
    SelfManaged,
}

fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time" })
}

/// The standard condition object, with its bounds.
fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": { "type": "string", "maxLength": 316 },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0 },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
                "reason": {
                    "type": "string", "minLength": 1, "maxLength": 1024,
                    "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                },
                "message": { "type": "string", "maxLength": 32768 },
            },
        },
    })
}
