//! Records of a subscription to whole, verified messages. Decides what is delivered: nothing
//! whose size or BLAKE3 is not what its envelope says.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use overlay_core::identity::TenantId;
use overlay_core::record::{Envelope, Piece, Record};

/// Messages whose chunks may be under way at once. The daemon sends them nearly one after
/// the other; each costs at most 1 MiB here.
const MAX_PARTIAL: usize = 16;

/// Why a subscription cannot be trusted any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Corrupt {
    /// A payload that is not what its envelope says. It was not delivered.
    #[error("the daemon sent message {0}, whose payload does not match its BLAKE3: not delivered")]
    Hash(String),
    /// Not a record, or one that has no place in a subscription.
    #[error("the daemon sent an event that is not a message")]
    Record,
}

/// What a record completes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// A message, verified.
    Message(Envelope, Bytes),
    /// So many messages are missing here.
    Gap(u32),
}

struct Partial {
    envelope: Envelope,
    next: u32,
    bytes: BytesMut,
}

/// The messages under way.
#[derive(Default)]
pub(super) struct Assembly {
    partial: VecDeque<Partial>,
}

impl Assembly {
    /// Takes an event's payload in; gives back what it completes.
    pub(super) fn handle_event(&mut self, payload: Bytes, tenant: TenantId) -> Result<Option<Delivery>, Corrupt> {
        match Record::decode(payload).ok_or(Corrupt::Record)? {
            Record::Message { envelope, payload, .. } => verified(envelope, payload, tenant).map(Some),
            Record::Begin { envelope, .. } => {
                self.partial.push_back(Partial { envelope, next: 0, bytes: BytesMut::new() });
                // The rest of the oldest never came.
                let lost = self.partial.len() > MAX_PARTIAL && self.partial.pop_front().is_some();
                Ok(lost.then_some(Delivery::Gap(1)))
            }
            Record::Piece(piece) => self.handle_piece(&piece, tenant),
            Record::Gap { missed } => Ok(Some(Delivery::Gap(missed))),
            Record::Announce(_) | Record::Graft { .. } | Record::Prune => Err(Corrupt::Record),
        }
    }

    /// Two messages may have the same payload, and so chunks of the same name: either may take
    /// a chunk, since it is the same bytes.
    fn handle_piece(&mut self, piece: &Piece, tenant: TenantId) -> Result<Option<Delivery>, Corrupt> {
        let of_hash = |partial: &Partial| partial.envelope.hash == piece.hash;
        let Some(at) = self.partial.iter().position(|p| of_hash(p) && p.next == piece.index) else {
            // Chunks come in order: one that does not follow means that others were left out.
            // Of a message that is not under way, nothing was promised.
            let lost = self.partial.iter().position(of_hash).and_then(|at| self.partial.remove(at));
            return Ok(lost.map(|_| Delivery::Gap(1)));
        };
        let partial = &mut self.partial[at];
        if partial.bytes.len() + piece.bytes.len() > partial.envelope.size as usize {
            return Err(Corrupt::Hash(partial.envelope.id(tenant).to_string()));
        }
        partial.bytes.extend_from_slice(&piece.bytes);
        partial.next += 1;
        if partial.next < partial.envelope.chunks() {
            return Ok(None);
        }
        let whole = self.partial.remove(at);
        whole.map(|whole| verified(whole.envelope, whole.bytes.freeze(), tenant)).transpose()
    }
}

fn verified(envelope: Envelope, payload: Bytes, tenant: TenantId) -> Result<Delivery, Corrupt> {
    if payload.len() == envelope.size as usize && blake3::hash(&payload) == envelope.hash {
        return Ok(Delivery::Message(envelope, payload));
    }
    Err(Corrupt::Hash(envelope.id(tenant).to_string()))
}

#[cfg(test)]
mod tests {
    use overlay_core::frame::CHUNK;
    use overlay_core::record::pieces;

    use super::super::testing::{envelope, message};
    use super::*;

    const TENANT: TenantId = TenantId(0);

    fn large(sequence: u64, fill: u8, size: usize) -> (Envelope, Bytes, Vec<Record>) {
        let payload = Bytes::from(vec![fill; size]);
        let hash = blake3::hash(&payload).into();
        let envelope = envelope(sequence, size, hash);
        let begin = Record::Begin { hops: 1, envelope: envelope.clone() };
        let records = std::iter::once(begin).chain(pieces(&payload, hash).map(Record::Piece)).collect();
        (envelope, payload, records)
    }

