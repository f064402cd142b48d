//! Accept loops: TCP with TLS, QUIC, and the Unix socket. Each owns the tasks of the connections it
//! accepted. Who may stay is decided by the handshake and the hub.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use overlay_core::Millis;
use overlay_core::status::Reason;
use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::kms::{KeySet, Keys};
use crate::metrics::Metrics;
use crate::session::Context;
use crate::transport::{
    AcceptError, Accepted, Connection, HandshakeError, Listener, LocalListener, QuicAccepted, QuicListener,
};

/// When an accept loop stops.
#[derive(Clone)]
pub struct Stop {
    /// No new connections.
    pub accepting: CancellationToken,
    /// No connections at all.
    pub all: CancellationToken,
}

/// How accepting goes, all listeners together.
#[derive(Clone, Debug)]
pub struct Health {
    /// When it last failed; far ahead where it never did.
    failed_at: Arc<AtomicU64>,
}

impl Default for Health {
    fn default() -> Self {
        Self { failed_at: Arc::new(AtomicU64::new(u64::MAX)) }
    }
}

impl Health {
    /// How long after a failure listeners count as failing: longer than the pause after it, so
    /// that it does not flicker, and short enough to recover within two seconds (S3).
    const FAILING_MS: u64 = 1_000;

    /// Accepting failed for want of what the system gives.
    pub fn failed(&self, now: Millis) {
        self.failed_at.store(now.0, Ordering::Relaxed);
    }

    /// Whether it has not failed of late.
    #[must_use]
    pub fn is_good(&self, now: Millis) -> bool {
        let at = self.failed_at.load(Ordering::Relaxed);
        at == u64::MAX || now.since(Millis(at)) >= Self::FAILING_MS
    }
}

/// Accepts TLS sessions until told to stop; then waits for those that run. It and the handshakes
/// run where it is spawned, and sessions on `sessions_on`: what costs the daemon something before
/// anybody has shown who they are is not in the way of those who have (H).
pub async fn tls(
    listener: Listener,
    keys: Arc<Keys>,
    context: Context,
    health: Health,
    stop: Stop,
    sessions_on: Handle,
) {
    let mut listener = Some(listener);
    let (mut handshakes, mut sessions) = (JoinSet::new(), JoinSet::new());
    while listener.is_some() || !handshakes.is_empty() || !sessions.is_empty() {
        tokio::select! {
            () = stop.all.cancelled() => {
                handshakes.shutdown().await;
                sessions.shutdown().await;
                return;
            }
            () = stop.accepting.cancelled(), if listener.is_some() => drop(listener.take()),
            Some(ended) = sessions.join_next() => count_panic(&context.metrics, &ended),
            Some(shaken) = handshakes.join_next() => match shaken {
                Ok((shaken, address, bundle)) => {
                    sessions.spawn_on(serve(shaken, address, bundle, context.clone()), &sessions_on);
                }
                Err(_) => count_panic(&context.metrics, &shaken),
            },
            accepted = next(&mut listener) => match accepted {
                Ok(accepted) => { handshakes.spawn(shake(accepted, keys.current())); }
                Err(error) => {
                    tracing::debug!(%error, "accepting failed");
                    match &error {
                        AcceptError::Crowded => context.metrics.rejected(Reason::Overflow).inc(),
                        AcceptError::Failed(_) => context.metrics.accept_error(),
                    }
                    if error.is_failure() {
                        health.failed(context.clock.now());
                    }
                }
            },
        }
    }
}

async fn next(listener: &mut Option<Listener>) -> Result<Accepted, AcceptError> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

/// What came of a handshake, with whom, by which authorities. Not the keys themselves: they would
/// stay for as long as the session does, replaced or not.
type Shaken = (Result<Connection, HandshakeError>, SocketAddr, blake3::Hash);

async fn shake(accepted: Accepted, current: Arc<KeySet>) -> Shaken {
    let address = accepted.address();
    (accepted.handshake(&current).await, address, current.bundle())
}

async fn serve(
    shaken: Result<Connection, HandshakeError>,
    address: SocketAddr,
    bundle: blake3::Hash,
    context: Context,
) {
    // Its socket is from now on looked after where the session runs.
    let shaken = shaken.and_then(|mut connection| connection.stream.settle().map(|()| connection).map_err(Into::into));
    hold(shaken, address, bundle, &context).await;
}

