//! S1 to S4: sessions and connections that take and do not give: slow readers, half-closed
//! ones, more than there are descriptors, and ones that go as soon as they came.

use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use overlay_core::config::{DaemonConfig, Profile};
use overlay_core::control::Open;
use overlay_core::frame::Flags;
use overlay_core::record::{Publish, Record};
use overlay_tests::daemon::Daemon;
use overlay_tests::http;
use overlay_tests::oap::{Offer, Tls, Wire, connect, hello, request};
use overlay_tests::on_both_profiles;
use overlay_tests::wait::{self, Look, now};
use rustix::net::sockopt::set_socket_recv_buffer_size;

use crate::probe::Probe;
use crate::target::{CLIENT, Target, scale};

on_both_profiles!(
    by crate::probe::run:
    s1_slow_readers_are_dropped_and_the_healthy_keep_all,
    s2_half_closed_and_silent_sessions_give_their_descriptors_back,
    s3_without_descriptors_it_is_live_and_not_ready,
    s4_connect_and_close_leaves_nothing,
);

const LIMIT: Duration = Duration::from_secs(60);
/// S1's topics: of large messages, and of small ones, of which there is one with every tenth.
const BULK: &str = "bulk";
const NEWS: &str = "news";
const NEWS_EVERY: usize = 10;

/// Caps for the full size of a row, on whichever profile.
fn hold_thousands(config: &mut DaemonConfig) {
    config.overlay.max_sessions = 20_000;
    config.overlay.memory_bytes = 1 << 30;
    config.overlay.rps = 1_000_000;
}

/// A session that subscribes to `topic`, by TLS.
fn subscribed(daemon: &Daemon, offer: &Offer, topic: &str) -> Result<Tls> {
    let mut wire = offer.connect(daemon.address)?;
    // Little room for what it does not read, so that it is soon full.
    set_socket_recv_buffer_size(&wire.stream.sock, 16 * 1024)?;
    wire.hello()?;
    let code = wire.start(3, &Open::Subscribe { topics: vec![topic.parse()?] }, daemon.token(CLIENT)?)?;
    ensure!(code == 200, "the subscription got {code}");
    Ok(wire)
}

/// Reads until the message that says that it is the last; how many came, and how many are said
/// to be missing. Counts those of `all` readers as they come.
fn read_all(mut wire: Tls, all: &Arc<AtomicUsize>) -> JoinHandle<Result<(usize, usize)>> {
    let all = Arc::clone(all);
    thread::spawn(move || {
        let (mut came, mut missed) = (0, 0);
        loop {
            let frame = wire.receive()?.context("a healthy subscriber was dropped")?;
            match Record::decode(frame.payload).context("not a record")? {
                Record::Message { payload, .. } if payload.is_empty() => return Ok((came, missed)),
                Record::Message { .. } => {
                    came += 1;
                    all.fetch_add(1, Ordering::Relaxed);
                }
                Record::Gap { missed: more } => missed += more as usize,
                other => bail!("{other:?}"),
            }
        }
    })
}

