//! The lease by which one operator of several leads: taken, renewed every [`RENEW`], and given
//! back on the way out. Decides when it is lost: before anyone else can have it.
//!
//! The lease lasts [`claim::DURATION`] for others, counted from when they saw it renewed; we
//! trust it for [`TRUSTED`] only, counted from before the renewal was sent. What lies between
//! is for writes that are on their way when the gate closes.
//!
//! A lost lease ends the process. All that a leader holds, caches and half-done work, goes with
//! it, and Kubernetes counts and reports the restart; the next start is a standby.

mod claim;
mod gate;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use self::claim::{Observed, Step};
pub(super) use self::gate::{Gate, layer};
use super::admin::Health;
use super::node::explain;
use crate::build::labels;

/// How often a standby looks: a lease that is given back is taken within this.
const LOOK: Duration = Duration::from_secs(1);
/// How often a leader renews.
const RENEW: Duration = Duration::from_secs(2);
/// For so long after a renewal was begun writes are sent.
const TRUSTED: Duration = Duration::from_secs(10);
/// For one attempt: several fit into [`TRUSTED`].
const ATTEMPT: Duration = Duration::from_secs(3);

/// Why the lease is no longer ours.
#[derive(Debug, thiserror::Error)]
pub enum LeaseLost {
    /// Another operator holds it.
    #[error("{0} took it")]
    Taken(String),
    /// The API server did not take a renewal in time.
    #[error("it could not be renewed in time: {0}")]
    Unrenewed(String),
}

/// A candidate for the lease, or its holder.
pub(super) struct Candidate {
    api: Api<Lease>,
    name: String,
    identity: String,
    gate: Arc<Gate>,
    observed: Observed,
    /// The Lease as we last wrote it.
    held: Option<Lease>,
    /// Until when others leave it to us.
    trusted_until: Option<Instant>,
}

impl Candidate {
    /// For the Lease `name` in `namespace`. `client` is not behind the gate.
    #[must_use]
    pub(super) fn new(client: Client, namespace: &str, name: String, pod: &str, gate: Arc<Gate>) -> Self {
        // A pod's container that starts again is another candidate: it knows nothing of the last.
        let unique = RandomState::new().build_hasher().finish();
        Self {
            api: Api::namespaced(client, namespace),
            name,
            identity: format!("{pod}_{unique:016x}"),
            gate,
            observed: Observed::default(),
            held: None,
            trusted_until: None,
        }
    }

    /// As the Lease names it.
    #[must_use]
    pub(super) fn identity(&self) -> &str {
        &self.identity
    }

    /// Stands by until the lease is ours, and opens the gate.
    pub(super) async fn acquire(&mut self, health: &Health) {
        let mut last = None;
        loop {
            match self.attempt().await {
                Ok(true) => return,
                Ok(false) => {
                    health.handle_lease(true);
                    last = None;
                }
                Err(error) => {
                    health.handle_lease(false);
                    if last.as_ref() != Some(&error) {
                        tracing::warn!(
                            lease = self.name,
                            "the lease cannot be read or taken, it is tried again: {error}"
                        );
                    }
                    last = Some(error);
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Renews until the lease is lost, and closes the gate.
    pub(super) async fn keep(&mut self) -> LeaseLost {
        let mut last = "no answer".to_owned();
        loop {
            let until = self.trusted_until.unwrap_or_else(Instant::now);
            sleep(RENEW).await;
            match timeout_at(until, self.attempt()).await {
                Ok(Ok(true)) => continue,
                Ok(Ok(false)) => {
                    if let Some(lost) = self.taken().await {
                        self.gate.close();
                        return lost;
                    }
                }
                Ok(Err(error)) => {
                    tracing::warn!(lease = self.name, "the lease is not renewed, it is tried again: {error}");
                    last = error;
                }
                Err(_) => {}
            }
            if Instant::now() >= until {
                self.gate.close();
                return LeaseLost::Unrenewed(last);
            }
        }
    }

    /// Gives it back, so that another need not wait. Best effort: it runs out by itself.
    pub(super) async fn release(&mut self) {
        self.gate.close();
        if self.trusted_until.is_none() {
            return;
        }
        match timeout(ATTEMPT, self.try_release()).await {
            Ok(Ok(true)) => tracing::info!(lease = self.name, identity = self.identity, "released the lease"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(lease = self.name, "the lease is not released: {}", explain(&error)),
            Err(_) => tracing::warn!(lease = self.name, "the lease is not released: no answer"),
        }
    }

    /// Read first: a renewal may have been under way, whose answer was not waited for.
    async fn try_release(&self) -> Result<bool, kube::Error> {
        let Some(live) = self.api.get_opt(&self.name).await? else { return Ok(false) };
        let holder = live.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        if holder != Some(&self.identity) {
            return Ok(false);
        }
        let lease = claim::released(&live, Timestamp::now());
        self.api.replace(&self.name, &params(), &lease).await.map(|_| true)
    }

    /// Whether the lease is ours now.
    async fn attempt(&mut self) -> Result<bool, String> {
        match timeout(ATTEMPT, self.try_once()).await {
            Ok(Ok(ours)) => Ok(ours),
            Ok(Err(error)) => Err(explain(&error)),
            Err(_) => Err(format!("no answer within {} s", ATTEMPT.as_secs())),
        }
    }

    async fn try_once(&mut self) -> Result<bool, kube::Error> {
        let started = Instant::now();
        // What we wrote last is good to renew on; only if it is no longer what stands is it read.
        let live = match self.held.take() {
            Some(held) => Some(held),
            None => self.api.get_opt(&self.name).await?,
        };
        let lease = claim::held(live.as_ref(), &self.name, &self.identity, Timestamp::now());
        let written = match self.observed.step(live.as_ref(), &self.identity, started) {
            Step::Wait => return Ok(false),
            Step::Create => self.api.create(&params(), &lease).await,
            Step::Take | Step::Renew => self.api.replace(&self.name, &params(), &lease).await,
        };
        match written {
            Ok(lease) => {
                self.held = Some(lease);
                let until = started + TRUSTED;
                self.trusted_until = Some(until);
                self.gate.open_until(until);
                Ok(true)
            }
            // Somebody was faster.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whose it is now, if not ours.
    async fn taken(&self) -> Option<LeaseLost> {
        let live = timeout(ATTEMPT, self.api.get_opt(&self.name)).await.ok()?.ok()?;
        let holder = live?.spec?.holder_identity.filter(|holder| !holder.is_empty())?;
        (holder != self.identity).then_some(LeaseLost::Taken(holder))
    }
}

fn params() -> PostParams {
    PostParams { field_manager: Some(labels::OPERATOR.to_owned()), ..Default::default() }
}
