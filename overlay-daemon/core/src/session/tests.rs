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

/// C-3: an illegal frame gets 400 and changes nothing.
#[test]
fn f3_illegal_frames_change_nothing() {
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
        ("an answer that asks for an acknowledgement", frame(Flags::RESP | Flags::ACK_REQ, A::PUBSUB, 2)),
        ("an answer that opens a stream", frame(Flags::RESP | Flags::START, A::PUBSUB, 5)),
        ("a request on a number of ours", frame(Flags::REQ, A::PUBSUB, 2)),
        ("a request on corr_id 0", frame(Flags::REQ, A::PUBSUB, 0)),
        ("a ping that asks for an acknowledgement", frame(Flags::REQ | Flags::ACK_REQ, A::CONTROL, 5)),
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

/// A daemon without a place says so, and is not answered: the session is simply over.
#[test]
fn a_refused_hello_is_not_answered() {
    for code in [400, 429, 503] {
        let mut session: Session<()> = Session::new(Role::Dialler, TIMERS, Millis(0));
        session.handle_connected(&Hello::default(), Millis(0));
        let refusal = Frame { code, ..frame(Flags::RESP | Flags::END, AppProto::CONTROL, 1) };
        assert_eq!(session.handle_frame(refusal, Millis(0)), Ok(Event::TurnedAway));
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
    let start = session.open_ours(AppProto::GOSSIP, TenantId(1), Bytes::new(), Bytes::new(), ()).unwrap();
    let answer =
        |tenant| Frame { code: 200, tenant: TenantId(tenant), ..frame(Flags::RESP, AppProto::GOSSIP, start.corr_id) };
    assert_eq!(session.handle_frame(answer(2), Millis(0)).unwrap_err().status, Status::BadRequest);
    assert!(matches!(session.handle_frame(answer(1), Millis(0)), Ok(Event::Answer(_))));
}

/// A session in each state, with stream 3 (4 where it dialled) opened by the other side on
/// protocol 1, 1 used and over, and one of its own on protocol 3.
fn in_every_state() -> Vec<(&'static str, Session<()>)> {
    let idle = Session::new(Role::Acceptor, TIMERS, Millis(0));
    let mut dialling = Session::new(Role::Dialler, TIMERS, Millis(0));
    dialling.handle_connected(&Hello::default(), Millis(0));
    let mut dialler = Session::new(Role::Dialler, TIMERS, Millis(0));
    dialler.handle_connected(&Hello::default(), Millis(0));
    let daemon = crate::control::DaemonHello { name: "a".into(), incarnation: Default::default() };
    let welcome =
        Frame { code: 200, payload: json(&HelloReply::of(daemon, 32)), ..frame(Flags::RESP, AppProto::CONTROL, 1) };
    assert!(dialler.handle_frame(welcome, Millis(0)).is_ok());
    for corr_id in [2, 4] {
        let start = frame(Flags::REQ | Flags::START, AppProto::PUBSUB, corr_id);
        assert!(matches!(dialler.handle_frame(start.clone(), Millis(0)), Ok(Event::Start(_))));
        dialler.open_theirs(&start, ());
    }
    dialler.close_stream(2);
    let (mut open, mut backoff, mut closed) = (active(), active(), active());
    for session in [&mut open, &mut backoff, &mut dialler] {
        assert!(session.open_ours(AppProto::GOSSIP, TenantId(0), Bytes::new(), Bytes::new(), ()).is_some());
    }
    backoff.back_off(1_000, Millis(0));
    closed.close();
    vec![
        ("idle", idle),
        ("handshake", acceptor()),
        ("handshake of the dialler", dialling),
        ("active", open),
        ("active, dialled", dialler),
        ("backoff", backoff),
        ("closed", closed),
    ]
}

/// State, protocols, flags, streams, event.
type Allowed = (&'static str, &'static [u16], &'static str, &'static [u64], &'static str);

/// What may be done in which state: protocols, flags, streams, and what comes of it. Nothing
/// else may. ACK_REQ, APP_E2E and END are marked `+` where they make no difference.
const ALLOWED: &[Allowed] = &[
    ("handshake", &[0], "REQ", &[0, 1, 2, 3, 4, 5, 6], "hello"),
    ("handshake of the dialler", &[0], "RESP+END", &[1], "welcomed"),
    ("active", &[0], "REQ", &[0, 1, 2, 3, 4, 5, 6], "ping"),
    ("active", &[1, 3, 4], "REQ|START+END+ACK_REQ+APP_E2E", &[5], "start"),
    ("active", &[1], "REQ+ACK_REQ+APP_E2E", &[3], "request"),
    ("active", &[1], "REQ|END+ACK_REQ+APP_E2E", &[3], "ended"),
    ("active", &[1, 2, 3, 4, 5, 700, 0xffff], "REQ+END+ACK_REQ+APP_E2E", &[1], "nothing"),
    ("active", &[3], "RESP+END+APP_E2E", &[2], "answer"),
    ("active, dialled", &[0], "REQ", &[0, 1, 2, 3, 4, 5, 6], "ping"),
    ("active, dialled", &[1, 3, 4], "REQ|START+END+ACK_REQ+APP_E2E", &[6], "start"),
    ("active, dialled", &[1], "REQ+ACK_REQ+APP_E2E", &[4], "request"),
    ("active, dialled", &[1], "REQ|END+ACK_REQ+APP_E2E", &[4], "ended"),
    ("active, dialled", &[1, 2, 3, 4, 5, 700, 0xffff], "REQ+END+ACK_REQ+APP_E2E", &[2], "nothing"),
    ("active, dialled", &[3], "RESP+END+APP_E2E", &[3], "answer"),
];

const NAMED: [(&str, Flags); 8] = [
    ("REQ", Flags::REQ),
    ("RESP", Flags::RESP),
    ("EVENT", Flags::EVENT),
    ("START", Flags::START),
    ("END", Flags::END),
    ("ACK_REQ", Flags::ACK_REQ),
    ("COMP", Flags::COMP),
    ("APP_E2E", Flags::APP_E2E),
];

fn fits(pattern: &str, flags: Flags) -> bool {
    let named = |name: &str| NAMED.iter().find(|(known, _)| *known == name).unwrap().1;
    let mut parts = pattern.split('+');
    let must = parts.next().unwrap().split('|').map(named).fold(Flags::default(), |all, flag| all | flag);
    let may = parts.map(named).fold(Flags::default(), |all, flag| all | flag);
    flags.without(may.without(must)) == must
}

fn what(event: &Event) -> &'static str {
    match event {
        Event::Hello(..) => "hello",
        Event::Welcomed(_) => "welcomed",
        Event::TurnedAway => "turned away",
        Event::Ping(_) => "ping",
        Event::Start(_) => "start",
        Event::Request(_) => "request",
        Event::Ended(_) => "ended",
        Event::Answer(_) => "answer",
        Event::Nothing => "nothing",
    }
}

/// F9: every protocol, flag and kind of stream in every state against the table above. F3: what
/// is refused leaves the machine as it was, to the last field.
#[test]
fn f9_every_protocol_flag_and_state_against_the_table() {
    let apps = [0, 1, 2, 3, 4, 5, 700, 0xffff];
    let mut seen = std::collections::BTreeMap::<&str, u32>::new();
    let sessions = in_every_state();
    let states = sessions.iter().map(|(state, _)| *state);
    let frames: Vec<_> =
        states.flat_map(|state| (0..=0xff_u16).map(move |bits| (state, Flags::from_bits(bits)))).collect();
    let streams = apps.iter().flat_map(|app| (0..=6_u64).map(move |corr_id| (*app, corr_id)));
    for ((app, corr_id), (state, flags)) in streams.flat_map(|stream| frames.iter().map(move |frame| (stream, *frame)))
    {
        let (_, mut session) = sessions.iter().find(|(name, _)| *name == state).unwrap().clone();
        let daemon = crate::control::DaemonHello { name: "a".into(), incarnation: Default::default() };
        let payload = if state == "handshake of the dialler" {
            json(&HelloReply::of(daemon, 32))
        } else {
            json(&Hello::default())
        };
        let frame = Frame { code: 200, payload, ..frame(flags, AppProto(app), corr_id) };
        let before = format!("{session:?}");
        let got = session.handle_frame(frame, Millis(0));
        let table = if state == "backoff" { "active" } else { state };
        let want = ALLOWED
            .iter()
            .find(|(name, apps, pattern, streams, _)| {
                *name == table && apps.contains(&app) && streams.contains(&corr_id) && fits(pattern, flags)
            })
            .map(|(.., event)| *event);
        assert_eq!(got.as_ref().ok().map(what), want, "{state}: {flags:?} of protocol {app} on {corr_id}");
        if let Err(refusal) = got {
            assert_eq!(refusal.status.code(), 400);
            assert_eq!(format!("{session:?}"), before, "{state}: {flags:?} of protocol {app} on {corr_id}");
        }
        *seen.entry(want.unwrap_or("refused")).or_default() += 1;
    }
    assert_eq!(seen.len(), 9, "every outcome was there: {seen:?}");
}

/// F3: a START too many leaves the table as it was, and so does one that is too large for what
/// it asks (`node`), which never gets there.
#[test]
fn f3_a_start_past_the_bound_makes_no_stream() {
    let mut session = active();
    for n in 2..=MAX_STREAMS as u64 {
        let start = frame(Flags::REQ | Flags::START, AppProto::PUBSUB, 2 * n + 1);
        assert!(session.handle_frame(start.clone(), Millis(0)).is_ok());
        session.open_theirs(&start, ());
    }
    let before: Vec<u64> = session.streams().map(|(corr_id, _)| corr_id).collect();
    for n in 0..1_000 {
        let start = frame(Flags::REQ | Flags::START, AppProto::PUBSUB, 1_001 + 2 * n);
        assert_eq!(session.handle_frame(start, Millis(0)).unwrap_err().status.code(), 429);
    }
    assert_eq!(
        (before.len(), session.streams().map(|(corr_id, _)| corr_id).collect::<Vec<_>>()),
        (MAX_STREAMS, before)
    );
}

/// S6: numbers end at the end of u64, on either side, and none is used twice.
#[test]
fn s6_corr_id_never_wraps() {
    for (role, last) in [(Role::Dialler, u64::MAX), (Role::Acceptor, u64::MAX - 1)] {
        let (_, mut session) =
            in_every_state().into_iter().find(|(name, s)| name.starts_with("active") && s.role == role).unwrap();
        session.skip_to(last - 2);
        let mut open = || session.open_ours(AppProto::GOSSIP, TenantId(0), Bytes::new(), Bytes::new(), ());
        assert_eq!(
            [open(), open(), open(), open()].map(|start| start.map(|s| s.corr_id)),
            [Some(last - 2), Some(last), None, None]
        );
        if role == Role::Dialler {
            assert_eq!(session.handle_timeout(Millis(5_000)), Ok(Tick::Spent), "no number is left for a ping");
        }
    }
    let mut session = active();
    let start = |corr_id| frame(Flags::REQ | Flags::START, AppProto::PUBSUB, corr_id);
    assert!(matches!(session.handle_frame(start(u64::MAX), Millis(0)), Ok(Event::Start(_))));
    session.open_theirs(&start(u64::MAX), ());
    for corr_id in [u64::MAX, 1, 3, 5, u64::MAX - 2] {
        assert_eq!(session.handle_frame(start(corr_id), Millis(0)).unwrap_err().status.code(), 400, "{corr_id}");
    }
    assert!(matches!(
        session.handle_frame(frame(Flags::REQ, AppProto::PUBSUB, u64::MAX), Millis(0)),
        Ok(Event::Request(_))
    ));
    assert!(session.handle_frame(frame(Flags::REQ, AppProto::CONTROL, 5), Millis(0)).is_ok(), "a ping still works");
}

/// S6: a number that was used and is over is not used again, and what comes late for it is
/// dropped.
#[test]
fn s6_corr_id_is_not_reused() {
    let mut session = active();
    session.close_stream(3);
    let start = frame(Flags::REQ | Flags::START, AppProto::PUBSUB, 3);
    assert_eq!(session.handle_frame(start, Millis(0)).unwrap_err().status.code(), 400);
    assert_eq!(session.handle_frame(frame(Flags::REQ, AppProto::PUBSUB, 3), Millis(0)), Ok(Event::Nothing));
    assert_eq!(session.streams().count(), 0);
}

/// F4: a delay at its maximum overflows nothing, whenever it begins.
#[test]
fn f4_backoff_at_the_end_of_time() {
    for (delay, now) in [(u64::MAX, 0), (u64::MAX, u64::MAX), (1, u64::MAX - 1)] {
        let mut session = active();
        session.back_off(delay, Millis(now));
        assert_eq!(session.state(), State::Backoff);
        for hour in [0, 3_600_000, u64::MAX] {
            let _ = session.handle_timeout(Millis(now).after(hour));
            let _ = session.poll_timeout();
        }
    }
}