/// S1, I-2, I-5: some subscribers stop reading, some read a byte now and then: the deadline for
/// bytes to leave drops them, however much they read, and the healthy get everything: those of
/// the same topic, and those of another, who in full size are many.
fn s1_slow_readers_are_dropped_and_the_healthy_keep_all(profile: Profile) -> Result<()> {
    let (slow, messages) = (scale(3, 100), 120);
    let healthy = [(BULK, 9, messages), (NEWS, scale(3, 891), messages / NEWS_EVERY)];
    let mut target = Target::start(profile, |config| {
        config.overlay.write_timeout_ms = 1_000;
        // Who hears news alone hears nothing for a while.
        config.overlay.idle_timeout_ms = 600_000;
        config.gossip.lane_depth_frames = 4_096;
        hold_thousands(config);
    })?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(CLIENT)?);
    let timeouts = target.rejected("timeout")?;
    let mut stopped = Vec::new();
    let mut trickling = Vec::new();
    for n in 0..slow {
        if n % 2 == 0 { &mut stopped } else { &mut trickling }.push(subscribed(&target, &offer, BULK)?);
    }
    let came: [Arc<AtomicUsize>; 2] = Default::default();
    let mut readers = Vec::new();
    for ((topic, count, expected), came) in healthy.iter().zip(&came) {
        for _ in 0..*count {
            readers.push((*expected, read_all(subscribed(&target, &offer, topic)?, came)));
        }
    }

    let mut publisher = Wire::local(&target.socket())?;
    for (stream, topic) in [(3, BULK), (5, NEWS)] {
        ensure!(publisher.start(stream, &Open::Publish { topic: topic.parse()? }, target.local_token()?)? == 200);
    }
    let mut publish = |stream: u64, bytes: usize| -> Result<()> {
        let message = Publish::Message(Bytes::from(vec![7; bytes])).encode();
        publisher.send(&request(stream, Flags::default(), message))?;
        let code = publisher.receive()?.context("the publisher was dropped")?.code;
        ensure!(code == 200, "a message got {code}");
        Ok(())
    };
    for n in 1..=messages {
        let news = n % NEWS_EVERY == 0;
        publish(3, 60_000)?;
        if news {
            publish(5, 256)?;
        }
        // As fast as the healthy take it: the probe is to feel slow readers, not a full machine.
        wait::until_true("the healthy to have it", LIMIT, || {
            let sent = [n, n / NEWS_EVERY];
            Ok(healthy.iter().zip(sent).zip(&came).all(|((h, sent), came)| came.load(Ordering::Relaxed) >= sent * h.1))
        })?;
        for wire in &mut trickling {
            // Of the socket, not of TLS: a byte a turn, whatever it is.
            let _ = wire.stream.sock.read(&mut [0]);
        }
        // And where they are many so seldom that it is not what a hundredth of the probe's messages
        // waits for: a thousand deliveries at once are work that honest clients ask for.
        wait::throughout("the next to be due", Duration::from_millis(scale(0, 2_000) as u64), || Ok(true))?;
    }
    wait::until("the slow ones to be dropped", LIMIT, || {
        for wire in &mut trickling {
            wire.stream.sock.set_nonblocking(true)?;
            let _ = wire.stream.sock.read(&mut [0]);
        }
        let dropped = target.rejected("timeout")? - timeouts;
        Ok(if dropped == slow as f64 { Look::Holds(()) } else { Look::NotYet(format!("{dropped} were")) })
    })?;
    // The probe, the publisher, the healthy.
    let count = readers.len();
    target.until_connections(2 + count)?;
    for stream in [3, 5] {
        publish(stream, 0)?;
    }
    for (expected, reader) in readers {
        let (came, missed) = reader.join().map_err(|_| anyhow!("a reader panicked"))??;
        ensure!((came, missed) == (expected, 0), "a healthy one got {came} of {expected}, {missed} said to be missing");
    }
    println!("s1: {slow} slow readers dropped, {count} healthy ones got all their messages");
    drop(stopped);
    target.survived(&probe.finish("s1")?)
}

/// S2, I-2: a FIN without reading, a HELLO and then silence, and a handshake and then nothing:
/// each descriptor is given back, by the other side's FIN or by a deadline.
fn s2_half_closed_and_silent_sessions_give_their_descriptors_back(profile: Profile) -> Result<()> {
    let count = scale(20, 500);
    let mut target = Target::start(profile, |config| {
        config.overlay.idle_timeout_ms = 1_000;
        config.overlay.handshake_timeout_ms = 2_000;
        hold_thousands(config);
    })?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(CLIENT)?);
    let mut held = Vec::new();
    for _ in 0..count {
        // FIN, and never a read.
        let wire = subscribed(&target, &offer, "probe")?;
        wire.stream.sock.shutdown(Shutdown::Write)?;
        held.push(wire);
        // Silence after HELLO, and after a subscription to nothing.
        held.push(offer.greet(target.address)?.0);
        held.push(subscribed(&target, &offer, "nothing")?);
        // TLS, and no HELLO.
        let mut wire = offer.connect(target.address)?;
        wire.stream.conn.complete_io(&mut wire.stream.sock)?;
        held.push(wire);
    }
    target.until_connections(1)?;
    println!("s2: {} half-closed and silent sessions gave their descriptors back", held.len());
    target.survived(&probe.finish("s2")?)
}

