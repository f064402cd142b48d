//! The pods of an OverlayNode, read from the API server when somebody has to know what only
//! they say. Reads only.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use crate::build::labels;

/// Pods of one answer: an OverlayNode has at most so many, and while they are rolled a few more.
const PAGE: u32 = 500;

/// The pods that the StatefulSet `name` controls, by name.
///
/// # Errors
/// The API server cannot be asked, or refuses.
pub(super) async fn list(client: &Client, namespace: &str, name: &str) -> Result<Vec<Pod>, kube::Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let params = ListParams::default().labels(&labels::selector_text(name)).limit(PAGE);
    let mut pods = api.list(&params).await?.items;
    // Anyone can put our labels on a pod; only a controller's reference makes it one of ours.
    pods.retain(|pod| {
        let owners = pod.owner_references();
        owners.iter().any(|o| o.controller == Some(true) && o.kind == "StatefulSet" && o.name == name)
    });
    pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    Ok(pods)
}
