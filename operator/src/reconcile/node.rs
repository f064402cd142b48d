//! One OverlayNode, once through: dereference → validate → build → plan → apply → status.
//! Decides the order of the steps and what a failed step means; each step is its own module.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::{Client, ResourceExt};
use overlay_core::config::{self, DaemonConfig, PeersConfig};
use overlay_core::identity::SpiffeId;
use serde::Serialize;
use serde_json::Value;

use super::apply;
use super::backoff::Backoff;
use super::choice::{choose_source, dereference_set, names_pods, rolled_out, source_of_set};
use super::cluster::Capabilities;
use super::credentials::{self, Current, Installation, Leaves, Standing, Subject, Tokens};
use super::dereference::{self, Caches};
use super::installation::{self, TO_COMPARE, TO_ISSUE};
use super::look;
use super::metrics::Metrics;
use super::plan::{self, Kind, Obstacle, Owner, Wanted};
use super::rollout::{self, Plan, Rollout};
use super::shortage::Shortages;
use super::status::{self, Built, Facts, Pods, Problem, Reason};
use crate::api::{OverlayNode, OverlayNodeStatus, PullPolicy, TlsSource, TlsStatus};
use crate::build::{self, BuildError, Inputs, Objects, Placement, labels, names};

/// What a reconciliation works with.
pub(super) struct Context {
    /// The API server.
    pub client: Client,
    /// The installation's trust domain.
    pub trust_domain: String,
    /// The image of OverlayNodes that name none.
    pub daemon_image: String,
    /// When it is pulled, for OverlayNodes that do not say.
    pub daemon_pull_policy: Option<PullPolicy>,
    /// What is watched.
    pub caches: Caches,
    /// The installation's keys.
    pub installation: Arc<installation::Store>,
    /// What the cluster can do.
    pub cluster: Capabilities,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// OverlayNodes whose daemons are not all ready.
    pub shortages: Shortages,
    /// OverlayNodes whose daemons do not all run what was written for them.
    pub rollouts: Backoff,
}

/// How it went.
pub(super) struct Outcome {
    /// What kept it from being applied.
    pub problem: Option<Problem>,
    /// In how long a certificate or token is due, where that is known.
    pub renewal: Option<Duration>,
    /// In how long its pods and events are to be looked at, while daemons are short.
    pub look: Option<Duration>,
}

/// A spec that can be carried out.
struct Valid {
    uid: String,
    identity: SpiffeId,
    source: TlsSource,
    config: DaemonConfig,
    peers: Vec<PeersConfig>,
    image: String,
}

/// What has been found out so far; of use for the status even where a later step fails.
#[derive(Default)]
struct Progress {
    pods: Pods,
    built: Option<Built>,
    renewal: Option<Duration>,
    cause: Option<Problem>,
    /// What the daemons are to run, and how far they are, where that is not confirmed yet.
    plan: Option<Plan>,
    rollout: Option<Rollout>,
}

/// Brings about what `node` says, and reports it in its status.
///
/// # Errors
/// The status could not be written; what went wrong before that is in the outcome.
pub(super) async fn reconcile(context: &Context, node: &OverlayNode) -> Result<Outcome, kube::Error> {
    let mut progress = Progress::default();
    let (namespace, name) = (names::namespace(node), names::name(node));
    if let Some(set) = context.caches.stateful_set(namespace, name) {
        progress.pods = pods_of(node, &set);
    }
    let problem = carry_out(context, node, &mut progress).await.err();
    if let Some(problem) = &problem {
        tracing::warn!(namespace, name, reason = problem.reason.as_str(), "{}", problem.message);
        if let Err(also) = renew(context, node, &mut progress).await {
            tracing::warn!(namespace, name, "certificate and tokens are not renewed either: {}", also.message);
        }
    }
    let look = look::explain(context, node, progress.pods, problem.is_some()).await;
    progress.cause = look.cause;
    let again = if problem.is_none() { roll_out(context, node, &mut progress).await } else { None };
    let (renewal, look) = (progress.renewal, [look.again, again].into_iter().flatten().min());
    report(context, node, progress, problem.clone()).await?;
    Ok(Outcome { problem, renewal, look })
}

