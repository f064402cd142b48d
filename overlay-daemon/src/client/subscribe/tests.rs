//! A subscriber against a scripted daemon.

use overlay_core::frame::CHUNK;
use overlay_core::record::{Record, pieces};
use overlay_core::status::{Refusal, Status};

use super::super::testing::{Daemon, envelope, greeted, message};
use super::*;

/// Subscribes to `news` at a daemon that follows `script`: what was written, and how it ended.
async fn run_with(
    count: Option<u64>,
    style: Style,
    script: impl AsyncFnOnce(&mut Daemon, &Frame),
) -> (Vec<u8>, Result<(), String>) {
    let (mut connection, mut daemon) = greeted(4).await;
    let (token, mut out) = (Bytes::from_static(b"a.b.c"), Vec::new());
    let news: Topic = "news".parse().unwrap();
    let client = async {
        let stream = subscribe(&mut connection, &token, TenantId(0), vec![news.clone()]).await?;
        let mut subscription =
            Subscription { stream, tenant: TenantId(0), assembly: Assembly::default(), style, count, received: 0 };
        subscription.receive(&mut connection, &mut out).await?;
        connection.end(stream).await?;
        Ok::<_, ClientError>(())
    };
    let (done, ()) = tokio::join!(client, async {
        let (start, open) = daemon.start().await;
        assert_eq!(open, Open::Subscribe { topics: vec![news.clone()] });
        script(&mut daemon, &start).await;
        drop(daemon);
    });
    (out, done.map_err(|error| error.to_string()))
}

#[tokio::test]
async fn messages_are_written_until_there_are_enough() {
    let (out, done) = run_with(Some(2), Style::Lines, async |daemon, start| {
        daemon.ok(start, Bytes::new()).await;
        for n in 0..3 {
            daemon.push(start, &message(n, b"hello")).await;
        }
        let end = daemon.receive().await.unwrap();
        assert_eq!(end.flags, Flags::REQ | Flags::END);
        daemon.end(&end).await;
    })
    .await;
    assert_eq!((&out[..], done), (&b"hello\nhello\n"[..], Ok(())));
}

/// Lanes have weights, not ranks: an event may overtake the answer to its START.
#[tokio::test]
async fn an_early_event_is_kept() {
    let (out, done) = run_with(Some(2), Style::Lines, async |daemon, start| {
        daemon.push(start, &message(1, b"early")).await;
        daemon.ok(start, Bytes::new()).await;
        daemon.push(start, &message(2, b"late")).await;
        let end = daemon.receive().await.unwrap();
        daemon.end(&end).await;
    })
    .await;
    assert_eq!((&out[..], done), (&b"early\nlate\n"[..], Ok(())));
}

#[tokio::test]
async fn a_large_message_is_exact() {
    let payload: Bytes = (0..CHUNK * 16).map(|n| (n / 7) as u8).collect();
    let hash = blake3::hash(&payload).into();
    let (out, done) = run_with(Some(1), Style::Exact, async |daemon, start| {
        daemon.ok(start, Bytes::new()).await;
        daemon.push(start, &Record::Begin { hops: 0, envelope: envelope(1, payload.len(), hash) }).await;
        for piece in pieces(&payload, hash) {
            daemon.push(start, &Record::Piece(piece)).await;
        }
        let end = daemon.receive().await.unwrap();
        daemon.end(&end).await;
    })
    .await;
    assert!(out == payload && done.is_ok());
}

/// What does not verify is not written, and ends the command.
#[tokio::test]
async fn a_forged_chunk_is_not_written() {
    let payload = Bytes::from(vec![7; CHUNK + 1]);
    let (out, done) = run_with(Some(1), Style::Exact, async |daemon, start| {
        daemon.ok(start, Bytes::new()).await;
        daemon.push(start, &Record::Begin { hops: 0, envelope: envelope(1, payload.len(), [9; 32]) }).await;
        for piece in pieces(&payload, [9; 32]) {
            daemon.push(start, &Record::Piece(piece)).await;
        }
    })
    .await;
    assert!(out.is_empty() && done.unwrap_err().contains("does not match its BLAKE3"));
}

#[tokio::test]
async fn gaps_stand_in_the_output_of_json() {
    let (out, done) = run_with(Some(1), Style::Json, async |daemon, start| {
        daemon.ok(start, Bytes::new()).await;
        daemon.push(start, &Record::Gap { missed: 12 }).await;
        daemon.push(start, &message(13, b"hello")).await;
        let end = daemon.receive().await.unwrap();
        daemon.end(&end).await;
    })
    .await;
    assert!(out.starts_with(b"{\"gap\":12}\n{\"topic\":\"news\",") && done.is_ok());
}

/// However a subscription ends before its time, it is an error that says how.
#[tokio::test]
async fn a_subscription_that_ends_is_an_error() {
    let (_, done) = run_with(None, Style::Lines, async |daemon, start| {
        daemon.ok(start, Bytes::new()).await;
        daemon.push(start, &message(1, b"hello")).await;
    })
    .await;
    assert_eq!(done.unwrap_err(), "the subscription is over: the daemon closed the connection (1 message received)");

    let (_, done) = run_with(Some(3), Style::Lines, async |daemon, start| {
        daemon.ok(start, Bytes::new()).await;
        daemon.refuse(start, &Refusal::later(Status::Unavailable, "the daemon is stopping", 1_000), true).await;
    })
    .await;
    let text = done.unwrap_err();
    assert!(text.contains("503 unavailable: the daemon is stopping (0 of 3 messages received)"), "{text}");

    let (_, done) = run_with(None, Style::Lines, async |daemon, start| {
        daemon.refuse(start, &Refusal::new(Status::Forbidden, "the token does not allow this topic"), true).await;
    })
    .await;
    assert!(done.unwrap_err().contains("403 forbidden"));

    let (_, done) = run_with(None, Style::Lines, async |daemon, start| {
        daemon.ok(start, Bytes::new()).await;
        daemon.push(&Frame { corr_id: 9, ..start.clone() }, &message(1, b"hello")).await;
    })
    .await;
    assert!(done.unwrap_err().contains("not open"), "an event on another stream");
}

#[tokio::test]
async fn too_many_topics_are_usage() {
    let (mut connection, _daemon) = greeted(4).await;
    let topics = (0..=MAX_TOPICS).map(|n| format!("t{n}").parse().unwrap()).collect();
    let subscribed = subscribe(&mut connection, &Bytes::from_static(b"a.b.c"), TenantId(0), topics).await;
    assert!(matches!(subscribed, Err(ClientError::Usage(text)) if text.contains("at most 64")));
}
