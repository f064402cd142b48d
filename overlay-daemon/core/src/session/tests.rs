//! The machine of C-3 by table: what is legal in which state, and which timer does what.

use super::*;

const TIMERS: Timers = Timers { handshake_ends: Millis(3_000), idle_ms: 15_000 };

fn acceptor() -> Session<()> {
    let mut session = Session::new(Role::Acceptor, TIMERS, Millis(0));
    session.handle_connected(&Hello::default(), Millis(0));
    session
}

fn frame(flags: Flags, app: AppProto, corr_id: u64) -> Frame {
    Frame::new(flags, app, TenantId(0), corr_id, json(&Hello::default()))
}

/// An acceptor in Active with stream 3 open.
fn active() -> Session<()> {
    let mut session = acceptor();
    let hello = frame(Flags::REQ, AppProto::CONTROL, 1);
    assert!(matches!(session.handle_frame(hello.clone(), Millis(0)), Ok(Event::Hello(..))));
    session.answer_hello(
        &hello,
        &HelloReply::of(crate::control::DaemonHello { name: "a".into(), incarnation: Default::default() }, 32),
    );
    let start = frame(Flags::REQ | Flags::START, AppProto::PUBSUB, 3);
    assert!(matches!(session.handle_frame(start.clone(), Millis(0)), Ok(Event::Start(_))));
    session.open_theirs(&start, ());
    session
}

#[test]
fn two_ends_greet() {
    let mut dialler = Session::<()>::new(Role::Dialler, TIMERS, Millis(0));
    let hello = dialler.handle_connected(&Hello::default(), Millis(0)).unwrap();
    let mut acceptor = acceptor();
    let Ok(Event::Hello(frame, _)) = acceptor.handle_frame(hello, Millis(1)) else { panic!("no HELLO") };
    let reply = HelloReply::of(crate::control::DaemonHello { name: "a".into(), incarnation: Default::default() }, 32);
    let answer = acceptor.answer_hello(&frame, &reply);
    assert_eq!(dialler.handle_frame(answer, Millis(2)), Ok(Event::Welcomed(reply)));
    assert_eq!((dialler.state(), acceptor.state()), (State::Active, State::Active));
}

/// C-3, F9: an illegal frame gets 400 and changes nothing.
#[test]
fn illegal_frames_change_nothing() {
    use AppProto as A;
    let start = Flags::REQ | Flags::START;
    let tenant = Frame { tenant: TenantId(9), ..frame(Flags::REQ, A::PUBSUB, 3) };
    for (case, illegal) in [
        ("RESP where nothing was asked", frame(Flags::RESP, A::PUBSUB, 2)),
        ("a second START", frame(start, A::PUBSUB, 3)),
        ("END on a stream that never started", frame(Flags::REQ | Flags::END, A::PUBSUB, 9)),
        ("a request on a stream that never started", frame(Flags::REQ, A::PUBSUB, 9)),
        ("the acceptor's own numbers", frame(start, A::PUBSUB, 4)),
        ("corr_id 0", frame(start, A::PUBSUB, 0)),
        ("an unknown protocol", frame(start, AppProto(700), 5)),
        ("START on control", frame(start, A::CONTROL, 5)),
        ("an EVENT nobody asked for", frame(Flags::EVENT, A::PUBSUB, 3)),
        ("REQ and RESP at once", frame(Flags::REQ | Flags::RESP, A::PUBSUB, 3)),
        ("none of the three", frame(Flags::END, A::PUBSUB, 3)),
        ("compressed", frame(Flags::REQ | Flags::COMP, A::PUBSUB, 3)),
        ("another protocol in mid-stream", frame(Flags::REQ, A::GOSSIP, 3)),
        ("another tenant in mid-stream", tenant),
        ("an overlong ping", Frame { payload: vec![0; 65].into(), ..frame(Flags::REQ, A::CONTROL, 5) }),
    ] {
        let mut session = active();
        let refusal = session.handle_frame(illegal, Millis(1)).unwrap_err();
        assert_eq!(refusal.status.code(), 400, "{case}");
        assert_eq!((session.state(), session.streams().count()), (State::Active, 1), "{case}");
    }
}

#[test]
fn hello_comes_first() {
    for (case, early) in [
        ("a stream", frame(Flags::REQ | Flags::START, AppProto::PUBSUB, 1)),
        ("an answer", frame(Flags::RESP, AppProto::CONTROL, 1)),
        ("not JSON", Frame { payload: Bytes::from_static(b"hello"), ..frame(Flags::REQ, AppProto::CONTROL, 1) }),
    ] {
        let mut session = acceptor();
        assert_eq!(session.handle_frame(early, Millis(0)).unwrap_err().status.code(), 400, "{case}");
        assert_eq!(session.state(), State::Handshake, "{case}");
    }
}

#[test]
fn late_frames_of_an_ended_stream_are_dropped() {
    let mut session = active();
    session.close_stream(3);
    assert_eq!(session.handle_frame(frame(Flags::REQ, AppProto::PUBSUB, 3), Millis(0)), Ok(Event::Nothing));
    assert_eq!(
        session.handle_frame(Frame { code: 503, ..frame(Flags::RESP, AppProto::PUBSUB, 2) }, Millis(0)),
        Ok(Event::Nothing)
    );
}

