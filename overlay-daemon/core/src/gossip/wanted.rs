//! Messages that were announced and have not come: who has them, who was asked, when to ask
//! again, when to give up. Bounded for each link; what is not due costs nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::{ANNOUNCE_MS, GRAFT_MS, LinkId, LinkSet};
use crate::Millis;
use crate::identity::TenantId;
use crate::record::MessageId;

/// Announced messages that may be awaited from one link.
const MAX_WANTED_A_LINK: usize = 8_192;
/// Times that a message is asked for in vain before it is given up: nothing at all came from
/// whoever was asked. A link that is only slow, by its bucket or its line, is asked for as long
/// as the window lasts; after that the message would be too old to be taken.
const MAX_IN_VAIN: u8 = 10;
/// And in any case as often as this for each holder: however many are silent, the one that
/// would answer has its turn.
const IN_VAIN_A_HOLDER: usize = 2;
/// Messages asked of one link and not come yet: what is asked for beyond what a lane takes
/// would not be sent, and count as asked.
const MAX_ASKED_A_LINK: usize = 64;

/// What came and found no room is asked for again after so many milliseconds.
const NO_ROOM_MS: u64 = 1_000;

/// A message as it was announced: an id that is announced for another tenant is another's.
pub(super) type Key = (TenantId, MessageId);

#[derive(Debug)]
struct Want {
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

/// What there is to do about a message that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nobody has it, nobody answers, or it is too old by now: it is forgotten.
    GiveUp,
    /// Whoever has it is asked for as much as may be under way: later.
    Later,
    /// This link is to be asked.
    Ask(LinkId),
}

/// Messages that were announced and have not come.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    wants: BTreeMap<Key, Want>,
    by_time: BTreeSet<(Millis, Key)>,
    quota: BTreeMap<LinkId, usize>,
    /// Messages that each link was asked for and that may still come.
    under_way: BTreeMap<LinkId, usize>,
    /// When a link last brought a message, or a piece of one.
    heard: BTreeMap<LinkId, Millis>,
}

impl Wanted {
    pub(super) fn add(&mut self, key: Key, link: LinkId, now: Millis) {
        if let Some(want) = self.wants.get_mut(&key) {
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
        let at = now.after(GRAFT_MS);
        self.wants.insert(key, Want { holders, since: now, asked: 0, in_vain: 0, at, asked_of: None, first: link });
        self.by_time.insert((at, key));
    }

    /// Forgets a message. Gives who else has it.
    pub(super) fn remove(&mut self, key: Key) -> LinkSet {
        let Some(want) = self.wants.remove(&key) else { return LinkSet::default() };
        self.by_time.remove(&(want.at, key));
        less(&mut self.quota, want.first);
        if let Some((link, _)) = want.asked_of {
            less(&mut self.under_way, link);
        }
        want.holders
    }

    pub(super) fn remove_announcer(&mut self, key: Key, link: LinkId) {
        if let Some(want) = self.wants.get_mut(&key) {
            want.holders.remove(link);
        }
    }

    /// A link brings messages: it is alive, however long those that it was asked for take.
    pub(super) fn hear(&mut self, link: LinkId, now: Millis) {
        self.heard.insert(link, now);
    }

    /// A link is gone, and its number will name another: what it was the first to announce
    /// counts against the next who has it. Gives how many nobody else has.
    pub(super) fn forget_link(&mut self, link: LinkId) -> u64 {
        self.heard.remove(&link);
        self.under_way.remove(&link);
        self.quota.remove(&link);
        let mut nobodys = Vec::new();
        for (key, want) in &mut self.wants {
            want.holders.remove(link);
            want.asked_of = want.asked_of.filter(|(asked, _)| *asked != link);
            if want.first != link {
                continue;
            }
            match want.holders.iter().next() {
                Some(next) => {
                    want.first = next;
                    *self.quota.entry(next).or_default() += 1;
                }
                None => nobodys.push(*key),
            }
        }
        let count = nobodys.len() as u64;
        for key in nobodys {
            self.remove(key);
        }
        count
    }

    /// What may be asked for now, least asked for first, so that nothing is given up for want
    /// of a turn. What was asked for and is due has not come in time.
    pub(super) fn due(&mut self, now: Millis) -> Vec<Key> {
        let keys: Vec<Key> = self.by_time.range(..=(now, LAST)).map(|(_, key)| *key).collect();
        let mut due = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(want) = self.wants.get_mut(&key) else { continue };
            if let Some((link, at)) = want.asked_of.take() {
                less(&mut self.under_way, link);
                if self.heard.get(&link).is_none_or(|heard| *heard < at) {
                    want.in_vain = want.in_vain.saturating_add(1);
                }
            }
            due.push((want.asked, key));
        }
        due.sort_unstable();
        due.into_iter().map(|(_, key)| key).collect()
    }

