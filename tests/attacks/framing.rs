//! F7: frames that cost the daemon more than who sends them.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::control::Open;
use overlay_core::frame::{CHUNK, Flags, MAX_BODY};
use overlay_core::record::{Piece, Publish};
use overlay_tests::oap::{Wire, request};

use crate::probe::Probe;
use crate::target::Target;

/// F7, G-6: a stream that never ends is bounded in streams, bytes and time: the 257th open one
/// is 429, bytes past what a message announced are 400, and a message whose next chunk does not
/// come is 400 though its session goes on.
#[test]
fn f7_streams_that_never_end_are_bounded() -> Result<()> {
    let mut target = Target::start(|config| {
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
    probe.finish("f7")?;
    target.assert_alive()
}
