//! Dissemination between daemons: an epidemic broadcast tree (Plumtree; Leitão, Pereira and
//! Rodrigues, SRDS 2007).
//!
//! A new message is pushed to at most `fanout` eager links; every link that was not sent it
//! hears of it by announcement and asks (grafts) if it does not come. A duplicate prunes the
//! link it came by. What a full lane did not take is announced like the rest, so a bounded
//! fan-out (P-5) and bounded queues (I-5) lose nothing while the message is held.
//!
//! Decides who is sent what; never looks into a payload (P-6), never opens a connection,
//! never chooses peers (I-1).

mod assembly;
mod links;
mod repair;
mod store;
mod wanted;

use bytes::Bytes;

use crate::Millis;
use crate::config::Gossip;
use crate::control::Incarnation;
use crate::identity::{SpiffeId, TenantId, Topic};
use crate::lanes::{Class, Side};
use crate::record::{Digest, Envelope, MessageId, Record, pieces};
use crate::status::{Reason, Refusal, Status};

use assembly::{Assemblies, Assembly, Begun, Whole};
use links::Links;
use store::{Novelty, Store};
use wanted::{Key, Wanted};

pub use assembly::digest;
pub use links::{LinkId, LinkSet, MAX_LINKS};
pub use store::Held;

/// Announcements wait this long for company.
pub const ANNOUNCE_MS: u64 = 100;
/// After an announcement, how long the message itself may take before it is asked for;
/// then how long each further holder is given.
pub const GRAFT_MS: u64 = 300;
/// Asks [`Engine::push`] for all of a message; no bitmap of at most 16 chunks equals it.
const WHOLE: u32 = u32::MAX;
/// How often what is too old is let go.
const PURGE_MS: u64 = 1_000;

/// The lane of announcements and what they lead to.
const CONTROL: (Class, Side) = (Class::Control, Side::Ours);

/// How the engine reaches its links: by queues that it does not own.
pub trait Outlet {
    /// Whether the link may carry `tenant`.
    fn has_stream(&self, link: LinkId, tenant: TenantId) -> bool;
    /// Frames that the link's lane still takes for `tenant`; 0 where it has no such stream.
    fn room(&self, link: LinkId, tenant: TenantId, class: Class, side: Side) -> usize;
    /// Queues a record. False, and nothing queued, where there is no room.
    fn send(&mut self, link: LinkId, tenant: TenantId, lane: (Class, Side), payload: Bytes) -> bool;
    /// Whether the daemon's memory takes so many bytes more.
    fn has_memory(&self, bytes: u64) -> bool;
}

/// A message to give to local subscribers.
pub type Delivery = Held;

/// What a daemon is as an origin.
#[derive(Clone, Debug)]
pub struct Me {
    /// Its certificate's identity.
    pub identity: SpiffeId,
    /// Its process.
    pub incarnation: Incarnation,
}

/// A message that a client published.
#[derive(Debug)]
pub struct Draft {
    /// Whose.
    pub tenant: TenantId,
    /// Under what.
    pub topic: Topic,
    /// As [`Envelope::attributes`].
    pub attributes: u8,
    /// Its bytes, already checked against `hash`; at most 1 MiB.
    pub payload: Bytes,
    /// Their BLAKE3-256.
    pub hash: Digest,
}

/// What the engine did, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Gossip frames queued to links.
    pub tx: u64,
    /// Gossip frames that links sent.
    pub rx: u64,
    /// Of which messages that were seen before.
    pub duplicates: u64,
    /// Messages asked for.
    pub grafts: u64,
    /// Announced messages that nobody could give in the end.
    pub lost: u64,
}

/// The gossip engine of one daemon.
#[derive(Debug)]
pub struct Engine {
    me: Me,
    config: Gossip,
    tenants: Vec<TenantId>,
    sequence: u64,
    links: Links,
    store: Store,
    assemblies: Assemblies,
    wanted: Wanted,
    announce_at: Option<Millis>,
    purge_at: Millis,
    counts: Counts,
}

impl Engine {
    /// An engine without links.
    #[must_use]
    pub fn new(me: Me, config: Gossip, tenants: Vec<TenantId>, now: Millis) -> Self {
        Self {
            me,
            links: Links::new(config.fanout as usize),
            store: Store::new(&config),
            config,
            tenants,
            sequence: 0,
            assemblies: Assemblies::default(),
            wanted: Wanted::default(),
            announce_at: None,
            purge_at: now.after(PURGE_MS),
            counts: Counts::default(),
        }
    }

    /// Other caps from now on.
    pub fn handle_config(&mut self, config: &Gossip) {
        self.links.resize(config.fanout as usize);
        self.store.resize(config);
        self.config = config.clone();
    }

