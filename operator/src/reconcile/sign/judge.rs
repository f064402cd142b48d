//! Whether a pod gets the certificate that its kubelet asks for. Pure: it is shown the pod and
//! its owners as they are now, one after the other, and says who comes next.
//!
//! A denial is for good, for this pod: only what is proven wrong is denied. What may yet turn
//! out right is left pending. Whoever may create pods in a namespace can make one that an
//! OverlayNode's StatefulSet takes for its own: the namespace is the boundary, not this.

use std::time::Duration;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::{Resource, ResourceExt};
use overlay_core::identity::SpiffeId;

use super::PodCertificateRequest;
use crate::api::{CertificateSource, GROUP, KIND, OverlayNode, TlsSource};
use crate::build::{names, source_of};
use crate::reconcile::causes::clip;
use crate::trust::{LEAF_LIFETIME, RequestError, RequestedKey};

/// Why there is no certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// For good.
    Denied {
        /// Of which sort.
        reason: Denial,
        /// In words.
        message: String,
    },
    /// For now: it is looked at again.
    Pending(String),
}

/// The reasons of a denial, a closed set. The first two are the API's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// Not Ed25519.
    UnsupportedKeyType,
    /// Something was passed to the signer, which understands nothing of the kind.
    InvalidUnverifiedUserAnnotations,
    /// The request itself is malformed.
    InvalidRequest,
    /// The request says something of the pod that is not so.
    PodMismatch,
    /// The pod is not one of an OverlayNode's.
    NotAnOverlayNodesPod,
}

impl Denial {
    /// As a condition has it.
    #[must_use]
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::UnsupportedKeyType => "UnsupportedKeyType",
            Self::InvalidUnverifiedUserAnnotations => "InvalidUnverifiedUserAnnotations",
            Self::InvalidRequest => "InvalidRequest",
            Self::PodMismatch => "PodMismatch",
            Self::NotAnOverlayNodesPod => "NotAnOverlayNodesPod",
        }
    }
}

/// The object that controls another, as that one says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Controller {
    /// Its name, in the same namespace.
    pub name: String,
    uid: String,
}

fn denied<T>(reason: Denial, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Denied { reason, message: clip(&message.into()) })
}

fn pending<T>(message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Pending(clip(&message.into())))
}

/// The key to certify.
///
/// # Errors
/// It cannot be certified.
pub(super) fn key(request: &PodCertificateRequest) -> Result<RequestedKey, Refusal> {
    if let Some(annotation) = request.spec.unverified_user_annotations.keys().next() {
        let message = format!("the annotation {annotation} means nothing here: leave userAnnotations out");
        return denied(Denial::InvalidUnverifiedUserAnnotations, message);
    }
    RequestedKey::read(&request.spec.stub_pkcs10_request.0).map_err(|error| {
        let reason = match error {
            RequestError::KeyType => Denial::UnsupportedKeyType,
            RequestError::Unreadable | RequestError::Unproven => Denial::InvalidRequest,
        };
        Refusal::Denied { reason, message: error.to_string() }
    })
}

/// For how long it may be valid.
#[must_use]
pub(super) fn lifetime(request: &PodCertificateRequest) -> Duration {
    let asked = request.spec.max_expiration_seconds.map(|seconds| Duration::from_secs(seconds.into()));
    asked.unwrap_or(LEAF_LIFETIME).min(LEAF_LIFETIME)
}

