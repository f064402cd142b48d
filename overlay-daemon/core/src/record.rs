//! The binary payloads: messages, chunks, and what daemons say of them. Decides whether
//! bytes are a well-formed record; copies no payload.
//!
//! A record's first byte is its kind. Publish, event and gossip frames share the layouts, so
//! that what arrives by gossip goes to subscribers as the same bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::control::Incarnation;
use crate::frame::{CHUNK, MAX_BODY};
use crate::identity::{MAX_ID, MAX_TOPIC, SpiffeId, TenantId, Topic};

/// A BLAKE3-256 digest.
pub type Digest = [u8; 32];

/// Ids that one announcement lists.
pub const MAX_ANNOUNCED: usize = 1_024;

/// Bytes of the largest payload of an EVENT or gossip frame: a Message whose topic, origin and
/// payload are as long as they may be.
pub const MAX_RECORD: usize = 2 + MAX_ENVELOPE + CHUNK;
/// Bytes of the largest payload of a publisher's frame: a Piece.
pub const MAX_PUBLISH: usize = 1 + 32 + 4 + CHUNK;
const MAX_ENVELOPE: usize = 2 + MAX_TOPIC + 2 + MAX_ID + 3 * 8 + 4 + 32;

const DOMAIN: &[u8] = b"rustyonions.io overlay message id v1";

const MESSAGE: u8 = 0;
const BEGIN: u8 = 1;
const PIECE: u8 = 2;
const GAP: u8 = 3;
const ANNOUNCE: u8 = 4;
const GRAFT: u8 = 5;
const PRUNE: u8 = 6;

/// A message's name: see [`Envelope::id`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(pub Digest);

impl std::fmt::Display for MessageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl std::fmt::Debug for MessageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// Everything about a message but its payload. The tenant travels in the frame's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Bit 0: the payload is encrypted end to end. Others are 0.
    pub attributes: u8,
    /// What it was published under.
    pub topic: Topic,
    /// The daemon that accepted it.
    pub origin: SpiffeId,
    /// That daemon's process.
    pub incarnation: Incarnation,
    /// Its number among that process's messages, from 1.
    pub sequence: u64,
    /// When it was accepted, by the origin's clock, milliseconds since 1970.
    pub time_ms: u64,
    /// Bytes of the payload; at most [`MAX_BODY`].
    pub size: u32,
    /// The payload's BLAKE3-256.
    pub hash: Digest,
}

impl Envelope {
    /// BLAKE3 over a domain string, the tenant and every field of the envelope that says who
    /// sent what, each behind its length as a big-endian u32.
    #[must_use]
    pub fn id(&self, tenant: TenantId) -> MessageId {
        let mut hasher = blake3::Hasher::new();
        let mut field = |bytes: &[u8]| {
            hasher.update(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
            hasher.update(bytes);
        };
        field(DOMAIN);
        field(&tenant.0.to_be_bytes());
        field(&[self.attributes]);
        field(self.topic.as_str().as_bytes());
        field(self.origin.as_str().as_bytes());
        field(&self.incarnation.0.to_be_bytes());
        field(&self.sequence.to_be_bytes());
        field(&self.time_ms.to_be_bytes());
        field(&self.hash);
        MessageId(hasher.finalize().into())
    }

    /// Chunks that its payload travels in; 0 where it travels whole.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        chunks(self.size)
    }

    fn put(&self, out: &mut BytesMut) {
        out.put_u8(self.attributes);
        out.put_u8(u8::try_from(self.topic.as_str().len()).unwrap_or(u8::MAX));
        out.put_slice(self.topic.as_str().as_bytes());
        out.put_u16(u16::try_from(self.origin.as_str().len()).unwrap_or(u16::MAX));
        out.put_slice(self.origin.as_str().as_bytes());
        out.put_u64(self.incarnation.0);
        out.put_u64(self.sequence);
        out.put_u64(self.time_ms);
        out.put_u32(self.size);
        out.put_slice(&self.hash);
    }

