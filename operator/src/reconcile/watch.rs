//! The watches: OverlayNodes, and the objects that carry our label. Decides what of them is
//! kept in memory and which changes are worth a reconciliation; never reconciles.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::PredicateConfig;
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, predicates};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::admin::{Health, Watch};
use super::dereference::Caches;
use super::metrics::Metrics;
use crate::api::OverlayNode;
use crate::build::labels;

/// Objects that changed.
type Changes<K> = BoxStream<'static, Result<K, watcher::Error>>;

/// What triggers a reconciliation.
pub(super) struct Watches {
    /// OverlayNodes whose spec changed: a new status is our own doing.
    pub nodes: Changes<OverlayNode>,
    /// Of ours, as all that follow.
    pub stateful_sets: Changes<StatefulSet>,
    /// Configurations.
    pub config_maps: Changes<ConfigMap>,
    /// Headless and client Services.
    pub services: Changes<Service>,
    /// Service accounts.
    pub service_accounts: Changes<ServiceAccount>,
}

/// All watches, which fill the caches while they are polled.
#[must_use]
pub(super) fn watches(client: &Client, health: &Arc<Health>, metrics: &Arc<Metrics>) -> (Watches, Caches) {
    let seen = |watch| Seen { watch, health: health.clone(), metrics: metrics.clone() };
    let (nodes, cached_nodes) = events(client, watcher::Config::default(), seen(Watch::OverlayNode));
    let nodes = nodes.applied_objects().predicate_filter(predicates::generation, PredicateConfig::default()).boxed();
    let (stateful_sets, cached_stateful_sets) = owned(client, seen(Watch::StatefulSet));
    let (config_maps, cached_config_maps) = owned(client, seen(Watch::ConfigMap));
    let (services, cached_services) = owned(client, seen(Watch::Service));
    let (service_accounts, cached_service_accounts) = owned(client, seen(Watch::ServiceAccount));
    let caches = Caches {
        nodes: cached_nodes,
        stateful_sets: cached_stateful_sets,
        config_maps: cached_config_maps,
        services: cached_services,
        service_accounts: cached_service_accounts,
    };
    (Watches { nodes, stateful_sets, config_maps, services, service_accounts }, caches)
}

/// Who is told how a watch fares.
struct Seen {
    watch: Watch,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
}

impl Seen {
    fn handle<K>(&self, event: &Result<Event<K>, watcher::Error>) {
        match event {
            Ok(event) => {
                self.health.handle_event(self.watch);
                if matches!(event, Event::InitDone) {
                    self.health.handle_synced(self.watch);
                }
            }
            Err(error) => {
                self.metrics.watch_errors.inc();
                self.health.handle_error(self.watch, Instant::now());
                tracing::warn!(watch = ?self.watch, %error, "the watch broke off, it is tried again");
            }
        }
    }
}

/// Objects with our label, and those that lost it or went away.
fn owned<K>(client: &Client, seen: Seen) -> (Changes<K>, Store<K>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let config = watcher::Config::default().labels(&format!("{}={}", labels::MANAGED_BY, labels::OPERATOR));
    let (events, store) = events(client, config, seen);
    (events.touched_objects().boxed(), store)
}

fn events<K>(
    client: &Client,
    config: watcher::Config,
    seen: Seen,
) -> (BoxStream<'static, watcher::Result<Event<K>>>, Store<K>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Hash + Eq,
{
    let (store, writer) = reflector::store();
    let stream = watcher(Api::<K>::all(client.clone()), config)
        .default_backoff()
        // Half of an object's bytes say who set which field; nobody here asks.
        .modify(|object| object.managed_fields_mut().clear())
        .reflect(writer)
        .inspect(move |event| seen.handle(event));
    (stream.boxed(), store)
}
