//! The lazy half: announcements, what is asked for after them, and what times out.

use std::collections::BTreeMap;

use super::{ANNOUNCE_MS, Engine, GRAFT_MS, LinkId, LinkSet, Outlet, PURGE_MS, WHOLE};
use crate::Millis;
use crate::identity::TenantId;
use crate::lanes::Class;
use crate::record::{MAX_ANNOUNCED, MessageId, Record};

/// Announced messages that may be awaited from one link.
const MAX_WANTED_A_LINK: usize = 8_192;
/// Times that a message is asked for in vain before it is given up: nothing at all came from
/// whoever was asked. A link that is only slow, by its bucket or its line, is asked for as long
/// as the window lasts; after that the message would be too old to be taken.
const MAX_IN_VAIN: u8 = 10;
/// Messages asked of one link and not come yet: what is asked for beyond what a lane takes
/// would not be sent, and count as asked.
const MAX_ASKED_A_LINK: usize = 64;

#[derive(Debug)]
struct Want {
    tenant: TenantId,
    holders: LinkSet,
    since: Millis,
    /// How often it was asked for, which says who is asked next: each holder in turn.
    asked: usize,
    in_vain: u8,
    at: Millis,
    /// Who was asked and when; they have until `at`.
    asked_of: Option<(LinkId, Millis)>,
    /// Whose quota it counts against.
    first: LinkId,
}

/// Messages that were announced and have not come.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    wants: BTreeMap<MessageId, Want>,
    quota: BTreeMap<LinkId, usize>,
    /// When a link last brought a message, or a piece of one.
    heard: BTreeMap<LinkId, Millis>,
}

impl Wanted {
    pub(super) fn add(&mut self, id: MessageId, link: LinkId, tenant: TenantId, now: Millis) {
        if let Some(want) = self.wants.get_mut(&id) {
            want.holders.insert(link);
            return;
        }
        let own = self.quota.entry(link).or_default();
        if *own >= MAX_WANTED_A_LINK {
            return;
        }
        *own += 1;
        let mut holders = LinkSet::default();
        holders.insert(link);
        self.wants.insert(
            id,
            Want {
                tenant,
                holders,
                since: now,
                asked: 0,
                in_vain: 0,
                at: now.after(GRAFT_MS),
                asked_of: None,
                first: link,
            },
        );
    }

    /// Forgets a message. Gives who else has it.
    pub(super) fn remove(&mut self, id: MessageId) -> LinkSet {
        let Some(want) = self.wants.remove(&id) else { return LinkSet::default() };
        if let Some(own) = self.quota.get_mut(&want.first) {
            *own = own.saturating_sub(1);
        }
        want.holders
    }

    pub(super) fn remove_announcer(&mut self, id: MessageId, link: LinkId) {
        if let Some(want) = self.wants.get_mut(&id) {
            want.holders.remove(link);
        }
    }

    /// A link brings messages: it is alive, however long those that it was asked for take.
    pub(super) fn hear(&mut self, link: LinkId, now: Millis) {
        self.heard.insert(link, now);
    }

    pub(super) fn forget_link(&mut self, link: LinkId) {
        self.heard.remove(&link);
        self.wants.values_mut().for_each(|want| want.holders.remove(link));
    }

    /// What may be asked for now, least asked for first, so that nothing is given up for want
    /// of a turn; and how many messages each link was asked for that may still come.
    fn due(&self, now: Millis) -> (Vec<MessageId>, BTreeMap<LinkId, usize>) {
        let mut under_way: BTreeMap<LinkId, usize> = BTreeMap::new();
        let mut due = Vec::new();
        for (id, want) in &self.wants {
            match want.asked_of {
                _ if now >= want.at => due.push((want.asked, *id)),
                Some((link, _)) => *under_way.entry(link).or_default() += 1,
                None => {}
            }
        }
        due.sort_unstable();
        (due.into_iter().map(|(_, id)| id).collect(), under_way)
    }

    /// Whether there is no use in asking for it again: nobody has it, nobody answers, or it is
    /// older than `window_ms`.
    fn is_hopeless(&mut self, id: MessageId, window_ms: u64, now: Millis) -> bool {
        let Some(want) = self.wants.get_mut(&id) else { return true };
        if let Some((link, at)) = want.asked_of.take()
            && self.heard.get(&link).is_none_or(|heard| *heard < at)
        {
            want.in_vain += 1;
        }
        want.holders.iter().next().is_none() || want.in_vain >= MAX_IN_VAIN || now.since(want.since) >= window_ms
    }

    fn next(&self) -> Option<Millis> {
        self.wants.values().map(|want| want.at).min()
    }
}

impl Engine {
    /// A deadline passed: announces, asks, lets go.
    pub fn handle_timeout(&mut self, now: Millis, out: &mut impl Outlet) {
        if self.announce_at.is_some_and(|at| now >= at) {
            self.announce_at = None;
            self.announce(now, out);
        }
        self.ask(now, out);
        self.ask_for_chunks(now, out);
        if now >= self.purge_at {
            self.store.purge(now);
            self.purge_at = now.after(PURGE_MS);
        }
    }

