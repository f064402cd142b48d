//! Payloads that come in chunks: kept apart until whole and verified (I-4). Bounded in
//! number, in all and from one link.
//!
//! Chunks of any link are put together, until they turn out false or are said to be of another
//! size: a chunk alone cannot be verified. From then on each link's chunks of that message are
//! their own, so that no other can spoil them, and who completes false ones is not heard again.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{LinkId, LinkSet};
use crate::Millis;
use crate::frame::CHUNK;
use crate::identity::TenantId;
use crate::record::{Digest, Envelope, MessageId, Piece, Record};

/// Payloads that may be incomplete at once; 1 MiB each at the most.
const MAX_OPEN: usize = 64;
/// Of which from one link. Where all places are taken, a link that has fewer is given one of
/// the link that has the most.
const MAX_OPEN_A_LINK: usize = 16;
/// Messages of which false chunks came, that are remembered.
const MAX_SPOILT: usize = 4_096;

/// A message whose chunks are coming.
#[derive(Debug)]
pub(super) struct Assembly {
    pub(super) tenant: TenantId,
    pub(super) hops: u8,
    pub(super) envelope: Envelope,
    /// The payloads of the Piece frames, by index.
    pieces: Vec<Option<Bytes>>,
    /// Who began it, and who else said that they have it.
    pub(super) from: LinkId,
    pub(super) holders: LinkSet,
    /// When the last chunk came, or was last asked for.
    pub(super) progress: Millis,
    pub(super) asked: u8,
}

/// A whole message, verified.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) id: MessageId,
    pub(super) from: LinkId,
    pub(super) holders: LinkSet,
    pub(super) tenant: TenantId,
    pub(super) hops: u8,
    pub(super) envelope: Envelope,
    pub(super) pieces: Vec<Bytes>,
}

/// What is being put together: a message, of any link's chunks or of one link's alone.
pub(super) type Key = (MessageId, Option<LinkId>);

/// What a Begin is to what is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    /// It is being put together, and the link has it too.
    Joins,
    /// The link completed false chunks of it before, or begins it twice.
    False,
    /// It begins; the chunks of any link count, or of this one alone. Of those who began it
    /// otherwise, these are to be asked anew.
    Begins(Key, LinkSet),
}

/// A message that false chunks came of.
#[derive(Debug)]
struct Spoilt {
    at: Millis,
    /// Links whose own chunks did not verify.
    by: LinkSet,
}

/// The incomplete payloads.
#[derive(Debug, Default)]
pub(super) struct Assemblies {
    open: BTreeMap<Key, Assembly>,
    spoilt: BTreeMap<MessageId, Spoilt>,
}

impl Assembly {
    /// One that `from` begins.
    pub(super) fn new(tenant: TenantId, hops: u8, envelope: Envelope, from: LinkId, now: Millis) -> Self {
        let pieces = vec![None; envelope.chunks() as usize];
        let mut holders = LinkSet::default();
        holders.insert(from);
        Self { tenant, hops, envelope, pieces, from, holders, progress: now, asked: 0 }
    }

    /// Bit n: chunk n has not come.
    pub(super) fn missing(&self) -> u32 {
        let holes = self.pieces.iter().enumerate().filter(|(_, piece)| piece.is_none());
        holes
            .fold(0, |bits, (index, _)| bits | 1_u32.checked_shl(u32::try_from(index).unwrap_or(u32::MAX)).unwrap_or(0))
    }

    /// Bytes that chunk `index` must have.
    fn expected(&self, index: u32) -> usize {
        (self.envelope.size as usize).saturating_sub(index as usize * CHUNK).min(CHUNK)
    }

    fn verify(&self) -> bool {
        let mut hasher = blake3::Hasher::new();
        for piece in self.pieces.iter().flatten() {
            // Behind kind, hash and index: see `record`.
            hasher.update(piece.get(37..).unwrap_or_default());
        }
        *hasher.finalize().as_bytes() == self.envelope.hash
    }
}

impl Assemblies {
    /// The message as it is put together of any link's chunks.
    pub(super) fn shared(&mut self, id: MessageId) -> Option<&mut Assembly> {
        self.open.get_mut(&(id, None))
    }

    /// Whether a link's own chunks of a message are coming.
    pub(super) fn is_alone(&self, id: MessageId, link: LinkId) -> bool {
        self.open.contains_key(&(id, Some(link)))
    }

    /// A link begins a message of so many bytes.
    pub(super) fn handle_begin(&mut self, id: MessageId, link: LinkId, size: u32, now: Millis) -> Begun {
        if let Some(spoilt) = self.spoilt.get(&id) {
            let again = self.is_alone(id, link);
            return match spoilt.by.contains(link) || again {
                true => Begun::False,
                false => Begun::Begins((id, Some(link)), LinkSet::default()),
            };
        }
        let Some(assembly) = self.open.get_mut(&(id, None)) else {
            return Begun::Begins((id, None), LinkSet::default());
        };
        if assembly.envelope.size == size {
            assembly.holders.insert(link);
            return Begun::Joins;
        }
        // The id does not say the size: one of the two lies, and which is seen when all is there.
        let mut others = assembly.holders;
        if assembly.from == link && others.iter().count() == 1 {
            return Begun::False;
        }
        others.remove(link);
        self.open.remove(&(id, None));
        self.spoil(id, now);
        Begun::Begins((id, Some(link)), others)
    }

