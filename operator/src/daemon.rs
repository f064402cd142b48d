//! Asks a daemon's admin server, for whoever has to know what only it says. Decides nothing.

use std::net::SocketAddr;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// One question on a connection of its own: the daemon closes after its answer. None where
/// nobody answers, or not in HTTP, or with more than `most` bytes: what answers in a pod may be
/// anything. It may take for ever: the caller has the deadline.
pub(crate) async fn get(admin: SocketAddr, path: &str, most: usize) -> Option<(StatusCode, String)> {
    let stream = TcpStream::connect(admin).await.ok()?;
    let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
    let request = Request::get(path).header(HOST, admin.to_string()).body(Empty::<Bytes>::new()).ok()?;
    let answer = async {
        let answer = requests.send_request(request).await.ok()?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), most).collect().await.ok()?.to_bytes();
        Some((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::pin!(answer, connection);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        // Closed: what was answered is here by now.
        _ = &mut connection => answer.await,
    }
}
