//! F1, F6, F7: frames that cost the daemon more than who sends them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use bytes::{Bytes, BytesMut};
use overlay_core::codec;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::{AppProto, CHUNK, Flags, Frame, MAX_BODY};
use overlay_core::identity::TenantId;
use overlay_core::record::{Piece, Publish};
use overlay_tests::oap::{Wire, request, start};
use overlay_tests::on_both_profiles;
use overlay_tests::wait::{self, now};

use crate::probe::Probe;
use crate::target::{CLIENT, Target, scale};

on_both_profiles!(
    by crate::probe::run:
    f1_claimed_lengths_are_not_allocated,
    f1_claimed_lengths_are_not_allocated_under_tls,
    f6_endless_empty_frames_are_throttled_and_closed,
    f7_streams_begun_and_ended_in_mass_are_capped_and_closed,
    f7_streams_that_never_end_are_bounded,
);

const LIMIT: Duration = Duration::from_secs(60);
/// A header of a frame of 1 MiB, REQ on stream 3.
const CLAIM: [u8; 38] = {
    let mut header = [0; 38];
    header[1] = 0x10; // len
    header[5] = 1; // ver
    header[7] = 1; // flags
    header[11] = 1; // app_proto_id
    header[37] = 3; // corr_id
    header
};

/// F1, I-3, M: a header that claims 1 MiB makes nobody allocate 1 MiB. What each connection
/// costs is at most 64 KiB, and it is cut when the frame's time is over.
fn f1_claimed_lengths_are_not_allocated(profile: Profile) -> Result<()> {
    let count = scale(1_000, 10_000);
    let mut target = Target::start(profile, |config| {
        config.overlay.max_sessions = 20_000;
        config.overlay.memory_bytes = 1 << 30;
        // Long enough to hold all of them at once.
        config.overlay.read_timeout_ms = scale(3_000, 40_000) as u64;
        config.overlay.idle_timeout_ms = 120_000;
    })?;
    let probe = Probe::start(&target)?;
    let base = target.resident_kib()?;
    for _wave in 0..2 {
        let timeouts = target.rejected("timeout")?;
        let mut held = Vec::with_capacity(count);
        for n in 1..=count {
            let mut wire = Wire::local(&target.socket())?;
            wire.stream.write_all(&CLAIM)?;
            held.push(wire);
            // A few at a time: what coming and going in mass does to others is S4's matter.
            if n % 20 == 0 {
                wait::until_true("the daemon to hold them", LIMIT, || Ok(target.connections()? > n))?;
            }
        }
        let each = target.resident_kib()?.saturating_sub(base) as f64 / target.connections()? as f64;
        println!("f1: {each:.1} KiB resident a connection that claims 1 MiB, {} held", target.connections()?);
        ensure!(each <= 64.0, "{each} KiB");
        target.until_connections(1)?;
        ensure!(target.rejected("timeout")? == timeouts + count as f64, "each is counted once");
        drop(held);
        target.until_memory_is_back(base)?;
    }
    target.survived(&probe.finish("f1")?)
}

/// F1 over TLS, whose own buffers count: the same claim costs at most 64 KiB a session.
fn f1_claimed_lengths_are_not_allocated_under_tls(profile: Profile) -> Result<()> {
    let count = scale(200, 2_000);
    let mut target = Target::start(profile, |config| {
        config.overlay.max_sessions = 20_000;
        config.overlay.read_timeout_ms = scale(5_000, 20_000) as u64;
        config.overlay.idle_timeout_ms = 60_000;
    })?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(CLIENT)?);
    let (base, timeouts) = (target.resident_kib()?, target.rejected("timeout")?);
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let (mut wire, _) = offer.greet(target.address)?;
        wire.stream.write_all(&CLAIM)?;
        held.push(wire);
    }
    let each = target.resident_kib()?.saturating_sub(base) as f64 / target.connections()? as f64;
    println!("f1: {each:.1} KiB resident a TLS session that claims 1 MiB, {} held", target.connections()?);
    ensure!(each <= 64.0, "{each} KiB");
    target.until_connections(1)?;
    ensure!(target.rejected("timeout")? == timeouts + count as f64, "each is counted once");
    target.survived(&probe.finish("f1")?)
}

