//! Serves HTTP to whoever asks, within bounds: connections at once, and the time and the bytes
//! of a request's head. Decides nothing about what is served.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// Connections at once. Past it the oldest is closed: a probe is answered within milliseconds,
/// so that the oldest is never one.
const MAX_CONNECTIONS: usize = 128;
/// From a connection's first moment to the end of its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// From a connection's first moment to the end of its answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Headers of a request; one more is 431.
const MAX_HEADERS: usize = 64;
/// Bytes of a request's head; more is 431.
const MAX_HEAD: usize = 16 * 1_024;
/// After an accept that failed: descriptors are short, and more of the same does not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until cancelled; open connections end with it.
pub(super) async fn serve(listener: TcpListener, router: Router, cancel: CancellationToken) {
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
            Err(error) => {
                tracing::warn!(%error, "the admin server cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
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

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn exchange(address: std::net::SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // A refused request may be reset once its refusal is read.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    /// I-10: a connection that says nothing costs nobody else anything.
    #[tokio::test]
    async fn idle_connections_make_way() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cancel = CancellationToken::new();
        let mut server = JoinSet::new();
        server.spawn(serve(listener, Router::new().route("/", get(async || "here")), cancel.clone()));
        let mut idle = Vec::new();
        for _ in 0..MAX_CONNECTIONS + 1 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        assert!(exchange(address, request).await.ends_with("here"));
        let closed = tokio::time::timeout(HEAD_TIMEOUT / 2, idle[0].read(&mut [0])).await;
        assert!(matches!(closed.unwrap(), Ok(0) | Err(_)), "the oldest made way");
        let headers: String = (0..=MAX_HEADERS).map(|n| format!("h{n}: v\r\n")).collect();
        let answer = exchange(address, &format!("GET / HTTP/1.1\r\n{headers}\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
        cancel.cancel();
        server.join_all().await;
    }
}
