//! Accept loops: TCP with TLS, QUIC, and the Unix socket. Each owns the tasks of the connections it
//! accepted. Who may stay is decided by the handshake and the hub.

use std::future::{pending, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use overlay_core::Millis;
use overlay_core::status::Reason;
use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
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

/// What came of a handshake, with whom, by which authorities. Not the keys themselves: they would
/// stay for as long as the session does, replaced or not.
type Shaken = (Result<Connection, HandshakeError>, SocketAddr, blake3::Hash);

/// What an accept loop has begun: handshakes, which run where it does, and sessions. What costs
/// the daemon something before anybody has shown who they are is not in the way of those who
/// have (H).
struct Callers {
    handshakes: JoinSet<Shaken>,
    sessions: JoinSet<()>,
    sessions_on: Handle,
    context: Context,
}

impl Callers {
    fn new(context: Context, sessions_on: Handle) -> Self {
        Self { handshakes: JoinSet::new(), sessions: JoinSet::new(), sessions_on, context }
    }

    fn is_empty(&self) -> bool {
        self.handshakes.is_empty() && self.sessions.is_empty()
    }

    /// Makes a session of a handshake that has ended, or sees a session off; waits for one of the
    /// two. Cancellation loses none.
    async fn next(&mut self) {
        let Self { handshakes, sessions, sessions_on, context } = self;
        tokio::select! {
            Some(ended) = sessions.join_next() => count_panic(&context.metrics, &ended),
            Some(shaken) = handshakes.join_next() => match shaken {
                Ok((Ok(connection), address, bundle)) => {
                    sessions.spawn_on(hold(connection, address, bundle, context.clone()), sessions_on);
                }
                Ok((Err(error), address, _)) => refused(&error, address, &context.metrics),
                Err(_) => count_panic(&context.metrics, &shaken),
            },
            else => pending().await,
        }
    }

    async fn shutdown(mut self) {
        self.handshakes.shutdown().await;
        self.sessions.shutdown().await;
    }
}

/// Accepts TLS sessions until told to stop; then waits for those that run. Sessions run on
/// `sessions_on`, the rest where it is spawned.
pub async fn tls(
    listener: Listener,
    keys: Arc<Keys>,
    context: Context,
    health: Health,
    stop: Stop,
    sessions_on: Handle,
) {
    let mut listener = Some(listener);
    let mut callers = Callers::new(context, sessions_on);
    while listener.is_some() || !callers.is_empty() {
        tokio::select! {
            () = stop.all.cancelled() => break,
            () = stop.accepting.cancelled(), if listener.is_some() => drop(listener.take()),
            () = callers.next() => {}
            accepted = next(&mut listener) => match accepted {
                Ok(accepted) => { callers.handshakes.spawn(in_steps(shake(accepted, keys.current()), callers.context.clock)); }
                Err(error) => {
                    tracing::debug!(%error, "accepting failed");
                    let Context { metrics, clock, .. } = &callers.context;
                    match &error {
                        AcceptError::Crowded => metrics.rejected(Reason::Overflow).inc(),
                        AcceptError::Failed(_) => metrics.accept_error(),
                    }
                    if error.is_failure() {
                        health.failed(clock.now());
                    }
                }
            },
        }
    }
    callers.shutdown().await;
}

/// A poll that took longer has computed for a handshake, and not just read a few bytes.
const COSTLY: Duration = Duration::from_micros(50);

/// Runs a handshake, and offers the processor to other threads after each [costly](COSTLY) poll
/// (sched_yield(2)). Niceness decides how often a thread is chosen, not for how long: under Linux's
/// EEVDF it then runs for milliseconds, which is several handshakes, and a session that it preempted
/// waits for all of them (S4's H). Not after every poll: callers who send byte by byte (T1) would
/// have everybody's handshakes wait for each byte. Not over QUIC: [`crate::runtime`].
async fn in_steps<F: Future>(handshake: F, clock: Clock) -> F::Output {
    let mut handshake = pin!(handshake);
    poll_fn(|context| {
        let began = clock.stamp();
        let polled = handshake.as_mut().poll(context);
        if began.elapsed() > COSTLY {
            thread::yield_now();
        }
        polled
    })
    .await
}

async fn next(listener: &mut Option<Listener>) -> Result<Accepted, AcceptError> {
    match listener {
        Some(listener) => listener.accept().await,
        None => pending().await,
    }
}

async fn shake(accepted: Accepted, current: Arc<KeySet>) -> Shaken {
    let address = accepted.address();
    (accepted.handshake(&current).await, address, current.bundle())
}

/// Accepts QUIC sessions, as [`tls`] does, until told to stop; from then on who calls is told so
/// (`CONNECTION_REFUSED`, RFC 9000, section 20.1), as a closed port does it for TCP, to the
/// daemon's end. Also ends where the socket has failed for good.
pub async fn quic(mut listener: QuicListener, keys: Arc<Keys>, context: Context, stop: Stop, sessions_on: Handle) {
    let mut callers = Callers::new(context, sessions_on);
    loop {
        tokio::select! {
            () = stop.all.cancelled() => break,
            () = callers.next() => {}
            accepted = listener.accept() => match accepted {
                Some(accepted) if stop.accepting.is_cancelled() => accepted.refuse(),
                Some(accepted) => { callers.handshakes.spawn(shake_quic(accepted, keys.current())); }
                None => return,
            },
        }
    }
    callers.shutdown().await;
    listener.finish().await;
}

async fn shake_quic(accepted: QuicAccepted, current: Arc<KeySet>) -> Shaken {
    let address = accepted.address();
    (accepted.handshake(&current).await, address, current.bundle())
}

async fn hold(mut connection: Connection, address: SocketAddr, bundle: blake3::Hash, context: Context) {
    // Its socket is from now on looked after where the session runs.
    if let Err(error) = connection.stream.settle() {
        return refused(&error.into(), address, &context.metrics);
    }
    context.metrics.key_exchange(connection.group);
    context.hold(connection, None, bundle).await;
}

fn refused(error: &HandshakeError, address: SocketAddr, metrics: &Metrics) {
    // Debug: whoever can connect could otherwise fill the log.
    tracing::debug!(%address, %error, "handshake refused");
    if let Some(reason) = error.reason() {
        metrics.rejected(reason).inc();
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
    use crate::transport::{DialError, Endpoints, dial_quic};

    const ANY: &str = "127.0.0.1:0";

    /// An accept loop over QUIC, and somebody who calls it.
    struct Quic {
        keys: Arc<Keys>,
        clock: Clock,
        stop: Stop,
    }

    impl Quic {
        fn new() -> Self {
            let keys = Arc::new(keys(&Authority::new(), KeyExchange::RequireHybrid));
            let stop = Stop { accepting: CancellationToken::new(), all: CancellationToken::new() };
            Self { keys, clock: Clock::start(), stop }
        }

        /// What came of one call.
        async fn call(&self, sessions_on: Handle) -> Result<(), DialError> {
            let (current, clock) = (self.keys.current(), self.clock);
            let listener = QuicListener::bind(ANY.parse().unwrap(), current.quic().unwrap(), CONFIG, clock).unwrap();
            let (address, endpoints) = (listener.local_addr().unwrap().to_string(), Endpoints::default());
            let (hub, sent) = (mpsc::channel(1).0, mpsc::channel(1).0);
            let metrics = Arc::new(Metrics::new(true, "").unwrap());
            let context = Context::new(hub, sent, self.keys.verifier(), CONFIG.into(), clock, metrics);
            tokio::select! {
                called = dial_quic(&address, &current, &CONFIG, clock, &endpoints) => called.map(drop),
                () = quic(listener, Arc::clone(&self.keys), context, self.stop.clone(), sessions_on) => {
                    panic!("it accepts no more");
                }
            }
        }
    }

    /// A handshake over QUIC takes nothing of the threads of sessions.
    #[tokio::test]
    async fn handshakes_over_quic_do_without_the_sessions_threads() {
        let nobody_runs_it = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let called = Quic::new().call(nobody_runs_it.handle().clone()).await;
        nobody_runs_it.shutdown_background();
        called.unwrap();
    }

    /// Who calls over QUIC while the daemon drains is told, also when no session over QUIC is left,
    /// as a closed port tells over TCP.
    #[tokio::test]
    async fn who_calls_a_daemon_that_drains_is_refused() {
        let daemon = Quic::new();
        daemon.stop.accepting.cancel();
        let refused = daemon.call(Handle::current()).await.unwrap_err().to_string();
        assert!(refused.contains("refused"), "{refused}");
    }
}
