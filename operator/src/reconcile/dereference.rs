//! Everything that a reconciliation reads: caches of what the operator owns, and the API
//! server itself. Reads only.
//!
//! Caches answer the common question, whether anything is to be done at all; they lag behind
//! what the operator itself just wrote, so that a write is decided on live objects only.
//! Secrets are never cached: they are read by name.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Secret, Service, ServiceAccount};
use kube::api::{Api, ApiResource, DynamicObject, ListParams};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::plan::{Kind, Wanted};
use super::status::clip_to;
use crate::api::OverlayNode;

/// Events of one answer, and answers about one object.
const PAGE_OF_EVENTS: u32 = 20;
/// See [`PAGE_OF_EVENTS`].
const PAGES_OF_EVENTS: usize = 10;
/// Bytes of an event's text that are kept.
const MAX_EVENT_TEXT: usize = 2_048;

/// The watched objects.
pub(super) struct Caches {
    /// All OverlayNodes.
    pub nodes: Store<OverlayNode>,
    /// Of ours, as all that follow.
    pub stateful_sets: Store<StatefulSet>,
    /// Configurations.
    pub config_maps: Store<ConfigMap>,
    /// Headless and client Services.
    pub services: Store<Service>,
    /// Service accounts.
    pub service_accounts: Store<ServiceAccount>,
}

impl Caches {
    /// What the caches have of `wanted`, in its order; Secrets are None.
    #[must_use]
    pub(super) fn owned(&self, namespace: &str, wanted: &[Wanted]) -> Vec<Option<Value>> {
        wanted
            .iter()
            .map(|w| match w.kind {
                Kind::ServiceAccount => cached(&self.service_accounts, namespace, &w.name),
                Kind::Secret => None,
                Kind::ConfigMap => cached(&self.config_maps, namespace, &w.name),
                Kind::Service => cached(&self.services, namespace, &w.name),
                Kind::StatefulSet => cached(&self.stateful_sets, namespace, &w.name),
            })
            .collect()
    }

    /// The StatefulSet of that name.
    #[must_use]
    pub(super) fn stateful_set(&self, namespace: &str, name: &str) -> Option<std::sync::Arc<StatefulSet>> {
        self.stateful_sets.get(&ObjectRef::new(name).within(namespace))
    }

    /// The ConfigMap of that name.
    #[must_use]
    pub(super) fn config_map(&self, namespace: &str, name: &str) -> Option<std::sync::Arc<ConfigMap>> {
        self.config_maps.get(&ObjectRef::new(name).within(namespace))
    }

    /// Whether any OverlayNode says that it has a certificate of this installation.
    #[must_use]
    pub(super) fn any_has_certificate(&self) -> bool {
        self.nodes.find(|node| node.status.as_ref().is_some_and(|s| s.tls.is_some())).is_some()
    }
}

fn cached<K>(store: &Store<K>, namespace: &str, name: &str) -> Option<Value>
where
    K: Resource<DynamicType = ()> + Clone + Serialize + 'static,
{
    let object = store.get(&ObjectRef::new(name).within(namespace))?;
    serde_json::to_value(&*object).ok()
}

/// The API resource of a kind.
#[must_use]
pub(super) fn resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::ServiceAccount => ApiResource::erase::<ServiceAccount>(&()),
        Kind::Secret => ApiResource::erase::<Secret>(&()),
        Kind::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
        Kind::Service => ApiResource::erase::<Service>(&()),
        Kind::StatefulSet => ApiResource::erase::<StatefulSet>(&()),
    }
}

/// One object as the API server has it now.
///
/// # Errors
/// The API server cannot be asked, or refuses; that there is none is not an error.
pub(super) async fn live(client: &Client, namespace: &str, wanted: &Wanted) -> Result<Option<Value>, kube::Error> {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource(wanted.kind));
    let object = api.get_opt(&wanted.name).await?;
    object.map(|object| serde_json::to_value(object).map_err(kube::Error::SerdeError)).transpose()
}

/// A typed object by name.
///
/// # Errors
/// As [`live`].
pub(super) async fn get<K>(client: &Client, namespace: &str, name: &str) -> Result<Option<K>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    Api::<K>::namespaced(client.clone(), namespace).get_opt(name).await
}

/// The events about the objects of these UIDs.
///
/// # Errors
/// As [`live`].
pub(super) async fn events(client: &Client, namespace: &str, about: &[String]) -> Result<Vec<Event>, kube::Error> {
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let mut events = Vec::new();
    // One after the other, and little by little: an event's text has no limit that holds.
    for uid in about {
        let mut params = ListParams::default().fields(&format!("involvedObject.uid={uid}")).limit(PAGE_OF_EVENTS);
        for _ in 0..PAGES_OF_EVENTS {
            let page = api.list(&params).await?;
            events.extend(page.items.into_iter().map(trimmed));
            let Some(token) = page.metadata.continue_.filter(|token| !token.is_empty()) else { break };
            params = params.continue_token(&token);
        }
    }
    Ok(events)
}

fn trimmed(mut event: Event) -> Event {
    event.message = event.message.map(|message| clip_to(message, MAX_EVENT_TEXT));
    (event.metadata.managed_fields, event.metadata.annotations) = (None, None);
    event
}
