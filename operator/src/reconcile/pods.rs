//! The pods of an OverlayNode, read from the API server when somebody has to know what only
//! they say. Reads only.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use crate::build::labels;

/// Pods of one answer: each may have a megabyte that nobody here asks about.
const PAGE: u32 = 20;
/// Pods that are kept: an OverlayNode has at most so many, and while they are rolled a few more.
const MOST: usize = 500;
/// Pages that are read: whoever puts our label on more pods than that hides only their own.
const PAGES: usize = 50;

/// The pods that the StatefulSet `name` controls, by name: who they are and how they fare,
/// without their spec.
///
/// # Errors
/// The API server cannot be asked, or refuses.
pub(super) async fn list(client: &Client, namespace: &str, name: &str) -> Result<Vec<Pod>, kube::Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let mut params = ListParams::default().labels(&labels::selector_text(name)).limit(PAGE);
    let mut pods = Vec::new();
    for _ in 0..PAGES {
        let page = api.list(&params).await?;
        pods.extend(page.items.into_iter().filter(|pod| is_controlled_by(pod, name)).map(trimmed));
        let next = page.metadata.continue_.filter(|token| !token.is_empty());
        let (Some(token), true) = (next, pods.len() < MOST) else { break };
        params = params.continue_token(&token);
    }
    pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    Ok(pods)
}

/// Anyone can put our labels on a pod; only a controller's reference makes it one of ours.
fn is_controlled_by(pod: &Pod, name: &str) -> bool {
    let owners = pod.owner_references();
    owners.iter().any(|o| o.controller == Some(true) && o.kind == "StatefulSet" && o.name == name)
}

fn trimmed(mut pod: Pod) -> Pod {
    pod.spec = None;
    pod.metadata.managed_fields = None;
    if let Some(annotations) = &mut pod.metadata.annotations {
        annotations.retain(|key, _| key == labels::CONFIG_HASH);
    }
    pod
}
