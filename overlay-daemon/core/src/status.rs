//! The codes a refusal may carry, and the error object that goes with them.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// A refusal's code on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    /// 400: the frame or its sequence is illegal.
    BadRequest,
    /// 401: no valid capability.
    Unauthorized,
    /// 403: a valid capability that does not allow this.
    Forbidden,
    /// 404: no such thing here.
    NotFound,
    /// 413: past a size bound.
    PayloadTooLarge,
    /// 429: past a rate or in-flight bound; try later.
    QuotaExhausted,
    /// 500: a fault of the daemon's own.
    Internal,
    /// 503: shedding or draining; try later.
    Unavailable,
}

impl Status {
    /// Every status, in the order of its number.
    pub const ALL: [Self; 8] = [
        Self::BadRequest,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::PayloadTooLarge,
        Self::QuotaExhausted,
        Self::Internal,
        Self::Unavailable,
    ];

    /// The number in a frame's `code`.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::PayloadTooLarge => 413,
            Self::QuotaExhausted => 429,
            Self::Internal => 500,
            Self::Unavailable => 503,
        }
    }

    /// The word in the error object's `code`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::PayloadTooLarge => "payload_too_large",
            Self::QuotaExhausted => "quota_exhausted",
            Self::Internal => "internal",
            Self::Unavailable => "unavailable",
        }
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub const fn retryable(self) -> bool {
        matches!(self, Self::QuotaExhausted | Self::Unavailable)
    }

    /// Which `reason` of `overlay_rejected_total` counts it.
    #[must_use]
    pub const fn reason(self) -> Reason {
        match self {
            Self::BadRequest | Self::NotFound => Reason::Protocol,
            Self::Unauthorized | Self::Forbidden => Reason::Auth,
            Self::PayloadTooLarge => Reason::Size,
            Self::QuotaExhausted => Reason::Quota,
            Self::Internal | Self::Unavailable => Reason::Degraded,
        }
    }
}

/// The closed set of `reason` labels of `overlay_rejected_total` (C-5 names the first four).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// A rate or in-flight cap.
    Quota,
    /// A deadline passed: handshake, read, write or idle.
    Timeout,
    /// A bounded queue was full.
    Overflow,
    /// Shedding, draining, or a fault of the daemon's own.
    Degraded,
    /// An illegal frame or sequence.
    Protocol,
    /// A token missing, invalid or not allowing it.
    Auth,
    /// A frame, message or inflated payload past its bound (413).
    Size,
    /// A TLS handshake that failed: version, key exchange, certificate.
    Tls,
    /// A message older than the dedupe window, or under its origin's watermark.
    Stale,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 9] = [
        Self::Quota,
        Self::Timeout,
        Self::Overflow,
        Self::Degraded,
        Self::Protocol,
        Self::Auth,
        Self::Size,
        Self::Tls,
        Self::Stale,
    ];

    /// The label's value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Quota => "quota",
            Self::Timeout => "timeout",
            Self::Overflow => "overflow",
            Self::Degraded => "degraded",
            Self::Protocol => "protocol",
            Self::Auth => "auth",
            Self::Size => "size",
            Self::Tls => "tls",
            Self::Stale => "stale",
        }
    }
}

/// A refusal, before it is put on a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its code.
    pub status: Status,
    /// Short, for a person; no internals, no secrets.
    pub message: &'static str,
    /// Milliseconds after which to try again; sent with 429 and 503 only.
    pub retry_after_ms: u64,
}

impl Refusal {
    /// A refusal that is not worth repeating.
    #[must_use]
    pub const fn new(status: Status, message: &'static str) -> Self {
        Self { status, message, retry_after_ms: 0 }
    }

    /// A refusal to be tried again after `retry_after_ms`.
    #[must_use]
    pub const fn later(status: Status, message: &'static str, retry_after_ms: u64) -> Self {
        Self { status, message, retry_after_ms }
    }

    /// The error object as a payload, for the stream `corr_id`.
    #[must_use]
    pub fn body(&self, corr_id: u64) -> Bytes {
        let retryable = self.status.retryable();
        let body = ErrorBody {
            code: self.status.name().to_owned(),
            message: self.message.to_owned(),
            retryable,
            corr_id: corr_id.to_string(),
            retry_after_ms: retryable.then_some(self.retry_after_ms),
        };
        serde_json::to_vec(&body).map(Bytes::from).unwrap_or_default()
    }
}

/// The JSON object that a refusal carries as payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The word for the status.
    pub code: String,
    /// For a person.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The stream, for tracing.
    pub corr_id: String,
    /// On 429 and 503: milliseconds to wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}
