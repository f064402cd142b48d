//! The signer `overlay.rustyonions.io/mesh`: answers the PodCertificateRequests of the
//! OverlayNodes' pods. Fetches what is to be judged, live and by name, and writes the answer;
//! what the answer is, [`judge`] decides. The pod waits for it, so nothing is cached but the
//! installation's keys.

mod judge;
mod request;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::core::NamespaceResourceScope;
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use overlay_core::identity::SpiffeId;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::installation::{self, TO_ISSUE};
use super::metrics::{Answer, Metrics};
use super::{apply, cluster, dereference, node};
use crate::api::OverlayNode;
use crate::build::names::SIGNER;
use crate::trust::{LeafCertificate, RequestedKey, renew_at};
use judge::Refusal;

pub(super) use request::PodCertificateRequest;

/// Requests answered at once.
const CONCURRENCY: u16 = 16;
/// How often the API server is asked whether it serves requests by now.
const DISCOVERY: Duration = Duration::from_secs(30);
/// Before what could not be answered is looked at again, at least and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// What the signer works with.
pub(super) struct Signer {
    /// The API server.
    pub client: Client,
    /// The installation's trust domain.
    pub trust_domain: String,
    /// The installation's keys.
    pub installation: Arc<installation::Store>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

/// What is signed.
struct Approved {
    key: RequestedKey,
    id: SpiffeId,
    lifetime: Duration,
}

/// Answers requests until `stop`; what has begun is finished.
pub(super) async fn run(signer: Signer, stop: CancellationToken) {
    if stop.run_until_cancelled(until_served(&signer.client)).await.is_none() {
        return;
    }
    tracing::info!(signer = SIGNER, "signing certificates for pods");
    let requests = Api::<PodCertificateRequest>::all(signer.client.clone());
    let ours = watcher::Config::default().fields(&format!("spec.signerName={SIGNER}"));
    let (store, writer) = reflector::store();
    let requests = watcher(requests, ours)
        .default_backoff()
        // Who asks may hang much on a request, and nobody here reads it.
        .modify(|request| (request.metadata.managed_fields, request.metadata.annotations) = (None, None))
        .reflect(writer)
        .touched_objects();
    let metrics = signer.metrics.clone();
    Controller::for_stream(requests, store)
        .with_config(controller::Config::default().concurrency(CONCURRENCY))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(look, |_, error, _| match *error {}, Arc::new(signer))
        .for_each(|result| {
            if let Err(controller::Error::QueueError(error)) = result {
                metrics.watch_errors.inc();
                tracing::warn!(%error, "the watch of PodCertificateRequests broke off, it is tried again");
            }
            std::future::ready(())
        })
        .await;
}

/// Most clusters have served them from the start, or do after an upgrade.
async fn until_served(client: &Client) {
    let mut told = false;
    loop {
        match cluster::serves_requests(client).await {
            Ok(true) => return,
            Ok(false) if !told => {
                told = true;
                tracing::info!("the API server serves no PodCertificateRequests: Kubernetes 1.37 and newer do");
            }
            Ok(false) => {}
            Err(error) => tracing::warn!("whether PodCertificateRequests are served: {}", node::explain(&error)),
        }
        tokio::time::sleep(DISCOVERY).await;
    }
}

async fn look(request: Arc<PodCertificateRequest>, signer: Arc<Signer>) -> Result<Action, Infallible> {
    if request.is_answered() || request.spec.signer_name != SIGNER || request.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let (namespace, pod) = (request.namespace().unwrap_or_default(), &request.spec.pod_name);
    let answered = match signer.judge(&namespace, &request).await {
        Ok(approved) => signer.issue(&request, &approved).await,
        Err(Refusal::Denied { reason, message }) => {
            tracing::warn!(namespace, pod, reason = reason.as_str(), "no certificate: {message}");
            let condition = condition(&request, "Denied", reason.as_str(), message);
            signer.answer(&request, Answer::Denied, json!({ "conditions": [condition] })).await
        }
        Err(Refusal::Pending(why)) => Err(why),
    };
    let Err(why) = answered else { return Ok(Action::await_change()) };
    signer.metrics.answered(Answer::Failed);
    let wait = retry(age(&request));
    tracing::warn!(namespace, pod, retry_ms = wait.as_millis(), "no certificate yet: {why}");
    Ok(Action::requeue(wait))
}

impl Signer {
    /// Shows the judge the pod and its owners, as the API server has them now.
    async fn judge(&self, namespace: &str, request: &PodCertificateRequest) -> Result<Approved, Refusal> {
        let key = judge::key(request)?;
        let pod = self.get::<Pod>(namespace, &request.spec.pod_name).await?;
        let owner = judge::pod(request, pod.as_ref())?;
        let set = self.get::<StatefulSet>(namespace, &owner.name).await?;
        let owner = judge::stateful_set(&owner, set.as_ref())?;
        let node = self.get::<OverlayNode>(namespace, &owner.name).await?;
        let id = judge::overlay_node(request, &owner, node.as_ref(), &self.trust_domain)?;
        Ok(Approved { key, id, lifetime: judge::lifetime(request) })
    }