    fn take(from: &mut Bytes) -> Option<Self> {
        let attributes = from.try_get_u8().ok()?;
        let topic_len = usize::from(from.try_get_u8().ok()?);
        let topic = text(from, topic_len)?.parse().ok()?;
        let origin_len = usize::from(from.try_get_u16().ok()?);
        let origin = text(from, origin_len)?.parse().ok()?;
        let incarnation = Incarnation(from.try_get_u64().ok()?);
        let sequence = from.try_get_u64().ok()?;
        let time_ms = from.try_get_u64().ok()?;
        let size = from.try_get_u32().ok()?;
        let hash = digest(from)?;
        (size as usize <= MAX_BODY).then_some(Self {
            attributes,
            topic,
            origin,
            incarnation,
            sequence,
            time_ms,
            size,
            hash,
        })
    }
}

/// The frame of a Message or Begin with another number of hops.
pub(crate) fn with_hops(frame: &[u8], hops: u8) -> Bytes {
    let mut frame = BytesMut::from(frame);
    if let Some(at) = frame.get_mut(1) {
        *at = hops;
    }
    frame.freeze()
}

/// Chunks that `size` bytes travel in; 0 where they travel whole.
#[must_use]
pub fn chunks(size: u32) -> u32 {
    if size as usize <= CHUNK { 0 } else { size.div_ceil(CHUNK as u32) }
}

/// A well-formed record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A message with its payload, at most 64 KiB.
    Message {
        /// Times it was passed on before; 0 from its origin.
        hops: u8,
        /// What it is.
        envelope: Envelope,
        /// Its bytes.
        payload: Bytes,
    },
    /// A message whose payload follows as chunks.
    Begin {
        /// As in `Message`.
        hops: u8,
        /// What it is.
        envelope: Envelope,
    },
    /// One chunk of a payload.
    Piece(Piece),
    /// Events that this subscription did not get.
    Gap {
        /// How many.
        missed: u32,
    },
    /// Messages that the sender holds.
    Announce(Vec<MessageId>),
    /// Send this message, and the next ones without being asked.
    Graft {
        /// Which.
        id: MessageId,
        /// Bit n: chunk n is wanted; 0: everything.
        chunks: u32,
    },
    /// Only announce from now on.
    Prune,
}

/// One chunk of a payload over 64 KiB: all are 65,536 bytes but the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The whole payload's BLAKE3-256.
    pub hash: Digest,
    /// Its place, from 0.
    pub index: u32,
    /// 1 to 65,536 bytes.
    pub bytes: Bytes,
}

impl Record {
    /// Reads the payload of an EVENT or gossip frame.
    #[must_use]
    pub fn decode(mut from: Bytes) -> Option<Self> {
        Some(match from.try_get_u8().ok()? {
            MESSAGE => {
                let hops = from.try_get_u8().ok()?;
                let envelope = Envelope::take(&mut from)?;
                let whole = envelope.chunks() == 0 && from.len() == envelope.size as usize;
                return whole.then_some(Self::Message { hops, envelope, payload: from });
            }
            BEGIN => {
                let hops = from.try_get_u8().ok()?;
                let envelope = Envelope::take(&mut from)?;
                return (envelope.chunks() > 0 && from.is_empty()).then_some(Self::Begin { hops, envelope });
            }
            PIECE => Self::Piece(Piece::take(from)?),
            GAP => Self::Gap { missed: from.try_get_u32().ok().filter(|_| from.is_empty())? },
            ANNOUNCE => {
                let count = from.len() / 32;
                if !from.len().is_multiple_of(32) || !(1..=MAX_ANNOUNCED).contains(&count) {
                    return None;
                }
                Self::Announce((0..count).map_while(|_| digest(&mut from).map(MessageId)).collect())
            }
            GRAFT => {
                let id = MessageId(digest(&mut from)?);
                Self::Graft { id, chunks: from.try_get_u32().ok().filter(|_| from.is_empty())? }
            }
            PRUNE if from.is_empty() => Self::Prune,
            _ => return None,
        })
    }

