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
//! | core | `pods` | get | whether a pod that asks for a certificate is an OverlayNode's |
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
//! Server-side apply of an object that is absent takes `create` besides `patch`. Nothing is
//! deleted: children go with their owner. `blockOwnerDeletion` is not set, so
//! `overlaynodes/finalizers` is not needed.

mod admin;
mod apply;
mod backoff;
mod choice;
mod cluster;
mod credentials;
mod dereference;
mod installation;
mod metrics;
mod node;
mod plan;
mod quantity;
mod sign;
mod source;
mod status;
mod watch;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use kube::Client;
use kube::runtime::controller::{self, Action, Controller};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::api::OverlayNode;
use crate::build::names;
use admin::{Health, Shown};
use backoff::Backoff;
use metrics::{Ended, Metrics};
use node::Context;

/// Secrets are not watched, so every OverlayNode is looked at this often.
const RESYNC: Duration = Duration::from_secs(300);
/// By up to this much less, so that a thousand of them are not looked at at once.
const RESYNC_SPREAD: Duration = Duration::from_secs(60);
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
    /// Trust domain of every identity; changing it later reissues all certificates
    #[arg(long, env = "OVERLAY_TRUST_DOMAIN", default_value = names::DEFAULT_TRUST_DOMAIN, value_parser = names::trust_domain)]
    pub trust_domain: String,
    /// Image of OverlayNodes without spec.image
    #[arg(long, env = "OVERLAY_DAEMON_IMAGE", default_value = concat!("overlay-daemon:", env!("CARGO_PKG_VERSION")))]
    pub daemon_image: String,
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
    /// A part of the operator ended by itself.
    #[error("{0} ended by itself")]
    Ended(&'static str),
}

/// Reconciles until SIGTERM or Ctrl-C; what has begun is finished first.
///
/// # Errors
/// It could not start, or a part of it ended by itself.
pub async fn run(args: Args) -> Result<(), RunError> {
    log_to_stderr(&args);
    let client = Client::try_default().await.map_err(RunError::Client)?;
    let metrics = Arc::new(Metrics::new()?);
    let health = Arc::new(Health::new(Instant::now()));
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let listen = |source| RunError::Listen { address: args.admin_addr, source };
    let listener = TcpListener::bind(args.admin_addr).await.map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), admin = %bound, namespace = args.namespace, "started");

    // The admin server outlives the controller, so that what is being finished can be seen.
    let admin_stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let router = admin::router(Shown { health: health.clone(), metrics: metrics.clone() });
    let admin_stopped = admin_stop.clone().cancelled_owned();
    tasks.spawn(async move {
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(admin_stopped).await {
            tracing::error!(%error, "the admin server failed");
        }
        "the admin server"
    });
    let controller = control(client, args, metrics, health.clone(), stop.clone());
    tasks.spawn(controller.map(|()| "the controller"));

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Some(ended) = tasks.join_next() => return Err(RunError::Ended(ended.unwrap_or("a task"))),
    }
    tracing::info!("stopping: what has begun is finished");
    health.handle_stopping();
    stop.cancel();
    tokio::select! {
        _ = tasks.join_next() => {}
        _ = terminate.recv() => return Err(RunError::Aborted),
        _ = interrupt.recv() => return Err(RunError::Aborted),
    }
    admin_stop.cancel();
    // A scraper that keeps its connection open must not keep the operator.
    tokio::time::timeout(Duration::from_secs(1), tasks.join_next()).await.ok();
    tracing::info!("stopped");
    Ok(())
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
            installation,
            cluster: cluster::Capabilities::new(client),
            caches,
            metrics,
        },
        backoff: Backoff::default(),
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
    Ok(Action::requeue(outcome.renewal.map_or(resync, |renewal| renewal.min(resync))))
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