async fn carry_out(context: &Context, node: &OverlayNode, progress: &mut Progress) -> Result<(), Problem> {
    let standing = dereference_secrets(context, node).await?;
    let set = dereference_set(context, node).await?;
    let source = choose_source(context, node, set.as_deref()).await?;
    let valid = validate(context, node, source, set.as_deref())?;
    let now = SystemTime::now();
    let subject = Subject { id: &valid.identity, tenants: &valid.config.overlay.tenants };
    let shape = Shape { uid: &valid.uid, source, rolled_out: rolled_out(source, set.as_deref()) };
    let (leaves, tokens) = credentials_for(context, &standing, subject, shape, now).await?;
    progress.renewal = Some(due(&leaves, &tokens, now));
    let credentials = credentials::credentials(&leaves, &tokens);
    let inputs = Inputs {
        node,
        config: &valid.config,
        peers: &valid.peers,
        image: &valid.image,
        pull_policy: build::pull_policy(node, context.daemon_pull_policy),
        source,
        credentials: &credentials,
    };
    progress.built = Some(built(node, &valid, &leaves)?);
    progress.plan = Some(Plan::of(&valid.config, &valid.peers).map_err(|e| unbuildable(&e))?);
    let objects = build::objects(&inputs).map_err(|error| unbuildable(&error))?;
    let wanted = wanted(&objects)?;
    apply_all(context, node, &standing, &wanted, progress).await
}

/// The certificate and the tokens of what runs, though something keeps the spec from being carried
/// out: a mesh goes on only for as long as it is given new ones. They are for the tenants that the
/// daemons were told of, which the spec may have changed since.
async fn renew(context: &Context, node: &OverlayNode, progress: &mut Progress) -> Result<(), Problem> {
    let Some(set) = dereference_set(context, node).await? else { return Ok(()) };
    let written = context.caches.config_map(names::namespace(node), &names::config_map(node));
    let text = written.as_ref().and_then(|map| map.data.as_ref()?.get(names::CONFIG_FILE));
    let Some(config) = text.and_then(|text| config::daemon(text).ok()) else { return Ok(()) };
    let standing = dereference_secrets(context, node).await?;
    let (uid, source, now) = (node.uid().unwrap_or_default(), source_of_set(&set), SystemTime::now());
    let identity = names::identity(node, &context.trust_domain).map_err(|e| invalid(&e))?;
    let subject = Subject { id: &identity, tenants: &config.overlay.tenants };
    let shape = Shape { uid: &uid, source, rolled_out: rolled_out(source, Some(&*set)) };
    let (leaves, tokens) = credentials_for(context, &standing, subject, shape, now).await?;
    progress.renewal = Some(due(&leaves, &tokens, now));
    let secrets = build::secrets(node, &credentials::credentials(&leaves, &tokens));
    let wanted = secrets.iter().map(|secret| one(Kind::Secret, secret)).collect::<Result<Vec<_>, _>>()?;
    apply_all(context, node, &standing, &wanted, progress).await
}

/// In how long the first of them is due.
fn due(leaves: &Leaves, tokens: &Tokens, now: SystemTime) -> Duration {
    let due = match leaves {
        Leaves::Shared(certificate) => certificate.renew_at.min(tokens.renew_at),
        Leaves::PerPod { .. } => tokens.renew_at,
    };
    due.duration_since(now).unwrap_or_default()
}

/// Sees to it that running daemons take up what was written, unless they are known to. Says in
/// how long to look again.
async fn roll_out(context: &Context, node: &OverlayNode, progress: &mut Progress) -> Option<Duration> {
    let plan = progress.plan.as_ref()?;
    let status = node.status.as_ref();
    if status.is_some_and(|status| status.running_hash.as_ref() == Some(&plan.hash())) {
        context.rollouts.succeeded(node);
        return None;
    }
    if status.is_none_or(|status| status.observed_generation != node.metadata.generation) {
        context.rollouts.succeeded(node); // another spec: looked at as often as a new one
    }
    let rollout = rollout::look(context, node, plan).await;
    let again = (!rollout.is_complete()).then(|| context.rollouts.failed(node, &context.caches.nodes));
    progress.rollout = Some(rollout);
    again
}

async fn dereference_secrets(context: &Context, node: &OverlayNode) -> Result<Standing, Problem> {
    let namespace = names::namespace(node);
    let get = |name: String| async move {
        dereference::get(&context.client, namespace, &name).await.map_err(|error| refused(Kind::Secret, &name, &error))
    };
    let (tls, token) = futures::try_join!(get(names::tls_secret(node)), get(names::token_secret(node)))?;
    Ok(Standing { tls, token })
}

