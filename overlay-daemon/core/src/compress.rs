//! COMP: what one zstd frame (RFC 8878) may cost, and what it holds. Decides from its header
//! and block headers alone whether it is one frame that fits; only then is it inflated. Never
//! compresses, and knows nothing of sessions but whether HELLO was answered.
//!
//! Inflating is a pure function, so that the reader of a session calls it and the hub, which
//! all sessions share, never waits for it.

use bytes::Bytes;
use zstd_safe::DCtx;

use crate::control::MAX_CONTROL;
use crate::frame::{AppProto, Flags, Frame};
use crate::record::{MAX_PUBLISH, MAX_RECORD};
use crate::status::{Refusal, Status};

/// The inflated payload as a multiple of the compressed one, at the most (OAP/1).
pub const MAX_RATIO: u8 = 10;
/// Bytes of any inflated payload (OAP/1).
pub const MAX_INFLATED: usize = 10 * 1_048_576;
/// Bytes of the window that a frame may ask a decoder to keep: window log 20.
const MAX_WINDOW: u64 = 1 << 20;
/// Blocks that a frame may have whatever its size, and one more for each [`BYTES_A_BLOCK`]
/// that it may inflate to: a block costs tables, though it may hold nothing.
const BLOCKS: usize = 16;
const BYTES_A_BLOCK: usize = 1_024;

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// What the library calls an output that does not fit; it has no other name for it.
const DOES_NOT_FIT: &str = "Destination buffer is too small";

/// Why a compressed payload is refused. The session goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// Past the ratio, the bound of what it is for, or the window.
    #[error("the payload inflates past its bound")]
    TooLarge,
    /// Not one whole zstd frame without dictionary, and nothing else.
    #[error("the payload is not one zstd frame")]
    Broken,
}

impl InflateError {
    /// The refusal to answer with.
    #[must_use]
    pub const fn refusal(self) -> Refusal {
        match self {
            Self::TooLarge => Refusal::new(Status::PayloadTooLarge, "the payload inflates past its bound"),
            Self::Broken => Refusal::new(Status::BadRequest, "the payload is not one zstd frame"),
        }
    }
}

/// Inflates the payload of a frame as it was read and takes COMP off it, where a decoder may be
/// called at all: on requests of streams, once the session is `active`. Any other frame stays as
/// it is; [`crate::session`] refuses it by its flag.
///
/// `ratio` is 1 to [`MAX_RATIO`].
///
/// # Errors
/// What to refuse the frame with, which is then without payload and COMP.
pub fn receive(frame: &mut Frame, active: bool, ratio: u8) -> Result<(), Refusal> {
    let request = frame.flags.has(Flags::REQ) && frame.app != AppProto::CONTROL;
    if !frame.flags.has(Flags::COMP) || !active || !request {
        return Ok(());
    }
    frame.flags = frame.flags.without(Flags::COMP);
    let compressed = std::mem::take(&mut frame.payload);
    frame.payload = inflate(&compressed, ratio, body(frame)).map_err(InflateError::refusal)?;
    Ok(())
}

/// Bytes of the largest payload that a request of this kind may have.
fn body(frame: &Frame) -> usize {
    match frame.app {
        _ if frame.flags.has(Flags::START) => MAX_CONTROL,
        AppProto::PUBSUB => MAX_PUBLISH,
        AppProto::GOSSIP => MAX_RECORD,
        _ => MAX_CONTROL,
    }
}

/// The bytes that `compressed` stands for: at most `ratio` times its own, [`MAX_INFLATED`] and
/// `body`.
///
/// The output is the decoder's only window: beyond it, inflating takes the decoder's own state
/// (under 128 KiB), whatever window the frame declares. It is as large as the frame says that
/// its content is where that is within the bound, else as the bound.
///
/// # Errors
/// See [`InflateError`].
pub fn inflate(compressed: &[u8], ratio: u8, body: usize) -> Result<Bytes, InflateError> {
    let most = compressed.len().saturating_mul(usize::from(ratio.clamp(1, MAX_RATIO))).min(MAX_INFLATED).min(body);
    let declared = walk(compressed, BLOCKS + most / BYTES_A_BLOCK)?;
    let room = match declared.map(usize::try_from) {
        None => most,
        Some(Ok(size)) if size <= most => size,
        Some(_) => return Err(InflateError::TooLarge),
    };
    let mut out = Vec::with_capacity(room);
    match DCtx::create().decompress(&mut out, compressed) {
        Ok(_) => Ok(out.into()),
        // Past a size that it declared, a frame lies; past the bound, it is too large.
        Err(code) if declared.is_none() && zstd_safe::get_error_name(code) == DOES_NOT_FIT => {
            Err(InflateError::TooLarge)
        }
        Err(_) => Err(InflateError::Broken),
    }
}

/// Walks the headers of a frame and its blocks: the size that it declares for its content.
fn walk(frame: &[u8], most_blocks: usize) -> Result<Option<u64>, InflateError> {
    let mut at = Cursor(frame);
    if at.take(4)? != MAGIC {
        return Err(InflateError::Broken); // a skippable frame among others
    }
    let descriptor = at.byte()?;
    let (size_flag, single_segment, checksum) = (descriptor >> 6, descriptor & 0x20 != 0, descriptor & 4 != 0);
    if descriptor & 0x0b != 0 {
        return Err(InflateError::Broken); // a dictionary, or the reserved bit
    }
    if !single_segment && window(at.byte()?) > MAX_WINDOW {
        return Err(InflateError::TooLarge);
    }
    let declared = match (size_flag, single_segment) {
        (0, false) => None,
        (0, true) => Some(at.little_endian(1)?),
        (1, _) => Some(at.little_endian(2)? + 256),
        (2, _) => Some(at.little_endian(4)?),
        (_, _) => Some(at.little_endian(8)?),
    };
    for _ in 0..most_blocks {
        let block = at.little_endian(3)?;
        let size = usize::try_from(block >> 3).map_err(|_| InflateError::Broken)?;
        match block >> 1 & 3 {
            0 | 2 => at.take(size)?,
            1 => at.take(1)?, // a byte repeated
            _ => return Err(InflateError::Broken),
        };
        if block & 1 == 1 {
            at.take(if checksum { 4 } else { 0 })?;
            return if at.0.is_empty() { Ok(declared) } else { Err(InflateError::Broken) };
        }
    }
    Err(InflateError::TooLarge)
}

/// Bytes of the window that its descriptor byte asks for.
fn window(descriptor: u8) -> u64 {
    let base = 1_u64 << (10 + (descriptor >> 3));
    base + base / 8 * u64::from(descriptor & 7)
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], InflateError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(InflateError::Broken)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, InflateError> {
        self.take(1)?.first().copied().ok_or(InflateError::Broken)
    }

    fn little_endian(&mut self, len: usize) -> Result<u64, InflateError> {
        Ok(self.take(len)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}

#[cfg(test)]
mod tests;