    /// When [`Self::handle_timeout`] has something to do next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Millis> {
        let stall = self.assemblies.next_stall(GRAFT_MS);
        [self.announce_at, self.wanted.next(), stall, Some(self.purge_at)].into_iter().flatten().min()
    }

    fn announce(&mut self, now: Millis, out: &mut impl Outlet) {
        let links: Vec<LinkId> = self.links.iter().collect();
        // No faster than a link could then carry what is asked for: its other end remembers
        // only so much of what it waits for.
        let pace = MAX_ANNOUNCED as u64 * 1_000 / u64::from(self.config.burst_frames.max(1));
        for link in links {
            if self.links.is_paused(link, now) {
                self.announce_at.get_or_insert(now.after(ANNOUNCE_MS));
                continue;
            }
            let start = self.links.cursor(link).max(self.store.start());
            let reached = self.announce_to(link, out);
            self.links.rewind(link, reached);
            if start < reached && reached < self.store.end() {
                self.links.pause(link, now.after(pace));
            }
            if reached < self.store.end() {
                self.announce_at.get_or_insert(now.after(ANNOUNCE_MS));
            }
        }
    }

    /// Tells one link of every held message that it may lack. Gives how far its lane took it.
    fn announce_to(&mut self, link: LinkId, out: &mut impl Outlet) -> u64 {
        let start = self.links.cursor(link).max(self.store.start());
        let mut batches: BTreeMap<TenantId, Vec<MessageId>> = BTreeMap::new();
        let mut position = start;
        while let Some(held) = self.store.at(position) {
            if !held.known.contains(link) && held.hops < self.config.max_hops {
                let batch = batches.entry(held.tenant).or_default();
                if batch.len() == MAX_ANNOUNCED {
                    break;
                }
                batch.push(held.id);
            }
            position += 1;
        }
        let mut all = true;
        for (tenant, ids) in batches {
            // A tenant without a stream on this link is announced when it gets one.
            if out.has_stream(link, tenant) {
                all &= self.send(link, tenant, Class::Control, Record::Announce(ids).encode(), out);
            }
        }
        if all { position } else { start }
    }

    pub(super) fn announced(&mut self, id: MessageId, link: LinkId, tenant: TenantId, now: Millis) {
        if let Some(held) = self.store.get_mut(id) {
            held.known.insert(link);
        } else if let Some(assembly) = self.assemblies.get_mut(id) {
            assembly.holders.insert(link);
        } else if !self.store.has_seen(id) {
            self.wanted.add(id, link, tenant, now);
        }
    }

    fn ask(&mut self, now: Millis, out: &mut impl Outlet) {
        let (due, mut under_way) = self.wanted.due(now);
        for id in due {
            if self.wanted.is_hopeless(id, self.config.dedupe_window_ms, now) {
                self.wanted.remove(id);
                self.counts.lost += 1;
                continue;
            }
            let Some(want) = self.wanted.wants.get_mut(&id) else { continue };
            want.at = now.after(ANNOUNCE_MS);
            let holders: Vec<LinkId> = want.holders.iter().collect();
            let (later, next) = holders.split_at(want.asked % holders.len());
            let free = |link: &&LinkId| under_way.get(link).is_none_or(|count| *count < MAX_ASKED_A_LINK);
            let Some(link) = next.iter().chain(later).find(free).copied() else { continue };
            let tenant = want.tenant;
            if !self.send(link, tenant, Class::Control, Record::Graft { id, chunks: 0 }.encode(), out) {
                continue;
            }
            self.counts.grafts += 1;
            *under_way.entry(link).or_default() += 1;
            if let Some(want) = self.wanted.wants.get_mut(&id) {
                want.at = now.after(GRAFT_MS);
                want.asked_of = Some((link, now));
                want.asked = want.asked.wrapping_add(1);
            }
        }
    }

    fn ask_for_chunks(&mut self, now: Millis, out: &mut impl Outlet) {
        let before = Millis(now.0.saturating_sub(GRAFT_MS));
        if now.0 < GRAFT_MS {
            return;
        }
        let mut asks = Vec::new();
        let mut given_up = Vec::new();
        for (id, assembly) in self.assemblies.stalled(before) {
            assembly.progress = now;
            assembly.asked += 1;
            let holders: Vec<LinkId> = assembly.holders.iter().collect();
            if holders.is_empty() || assembly.asked > MAX_IN_VAIN {
                let mut others = assembly.holders;
                others.remove(assembly.from);
                given_up.push((id, assembly.tenant, others));
                continue;
            }
            let link = holders[usize::from(assembly.asked) % holders.len()];
            asks.push((link, assembly.tenant, Record::Graft { id, chunks: assembly.missing() }));
        }
        for (id, tenant, others) in given_up {
            self.assemblies.remove(id);
            self.counts.lost += u64::from(others.iter().next().is_none());
            self.want_anew(id, tenant, others, now);
        }
        for (link, tenant, graft) in asks {
            self.counts.grafts += 1;
            self.send(link, tenant, Class::Control, graft.encode(), out);
        }
    }

    /// What was put together of a message is of no use: whoever else has it is asked for all.
    pub(super) fn want_anew(&mut self, id: MessageId, tenant: TenantId, holders: LinkSet, now: Millis) {
        holders.iter().for_each(|link| self.wanted.add(id, link, tenant, now));
    }

    /// A link asks for a message. Where its lane has no room, it asks again.
    pub(super) fn graft(&mut self, id: MessageId, chunks: u32, link: LinkId, tenant: TenantId, out: &mut impl Outlet) {
        if chunks == 0 {
            self.links.make_eager(link);
        }
        let Some(held) = self.store.get(id).filter(|held| held.tenant == tenant).cloned() else { return };
        let wanted = if chunks == 0 { WHOLE } else { chunks };
        if self.push(link, &held, wanted, out)
            && let Some(held) = self.store.get_mut(id)
        {
            held.known.insert(link);
        }
    }
}
