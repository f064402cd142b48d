//! S5: SIGTERM at any instant. What was accepted was sent; the process ends by itself, in time.

use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::{Flags, Frame};
use overlay_core::record::{Publish, Record};
use overlay_tests::daemon::Daemon;
use overlay_tests::oap::{Heard, Tls, Wire, request};
use overlay_tests::on_both_profiles;
use overlay_tests::wait;
use rustix::process::Signal;

use crate::target::{CLIENT, Target, scale};

on_both_profiles!(s5_sigterm_at_any_instant_loses_nothing_accepted);

/// For the process to end, its own drain timeout and joining included.
const LIMIT: Duration = Duration::from_secs(30);
/// Publishers, each as fast as it is answered.
const PUBLISHERS: u64 = 3;

/// xorshift64*: seeded, so that a failure can be run again (`OVERLAY_SEED`).
struct Seeded(u64);

impl Seeded {
    fn new() -> Result<Self> {
        let seed = match std::env::var("OVERLAY_SEED") {
            Ok(seed) => seed.parse()?,
            Err(_) => u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())? | 1,
        };
        println!("s5: OVERLAY_SEED={seed}");
        Ok(Self(seed))
    }

    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
    }
}

/// Publishes until the daemon refuses for good or goes; the numbers that were accepted.
fn publish(daemon: &Daemon, publisher: u64) -> Result<JoinHandle<Result<Vec<u64>>>> {
    let mut wire = Wire::local(&daemon.socket())?;
    let code = wire.start(3, &Open::Publish { topic: "t".parse()? }, daemon.local_token()?)?;
    ensure!(code == 200, "{code}");
    Ok(thread::spawn(move || {
        let mut accepted = Vec::new();
        for number in (publisher..).step_by(PUBLISHERS as usize) {
            let message = Publish::Message(Bytes::from(number.to_be_bytes().to_vec())).encode();
            if wire.send(&request(3, Flags::default(), message)).is_err() {
                break;
            }
            match wire.poll()? {
                Heard::Frame(Frame { code: 200, .. }) => accepted.push(number),
                Heard::Frame(Frame { code: 503, .. }) | Heard::Closed => break,
                Heard::Frame(Frame { code: 429, .. }) => {}
                other => bail!("{other:?}"),
            }
        }
        Ok(accepted)
    }))
}

/// Every message until the daemon says that it stops.
fn subscribe(daemon: &Daemon) -> Result<JoinHandle<Result<Vec<u64>>>> {
    let mut wire: Tls = daemon.offer(CLIENT)?.greet(daemon.address)?.0;
    let code = wire.start(3, &Open::Subscribe { topics: vec!["t".parse()?] }, daemon.token(CLIENT)?)?;
    ensure!(code == 200, "{code}");
    Ok(thread::spawn(move || {
        let mut came = Vec::new();
        while let Heard::Frame(frame) = wire.poll()? {
            if frame.flags.has(Flags::RESP) {
                ensure!((frame.code, frame.flags.has(Flags::END)) == (503, true), "{frame:?}");
                break;
            }
            match Record::decode(frame.payload).context("not a record")? {
                Record::Message { payload, .. } => came.push(u64::from_be_bytes(payload[..].try_into()?)),
                other => bail!("{other:?}"),
            }
        }
        Ok(came)
    }))
}

/// S5, G-3: at a random instant of full traffic SIGTERM comes: whatever got its 200 comes to
/// every subscriber, once, and the process leaves by itself with success.
fn s5_sigterm_at_any_instant_loses_nothing_accepted(profile: Profile) -> Result<()> {
    let mut seeded = Seeded::new()?;
    for round in 0..scale(4, 200) {
        let mut target = Target::start(profile, |config| {
            config.overlay.rps = 1_000_000;
            config.overlay.per_peer_rps = 1_000_000;
            config.gossip.lane_depth_frames = 65_536;
            config.drain.delay_ms = 50;
        })?;
        let subscribers = (0..2).map(|_| subscribe(&target)).collect::<Result<Vec<_>>>()?;
        let publishers = (0..PUBLISHERS).map(|n| publish(&target, n)).collect::<Result<Vec<_>>>()?;
        let instant = Duration::from_micros(seeded.next(400_000));
        wait::throughout("traffic", instant, || Ok(true))?;
        target.process.signal(Signal::TERM);
        let mut accepted = Vec::new();
        for publisher in publishers {
            accepted.extend(publisher.join().map_err(|_| anyhow!("it panicked"))??);
        }
        accepted.sort_unstable();
        for subscriber in subscribers {
            let mut came = subscriber.join().map_err(|_| anyhow!("it panicked"))??;
            came.sort_unstable();
            let whole = accepted.iter().all(|number| came.binary_search(number).is_ok());
            ensure!(whole, "round {round}: {} accepted, {} came", accepted.len(), came.len());
            ensure!(came.windows(2).all(|pair| pair[0] < pair[1]), "round {round}: one came twice");
        }
        let status = target.process.wait(LIMIT)?;
        println!("s5: SIGTERM after {instant:?}: all {} accepted messages came, {status}", accepted.len());
        ensure!(status.success(), "{status}: {}", target.process.log_tail());
        let log = target.process.log();
        ensure!(!log.contains("panicked") && !log.contains("did not end"), "{log}");
    }
    Ok(())
}
