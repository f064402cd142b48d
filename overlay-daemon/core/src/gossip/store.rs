//! The messages held for repair, and the ids of all that were seen. Bounded in age, count
//! and bytes; decides what is new, what is a duplicate and what is too old to believe.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::{LinkId, LinkSet};
use crate::Millis;
use crate::config::Gossip;
use crate::control::Incarnation;
use crate::identity::{SpiffeId, TenantId};
use crate::record::{Envelope, MessageId, with_hops};

/// A message is held for at least this long, so that announcements can be answered; a
/// publisher that would push it out sooner is told to wait.
const MIN_HELD_MS: u64 = 2_000;
/// How often one link is sent a message that it asks for, within [`ANSWERS_MS`]: what was sent
/// arrives, and who asks on has no place for it, or wants the line filled.
const MAX_ANSWERS: usize = 3;
const ANSWERS_MS: u64 = 5_000;
/// Origins (identity and incarnation) whose watermark is remembered.
const MAX_ORIGINS: usize = 65_536;
/// And what they cost in bytes, at the most.
const MAX_ORIGIN_BYTES: u64 = 8 << 20;
/// What a held message costs besides its frames: its entry, its envelope, its place in maps.
const OVERHEAD_BYTES: u64 = 512;
/// What an id that is remembered costs besides the names in its envelope: its entry in two maps,
/// its envelope. An origin whose watermark is remembered costs no more.
const SEEN_BYTES: u64 = 320;
/// What one costs on the average, at the most, and all of them no more than what is held may:
/// longer names are remembered for fewer messages.
const MOST_SEEN_BYTES: u64 = 512;

/// A message as it goes to others, encoded once.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its name.
    pub id: MessageId,
    /// Whose it is.
    pub tenant: TenantId,
    /// What it is.
    pub envelope: Arc<Envelope>,
    /// Times it was passed on to get here.
    pub hops: u8,
    /// The payloads of its frames: a Message, or a Begin and every Piece.
    pub frames: Arc<[Bytes]>,
    /// Links whose other end has it.
    pub known: LinkSet,
    at: Millis,
    /// Links that were sent it for the first time since then because they asked, for the second
    /// time, and so on.
    answered: [LinkSet; MAX_ANSWERS],
    answered_since: Millis,
}

impl Held {
    /// Whether it is so young that those who were only told of it may not have asked for it yet.
    pub(super) fn is_fresh(&self, now: Millis) -> bool {
        now.since(self.at) < MIN_HELD_MS
    }

    /// Whether a link that asks for it is sent it once more.
    pub(super) fn may_answer(&mut self, link: LinkId, now: Millis) -> bool {
        if now.since(self.answered_since) >= ANSWERS_MS {
            self.answered = Default::default();
            self.answered_since = now;
        }
        !self.answered.iter().all(|links| links.contains(link))
    }

    /// A link that asked was sent it.
    pub(super) fn note_answer(&mut self, link: LinkId) {
        if let Some(links) = self.answered.iter_mut().find(|links| !links.contains(link)) {
            links.insert(link);
        }
    }

    /// It is known to have come by fewer hops: whether it goes on for that, since until now it
    /// had reached `most`. Nobody vouches for the number of hops, so the least that was said
    /// counts.
    pub(super) fn shorten(&mut self, hops: u8, most: u8) -> bool {
        if self.hops < most || hops >= most {
            return false;
        }
        self.hops = hops;
        let mut frames = self.frames.to_vec();
        if let Some(first) = frames.first_mut() {
            *first = with_hops(first, hops);
        }
        self.frames = frames.into();
        true
    }

    fn forget_link(&mut self, link: LinkId) {
        self.known.remove(link);
        self.answered.iter_mut().for_each(|links| links.remove(link));
    }
}

/// What is known of an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Novelty {
    /// Never seen.
    New,
    /// Seen before.
    Duplicate,
    /// Older than the window, or under its origin's watermark.
    Stale,
}

#[derive(Debug, Default)]
struct Origin {
    /// Messages up to this number were forgotten early and cannot be told from new ones.
    watermark: u64,
    seen: Millis,
}

#[derive(Debug)]
struct Seen {
    id: MessageId,
    at: Millis,
    envelope: Arc<Envelope>,
}