    /// A link is up. Everything held is announced to it, so that what was accepted while it
    /// was away reaches it. Nothing where [`MAX_LINKS`] are up.
    pub fn handle_link_up(&mut self, now: Millis) -> Option<LinkId> {
        let link = self.links.add(self.store.start())?;
        self.announce_at.get_or_insert(now);
        Some(link)
    }

    /// A link may carry one more tenant: what is held of it is announced.
    pub fn handle_tenant_up(&mut self, link: LinkId, now: Millis) {
        self.links.rewind(link, self.store.start());
        self.announce_at.get_or_insert(now);
    }

    /// Some of what was sent over a link was dropped at its other end: all that is held is
    /// announced to it anew.
    pub fn handle_dropped(&mut self, link: LinkId, now: Millis) {
        self.store.forget_link(link);
        self.handle_tenant_up(link, now);
    }

    /// A link is gone, with all it had queued.
    pub fn handle_link_down(&mut self, link: LinkId) {
        self.links.remove(link);
        self.store.forget_link(link);
        self.assemblies.forget_link(link);
        self.counts.lost += self.wanted.forget_link(link);
    }

    /// Publishes a message of this daemon's own.
    ///
    /// # Errors
    /// 403 for a tenant that is not carried here; 503 while the messages held are too many
    /// and too young.
    pub fn publish(
        &mut self,
        draft: Draft,
        unix_ms: u64,
        now: Millis,
        out: &mut impl Outlet,
    ) -> Result<Delivery, Refusal> {
        if !self.tenants.contains(&draft.tenant) {
            return Err(Refusal::new(Status::Forbidden, "this daemon does not carry that tenant"));
        }
        let Ok(size) = u32::try_from(draft.payload.len()) else {
            return Err(Refusal::new(Status::PayloadTooLarge, "a message is at most 1 MiB"));
        };
        if self.store.is_pressed(u64::from(size), now) {
            return Err(Refusal::later(Status::Unavailable, "too much was published within two seconds", 500));
        }
        self.sequence += 1;
        let envelope = Envelope {
            attributes: draft.attributes,
            topic: draft.topic,
            origin: self.me.identity.clone(),
            incarnation: self.me.incarnation,
            sequence: self.sequence,
            time_ms: unix_ms,
            size,
            hash: draft.hash,
        };
        let id = envelope.id(draft.tenant);
        let frames = if envelope.chunks() == 0 {
            vec![Record::Message { hops: 0, envelope: envelope.clone(), payload: draft.payload }.encode()]
        } else {
            let begin = Record::Begin { hops: 0, envelope: envelope.clone() }.encode();
            let rest = pieces(&draft.payload, draft.hash).map(|piece| Record::Piece(piece).encode());
            std::iter::once(begin).chain(rest).collect()
        };
        let held = self.store.insert(id, draft.tenant, envelope, 0, frames, now);
        Ok(self.spread(held, LinkSet::default(), now, out))
    }

    /// A record came from a link, on the stream of `tenant`.
    ///
    /// # Errors
    /// It is counted with this reason and goes no further.
    pub fn handle_record(
        &mut self,
        link: LinkId,
        tenant: TenantId,
        record: Record,
        clock: (u64, Millis),
        out: &mut impl Outlet,
    ) -> Result<Vec<Delivery>, Reason> {
        self.counts.rx += 1;
        let now = clock.1;
        if !self.tenants.contains(&tenant) {
            return Err(Reason::Auth);
        }
        if matches!(record, Record::Message { .. } | Record::Begin { .. } | Record::Piece(_)) {
            self.wanted.hear(link, now);
        }
        match record {
            Record::Message { hops, envelope, payload } => {
                let Some(id) = self.check(link, tenant, hops, &envelope, clock, out)? else { return Ok(Vec::new()) };
                if digest(&payload) != envelope.hash {
                    return Err(Reason::Protocol);
                }
                let hops = hops.saturating_add(1);
                let frame = Record::Message { hops, envelope: envelope.clone(), payload }.encode();
                self.arrived((tenant, id), link);
                let mut holders = self.wanted.remove((tenant, id));
                holders.insert(link);
                let held = self.store.insert(id, tenant, envelope, hops, vec![frame], now);
                Ok(vec![self.spread(held, holders, now, out)])
            }
            Record::Begin { hops, envelope } => {
                let Some(id) = self.check(link, tenant, hops, &envelope, clock, out)? else { return Ok(Vec::new()) };
                self.begin(id, link, tenant, hops.saturating_add(1), envelope, now, out)?;
                Ok(Vec::new())
            }
            Record::Piece(piece) => {
                let done = self.assemblies.add(link, tenant, &piece, now);
                let mut deliveries = Vec::new();
                let mut broken = false;
                for message in done {
                    match message {
                        Ok(whole) => deliveries.push(self.whole(whole, now, out)),
                        // One of several links may have sent a false chunk, and another has the
                        // true ones: they are asked for all of it.
                        Err((id, holders)) => {
                            broken = true;
                            self.want_anew(id, tenant, holders, now);
                        }
                    }
                }
                if broken && deliveries.is_empty() { Err(Reason::Protocol) } else { Ok(deliveries) }
            }
            Record::Announce(ids) => {
                for id in ids {
                    self.announced(id, link, tenant, now);
                }
                Ok(Vec::new())
            }
            Record::Graft { id, chunks } => {
                self.graft((id, chunks), link, tenant, now, out);
                Ok(Vec::new())
            }
            Record::Prune => {
                self.links.make_lazy(link);
                Ok(Vec::new())
            }
            Record::Gap { .. } => Err(Reason::Protocol),
        }
    }