    /// What to do about a message that is due; what is older than `window_ms` is given up.
    pub(super) fn turn(&self, key: Key, window_ms: u64, now: Millis) -> Turn {
        let Some(want) = self.wants.get(&key) else { return Turn::GiveUp };
        let holders: Vec<LinkId> = want.holders.iter().collect();
        let patience = usize::from(MAX_IN_VAIN).max(IN_VAIN_A_HOLDER * holders.len());
        if holders.is_empty() || usize::from(want.in_vain) >= patience || now.since(want.since) >= window_ms {
            return Turn::GiveUp;
        }
        let (later, next) = holders.split_at(want.asked % holders.len());
        let free = |link: &&LinkId| self.under_way.get(link).is_none_or(|count| *count < MAX_ASKED_A_LINK);
        next.iter().chain(later).find(free).map_or(Turn::Later, |link| Turn::Ask(*link))
    }

    /// A link was asked.
    pub(super) fn asked(&mut self, key: Key, link: LinkId, now: Millis) {
        self.schedule(key, now.after(GRAFT_MS));
        if let Some(want) = self.wants.get_mut(&key) {
            want.asked_of = Some((link, now));
            want.asked = want.asked.wrapping_add(1);
            *self.under_way.entry(link).or_default() += 1;
        }
    }

    /// It could not be asked for, `before` others neither: those that wait for the same link
    /// are looked at again in the numbers in which it can be asked, not all each time.
    pub(super) fn put_off(&mut self, key: Key, before: usize, now: Millis) {
        let rounds = 1 + (before / MAX_ASKED_A_LINK) as u64;
        self.schedule(key, now.after(ANNOUNCE_MS * rounds));
    }

    /// It came and could not be taken: whoever sent it did answer, and is asked again after a
    /// while.
    pub(super) fn wait(&mut self, key: Key, now: Millis) {
        self.schedule(key, now.after(NO_ROOM_MS));
        if let Some(want) = self.wants.get_mut(&key) {
            want.in_vain = 0;
            if let Some((link, _)) = want.asked_of.take() {
                less(&mut self.under_way, link);
            }
        }
    }

    /// Who counts as waited for, where a message cannot be asked for.
    pub(super) fn first(&self, key: Key) -> Option<LinkId> {
        self.wants.get(&key).map(|want| want.first)
    }

    fn schedule(&mut self, key: Key, at: Millis) {
        if let Some(want) = self.wants.get_mut(&key) {
            self.by_time.remove(&(want.at, key));
            want.at = at;
            self.by_time.insert((at, key));
        }
    }

    pub(super) fn next(&self) -> Option<Millis> {
        self.by_time.first().map(|(at, _)| *at)
    }
}

/// Behind every key.
const LAST: Key = (TenantId(u128::MAX), MessageId([u8::MAX; 32]));

fn less(counts: &mut BTreeMap<LinkId, usize>, link: LinkId) {
    if let Some(count) = counts.get_mut(&link) {
        *count = count.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::links::Links;
    use super::*;

    const WINDOW_MS: u64 = 120_000;

    fn key(n: u64) -> Key {
        (TenantId(0), MessageId(blake3::hash(&n.to_be_bytes()).into()))
    }

    /// G3: a link that announces as much as it may, is heard of all the time and never gives any
    /// of it, is asked for a few at a time; what waits for its turn meanwhile is not looked at
    /// each time, and an honest message is asked for when it is due.
    #[test]
    fn g3_what_cannot_be_asked_for_costs_little() {
        let mut links = Links::new(6);
        let (liar, honest) = (links.add(0).unwrap(), links.add(0).unwrap());
        let mut wanted = Wanted::default();
        (0..20_000).for_each(|n| wanted.add(key(n), liar, Millis(0)));
        assert_eq!((wanted.wants.len(), wanted.by_time.len()), (MAX_WANTED_A_LINK, MAX_WANTED_A_LINK));
        let (mut looked_at, mut asked, mut honestly) = (0, 0, 0);
        for now in (1..10_000).map(Millis) {
            wanted.hear(liar, now);
            if now.0 % 10 == 0 && now.0 < 9_000 {
                wanted.add(key(100_000 + now.0), liar, now);
                wanted.add(key(1_000_000 + now.0), honest, now);
            }
            let mut before = 0;
            for key in wanted.due(now) {
                looked_at += 1;
                match wanted.turn(key, WINDOW_MS, now) {
                    Turn::Ask(link) if link == honest => {
                        honestly += 1;
                        wanted.remove(key);
                    }
                    Turn::Ask(link) => {
                        asked += 1;
                        wanted.asked(key, link, now);
                    }
                    Turn::Later => {
                        wanted.put_off(key, before, now);
                        before += 1;
                    }
                    Turn::GiveUp => panic!("nothing is hopeless yet"),
                }
            }
            assert!(wanted.next().unwrap() > now);
        }
        assert_eq!(honestly, 899);
        assert!((1_500..=64 * 34).contains(&asked), "64 in each 300 ms: {asked}");
        assert!(looked_at < 10 * MAX_WANTED_A_LINK, "all of it once a second, not each time: {looked_at}");
    }
}
