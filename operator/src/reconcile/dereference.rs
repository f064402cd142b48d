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
use crate::api::OverlayNode;

/// Events of one object that are read: alike ones are counted in one, and they go after an hour.
const EVENTS: u32 = 200;

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
    let lists = about.iter().map(|uid| {
        let params = ListParams::default().fields(&format!("involvedObject.uid={uid}")).limit(EVENTS);
        let api = &api;
        async move { api.list(&params).await }
    });
    let lists = futures::future::try_join_all(lists).await?;
    Ok(lists.into_iter().flat_map(|list| list.items).collect())
}
