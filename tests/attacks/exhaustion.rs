//! M1: more than there is memory for, in every way that a session can hold some.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::codec;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::{CHUNK, Flags, MAX_BODY};
use overlay_core::record::{Piece, Publish};
use overlay_tests::oap::{Heard, Wire, request};
use overlay_tests::on_both_profiles;
use overlay_tests::{http, wait};

use crate::probe::Probe;
use crate::target::{Target, scale};

on_both_profiles!(m1_more_than_memory_is_refused_and_nothing_is_killed, m1_topics_without_number_are_refused);

const LIMIT: Duration = Duration::from_secs(60);

/// What the daemon may hold for sessions, queues, uploads and messages: in full, ten thousand
/// sessions fit, and queues for them.
fn budget() -> u64 {
    scale(48 << 20, 512 << 20) as u64
}

/// A session that publishes, or subscribes, to `t`.
fn session(target: &Target, open: &Open) -> Result<Wire<UnixStream>> {
    let mut wire = Wire::local(&target.socket())?;
    let code = wire.start(3, open, target.local_token()?)?;
    ensure!(code == 200, "the stream got {code}");
    wire.stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    Ok(wire)
}

fn publish() -> Result<Open> {
    Ok(Open::Publish { topic: "t".parse()? })
}

/// Waits until it is ready, and takes writes.
fn recovered(target: &Target) -> Result<()> {
    wait::until_true("it to be ready and to take writes", LIMIT, || {
        Ok(target.is_ready() && session(target, &publish()?).is_ok())
    })
}

/// The code that the next answer carries; none where the session ended.
fn next_code(wire: &mut Wire<UnixStream>) -> Result<Option<u16>> {
    Ok(match wire.poll()? {
        Heard::Frame(frame) => Some(frame.code),
        Heard::Closed => None,
        Heard::Nothing => anyhow::bail!("no answer came"),
    })
}

/// M1, I-5, I-6, P-2: uploads that would take many times the budget, frames that stop before
/// their last byte, and queues that nobody empties: what is past the budget is refused,
/// writes first; memory stays within the bound; who was there goes on being answered; and
/// afterwards everything is as it was. An honest client that was there gets all its messages.
fn m1_more_than_memory_is_refused_and_nothing_is_killed(profile: Profile) -> Result<()> {
    let count = scale(300, 10_000);
    // Past this the system gives the process no more, and it would abort.
    let limit = format!("--data={0}:{0}", 8 * budget());
    let mut target = Target::start_under(profile, &["prlimit", &limit, "--"], |config| {
        config.overlay.memory_bytes = budget();
        config.gossip.store_bytes = 8 << 20;
        config.overlay.max_sessions = 20_000;
        config.overlay.rps = 1_000_000;
        config.overlay.per_peer_rps = 1_000_000;
        config.overlay.inflight = 100_000;
        config.overlay.read_timeout_ms = 20_000;
        config.overlay.write_timeout_ms = 20_000;
        config.overlay.idle_timeout_ms = 120_000;
    })?;
    let probe = Probe::start(&target)?;
    let base = target.resident_kib()?;
    let log = target.process.log().lines().count();
    let mut held = Vec::new();
    let mut peak = base;

    // Uploads: each of 1 MiB, a chunk short.
    let begin = Publish::Begin { size: MAX_BODY as u32, hash: [7; 32] }.encode();
    let mut refused = 0;
    for _ in 0..count {
        let Ok(mut wire) = session(&target, &publish()?) else {
            refused += 1;
            continue;
        };
        wire.send(&request(3, Flags::default(), begin.clone()))?;
        for index in 0..15 {
            let piece = Publish::Piece(Piece { hash: [7; 32], index, bytes: Bytes::from(vec![1; CHUNK]) });
            // A session that is refused may be closed meanwhile.
            let _ = wire.send(&request(3, Flags::default(), piece.encode()));
        }
        held.push(wire);
        peak = peak.max(target.resident_kib()?);
    }
    println!("m1: {count} uploads of 1 MiB: KiB resident {base} before, {peak} at most; {refused} not begun");
    ensure!(target.rejected("degraded")? > 0.0, "no write was shed");
    ensure!(target.is_ready(), "writes are shed so that it stays ready");
    ensure!(http::get(target.admin, "/healthz")?.status == 200, "it is live");
    held.clear();
    recovered(&target)?;

    // Frames of 1 MiB, all but the last byte.
    let piece = request(3, Flags::default(), Bytes::from(vec![1; (1 << 20) - 38]));
    let bytes = codec::encoded(&piece)?;
    for _ in 0..count {
        let Ok(mut wire) = session(&target, &publish()?) else { continue };
        let _ = wire.stream.write_all(&bytes[..bytes.len() - 1]);
        held.push(wire);
        peak = peak.max(target.resident_kib()?);
    }
    println!("m1: {count} frames of 1 MiB that stop: {peak} KiB at most");
    held.clear();
    recovered(&target)?;

    // Queues that nobody empties. Who publishes is there before sessions take all there is.
    let mut publisher = session(&target, &publish()?)?;
    let subscribe = Open::Subscribe { topics: vec!["t".parse()?] };
    for _ in 0..count {
        held.extend(session(&target, &subscribe).ok());
    }
    ensure!(held.len() >= count / 4, "{} of {count} subscribed", held.len());
    let (mut accepted, mut shed) = (0, 0);
    for _ in 0..2_000 {
        let message = Publish::Message(Bytes::from(vec![1; 60_000])).encode();
        publisher.send(&request(3, Flags::default(), message))?;
        match next_code(&mut publisher)?.context("the publisher was dropped")? {
            200 => accepted += 1,
            503 => shed += 1,
            code => anyhow::bail!("a message got {code}"),
        }
        if accepted % 100 == 0 {
            peak = peak.max(target.resident_kib()?);
        }
    }
    println!(
        "m1: {} queues that nobody reads: {accepted} messages accepted, {shed} shed; {peak} KiB at most",
        held.len()
    );
    ensure!(accepted > 0 && shed > 0, "{accepted} were accepted, {shed} shed");
    let most = base + budget() / 1024 * 11 / 10;
    ensure!(peak <= most, "{peak} KiB resident, more than {most}");
    held.clear();
    recovered(&target)?;
    let seen = probe.finish_shed("m1")?;
    let lines = target.process.log().lines().count() - log;
    ensure!(lines <= 40, "{lines} lines of log:\n{}", target.process.log_tail());
    target.survived(&seen)
}

