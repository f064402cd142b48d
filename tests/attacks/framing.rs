//! F1, F6, F7: frames that cost the daemon more than who sends them.

use std::io::Write;

use anyhow::{Result, ensure};
use overlay_tests::oap::Wire;

use crate::probe::Probe;
use crate::target::{Target, scale};

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
/// costs is at most 64 KiB, it is cut when the frame's time is over, and what a second wave
/// adds to the first is nothing.
#[test]
fn f1_claimed_lengths_are_not_allocated() -> Result<()> {
    let count = scale(1_000, 10_000);
    let mut target = Target::start(|config| {
        config.overlay.max_sessions = 20_000;
        // Long enough to hold all of them at once.
        config.overlay.read_timeout_ms = scale(3_000, 20_000) as u64;
        config.overlay.idle_timeout_ms = 60_000;
    })?;
    let probe = Probe::start(&target)?;
    let base = target.resident_kib()?;
    let mut after = Vec::new();
    for _ in 0..2 {
        let timeouts = target.rejected("timeout")?;
        let mut held = Vec::with_capacity(count);
        for _ in 0..count {
            let mut wire = Wire::local(&target.socket())?;
            wire.stream.write_all(&CLAIM)?;
            held.push(wire);
        }
        let each = target.resident_kib()?.saturating_sub(base) as f64 / target.connections()? as f64;
        println!("f1: {each:.1} KiB resident a connection that claims 1 MiB, {} held", target.connections()?);
        ensure!(each <= 64.0, "{each} KiB");
        target.until_connections(1)?;
        ensure!(target.rejected("timeout")? == timeouts + count as f64, "each is counted once");
        drop(held);
        after.push(target.resident_kib()?);
    }
    println!("f1: KiB resident: {base} before, {after:?} after each wave");
    ensure!(after[1] as f64 <= after[0] as f64 * 1.05, "a second wave leaves more than the first: {after:?}");
    probe.finish("f1")?;
    target.assert_alive()
}
