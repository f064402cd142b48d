//! The OAP/1 frame: its fields, its flags, its bounds. Knows nothing of bytes on a wire
//! (`codec`) or of what a sequence of frames means (`session`).

use bytes::Bytes;

use crate::identity::TenantId;

/// Bytes before `cap` and `payload`.
pub const HEADER_LEN: usize = 38;
/// Bytes of a whole frame, header included (I-3).
pub const MAX_FRAME: usize = 1_048_576;
/// Bytes of a capability token; longer ones are refused before they are looked at.
pub const MAX_CAP: usize = 2_048;
/// Bytes of an application chunk (I-3): what is larger travels in pieces of this size.
pub const CHUNK: usize = 65_536;
/// Bytes of one published message in all, chunks added up (I-9).
pub const MAX_BODY: usize = 1_048_576;
/// The only version there is.
pub const VERSION: u16 = 1;

/// The flag bits of a frame. Bits 8 to 15 are dropped on receipt and sent as 0.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(u16);

impl Flags {
    /// From the side that opened the stream.
    pub const REQ: Self = Self(1);
    /// An answer to a request.
    pub const RESP: Self = Self(1 << 1);
    /// A push that no request asked for.
    pub const EVENT: Self = Self(1 << 2);
    /// Opens a stream; the only frame that may carry a capability.
    pub const START: Self = Self(1 << 3);
    /// Closes this side of the stream.
    pub const END: Self = Self(1 << 4);
    /// The sender wants its window opened by an acknowledgement.
    pub const ACK_REQ: Self = Self(1 << 5);
    /// The payload is one zstd frame.
    pub const COMP: Self = Self(1 << 6);
    /// The payload is encrypted end to end by the application.
    pub const APP_E2E: Self = Self(1 << 7);

    /// The flags in `bits`, undefined ones dropped.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & 0xff)
    }

    /// The bits as they are sent.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// These flags but those of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether every flag of `other` is set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::fmt::Debug for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMES: [&str; 8] = ["REQ", "RESP", "EVENT", "START", "END", "ACK_REQ", "COMP", "APP_E2E"];
        let set = NAMES.iter().enumerate().filter(|(bit, _)| self.0 & (1 << bit) != 0);
        f.write_str(&set.map(|(_, name)| *name).collect::<Vec<_>>().join("|"))
    }
}

/// Which application protocol a stream speaks: the numbers of `PROTOCOL.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AppProto(pub u16);

impl AppProto {
    /// HELLO and ping.
    pub const CONTROL: Self = Self(0);
    /// Publish and subscribe, between a client and a daemon.
    pub const PUBSUB: Self = Self(1);
    /// Gossip, between daemons.
    pub const GOSSIP: Self = Self(3);
    /// The state of a daemon, for its own operator on the Unix socket.
    pub const ADMIN: Self = Self(4);
}

/// One OAP/1 frame. Cloning shares `cap` and `payload`, so that one message encoded once
/// stands in many queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the frame does to its stream.
    pub flags: Flags,
    /// Status on a response, else 0.
    pub code: u16,
    /// The protocol its stream speaks.
    pub app: AppProto,
    /// Whose it is; every frame of a stream repeats its START's.
    pub tenant: TenantId,
    /// The stream, within its session.
    pub corr_id: u64,
    /// The capability token; empty but on START.
    pub cap: Bytes,
    /// The rest.
    pub payload: Bytes,
}

impl Frame {
    /// A frame with no code and no capability.
    #[must_use]
    pub fn new(flags: Flags, app: AppProto, tenant: TenantId, corr_id: u64, payload: Bytes) -> Self {
        Self { flags, code: 0, app, tenant, corr_id, cap: Bytes::new(), payload }
    }

    /// The answer to a frame of stream `corr_id`, with `code`.
    #[must_use]
    pub fn response(to: &Self, code: u16, end: bool, payload: Bytes) -> Self {
        let flags = if end { Flags::RESP | Flags::END } else { Flags::RESP };
        Self { code, ..Self::new(flags, to.app, to.tenant, to.corr_id, payload) }
    }

    /// Bytes of the encoded frame.
    #[must_use]
    pub fn wire_len(&self) -> usize {
        HEADER_LEN + self.cap.len() + self.payload.len()
    }
}
