//! Looks at the pods and events of an OverlayNode whose daemons are short, when
//! [`super::shortage`] says so, and has [`super::causes`] tell what they mean. Reads only.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use super::node::{self, Context};
use super::shortage::Next;
use super::status::{Pods, Problem};
use super::{causes, dereference, pods};
use crate::api::OverlayNode;
use crate::build::names;

/// Pods whose events are read: what keeps one of them keeps the others, mostly.
const PODS_LOOKED_AT: usize = 4;

/// What is known of a shortage.
#[derive(Default)]
pub(super) struct Explained {
    /// Why it is, where pods or events tell.
    pub cause: Option<Problem>,
    /// In how long to look again, while it lasts.
    pub again: Option<Duration>,
}

/// Finds out why daemons are not ready, where they should be by now. While a problem keeps the
/// spec from being applied, that is why.
pub(super) async fn explain(context: &Context, node: &OverlayNode, pods: Pods, problem: bool) -> Explained {
    let shortages = &context.shortages;
    if problem || (pods.ready >= node.spec.replicas && pods.existing >= node.spec.replicas) {
        shortages.over(node);
        return Explained::default();
    }
    if let Next::Wait(cause, wait) = shortages.poll(node, pods, &context.caches.nodes, Instant::now()) {
        return Explained { cause, again: Some(wait) };
    }
    let (namespace, name) = (names::namespace(node), names::name(node));
    let known = shortages.known(node);
    let cause = look(context, node).await.unwrap_or_else(|error| {
        tracing::warn!(namespace, name, "cannot read pods and events: {}", node::explain(&error));
        known.clone()
    });
    if let Some(cause) = cause.as_ref().filter(|cause| known.as_ref() != Some(cause)) {
        tracing::warn!(namespace, name, reason = cause.reason.as_str(), "{}", cause.message);
    }
    let again = shortages.looked(node, cause.clone(), Instant::now());
    Explained { cause, again: Some(again) }
}

async fn look(context: &Context, node: &OverlayNode) -> Result<Option<Problem>, kube::Error> {
    let (namespace, name) = (names::namespace(node), names::name(node));
    let set = context.caches.stateful_set(namespace, name).filter(|set| node::is_ours(node, set));
    let Some(uid) = set.and_then(|set| set.metadata.uid.clone()) else { return Ok(None) };
    let pods = pods::list(&context.client, namespace, name).await?;
    let waiting = pods.iter().filter(|pod| causes::is_waiting(pod)).filter_map(|pod| pod.metadata.uid.clone());
    let about: Vec<String> = [uid].into_iter().chain(waiting.take(PODS_LOOKED_AT)).collect();
    let events = dereference::events(&context.client, namespace, &about).await?;
    Ok(causes::cause(&pods, &events, node.spec.replicas, Timestamp::now()))
}
