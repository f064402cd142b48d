//! The PodCertificateRequest of `certificates.k8s.io/v1`: as much of it as a signer reads.

// The derive makes a public type of a private one.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use serde::{Deserialize, Serialize};

/// What the kubelet asks for on behalf of a pod. Every field has a default: a request that
/// lacks one is to be judged, not to break the watch.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "certificates.k8s.io",
    version = "v1",
    kind = "PodCertificateRequest",
    plural = "podcertificaterequests",
    namespaced,
    status = "PodCertificateRequestStatus",
    schema = "disabled",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase", default)]
pub struct PodCertificateRequestSpec {
    /// Who shall sign.
    pub signer_name: String,
    /// The pod.
    pub pod_name: String,
    /// And which of the pods that ever had the name.
    #[serde(rename = "podUID")]
    pub pod_uid: String,
    /// The pod's service account.
    pub service_account_name: String,
    /// The node that the pod runs on, whose kubelet asks.
    pub node_name: String,
    /// Seconds that the certificate may be valid; the API server fills it in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_expiration_seconds: Option<u32>,
    /// The key, and the proof that it is held: PKCS #10, DER.
    #[serde(rename = "stubPKCS10Request")]
    pub stub_pkcs10_request: ByteString,
    /// What the pod's author passes to the signer.
    pub unverified_user_annotations: BTreeMap<String, String>,
}

/// What was answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodCertificateRequestStatus {
    /// At most one of Issued, Denied and Failed, each for good.
    pub conditions: Vec<Condition>,
}

impl PodCertificateRequest {
    /// Whether it has been answered, by whomever.
    #[must_use]
    pub(super) fn is_answered(&self) -> bool {
        let answers = ["Issued", "Denied", "Failed"];
        self.status.iter().flat_map(|status| &status.conditions).any(|c| answers.contains(&c.type_.as_str()))
    }
}
