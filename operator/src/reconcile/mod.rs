//! OverlayNodes become daemon pods: dereference → validate → build → plan → apply → status.
//! Decides nothing about what a mesh looks like (that is [`crate::build`]) and never writes
//! a spec. Only `dereference`, `apply` and the status write touch a client.
//!
//! What the operator may do, and needs; the chart grants exactly this.
//!
//! Everywhere (ClusterRole):
//!
//! | group | resource | verbs | why |
//! | --- | --- | --- | --- |
//! | `overlay.rustyonions.io` | `overlaynodes` | get, list, watch | what is wanted; `get` before a status write |
//! | `overlay.rustyonions.io` | `overlaynodes/status` | patch | conditions |
//! | `apps` | `statefulsets` | get, list, watch, create, patch | NAME |
//! | core | `configmaps` | get, list, watch, create, patch | NAME-config |
//! | core | `services` | get, list, watch, create, patch | NAME, NAME-peers |
//! | core | `serviceaccounts` | get, list, watch, create, patch | NAME |
//! | core | `secrets` | get, create, patch | NAME-tls, NAME-token: read by name, never listed or watched |
//! | core | `pods` | get, list, patch | whether a pod that asks for a certificate is an OverlayNode's; why daemons are not ready, only while they are not; an annotation that has the kubelet refresh a changed configuration |
//! | core | `events` | list | why daemons are not ready, and why pods are refused |
//! | core | `nodes` | list | whether every kubelet is new enough to ask |
//! | `certificates.k8s.io` | `podcertificaterequests` | get, list, watch | what pods ask for |
//! | `certificates.k8s.io` | `podcertificaterequests/status` | patch | the answers |
//! | `certificates.k8s.io` | `signers`, limited by `resourceNames` to `overlay.rustyonions.io/mesh` | sign | to answer as that signer |
//!
//! Whether it may sign, it asks by a SelfSubjectAccessReview, which every authenticated user may
//! create and which is not kept.
//!
//! In the operator's own namespace (Role): core `secrets` get, limited by `resourceNames` to
//! `overlay-ca` and `overlay-token-root`, and `create`, which cannot be limited by name. The
//! ClusterRole above implies both; the Role stands for installations that narrow the first.
//!
//! In the operator's own namespace (Role): `coordination.k8s.io` `leases` get and update, limited
//! by `resourceNames` to the operator's own, and `create`, which cannot be limited by name.
//!
//! Server-side apply of an object that is absent takes `create` besides `patch`. Nothing is
//! deleted: children go with their owner. `blockOwnerDeletion` is not set, so
//! `overlaynodes/finalizers` is not needed.

mod admin;
mod apply;
mod backoff;
mod causes;
mod choice;
mod cluster;
mod credentials;
mod dereference;
mod installation;
mod lease;
mod look;
mod metrics;
mod node;
mod plan;
mod pods;
mod quantity;
mod rollout;
mod serve;
mod shortage;
mod sign;
mod source;
mod status;
mod watch;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use kube::client::ClientBuilder;
use kube::runtime::controller::{self, Action, Controller};
use kube::{Client, Config};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::timeout::TimeoutLayer;
use tracing_subscriber::EnvFilter;

use crate::api::{OverlayNode, PullPolicy};
use crate::build::{labels, names};
use admin::{Health, Shown};
use backoff::Backoff;
pub use lease::LeaseLost;
use lease::{Candidate, Gate};
use metrics::{Ended, Metrics};
use node::Context;

