//! The writes: server-side apply of objects and of statuses, and the creation of the
//! installation's Secrets. Every mutating request of the operator is sent here and counted;
//! none is decided here.

use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Client, Resource, ResourceExt};
use serde_json::{Value, json};

use super::dereference::resource;
use super::metrics::{Metrics, WriteKind};
use super::plan::{Kind, Wanted};
use super::sign::PodCertificateRequest;
use crate::api::{API_VERSION, KIND, OverlayNode, OverlayNodeStatus};
use crate::build::{labels, names};

/// Applies one object and returns it as it then is.
///
/// # Errors
/// The API server refuses it, or cannot be reached.
pub(super) async fn object(
    client: &Client,
    metrics: &Metrics,
    namespace: &str,
    wanted: &Wanted,
) -> Result<Value, kube::Error> {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource(wanted.kind));
    metrics.wrote(WriteKind::Object(wanted.kind));
    let object = api.patch(&wanted.name, &params(), &Patch::Apply(&wanted.object)).await?;
    serde_json::to_value(object).map_err(kube::Error::SerdeError)
}

/// Applies the status of `node`; refused if another OverlayNode has the name by now.
///
/// # Errors
/// As [`object`].
pub(super) async fn status(
    client: &Client,
    metrics: &Metrics,
    node: &OverlayNode,
    status: &OverlayNodeStatus,
) -> Result<(), kube::Error> {
    let name = names::name(node);
    let api: Api<OverlayNode> = Api::namespaced(client.clone(), names::namespace(node));
    let object = json!({
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": { "name": name, "uid": node.meta().uid },
        "status": status,
    });
    metrics.wrote(WriteKind::Status);
    api.patch_status(name, &params(), &Patch::Apply(&object)).await.map(|_| ())
}

/// Tells the kubelet of `pod` that something was written for it; refused if another pod has
/// the name by now.
///
/// # Errors
/// As [`object`].
pub(super) async fn pod_annotation(
    client: &Client,
    metrics: &Metrics,
    pod: &Pod,
    hash: &str,
) -> Result<(), kube::Error> {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let patch = json!({ "metadata": { "uid": pod.meta().uid, "annotations": { labels::CONFIG_HASH: hash } } });
    let params = PatchParams { field_manager: Some(labels::OPERATOR.to_owned()), ..Default::default() };
    metrics.wrote(WriteKind::PodAnnotation);
    match api.patch(&name, &params, &Patch::Merge(&patch)).await {
        Ok(_) => Ok(()),
        // It is gone, or another has its name: that one started with what is written.
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Answers a pod's request for a certificate; refused if another request has the name by now.
///
/// # Errors
/// As [`object`].
pub(super) async fn certificate_request_status(
    client: &Client,
    metrics: &Metrics,
    request: &PodCertificateRequest,
    status: &Value,
) -> Result<(), kube::Error> {
    let (namespace, name) = (request.namespace().unwrap_or_default(), request.name_any());
    let api: Api<PodCertificateRequest> = Api::namespaced(client.clone(), &namespace);
    let object = json!({
        "apiVersion": PodCertificateRequest::api_version(&()),
        "kind": PodCertificateRequest::kind(&()),
        "metadata": { "name": name, "uid": request.meta().uid },
        "status": status,
    });
    metrics.wrote(WriteKind::CertificateRequestStatus);
    api.patch_status(&name, &params(), &Patch::Apply(&object)).await.map(|_| ())
}

/// Creates a Secret of the installation, and says whether it did: false when there is one.
///
/// # Errors
/// As [`object`].
pub(super) async fn create_secret(
    client: &Client,
    metrics: &Metrics,
    namespace: &str,
    secret: &Secret,
) -> Result<bool, kube::Error> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    metrics.wrote(WriteKind::Object(Kind::Secret));
    let params = PostParams { field_manager: Some(labels::OPERATOR.to_owned()), ..Default::default() };
    match api.create(&params, secret).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
        Err(error) => Err(error),
    }
}

/// One field manager, and ours is the last word on the fields that we set.
fn params() -> PatchParams {
    PatchParams::apply(labels::OPERATOR).force()
}
