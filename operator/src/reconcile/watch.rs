//! The watches: OverlayNodes, and the objects that carry our label. Decides what of them is
//! kept in memory and which changes are worth a reconciliation; never reconciles.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::{Backoff, PredicateConfig, ResetTimerBackoff};
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, predicates};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::admin::{Health, Watch};
use super::backoff::doubled;
use super::dereference::Caches;
use super::metrics::Metrics;
use crate::api::OverlayNode;
use crate::build::labels;

/// Before a watch that broke off is first tried again.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// At most: what changed meanwhile is seen this long after the API server is back.
pub(super) const LAST_RETRY: Duration = Duration::from_secs(10);
/// A watch that held so long starts over.
const HELD: Duration = Duration::from_secs(60);

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
    let (nodes, cached_nodes) =
        events(client, watcher::Config::default(), seen(Watch::OverlayNode), |node: &mut OverlayNode| {
            // A user's, up to 256 KiB, and nothing here goes by them.
            node.metadata.annotations = None;
        });
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
                if self.watch == Watch::OverlayNode && is_not_served(error) {
                    tracing::warn!(
                        "the API server has no OverlayNodes: install the CRD (overlay-operator crd | kubectl apply -f -)"
                    );
                } else {
                    tracing::warn!(watch = ?self.watch, %error, "the watch broke off, it is tried again");
                }
            }
        }
    }
}

fn is_not_served(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
}

/// Objects with our label, and those that lost it or went away.
fn owned<K>(client: &Client, seen: Seen) -> (Changes<K>, Store<K>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let config = watcher::Config::default().labels(&format!("{}={}", labels::MANAGED_BY, labels::OPERATOR));
    let (events, store) = events(client, config, seen, |_| ());
    (events.touched_objects().boxed(), store)
}

/// [`FIRST_RETRY`], doubling to [`LAST_RETRY`]. No jitter: one operator, five watches.
#[derive(Default)]
struct Doubling(u32);

impl Iterator for Doubling {
    type Item = Duration;
    fn next(&mut self) -> Option<Duration> {
        let wait = doubled(FIRST_RETRY, self.0, LAST_RETRY);
        self.0 = self.0.saturating_add(1);
        Some(wait)
    }
}

impl Backoff for Doubling {
    fn reset(&mut self) {
        self.0 = 0;
    }
}

fn events<K>(
    client: &Client,
    config: watcher::Config,
    seen: Seen,
    trim: fn(&mut K),
) -> (BoxStream<'static, watcher::Result<Event<K>>>, Store<K>)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Hash + Eq,
{
    let (store, writer) = reflector::store();
    let stream = watcher(Api::<K>::all(client.clone()), config)
        .backoff(ResetTimerBackoff::new(Doubling::default(), HELD))
        // Half of an object's bytes say who set which field; nobody here asks.
        .modify(move |object| {
            object.managed_fields_mut().clear();
            trim(object);
        })
        .reflect(writer)
        .inspect(move |event| seen.handle(event))
        // Errors end here: the controller would hold back the events of every other watch over
        // them, when each watch waits for itself already.
        .filter(|event| std::future::ready(event.is_ok()));
    (stream.boxed(), store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_slow_down_to_a_bound() {
        let mut backoff = Doubling::default();
        let waits: Vec<u128> = backoff.by_ref().take(7).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
        backoff.reset();
        assert_eq!(backoff.next(), Some(FIRST_RETRY));
    }
}