    fn feed(records: &[Record]) -> Result<Vec<Delivery>, Corrupt> {
        let mut assembly = Assembly::default();
        let fed: Result<Vec<_>, _> =
            records.iter().map(|record| assembly.handle_event(record.encode(), TENANT)).collect();
        fed.map(|deliveries| deliveries.into_iter().flatten().collect())
    }

    #[test]
    fn messages_are_put_together() {
        let (first, bytes, records) = large(1, 1, CHUNK * 3 + 1);
        let whole = Delivery::Message(first, bytes);
        assert_eq!(feed(&records), Ok(vec![whole.clone()]));
        // Others may stand between.
        let (second, other, others) = large(2, 2, CHUNK + 1);
        let mut mixed = records.clone();
        mixed.splice(2..2, others);
        mixed.insert(3, message(3, b"small"));
        let got = feed(&mixed).unwrap();
        assert_eq!(got.len(), 3);
        assert_eq!((&got[1], &got[2]), (&Delivery::Message(second, other), &whole));
    }

    /// Chunks are named by what they are of: two messages of one payload share the names.
    #[test]
    fn twins_both_arrive() {
        let (_, _, one) = large(1, 1, CHUNK * 2);
        let (_, _, two) = large(2, 1, CHUNK * 2);
        for order in [[0, 3, 1, 2, 4, 5], [0, 1, 3, 2, 4, 5], [0, 3, 1, 4, 2, 5]] {
            let all: Vec<Record> = one.iter().chain(&two).cloned().collect();
            let mixed: Vec<Record> = order.iter().map(|at: &usize| all[*at].clone()).collect();
            let sequences: Vec<u64> = feed(&mixed)
                .unwrap()
                .iter()
                .map(|delivery| if let Delivery::Message(envelope, _) = delivery { envelope.sequence } else { 0 })
                .collect();
            assert_eq!(sequences.len(), 2, "{order:?}");
            assert!(sequences.contains(&1) && sequences.contains(&2), "{order:?}");
        }
    }

    /// Nothing is delivered that its hash does not name.
    #[test]
    fn what_does_not_verify_is_not_delivered() {
        let (_, _, mut records) = large(1, 1, CHUNK * 2);
        let Record::Piece(last) = &mut records[2] else { panic!() };
        last.bytes = Bytes::from(vec![9; CHUNK]);
        assert!(matches!(feed(&records), Err(Corrupt::Hash(_))), "another chunk");

        let (_, _, mut records) = large(1, 1, CHUNK * 2);
        let Record::Piece(last) = &mut records[2] else { panic!() };
        last.bytes = Bytes::from(vec![1; 7]);
        assert!(matches!(feed(&records), Err(Corrupt::Hash(_))), "a short one");

        let Record::Message { envelope, .. } = message(1, b"hello") else { panic!() };
        let forged = Record::Message { hops: 0, envelope, payload: Bytes::from_static(b"hellO") };
        assert!(matches!(feed(&[forged]), Err(Corrupt::Hash(_))));
        assert_eq!(feed(&[Record::Prune]), Err(Corrupt::Record));
        assert_eq!(Assembly::default().handle_event(Bytes::from_static(b"\xff"), TENANT), Err(Corrupt::Record));
    }

    #[test]
    fn what_is_missing_is_a_gap() {
        let (_, _, records) = large(1, 1, CHUNK * 3);
        assert_eq!(feed(&[Record::Gap { missed: 7 }]), Ok(vec![Delivery::Gap(7)]));
        let holed = [records[0].clone(), records[1].clone(), records[3].clone()];
        assert_eq!(feed(&holed), Ok(vec![Delivery::Gap(1)]), "a chunk left out");
        assert_eq!(feed(&records[1..]), Ok(vec![]), "chunks of a message that never began");
        let begun: Vec<Record> =
            (0..MAX_PARTIAL as u64 + 2).map(|n| large(n, n as u8, CHUNK * 2).2[0].clone()).collect();
        assert_eq!(feed(&begun), Ok(vec![Delivery::Gap(1); 2]), "I-5: bounded");
    }
}