#[test]
fn streams_are_bounded() {
    let mut session = active();
    let codes: Vec<_> = (2..MAX_STREAMS as u64 + 2)
        .filter_map(|n| {
            let start = frame(Flags::REQ | Flags::START, AppProto::PUBSUB, 2 * n + 1);
            let answer = session.handle_frame(start.clone(), Millis(0));
            if answer.is_ok() {
                session.open_theirs(&start, ());
            }
            answer.err().map(|refusal| refusal.status.code())
        })
        .collect();
    assert_eq!((codes, session.streams().count()), (vec![429], MAX_STREAMS));
}

/// I-2: handshake and idle deadlines; the dialler pings at a third of idle.
#[test]
fn timers() {
    let mut silent = acceptor();
    assert_eq!(silent.poll_timeout(), Some(Millis(3_000)));
    assert_eq!(
        (silent.handle_timeout(Millis(2_999)), silent.handle_timeout(Millis(3_000))),
        (Ok(Tick::Nothing), Err(Reason::Timeout))
    );

    let mut idle = active();
    assert_eq!(idle.poll_timeout(), Some(Millis(15_000)));
    assert_eq!(
        (idle.handle_timeout(Millis(14_999)), idle.handle_timeout(Millis(15_000))),
        (Ok(Tick::Nothing), Err(Reason::Timeout))
    );

    let mut dialler = Session::<()>::new(Role::Dialler, TIMERS, Millis(0));
    dialler.handle_connected(&Hello::default(), Millis(0));
    let reply = HelloReply::of(crate::control::DaemonHello { name: "a".into(), incarnation: Default::default() }, 32);
    let welcome = Frame { code: 200, payload: json(&reply), ..frame(Flags::RESP, AppProto::CONTROL, 1) };
    assert!(dialler.handle_frame(welcome, Millis(0)).is_ok());
    assert_eq!(dialler.poll_timeout(), Some(Millis(5_000)));
    let Ok(Tick::Ping(ping)) = dialler.handle_timeout(Millis(5_000)) else { panic!("no ping") };
    dialler.handle_sent(Millis(5_000));
    assert_eq!(dialler.handle_timeout(Millis(6_000)), Ok(Tick::Nothing), "one ping at a time");
    let mut answered = Frame::response(&ping, 200, true, Bytes::new());
    answered.flags = Flags::RESP | Flags::END;
    assert_eq!(dialler.handle_frame(answered, Millis(6_000)), Ok(Event::Nothing));
    assert_eq!(dialler.poll_timeout(), Some(Millis(11_000)));
}

/// C-3: Active to Backoff and back after the delay.
#[test]
fn backoff_resumes() {
    let mut session = active();
    session.back_off(500, Millis(100));
    assert_eq!((session.state(), session.poll_timeout()), (State::Backoff, Some(Millis(600))));
    assert_eq!(session.handle_timeout(Millis(600)), Ok(Tick::Resume));
    assert_eq!(session.state(), State::Active);
}

/// A peer that answers pings with anything but a pong: the deadline that is asked for lies
/// ahead of every timeout that did nothing, or the node would turn on the spot.
#[test]
fn a_deadline_that_passed_is_not_asked_for_again() {
    let mut dialler = Session::<()>::new(Role::Dialler, TIMERS, Millis(0));
    dialler.handle_connected(&Hello::default(), Millis(0));
    let daemon = crate::control::DaemonHello { name: "a".into(), incarnation: Default::default() };
    let reply = Frame {
        code: 200,
        ..Frame::new(Flags::RESP, AppProto::CONTROL, TenantId(0), 1, json(&HelloReply::of(daemon, 32)))
    };
    assert!(matches!(dialler.handle_frame(reply, Millis(0)), Ok(Event::Welcomed(_))));
    let mut pings = 0;
    let mut ended = None;
    for now in (0..60_000).map(Millis) {
        if (5_001..40_000).contains(&now.0) && now.0.is_multiple_of(1_000) {
            let _illegal = dialler.handle_frame(frame(Flags::EVENT, AppProto::PUBSUB, 2), now);
        }
        dialler.handle_sent(now);
        match dialler.handle_timeout(now) {
            Ok(Tick::Ping(_)) => pings += 1,
            Ok(_) => {}
            Err(reason) => {
                ended = Some((now, reason));
                break;
            }
        }
        assert!(dialler.poll_timeout().is_some_and(|at| at > now), "at {now:?}");
    }
    assert_eq!((pings, ended), (1, Some((Millis(39_000 + 15_000), Reason::Timeout))));
}

/// An answer repeats the tenant of the stream that it answers.
#[test]
fn an_answer_for_another_tenant_is_illegal() {
    let mut session = active();
    let start = session.open_ours(AppProto::GOSSIP, TenantId(1), Bytes::new(), Bytes::new(), ());
    let answer =
        |tenant| Frame { code: 200, tenant: TenantId(tenant), ..frame(Flags::RESP, AppProto::GOSSIP, start.corr_id) };
    assert_eq!(session.handle_frame(answer(2), Millis(0)).unwrap_err().status, Status::BadRequest);
    assert!(matches!(session.handle_frame(answer(1), Millis(0)), Ok(Event::Answer(_))));
}
