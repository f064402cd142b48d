//! What the admin endpoint answers, over real connections.

use overlay_core::readiness::Condition;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

struct Running {
    address: SocketAddr,
    report: watch::Sender<Report>,
    metrics: Arc<Metrics>,
    cancel: CancellationToken,
    tasks: JoinSet<()>,
}

async fn start() -> Running {
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let metrics = Arc::new(Metrics::new(true, "0123456789abcdef").unwrap());
    metrics.inflight(Some("mesh-1")).set(0);
    let (report, receiver) = watch::channel(Report::default());
    let admin = Admin {
        metrics: Arc::clone(&metrics),
        report: receiver,
        running: watch::channel(crate::reload::Running { config: "0123456789abcdef".into(), peers: "fedcba98".into() })
            .1,
        clock: Clock::start(),
    };
    let cancel = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(listener, admin, cancel.clone()));
    Running { address, report, metrics, cancel, tasks }
}

impl Running {
    /// The answer to `request`, whole.
    async fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    async fn get(&self, path: &str) -> String {
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: admin\r\n\r\n")).await
    }
}

/// A2, I-10, G-8: four paths, and nothing else.
#[tokio::test]
async fn a2_four_paths_and_nothing_else() {
    let running = start().await;
    let ok = "HTTP/1.1 200 OK";
    assert!(running.get("/healthz").await.starts_with(ok));
    let version = running.get("/version").await;
    assert!(version.starts_with(ok) && version.contains("{\"name\":\"overlay-daemon\",\"version\":\""), "{version}");
    let metrics = running.get("/metrics").await;
    assert!(metrics.contains("content-type: text/plain; version=0.0.4"), "{metrics}");
    assert!(metrics.contains("\noverlay_inflight{peer=\"mesh-1\",amnesia=\"on\"} 0\n"), "{metrics}");
    assert!(metrics.contains("request_latency_seconds_count{route=\"admin_version\",amnesia=\"on\"} 1\n"), "{metrics}");
    let long = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(20_000));
    let headers = format!("GET /healthz HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(64));
    let heavy = format!("GET /healthz HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(17_000));
    for (request, want) in [
        ("GET /sessions HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("GET /../metrics HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("GET /metrics/ HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nhost: a\r\n\r\n", "405"),
        ("TRACE /healthz HTTP/1.1\r\nhost: a\r\n\r\n", "405"),
        ("CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n", "4"),
        ("GET /\0 HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        (&headers, "431"),
        (&heavy, "431"),
    ] {
        let answer = running.ask(request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {want}")), "{request:.60}: {answer:.200}");
    }
    // HTTP/1 only: HTTP/2's first words open nothing.
    let answer = running.ask("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer:.200}");
    let answer = running.ask(&long).await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer:.200}");
}

/// I-6: ready is what the report says, each missing condition named; nobody vouching is 503.
#[tokio::test]
async fn readiness_is_the_reports() {
    let mut running = start().await;
    let condition = |name, ok, reason: &str| Condition { name, ok, reason: reason.into(), since_ms: 7 };
    let peers = "0 of 2 peers";
    running.report.send_replace(Report {
        ready: false,
        conditions: vec![condition("bus", true, ""), condition("peers", false, peers)],
    });
    let answer = running.get("/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nretry-after: 1\r\n"), "{answer}");
    let body = "{\"ready\":false,\"config\":\"0123456789abcdef\",\"peers\":\"fedcba98\",\"conditions\":[{\"name\":\"bus\",\"ok\":true,\"reason\":\"\",\"since_ms\":7},{\"name\":\"peers\",\"ok\":false,\"reason\":\"0 of 2 peers\",\"since_ms\":7}]}";
    assert!(answer.ends_with(body), "{answer}");

    running.report.send_replace(Report { ready: true, conditions: vec![condition("bus", true, "")] });
    let answer = running.get("/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && !answer.contains("retry-after"), "{answer}");

    let (gone, _) = watch::channel(Report::default());
    drop(std::mem::replace(&mut running.report, gone));
    let answer = running.get("/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("the hub has stopped"), "{answer}");
}

/// A1: a head that never ends is closed at its deadline, and more of them than are held close
/// the oldest first; a probe is answered all the same.
#[tokio::test]
async fn a1_slow_heads_do_not_keep_probes_out() {
    let running = start().await;
    let mut slow = Vec::new();
    for _ in 0..=MAX_CONNECTIONS {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
        slow.push(stream);
    }
    assert!(running.get("/healthz").await.ends_with("ok\n"));
    assert_eq!(slow[0].read(&mut [0; 64]).await.unwrap_or(0), 0, "the oldest has been closed");
    assert!(running.metrics.render().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a1_a_head_that_never_ends_is_closed() {
    let running = start().await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    let from = tokio::time::Instant::now();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(from.elapsed() <= HEAD_TIMEOUT + Duration::from_millis(10), "{:?}", from.elapsed());
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"));
}

#[tokio::test]
async fn it_ends_when_cancelled() {
    let mut running = start().await;
    let _open = TcpStream::connect(running.address).await.unwrap();
    running.cancel.cancel();
    running.tasks.join_next().await.unwrap().unwrap();
}