    /// Takes up what begins. None where a bound refuses it: it stays announced and comes later.
    /// What had to make room for it is given.
    pub(super) fn begin(&mut self, key: Key, assembly: Assembly) -> Option<Option<(MessageId, Assembly)>> {
        let mut counts: BTreeMap<LinkId, usize> = BTreeMap::new();
        self.open.values().for_each(|other| *counts.entry(other.from).or_default() += 1);
        let own = counts.get(&assembly.from).copied().unwrap_or(0);
        if own >= MAX_OPEN_A_LINK {
            return None;
        }
        let mut evicted = None;
        if self.open.len() >= MAX_OPEN {
            let (most, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
            let of_most = self.open.iter().filter(|(_, other)| count > own + 1 && other.from == most);
            let key = of_most.min_by_key(|(_, other)| other.progress).map(|(key, _)| *key)?;
            evicted = self.open.remove(&key).map(|assembly| (key.0, assembly));
        }
        self.open.insert(key, assembly);
        Some(evicted)
    }

    /// From now on each link's chunks of a message are their own.
    pub(super) fn spoil(&mut self, id: MessageId, now: Millis) {
        if self.spoilt.len() >= MAX_SPOILT
            && let Some(oldest) = self.spoilt.iter().min_by_key(|(_, spoilt)| spoilt.at).map(|(id, _)| *id)
        {
            self.spoilt.remove(&oldest);
        }
        self.spoilt.entry(id).or_insert(Spoilt { at: now, by: LinkSet::default() });
    }

    /// A link sent a chunk. Gives every message that it made whole; a payload that does not
    /// verify is dropped; whoever else said that they have it is given instead.
    pub(super) fn add(
        &mut self,
        link: LinkId,
        tenant: TenantId,
        piece: &Piece,
        now: Millis,
    ) -> Vec<Result<Whole, (MessageId, LinkSet)>> {
        let mut done = Vec::new();
        for (key, assembly) in &mut self.open {
            if assembly.tenant != tenant
                || assembly.envelope.hash != piece.hash
                || assembly.expected(piece.index) != piece.bytes.len()
                || key.1.is_some_and(|only| only != link)
            {
                continue;
            }
            let Some(slot @ None) = assembly.pieces.get_mut(piece.index as usize) else { continue };
            *slot = Some(Record::Piece(piece.clone()).encode());
            assembly.progress = now;
            assembly.asked = 0;
            if assembly.missing() == 0 {
                done.push(*key);
            }
        }
        done.into_iter().filter_map(|key| self.finish(key, now)).collect()
    }

    fn finish(&mut self, key: Key, now: Millis) -> Option<Result<Whole, (MessageId, LinkSet)>> {
        let (id, assembly) = (key.0, self.open.remove(&key)?);
        if !assembly.verify() {
            self.spoil(id, now);
            let Some(link) = key.1 else { return Some(Err((id, assembly.holders))) };
            if let Some(spoilt) = self.spoilt.get_mut(&id) {
                spoilt.by.insert(link);
            }
            return Some(Err((id, LinkSet::default())));
        }
        self.open.retain(|(other, _), _| *other != id);
        self.spoilt.remove(&id);
        let Assembly { tenant, hops, envelope, pieces, from, holders, .. } = assembly;
        Some(Ok(Whole { id, from, holders, tenant, hops, envelope, pieces: pieces.into_iter().flatten().collect() }))
    }

    /// What all of them will take: their announced sizes.
    pub(super) fn bytes(&self) -> u64 {
        self.open.values().map(|assembly| u64::from(assembly.envelope.size)).sum()
    }

    /// The ones without progress since `before`.
    pub(super) fn stalled(&mut self, before: Millis) -> impl Iterator<Item = (Key, &mut Assembly)> {
        self.open.iter_mut().filter(move |(_, a)| a.progress <= before).map(|(key, a)| (*key, a))
    }

    /// When the next one stalls, `after_ms` after its last progress.
    pub(super) fn next_stall(&self, after_ms: u64) -> Option<Millis> {
        self.open.values().map(|assembly| assembly.progress.after(after_ms)).min()
    }

    pub(super) fn remove(&mut self, key: Key) {
        self.open.remove(&key);
    }

    /// A link is gone, and its number will name another.
    pub(super) fn forget_link(&mut self, link: LinkId) {
        self.open.retain(|(_, only), _| *only != Some(link));
        self.open.values_mut().for_each(|assembly| assembly.holders.remove(link));
        self.spoilt.values_mut().for_each(|spoilt| spoilt.by.remove(link));
    }
}

/// The hash of a payload.
#[must_use]
pub fn digest(payload: &[u8]) -> Digest {
    blake3::hash(payload).into()
}