    /// Whether a message that a link pushed is new. Nothing: it is a duplicate, and the link
    /// was told so.
    fn check(
        &mut self,
        link: LinkId,
        tenant: TenantId,
        hops: u8,
        envelope: &Envelope,
        (unix_ms, now): (u64, Millis),
        out: &mut impl Outlet,
    ) -> Result<Option<MessageId>, Reason> {
        let id = envelope.id(tenant);
        match self.store.novelty(id, envelope, unix_ms) {
            Novelty::Stale => {
                self.wanted.remove((tenant, id)); // however often it came, it would be too old
                Err(Reason::Stale)
            }
            Novelty::Duplicate => {
                self.counts.duplicates += 1;
                self.wanted.remove((tenant, id));
                if !self.goes_on(id, link, hops, now, out) && self.links.make_lazy(link) {
                    self.send(link, tenant, CONTROL, Record::Prune.encode(), out);
                }
                Ok(None)
            }
            // Nobody but this process uses its incarnation; hops past the bound mean a loop.
            Novelty::New if envelope.incarnation == self.me.incarnation && envelope.origin == self.me.identity => {
                Err(Reason::Protocol)
            }
            Novelty::New if hops >= self.config.max_hops => Err(Reason::Protocol),
            Novelty::New => Ok(Some(id)),
        }
    }

    /// A message that is held came again. Whether it is passed on only now, since it first came
    /// by too many hops.
    fn goes_on(&mut self, id: MessageId, link: LinkId, hops: u8, now: Millis, out: &mut impl Outlet) -> bool {
        let Some(held) = self.store.get_mut(id) else { return false };
        held.known.insert(link);
        if !held.shorten(hops.saturating_add(1), self.config.max_hops) {
            return false;
        }
        let (held, known) = (held.clone(), held.known);
        self.links.rewind_all(self.store.position(id).unwrap_or(u64::MAX));
        self.spread(held, known, now, out);
        true
    }

    #[allow(clippy::too_many_arguments)] // a record's parts, each of its own type
    fn begin(
        &mut self,
        id: MessageId,
        link: LinkId,
        tenant: TenantId,
        hops: u8,
        envelope: Envelope,
        now: Millis,
        out: &mut impl Outlet,
    ) -> Result<(), Reason> {
        let (key, others) = match self.assemblies.handle_begin(id, link, envelope.size, now) {
            Begun::False => return Err(Reason::Protocol),
            Begun::Begins(key, others) => (key, others),
            Begun::Joins => {
                self.counts.duplicates += 1;
                if self.links.make_lazy(link) {
                    self.send(link, tenant, CONTROL, Record::Prune.encode(), out);
                }
                return Ok(());
            }
        };
        self.want_anew(id, tenant, others, now);
        let mut assembly = Assembly::new(tenant, hops, envelope, link, now);
        let mut others = self.wanted.remove((tenant, id));
        others.remove(link);
        if key.1.is_none() {
            assembly.holders = assembly.holders.union(others);
        } else {
            self.want_anew(id, tenant, others, now);
        }
        let fits = out.has_memory(assembly.envelope.size.into());
        match fits.then(|| self.assemblies.begin(key, assembly)).flatten() {
            Some(evicted) => {
                if let Some((id, Assembly { tenant, holders, .. })) = evicted {
                    self.want_anew(id, tenant, holders, now);
                }
            }
            None => {
                // No room to put it together: ask again later, as if it had been announced.
                others.insert(link);
                self.want_anew(id, tenant, others, now);
                self.wanted.wait((tenant, id), now);
            }
        }
        Ok(())
    }