    async fn get<K>(&self, namespace: &str, name: &str) -> Result<Option<K>, Refusal>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let object = dereference::get::<K>(&self.client, namespace, name).await;
        object.map_err(|e| Refusal::Pending(format!("cannot get {} {name}: {}", K::kind(&()), node::explain(&e))))
    }

    async fn issue(&self, request: &PodCertificateRequest, approved: &Approved) -> Result<(), String> {
        let keys = self.installation.existing(TO_ISSUE).await.map_err(|problem| problem.message)?;
        let Approved { key, id, lifetime } = approved;
        let leaf = keys.ca.issue_for(key, id, SystemTime::now(), *lifetime).map_err(|error| error.to_string())?;
        let status = issued(request, id, &leaf).map_err(|error| error.to_string())?;
        self.answer(request, Answer::Issued, status).await?;
        self.metrics.certificates.inc();
        tracing::info!(%id, "issued a certificate");
        Ok(())
    }

    async fn answer(
        &self,
        request: &PodCertificateRequest,
        answer: Answer,
        status: serde_json::Value,
    ) -> Result<(), String> {
        let sent = apply::certificate_request_status(&self.client, &self.metrics, request, &status).await;
        match sent {
            Ok(()) => self.metrics.answered(answer),
            // It is gone, and its pod with it.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => return Err(format!("cannot answer the request: {}", node::explain(&error))),
        }
        Ok(())
    }
}

/// The status of a request that is granted.
fn issued(
    request: &PodCertificateRequest,
    id: &SpiffeId,
    leaf: &LeafCertificate,
) -> Result<serde_json::Value, k8s_openapi::jiff::Error> {
    let time = |at: SystemTime| Timestamp::try_from(at).map(whole_seconds);
    Ok(json!({
        "certificateChain": leaf.cert_pem,
        "notBefore": time(leaf.not_before)?,
        "notAfter": time(leaf.not_after)?,
        "beginRefreshAt": time(renew_at(leaf.not_before, leaf.not_after))?,
        "conditions": [condition(request, "Issued", "Issued", format!("issued for {id}"))],
    }))
}

fn condition(request: &PodCertificateRequest, kind: &str, reason: &str, message: String) -> Condition {
    Condition {
        type_: kind.to_owned(),
        status: "True".to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: whole_seconds(Timestamp::now()),
        observed_generation: request.metadata.generation,
    }
}

/// Times in the API have no fractions.
fn whole_seconds(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

fn age(request: &PodCertificateRequest) -> Duration {
    let created = request.metadata.creation_timestamp.as_ref().map_or_else(Timestamp::now, |time| time.0);
    Duration::try_from(Timestamp::now().duration_since(created)).unwrap_or_default()
}

/// The older a request, the rarer the look at it; the API server's cleaner takes it in the end.
fn retry(age: Duration) -> Duration {
    (age / 2).clamp(RETRY.0, RETRY.1)
}

#[cfg(test)]
mod tests;
