//! The operator's HTTP: `/metrics`, `/healthz`, `/readyz`, `/version`, nothing else. Decides
//! what ready means for the operator; reports, and changes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::time::Instant;

use super::metrics::Metrics;
use super::watch::LAST_RETRY;

/// For so long after its last error a watch that has shown no object since counts as broken:
/// well beyond [`LAST_RETRY`], so that a watch which keeps failing never looks well in between.
const BROKEN_FOR: Duration = LAST_RETRY.saturating_mul(3);

/// What the operator watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    OverlayNode,
    StatefulSet,
    ConfigMap,
    Service,
    ServiceAccount,
}

impl Watch {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::OverlayNode, Self::StatefulSet, Self::ConfigMap, Self::Service, Self::ServiceAccount];
}

/// What an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Waits for the lease.
    Standby,
    /// Reconciles.
    Leader,
}

impl Role {
    /// As `/readyz` has it.
    #[must_use]
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Leader => "leader",
        }
    }
}

/// Whether the operator does its part: a leader watches, a standby can take over. Times are milliseconds since the operator started.
pub(super) struct Health {
    started: Instant,
    watches: [WatchState; Watch::ALL.len()],
    role: AtomicU8,
    /// A standby could read the lease when it last tried.
    lease_read: AtomicBool,
    stopping: AtomicBool,
}

#[derive(Default)]
struct WatchState {
    synced: AtomicBool,
    /// 0: none since the last object.
    failed_at: AtomicU64,
}

impl Health {
    /// A standby that has read nothing yet.
    #[must_use]
    pub(super) fn new(now: Instant) -> Self {
        Self {
            started: now,
            watches: Default::default(),
            role: AtomicU8::new(Role::Standby as u8),
            lease_read: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }
    }

    /// It leads from now on, to its end.
    pub(super) fn handle_leading(&self) {
        self.role.store(Role::Leader as u8, Ordering::Release);
    }

    /// A standby looked at the lease, and could or could not read it.
    pub(super) fn handle_lease(&self, read: bool) {
        self.lease_read.store(read, Ordering::Release);
    }

    /// What it does now.
    #[must_use]
    pub(super) fn role(&self) -> Role {
        if self.role.load(Ordering::Acquire) == Role::Leader as u8 { Role::Leader } else { Role::Standby }
    }

    /// The cache of `watch` holds what the API server has.
    pub(super) fn handle_synced(&self, watch: Watch) {
        self.watches[watch as usize].synced.store(true, Ordering::Release);
    }

    /// `watch` showed an object.
    pub(super) fn handle_event(&self, watch: Watch) {
        self.watches[watch as usize].failed_at.store(0, Ordering::Release);
    }

    /// `watch` broke off.
    pub(super) fn handle_error(&self, watch: Watch, now: Instant) {
        self.watches[watch as usize].failed_at.store(self.millis(now).max(1), Ordering::Release);
    }

    /// SIGTERM came.
    pub(super) fn handle_stopping(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// What is missing; ready when empty.
    #[must_use]
    pub(super) fn missing(&self, now: Instant) -> Vec<String> {
        let mut missing = match self.role() {
            Role::Leader => self.missing_watches(now),
            Role::Standby if self.lease_read.load(Ordering::Acquire) => Vec::new(),
            Role::Standby => vec!["lease: cannot be read".to_owned()],
        };
        if self.stopping.load(Ordering::Acquire) {
            missing.push("stopping".to_owned());
        }
        missing
    }

    fn missing_watches(&self, now: Instant) -> Vec<String> {
        let now = self.millis(now);
        let broken = u64::try_from(BROKEN_FOR.as_millis()).unwrap_or(u64::MAX);
        let missing = Watch::ALL.into_iter().filter_map(|watch| {
            let state = &self.watches[watch as usize];
            let failed_at = state.failed_at.load(Ordering::Acquire);
            if !state.synced.load(Ordering::Acquire) {
                Some(format!("watch {watch:?}: not synced yet"))
            } else if failed_at != 0 && now.saturating_sub(failed_at) < broken {
                Some(format!("watch {watch:?}: broken off"))
            } else {
                None
            }
        });
        missing.collect()
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }
}

/// What the routes show.
#[derive(Clone)]
pub(super) struct Shown {
    /// For `/readyz`.
    pub health: Arc<Health>,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
}

/// The routes.
pub(super) fn router(shown: Shown) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route(
            "/version",
            get(async || Json(json!({"name": "overlay-operator", "version": env!("CARGO_PKG_VERSION")}))),
        )
        .with_state(shown)
}

async fn metrics(State(shown): State<Shown>) -> impl IntoResponse {
    match shown.metrics.encode() {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
            error.to_string(),
        ),
    }
}

async fn readyz(State(shown): State<Shown>) -> impl IntoResponse {
    let missing = shown.health.missing(Instant::now());
    let role = shown.health.role().as_str();
    if missing.is_empty() {
        return (StatusCode::OK, Json(json!({"ready": true, "role": role})));
    }
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"ready": false, "role": role, "missing": missing})))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// I-6: ready takes every watch, and is lost with one.
    #[test]
    fn ready_is_what_the_watches_say() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let health = Health::new(start);
        assert_eq!(health.missing(at(0)), ["lease: cannot be read"]);
        health.handle_lease(true);
        assert_eq!((health.missing(at(0)), health.role()), (Vec::new(), Role::Standby), "ready to take over");
        health.handle_leading();
        assert_eq!((health.missing(at(0)).len(), health.role()), (Watch::ALL.len(), Role::Leader));
        for watch in Watch::ALL {
            health.handle_synced(watch);
        }
        assert!(health.missing(at(1)).is_empty());
        health.handle_error(Watch::Service, at(2));
        assert_eq!(health.missing(at(31)), ["watch Service: broken off"]);
        assert!(health.missing(at(32)).is_empty(), "quiet for so long: it was resumed");
        health.handle_error(Watch::Service, at(70));
        health.handle_event(Watch::Service);
        assert!(health.missing(at(71)).is_empty());
        health.handle_stopping();
        assert_eq!(health.missing(at(72)), ["stopping"]);
    }
}