/// Secrets are not watched, so every OverlayNode is looked at this often.
const RESYNC: Duration = Duration::from_secs(300);
/// By up to this much less, so that a thousand of them are not looked at at once.
const RESYNC_SPREAD: Duration = Duration::from_secs(60);
/// After failures: what a person puts right is seen within it.
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// Between two looks at what daemons run, while not all run what they are to.
const LONGEST_ROLLOUT_LOOK: Duration = Duration::from_secs(30);
/// For the API server to answer one request. It takes milliseconds, and gives up on its own part
/// after a minute (`--request-timeout`); a webhook may take ten seconds, unless told otherwise.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);
/// OverlayNodes reconciled at once: enough to hide the API server's latency.
const CONCURRENCY: u16 = 16;
/// Events of one OverlayNode within this time are one reconciliation.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// `overlay-operator run`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Namespace of the operator itself, which holds the installation's CA and token root
    #[arg(long, env = "POD_NAMESPACE", default_value = "overlay-system")]
    pub namespace: String,
    /// Reconcile only while holding the Lease; false where this is the only operator
    #[arg(
        long, env = "OVERLAY_LEADER_ELECT", default_value_t = true, value_name = "BOOL", num_args = 0..=1,
        require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set
    )]
    pub leader_elect: bool,
    /// Name of the Lease in the operator's namespace
    #[arg(long, env = "OVERLAY_LEASE_NAME", default_value = labels::OPERATOR)]
    pub lease_name: String,
    /// Name of this operator's pod, by which the Lease names its holder
    #[arg(long, env = "POD_NAME", default_value = labels::OPERATOR)]
    pub pod_name: String,
    /// Trust domain of every identity; changing it later reissues all certificates
    #[arg(long, env = "OVERLAY_TRUST_DOMAIN", default_value = names::DEFAULT_TRUST_DOMAIN, value_parser = names::trust_domain)]
    pub trust_domain: String,
    /// Image of OverlayNodes without spec.image
    #[arg(long, env = "OVERLAY_DAEMON_IMAGE", default_value = concat!("overlay-daemon:", env!("CARGO_PKG_VERSION")))]
    pub daemon_image: String,
    /// When the kubelet pulls it, for OverlayNodes without spec.image.pullPolicy: Always, IfNotPresent or Never
    #[arg(long, env = "OVERLAY_DAEMON_IMAGE_PULL_POLICY", value_name = "POLICY")]
    pub daemon_image_pull_policy: Option<PullPolicy>,
    /// Where /metrics, /healthz, /readyz and /version are served
    #[arg(long, env = "OVERLAY_ADMIN_ADDR", default_value = "0.0.0.0:8080")]
    pub admin_addr: SocketAddr,
    /// Least severe level that is logged: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, env = "OVERLAY_LOG_LEVEL", default_value = "info")]
    pub log_level: EnvFilterText,
    /// One JSON object a line, or text
    #[arg(long, env = "OVERLAY_LOG_FORMAT", value_enum, default_value_t = LogFormat::Json)]
    pub log_format: LogFormat,
}

/// The form of the operator's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One object a line.
    Json,
    /// For a person.
    Text,
}

/// A filter of the log, checked where it is given.
#[derive(Clone, Debug)]
pub struct EnvFilterText(String);

impl std::str::FromStr for EnvFilterText {
    type Err = tracing_subscriber::filter::ParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        EnvFilter::try_new(text).map(|_| Self(text.to_owned()))
    }
}