    fn whole(&mut self, whole: Whole, now: Millis, out: &mut impl Outlet) -> Delivery {
        let Whole { id, from, holders, tenant, hops, envelope, pieces } = whole;
        let begin = Record::Begin { hops, envelope: envelope.clone() }.encode();
        let frames = std::iter::once(begin).chain(pieces).collect();
        self.arrived((tenant, id), from);
        let holders = holders.union(self.wanted.remove((tenant, id)));
        let held = self.store.insert(id, tenant, envelope, hops, frames, now);
        self.spread(held, holders, now, out)
    }

    /// The link that brought a new message is a branch of the tree.
    fn arrived(&mut self, key: Key, link: LinkId) {
        self.links.make_eager(link);
        self.wanted.remove_announcer(key, link);
    }

    /// Pushes a new message to the eager links that lack it, and leaves the rest
    /// to the announcements.
    fn spread(&mut self, held: Held, holders: LinkSet, now: Millis, out: &mut impl Outlet) -> Delivery {
        let mut known = holders;
        if held.hops < self.config.max_hops {
            for link in self.links.eager() {
                if !known.contains(link) && self.push(link, &held, WHOLE, out) {
                    known.insert(link);
                }
            }
        }
        if let Some(stored) = self.store.get_mut(held.id) {
            stored.known = known;
        }
        if self.links.iter().any(|link| !known.contains(link)) {
            self.announce_at.get_or_insert(now.after(ANNOUNCE_MS));
        }
        held
    }

    /// Queues a message to one link, or nothing where it does not fit: the whole of it for
    /// [`WHOLE`], else its chunks alone, chunk n for bit n.
    fn push(&mut self, link: LinkId, held: &Held, chunks: u32, out: &mut impl Outlet) -> bool {
        let class = class_of(held);
        let wanted = |index: usize| match index.checked_sub(1) {
            None => chunks == WHOLE,
            Some(chunk) => u32::try_from(chunk).ok().and_then(|n| chunks.checked_shr(n)).unwrap_or(0) & 1 == 1,
        };
        let count = (0..held.frames.len()).filter(|index| wanted(*index)).count();
        let side = if held.hops == 0 { Side::Ours } else { Side::Transit };
        if out.room(link, held.tenant, class, side) < count {
            return false;
        }
        for (_, frame) in held.frames.iter().enumerate().filter(|(index, _)| wanted(*index)) {
            self.send(link, held.tenant, (class, side), frame.clone(), out);
        }
        true
    }

    fn send(
        &mut self,
        link: LinkId,
        tenant: TenantId,
        lane: (Class, Side),
        payload: Bytes,
        out: &mut impl Outlet,
    ) -> bool {
        let sent = out.send(link, tenant, lane, payload);
        self.counts.tx += u64::from(sent);
        sent
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Bytes of payloads: held, being put together, and forgotten but still queued somewhere.
    /// Each is counted once, however many queues share it.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.store.memory() + self.assemblies.bytes()
    }

    /// The daemon is about to end: what was accepted here and no peer has yet is handed to any
    /// link that takes it. What was accepted a moment ago is handed to every one that is not
    /// known to have it: those that would ask for it will have nobody to ask, and of those that
    /// were pushed it, each may be the one that goes no further. Whether nothing is left for
    /// which there is a link.
    pub fn poll_spread(&mut self, now: Millis, out: &mut impl Outlet) -> bool {
        let own =
            |held: &&Held| held.envelope.incarnation == self.me.incarnation && held.envelope.origin == self.me.identity;
        let left = |held: &&Held| held.known == LinkSet::default() || held.is_fresh(now);
        let left: Vec<Held> = self.store.iter().filter(left).filter(own).cloned().collect();
        let mut done = true;
        for held in left {
            let mut known = held.known;
            let links = self.links.iter().filter(|link| !known.contains(*link) && out.has_stream(*link, held.tenant));
            let links: Vec<LinkId> = links.collect();
            let most = if held.is_fresh(now) { links.len() } else { 1 };
            let pushed: Vec<LinkId> =
                links.iter().copied().filter(|link| self.push(*link, &held, WHOLE, out)).take(most).collect();
            pushed.iter().for_each(|link| known.insert(*link));
            if let Some(stored) = self.store.get_mut(held.id) {
                stored.known = known;
            }
            done &= pushed.len() == most.min(links.len());
        }
        done
    }

    /// Messages held and their bytes.
    #[must_use]
    pub fn held(&self) -> (usize, u64) {
        self.store.size()
    }
}

/// The lane of a message: chunked ones give way to small ones.
#[must_use]
pub fn class_of(held: &Held) -> Class {
    if held.frames.len() > 1 { Class::Bulk } else { Class::Interactive }
}

#[cfg(test)]
mod tests;