/// M1, P-2: subscriptions to topics that nobody publishes on take memory too: what is past the
/// budget is refused with a time to come back, and all of it comes back with the sessions. I-6:
/// nothing that sheds writes helps against those, so that `/readyz` says no, and yes afterwards.
fn m1_topics_without_number_are_refused(profile: Profile) -> Result<()> {
    let sessions = scale(10, 100);
    let mut target = Target::start(profile, |config| {
        config.overlay.memory_bytes = budget();
        config.gossip.store_bytes = 8 << 20;
        config.overlay.rps = 1_000_000;
        config.overlay.per_peer_rps = 1_000_000;
        config.overlay.idle_timeout_ms = 120_000;
    })?;
    let (base, token) = (target.resident_kib()?, target.local_token()?);
    let (mut taken, mut refused) = (0, 0);
    let mut held = (0..sessions).map(|_| Wire::local(&target.socket())).collect::<Result<Vec<_>>>()?;
    for (session, wire) in held.iter_mut().enumerate() {
        for stream in 0..250 {
            let topic = |n| format!("{session}/{stream}/{n}/{}", "x".repeat(225)).parse();
            let topics = (0..64).map(topic).collect::<Result<Vec<_>, _>>()?;
            match wire.start(2 * stream + 3, &Open::Subscribe { topics }, token.clone())? {
                200 => taken += 1,
                503 => refused += 1,
                code => anyhow::bail!("a subscription got {code}"),
            }
        }
    }
    let (peak, used) = (target.resident_kib()?, target.metric("overlay_memory_bytes")?);
    println!(
        "m1: {taken} subscriptions to 64 topics taken, {refused} refused; KiB resident {base} before, {peak} then, \
         {used} bytes in the account"
    );
    ensure!(refused > 0, "all were taken");
    wait::until_true("it to say that it is not ready", LIMIT, || Ok(!target.is_ready()))?;
    let most = base + budget() / 1024 * 11 / 10;
    ensure!(peak <= most, "{peak} KiB resident, more than {most}");
    held.clear();
    recovered(&target)?;
    target.assert_alive()?;
    target.until_memory_is_back(base)
}