/// What came of frames sent as fast as the daemon takes them, by somebody who reads every
/// answer: who does not is cut off by a full lane at once.
struct Flood {
    sent: usize,
    /// Answers with 200.
    accepted: usize,
    refused: usize,
    /// The daemon closed before it had taken them all.
    closed: bool,
    lasted: Duration,
}

/// Sends `frames` again and again, `count` frames in all, on a session.
fn flood(wire: Wire<UnixStream>, count: usize, mut frames: impl FnMut(u64) -> Vec<Frame>) -> Result<Flood> {
    let begin = now();
    let mut reading = wire.stream.try_clone()?;
    let answers = thread::spawn(move || -> Result<(usize, usize, bool)> {
        let (mut accepted, mut refused, mut read, mut chunk) = (0, 0, BytesMut::new(), [0; 64 * 1024]);
        loop {
            while let Some(frame) = codec::decode(&mut read)? {
                *(if frame.code == 200 { &mut accepted } else { &mut refused }) += 1;
            }
            match reading.read(&mut chunk) {
                Ok(n @ 1..) => read.extend_from_slice(&chunk[..n]),
                // This side has shut down its own half, or the daemon closed.
                Ok(0) | Err(_) => return Ok((accepted, refused, true)),
            }
        }
    });
    let mut writing = wire.stream.try_clone()?;
    let (mut sent, mut round, mut gone) = (0, 0, false);
    while sent < count && !gone {
        let mut bytes = Vec::new();
        for _ in 0..100 {
            for frame in frames(round) {
                bytes.extend(codec::encoded(&frame)?);
                sent += 1;
            }
            round += 1;
        }
        gone = writing.write_all(&bytes).is_err();
    }
    let _ = writing.shutdown(std::net::Shutdown::Write);
    let (accepted, refused, _) = answers.join().map_err(|_| anyhow!("the reader panicked"))??;
    Ok(Flood { sent, accepted, refused, closed: gone, lasted: now() - begin })
}

/// F6, I-5: endless empty frames, of which none asks for anything, are throttled, and then the
/// session is closed; whoever else is there gets what is theirs.
fn f6_endless_empty_frames_are_throttled_and_closed(profile: Profile) -> Result<()> {
    let count = scale(300_000, 10_000_000);
    let empty = |flags, corr_id| Frame::new(flags, AppProto::CONTROL, TenantId(0), corr_id, Bytes::new());
    let mut target = Target::start(profile, |_| {})?;
    let probe = Probe::start(&target)?;
    let open = Open::Publish { topic: "t".parse()? };
    let token = target.local_token()?;
    type Make = Box<dyn FnMut(u64) -> Vec<Frame> + Send>;
    let kinds: [(&str, Make); 4] = [
        ("pings", Box::new(move |n| vec![empty(Flags::REQ, 5 + 2 * n)])),
        ("of no kind", Box::new(move |n| vec![empty(Flags::default(), 5 + 2 * n)])),
        ("to a stream that ended", Box::new(|_| vec![request(3, Flags::default(), Bytes::new())])),
        ("answers to nothing", Box::new(move |n| vec![empty(Flags::RESP, 4 + 2 * n)])),
    ];
    let mut floods = Vec::new();
    for (what, frames) in kinds {
        let mut wire = Wire::local(&target.socket())?;
        ensure!(wire.start(3, &open, token.clone())? == 200);
        wire.send(&request(3, Flags::END, Bytes::new()))?;
        ensure!(wire.receive()?.is_some_and(|end| end.code == 200));
        floods.push((what, thread::spawn(move || flood(wire, count, frames))));
    }
    for (what, thread) in floods {
        let flood = thread.join().map_err(|_| anyhow!("{what}: a panic"))??;
        println!(
            "f6: {what}: {} sent of {count} in {:?}, {} answered with 200, {} refused",
            flood.sent, flood.lasted, flood.accepted, flood.refused
        );
        ensure!(flood.closed, "{what}: all {count} were taken");
    }
    target.until_connections(1)?;
    target.survived(&probe.finish("f6")?)
}

