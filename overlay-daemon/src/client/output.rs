//! How messages are written: payloads as they are, or one JSON object a line. Decides where
//! newlines go, so that output is exact where that can be, and readable where it cannot.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use overlay_core::identity::TenantId;
use overlay_core::record::Envelope;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::args::OutputFormat;

/// How each message becomes bytes of standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// The payload alone.
    Exact,
    /// The payload, and a newline if it does not end in one.
    Lines,
    /// One object a line.
    Json,
}

impl Style {
    /// One message into a pipe or file is exact. Several would run together, and a terminal's
    /// prompt would stand in the text.
    pub(super) fn of(format: OutputFormat, count: Option<u64>, terminal: bool) -> Self {
        match (format, count, terminal) {
            (OutputFormat::Json, _, _) => Self::Json,
            (OutputFormat::Raw, Some(1), false) => Self::Exact,
            (OutputFormat::Raw, _, _) => Self::Lines,
        }
    }

    /// A message as it is written.
    pub(super) fn message(self, tenant: TenantId, envelope: &Envelope, payload: Bytes) -> Bytes {
        match self {
            Self::Lines if payload.last() != Some(&b'\n') => {
                let mut out = BytesMut::with_capacity(payload.len() + 1);
                out.put_slice(&payload);
                out.put_u8(b'\n');
                out.freeze()
            }
            Self::Exact | Self::Lines => payload,
            Self::Json => line(&Message::of(tenant, envelope, &payload)),
        }
    }

    /// A gap as it is written, where it has a place in the output.
    pub(super) fn gap(self, missed: u32) -> Option<Bytes> {
        #[derive(Serialize)]
        struct Gap {
            gap: u32,
        }
        (self == Self::Json).then(|| line(&Gap { gap: missed }))
    }
}

fn line(value: &impl Serialize) -> Bytes {
    // No map with other keys than strings and no failing serializer: the only ways in which
    // serde_json refuses.
    let mut out = serde_json::to_vec(value).unwrap_or_default();
    out.push(b'\n');
    out.into()
}

/// A message as JSON; the member names are the command's contract with scripts.
#[derive(Serialize)]
struct Message<'a> {
    topic: &'a str,
    tenant: TenantId,
    id: String,
    origin: &'a str,
    incarnation: String,
    sequence: u64,
    /// Null where the origin's clock is past what RFC 3339 can write.
    time: Option<String>,
    size: u32,
    b3: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
}

impl<'a> Message<'a> {
    fn of(tenant: TenantId, envelope: &'a Envelope, payload: &'a [u8]) -> Self {
        let text = std::str::from_utf8(payload).ok();
        Self {
            topic: envelope.topic.as_str(),
            tenant,
            id: envelope.id(tenant).to_string(),
            origin: envelope.origin.as_str(),
            incarnation: envelope.incarnation.into(),
            sequence: envelope.sequence,
            time: rfc3339(envelope.time_ms),
            size: envelope.size,
            b3: format!("b3:{}", blake3::Hash::from_bytes(envelope.hash).to_hex()),
            payload: text,
            payload_base64: text.is_none().then(|| STANDARD.encode(payload)),
        }
    }
}

/// Milliseconds since 1970 as RFC 3339, in UTC.
fn rfc3339(unix_ms: u64) -> Option<String> {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000).ok()?;
    time.format(&Rfc3339).ok()
}

#[cfg(test)]
mod tests {
    use super::super::testing::envelope;
    use super::*;

    #[test]
    fn newlines_go_where_they_are_needed() {
        use OutputFormat::{Json, Raw};
        for (format, count, terminal, want) in [
            (Raw, Some(1), false, Style::Exact),
            (Raw, Some(1), true, Style::Lines),
            (Raw, Some(2), false, Style::Lines),
            (Raw, None, false, Style::Lines),
            (Json, Some(1), false, Style::Json),
        ] {
            assert_eq!(Style::of(format, count, terminal), want);
        }
        let written = |style: Style, payload: &'static [u8]| {
            style.message(TenantId(0), &envelope(1, payload.len(), [0; 32]), Bytes::from_static(payload))
        };
        assert_eq!(written(Style::Exact, b"a"), &b"a"[..]);
        assert_eq!(written(Style::Lines, b"a"), &b"a\n"[..]);
        assert_eq!(written(Style::Lines, b"a\n"), &b"a\n"[..]);
        assert_eq!(written(Style::Lines, b""), &b"\n"[..]);
        assert_eq!((Style::Lines.gap(3), Style::Json.gap(3)), (None, Some(Bytes::from_static(b"{\"gap\":3}\n"))));
    }

    #[test]
    fn messages_are_objects() {
        let of = |payload: &'static [u8]| {
            let envelope = envelope(9, payload.len(), blake3::hash(payload).into());
            let written = Style::Json.message(TenantId(1), &envelope, Bytes::from_static(payload));
            assert_eq!(written.iter().filter(|byte| **byte == b'\n').count(), 1, "one line");
            let value: serde_json::Value = serde_json::from_slice(&written).unwrap();
            (envelope.id(TenantId(1)).to_string(), value)
        };
        let (id, text) = of(b"two\nlines");
        let want = serde_json::json!({
            "topic": "news", "tenant": "00000000-0000-0000-0000-000000000001", "id": id,
            "origin": "spiffe://overlay.local/ns/default/overlaynode/mesh", "incarnation": "0000000000000007",
            "sequence": 9, "time": "2023-11-14T22:13:20.123Z", "size": 9,
            "b3": format!("b3:{}", blake3::hash(b"two\nlines").to_hex()), "payload": "two\nlines",
        });
        assert_eq!(text, want);
        let (_, binary) = of(b"\xff\x00");
        assert_eq!((&binary["payload_base64"], binary.get("payload")), (&"/wA=".into(), None));
    }

    #[test]
    fn times_are_written_or_left_out() {
        for (ms, want) in
            [(0, Some("1970-01-01T00:00:00Z")), (951_782_400_000, Some("2000-02-29T00:00:00Z")), (u64::MAX, None)]
        {
            assert_eq!(rfc3339(ms).as_deref(), want);
        }
    }
}
