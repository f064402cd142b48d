//! Asks the API server what the cluster can do about pod certificates. Reads only, and
//! remembers the answer for a moment; what follows from it is [`super::source`]'s.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, Resource};
use tokio::time::Instant;

use super::sign::PodCertificateRequest;
use super::source::{Cluster, Kubelets};
use crate::build::names::SIGNER;

/// How old an answer may be: OverlayNodes that are made together are one question.
const MAX_AGE: Duration = Duration::from_secs(1);
/// Nodes asked for at once.
const PAGE: u32 = 500;

/// The cluster, as it was last seen.
pub(super) struct Capabilities {
    client: Client,
    seen: Mutex<Option<(Instant, Arc<Cluster>)>>,
}

impl Capabilities {
    /// Nothing was seen yet.
    #[must_use]
    pub(super) fn new(client: Client) -> Self {
        Self { client, seen: Mutex::new(None) }
    }

    /// What the cluster can do, seen no longer ago than [`MAX_AGE`].
    ///
    /// # Errors
    /// The API server cannot be asked, or refuses to say.
    pub(super) async fn look(&self) -> Result<Arc<Cluster>, kube::Error> {
        if let Some((at, cluster)) = &*self.seen.lock().unwrap_or_else(PoisonError::into_inner)
            && at.elapsed() <= MAX_AGE
        {
            return Ok(cluster.clone());
        }
        let served = serves_requests(&self.client).await?;
        let may_sign = served && may_sign(&self.client).await?;
        // Whoever has thousands of nodes is not asked for them in vain.
        let kubelets = if may_sign { kubelets(&self.client).await? } else { Kubelets::None };
        let cluster = Arc::new(Cluster { served, may_sign, kubelets });
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), cluster.clone()));
        Ok(cluster)
    }
}

/// Whether the API server serves PodCertificateRequests of the version that is spoken here.
///
/// # Errors
/// The API server cannot be asked.
pub(super) async fn serves_requests(client: &Client) -> Result<bool, kube::Error> {
    let version = PodCertificateRequest::api_version(&());
    match client.list_api_group_resources(&version).await {
        Ok(list) => Ok(list.resources.iter().any(|r| r.name == PodCertificateRequest::plural(&()))),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// A question to the API server, which keeps nothing of it: no write.
async fn may_sign(client: &Client) -> Result<bool, kube::Error> {
    let text = |text: &str| Some(text.to_owned());
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: text("certificates.k8s.io"),
                resource: text("signers"),
                name: text(SIGNER),
                verb: text("sign"),
                ..Default::default()
            }),
            ..Default::default()
        },
        ..Default::default()
    };
    let answer = Api::<SelfSubjectAccessReview>::all(client.clone()).create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

async fn kubelets(client: &Client) -> Result<Kubelets, kube::Error> {
    let api = Api::<Node>::all(client.clone());
    let mut versions = Vec::new();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = match api.list(&params).await {
            // Not to be told is not to know.
            Err(kube::Error::Api(status)) if status.is_forbidden() => return Ok(Kubelets::None),
            page => page?,
        };
        versions.extend(page.items.into_iter().map(|node| {
            node.status.and_then(|status| status.node_info).map(|info| info.kubelet_version).unwrap_or_default()
        }));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok(Kubelets::of(versions.iter().map(String::as_str))),
        }
    }
}
