//! Rows Z1 to Z4 of the attack catalogue, with frames made by hand: a library makes none of them.

use zstd_safe::{CCtx, CParameter};

use super::*;
use crate::identity::TenantId;

const BODY: usize = MAX_INFLATED;
/// A descriptor byte: no size, a window, no checksum, no dictionary.
const PLAIN: u8 = 0;
/// A window descriptor of 1 MiB, and the next larger one.
const LOG_20: u8 = 10 << 3;
const OVER_LOG_20: u8 = LOG_20 + 1;

fn block(kind: u32, size: usize, last: bool, content: &[u8]) -> Vec<u8> {
    let header = u32::try_from(size).unwrap() << 3 | kind << 1 | u32::from(last);
    [&header.to_le_bytes()[..3], content].concat()
}

fn raw(content: &[u8], last: bool) -> Vec<u8> {
    block(0, content.len(), last, content)
}

/// `size` times the byte 7.
fn run(size: usize, last: bool) -> Vec<u8> {
    block(1, size, last, &[7])
}

fn frame(descriptor: &[u8], blocks: &[Vec<u8>]) -> Vec<u8> {
    [&MAGIC[..], descriptor, &blocks.concat()].concat()
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut out);
    out
}

fn compressed(content: &[u8], set: &[CParameter]) -> Vec<u8> {
    let mut context = CCtx::create();
    for parameter in set {
        context.set_parameter(*parameter).unwrap();
    }
    let mut out = Vec::with_capacity(zstd_safe::compress_bound(content.len()));
    context.compress2(&mut out, content).unwrap();
    out
}

#[test]
fn what_a_library_compresses_inflates() {
    let text = b"publish and subscribe ".repeat(20);
    for content in [&b""[..], b"x", &text[..300], &noise(65_573), &noise(1_048_576)] {
        for checksum in [false, true] {
            for size in [false, true] {
                let set =
                    [CParameter::ChecksumFlag(checksum), CParameter::ContentSizeFlag(size), CParameter::WindowLog(20)];
                let inflated = inflate(&compressed(content, &set), MAX_RATIO, BODY).unwrap();
                assert!(inflated == content, "{} bytes", content.len());
            }
        }
    }
}

/// Z1: ten times as much, to the byte, whether or not the frame says how much it is.
#[test]
fn z1_ratio_ten_is_accepted_and_a_byte_more_is_refused() {
    let content = noise(1_000);
    for declares in [false, true] {
        let make = |inflated: usize| {
            let size = u32::try_from(inflated).unwrap().to_le_bytes();
            let descriptor = if declares { [&[0x80, LOG_20], &size[..]].concat() } else { vec![PLAIN, LOG_20] };
            frame(&descriptor, &[raw(&content, false), run(inflated - content.len(), true)])
        };
        let ten = make(0x2000).len() * 10;
        assert_eq!(inflate(&make(ten), 10, BODY).map(|bytes| bytes.len()), Ok(ten));
        assert_eq!(inflate(&make(ten + 1), 10, BODY), Err(InflateError::TooLarge));
        assert_eq!(inflate(&make(ten), 9, BODY), Err(InflateError::TooLarge), "a lower ratio");
        assert_eq!(inflate(&make(ten), 200, BODY).map(|bytes| bytes.len()), Ok(ten), "no ratio is over 10");
        assert_eq!(inflate(&make(ten), 10, ten).map(|bytes| bytes.len()), Ok(ten));
        assert_eq!(inflate(&make(ten), 10, ten - 1), Err(InflateError::TooLarge), "the body's bound");
    }
}

/// Z1: 10 MiB in all, whatever the ratio.
#[test]
fn z1_ten_mebibytes_is_the_most() {
    let content = noise(1_100_000);
    let make = |inflated: usize| {
        let mut blocks: Vec<_> = content.chunks(131_072).map(|part| raw(part, false)).collect();
        let mut left = inflated - content.len();
        while left > 131_072 {
            blocks.push(run(131_072, false));
            left -= 131_072;
        }
        blocks.push(run(left, true));
        frame(&[PLAIN, LOG_20], &blocks)
    };
    assert_eq!(inflate(&make(MAX_INFLATED), 10, usize::MAX).map(|bytes| bytes.len()), Ok(MAX_INFLATED));
    assert_eq!(inflate(&make(MAX_INFLATED + 1), 10, usize::MAX), Err(InflateError::TooLarge));
}

