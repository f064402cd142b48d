//! `overlay-daemon run`: the composition root. Reads configuration, confines the process, binds,
//! starts every task, and stops them in one sequence: not ready, still serving, no new sessions, lanes drained,
//! all ended. A second signal aborts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use overlay_core::config::{DaemonConfig, PeersConfig, Transport};
use overlay_core::control::Incarnation;
use overlay_core::node::Node;
use overlay_core::readiness::Report;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::accept::{self, Health, Stop};
use crate::admin::{self, Admin};
use crate::check;
use crate::clock::Clock;
use crate::confine::{self, Confinement, Measure};
use crate::hub::{Heartbeat, Hub, Input, Judged, QUEUE};
use crate::kms::Keys;
use crate::logging;
use crate::metrics::Metrics;
use crate::readiness::Watch;
use crate::reload::{Files, Reloader, Running, Told};
use crate::runtime::ForCallers;
use crate::session::Context;
use crate::transport::{Descriptors, Endpoints, Listener, LocalListener, QuicListener, Timing, Transports};

/// For how long sessions may take to close once all that they are owed is sent.
const GOODBYE: Duration = Duration::from_millis(1_500);
/// For how long tasks that were told to end are waited for.
const JOIN: Duration = Duration::from_secs(2);

/// `overlay-daemon run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The configuration: overlay.toml.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// This daemon's name and its peers.
    #[arg(long, value_name = "FILE")]
    pub peers: PathBuf,
    /// With amnesia: refuse to start where the kernel cannot enforce that no file is written
    #[arg(long, env = "OVERLAY_REQUIRE_LANDLOCK", value_parser = clap::builder::BoolishValueParser::new(), action = clap::ArgAction::SetTrue)]
    pub require_landlock: bool,
}

/// A daemon that may start: its configuration is read, and its process confined.
pub struct Start {
    files: Files,
    config: DaemonConfig,
    peers: PeersConfig,
    confinement: Confinement,
}

impl Start {
    /// Reads the configuration and confines the calling thread, and those that it starts.
    ///
    /// # Errors
    /// Everything that is wrong with the configuration, or what cannot be confined.
    pub fn prepare(args: &RunArgs) -> anyhow::Result<Self> {
        let config = check::read_daemon(&args.config);
        let peers = check::read_peers(&args.peers, config.as_ref().ok());
        let (config, peers) = match (config, peers) {
            (Ok(config), Ok(peers)) => (config, peers),
            (config, peers) => {
                let errors: Vec<String> =
                    [config.err(), peers.err()].into_iter().flatten().map(|e| e.to_string()).collect();
                anyhow::bail!("{}", errors.join("\n"));
            }
        };
        let confinement = confine::apply(config.overlay.amnesia, &config.unix.socket, args.require_landlock)?;
        let files = Files { config: args.config.clone(), peers: args.peers.clone() };
        Ok(Self { files, config, peers, confinement })
    }
}

/// Runs a daemon until SIGTERM or SIGINT, and drains it. All but what `callers` is for runs where
/// this is awaited.
///
/// # Errors
/// It could not start, with every reason.
pub async fn run(start: Start, callers: ForCallers) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let daemon = begin(start, &callers).await?;
    Ok(daemon.run_until(&mut signals).await)
}

struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self { term: on(SignalKind::terminate())?, int: on(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// A daemon that runs.
struct Daemon {
    config: DaemonConfig,
    hub: mpsc::Sender<Input>,
    heartbeat: watch::Receiver<Heartbeat>,
    draining: watch::Sender<bool>,
    stop: Stop,
    /// Accept loops: they end when their sessions have.
    accepting: JoinSet<()>,
    /// Diallers, readiness, reloads: dropped at the end.
    helping: JoinSet<()>,
    /// The hub and admin HTTP: they serve to the last.
    serving: JoinSet<()>,
    /// From where QUIC was dialled.
    endpoints: Arc<Endpoints>,
}

async fn begin(start: Start, callers: &ForCallers) -> anyhow::Result<Daemon> {
    let Start { files, config, peers, confinement } = start;
    let clock = Clock::start();
    let running = Running::of(&config, &peers).context("the configuration cannot be written down")?;
    let metrics = Arc::new(Metrics::new(config.overlay.amnesia, &running.config)?);
    let level = logging::start(&config.observability, clock, metrics.log_suppressed().clone())?;
    confinement.log();
    Measure::ALL.into_iter().for_each(|measure| metrics.confined(measure, confinement.holds(measure)));
    let keys = Keys::load(&config.tls, &config.token, clock.unix_ms()).map_err(|errors| {
        anyhow::anyhow!("{}", errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    })?;
    let keys = Arc::new(keys);
    let descriptors = Descriptors::raise();
    let (timing, timing_now) = watch::channel(Transports::from(&config));
    let timing_now = Timing::from(timing_now);

    let listen = config.overlay.listen;
    let listener = Listener::bind(listen, timing_now.clone(), descriptors.clone(), clock)
        .await
        .with_context(|| format!("overlay.listen: cannot listen on {listen}"))?;
    let onion = match config.tor.listen {
        None => None,
        Some(at) => {
            let timing = timing_now.of(Transport::Tor);
            let listener = Listener::bind(at, timing, descriptors.clone(), clock).await;
            Some(listener.with_context(|| format!("tor.listen: cannot listen on {at}"))?)
        }
    };
    let quic = {
        let _its_threads = callers.quic.enter();
        config.overlay.listen_quic.map(|at| listen_quic(at, &keys, &timing_now, clock)).transpose()?
    };
    let unix = &config.unix;
    let local = LocalListener::bind(&unix.socket, &unix.allow_uids, timing_now.clone(), descriptors.clone(), clock)
        .context("unix.socket")?;
    let metrics_at = config.observability.metrics;
    let admin_socket = admin::bind(metrics_at)
        .await
        .with_context(|| format!("observability.metrics: cannot listen on {metrics_at}"))?;
    let quic_address = quic.as_ref().map(QuicListener::local_addr).transpose()?;
    let (address, admin_address) = (listener.local_addr()?, admin_socket.local_addr()?);
    let onion_address = onion.as_ref().map(Listener::local_addr).transpose()?;

    let incarnation = incarnation()?;
    let identity = keys.current().identity().clone();
    let mut node = Node::new(config.clone(), &peers, identity.clone(), incarnation, clock.now());
    let first = keys.current();
    node.handle_keys(first.generation(), first.token_keys());
    node.handle_token(first.peer_token());

    let (hub, inputs) = mpsc::channel(QUEUE);
    let (sender, sent) = mpsc::channel(QUEUE);
    let (beats, heartbeat) = watch::channel(Heartbeat::default());
    let (draining, is_draining) = watch::channel(false);
    let (report, reported) = watch::channel(Report::default());
    let (judged, is_judged) = watch::channel(Judged::default());
    let stop = Stop { accepting: CancellationToken::new(), all: CancellationToken::new() };
    let context = Context::new(hub.clone(), sender, keys.verifier(), timing_now, clock, Arc::clone(&metrics));

    let (readiness, readiness_now) = watch::channel(config.readiness.clone());
    let (running, running_now) = watch::channel(running);
    let (taken_up, is_taken_up) = watch::channel(true);
    let health = Health::default();
    let told = Told {
        timing,
        readiness,
        running,
        taken_up,
        hub: hub.clone(),
        keys: Arc::clone(&keys),
        level,
        metrics: Arc::clone(&metrics),
    };
    let reloader = Reloader::new(files, config.clone(), peers.clone(), told, context.clone());
    let mut serving = JoinSet::new();
    let hub_task = Hub {
        node,
        clock,
        metrics: Arc::clone(&metrics),
        reading: context.reading.clone(),
        peers: reloader.peers(),
        inputs,
        sent,
        judged: is_judged,
        heartbeat: beats,
    };
    serving.spawn(hub_task.run(stop.all.clone()));
    let mut helping = JoinSet::new();
    let (asked, is_asked) = watch::channel(0);
    let mut hangups = signal(SignalKind::hangup()).context("cannot listen for signals")?;
    helping.spawn(async move {
        while hangups.recv().await.is_some() {
            tracing::info!("SIGHUP: looking at configuration, peers and keys");
            asked.send_modify(|times| *times += 1);
        }
    });
    helping.spawn(reloader.run(is_asked.clone()));
    let shown = Admin { metrics: Arc::clone(&metrics), report: reported, running: running_now, clock };
    let ended = stop.all.clone();
    serving.spawn(async move {
        admin::serve(admin_socket, shown, ended).await;
    });
    helping.spawn(
        Watch {
            config: readiness_now,
            heartbeat: heartbeat.clone(),
            draining: is_draining,
            health: health.clone(),
            descriptors,
            taken_up: is_taken_up,
            proxy: context.proxy.clone(),
            keys: Arc::clone(&keys),
            clock,
            report,
            judged,
            metrics: Arc::clone(&metrics),
        }
        .run(),
    );
    helping.spawn(hand_on_keys(Arc::clone(&keys), hub.clone()));
    let (watched, reload_metrics, reload_stop) = (Arc::clone(&keys), Arc::clone(&metrics), stop.all.clone());
    helping.spawn(async move { watched.watch(reload_metrics, clock, is_asked, reload_stop).await });
    let mut accepting = JoinSet::new();
    if let Some(quic) = quic {
        let accept = accept::quic(quic, Arc::clone(&keys), context.clone(), stop.clone(), Handle::current());
        accepting.spawn_on(accept, &callers.quic);
    }
    let endpoints = Arc::clone(&context.endpoints);
    for listener in [Some(listener), onion].into_iter().flatten() {
        let (keys, health, stop) = (Arc::clone(&keys), health.clone(), stop.clone());
        let accept = accept::tls(listener, keys, context.clone(), health, stop, Handle::current());
        accepting.spawn_on(accept, &callers.handshakes);
    }
    accepting.spawn(accept::local(local, context, health, stop.clone()));

    tracing::info!(
        name = %peers.name, %identity, %address, quic = quic_address.map(tracing::field::display),
        onion = onion_address.map(tracing::field::display), admin = %admin_address, socket = %config.unix.socket.display(),
        peers = peers.peers.len(), version = env!("CARGO_PKG_VERSION"), "listening"
    );
    Ok(Daemon { config, hub, heartbeat, draining, stop, accepting, helping, serving, endpoints })
}

impl Daemon {
    async fn run_until(mut self, signals: &mut Signals) -> ExitCode {
        let failed = tokio::select! {
            () = signals.next() => false,
            // None of these ends by itself: a panic took one of them, and without it the
            // daemon is not what it says it is.
            _ = self.serving.join_next() => true,
            _ = self.accepting.join_next() => true,
            _ = self.helping.join_next() => true,
        };
        if failed {
            tracing::error!("a task that never ends has ended; stopping");
            return ExitCode::FAILURE;
        }
        tracing::info!("stopping: draining");
        tokio::select! {
            () = self.drain() => {
                tracing::info!("stopped");
                ExitCode::SUCCESS
            }
            () = signals.next() => {
                tracing::warn!("stopped at once by a second signal");
                ExitCode::FAILURE
            }
        }
    }

    async fn drain(&mut self) {
        let drain = &self.config.drain;
        self.draining.send_replace(true);
        tokio::time::sleep(Duration::from_millis(drain.delay_ms)).await;
        self.stop.accepting.cancel();
        let empty = async {
            if self.hub.send(Input::Drain).await.is_ok() {
                let _hub_is_gone = self.heartbeat.wait_for(|beat| beat.drained).await;
            }
        };
        if timeout(Duration::from_millis(drain.timeout_ms), empty).await.is_err() {
            tracing::warn!("the drain timeout passed with messages still queued");
        }
        let ended = async {
            if self.hub.send(Input::Finish).await.is_ok() {
                let _hub_is_gone = self.heartbeat.wait_for(|beat| beat.deserted).await;
            }
        };
        // Whose session does not end by itself in that time is ended with the rest.
        let _late = timeout(GOODBYE, ended).await;
        self.stop.all.cancel();
        self.helping.shutdown().await;
        let joined = async {
            self.endpoints.finish().await;
            while self.accepting.join_next().await.is_some() {}
            while self.serving.join_next().await.is_some() {}
        };
        // They end at once; what does not is ended with the process.
        if timeout(JOIN, joined).await.is_err() {
            tracing::warn!("a task did not end when told to");
        }
    }
}

fn listen_quic(at: SocketAddr, keys: &Keys, timing: &Timing, clock: Clock) -> anyhow::Result<QuicListener> {
    let current = keys.current();
    let quic = current.quic().context("overlay.listen_quic: takes tls.key_exchange RequireHybrid")?;
    QuicListener::bind(at, quic, timing.clone(), clock)
        .with_context(|| format!("overlay.listen_quic: cannot listen on {at}"))
}

/// Gives the hub each new set of token keys, and the token for peers.
async fn hand_on_keys(keys: Arc<Keys>, hub: mpsc::Sender<Input>) {
    let mut changes = keys.subscribe();
    while changes.changed().await.is_ok() {
        let set = Arc::clone(&changes.borrow_and_update());
        if hub.send(Input::Keys(set.generation(), set.token_keys(), set.peer_token())).await.is_err() {
            return;
        }
    }
}

/// A random number for this process, from the one crypto provider.
fn incarnation() -> anyhow::Result<Incarnation> {
    let mut bytes = [0; 8];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| anyhow::anyhow!("the system gives no random numbers"))?;
    Ok(Incarnation(u64::from_be_bytes(bytes)))
}
