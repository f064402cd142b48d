//! The vectors of OAP/1 to the byte, and G-1's bounds as properties.

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::frame::MAX_CAP;

const VECTORS: &str = include_str!("vectors.json");

fn unhex(s: &str) -> Vec<u8> {
    (0..s.len() / 2).map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn number(v: &Value, key: &str) -> u16 {
    u16::try_from(v[key].as_u64().unwrap()).unwrap()
}

#[test]
fn vectors() {
    let file: Value = serde_json::from_str(VECTORS).unwrap();
    let vectors = file["vectors"].as_array().unwrap();
    assert_eq!(vectors.len(), 17);
    for vector in vectors {
        let name = vector["name"].as_str().unwrap();
        let bytes = unhex(vector["hex"].as_str().unwrap());
        let mut buf = BytesMut::from(&bytes[..]);
        let got = decode(&mut buf);
        if let Some(want) = vector.get("expect") {
            let frame = got.unwrap().unwrap();
            assert_eq!(frame.flags.bits(), number(want, "flags"), "{name}");
            assert_eq!(frame.code, number(want, "code"), "{name}");
            assert_eq!(frame.app.0, number(want, "app_proto_id"), "{name}");
            assert_eq!(format!("{:032x}", frame.tenant.0), want["tenant_id"].as_str().unwrap(), "{name}");
            assert_eq!(frame.corr_id, want["corr_id"].as_u64().unwrap(), "{name}");
            assert_eq!(frame.cap, unhex(want["cap"].as_str().unwrap()), "{name}");
            assert_eq!(frame.payload, unhex(want["payload"].as_str().unwrap()), "{name}");
            assert_eq!(encoded(&frame).unwrap(), bytes, "{name} encodes back");
            assert!(buf.is_empty(), "{name}");
        } else if let Some(code) = vector.get("reject") {
            assert_eq!(u64::from(got.unwrap_err().status().code()), code.as_u64().unwrap(), "{name}");
        } else {
            assert!(vector["need_more"].as_bool().unwrap());
            assert_eq!((got.unwrap(), buf.len()), (None, bytes.len()), "{name}: nothing consumed");
        }
    }
}

prop_compose! {
    fn frames()(
        flags in 0..=0xff_u16, code: u16, app: u16, tenant: u128, corr_id: u64,
        cap in proptest::collection::vec(any::<u8>(), 0..MAX_CAP), payload in proptest::collection::vec(any::<u8>(), 0..512),
    ) -> Frame {
        let flags = Flags::from_bits(flags);
        let cap = if flags.has(Flags::START) { Bytes::from(cap) } else { Bytes::new() };
        Frame { flags, code, app: AppProto(app), tenant: TenantId(tenant), corr_id, cap, payload: payload.into() }
    }
}

proptest! {
    /// F5: however the bytes are cut, the frames are the same.
    #[test]
    fn f5_every_split_point_and_byte_by_byte(first in frames(), second in frames()) {
        let mut wire = BytesMut::new();
        encode(&first, &mut wire).unwrap();
        encode(&second, &mut wire).unwrap();
        for cut in 0..=wire.len() {
            let mut buf = BytesMut::from(&wire[..cut]);
            let mut got = Vec::new();
            while let Some(frame) = decode(&mut buf).unwrap() { got.push(frame); }
            buf.extend_from_slice(&wire[cut..]);
            while let Some(frame) = decode(&mut buf).unwrap() { got.push(frame); }
            prop_assert_eq!(&got, &[first.clone(), second.clone()]);
        }
        let (mut buf, mut got) = (BytesMut::new(), Vec::new());
        for byte in &wire {
            buf.put_u8(*byte);
            while let Some(frame) = decode(&mut buf).unwrap() { got.push(frame); }
        }
        prop_assert_eq!(&got, &[first, second]);
    }

    /// F5: bytes that are no frame get the same refusal, however they are cut.
    #[test]
    fn f5_a_refusal_is_the_same_byte_by_byte(bytes in proptest::collection::vec(any::<u8>(), 38..80), len in 0_u32..90) {
        let bytes = [&len.to_be_bytes()[..], &bytes[4..]].concat();
        let whole = decode(&mut BytesMut::from(&bytes[..]));
        let mut buf = BytesMut::new();
        let mut cut = Ok(None);
        for byte in &bytes {
            buf.put_u8(*byte);
            cut = decode(&mut buf);
            if cut != Ok(None) { break; }
        }
        prop_assert_eq!(cut, whole);
    }

    /// G-1, I-3, F1: a length past 1 MiB is refused from its own four bytes, whatever follows.
    #[test]
    fn f1_oversize_is_refused_from_the_header(len in 1_048_577_u32.., tail in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut buf = BytesMut::from(&len.to_be_bytes()[..]);
        buf.extend_from_slice(&tail);
        let before = buf.capacity();
        prop_assert_eq!(decode(&mut buf), Err(FrameError::TooLarge(len)));
        prop_assert_eq!(buf.capacity(), before, "nothing was allocated for it");
    }

    /// F1: a decoder that waits for a large frame has not made room for it.
    #[test]
    fn f1_waiting_for_a_mebibyte_allocates_nothing(len in 38_u32..=1_048_576) {
        let mut header = header(&Frame::new(Flags::REQ, AppProto(1), TenantId(0), 1, Bytes::new())).unwrap();
        header[..4].copy_from_slice(&len.to_be_bytes());
        let mut buf = BytesMut::from(&header[..]);
        let before = buf.capacity();
        prop_assert_eq!(decode(&mut buf).unwrap().is_some(), len == 38);
        prop_assert!(buf.capacity() <= before);
    }

    /// No bytes make the decoder panic, and what it takes it can give back.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let mut buf = BytesMut::from(&bytes[..]);
        if let Ok(Some(frame)) = decode(&mut buf) {
            prop_assert_eq!(frame.wire_len() + buf.len(), bytes.len());
        }
    }

}