/// The store.
#[derive(Debug)]
pub(super) struct Store {
    window_ms: u64,
    entries: usize,
    capacity: u64,
    bytes: u64,
    /// Held messages in order of arrival; the front one's position is `first`.
    log: VecDeque<Held>,
    first: u64,
    /// Payloads that were let go of here and that a queue still holds, and their bytes.
    queued: VecDeque<Held>,
    queued_bytes: u64,
    /// Every id of the window, with its position in the log at the time.
    index: HashMap<MessageId, u64>,
    order: VecDeque<Seen>,
    seen_bytes: u64,
    origins: BTreeMap<(SpiffeId, Incarnation), Origin>,
    origin_bytes: u64,
}

impl Store {
    pub(super) fn new(config: &Gossip) -> Self {
        Self {
            window_ms: config.dedupe_window_ms,
            entries: config.dedupe_entries as usize,
            capacity: config.store_bytes,
            bytes: 0,
            log: VecDeque::new(),
            first: 0,
            queued: VecDeque::new(),
            queued_bytes: 0,
            index: HashMap::new(),
            order: VecDeque::new(),
            seen_bytes: 0,
            origins: BTreeMap::new(),
            origin_bytes: 0,
        }
    }

    /// Other bounds from now on. What is over them goes with the next message or purge, oldest
    /// first, as it always does.
    pub(super) fn resize(&mut self, config: &Gossip) {
        self.window_ms = config.dedupe_window_ms;
        self.entries = config.dedupe_entries as usize;
        self.capacity = config.store_bytes;
    }

    /// What is known of a message, at `unix_ms` by the wall clock.
    pub(super) fn novelty(&self, id: MessageId, envelope: &Envelope, unix_ms: u64) -> Novelty {
        if self.index.contains_key(&id) {
            return Novelty::Duplicate;
        }
        let watermark = self.origins.get(&(envelope.origin.clone(), envelope.incarnation)).map_or(0, |o| o.watermark);
        let off = unix_ms.abs_diff(envelope.time_ms);
        if off > self.window_ms || envelope.sequence <= watermark { Novelty::Stale } else { Novelty::New }
    }

    /// Whether the id was seen within the window.
    pub(super) fn has_seen(&self, id: MessageId) -> bool {
        self.index.contains_key(&id)
    }

    /// Whether `bytes` more would push out a message that others may not have had time for.
    pub(super) fn is_pressed(&self, bytes: u64, now: Millis) -> bool {
        let over = self.bytes + bytes + OVERHEAD_BYTES > self.capacity;
        over && self.log.front().is_some_and(|held| now.since(held.at) < MIN_HELD_MS)
    }

    /// Keeps a new message, pushing out the oldest where a bound asks for it.
    pub(super) fn insert(
        &mut self,
        id: MessageId,
        tenant: TenantId,
        envelope: Envelope,
        hops: u8,
        frames: Vec<Bytes>,
        now: Millis,
    ) -> Held {
        let envelope = Arc::new(envelope);
        self.index.insert(id, self.end());
        self.seen_bytes += seen_cost(&envelope);
        self.order.push_back(Seen { id, at: now, envelope: Arc::clone(&envelope) });
        let held = Held {
            id,
            tenant,
            envelope,
            hops,
            frames: frames.into(),
            known: LinkSet::default(),
            at: now,
            answered: Default::default(),
            answered_since: now,
        };
        self.bytes += cost(&held);
        self.log.push_back(held.clone());
        while self.log.len() > 1 && self.bytes > self.capacity {
            self.forget_payload();
        }
        let most = (self.entries as u64 * MOST_SEEN_BYTES).min(self.capacity);
        while self.order.len() > self.entries || (self.seen_bytes > most && self.order.len() > 1) {
            self.forget_id(true, now);
        }
        held
    }

    /// Lets go of what is older than the window, and of what no queue holds any more.
    pub(super) fn purge(&mut self, now: Millis) {
        let before = self.queued.len();
        for _ in 0..before {
            let Some(held) = self.queued.pop_front() else { break };
            self.queued_bytes -= cost(&held);
            self.keep_if_queued(held);
        }
        self.queued.shrink_to(before);
        while self.log.front().is_some_and(|held| now.since(held.at) >= self.window_ms) {
            self.forget_payload();
        }
        // An id outlives its payload by as much again: its message may carry a time from the
        // window's far side, and must not pass for new while its age would let it.
        while self.order.front().is_some_and(|seen| now.since(seen.at) >= 2 * self.window_ms) {
            self.forget_id(false, now);
        }
        let window = self.window_ms;
        let bytes = &mut self.origin_bytes;
        self.origins.retain(|(identity, _), origin| {
            let keeps = now.since(origin.seen) < 2 * window;
            *bytes -= if keeps { 0 } else { origin_cost(identity) };
            keeps
        });
    }