/// Z1: beyond the output, what inflating takes is the decoder's state.
#[test]
fn z1_the_decoder_itself_takes_at_most_128_kib() {
    let mut context = DCtx::create();
    let mut out = Vec::with_capacity(1_048_576);
    let content = noise(900_000);
    let whole = compressed(&content, &[CParameter::WindowLog(20), CParameter::ContentSizeFlag(false)]);
    context.decompress(&mut out, &whole).unwrap();
    assert!(out == content);
    assert!(context.sizeof() <= 128 * 1_024, "{} bytes", context.sizeof());
}

/// Z2: a window over 1 MiB is refused, in a frame of few bytes as in one that fits.
#[test]
fn z2_a_window_over_log_20_is_refused() {
    let make = |window: u8| frame(&[PLAIN, window], &[raw(b"tiny", true)]);
    assert_eq!(inflate(&make(LOG_20), 10, BODY), Ok(Bytes::from_static(b"tiny")));
    for window in [OVER_LOG_20, 11 << 3, 17 << 3, 21 << 3, 0xff] {
        assert_eq!(inflate(&make(window), 10, BODY), Err(InflateError::TooLarge), "descriptor {window:#x}");
    }
}

/// Z3: what is not one whole frame, and nothing but it, or lies about its size.
#[test]
fn z3_anything_but_one_true_frame_is_refused() {
    let good = compressed(b"one whole frame", &[CParameter::ChecksumFlag(true)]);
    assert_eq!(inflate(&good, 10, BODY), Ok(Bytes::from_static(b"one whole frame")));
    let skippable = |n: u8| [&[0x50 + n, 0x2a, 0x4d, 0x18][..], &4_u32.to_le_bytes(), b"skip"].concat();
    let size =
        |descriptor: u8, size: &[u8]| frame(&[&[descriptor, LOG_20][..], size].concat(), &[raw(&[1; 300], true)]);
    let mut forged = good.clone();
    *forged.last_mut().unwrap() ^= 1;
    let mut table = vec![
        ("nothing", Vec::new()),
        ("text", b"not compressed at all".to_vec()),
        ("two frames", good.repeat(2)),
        ("a skippable frame", skippable(0)),
        ("a skippable frame before", [skippable(7), good.clone()].concat()),
        ("a skippable frame behind", [good.clone(), skippable(15)].concat()),
        ("a trailing byte", [&good[..], b"\0"].concat()),
        ("a dictionary id", frame(&[PLAIN | 1, LOG_20, 9], &[raw(b"x", true)])),
        ("a dictionary id of 0", frame(&[PLAIN | 3, LOG_20, 0, 0, 0, 0], &[raw(b"x", true)])),
        ("the reserved bit", frame(&[PLAIN | 8, LOG_20], &[raw(b"x", true)])),
        ("a reserved block", frame(&[PLAIN, LOG_20], &[block(3, 1, true, b"x")])),
        ("less than it says", size(0x80, &301_u32.to_le_bytes())),
        ("more than it says", size(0x80, &299_u32.to_le_bytes())),
        ("nothing, it says", size(0x80, &0_u32.to_le_bytes())),
        ("less, in two bytes", size(0x40, &45_u16.to_le_bytes())),
        ("a wrong checksum", forged),
        ("a block past the end", frame(&[PLAIN, LOG_20], &[block(0, 9, true, b"x")])),
        ("no last block", frame(&[PLAIN, LOG_20], &[raw(b"x", false)])),
        ("a compressed block of nothing", frame(&[PLAIN, LOG_20], &[block(2, 0, true, b"")])),
    ];
    assert_eq!(inflate(&size(0x80, &300_u32.to_le_bytes()), 10, BODY).map(|bytes| bytes.len()), Ok(300));
    table.extend((0..good.len()).map(|cut| ("cut short", good[..cut].to_vec())));
    for (case, bytes) in table {
        assert_eq!(inflate(&bytes, 10, BODY), Err(InflateError::Broken), "{case}: {bytes:x?}");
    }
    for huge in [u64::MAX, u64::MAX - 1, 1 << 40] {
        assert_eq!(
            inflate(&size(0xc0, &huge.to_le_bytes()), 10, BODY),
            Err(InflateError::TooLarge),
            "{huge} bytes, it says"
        );
    }
}