/// S3, I-6: with no descriptor left for connections the daemon lives, answers admin HTTP, says
/// that it is not ready, and does not fill its log; as soon as there are descriptors again, so is
/// it. Where the system has none left for anything (EMFILE), it does not spin. Sessions that are
/// there notice nothing.
fn s3_without_descriptors_it_is_live_and_not_ready(profile: Profile) -> Result<()> {
    const MOST_ERRORS_A_SECOND: f64 = 100.0;
    let mut target = Target::start_under(profile, &["prlimit", "--nofile=128:128", "--"], |config| {
        // The silent ones stay, until the test lets go of them.
        config.overlay.handshake_timeout_ms = 120_000;
    })?;
    let probe = Probe::start(&target)?;
    let log = target.process.log().lines().count();
    let (errors, begin) = (target.metric("overlay_accept_errors_total")?, now());
    let mut held = Vec::new();
    for _ in 0..scale(500, 1_000) {
        // Past what waits to be accepted the system lets nobody in.
        if let Ok(stream) = TcpStream::connect_timeout(&target.address, Duration::from_millis(5)) {
            held.push(stream);
        }
    }
    wait::until_true("it to say that it is not ready", LIMIT, || {
        ensure!(http::get(target.admin, "/healthz")?.status == 200, "it is live");
        Ok(!target.is_ready())
    })?;
    wait::throughout("admin HTTP to answer", Duration::from_secs(3), || {
        Ok(http::get(target.admin, "/healthz")?.status == 200)
    })?;
    let rate = (target.metric("overlay_accept_errors_total")? - errors) / (now() - begin).as_secs_f64();
    ensure!(rate <= MOST_ERRORS_A_SECOND, "{rate} errors a second");
    let held_open = held.len();
    held.clear();
    wait::until_true("it to be ready again", LIMIT, || Ok(target.is_ready()))?;
    target.until_connections(1)?;

    // It may open nothing more than it has open now.
    let (errors, begin) = (target.metric("overlay_accept_errors_total")?, now());
    target.process.limit_descriptors(target.process.descriptors()?)?;
    for _ in 0..20 {
        held.push(TcpStream::connect(target.address)?);
    }
    wait::throughout("no descriptor to be left", Duration::from_secs(2), || Ok(true))?;
    target.process.limit_descriptors(128)?;
    wait::until_true("admin HTTP to answer", LIMIT, || Ok(http::get(target.admin, "/healthz").is_ok()))?;
    let rate = (target.metric("overlay_accept_errors_total")? - errors) / (now() - begin).as_secs_f64();
    let lines = target.process.log().lines().count() - log;
    println!("s3: {held_open} connections held open; {rate:.1} errors of accept a second; {lines} log lines");
    ensure!(rate > 0.0 && rate <= MOST_ERRORS_A_SECOND, "{rate} errors a second");
    ensure!(lines <= 20, "{lines} lines:\n{}", target.process.log_tail());
    drop(held);
    wait::until_true("it to be ready again", LIMIT, || Ok(target.is_ready()))?;
    target.offer(CLIENT)?.greet(target.address).context("an honest handshake afterwards")?;
    // Writes are shed for as long as there are no descriptors: late, and all there.
    target.survived(&probe.finish_shed("s3")?)
}

/// S4: connections that go at once, at every stage, leave no descriptor, no session and no
/// series behind.
fn s4_connect_and_close_leaves_nothing(profile: Profile) -> Result<()> {
    const ROUNDS: usize = 24;
    let (bare, handshakes) = (scale(1_000, 75_000), scale(100, 4_200));
    let mut target = Target::start(profile, |_| {})?;
    let probe = Probe::start(&target)?;
    let offer = target.offer(CLIENT)?;
    let (config, hello_bytes) = (Arc::new(offer.config()?), offer.client_hello()?);
    let series = target.series()?;
    for _round in 0..ROUNDS {
        for n in 0..bare {
            let mut stream = TcpStream::connect(target.address)?;
            if n % 2 == 0 {
                std::io::Write::write_all(&mut stream, &hello_bytes[..n % hello_bytes.len()])?;
            }
        }
        for n in 0..handshakes {
            let mut wire = connect(Arc::clone(&config), target.address)?;
            match n % 3 {
                0 => drop(wire.hello()?),
                // Gone before the answer.
                1 => wire.send(&hello())?,
                _ => drop(wire.stream.conn.complete_io(&mut wire.stream.sock)?),
            }
            drop(Wire::local(&target.socket())?);
        }
        target.until_connections(1)?;
    }
    wait::until_true("as many sessions closed as opened, but one", LIMIT, || {
        Ok(target.metric("session_open_total")? == target.metric("session_close_total")? + 1.0)
    })?;
    ensure!(target.metric("overlay_sessions_active")? == 1.0);
    ensure!(target.series()? == series, "{} series, not {series}", target.series()?);
    println!("s4: {} connections", ROUNDS * (bare + 2 * handshakes));
    target.survived(&probe.finish("s4")?)
}