/// The schema and its rules were checked when the spec was stored, perhaps under an older
/// schema: what pods would fail on is caught here, before they are rolled.
fn validate(
    context: &Context,
    node: &OverlayNode,
    source: TlsSource,
    set: Option<&StatefulSet>,
) -> Result<Valid, Problem> {
    let identity = names::identity(node, &context.trust_domain).map_err(|e| invalid(&e))?;
    let config = build::daemon_config(node, &Placement::pod(node, source));
    let standing = context.caches.config_map(names::namespace(node), &names::config_map(node));
    let per_pod = names_pods(source, set, standing.as_deref());
    let ordinals = 0..names::replicas(node);
    let identities = ordinals.clone().map(|ordinal| match per_pod {
        true => identity.pod(&names::daemon(node, ordinal)),
        false => Ok(identity.clone()),
    });
    let identities: Vec<SpiffeId> = identities.collect::<Result<_, _>>().map_err(|e| invalid(&e))?;
    let identity_of = |ordinal: u32| identities.get(ordinal as usize).unwrap_or(&identity).clone();
    let address = |ordinal| names::pod_address(node, ordinal);
    let peers: Vec<PeersConfig> =
        ordinals.map(|ordinal| build::peers_config(node, ordinal, &identity, identity_of, address)).collect();
    check(&config, &peers)?;
    Ok(Valid {
        uid: node.uid().unwrap_or_default(),
        identity,
        source,
        config,
        peers,
        image: build::image(node, &context.daemon_image),
    })
}

/// How an OverlayNode's pods come by their certificates.
#[derive(Clone, Copy)]
struct Shape<'a> {
    uid: &'a str,
    source: TlsSource,
    /// Whether every pod has one of its own by now.
    rolled_out: bool,
}

/// What stands, as far as it is good; for the rest, issued with keys just read.
async fn credentials_for(
    context: &Context,
    standing: &Standing,
    subject: Subject<'_>,
    shape: Shape<'_>,
    now: SystemTime,
) -> Result<(Leaves, Tokens), Problem> {
    let per_pod = |keys: &Installation| {
        let leftover = shape.rolled_out && credentials::holds_key(standing, shape.uid);
        Leaves::PerPod { ca: keys.ca.cert_pem().into(), leftover }
    };
    let shared = shape.source == TlsSource::SelfManaged;
    let keys = context.installation.load(&context.caches, TO_COMPARE).await?;
    match credentials::current(standing, &keys, subject, now) {
        Current { tokens: Some(tokens), .. } if !shared => return Ok((per_pod(&keys), tokens)),
        Current { certificate: Some(certificate), tokens: Some(tokens) } => {
            return Ok((Leaves::Shared(certificate), tokens));
        }
        _ => {}
    }
    let keys = context.installation.load(&context.caches, TO_ISSUE).await?;
    let current = credentials::current(standing, &keys, subject, now);
    let broken = |error: crate::trust::TrustError| Problem { reason: Reason::CaInvalid, message: error.to_string() };
    let leaves = match current.certificate {
        _ if !shared => per_pod(&keys),
        Some(certificate) => Leaves::Shared(certificate),
        None => {
            context.metrics.certificates.inc();
            Leaves::Shared(credentials::issue_certificate(&keys.ca, subject.id, now).map_err(broken)?)
        }
    };
    let tokens = match current.tokens {
        Some(tokens) => tokens,
        None => {
            context.metrics.tokens.inc();
            credentials::issue_tokens(&keys.tokens, subject, now).map_err(broken)?
        }
    };
    Ok((leaves, tokens))
}

fn built(node: &OverlayNode, valid: &Valid, leaves: &Leaves) -> Result<Built, Problem> {
    let shared = match leaves {
        Leaves::Shared(certificate) => Some(certificate),
        Leaves::PerPod { .. } => None,
    };
    Ok(Built {
        selector: labels::selector_text(names::name(node)),
        config_hash: valid.config.hash().map_err(|e| invalid(&e))?,
        running_hash: Plan::of(&valid.config, &valid.peers).map_err(|e| unbuildable(&e))?.hash(),
        effective: build::effective(node, Some(valid.image.clone())),
        tls: TlsStatus {
            source: valid.source,
            not_after: shared.and_then(|certificate| Timestamp::try_from(certificate.not_after).ok()).map(Time),
            secret_name: shared.map(|_| names::tls_secret(node)),
        },
    })
}