    fn forget_payload(&mut self) {
        if let Some(held) = self.log.pop_front() {
            self.bytes -= cost(&held);
            self.first += 1;
            self.keep_if_queued(held);
        }
        while self.queued.front().is_some_and(|held| !is_queued(held)) {
            self.queued_bytes -= self.queued.pop_front().map_or(0, |held| cost(&held));
        }
    }

    fn keep_if_queued(&mut self, held: Held) {
        if is_queued(&held) {
            self.queued_bytes += cost(&held);
            self.queued.push_back(held);
        }
    }

    /// Every message held, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Held> {
        self.log.iter()
    }

    /// Bytes held, here or by a queue that shares them, and of what is remembered.
    pub(super) fn memory(&self) -> u64 {
        self.bytes + self.queued_bytes + self.seen_bytes + self.origin_bytes
    }

    fn forget_id(&mut self, early: bool, now: Millis) {
        let Some(seen) = self.order.pop_front() else { return };
        self.seen_bytes -= seen_cost(&seen.envelope);
        if self.index.remove(&seen.id).is_some_and(|position| position >= self.first) {
            // Held payloads are a suffix of the ids seen, so the front of the log is this one.
            self.forget_payload();
        }
        if !early {
            return;
        }
        let key = (seen.envelope.origin.clone(), seen.envelope.incarnation);
        if !self.origins.contains_key(&key) {
            self.origin_bytes += origin_cost(&key.0);
            while self.origins.len() >= MAX_ORIGINS || self.origin_bytes > MAX_ORIGIN_BYTES {
                let Some(((identity, _), _)) = self.origins.pop_first() else { break };
                self.origin_bytes -= origin_cost(&identity);
            }
        }
        let origin = self.origins.entry(key).or_default();
        origin.watermark = origin.watermark.max(seen.envelope.sequence);
        origin.seen = now;
    }

    pub(super) fn get_mut(&mut self, id: MessageId) -> Option<&mut Held> {
        let position = *self.index.get(&id)?;
        self.log.get_mut(usize::try_from(position.checked_sub(self.first)?).ok()?)
    }

    /// Where a message stands, if it is still held.
    pub(super) fn position(&self, id: MessageId) -> Option<u64> {
        self.index.get(&id).copied().filter(|position| *position >= self.first)
    }

    /// The message at `position`, if it is still held.
    pub(super) fn at(&self, position: u64) -> Option<&Held> {
        self.log.get(usize::try_from(position.checked_sub(self.first)?).ok()?)
    }

    /// Forgets what a link's other end has: the link is gone, its number will name another.
    pub(super) fn forget_link(&mut self, link: LinkId) {
        self.log.iter_mut().for_each(|held| held.forget_link(link));
    }

    /// Ids that are remembered.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.order.len()
    }

    /// The position of the oldest held message.
    pub(super) fn start(&self) -> u64 {
        self.first
    }

    /// The position that the next message will have.
    pub(super) fn end(&self) -> u64 {
        self.first + self.log.len() as u64
    }

    /// Messages held and what they cost in bytes.
    pub(super) fn size(&self) -> (usize, u64) {
        (self.log.len(), self.bytes)
    }
}

/// Whether somebody besides the store holds a frame of it.
fn is_queued(held: &Held) -> bool {
    !held.frames.iter().all(Bytes::is_unique)
}

fn cost(held: &Held) -> u64 {
    held.frames.iter().map(|frame| frame.len() as u64).sum::<u64>() + OVERHEAD_BYTES
}

fn seen_cost(envelope: &Envelope) -> u64 {
    SEEN_BYTES + (envelope.topic.as_str().len() + envelope.origin.as_str().len()) as u64
}

fn origin_cost(identity: &SpiffeId) -> u64 {
    SEEN_BYTES / 2 + identity.as_str().len() as u64
}
