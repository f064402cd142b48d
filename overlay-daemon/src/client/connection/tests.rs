//! A session against a scripted daemon: greeting, refusals, pings, a daemon that goes away.

use overlay_core::status::{Refusal, Status};
use tokio::time::advance;

use super::super::testing::{greeted, pair};
use super::*;

fn publish() -> Open {
    Open::Publish { topic: "news".parse().unwrap() }
}

static TOKEN: Bytes = Bytes::from_static(b"a.b.c");

#[tokio::test]
async fn hello_is_refused_in_every_way() {
    let busy = Refusal::later(Status::Unavailable, "too many sessions", 250);
    let (client, mut daemon) = pair(4096);
    let (greeting, ()) = tokio::join!(Connection::greet(client), async {
        let hello = daemon.receive().await.unwrap();
        daemon.refuse(&hello, &busy, true).await;
    });
    let Err(ConnectionError::Refused(refused)) = greeting else { panic!("greeted") };
    assert_eq!((refused.code, refused.retry_after), (503, Some(Duration::from_millis(250))));
    assert_eq!(refused.to_string(), "refused by the daemon: 503 unavailable: too many sessions");

    for (case, bytes, want) in [
        ("not OAP/1", &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "not OAP/1"),
        ("closed at once", b"", "closed the connection"),
    ] {
        let (client, mut daemon) = pair(4096);
        let (greeting, ()) = tokio::join!(Connection::greet(client), async {
            daemon.receive().await.unwrap();
            daemon.send_bytes(bytes).await;
            drop(daemon);
        });
        assert!(greeting.unwrap_err().to_string().contains(want), "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_daemon_is_given_up() {
    let (client, _daemon) = pair(4096);
    let greeting = Connection::greet(client).await;
    assert!(matches!(greeting, Err(ConnectionError::Timeout("HELLO", _))));

    let (mut connection, _daemon) = greeted(1).await;
    let opened = connection.open(AppProto::PUBSUB, TenantId(0), &TOKEN, &publish()).await;
    assert!(matches!(opened, Err(ConnectionError::Timeout("START", _))));
}

/// Stream numbers are odd and rise; every refusal arrives with its code and words.
#[tokio::test]
async fn streams_open_and_are_refused() {
    let (mut connection, mut daemon) = greeted(1).await;
    for (n, status) in [(3, Status::Unauthorized), (5, Status::Forbidden), (7, Status::QuotaExhausted)] {
        let open = publish();
        let (opened, ()) = tokio::join!(connection.open(AppProto::PUBSUB, TenantId(9), &TOKEN, &open), async {
            let (start, _) = daemon.start().await;
            assert_eq!((start.corr_id, start.tenant, &start.cap), (n, TenantId(9), &TOKEN));
            daemon.refuse(&start, &Refusal::later(status, "no", 7), true).await;
        });
        let Err(ConnectionError::Refused(refused)) = opened else { panic!("opened") };
        assert_eq!(refused.code, status.code());
        assert_eq!(refused.retry_after.is_some(), status.retryable());
    }
    let open = publish();
    let (opened, ()) = tokio::join!(connection.open(AppProto::PUBSUB, TenantId(9), &TOKEN, &open), async {
        let (start, _) = daemon.start().await;
        daemon.send(&Frame::response(&Frame { corr_id: 4, ..start }, 200, false, Bytes::new())).await;
    });
    assert!(matches!(opened, Err(ConnectionError::Protocol(_))), "an answer on another stream");
}

/// The dialling side pings at a third of idle, and gives up on a daemon that does not answer.
#[tokio::test(start_paused = true)]
async fn pings_go_both_ways() {
    let (mut connection, mut daemon) = greeted(1).await;
    let begun = Instant::now();
    let (over, ()) = tokio::join!(connection.next(), async {
        let ping = daemon.receive().await.unwrap();
        assert_eq!((begun.elapsed(), ping.flags, ping.app), (PING_AFTER, Flags::REQ, AppProto::CONTROL));
        daemon.end(&ping).await;
        daemon.send(&Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 2, Bytes::from_static(b"x"))).await;
        let pong = daemon.receive().await.unwrap();
        assert_eq!(
            (pong.flags, pong.code, pong.corr_id, &pong.payload[..]),
            (Flags::RESP | Flags::END, 200, 2, &b"x"[..])
        );
        daemon.receive().await.unwrap();
        assert_eq!(begun.elapsed(), PING_AFTER * 2);
    });
    assert!(matches!(over, Err(ConnectionError::Timeout("a ping", _))));
    assert_eq!(begun.elapsed(), PING_AFTER + IDLE);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_was_busy_does_not_mistake_it_for_silence() {
    let (mut connection, mut daemon) = greeted(1).await;
    let (opened, start) = {
        let open = publish();
        tokio::join!(connection.open(AppProto::PUBSUB, TenantId(0), &TOKEN, &open), async {
            let (start, _) = daemon.start().await;
            daemon.ok(&start, Bytes::new()).await;
            start
        })
    };
    let (stream, _) = opened.unwrap();
    advance(IDLE * 3).await;
    daemon.ok(&start, Bytes::new()).await;
    let frame = connection.next().await.unwrap();
    assert!(stream.expect(&frame).is_ok());
}

#[tokio::test]
async fn illegal_frames_end_the_session() {
    for (case, flags, app) in [
        ("REQ and RESP at once", Flags::REQ | Flags::RESP, AppProto::PUBSUB),
        ("neither", Flags::END, AppProto::PUBSUB),
        ("compressed", Flags::RESP | Flags::COMP, AppProto::PUBSUB),
        ("a stream of the daemon's", Flags::REQ | Flags::START, AppProto::GOSSIP),
    ] {
        let (mut connection, mut daemon) = greeted(1).await;
        daemon.send(&Frame::new(flags, app, TenantId(0), 2, Bytes::new())).await;
        assert!(matches!(connection.next().await, Err(ConnectionError::Protocol(_))), "{case}");
    }
}

/// The reason for which a daemon closes is read even where writing has already failed.
#[tokio::test]
async fn a_refusal_before_the_end_is_heard() {
    let (mut connection, mut daemon) = greeted(1).await;
    let open = publish();
    let (opened, start) = tokio::join!(connection.open(AppProto::PUBSUB, TenantId(0), &TOKEN, &open), async {
        let (start, _) = daemon.start().await;
        daemon.ok(&start, Bytes::new()).await;
        start
    });
    let (stream, _) = opened.unwrap();
    daemon.refuse(&start, &Refusal::new(Status::Unauthorized, "the token has expired"), true).await;
    drop(daemon);
    connection.send(stream, Flags::REQ, Bytes::from_static(b"\0late")).unwrap();
    let frame = connection.next().await.unwrap();
    assert_eq!(Refused::of(&frame).message, "the token has expired");
    assert!(matches!(connection.next().await, Err(ConnectionError::Closed)));
}

/// I-5: what a daemon does not read is bounded, and then an error, not memory.
#[tokio::test]
async fn the_outbox_is_bounded() {
    let (mut connection, _daemon) = greeted(1).await;
    let stream = connection.stream(AppProto::PUBSUB, TenantId(0));
    let piece = Bytes::from(vec![0; CHUNK]);
    let queued = (0..1_000).take_while(|_| connection.send(stream, Flags::REQ, piece.clone()).is_ok()).count();
    assert!(!connection.has_room() && queued < 40, "{queued}");
}

#[test]
fn words_of_the_daemon_do_not_move_the_cursor() {
    assert_eq!(printable("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
}
