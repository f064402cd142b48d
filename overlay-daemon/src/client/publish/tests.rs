//! A publisher against a scripted daemon.

use overlay_core::frame::{CHUNK, Frame, MAX_BODY};
use overlay_core::record::Publish;
use overlay_core::status::{Refusal, Status};

use super::super::testing::{Daemon, greeted};
use super::*;

fn job() -> Job {
    Job { open: Open::Publish { topic: "news".parse().unwrap() }, tenant: TenantId(0), retries: 3, quiet: false }
}

/// Publishes `text` to a daemon that follows `script`: what went to standard output, and how
/// it ended.
async fn run_with(text: &[u8], cut: Cut, script: impl AsyncFnOnce(&mut Daemon, Frame)) -> (String, Result<(), String>) {
    let (mut connection, mut daemon) = greeted(4).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input");
    std::fs::write(&path, text).unwrap();
    let input = Input::file(&path, cut).await.unwrap();
    let by = By { token: Bytes::from_static(b"a.b.c"), file: None, max_inflight: 4 };
    let (mut out, job) = (Vec::new(), job());
    let (done, ()) = tokio::join!(publish(&mut connection, by, &job, input, &mut out), async {
        let (start, open) = daemon.start().await;
        assert_eq!(open, job.open);
        script(&mut daemon, start).await;
    });
    (String::from_utf8(out).unwrap(), done.map_err(|error| error.to_string()))
}

async fn publish_of(daemon: &mut Daemon) -> (Frame, Publish) {
    let frame = daemon.receive().await.unwrap();
    assert_eq!((frame.flags, frame.corr_id), (Flags::REQ, 3));
    let publish = Publish::decode(frame.payload.clone()).unwrap();
    (frame, publish)
}

async fn goodbye(daemon: &mut Daemon) {
    let end = daemon.receive().await.unwrap();
    assert_eq!((end.flags, end.payload.len()), (Flags::REQ | Flags::END, 0));
    daemon.end(&end).await;
}

#[tokio::test]
async fn a_message_is_published_and_its_id_printed() {
    let (out, done) = run_with(b"hello", Cut::Whole, async |daemon, start| {
        daemon.ok(&start, Bytes::new()).await;
        let (frame, publish) = publish_of(daemon).await;
        assert_eq!(publish, Publish::Message(Bytes::from_static(b"hello")));
        daemon.ok(&frame, vec![0xab; 32]).await;
        goodbye(daemon).await;
    })
    .await;
    assert_eq!((out, done), (format!("{}\n", "ab".repeat(32)), Ok(())));
}

/// Over 64 KiB: Begin, then every chunk in order, of the whole's hash.
#[tokio::test]
async fn a_large_message_goes_in_pieces() {
    let text: Vec<u8> = (0..CHUNK * 2 + 5).map(|n| n as u8).collect();
    let digest: [u8; 32] = blake3::hash(&text).into();
    let (_, done) = run_with(&text, Cut::Whole, async |daemon, start| {
        daemon.ok(&start, Bytes::new()).await;
        let (frame, begin) = publish_of(daemon).await;
        assert_eq!(begin, Publish::Begin { size: (CHUNK * 2 + 5) as u32, hash: digest });
        let mut joined = Vec::new();
        for n in 0..3 {
            let (_, Publish::Piece(piece)) = publish_of(daemon).await else { panic!("not a piece") };
            assert_eq!((piece.index, piece.hash), (n, digest));
            joined.extend_from_slice(&piece.bytes);
        }
        assert_eq!(joined, text);
        daemon.ok(&frame, vec![1; 32]).await;
        goodbye(daemon).await;
    })
    .await;
    assert_eq!(done, Ok(()));
}

/// I-9: one byte over 1 MiB is the daemon's to refuse, and costs one small frame.
#[tokio::test]
async fn a_message_past_the_bound_is_refused_by_the_daemon() {
    let (out, done) = run_with(&vec![0; MAX_BODY + 1], Cut::Whole, async |daemon, start| {
        daemon.ok(&start, Bytes::new()).await;
        let (frame, begin) = publish_of(daemon).await;
        assert!(matches!(begin, Publish::Begin { size: 1_048_577, .. }));
        daemon.refuse(&frame, &Refusal::new(Status::PayloadTooLarge, "a message has at most 1 MiB"), false).await;
        goodbye(daemon).await;
    })
    .await;
    assert_eq!(out, "");
    assert_eq!(
        done.unwrap_err(),
        "the message: refused by the daemon: 413 payload_too_large: a message has at most 1 MiB"
    );
}