    /// The record as a payload.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        match self {
            Self::Message { hops, envelope, payload } => {
                out.reserve(128 + envelope.topic.as_str().len() + envelope.origin.as_str().len() + payload.len());
                out.put_slice(&[MESSAGE, *hops]);
                envelope.put(&mut out);
                out.put_slice(payload);
            }
            Self::Begin { hops, envelope } => {
                out.put_slice(&[BEGIN, *hops]);
                envelope.put(&mut out);
            }
            Self::Piece(piece) => piece.put(&mut out),
            Self::Gap { missed } => {
                out.put_u8(GAP);
                out.put_u32(*missed);
            }
            Self::Announce(ids) => {
                out.put_u8(ANNOUNCE);
                ids.iter().take(MAX_ANNOUNCED).for_each(|id| out.put_slice(&id.0));
            }
            Self::Graft { id, chunks } => {
                out.put_u8(GRAFT);
                out.put_slice(&id.0);
                out.put_u32(*chunks);
            }
            Self::Prune => out.put_u8(PRUNE),
        }
        out.freeze()
    }
}

impl Piece {
    fn take(mut from: Bytes) -> Option<Self> {
        let hash = digest(&mut from)?;
        let index = from.try_get_u32().ok()?;
        (1..=CHUNK).contains(&from.len()).then_some(Self { hash, index, bytes: from })
    }

    fn put(&self, out: &mut BytesMut) {
        out.reserve(37 + self.bytes.len());
        out.put_u8(PIECE);
        out.put_slice(&self.hash);
        out.put_u32(self.index);
        out.put_slice(&self.bytes);
    }
}

/// What a publisher's frames say, after the START that named the topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Publish {
    /// A message, at most 64 KiB.
    Message(Bytes),
    /// A larger one, whose chunks follow on the same stream, in order.
    Begin {
        /// Bytes of it.
        size: u32,
        /// Its BLAKE3-256.
        hash: Digest,
    },
    /// One of them.
    Piece(Piece),
}

impl Publish {
    /// Reads the payload of a publisher's frame. A `size` or message past its bound is
    /// well-formed: the answer to it is 413, not 400.
    #[must_use]
    pub fn decode(mut from: Bytes) -> Option<Self> {
        Some(match from.try_get_u8().ok()? {
            MESSAGE => Self::Message(from),
            BEGIN => {
                let size = from.try_get_u32().ok()?;
                Self::Begin { size, hash: digest(&mut from).filter(|_| from.is_empty())? }
            }
            PIECE => Self::Piece(Piece::take(from)?),
            _ => return None,
        })
    }

    /// The frame's payload.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        match self {
            Self::Message(payload) => {
                out.reserve(1 + payload.len());
                out.put_u8(MESSAGE);
                out.put_slice(payload);
            }
            Self::Begin { size, hash } => {
                out.put_u8(BEGIN);
                out.put_u32(*size);
                out.put_slice(hash);
            }
            Self::Piece(piece) => piece.put(&mut out),
        }
        out.freeze()
    }
}

/// `payload` in its chunks, sharing its memory.
pub fn pieces(payload: &Bytes, hash: Digest) -> impl Iterator<Item = Piece> {
    let payload = payload.clone();
    (0..).map_while(move |index: u32| {
        let start = (index as usize).checked_mul(CHUNK).filter(|start| *start < payload.len())?;
        let end = payload.len().min(start + CHUNK);
        Some(Piece { hash, index, bytes: payload.slice(start..end) })
    })
}

fn digest(from: &mut Bytes) -> Option<Digest> {
    let mut digest = Digest::default();
    from.try_copy_to_slice(&mut digest).ok()?;
    Some(digest)
}

fn text(from: &mut Bytes, len: usize) -> Option<String> {
    if from.len() < len {
        return None;
    }
    String::from_utf8(from.split_to(len).to_vec()).ok()
}

#[cfg(test)]
mod tests;