/// Every edge of a u16 and of a u32: around 0, each power of two, and the end.
fn edges(bits: u32) -> Vec<u32> {
    let around = |n: u64| [n.saturating_sub(1), n, n + 1];
    let most = (1_u64 << bits) - 1;
    (0..=bits).flat_map(|bit| around(1 << bit)).chain([0]).filter(|n| *n <= most).map(|n| n as u32).collect()
}

/// F1, F2: every edge of `len` with every edge of `cap_len`, against the rules written out. That
/// nothing overflows shows in that nothing panics: tests and releases check it alike.
#[test]
fn f2_every_edge_of_the_lengths() {
    let mut lengths = edges(32);
    lengths.extend([37, 38, 39, 100, 1_048_575, 1_048_577]);
    for len in lengths {
        for cap in edges(16).into_iter().chain([62, 63]) {
            for start in [false, true] {
                let flags = if start { Flags::REQ | Flags::START } else { Flags::REQ };
                let mut bytes = header(&Frame::new(flags, AppProto(1), TenantId(0), 1, Bytes::new())).unwrap().to_vec();
                bytes[..4].copy_from_slice(&len.to_be_bytes());
                bytes[28..30].copy_from_slice(&u16::try_from(cap).unwrap().to_be_bytes());
                let want = match len {
                    1_048_577.. => Some(413),
                    0..38 => Some(400),
                    _ if cap > 0 && (!start || 38 + cap > len) => Some(400),
                    _ => None,
                };
                let got = frame_len(&bytes).err().map(|error| error.status().code());
                assert_eq!(got, want, "len {len}, cap_len {cap}, start {start}");
                let decoded = decode(&mut BytesMut::from(&bytes[..])).err().map(|error| error.status().code());
                assert_eq!(decoded, want, "len {len}, cap_len {cap}, start {start}");
            }
        }
    }
}

/// F2: every edge of the other fields is carried as it is, but for the flags that are not defined.
#[test]
fn f2_every_edge_of_the_other_fields() {
    for edge in edges(16).into_iter().map(|edge| u16::try_from(edge).unwrap()) {
        let wide = u64::from(edge) << 48 | u64::from(edge);
        let frame = Frame {
            flags: Flags::from_bits(edge),
            code: edge,
            app: AppProto(edge),
            tenant: TenantId(u128::from(wide) << 64 | u128::from(wide)),
            corr_id: wide,
            cap: Bytes::new(),
            payload: Bytes::from_static(b"x"),
        };
        let mut bytes = BytesMut::from(&encoded(&frame).unwrap()[..]);
        bytes[6..8].copy_from_slice(&edge.to_be_bytes());
        assert_eq!(decode(&mut bytes), Ok(Some(frame)), "{edge}");
        let version = [&100_u32.to_be_bytes()[..], &edge.to_be_bytes(), &[0; 32]].concat();
        let want = if edge == 1 { None } else { Some(FrameError::Version(edge)) };
        assert_eq!(frame_len(&version).err(), want, "version {edge}");
    }
}

#[test]
fn what_cannot_be_read_is_not_written() {
    let frame = |cap: usize, payload: usize, flags| Frame {
        cap: vec![0; cap].into(),
        ..Frame::new(flags, AppProto(1), TenantId(0), 1, vec![0; payload].into())
    };
    let start = Flags::REQ | Flags::START;
    assert_eq!(encoded(&frame(0, MAX_FRAME - HEADER_LEN + 1, start)), Err(FrameError::TooLarge(1_048_577)));
    assert_eq!(encoded(&frame(1, 0, Flags::REQ)), Err(FrameError::CapWithoutStart));
    assert_eq!(encoded(&frame(70_000, 0, start)), Err(FrameError::CapPastEnd));
    assert!(encoded(&frame(0, MAX_FRAME - HEADER_LEN, start)).is_ok());
}