fn one<K: Serialize + ResourceExt>(kind: Kind, object: &K) -> Result<Wanted, Problem> {
    let value = serde_json::to_value(object).map_err(|e| invalid(&e))?;
    Ok(Wanted::new(kind, object.name_any(), value))
}

/// The objects in the order of their application.
fn wanted(objects: &Objects) -> Result<Vec<Wanted>, Problem> {
    let tls = objects.tls.as_ref().map(|tls| one(Kind::Secret, tls));
    let rest = [
        one(Kind::Secret, &objects.token),
        one(Kind::ConfigMap, &objects.config),
        one(Kind::Service, &objects.peers),
        one(Kind::Service, &objects.client),
        one(Kind::StatefulSet, &objects.stateful_set),
    ];
    [one(Kind::ServiceAccount, &objects.service_account)].into_iter().chain(tls).chain(rest).collect()
}

/// Sends what differs. The caches only say whether there may be something to do.
async fn apply_all(
    context: &Context,
    node: &OverlayNode,
    standing: &Standing,
    wanted: &[Wanted],
    progress: &mut Progress,
) -> Result<(), Problem> {
    let namespace = names::namespace(node);
    let uid = node.uid().unwrap_or_default();
    let owner = Owner { name: names::name(node), uid: &uid };
    let mut cached = context.caches.owned(namespace, wanted);
    fill_secrets(&mut cached, wanted, standing);
    if plan::plan(wanted, &cached, owner).is_ok_and(|send| send.is_empty()) {
        return Ok(());
    }
    let live = futures::future::try_join_all(wanted.iter().map(|w| async move {
        dereference::live(&context.client, namespace, w).await.map_err(|error| refused(w.kind, &w.name, &error))
    }))
    .await?;
    for (wanted, live) in wanted.iter().zip(&live) {
        note_pods(node, wanted, live.as_ref(), progress);
    }
    for send in plan::plan(wanted, &live, owner).map_err(blocked)? {
        let object = apply::object(&context.client, &context.metrics, namespace, send)
            .await
            .map_err(|error| refused(send.kind, &send.name, &error))?;
        tracing::info!(namespace, kind = send.kind.as_str(), name = send.name, "applied");
        note_pods(node, send, Some(&object), progress);
    }
    Ok(())
}

fn fill_secrets(cached: &mut [Option<Value>], wanted: &[Wanted], standing: &Standing) {
    for (slot, wanted) in cached.iter_mut().zip(wanted).filter(|(_, w)| w.kind == Kind::Secret) {
        let secrets = [&standing.tls, &standing.token];
        let secret = secrets.into_iter().flatten().find(|s| s.metadata.name.as_deref() == Some(&wanted.name));
        *slot = secret.and_then(|s| serde_json::to_value(s).ok());
    }
}

fn note_pods(node: &OverlayNode, wanted: &Wanted, live: Option<&Value>, progress: &mut Progress) {
    if wanted.kind == Kind::StatefulSet
        && let Some(set) = live.and_then(|live| serde_json::from_value::<StatefulSet>(live.clone()).ok())
    {
        progress.pods = pods_of(node, &set);
    }
}

/// Somebody else's StatefulSet of our name says nothing about our pods.
fn pods_of(node: &OverlayNode, set: &StatefulSet) -> Pods {
    if is_ours(node, set) { Pods::of(set) } else { Pods::default() }
}

/// Whether `node` controls `set`.
#[must_use]
pub(super) fn is_ours(node: &OverlayNode, set: &StatefulSet) -> bool {
    set.owner_references().iter().any(|r| r.controller == Some(true) && Some(&r.uid) == node.metadata.uid.as_ref())
}

/// Writes the status if it differs from what the API server has.
async fn report(
    context: &Context,
    node: &OverlayNode,
    progress: Progress,
    problem: Option<Problem>,
) -> Result<(), kube::Error> {
    let mut facts = Facts {
        previous: node.status.as_ref(),
        generation: node.metadata.generation,
        wanted: node.spec.replicas,
        pods: progress.pods,
        built: progress.built,
        problem,
        cause: progress.cause,
        rollout: progress.rollout,
        now: Timestamp::now(),
    };
    if node.status.as_ref() == Some(&status::status(&facts)) {
        return Ok(());
    }
    let Some(live) =
        dereference::get::<OverlayNode>(&context.client, names::namespace(node), names::name(node)).await?
    else {
        return Ok(());
    };
    // Another generation, or another object of that name, has a reconciliation of its own coming.
    if live.metadata.uid != node.metadata.uid || live.metadata.generation != node.metadata.generation {
        return Ok(());
    }
    facts.previous = live.status.as_ref();
    let status: OverlayNodeStatus = status::status(&facts);
    if live.status.as_ref() == Some(&status) {
        return Ok(());
    }
    apply::status(&context.client, &context.metrics, node, &status).await
}

