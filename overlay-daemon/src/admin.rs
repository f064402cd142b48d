//! Admin HTTP: `/metrics`, `/healthz`, `/readyz`, `/version`, and nothing else (I-10). Shows
//! what others decided; takes no command.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use overlay_core::readiness::Report;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::metrics::{Metrics, Route, TEXT_FORMAT};
use crate::reload::Running;
use crate::transport::EXHAUSTED_PAUSE;

/// Connections at once. Past it the oldest is closed: a probe is answered within
/// milliseconds, so that the oldest is never one. Fewer than the descriptors that are kept for
/// them ([`crate::transport::Descriptors`]).
const MAX_CONNECTIONS: usize = 48;
/// From a connection's first moment to the end of its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// From a connection's first moment to the end of its answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Headers of a request; one more is 431.
const MAX_HEADERS: usize = 64;
/// Bytes of a request's head; more is 431.
const MAX_HEAD: usize = 16 * 1_024;
/// Seconds after which a caller of `/readyz` may look again.
const RETRY_AFTER_SECONDS: &str = "1";

/// What the admin endpoint shows.
pub struct Admin {
    /// Served on `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Served on `/readyz`. Once its sender is gone, nobody vouches for readiness: 503.
    pub report: watch::Receiver<Report>,
    /// Which configuration is running.
    pub running: watch::Receiver<Running>,
    /// Times the answers.
    pub clock: Clock,
}

/// The commit that this was built from, where the build says so.
#[must_use]
pub fn commit() -> Option<&'static str> {
    option_env!("OVERLAY_COMMIT").filter(|commit| !commit.is_empty())
}

#[derive(Serialize)]
struct Version {
    name: &'static str,
    version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<&'static str>,
}

#[derive(Serialize)]
struct Readyz<'a> {
    ready: bool,
    config: &'a str,
    peers: &'a str,
    conditions: Vec<ConditionBody<'a>>,
}

#[derive(Serialize)]
struct ConditionBody<'a> {
    name: &'a str,
    ok: bool,
    reason: &'a str,
    since_ms: u64,
}

/// Binds the admin endpoint.
///
/// # Errors
/// The system refuses the address.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until cancelled; open connections then end with it.
pub async fn serve(listener: TcpListener, admin: Admin, cancel: CancellationToken) {
    let admin = Arc::new(admin);
    let router = router(Arc::clone(&admin));
    let mut connections = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            // Keeps no result of a connection that is over.
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(_) => {
                admin.metrics.accept_error();
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
                continue;
            }
        };
        oldest_first.retain(|connection| !connection.is_finished());
        while oldest_first.len() >= MAX_CONNECTIONS {
            oldest_first.pop_front().inspect(AbortHandle::abort);
        }
        oldest_first.push_back(connections.spawn(connection(stream, router.clone())));
    }
    connections.shutdown().await;
}

/// One request and its answer.
async fn connection(stream: TcpStream, router: Router) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // Whoever asked has its answer or has gone; neither is worth a log line.
    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, served).await;
}

fn router(admin: Arc<Admin>) -> Router {
    let timed = |route| from_fn_with_state((Arc::clone(&admin), route), time);
    Router::new()
        .route("/metrics", get(metrics).layer(timed(Route::AdminMetrics)))
        .route("/healthz", get(healthz).layer(timed(Route::AdminHealthz)))
        .route("/readyz", get(readyz).layer(timed(Route::AdminReadyz)))
        .route("/version", get(version).layer(timed(Route::AdminVersion)))
        .with_state(admin)
}

async fn time(State((admin, route)): State<(Arc<Admin>, Route)>, request: Request, next: Next) -> Response {
    let from = admin.clock.stamp();
    let mut response = next.run(request).await;
    admin.metrics.latency(route).observe(from.elapsed().as_secs_f64());
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    match admin.metrics.render() {
        Ok(text) => ([(CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Alive means that this answers; whether the daemon is of use is `/readyz`'s to say.
async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    let abandoned = admin.report.has_changed().is_err();
    let report = admin.report.borrow().clone();
    let mut conditions: Vec<ConditionBody<'_>> = report
        .conditions
        .iter()
        .map(|condition| ConditionBody {
            name: condition.name,
            ok: condition.ok,
            reason: &condition.reason,
            since_ms: condition.since_ms,
        })
        .collect();
    if abandoned {
        conditions.retain(|condition| condition.name != "bus");
        let since_ms = admin.clock.unix_ms();
        conditions.push(ConditionBody { name: "bus", ok: false, reason: "the hub has stopped", since_ms });
    }
    let ready = report.ready && !abandoned;
    let running = admin.running.borrow().clone();
    let body = Json(Readyz { ready, config: &running.config, peers: &running.peers, conditions });
    if ready {
        body.into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, RETRY_AFTER_SECONDS)], body).into_response()
    }
}

async fn version() -> Json<Version> {
    Json(Version { name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION"), commit: commit() })
}

#[cfg(test)]
mod tests;