/// Looks at the pod, and names the StatefulSet that it must belong to.
///
/// # Errors
/// It is not the pod that the request is about, or no StatefulSet's.
pub(super) fn pod(request: &PodCertificateRequest, pod: Option<&Pod>) -> Result<Controller, Refusal> {
    let asked = &request.spec;
    let Some(pod) = pod else { return pending(format!("there is no Pod {}", asked.pod_name)) };
    if pod.uid().as_deref() != Some(&asked.pod_uid) {
        return denied(Denial::PodMismatch, format!("Pod {} is another one than the request's", asked.pod_name));
    }
    let spec = pod.spec.as_ref();
    match spec.and_then(|spec| spec.node_name.as_deref()) {
        Some(node) if node == asked.node_name => {}
        Some(node) => {
            let message = format!("Pod {} runs on node {node}, not on {}", asked.pod_name, asked.node_name);
            return denied(Denial::PodMismatch, message);
        }
        None => return pending(format!("Pod {} has no node yet", asked.pod_name)),
    }
    let account = spec.and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default");
    if account != asked.service_account_name {
        let message =
            format!("Pod {} runs as service account {account}, not {}", asked.pod_name, asked.service_account_name);
        return denied(Denial::PodMismatch, message);
    }
    let set = controller(pod, "apps", "StatefulSet")?;
    let ordinal = asked.pod_name.strip_prefix(&set.name).and_then(|rest| rest.strip_prefix('-'));
    if !ordinal.is_some_and(|ordinal| !ordinal.is_empty() && ordinal.bytes().all(|b| b.is_ascii_digit())) {
        let message = format!("Pod {} is not named as StatefulSet {} names its pods", asked.pod_name, set.name);
        return denied(Denial::NotAnOverlayNodesPod, message);
    }
    Ok(set)
}

/// Looks at the StatefulSet, and names the OverlayNode that it must belong to.
///
/// # Errors
/// It is not the pod's, or no OverlayNode's.
pub(super) fn stateful_set(owner: &Controller, set: Option<&StatefulSet>) -> Result<Controller, Refusal> {
    let set = same(owner, "StatefulSet", set)?;
    let node = controller(set, GROUP, KIND)?;
    let template = set.spec.as_ref().map(|spec| source_of(&spec.template));
    if template != Some(TlsSource::PodCertificate) {
        return pending(format!("StatefulSet {} gives its pods no certificates of their own", owner.name));
    }
    Ok(node)
}

/// Looks at the OverlayNode, and names the identity that the pod is certified with.
///
/// # Errors
/// It is not the StatefulSet's owner, or wants no pod certificates.
pub(super) fn overlay_node(
    request: &PodCertificateRequest,
    owner: &Controller,
    node: Option<&OverlayNode>,
    trust_domain: &str,
) -> Result<SpiffeId, Refusal> {
    let node = same(owner, KIND, node)?;
    if node.namespace() != request.namespace() {
        return pending(format!("{KIND} {} is not in the request's namespace", owner.name));
    }
    if node.spec.tls.source == CertificateSource::SelfManaged {
        return pending(format!("{KIND} {} has spec.tls.source SelfManaged", owner.name));
    }
    let id = names::identity(node, trust_domain).and_then(|id| id.pod(&request.spec.pod_name));
    id.map_err(|error| Refusal::Pending(format!("the identity of Pod {}: {error}", request.spec.pod_name)))
}

/// The controller of `object`, where it is of this kind.
fn controller<K: Resource>(object: &K, group: &str, kind: &str) -> Result<Controller, Refusal> {
    let owner = object.owner_references().iter().find(|owner| owner.controller == Some(true));
    match owner {
        Some(owner) if owner.kind == kind && owner.api_version.split('/').next() == Some(group) => {
            Ok(Controller { name: owner.name.clone(), uid: owner.uid.clone() })
        }
        Some(owner) => {
            let message =
                format!("{} is controlled by {} {}, not by a {kind}", object.name_any(), owner.kind, owner.name);
            denied(Denial::NotAnOverlayNodesPod, message)
        }
        None => denied(
            Denial::NotAnOverlayNodesPod,
            format!("{} is controlled by no {kind}: labels make no member of a mesh", object.name_any()),
        ),
    }
}

/// `object`, where it is the one that `owner` means. One that is gone takes its pods along.
fn same<'a, K: Resource>(owner: &Controller, kind: &str, object: Option<&'a K>) -> Result<&'a K, Refusal> {
    match object {
        None => pending(format!("there is no {kind} {}", owner.name)),
        Some(object) if object.meta().uid.as_deref() == Some(&owner.uid) && object.name_any() == owner.name => {
            Ok(object)
        }
        Some(_) => denied(Denial::NotAnOverlayNodesPod, format!("{kind} {} is another one than the pod's", owner.name)),
    }
}

#[cfg(test)]
mod tests;
