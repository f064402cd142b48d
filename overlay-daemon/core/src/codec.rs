//! Bytes to frames and back. Decides whether bytes are a frame, from the header alone
//! wherever it can, and allocates nothing that a length field asks for.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::frame::{AppProto, Flags, Frame, HEADER_LEN, MAX_FRAME, VERSION};
use crate::identity::TenantId;
use crate::status::Status;

/// Why bytes are not a frame. The stream of bytes cannot be trusted after it: the refusal
/// is sent, then the session closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// `len` is under the header's own 38 bytes.
    #[error("frame length {0} is shorter than its header")]
    TooShort(u32),
    /// `len` is over [`MAX_FRAME`].
    #[error("frame length {0} is over 1 MiB")]
    TooLarge(u32),
    /// `ver` is not 1.
    #[error("frame version {0} is not 1")]
    Version(u16),
    /// `cap_len` is not 0 on a frame without START.
    #[error("a capability without START")]
    CapWithoutStart,
    /// `cap_len` reaches past `len`.
    #[error("the capability reaches past the frame")]
    CapPastEnd,
}

impl FrameError {
    /// The code to refuse with.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Self::TooLarge(_) => Status::PayloadTooLarge,
            Self::TooShort(_) | Self::Version(_) | Self::CapWithoutStart | Self::CapPastEnd => Status::BadRequest,
        }
    }
}

/// Takes the first frame off `buf`. `Ok(None)` means more bytes are needed and nothing was
/// consumed; `cap` and `payload` share the buffer's memory.
///
/// # Errors
/// The header cannot start a frame. `buf` is left as it is.
pub fn decode(buf: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    // A whole header is of a size that the compiler knows: no look into it is checked again.
    let Some(header) = buf.first_chunk::<HEADER_LEN>() else { return frame_len(buf).map(|_| None) };
    let Some(need) = frame_len(header)? else { return Ok(None) };
    if buf.len() < need {
        return Ok(None);
    }
    let mut header = &header[6..]; // behind len and ver, checked
    let flags = Flags::from_bits(header.get_u16());
    let code = header.get_u16();
    let app = AppProto(header.get_u16());
    let tenant = TenantId(header.get_u128());
    let cap_len = usize::from(header.get_u16());
    let corr_id = header.get_u64();
    buf.advance(HEADER_LEN);
    let cap = if cap_len == 0 { Bytes::new() } else { buf.split_to(cap_len).freeze() };
    let payload = buf.split_to(need - HEADER_LEN - cap_len).freeze();
    Ok(Some(Frame { flags, code, app, tenant, corr_id, cap, payload }))
}

/// Bytes of the frame that starts `buf`, once its header is there. A reader may use it to
/// reserve exactly what a frame still needs.
///
/// # Errors
/// The header cannot start a frame.
#[inline]
pub fn frame_len(buf: &[u8]) -> Result<Option<usize>, FrameError> {
    // Each rule is applied as soon as its bytes are there, so that the answer is the same
    // however the bytes were cut and a bad length never waits for its header.
    let Some(len) = be32(buf, 0) else { return Ok(None) };
    let whole = len as usize;
    if whole > MAX_FRAME {
        return Err(FrameError::TooLarge(len));
    }
    if whole < HEADER_LEN {
        return Err(FrameError::TooShort(len));
    }
    let Some(ver) = be16(buf, 4) else { return Ok(None) };
    if ver != VERSION {
        return Err(FrameError::Version(ver));
    }
    let (Some(flags), Some(cap_len)) = (be16(buf, 6), be16(buf, 28)) else { return Ok(None) };
    let cap_len = usize::from(cap_len);
    if cap_len > 0 && !Flags::from_bits(flags).has(Flags::START) {
        return Err(FrameError::CapWithoutStart);
    }
    if HEADER_LEN + cap_len > whole {
        return Err(FrameError::CapPastEnd);
    }
    Ok((buf.len() >= HEADER_LEN).then_some(whole))
}

#[inline]
fn be16(buf: &[u8], at: usize) -> Option<u16> {
    buf.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes)
}

#[inline]
fn be32(buf: &[u8], at: usize) -> Option<u32> {
    buf.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes)
}

/// The header of `frame`, ready to stand before its `cap` and `payload`. A writer sends the
/// three as they lie, so that a payload shared by many queues is never copied to be framed.
///
/// # Errors
/// The frame breaks a bound that [`decode`] would refuse.
pub fn header(frame: &Frame) -> Result<[u8; HEADER_LEN], FrameError> {
    let whole = frame.wire_len();
    let len = u32::try_from(whole).unwrap_or(u32::MAX);
    if whole > MAX_FRAME {
        return Err(FrameError::TooLarge(len));
    }
    if !frame.cap.is_empty() && !frame.flags.has(Flags::START) {
        return Err(FrameError::CapWithoutStart);
    }
    let cap_len = u16::try_from(frame.cap.len()).map_err(|_| FrameError::CapPastEnd)?;
    let mut out = [0; HEADER_LEN];
    let mut at = &mut out[..];
    at.put_u32(len);
    at.put_u16(VERSION);
    at.put_u16(frame.flags.bits());
    at.put_u16(frame.code);
    at.put_u16(frame.app.0);
    at.put_u128(frame.tenant.0);
    at.put_u16(cap_len);
    at.put_u64(frame.corr_id);
    Ok(out)
}

/// The whole of `frame`, copied to the end of `out`.
///
/// # Errors
/// As [`header`]; `out` is then left as it is.
pub fn encode(frame: &Frame, out: &mut BytesMut) -> Result<(), FrameError> {
    let header = header(frame)?;
    out.reserve(frame.wire_len());
    out.put_slice(&header);
    out.put_slice(&frame.cap);
    out.put_slice(&frame.payload);
    Ok(())
}

/// [`encode`] into bytes of its own.
///
/// # Errors
/// As [`header`].
pub fn encoded(frame: &Frame) -> Result<Bytes, FrameError> {
    let mut out = BytesMut::new();
    encode(frame, &mut out)?;
    Ok(out.freeze())
}

#[cfg(test)]
mod tests;