/// Whether a daemon takes both files, as it will read them.
fn check(config: &DaemonConfig, peers: &[PeersConfig]) -> Result<(), Problem> {
    let all = |errors: Vec<config::ConfigError>| {
        invalid(&errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    };
    config::daemon(&config.to_toml().map_err(|e| invalid(&e))?).map_err(all)?;
    // One peers file stands for all: they differ in who is left out.
    if let Some(first) = peers.first() {
        config::peers_beside(&first.to_toml().map_err(|e| invalid(&e))?, Some(config)).map_err(all)?;
    }
    Ok(())
}

fn invalid(error: &dyn std::fmt::Display) -> Problem {
    Problem { reason: Reason::InvalidSpec, message: error.to_string() }
}

fn unbuildable(error: &BuildError) -> Problem {
    let reason = match error {
        BuildError::ConfigTooLarge { .. } => Reason::ConfigTooLarge,
        BuildError::Toml(_) => Reason::InvalidSpec,
    };
    Problem { reason, message: error.to_string() }
}

/// A name that is taken needs a person; what is only left over goes by itself.
fn blocked(obstacles: Vec<Obstacle>) -> Problem {
    let (mut taken, mut leftover) = (Vec::new(), Vec::new());
    for obstacle in obstacles {
        match obstacle {
            Obstacle::Taken { kind, name, by: Some(by) } => taken.push(format!("{kind} {name} (controlled by {by})")),
            Obstacle::Taken { kind, name, by: None } => {
                taken.push(format!("{kind} {name} (not labelled as this OverlayNode's)"));
            }
            Obstacle::Leftover { kind, name } => leftover.push(format!("{kind} {name}")),
        }
    }
    if taken.is_empty() {
        let message =
            format!("of the deleted OverlayNode of this name are yet to be collected: {}", leftover.join(", "));
        return Problem { reason: Reason::AwaitingCollection, message };
    }
    let message = format!(
        "these exist and are not its own: {}; delete them, or give the OverlayNode another name",
        taken.join(", ")
    );
    Problem { reason: Reason::NameConflict, message }
}

/// What to say of a request about an object that the API server refused.
pub(super) fn refused(kind: Kind, name: &str, error: &kube::Error) -> Problem {
    let for_good = matches!(error, kube::Error::Api(status) if status.is_invalid());
    let reason = if for_good { Reason::Rejected } else { Reason::ApplyFailed };
    Problem { reason, message: format!("{kind} {name}: {}", explain(error)) }
}

/// What the API server said, or why it did not.
#[must_use]
pub(super) fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The schema lets some addresses pass that no daemon takes: told here, and not by pods that
    /// do not start any more.
    #[test]
    fn what_a_daemon_would_refuse_is_not_written() {
        let identity: SpiffeId = "spiffe://overlay.local/ns/a/overlaynode/mesh".parse().unwrap();
        for (address, refused) in [("[::1]:9500", false), ("[::1::2]:9500", true)] {
            let node: OverlayNode = serde_json::from_value(json!({
                "apiVersion": "overlay.rustyonions.io/v1alpha1",
                "kind": "OverlayNode",
                "metadata": { "name": "mesh", "namespace": "a" },
                "spec": { "replicas": 2, "peers": { "static": [{ "name": "far", "address": address }] } },
            }))
            .unwrap();
            let config = build::daemon_config(&node, &Placement::pod(&node, TlsSource::SelfManaged));
            let address_of = |ordinal| names::pod_address(&node, ordinal);
            let peers = build::peers_config(&node, 0, &identity, |_| identity.clone(), address_of);
            let problem = check(&config, &[peers]).err();
            assert_eq!(problem.as_ref().map(|p| p.reason), refused.then_some(Reason::InvalidSpec), "{address}");
            assert!(problem.is_none_or(|p| p.message.contains("address")));
        }
    }
}
