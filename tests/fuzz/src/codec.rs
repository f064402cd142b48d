//! Bytes from the network as frames.

use bytes::{Bytes, BytesMut};
use overlay_core::codec::{FrameError, decode, encoded};
use overlay_core::frame::{Flags, Frame, HEADER_LEN, MAX_FRAME};

use crate::chosen;

/// The first byte says how the rest is cut. However it is: the same frames, the same end, and
/// each frame is the bytes that it was read from.
pub fn codec(data: &[u8]) {
    let (step, stream) = chosen(data);
    let whole = read(stream, stream.len().max(1));
    let cut = read(stream, usize::from(step).max(1));
    assert_eq!(whole, cut, "the same however it is cut");
    let mut at = 0;
    for frame in whole.frames {
        let length = frame.wire_len();
        assert!((HEADER_LEN..=MAX_FRAME).contains(&length));
        assert!(frame.cap.is_empty() || frame.flags.has(Flags::START));
        let mut read = stream[at..at + length].to_vec();
        read[6] = 0; // undefined flags
        assert_eq!(encoded(&frame), Ok(Bytes::from(read)));
        at += length;
    }
    assert_eq!(&stream[at..], &whole.rest[..], "what is no frame is left");
}

#[derive(Debug, PartialEq)]
struct Read {
    frames: Vec<Frame>,
    error: Option<FrameError>,
    rest: Bytes,
}

fn read(stream: &[u8], step: usize) -> Read {
    let (mut buf, mut frames) = (BytesMut::new(), Vec::new());
    let mut error = None;
    for (n, bytes) in stream.chunks(step).enumerate() {
        buf.extend_from_slice(bytes);
        loop {
            let before = buf.len();
            match decode(&mut buf) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(refused) => {
                    assert_eq!(buf.len(), before, "a refusal takes nothing");
                    error = Some(refused);
                    buf.extend_from_slice(&stream[stream.len().min((n + 1) * step)..]);
                    return Read { frames, error, rest: buf.freeze() };
                }
            }
        }
    }
    Read { frames, error, rest: buf.freeze() }
}
