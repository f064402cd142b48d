//! Where this OverlayNode's certificates come from, and how far its pods are with it: what
//! [`super::source`] is asked with. Reads, and never writes.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::ConfigMap;

use super::dereference;
use super::node::{Context, explain, is_ours, refused};
use super::plan::{self, Kind};
use super::source::{self, Choice};
use super::status::{Pods, Problem, Reason};
use crate::api::{OverlayNode, TlsSource};
use crate::build::{self, Placement, names};

/// The StatefulSet, if it is ours. The cache may be empty still, right after the start: it is
/// only believed to lack what was never there.
///
/// # Errors
/// The API server cannot be asked.
pub(super) async fn dereference_set(
    context: &Context,
    node: &OverlayNode,
) -> Result<Option<Arc<StatefulSet>>, Problem> {
    let (namespace, name) = (names::namespace(node), names::name(node));
    let mut set = context.caches.stateful_set(namespace, name);
    let made_before = node.status.as_ref().is_some_and(|status| status.tls.is_some());
    if set.is_none() && made_before {
        let live = dereference::get::<StatefulSet>(&context.client, namespace, name).await;
        set = live.map_err(|error| refused(Kind::StatefulSet, name, &error))?.map(Arc::new);
    }
    Ok(set.filter(|set| is_ours(node, set)))
}

/// Where certificates come from; what runs is read off the StatefulSet, and
/// `status.tls.source` reports it.
///
/// # Errors
/// The API server cannot be asked, or the cluster lacks what the spec asks for.
pub(super) async fn choose_source(
    context: &Context,
    node: &OverlayNode,
    set: Option<&StatefulSet>,
) -> Result<TlsSource, Problem> {
    let wanted = node.spec.tls.source;
    let standing = set.map(source_of_set);
    match source::choose(wanted, standing, || set.is_none_or(|set| rolls(context, node, set))) {
        Choice::Take(source) => Ok(source),
        Choice::Ask => {
            let cluster = context.cluster.look().await.map_err(|error| {
                let message = format!("whether the cluster has pod certificates: {}", explain(&error));
                Problem { reason: Reason::ApplyFailed, message }
            })?;
            source::decide(wanted, &cluster)
        }
    }
}

/// Where the certificates of its pods come from.
pub(super) fn source_of_set(set: &StatefulSet) -> TlsSource {
    set.spec.as_ref().map_or(TlsSource::SelfManaged, |spec| build::source_of(&spec.template))
}

/// Whether the pods of `set` are rolled even if their certificates go on coming from where they do.
fn rolls(context: &Context, node: &OverlayNode, set: &StatefulSet) -> bool {
    let standing = source_of_set(set);
    let config = build::daemon_config(node, &Placement::pod(node, standing));
    let pull_policy = build::pull_policy(node, context.daemon_pull_policy);
    let image = build::image(node, &context.daemon_image);
    let wanted = build::pod_template(node, &config, &image, pull_policy, standing);
    // What cannot be built is not rolled either.
    let (Ok(wanted), Some(spec)) = (wanted.map(serde_json::to_value), &set.spec) else { return false };
    match (wanted, serde_json::to_value(&spec.template)) {
        (Ok(wanted), Ok(live)) => !plan::is_subset(&wanted, &live),
        _ => false,
    }
}

/// Whether every pod has a certificate of its own by now.
pub(super) fn rolled_out(source: TlsSource, set: Option<&StatefulSet>) -> bool {
    let per_pod = |set| source_of_set(set) == TlsSource::PodCertificate && Pods::of(set).settled;
    source == TlsSource::PodCertificate && set.is_some_and(per_pod)
}

/// Whether peers know one another by the identity of each pod, so that none can speak as
/// another. Not while some pods still share a certificate: their identity is the OverlayNode's,
/// which covers that of each pod, and a mesh that knew only pods would fall in two.
pub(super) fn names_pods(source: TlsSource, set: Option<&StatefulSet>, config: Option<&ConfigMap>) -> bool {
    let files = config.iter().flat_map(|config| config.data.iter().flatten());
    let named_before = files.into_iter().any(|(file, text)| file.starts_with("peers-") && text.contains("/pod/"));
    source == TlsSource::PodCertificate && (set.is_none() || named_before || rolled_out(source, set))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::{StatefulSetSpec, StatefulSetStatus};

    fn set(source: TlsSource, settled: bool) -> StatefulSet {
        let node = OverlayNode::new("mesh", crate::api::OverlayNodeSpec::default());
        let config = build::daemon_config(&node, &Placement::pod(&node, source));
        let template = build::pod_template(&node, &config, "x", None, source).unwrap();
        let revision = |name: &str| Some(name.to_owned());
        StatefulSet {
            spec: Some(StatefulSetSpec { template, ..Default::default() }),
            status: Some(StatefulSetStatus {
                current_revision: revision(if settled { "2" } else { "1" }),
                update_revision: revision("2"),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn config(identity: &str) -> ConfigMap {
        let text = format!("identity = \"{identity}\"");
        ConfigMap { data: Some([("peers-mesh-0.toml".to_owned(), text)].into()), ..Default::default() }
    }

    /// A mesh in which some know pods and others share a certificate must not fall in two.
    #[test]
    fn peers_are_known_by_pod_once_every_pod_has_an_identity() {
        use TlsSource::{PodCertificate, SelfManaged};
        let (by_node, by_pod) =
            (config("spiffe://d/ns/a/overlaynode/m"), config("spiffe://d/ns/a/overlaynode/m/pod/m-1"));
        for (case, source, set, config, want) in [
            ("new", PodCertificate, None, None, true),
            ("being rolled to it", PodCertificate, Some(set(PodCertificate, false)), Some(&by_node), false),
            ("about to be", PodCertificate, Some(set(SelfManaged, true)), Some(&by_node), false),
            ("rolled to it", PodCertificate, Some(set(PodCertificate, true)), Some(&by_node), true),
            ("rolled again later", PodCertificate, Some(set(PodCertificate, false)), Some(&by_pod), true),
            ("rolled away from it", SelfManaged, Some(set(PodCertificate, true)), Some(&by_pod), false),
            ("never", SelfManaged, None, None, false),
        ] {
            assert_eq!(names_pods(source, set.as_ref(), config), want, "{case}");
        }
        assert!(rolled_out(PodCertificate, Some(&set(PodCertificate, true))));
        assert!(!rolled_out(PodCertificate, Some(&set(SelfManaged, true))) && !rolled_out(PodCertificate, None));
    }
}
