//! T1, T7, T8, T9, T10, M1: what costs a daemon something over QUIC before anybody has shown who they are, and
//! what a stream may cost it afterwards.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bytes::BytesMut;
use overlay_core::codec;
use overlay_core::config::{DaemonConfig, Profile, Transport};
use overlay_core::memory::{QUIC_BYTES, QUIC_WINDOW_BYTES, SESSION_BYTES};
use overlay_tests::oap::{Offer, Wire, hello};
use overlay_tests::packets::{Attacker, Came, Level, parameters, varint};
use overlay_tests::quic;
use overlay_tests::wait::{self, Look};
use rustls::client::Resumption;

use crate::probe::{self, Probe};
use crate::target::{Target, scale};

probe::rows!(
    t1_half_hellos_over_quic_give_way,
    t7_handshakes_over_quic_in_mass_are_taken_a_few_at_a_time,
    t8_truncated_transport_parameters_are_refused,
    t8_duplicate_initials_are_answered_three_times_at_most,
    t8_callers_must_show_their_address_when_handshakes_are_many,
    t8_what_is_no_packet_is_not_reflected,
    t9_gapped_fragments_are_bounded_and_closed,
    t9_past_the_window_is_closed,
    t10_early_data_over_quic_opens_nothing,
    t9_a_withheld_prefix_is_silence,
);

const LIMIT: Duration = Duration::from_secs(60);
/// For an answer that is expected to come, and for one that may not.
const ANSWER: Duration = Duration::from_secs(30);
const MAYBE: Duration = Duration::from_millis(20);
/// Who shakes hands honestly.
const HONEST: &str = "spiffe://overlay.test/ns/test/client/honest";

fn target(change: impl FnOnce(&mut DaemonConfig)) -> Result<Target> {
    Target::start(Profile::Macronode, |config| {
        config.overlay.listen_quic = Some(config.overlay.listen);
        change(config);
    })
}

fn attacker(target: &Target, offer: &Offer, parameters: Vec<u8>) -> Result<Attacker> {
    Attacker::new(offer.config()?, parameters, target.listens(Transport::Quic)?)
}

fn is_honest_served(target: &Target, offer: &Offer) -> Result<()> {
    offer.greet_over(Transport::Quic, target.listens(Transport::Quic)?).map(drop)
}

/// Takes in what comes for now. Whether the daemon closed.
fn drain(attacker: &mut Attacker) -> Result<bool> {
    let mut closed = false;
    loop {
        let came = attacker.receive(MAYBE)?;
        closed |= came.iter().any(|came| matches!(came, Came::Closed(_)));
        if came.contains(&Came::Nothing) {
            return Ok(closed);
        }
    }
}

/// T1: callers that send half a hello and no more, over and over: each gives way to the next, and
/// honest handshakes beside them all succeed, though there are many more of the silent than
/// handshakes that may be under way.
fn t1_half_hellos_over_quic_give_way() -> Result<()> {
    let mut target = target(|config| config.overlay.max_handshakes_in_flight = 4)?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let mut silent = Vec::new();
    for number in 0..scale(200, 5_000) {
        let mut attacker = attacker(&target, &offer, parameters())?;
        let hello = attacker.hello();
        attacker.half(&hello)?;
        if number % 10 == 9 {
            is_honest_served(&target, &offer)?;
        }
        silent.push((attacker, hello));
    }
    // Who is asked for its address shows it, and still says only half.
    let mut asked = 0;
    for (attacker, hello) in &mut silent {
        if attacker.receive(MAYBE)?.contains(&Came::Retry) {
            attacker.half(hello)?;
            asked += 1;
        }
        ensure!(attacker.received <= 3 * attacker.sent, "{} for {}", attacker.received, attacker.sent);
    }
    // As many wait as may: an honest one may be told to come again.
    wait::until_true("an honest handshake", LIMIT, || Ok(is_honest_served(&target, &offer).is_ok()))?;
    println!("t1: {} callers said half a hello over QUIC, {asked} were asked for their address", silent.len());
    target.survived(&probe.finish("t1")?)
}

/// T7: handshakes over QUIC in mass, none of which goes on after its hello: so many at a time, the
/// rest is asked for its address or refused; who is honest is served in the end.
fn t7_handshakes_over_quic_in_mass_are_taken_a_few_at_a_time() -> Result<()> {
    let mut target = target(|config| {
        config.overlay.max_handshakes_in_flight = 4;
        config.overlay.handshake_timeout_ms = 1_000;
    })?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    probe.beside(|| {
        let (mut all, mut asked) = (Vec::new(), 0);
        for _ in 0..scale(300, 5_000) {
            let mut attacker = attacker(&target, &offer, parameters())?;
            attacker.begin()?;
            all.push(attacker);
        }
        for attacker in &mut all {
            asked += usize::from(attacker.receive(MAYBE)?.contains(&Came::Retry));
            ensure!(attacker.received <= 3 * attacker.sent, "{} for {}", attacker.received, attacker.sent);
        }
        ensure!(asked > all.len() / 2, "{asked} of {} were asked for their address", all.len());
        wait::until_true("an honest handshake", LIMIT, || Ok(is_honest_served(&target, &offer).is_ok()))?;
        println!("t7: {asked} of {} handshakes over QUIC were asked for their address", all.len());
        Ok(())
    })?;
    target.survived(&probe.finish("t7")?)
}