/// Why the operator stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no way to an API server.
    #[error("no API server: {0}")]
    Client(#[source] kube::Error),
    /// The address is taken, or not ours.
    #[error("cannot listen on {address} (--admin-addr): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A signal cannot be waited for.
    #[error("cannot wait for signals: {0}")]
    Signals(#[source] std::io::Error),
    /// A metric is named wrongly.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A second signal came while work was being finished.
    #[error("aborted by a second signal")]
    Aborted,
    /// Another operator leads, or may by now.
    #[error("lost the lease: {0}; the next start stands by")]
    LeaseLost(#[from] LeaseLost),
    /// A part of the operator ended by itself.
    #[error("{0} ended by itself")]
    Ended(&'static str),
}

/// Stands by until the lease is ours, then reconciles until SIGTERM or Ctrl-C; what has begun
/// is finished first.
///
/// # Errors
/// It could not start, lost the lease, or a part of it ended by itself.
pub async fn run(args: Args) -> Result<(), RunError> {
    log_to_stderr(&args);
    let metrics = Arc::new(Metrics::new()?);
    let health = Arc::new(Health::new(Instant::now()));
    let gate = Arc::new(Gate::new(Instant::now(), metrics.writes_refused.clone()));
    let (ungated, client) = clients(&gate).await.map_err(RunError::Client)?;
    let mut signals = Signals::new().map_err(RunError::Signals)?;
    let listen = |source| RunError::Listen { address: args.admin_addr, source };
    let listener = TcpListener::bind(args.admin_addr).await.map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), admin = %bound, namespace = args.namespace, "started");

    // The admin server outlives the controller, so that what is being finished can be seen.
    let admin_stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let router = admin::router(Shown { health: health.clone(), metrics: metrics.clone() });
    tasks.spawn(serve::serve(listener, router, admin_stop.clone()).map(|()| "the admin server"));

    let mut candidate = args
        .leader_elect
        .then(|| Candidate::new(ungated, &args.namespace, args.lease_name.clone(), &args.pod_name, gate.clone()));
    let lead = tokio::select! {
        () = stand_by(candidate.as_mut(), &health, &gate) => true,
        () = signals.next() => false,
        Some(ended) = tasks.join_next() => return Err(RunError::Ended(ended.unwrap_or("a task"))),
    };
    if lead {
        health.handle_leading();
        metrics.leader.set(1);
        let led = lead_until_stopped(&mut signals, &mut tasks, candidate.as_mut(), client, args, &metrics, &health);
        let led = led.await;
        metrics.leader.set(0);
        if let (Some(candidate), false) = (&mut candidate, matches!(led, Err(RunError::LeaseLost(_)))) {
            candidate.release().await;
        }
        led?;
    }
    health.handle_stopping();
    admin_stop.cancel();
    // A scraper that keeps its connection open must not keep the operator.
    tokio::time::timeout(Duration::from_secs(1), tasks.join_next()).await.ok();
    tracing::info!("stopped");
    Ok(())
}

/// Two ways to the API server: for the lease itself, and for all else, behind the gate.
async fn clients(gate: &Arc<Gate>) -> Result<(Client, Client), kube::Error> {
    let mut config = Config::infer().await.map_err(kube::Error::InferConfig)?;
    // What is tried again asks the gate again: whoever asked does so, with pauses of its own.
    config.default_retry = false;
    Ok((Client::try_from(config.clone())?, gated(config, gate)?))
}

/// Where no answer comes the other end may be gone, and TCP would wait for a quarter of an hour, or
/// for ever. Of a watch only the beginning is waited for: the controller sees to the rest.
fn gated(config: Config, gate: &Arc<Gate>) -> Result<Client, kube::Error> {
    let answered = TimeoutLayer::new(ANSWERED_WITHIN);
    Ok(ClientBuilder::try_from(config)?.with_layer(&answered).with_layer(&lease::layer(gate)).build())
}

/// SIGTERM and Ctrl-C.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Returns when this operator leads: with no candidate, at once.
async fn stand_by(candidate: Option<&mut Candidate>, health: &Health, gate: &Gate) {
    let Some(candidate) = candidate else {
        tracing::info!("leads without a lease: no other operator may run");
        return gate.open_for_ever();
    };
    tracing::info!(identity = candidate.identity(), "stands by for the lease");
    candidate.acquire(health).await;
    tracing::info!(identity = candidate.identity(), "holds the lease: leads");
}

/// Runs the controller until a signal, or until the lease is lost. Then nothing is finished.
async fn lead_until_stopped(
    signals: &mut Signals,
    tasks: &mut JoinSet<&'static str>,
    candidate: Option<&mut Candidate>,
    client: Client,
    args: Args,
    metrics: &Arc<Metrics>,
    health: &Arc<Health>,
) -> Result<(), RunError> {
    let lost = async {
        match candidate {
            Some(candidate) => candidate.keep().await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(lost);
    let stop = CancellationToken::new();
    tasks.spawn(control(client, args, metrics.clone(), health.clone(), stop.clone()).map(|()| "the controller"));
    tokio::select! {
        () = signals.next() => {}
        lost = &mut lost => return Err(lost_lease(lost)),
        Some(ended) = tasks.join_next() => return Err(RunError::Ended(ended.unwrap_or("a task"))),
    }
    tracing::info!("stopping: what has begun is finished");
    health.handle_stopping();
    stop.cancel();
    tokio::select! {
        _ = tasks.join_next() => Ok(()),
        lost = &mut lost => Err(lost_lease(lost)),
        () = signals.next() => Err(RunError::Aborted),
    }
}

fn lost_lease(lost: LeaseLost) -> RunError {
    tracing::error!("lost the lease, stops at once: {lost}");
    RunError::LeaseLost(lost)
}

/// Standard error, so that standard output stays for what is printed on request.
fn log_to_stderr(args: &Args) {
    let builder =
        tracing_subscriber::fmt().with_env_filter(EnvFilter::new(&args.log_level.0)).with_writer(std::io::stderr);
    let builder = builder.with_ansi(std::io::stderr().is_terminal());
    let set = match args.log_format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Text => builder.try_init(),
    };
    // A subscriber that is there already, as in tests, stays.
    set.ok();
}

/// What the controller's calls share.
struct Shared {
    node: Context,
    backoff: Backoff,
}

/// Watches, reconciles and signs until `stop`.
async fn control(client: Client, args: Args, metrics: Arc<Metrics>, health: Arc<Health>, stop: CancellationToken) {
    let (watches, caches) = watch::watches(&client, &health, &metrics);
    let installation = Arc::new(installation::Store::new(client.clone(), args.namespace, metrics.clone()));
    let signer = sign::Signer {
        client: client.clone(),
        trust_domain: args.trust_domain.clone(),
        installation: installation.clone(),
        metrics: metrics.clone(),
    };
    let signer = sign::run(signer, stop.clone());
    let shared = Arc::new(Shared {
        node: Context {
            client: client.clone(),
            trust_domain: args.trust_domain,
            daemon_image: args.daemon_image,
            daemon_pull_policy: args.daemon_image_pull_policy,
            installation,
            cluster: cluster::Capabilities::new(client),
            caches,
            metrics,
            shortages: shortage::Shortages::default(),
            rollouts: Backoff::new(LONGEST_ROLLOUT_LOOK),
        },
        backoff: Backoff::new(LONGEST_RETRY),
    });
    let controller = Controller::for_stream(watches.nodes, shared.node.caches.nodes.clone())
        .with_config(controller::Config::default().concurrency(CONCURRENCY).debounce(DEBOUNCE))
        .owns_stream(watches.stateful_sets)
        .owns_stream(watches.config_maps)
        .owns_stream(watches.services)
        .owns_stream(watches.service_accounts)
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, retry, shared)
        .for_each(|result| async move {
            match result {
                // Reconciliations report what went wrong themselves, watches where they run.
                Ok(_) | Err(controller::Error::ReconcilerFailed(..) | controller::Error::QueueError(_)) => {}
                // It was deleted between the event and now.
                Err(controller::Error::ObjectNotFound(_)) => {}
                Err(error) => tracing::warn!(%error, "the controller"),
            }
        });
    // Both end by `stop` alone.
    futures::join!(controller, signer);
}

async fn reconcile(node: Arc<OverlayNode>, shared: Arc<Shared>) -> Result<Action, kube::Error> {
    let context = &shared.node;
    context.metrics.nodes.set(i64::try_from(context.caches.nodes.len()).unwrap_or(i64::MAX));
    if node.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let started = Instant::now();
    let result = node::reconcile(context, &node).await;
    let ended = match &result {
        Ok(outcome) => match &outcome.problem {
            None => Ended::Applied,
            Some(problem) if problem.reason.is_stall() => Ended::Stalled,
            Some(_) => Ended::Failed,
        },
        Err(_) => Ended::Failed,
    };
    context.metrics.reconciled(ended, started.elapsed());
    let outcome = result?;
    if outcome.problem.is_some() {
        return Ok(Action::requeue(shared.backoff.failed(&node, &context.caches.nodes)));
    }
    shared.backoff.succeeded(&node);
    let resync = RESYNC.saturating_sub(spread(&node));
    let due = [outcome.renewal, outcome.look].into_iter().flatten().fold(resync, Duration::min);
    Ok(Action::requeue(due))
}

/// The status could not be written.
fn retry(node: Arc<OverlayNode>, error: &kube::Error, shared: Arc<Shared>) -> Action {
    let (namespace, name) = (names::namespace(&node), names::name(&node));
    tracing::warn!(namespace, name, "cannot write the status: {}", node::explain(error));
    Action::requeue(shared.backoff.failed(&node, &shared.node.caches.nodes))
}

/// A share of [`RESYNC_SPREAD`] that is always the same for one OverlayNode.
fn spread(node: &OverlayNode) -> Duration {
    let uid = node.metadata.uid.as_deref().unwrap_or_default();
    RESYNC_SPREAD.mul_f64(f64::from(blake3::hash(uid.as_bytes()).as_bytes()[0]) / 256.0)
}

#[cfg(test)]
mod tests {
    use kube::Api;
    use prometheus::IntCounter;
    use tokio::net::TcpListener;

    use super::*;

    /// An API server that takes a request and never answers holds nobody up for ever.
    #[tokio::test(start_paused = true)]
    async fn a_request_without_an_answer_ends() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap();
        let gate = Arc::new(Gate::new(Instant::now(), IntCounter::new("refused", "refused").unwrap()));
        gate.open_for_ever();
        let client = gated(Config::new(format!("http://{address}").parse().unwrap()), &gate).unwrap();
        let (began, nodes) = (Instant::now(), Api::<OverlayNode>::all(client));
        let asked = tokio::time::timeout(10 * ANSWERED_WITHIN, nodes.get("mesh")).await;
        assert!(asked.expect("it ends").is_err());
        assert_eq!(began.elapsed().as_secs(), ANSWERED_WITHIN.as_secs());
    }
}