/// Z3: blocks that hold nothing cost nobody anything: they are counted before one is decoded.
#[test]
fn z3_a_frame_of_empty_blocks_is_refused_unseen() {
    let make = |empty: usize| {
        let blocks = (0..empty).map(|_| raw(b"", false)).chain([raw(b"x", true)]);
        frame(&[PLAIN, LOG_20], &blocks.collect::<Vec<_>>())
    };
    assert!(inflate(&make(BLOCKS - 1), 10, BODY).is_ok());
    assert_eq!(inflate(&make(300_000), 10, 65_536), Err(InflateError::TooLarge));
}

proptest::proptest! {
    /// Z3: whatever the bytes, an answer, and never more than the bound.
    #[test]
    fn z3_any_bytes(
        tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), at in 0_usize..200, byte: u8, body in 0_usize..4_096,
    ) {
        let _ = inflate(&[&MAGIC[..], &tail].concat(), 10, body);
        let mut spoilt = compressed(&b"a text that repeats ".repeat(10), &[]);
        let at = at % spoilt.len();
        spoilt[at] = byte;
        for bytes in [&spoilt, &tail] {
            if let Ok(inflated) = inflate(bytes, 10, body) {
                proptest::prop_assert!(inflated.len() <= body.min(bytes.len() * 10));
            }
        }
    }
}

fn sent(flags: Flags, app: AppProto, payload: &[u8]) -> Frame {
    Frame::new(flags | Flags::COMP, app, TenantId(0), 3, Bytes::copy_from_slice(payload))
}

/// Z4: only a request on a stream of an active session reaches the decoder; anything else is
/// handed on as it is, flag and all, and so would a payload be that no decoder takes.
#[test]
fn z4_nothing_is_inflated_before_the_session_is_active() {
    let broken = b"no decoder would take this";
    for (case, frame, active) in [
        ("HELLO", sent(Flags::REQ, AppProto::CONTROL, broken), false),
        ("a START before HELLO is answered", sent(Flags::REQ | Flags::START, AppProto::PUBSUB, broken), false),
        ("a request before HELLO is answered", sent(Flags::REQ, AppProto::PUBSUB, broken), false),
        ("gossip before HELLO is answered", sent(Flags::REQ, AppProto::GOSSIP, broken), false),
        ("a ping", sent(Flags::REQ, AppProto::CONTROL, broken), true),
        ("an answer", sent(Flags::RESP, AppProto::PUBSUB, broken), true),
        ("an event", sent(Flags::EVENT, AppProto::PUBSUB, broken), true),
    ] {
        let mut received = frame.clone();
        assert_eq!((receive(&mut received, active, 10), received), (Ok(()), frame), "{case}");
    }
    let mut frame = sent(Flags::REQ, AppProto::PUBSUB, broken);
    assert_eq!(receive(&mut frame, true, 10).map_err(|refusal| refusal.status.code()), Err(400));
}

/// The bound is that of what the payload is for; what is encrypted end to end inside is not touched.
#[test]
fn each_kind_of_request_has_its_own_bound() {
    use AppProto as A;
    let start = Flags::REQ | Flags::START;
    for (flags, app, most) in [
        (start, A::PUBSUB, 16_384),
        (start, A::GOSSIP, 16_384),
        (Flags::REQ | Flags::APP_E2E, A::PUBSUB, 65_573),
        (Flags::REQ, A::GOSSIP, 67_905),
        (Flags::REQ, A::ADMIN, 16_384),
        (Flags::REQ, AppProto(700), 16_384),
    ] {
        let mut frame = sent(flags, app, &compressed(&noise(most), &[]));
        assert_eq!(receive(&mut frame, true, 10), Ok(()), "{app:?}");
        assert!(frame.flags == flags && frame.payload == noise(most), "{app:?}");
        let mut frame = sent(flags, app, &compressed(&noise(most + 1), &[]));
        assert_eq!(receive(&mut frame, true, 10).map_err(|refusal| refusal.status.code()), Err(413), "{app:?}");
        assert_eq!((frame.flags, frame.payload.len()), (flags, 0));
    }
}
