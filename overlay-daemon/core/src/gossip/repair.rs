//! The lazy half: announcements, what is asked for after them, and what times out.

use std::collections::BTreeMap;

use super::wanted::Turn;
use super::{ANNOUNCE_MS, CONTROL, Engine, GRAFT_MS, LinkId, LinkSet, Outlet, PURGE_MS, WHOLE};
use crate::Millis;
use crate::identity::TenantId;
use crate::record::{MAX_ANNOUNCED, MessageId, Record};

/// Times that the missing chunks of a message are asked for in vain before it is given up.
const MAX_IN_VAIN: u8 = 10;

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
                all &= self.send(link, tenant, CONTROL, Record::Announce(ids).encode(), out);
            }
        }
        if all { position } else { start }
    }

    pub(super) fn announced(&mut self, id: MessageId, link: LinkId, tenant: TenantId, now: Millis) {
        if let Some(held) = self.store.get_mut(id) {
            // Where it came by too many hops to go on, another may have it by fewer: a link that
            // says too many must not keep it from those behind this daemon.
            let at_end = held.hops >= self.config.max_hops && held.tenant == tenant && !held.known.contains(link);
            held.known.insert(link);
            if at_end {
                self.wanted.add((tenant, id), link, now);
            }
        } else if let Some(assembly) = self.assemblies.shared(id).filter(|assembly| assembly.tenant == tenant) {
            assembly.holders.insert(link);
        } else if !self.store.has_seen(id) && !self.assemblies.is_alone(id, link) {
            self.wanted.add((tenant, id), link, now);
        }
    }

    fn ask(&mut self, now: Millis, out: &mut impl Outlet) {
        let mut put_off: BTreeMap<LinkId, usize> = BTreeMap::new();
        for key in self.wanted.due(now) {
            let (tenant, id) = key;
            let link = match self.wanted.turn(key, self.config.dedupe_window_ms, now) {
                Turn::Ask(link) => link,
                Turn::Later => {
                    let before = self.wanted.first(key).map(|link| put_off.entry(link).or_default());
                    let before = before.map_or(0, |count| std::mem::replace(count, *count + 1));
                    self.wanted.put_off(key, before, now);
                    continue;
                }
                Turn::GiveUp => {
                    self.wanted.remove(key);
                    self.counts.lost += 1;
                    continue;
                }
            };
            if self.send(link, tenant, CONTROL, Record::Graft { id, chunks: 0 }.encode(), out) {
                self.counts.grafts += 1;
                self.wanted.asked(key, link, now);
            } else {
                self.wanted.put_off(key, 0, now);
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
        for (key, assembly) in self.assemblies.stalled(before) {
            assembly.progress = now;
            assembly.asked += 1;
            let holders: Vec<LinkId> = assembly.holders.iter().collect();
            if holders.is_empty() || assembly.asked > MAX_IN_VAIN {
                let mut others = assembly.holders;
                others.remove(assembly.from);
                given_up.push((key, assembly.tenant, others));
                continue;
            }
            let link = holders[usize::from(assembly.asked) % holders.len()];
            asks.push((link, assembly.tenant, Record::Graft { id: key.0, chunks: assembly.missing() }));
        }
        for (key, tenant, others) in given_up {
            self.assemblies.remove(key);
            if others.iter().next().is_some() {
                // Whoever began it is not to begin it for them once more.
                self.assemblies.spoil(key.0, now);
                self.want_anew(key.0, tenant, others, now);
            } else if key.1.is_none() {
                self.counts.lost += 1;
            }
        }
        for (link, tenant, graft) in asks {
            self.counts.grafts += 1;
            self.send(link, tenant, CONTROL, graft.encode(), out);
        }
    }

    /// What was put together of a message is of no use: whoever else has it is asked for all.
    pub(super) fn want_anew(&mut self, id: MessageId, tenant: TenantId, holders: LinkSet, now: Millis) {
        holders.iter().for_each(|link| self.wanted.add((tenant, id), link, now));
    }

    /// A link asks for a message. Where its lane has no room, it asks again; where it has been
    /// sent it time and again, it is not.
    pub(super) fn graft(
        &mut self,
        (id, chunks): (MessageId, u32),
        link: LinkId,
        tenant: TenantId,
        now: Millis,
        out: &mut impl Outlet,
    ) {
        if chunks == 0 {
            self.links.make_eager(link);
        }
        let Some(held) = self.store.get_mut(id).filter(|held| held.tenant == tenant) else { return };
        if !held.may_answer(link, now) {
            return;
        }
        let held = held.clone();
        let wanted = if chunks == 0 { WHOLE } else { chunks };
        if self.push(link, &held, wanted, out)
            && let Some(held) = self.store.get_mut(id)
        {
            held.known.insert(link);
            held.note_answer(link);
        }
    }
}
