//! COMP: what inflates, inflates within its bound and to what was deflated.

use overlay_core::compress::{InflateError, MAX_INFLATED, MAX_RATIO, inflate as inflated};
use overlay_core::record::MAX_PUBLISH;

use crate::chosen;

/// Bounds of a payload: none, that of a publisher's frame, and a small one.
const BODIES: [usize; 3] = [MAX_INFLATED, MAX_PUBLISH, 100];

/// The first byte chooses the ratio and the bound, and whether the rest is a compressed payload or
/// one to be compressed.
pub fn inflate(data: &[u8]) {
    let (choice, payload) = chosen(data);
    let ratio = choice & 0x0f;
    let body = BODIES[usize::from(choice >> 4 & 3) % BODIES.len()];
    if choice & 0x80 != 0 { deflated(payload, ratio, body) } else { received(payload, ratio, body) }
}

fn bound(compressed: &[u8], ratio: u8, body: usize) -> usize {
    (compressed.len() * usize::from(ratio.clamp(1, MAX_RATIO))).min(body).min(MAX_INFLATED)
}

fn received(payload: &[u8], ratio: u8, body: usize) {
    let first = inflated(payload, ratio, body);
    if let Ok(out) = &first {
        assert!(out.len() <= bound(payload, ratio, body));
        assert_eq!(zstd_safe::find_frame_compressed_size(payload), Ok(payload.len()), "one frame, and no more");
        assert_eq!(inflated(payload, MAX_RATIO, MAX_INFLATED).as_ref(), Ok(out), "a wider bound changes nothing");
    }
}

fn deflated(payload: &[u8], ratio: u8, body: usize) {
    let mut compressed = Vec::with_capacity(zstd_safe::compress_bound(payload.len()));
    assert!(zstd_safe::compress(&mut compressed, payload, 1).is_ok());
    let fits = payload.len() <= bound(&compressed, ratio, body);
    match inflated(&compressed, ratio, body) {
        Ok(out) => assert!(fits && out == payload),
        Err(error) => assert!(!fits && error == InflateError::TooLarge),
    }
}