/// Accepts QUIC sessions, as [`tls`] does, until told to stop; from then on who calls is told so
/// at once (`CONNECTION_REFUSED`, RFC 9000, section 20.1), as a closed port does it for TCP, to the
/// daemon's end. Also ends where the socket has failed for good.
pub async fn quic(mut listener: QuicListener, keys: Arc<Keys>, context: Context, stop: Stop, sessions_on: Handle) {
    let (mut handshakes, mut sessions) = (JoinSet::new(), JoinSet::new());
    loop {
        tokio::select! {
            () = stop.all.cancelled() => break,
            Some(ended) = sessions.join_next() => count_panic(&context.metrics, &ended),
            Some(shaken) = handshakes.join_next() => match shaken {
                Ok((shaken, address, bundle)) => {
                    let context = context.clone();
                    sessions.spawn_on(async move { hold(shaken, address, bundle, &context).await }, &sessions_on);
                }
                Err(_) => count_panic(&context.metrics, &shaken),
            },
            accepted = listener.accept() => match accepted {
                Some(accepted) if stop.accepting.is_cancelled() => accepted.refuse(),
                Some(accepted) => { handshakes.spawn(shake_quic(accepted, keys.current())); }
                None => return,
            },
        }
    }
    handshakes.shutdown().await;
    sessions.shutdown().await;
    listener.finish().await;
}

async fn shake_quic(accepted: QuicAccepted, current: Arc<KeySet>) -> Shaken {
    let address = accepted.address();
    (accepted.handshake(&current).await, address, current.bundle())
}

async fn hold(
    shaken: Result<Connection, HandshakeError>,
    address: SocketAddr,
    bundle: blake3::Hash,
    context: &Context,
) {
    match shaken {
        Ok(connection) => {
            context.metrics.key_exchange(connection.group);
            context.hold(connection, None, bundle).await;
        }
        Err(error) => {
            // Debug: whoever can connect could otherwise fill the log.
            tracing::debug!(%address, %error, "handshake refused");
            if let Some(reason) = error.reason() {
                context.metrics.rejected(reason).inc();
            }
        }
    }
}

/// Accepts sessions of local processes until told to stop; then waits for those that run.
pub async fn local(mut listener: LocalListener, context: Context, health: Health, stop: Stop) {
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.accepting.cancelled() => break,
            Some(ended) = sessions.join_next() => count_panic(&context.metrics, &ended),
            accepted = listener.accept() => match accepted {
                Ok(connection) => {
                    let context = context.clone();
                    sessions.spawn(async move {
                        context.hold_local(connection).await;
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "accepting on the Unix socket failed");
                    match error.reason() {
                        Some(reason) => context.metrics.rejected(reason).inc(),
                        None => context.metrics.accept_error(),
                    }
                    if error.is_failure() {
                        health.failed(context.clock.now());
                    }
                }
            },
        }
    }
    drop(listener);
    finish(sessions, &stop.all).await;
}

/// A session that panicked ended alone (S6).
fn count_panic<T>(metrics: &Metrics, ended: &Result<T, JoinError>) {
    if ended.as_ref().is_err_and(JoinError::is_panic) {
        metrics.session_panic();
    }
}

async fn finish(mut sessions: JoinSet<()>, all: &CancellationToken) {
    tokio::select! {
        () = all.cancelled() => sessions.shutdown().await,
        () = async { while sessions.join_next().await.is_some() {} } => {}
    }
}

#[cfg(test)]
mod tests {
    use overlay_core::config::KeyExchange;
    use tokio::sync::mpsc;

    use super::*;
    use crate::clock::Clock;
    use crate::kms::authority::Authority;
    use crate::transport::tests::{CONFIG, keys};
    use crate::transport::{Endpoints, dial_quic};

    /// Who calls over QUIC while the daemon drains is told at once, also when no session over QUIC
    /// is left, as a closed port tells over TCP.
    #[tokio::test]
    async fn who_calls_a_daemon_that_drains_is_refused() {
        let (clock, keys) = (Clock::start(), Arc::new(keys(&Authority::new(), KeyExchange::RequireHybrid)));
        let current = keys.current();
        let any = "127.0.0.1:0".parse().unwrap();
        let listener = QuicListener::bind(any, current.quic().unwrap(), CONFIG, clock).unwrap();
        let (address, endpoints) = (listener.local_addr().unwrap().to_string(), Endpoints::default());
        let (hub, sent) = (mpsc::channel(1).0, mpsc::channel(1).0);
        let metrics = Arc::new(Metrics::new(true, "").unwrap());
        let context = Context::new(hub, sent, keys.verifier(), CONFIG.into(), clock, metrics);
        let stop = Stop { accepting: CancellationToken::new(), all: CancellationToken::new() };
        stop.accepting.cancel();
        let calls = async {
            let refused = dial_quic(&address, &current, &CONFIG, clock, &endpoints).await.unwrap_err();
            stop.all.cancel();
            refused.to_string()
        };
        let accepts = quic(listener, Arc::clone(&keys), context, stop.clone(), Handle::current());
        let ((), refused) = tokio::join!(accepts, calls);
        assert!(refused.contains("refused"), "{refused}");
    }
}