/// T8: transport parameters cut off at every byte, and their numbers at the edges: refused with
/// an error of QUIC, never by a panic, and honest clients are served throughout.
fn t8_truncated_transport_parameters_are_refused() -> Result<()> {
    let mut target = target(|_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let whole = parameters();
    let mut bad: Vec<Vec<u8>> = (0..whole.len()).map(|end| whole[..end].to_vec()).collect();
    // Each parameter that is a number, with the largest one, none, and twice.
    for id in [0x01, 0x03, 0x04, 0x05, 0x08, 0x0a, 0x0b, 0x0e] {
        for value in [&[0xff; 8][..], &[]] {
            let mut more = whole.clone();
            varint(&mut more, id);
            varint(&mut more, value.len() as u64);
            more.extend_from_slice(value);
            bad.push(more);
        }
    }
    let mut refused = 0;
    for parameters in bad {
        let mut attacker = attacker(&target, &offer, parameters.clone())?;
        attacker.begin()?;
        refused += usize::from(drain(&mut attacker)?);
        ensure!(attacker.received <= 3 * attacker.sent, "{} for {}", attacker.received, attacker.sent);
    }
    // Cut between two parameters they are whole, but for the client's name that is missing then.
    ensure!(refused >= whole.len(), "{refused} were refused");
    is_honest_served(&target, &offer)?;
    println!("t8: {refused} sets of transport parameters were refused");
    target.survived(&probe.finish("t8")?)
}

/// T8: a ClientHello again and again, from an address that never answers: never more than three
/// times as much comes back, until the deadline of the handshake ends it.
fn t8_duplicate_initials_are_answered_three_times_at_most() -> Result<()> {
    let mut target = target(|_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let refused = target.rejected("timeout")?;
    // One who says it once, and is told again and again by a daemon that hears nothing.
    let mut once = attacker(&target, &offer, parameters())?;
    once.begin()?;
    wait::until_true("the handshake to be given up", LIMIT, || {
        drain(&mut once)?;
        Ok(target.rejected("timeout")? == refused + 1.0)
    })?;
    drain(&mut once)?;
    ensure!(once.received > 0 && once.received <= 3 * once.sent, "{} for {}", once.received, once.sent);
    let mut silent = attacker(&target, &offer, parameters())?;
    let hello = silent.hello();
    let datagrams = silent.say(Level::Initial, &hello)?;
    let say = |silent: &mut Attacker| datagrams.iter().try_for_each(|datagram| silent.send(datagram));
    say(&mut silent)?;
    // Once more, every byte of it, as a reflector's victim would be made to seem to ask: each time
    // that the handshake was given up, another one.
    for _ in 0..scale(100, 10_000) {
        say(&mut silent)?;
        silent.receive(Duration::from_millis(1))?;
        ensure!(silent.received <= 3 * silent.sent, "{} for {}", silent.received, silent.sent);
    }
    let known = target.rejected("timeout")?;
    // Asked on, for one that was given up is deaf for a while, and the next begins after it.
    wait::until_true("the last of them to be given up", LIMIT, || {
        say(&mut silent)?;
        drain(&mut silent)?;
        Ok(target.rejected("timeout")? > known)
    })?;
    drain(&mut silent)?;
    ensure!(silent.received <= 3 * silent.sent, "{} for {}", silent.received, silent.sent);
    println!(
        "t8: {} bytes came back for {}, and for {} sent once {}",
        silent.received, silent.sent, once.sent, once.received
    );
    is_honest_served(&target, &offer)?;
    target.survived(&probe.finish("t8")?)
}

/// T8: what is no packet, of another version, or of no connection, in every size: never more comes
/// back than was sent.
fn t8_what_is_no_packet_is_not_reflected() -> Result<()> {
    let mut target = target(|_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let mut stranger = attacker(&target, &offer, parameters())?;
    for first in [0x00, 0x40, 0x7f, 0x80, 0xc0, 0xd0, 0xe0, 0xf0, 0xff] {
        for version in [[0; 4], [0, 0, 0, 1], [0x0a; 4], [0xff, 0, 0, 29]] {
            for size in [1, 5, 6, 20, 21, 43, 100, 1_199, 1_200, 1_400] {
                let mut datagram = vec![first];
                datagram.extend(version);
                datagram.extend([20; 1_400]);
                datagram.truncate(size);
                let before = stranger.received_bytes(Duration::from_millis(1))?;
                stranger.send(&datagram)?;
                let after = stranger.received_bytes(Duration::from_millis(2))?;
                ensure!(after - before <= 3 * size, "{} for {size} of {first:#x}", after - before);
            }
        }
    }
    println!("t8: {} bytes came back for {}", stranger.received, stranger.sent);
    ensure!(stranger.received <= stranger.sent, "{} for {}", stranger.received, stranger.sent);
    is_honest_served(&target, &offer)?;
    target.survived(&probe.finish("t8")?)
}

/// T8: with every handshake taken by callers who do not go on, the next is asked to show its
/// address, for less than it sent; who does is served, and so are honest ones.
fn t8_callers_must_show_their_address_when_handshakes_are_many() -> Result<()> {
    let mut target = target(|config| config.overlay.max_handshakes_in_flight = 2)?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let mut stuck = Vec::new();
    for _ in 0..2 {
        let mut attacker = attacker(&target, &offer, parameters())?;
        attacker.begin()?;
        // Its hello was taken: it has been answered.
        ensure!(attacker.receive(ANSWER)? != [Came::Nothing], "no answer");
        stuck.push(attacker);
    }
    let mut asked = attacker(&target, &offer, parameters())?;
    let hello = asked.hello();
    let first = asked.say(Level::Initial, &hello)?.remove(0);
    asked.send(&first)?;
    ensure!(asked.receive(ANSWER)? == [Came::Retry] && asked.received < asked.sent, "{} bytes", asked.received);
    // A token of somebody else's making.
    let mut forger = attacker(&target, &offer, parameters())?;
    forger.token = vec![7; asked.token.len()];
    forger.begin()?;
    drain(&mut forger)?;
    ensure!(!forger.ready && forger.received <= forger.sent, "{} for {}", forger.received, forger.sent);
    for datagram in asked.say(Level::Initial, &hello)? {
        asked.send(&datagram)?;
    }
    is_honest_served(&target, &offer)?;
    target.survived(&probe.finish("t8")?)
}

/// A session of an attacker's, HELLO answered; and from where on its stream goes.
fn greeted(target: &Target, offer: &Offer) -> Result<(Attacker, u64)> {
    let mut attacker = attacker(target, offer, parameters())?;
    attacker.shake(ANSWER)?;
    let greeting = codec::encoded(&hello())?;
    attacker.send_frames([Attacker::stream_frame(0, &greeting)])?;
    let mut read = BytesMut::new();
    loop {
        for came in attacker.receive(ANSWER)? {
            match came {
                Came::Stream(bytes) => read.extend_from_slice(&bytes),
                Came::Closed(code) => bail!("the daemon closed: {code:#x}"),
                Came::Nothing => bail!("HELLO is not answered"),
                Came::Retry | Came::Other => {}
            }
        }
        attacker.acknowledge(Level::Session)?;
        if let Some(answer) = codec::decode(&mut read)? {
            ensure!(answer.code == 200, "HELLO got {}", answer.code);
            return Ok((attacker, greeting.len() as u64));
        }
    }
}

/// T9: a stream in fragments of a byte with gaps between them, its next byte withheld. The daemon
/// closes the connection, and holds no more than the window for it, on hundreds of them at once.
fn t9_gapped_fragments_are_bounded_and_closed() -> Result<()> {
    let mut target = target(|_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let count = scale(32, 256);
    let mut attackers = Vec::new();
    for _ in 0..count {
        attackers.push(greeted(&target, &offer)?);
    }
    let before = target.resident_kib()?;
    let mut most = before;
    for (attacker, start) in &mut attackers {
        let offsets = (0..QUIC_WINDOW_BYTES / 2 - 64).map(|n| *start + 2 * n + 1);
        for chunk in offsets.collect::<Vec<_>>().chunks(2_000) {
            attacker.send_frames(chunk.iter().map(|offset| Attacker::stream_frame(*offset, b"x")))?;
        }
        most = most.max(target.resident_kib()?);
    }
    // All of them in turn: one that is not read from for as long as the others take overflows its
    // socket, and the word that it is closed is said once.
    wait::until("the daemon to close them", LIMIT, || {
        let mut open = Vec::new();
        for (mut attacker, start) in std::mem::take(&mut attackers) {
            if !drain(&mut attacker)? {
                open.push((attacker, start));
            }
        }
        attackers = open;
        Ok(if attackers.is_empty() { Look::Holds(()) } else { Look::NotYet(format!("{} open", attackers.len())) })
    })?;
    let cap = QUIC_WINDOW_BYTES / 1_024 * count as u64 + 8 * 1_024;
    println!("t9: {count} connections in fragments took {} KiB, of {cap} KiB", most - before);
    ensure!(most - before <= cap, "{} KiB for {count} connections", most - before);
    target.survived(&probe.finish("t9")?)
}

/// T9: the same in few large fragments, which no rule of QUIC's forbids: they fit the window, and
/// the session ends for its silence.
fn t9_a_withheld_prefix_is_silence() -> Result<()> {
    let mut target = target(|config| config.overlay.idle_timeout_ms = 1_000)?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let (mut attacker, start) = greeted(&target, &offer)?;
    let mut number = 0;
    wait::until_true("the daemon to close it", LIMIT, || {
        // Again and again, so that QUIC itself has no reason to think it gone.
        number = (number + 1) % 50;
        attacker.send_frames([Attacker::stream_frame(start + 1 + number * 1_000, &[7; 1_000])])?;
        drain(&mut attacker)
    })?;
    target.survived(&probe.finish("t9")?)
}

/// T9: past what the daemon allows, in bytes or in streams: closed at once.
fn t9_past_the_window_is_closed() -> Result<()> {
    let mut target = target(|_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let second_stream = |_| [&[0x0a, 4, 1][..], b"x"].concat();
    let past = |start| Attacker::stream_frame(start + QUIC_WINDOW_BYTES + 1, b"x");
    let far = |_| Attacker::stream_frame((1 << 62) - 2, b"x");
    let frames: [&dyn Fn(u64) -> Vec<u8>; 3] = [&second_stream, &past, &far];
    probe.beside(|| {
        for frame in frames {
            let (mut attacker, start) = greeted(&target, &offer)?;
            attacker.send_frames([frame(start)])?;
            wait::until_true("the daemon to close it", LIMIT, || drain(&mut attacker))?;
        }
        Ok(())
    })?;
    is_honest_served(&target, &offer)?;
    target.survived(&probe.finish("t9")?)
}

/// T10: no ticket is given, so nobody has keys for early data; what is sent as such all the same
/// opens no session, and its HELLO is not answered.
fn t10_early_data_over_quic_opens_nothing() -> Result<()> {
    let mut target = target(|_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let address = target.listens(Transport::Quic)?;
    let mut config = offer.config()?;
    config.resumption = Resumption::in_memory_sessions(8);
    let greet = |stream| Wire::new(stream).hello().map(drop);
    ensure!(!quic::could_send_early_data(config, address, greet, ANSWER)?, "it gave a ticket");

    let (opened, refused) = (target.metric("session_open_total")?, target.rejected("timeout")?);
    let mut early = attacker(&target, &offer, parameters())?;
    let hello_bytes = early.hello();
    let frame = Attacker::stream_frame(0, &codec::encoded(&hello())?);
    for datagram in early.say(Level::Initial, &hello_bytes)? {
        let data = early.datagram(Level::Early, frame.clone())?;
        early.send(&[datagram, data].concat())?;
    }
    let mut streamed = false;
    wait::until_true("the handshake to be given up", LIMIT, || {
        streamed |= early.receive(MAYBE)?.iter().any(|came| matches!(came, Came::Stream(_)));
        Ok(target.rejected("timeout")? == refused + 1.0)
    })?;
    ensure!(!streamed, "something on a stream came back");
    ensure!(target.metric("session_open_total")? == opened, "a session was opened");
    target.survived(&probe.finish("t10")?)
}

/// M1: sessions at rest take less than is claimed for them, and what is claimed is given back.
#[test]
fn m1_sessions_over_quic_take_what_is_claimed() -> Result<()> {
    let mut target = target(|_| {})?;
    let (offer, address) = (target.offer(HONEST)?, target.listens(Transport::Quic)?);
    let count = scale(100, 2_000);
    let memory = || target.metric("overlay_memory_bytes");
    wait::until_true("nothing to be claimed", LIMIT, || Ok(memory()? == 0.0))?;
    let before = target.resident_kib()?;
    let mut sessions = Vec::new();
    for _ in 0..count {
        sessions.push(offer.greet_over(Transport::Quic, address)?);
    }
    let claim = count as u64 * (SESSION_BYTES + QUIC_BYTES);
    wait::until_true("all of them to be claimed for", LIMIT, || Ok(memory()? >= claim as f64))?;
    let taken = target.resident_kib()?.saturating_sub(before);
    println!("m1: {count} sessions over QUIC take {taken} KiB, {} KiB are claimed", claim / 1_024);
    ensure!(taken * 1_024 <= claim, "{taken} KiB for {count} sessions");
    drop(sessions);
    wait::until_true("it to be given back", LIMIT, || Ok(memory()? == 0.0))?;
    target.assert_alive()?;
    target.until_memory_is_back(before)
}
