//! The configuration as it changes: looks at both files every second, and hands on what a
//! running daemon can take up. A file that is wrong changes nothing, and a setting that waits
//! for a restart stays as it is while the others change; both are said once and counted.
//!
//! What is shown as running (`/readyz`, `overlay_config_info`) is what was handed to everyone
//! whom it concerns, never what was only read.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use overlay_core::config::{DaemonConfig, KeyExchange, Peer, PeersConfig, Places, Readiness, Transport};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::check::{self, FileError};
use crate::dial::Dialler;
use crate::hub::{Input, Peers};
use crate::kms::Keys;
use crate::logging::Level;
use crate::metrics::Metrics;
use crate::session::Context;
use crate::transport::{Isolation, Transports};

/// How often the files are read again. Contents are compared, as for keys: Kubernetes swaps a
/// symlink above them, and no watch on the files themselves would see it.
const EVERY: Duration = Duration::from_secs(1);

/// The hashes of what is running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// [`DaemonConfig::hash`].
    pub config: String,
    /// [`PeersConfig::hash`].
    pub peers: String,
}

impl Running {
    /// Of these two.
    ///
    /// # Errors
    /// One of them has no TOML form.
    pub fn of(config: &DaemonConfig, peers: &PeersConfig) -> Result<Self, toml::ser::Error> {
        Ok(Self { config: config.hash()?, peers: peers.hash()? })
    }
}

/// Where the files are.
#[derive(Clone, Debug)]
pub struct Files {
    /// `overlay.toml`.
    pub config: PathBuf,
    /// The peers file.
    pub peers: PathBuf,
}

/// Everyone who is told of a change.
pub struct Told {
    /// Sessions' deadlines.
    pub timing: watch::Sender<Transports>,
    /// Readiness's thresholds.
    pub readiness: watch::Sender<Readiness>,
    /// What `/readyz` shows.
    pub running: watch::Sender<Running>,
    /// Whether the files are in use as they are now.
    pub taken_up: watch::Sender<bool>,
    /// Limits, caps and peers.
    pub hub: mpsc::Sender<Input>,
    /// The key exchange.
    pub keys: Arc<Keys>,
    /// The log's level.
    pub level: Level,
    /// Counts attempts.
    pub metrics: Arc<Metrics>,
}

/// A configured peer's task.
struct Dialling {
    retired: CancellationToken,
    up: watch::Sender<bool>,
}

/// Takes up what changes; owns the diallers.
pub struct Reloader {
    files: Files,
    /// Which daemon this is, of all that may share a proxy.
    own: String,
    config: DaemonConfig,
    peers: PeersConfig,
    places: Places,
    told: Told,
    context: Context,
    dialling: BTreeMap<usize, Dialling>,
    diallers: JoinSet<()>,
    /// What was last refused, or waits for a restart: it is said once.
    refused: Option<String>,
}

impl Reloader {
    /// One that runs with these, and dials every peer from now on.
    #[must_use]
    pub fn new(files: Files, config: DaemonConfig, peers: PeersConfig, told: Told, context: Context) -> Self {
        let places = Places::new(&peers.peers);
        let mut new = Self {
            files,
            own: format!("{} {}", told.keys.current().identity(), peers.name),
            config,
            peers,
            places: places.clone(),
            told,
            context,
            dialling: BTreeMap::new(),
            diallers: JoinSet::new(),
            refused: None,
        };
        for (place, peer) in places.iter() {
            new.dial(place, peer);
        }
        new
    }

    /// The peers as the hub is told of them.
    #[must_use]
    pub fn peers(&self) -> Peers {
        let places = || 0..self.places.span();
        let gauge = |place| self.told.metrics.inflight(self.places.get(place).map(|peer| peer.name.as_str()));
        let nobody = || watch::channel(false).0;
        Peers {
            places: self.places.clone(),
            inflight: places().map(gauge).chain([self.told.metrics.inflight(None)]).collect(),
            up: places().map(|place| self.dialling.get(&place).map_or_else(nobody, |d| d.up.clone())).collect(),
        }
    }