/// F7, P-2 (rapid reset): streams begun and ended as fast as it goes are taken at the rate of
/// requests, which says 429 to the rest, and then the session is closed.
fn f7_streams_begun_and_ended_in_mass_are_capped_and_closed(profile: Profile) -> Result<()> {
    const RATE: u32 = 100;
    let mut target = Target::start(profile, |config| {
        config.overlay.per_peer_rps = RATE;
        config.overlay.per_peer_inflight = 32;
    })?;
    let probe = Probe::start(&target)?;
    let (open, token) = (Open::Publish { topic: "t".parse()? }, target.local_token()?);
    let wire = Wire::local(&target.socket())?;
    let flood = flood(wire, scale(40_000, 1_000_000), |n| {
        let corr_id = 3 + 2 * n;
        vec![start(corr_id, &open, token.clone()), request(corr_id, Flags::END, Bytes::new())]
    })?;
    println!(
        "f7: {} frames sent in {:?}, {} answered with 200, {} refused",
        flood.sent, flood.lasted, flood.accepted, flood.refused
    );
    // An accepted START is answered, and so is its END.
    let most = 2.0 * f64::from(RATE) * (flood.lasted.as_secs_f64() + 1.0);
    ensure!(flood.accepted as f64 <= most, "{} were accepted in {:?}", flood.accepted, flood.lasted);
    ensure!(flood.closed, "all were taken");
    target.until_connections(1)?;
    target.survived(&probe.finish("f7")?)
}

/// F7, G-6: a stream that never ends is bounded in streams, bytes and time: the 257th open one
/// is 429, bytes past what a message announced are 400, and a message whose next chunk does not
/// come is 400 though its session goes on.
fn f7_streams_that_never_end_are_bounded(profile: Profile) -> Result<()> {
    let mut target = Target::start(profile, |config| {
        config.overlay.read_timeout_ms = 1_000;
        config.overlay.per_peer_rps = 10_000;
        config.overlay.rps = 10_000;
    })?;
    let probe = Probe::start(&target)?;
    let (open, token) = (Open::Publish { topic: "t".parse()? }, target.local_token()?);
    let mut wire = Wire::local(&target.socket())?;
    let codes: Result<Vec<u16>> = (1..=300).map(|n| wire.start(2 * n + 1, &open, token.clone())).collect();
    let open_streams = codes?.iter().filter(|code| **code == 200).count();
    ensure!(open_streams == 256, "{open_streams} streams are open");

    let mut wire = Wire::local(&target.socket())?;
    ensure!(wire.start(3, &open, token)? == 200);
    let begin = Publish::Begin { size: MAX_BODY as u32, hash: [7; 32] }.encode();
    let piece = |index| Publish::Piece(Piece { hash: [7; 32], index, bytes: Bytes::from(vec![1; CHUNK]) }).encode();
    let mut code_of = |frames: Vec<Bytes>| -> Result<u16> {
        for payload in frames {
            wire.send(&request(3, Flags::default(), payload))?;
        }
        Ok(wire.receive()?.context("the session ended")?.code)
    };
    ensure!(code_of(vec![begin.clone(), piece(0)])? == 400, "chunks that stop are refused when their time is over");
    // All 16 are not what was named, and the 17th belongs to nothing.
    let whole = [vec![begin], (0..16).map(piece).collect()].concat();
    ensure!(code_of(whole)? == 400, "chunks of another payload");
    ensure!(code_of(vec![piece(16)])? == 400, "a chunk past the last");
    target.survived(&probe.finish("f7")?)
}
