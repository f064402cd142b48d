//! Control payloads, records and names: what is read reads back the same.

use std::fmt::Debug;

use bytes::Bytes;
use overlay_core::control::{Hello, HelloReply, MAX_CONTROL, Open, json, parse};
use overlay_core::frame::{CHUNK, MAX_BODY};
use overlay_core::identity::{SpiffeId, TenantId, Topic};
use overlay_core::record::{MAX_ANNOUNCED, MAX_RECORD, Publish, Record};
use overlay_core::status::ErrorBody;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::chosen;

/// The first byte says what the rest is read as.
pub fn payloads(data: &[u8]) {
    let (kind, payload) = chosen(data);
    match kind % 7 {
        0 => control::<Hello>(payload),
        1 => control::<HelloReply>(payload),
        2 => control::<Open>(payload),
        3 => control::<ErrorBody>(payload),
        4 => record(payload),
        5 => publish(payload),
        _ => names(payload),
    }
}

fn control<T: DeserializeOwned + Serialize + Debug + PartialEq>(payload: &[u8]) {
    if let Some(value) = parse::<T>(payload) {
        assert!(payload.len() <= MAX_CONTROL);
        let text = json(&value);
        // Written out it may be longer than it was read, and is then refused.
        let again = parse::<T>(&text);
        assert!(again.as_ref() == Some(&value) || text.len() > MAX_CONTROL, "{value:?}");
    }
}

fn record(payload: &[u8]) {
    let Some(record) = Record::decode(Bytes::copy_from_slice(payload)) else { return };
    assert_eq!(record.encode(), payload, "one record has one text");
    match record {
        Record::Message { envelope, payload: body, .. } => {
            assert!(payload.len() <= MAX_RECORD && body.len() == envelope.size as usize && body.len() <= CHUNK);
            let id = |tenant| envelope.id(TenantId(tenant));
            assert!(id(0) == id(0) && id(0) != id(1), "a tenant is part of the name");
        }
        Record::Begin { envelope, .. } => {
            let chunks = envelope.chunks() as usize;
            assert!((2..=MAX_BODY / CHUNK).contains(&chunks) && chunks * CHUNK >= envelope.size as usize);
        }
        Record::Piece(piece) => assert!((1..=CHUNK).contains(&piece.bytes.len())),
        Record::Announce(ids) => assert!((1..=MAX_ANNOUNCED).contains(&ids.len())),
        Record::Gap { .. } | Record::Graft { .. } | Record::Prune => {}
    }
}

fn publish(payload: &[u8]) {
    if let Some(publish) = Publish::decode(Bytes::copy_from_slice(payload)) {
        assert_eq!(publish.encode(), payload, "one frame of a publisher has one text");
    }
}

fn names(payload: &[u8]) {
    let Ok(text) = std::str::from_utf8(payload) else { return };
    if let Ok(topic) = text.parse::<Topic>() {
        assert!(topic.as_str() == text && !text.contains('*'));
    }
    if let Ok(tenant) = text.parse::<TenantId>() {
        assert_eq!(tenant.to_string().parse(), Ok(tenant));
    }
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert!(id.as_str() == text && id.covers(&id) && id.without_pod().covers(&id));
        assert_eq!(id.without_pod().as_str().parse(), Ok(id.without_pod()));
    }
}
