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

/// A token that lives for 100 s from now.
fn short_lived(word: &str) -> String {
    use base64::Engine;
    let now = Clock::start().unix_ms() / 1_000;
    let claims = format!(r#"{{"nbf":{now},"exp":{},"sub":"{word}"}}"#, now + 100);
    format!("h.{}.s", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(claims))
}

/// A subscription goes on by the token that its file comes to hold, and its user sees nothing
/// of it. A refusal changes nothing, and is not the end.
#[tokio::test(start_paused = true)]
async fn a_stream_goes_on_by_another_token() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    let [first, second] = ["a", "b"].map(|word| Bytes::from(short_lived(word)));
    std::fs::write(&path, &first).unwrap();
    let (mut connection, mut daemon) = greeted(1).await;
    let open = publish();
    let (opened, start) = tokio::join!(connection.open(AppProto::PUBSUB, TenantId(0), &first, &open), async {
        let (start, _) = daemon.start().await;
        daemon.ok(&start, Bytes::new()).await;
        start
    });
    let (stream, _) = opened.unwrap();
    let args = super::super::args::SocketArgs { socket: None, token_file: Some(path.clone()) };
    let file = super::super::locate::Surroundings::of_process().token_file(&args, None).unwrap();
    connection.keep(stream, &first, file);
    std::fs::write(&path, &second).unwrap();
    let script = async {
        let mut old = start.clone();
        for (n, refused) in [(0, true), (1, false)] {
            let renewal = loop {
                let frame = daemon.receive().await.unwrap();
                if frame.app == AppProto::PUBSUB {
                    break frame;
                }
                daemon.end(&frame).await; // pings, until half the lifetime has passed
            };
            assert_eq!((renewal.flags, &renewal.cap), (Flags::REQ | Flags::START, &second), "{n}");
            assert_eq!(parse::<Open>(&renewal.payload), Some(Open::Renew { stream: old.corr_id }));
            if refused {
                let refusal = Refusal::later(Status::QuotaExhausted, "too many requests a second", 7);
                daemon.refuse(&renewal, &refusal, true).await;
            } else {
                daemon.ok(&renewal, Bytes::new()).await;
                daemon.end(&old).await;
                old = renewal;
            }
        }
        let message = super::super::testing::message(1, b"on the new one");
        daemon.push(&old, &message).await;
        old
    };
    let (frame, current) = tokio::join!(connection.next(), script);
    assert!(stream.expect(&frame.unwrap()).is_ok());
    assert!(current.corr_id != start.corr_id);
    connection.send(stream, Flags::REQ, Bytes::from_static(b"\0more")).unwrap();
    let (_, sent) = tokio::join!(timeout(Duration::from_millis(10), connection.next()), daemon.receive());
    assert_eq!(sent.unwrap().corr_id, current.corr_id);
}
