//! Taking frames of 1 KiB off a buffer that holds few or many of them, beside the length-delimited
//! codec that the ecosystem uses.

use anyhow::{Context as _, Result, ensure};
use bytes::{Bytes, BytesMut};
use overlay_core::codec;
use overlay_core::frame::{AppProto, Flags, Frame, HEADER_LEN};
use overlay_core::identity::TenantId;
use rustix::time::{ClockId, clock_gettime};
use tokio_util::codec::{Decoder as _, LengthDelimitedCodec};

use crate::Scale;
use crate::figures::Figures;

const FRAME_BYTES: usize = 1_024;
const FRAMES: usize = 65_536;
/// Frames in one buffer.
const BUFFERED: [usize; 4] = [1, 16, 256, 1_024];

/// Prints the rows.
pub(crate) fn rows(scale: Scale) -> Result<()> {
    println!("\ndecode a frame of {FRAME_BYTES} bytes, and drop it");
    println!("| frames buffered | overlay-core, ns | tokio-util's LengthDelimitedCodec, ns |");
    println!("| --- | --- | --- |");
    let payload = Bytes::from(vec![7; FRAME_BYTES - HEADER_LEN]);
    let frame = codec::encoded(&Frame::new(Flags::EVENT, AppProto::PUBSUB, TenantId(0), 3, payload))?;
    for buffered in BUFFERED {
        let (mut ours, mut ecosystem) = (Figures::new(), Figures::new());
        let wire = frame.repeat(buffered);
        for _ in 0..scale.repeat.max(5) {
            ours.push(each(&wire, buffered, |buffer| Ok(codec::decode(buffer)?.is_some()))?);
            let mut delimited = LengthDelimitedCodec::builder().length_adjustment(-4).new_codec();
            ecosystem.push(each(&wire, buffered, |buffer| Ok(delimited.decode(buffer)?.is_some()))?);
        }
        println!("| {buffered} | {ours:.0} | {ecosystem:.0} |");
    }
    Ok(())
}

/// Nanoseconds of this thread's processor time for each frame.
fn each(wire: &[u8], buffered: usize, mut decode: impl FnMut(&mut BytesMut) -> Result<bool>) -> Result<f64> {
    let mut buffers: Vec<BytesMut> = (0..FRAMES / buffered).map(|_| BytesMut::from(wire)).collect();
    let before = thread_time()?;
    let mut frames = 0;
    for buffer in &mut buffers {
        while decode(buffer)? {
            frames += 1;
        }
    }
    let spent = thread_time()? - before;
    ensure!(frames == FRAMES, "{frames} frames instead of {FRAMES}");
    Ok(spent as f64 / frames as f64)
}

fn thread_time() -> Result<i64> {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.checked_mul(1_000_000_000).map(|seconds| seconds + time.tv_nsec).context("a clock past its range")
}