#[tokio::test(start_paused = true)]
async fn a_busy_daemon_is_asked_again() {
    let busy = Refusal::later(Status::QuotaExhausted, "too many requests a second", 40);
    let (out, done) = run_with(b"hello", Cut::Whole, async |daemon, start| {
        daemon.refuse(&start, &busy, true).await;
        let (start, _) = daemon.start().await;
        assert_eq!(start.corr_id, 5, "a new stream");
        daemon.ok(&start, Bytes::new()).await;
        let asked = Instant::now();
        let frame = daemon.receive().await.unwrap();
        daemon.refuse(&frame, &busy, false).await;
        let frame = daemon.receive().await.unwrap();
        assert!(asked.elapsed() >= Duration::from_millis(40));
        daemon.ok(&frame, vec![2; 32]).await;
        goodbye(daemon).await;
    })
    .await;
    assert_eq!((out.len(), done), (65, Ok(())));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_stays_busy_is_given_up() {
    let shed = Refusal::later(Status::Unavailable, "shedding", 40);
    let (out, done) = run_with(b"hello", Cut::Whole, async |daemon, start| {
        daemon.ok(&start, Bytes::new()).await;
        for _ in 0..4 {
            let frame = daemon.receive().await.unwrap();
            daemon.refuse(&frame, &shed, false).await;
        }
    })
    .await;
    assert_eq!(out, "");
    assert!(done.unwrap_err().contains("503 unavailable: shedding; gave up after 3 retries"));
    let (_, done) = run_with(b"hello", Cut::Whole, async |daemon, mut start| {
        for _ in 0..3 {
            daemon.refuse(&start, &shed, true).await;
            start = daemon.start().await.0;
        }
        daemon.refuse(&start, &shed, true).await;
    })
    .await;
    assert!(done.unwrap_err().contains("503"), "at START too");
}

/// One message a line, pipelined; a line that is refused does not stop the others.
#[tokio::test]
async fn lines_go_on_past_a_refusal() {
    let (out, done) = run_with(b"a\nb\nc\nd\ne\n", Cut::Lines, async |daemon, start| {
        daemon.ok(&start, Bytes::new()).await;
        let mut pipelined = Vec::new();
        for _ in 0..4 {
            pipelined.push(publish_of(daemon).await.0);
        }
        for (n, frame) in pipelined.iter().enumerate() {
            match n {
                1 => daemon.refuse(frame, &Refusal::new(Status::Internal, "oh"), false).await,
                _ => daemon.ok(frame, vec![n as u8; 32]).await,
            }
        }
        let (frame, publish) = publish_of(daemon).await;
        assert_eq!(publish, Publish::Message(Bytes::from_static(b"e")));
        daemon.ok(&frame, vec![4; 32]).await;
        goodbye(daemon).await;
    })
    .await;
    assert_eq!(out.lines().map(|id| &id[..2]).collect::<Vec<_>>(), ["00", "02", "03", "04"]);
    assert_eq!(
        done.unwrap_err(),
        "line 2: refused by the daemon: 500 internal: oh\nerror: 1 of 5 messages were refused"
    );
}

#[tokio::test]
async fn a_stream_that_the_daemon_ends_is_an_error() {
    let (_, done) = run_with(b"hello", Cut::Whole, async |daemon, start| {
        daemon.ok(&start, Bytes::new()).await;
        let (frame, _) = publish_of(daemon).await;
        daemon.refuse(&frame, &Refusal::later(Status::Unavailable, "draining", 1_000), true).await;
    })
    .await;
    assert_eq!(done.unwrap_err(), "refused by the daemon: 503 unavailable: draining; 1 message was not answered");
    let (_, done) = run_with(b"hello", Cut::Whole, async |daemon, start| {
        daemon.refuse(&start, &Refusal::new(Status::Forbidden, "the token does not allow this topic"), true).await;
    })
    .await;
    assert_eq!(done.unwrap_err(), "refused by the daemon: 403 forbidden: the token does not allow this topic");
}

#[tokio::test]
async fn a_message_and_lines_exclude_each_other() {
    let of = async |message: &str, lines| source(Some(message.to_owned()), None, lines).await;
    assert!(matches!(of("x", true).await, Err(ClientError::Usage(text)) if text.contains("--lines")));
    assert!(of("-", true).await.is_ok() && of("x", false).await.is_ok());
}