    /// Looks at the files every second, and whenever `asked` to, until its owner drops the task,
    /// and the diallers with it.
    pub async fn run(mut self, mut asked: watch::Receiver<u64>) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(_) = self.diallers.join_next() => continue,
                _ = ticks.tick() => {}
                // Who asks wants to hear what is wrong, though it was said before.
                Ok(()) = asked.changed() => self.refused = None,
            }
            let (files, running) = (self.files.clone(), self.config.clone());
            let read = move || {
                let config = check::read_daemon(&files.config);
                let peers = check::read_peers(&files.peers, Some(config.as_ref().unwrap_or(&running)));
                (config, peers)
            };
            let Ok((config, peers)) = tokio::task::spawn_blocking(read).await else { continue };
            self.take_up(config, peers).await;
        }
    }

    async fn take_up(&mut self, config: Result<DaemonConfig, FileError>, peers: Result<PeersConfig, FileError>) {
        let mut problems = Vec::new();
        let before = (self.config.clone(), self.peers.clone());
        let dialled = peers.as_ref().ok().filter(|new| new.name == self.peers.name).unwrap_or(&self.peers);
        match config {
            Ok(new) => {
                let mut effective = self.config.with_live(&new);
                if let Some(peer) = over_quic(dialled, effective.tls.key_exchange) {
                    effective.tls.key_exchange = self.config.tls.key_exchange;
                    problems.push(format!("tls.key_exchange: must be RequireHybrid while {peer} is dialled over QUIC"));
                }
                if !self.set_key_exchange(effective.tls.key_exchange).await {
                    effective.tls.key_exchange = self.config.tls.key_exchange;
                    problems.push("tls.key_exchange: waits until the key files can be used again".to_owned());
                }
                let waiting = effective.differences(&new);
                if !waiting.is_empty() {
                    let path = self.files.config.display();
                    problems.push(format!("{path}: these wait for a restart: {}", waiting.join(", ")));
                }
                self.config = effective;
            }
            Err(error) => problems.push(error.to_string()),
        }
        match peers {
            Ok(new) if new.name == self.peers.name => self.peers = new,
            Ok(new) => {
                problems.push(format!("{}: name: waits for a restart, is {}", self.files.peers.display(), new.name))
            }
            Err(error) => problems.push(error.to_string()),
        }
        let changed = before != (self.config.clone(), self.peers.clone());
        if changed {
            self.tell(&before.0, &before.1).await;
        }
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        if let Some(problem) = problem.as_ref().filter(|problem| self.refused.as_ref() != Some(problem)) {
            self.told.metrics.config_reload(false);
            tracing::warn!(problem, "the new configuration is not taken up as a whole; what it cannot change stays");
        }
        self.told.taken_up.send_replace(problem.is_none());
        self.refused = problem;
    }

    /// Whether handshakes are held to this policy from now on.
    async fn set_key_exchange(&self, policy: KeyExchange) -> bool {
        if policy == self.config.tls.key_exchange {
            return true;
        }
        let (keys, now) = (Arc::clone(&self.told.keys), self.context.clock.unix_ms());
        tokio::task::spawn_blocking(move || keys.handle_key_exchange(policy, now)).await.unwrap_or(false)
    }

    async fn tell(&mut self, old: &DaemonConfig, old_peers: &PeersConfig) {
        let new = &self.config;
        if *new != *old {
            self.told.timing.send_replace(Transports::from(new));
            self.told.readiness.send_replace(new.readiness.clone());
            self.told.level.set(new.observability.log_level);
            if self.told.hub.send(Input::Config(Box::new(new.clone()))).await.is_err() {
                return;
            }
        }
        if self.peers != *old_peers {
            self.replace_diallers();
            if self.told.hub.send(Input::Peers(self.peers())).await.is_err() {
                return;
            }
        }
        match Running::of(&self.config, &self.peers) {
            Ok(running) => {
                let was = self.told.running.send_replace(running.clone());
                self.told.metrics.config(&was.config, &running.config);
                self.told.metrics.config_reload(true);
                tracing::info!(config = running.config, peers = running.peers, "another configuration is running");
            }
            Err(error) => tracing::error!(%error, "the configuration cannot be written down"),
        }
    }

    fn replace_diallers(&mut self) {
        let old = self.places.clone();
        for place in self.places.update(&self.peers.peers) {
            let was = self.dialling.remove(&place);
            if let Some(was) = &was {
                was.retired.cancel();
            }
            let (before, now) = (old.get(place), self.places.get(place).cloned());
            let name = |peer: Option<&Peer>| peer.map(|peer| peer.name.clone());
            let same_peer = name(before) == name(now.as_ref());
            if let Some(before) = before.filter(|_| !same_peer) {
                self.told.metrics.forget_peer(&before.name);
            }
            if let Some(peer) = now {
                // At another address it is still the same peer, with the session that it has.
                let up = was.filter(|_| same_peer).map_or_else(|| watch::channel(false).0, |was| was.up);
                self.dial_as(place, &peer, up);
            }
        }
    }

    fn dial(&mut self, place: usize, peer: &Peer) {
        self.dial_as(place, peer, watch::channel(false).0);
    }

    fn dial_as(&mut self, place: usize, peer: &Peer, up: watch::Sender<bool>) {
        let retired = CancellationToken::new();
        let dialler = Dialler {
            place,
            peer: peer.clone(),
            isolation: Isolation::new(&self.own, &peer.name),
            up: up.subscribe(),
            retired: retired.clone(),
            keys: Arc::clone(&self.told.keys),
            context: self.context.clone(),
        };
        self.diallers.spawn(dialler.run());
        self.dialling.insert(place, Dialling { retired, up });
    }
}

/// A peer that could not be dialled any more with this policy.
fn over_quic(peers: &PeersConfig, policy: KeyExchange) -> Option<&str> {
    let over_quic = |peer: &&Peer| policy != KeyExchange::RequireHybrid && peer.transport == Transport::Quic;
    peers.peers.iter().find(over_quic).map(|peer| peer.name.as_str())
}
