//! Accept loops: TCP with TLS, and the Unix socket. Each owns the tasks of the connections it
//! accepted. Who may stay is decided by the handshake and the hub.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::kms::Keys;
use crate::session::Context;
use crate::transport::{Accepted, Listener, LocalListener};

/// When an accept loop stops.
#[derive(Clone)]
pub struct Stop {
    /// No new connections.
    pub accepting: CancellationToken,
    /// No connections at all.
    pub all: CancellationToken,
}

/// Accepts TLS sessions until told to stop; then waits for those that run.
pub async fn tls(mut listener: Listener, keys: Arc<Keys>, context: Context, stop: Stop) {
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.accepting.cancelled() => break,
            Some(_) = sessions.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok(accepted) => { sessions.spawn(serve(accepted, Arc::clone(&keys), context.clone())); }
                Err(error) => {
                    context.metrics.accept_error();
                    tracing::debug!(%error, "accepting failed");
                }
            },
        }
    }
    drop(listener);
    finish(sessions, &stop.all).await;
}

async fn serve(accepted: Accepted, keys: Arc<Keys>, context: Context) {
    let address = accepted.address();
    let current = keys.current();
    match accepted.handshake(&current).await {
        Ok(connection) => {
            context.metrics.key_exchange(connection.group);
            context.hold(connection, None, current.bundle()).await;
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
pub async fn local(mut listener: LocalListener, context: Context, stop: Stop) {
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.accepting.cancelled() => break,
            Some(_) = sessions.join_next() => {}
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
                }
            },
        }
    }
    drop(listener);
    finish(sessions, &stop.all).await;
}

async fn finish(mut sessions: JoinSet<()>, all: &CancellationToken) {
    tokio::select! {
        () = all.cancelled() => sessions.shutdown().await,
        () = async { while sessions.join_next().await.is_some() {} } => {}
    }
}
