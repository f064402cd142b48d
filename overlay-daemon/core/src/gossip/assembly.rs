//! Payloads that come in chunks: kept apart until whole and verified (I-4). Bounded in
//! number, in all and from one link.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{LinkId, LinkSet};
use crate::Millis;
use crate::frame::CHUNK;
use crate::identity::TenantId;
use crate::record::{Digest, Envelope, MessageId, Piece, Record};

/// Payloads that may be incomplete at once; 1 MiB each at the most.
const MAX_OPEN: usize = 64;
/// Of which from one link.
const MAX_OPEN_A_LINK: usize = 16;

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

/// The incomplete payloads.
#[derive(Debug, Default)]
pub(super) struct Assemblies(BTreeMap<MessageId, Assembly>);

impl Assembly {
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
    pub(super) fn get_mut(&mut self, id: MessageId) -> Option<&mut Assembly> {
        self.0.get_mut(&id)
    }

    /// Begins one. False where a bound refuses it: it stays announced and comes later.
    pub(super) fn begin(
        &mut self,
        id: MessageId,
        tenant: TenantId,
        hops: u8,
        envelope: Envelope,
        from: LinkId,
        now: Millis,
    ) -> bool {
        let own = self.0.values().filter(|assembly| assembly.from == from).count();
        if self.0.len() >= MAX_OPEN || own >= MAX_OPEN_A_LINK {
            return false;
        }
        let pieces = vec![None; envelope.chunks() as usize];
        let mut holders = LinkSet::default();
        holders.insert(from);
        self.0.insert(id, Assembly { tenant, hops, envelope, pieces, from, holders, progress: now, asked: 0 });
        true
    }

    /// A chunk came. Gives every message that it made whole; a payload that does not verify
    /// is dropped; whoever said that they have it is given instead.
    pub(super) fn add(
        &mut self,
        tenant: TenantId,
        piece: &Piece,
        now: Millis,
    ) -> Vec<Result<Whole, (MessageId, LinkSet)>> {
        let mut done = Vec::new();
        for (id, assembly) in &mut self.0 {
            if assembly.tenant != tenant
                || assembly.envelope.hash != piece.hash
                || assembly.expected(piece.index) != piece.bytes.len()
            {
                continue;
            }
            let Some(slot @ None) = assembly.pieces.get_mut(piece.index as usize) else { continue };
            *slot = Some(Record::Piece(piece.clone()).encode());
            assembly.progress = now;
            assembly.asked = 0;
            if assembly.missing() == 0 {
                done.push(*id);
            }
        }
        done.into_iter().filter_map(|id| self.0.remove(&id).map(|assembly| finish(id, assembly))).collect()
    }

    /// What all of them will take: their announced sizes.
    pub(super) fn bytes(&self) -> u64 {
        self.0.values().map(|assembly| u64::from(assembly.envelope.size)).sum()
    }

    /// The ones without progress since `before`.
    pub(super) fn stalled(&mut self, before: Millis) -> impl Iterator<Item = (MessageId, &mut Assembly)> {
        self.0.iter_mut().filter(move |(_, a)| a.progress <= before).map(|(id, a)| (*id, a))
    }

    /// When the next one stalls, `after_ms` after its last progress.
    pub(super) fn next_stall(&self, after_ms: u64) -> Option<Millis> {
        self.0.values().map(|assembly| assembly.progress.after(after_ms)).min()
    }

    pub(super) fn remove(&mut self, id: MessageId) {
        self.0.remove(&id);
    }

    pub(super) fn forget_link(&mut self, link: LinkId) {
        self.0.values_mut().for_each(|assembly| assembly.holders.remove(link));
    }
}

fn finish(id: MessageId, assembly: Assembly) -> Result<Whole, (MessageId, LinkSet)> {
    if !assembly.verify() {
        return Err((id, assembly.holders));
    }
    let Assembly { tenant, hops, envelope, pieces, from, holders, .. } = assembly;
    Ok(Whole { id, from, holders, tenant, hops, envelope, pieces: pieces.into_iter().flatten().collect() })
}

/// The hash of a payload.
#[must_use]
pub fn digest(payload: &[u8]) -> Digest {
    blake3::hash(payload).into()
}
