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
    fn every_split_point(first in frames(), second in frames()) {
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
    }

    /// G-1, I-3, F1: a length past 1 MiB is refused from its own four bytes, whatever follows.
    #[test]
    fn oversize_is_refused_from_the_header(len in 1_048_577_u32.., tail in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut buf = BytesMut::from(&len.to_be_bytes()[..]);
        buf.extend_from_slice(&tail);
        let before = buf.capacity();
        prop_assert_eq!(decode(&mut buf), Err(FrameError::TooLarge(len)));
        prop_assert_eq!(buf.capacity(), before, "nothing was allocated for it");
    }

    /// F1: a decoder that waits for a large frame has not made room for it.
    #[test]
    fn waiting_allocates_nothing(len in 38_u32..=1_048_576) {
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

    /// F2: every length and capability length at its edges, against the rules written out.
    #[test]
    fn edges(len in prop::sample::select(vec![0_u32, 37, 38, 39, 100, 1_048_576, 1_048_577, u32::MAX]),
             cap in prop::sample::select(vec![0_u16, 1, 62, 63, u16::MAX]), start: bool) {
        let flags = if start { Flags::REQ | Flags::START } else { Flags::REQ };
        let mut bytes = header(&Frame::new(flags, AppProto(1), TenantId(0), 1, Bytes::new())).unwrap().to_vec();
        bytes[..4].copy_from_slice(&len.to_be_bytes());
        bytes[28..30].copy_from_slice(&cap.to_be_bytes());
        let want = if len > 1_048_576 { Some(413) }
            else if len < 38 || (cap > 0 && !start) || 38 + u32::from(cap) > len { Some(400) }
            else { None };
        let got = frame_len(&bytes).err().map(|e| e.status().code());
        prop_assert_eq!(got, want);
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
