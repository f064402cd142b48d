//! Asks a daemon's admin address how it is, as a kubelet does: `/readyz`, and `/metrics` for
//! the number of its sessions. What an answer means for the run is `supervise`'s.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::StatusCode;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::supervise::{Missing, Probe};
use crate::daemon::get;

/// Between two questions while a daemon is not ready.
const WHILE_STARTING: Duration = Duration::from_millis(200);
/// Between two questions once it is.
const WHILE_READY: Duration = Duration::from_secs(1);
/// For both answers.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Bytes of one answer.
const MAX_ANSWER: usize = 4 << 20;
/// Missing conditions that are told.
const MAX_MISSING: usize = 16;
/// The gauge of open sessions.
const SESSIONS: &str = "overlay_sessions_active";

/// Asks for ever; whoever owns the task ends it.
pub(super) async fn watch(daemon: usize, admin: SocketAddr, answers: mpsc::Sender<(usize, Probe)>) {
    loop {
        let probe = timeout(ANSWER_WITHIN, ask(admin)).await.ok().flatten().unwrap_or(Probe::Unreachable);
        let pause = if matches!(probe, Probe::Ready { .. }) { WHILE_READY } else { WHILE_STARTING };
        if answers.send((daemon, probe)).await.is_err() {
            return;
        }
        sleep(pause).await;
    }
}

/// `None` if nobody answers, or not in HTTP.
async fn ask(admin: SocketAddr) -> Option<Probe> {
    let (status, readyz) = get(admin, "/readyz", MAX_ANSWER).await?;
    let metrics = get(admin, "/metrics", MAX_ANSWER).await.filter(|(status, _)| *status == StatusCode::OK);
    let sessions = metrics.and_then(|(_, text)| sessions(&text));
    Some(match status {
        StatusCode::OK => Probe::Ready { sessions },
        _ => Probe::NotReady { missing: missing(&readyz), sessions },
    })
}

/// A `/readyz`, as far as it is looked at.
#[derive(Default, Deserialize)]
struct Readyz {
    #[serde(default)]
    conditions: Vec<ReadyzCondition>,
}

#[derive(Deserialize)]
struct ReadyzCondition {
    name: String,
    ok: bool,
    #[serde(default)]
    reason: String,
}

/// The conditions that a `/readyz` names as not met.
fn missing(readyz: &str) -> Vec<Missing> {
    let readyz: Readyz = serde_json::from_str(readyz).unwrap_or_default();
    let missing = readyz.conditions.into_iter().filter(|condition| !condition.ok).take(MAX_MISSING);
    missing.map(|condition| Missing { name: condition.name, reason: condition.reason }).collect()
}

/// Sessions that are open, over all labels.
fn sessions(metrics: &str) -> Option<u64> {
    let samples = metrics
        .lines()
        .filter_map(|line| line.strip_prefix(SESSIONS).filter(|rest| rest.starts_with('{') || rest.starts_with(' ')));
    let values: Option<Vec<u64>> = samples.map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
    values.filter(|values| !values.is_empty()).map(|values| values.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    fn peers_missing() -> Vec<Missing> {
        vec![Missing { name: "peers".into(), reason: "0 of 2".into() }]
    }

    #[test]
    fn missing_conditions_are_named() {
        let table = [
            (
                r#"{"ready":false,"config":"0","conditions":[{"name":"bus","ok":true,"reason":""},{"name":"peers","ok":false,"reason":"0 of 2"}]}"#,
                peers_missing(),
            ),
            (r#"{"ready":true,"conditions":[{"name":"bus","ok":true}]}"#, vec![]),
            ("{}", vec![]),
            ("Service Unavailable", vec![]),
        ];
        for (body, want) in table {
            assert_eq!(missing(body), want, "{body}");
        }
    }

    #[test]
    fn open_sessions_are_summed() {
        let gauge = "# TYPE overlay_sessions_active gauge\noverlay_sessions_active{group=\"hybrid\"} 2\n";
        let local = "overlay_sessions_active{group=\"local\"} 1\n";
        let table = [
            (format!("{gauge}{local}session_open_total 9\n"), Some(3)),
            (gauge.to_owned(), Some(2)),
            ("overlay_sessions_active_other 3\n".to_owned(), None),
            ("overlay_sessions_active NaN\n".to_owned(), None),
            (String::new(), None),
        ];
        for (metrics, want) in table {
            assert_eq!(sessions(&metrics), want, "{metrics}");
        }
    }

    /// A daemon that answers two questions, each on a connection that it then closes.
    fn serve(servers: &mut JoinSet<()>, readyz: &'static str) -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let metrics = "HTTP/1.1 200 OK\r\n\r\noverlay_sessions_active 2\n";
        servers.spawn(async move {
            for answer in [readyz, metrics] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut seen = [0; 1024];
                assert!(stream.read(&mut seen).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        address
    }

    #[tokio::test]
    async fn an_answer_becomes_a_probe() {
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let no = "HTTP/1.1 503 Service Unavailable\r\n\r\n{\"conditions\":[{\"name\":\"peers\",\"ok\":false,\"reason\":\"0 of 2\"}]}";
        let sessions = Some(2);
        let mut servers = JoinSet::new();
        assert_eq!(ask(serve(&mut servers, ok)).await, Some(Probe::Ready { sessions }));
        assert_eq!(ask(serve(&mut servers, no)).await, Some(Probe::NotReady { missing: peers_missing(), sessions }));
        assert_eq!(ask(serve(&mut servers, "SSH-2.0-x\r\n\r\n")).await, None, "not HTTP");
        assert_eq!(ask("127.0.0.1:1".parse().unwrap()).await, None, "nobody");
    }
}
