//! The links of one daemon: which are eager, and how far each has been told what is held.

use std::collections::BTreeMap;

use crate::Millis;

/// Links that one daemon may have: one for each configured peer.
pub const MAX_LINKS: usize = crate::config::MAX_PEERS;

/// A link, by its place among at most [`MAX_LINKS`]; free places are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(u8);

/// A set of links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkSet(u64);

impl LinkSet {
    /// Adds a link.
    pub fn insert(&mut self, link: LinkId) {
        self.0 |= 1 << link.0;
    }

    /// Takes a link out.
    pub fn remove(&mut self, link: LinkId) {
        self.0 &= !(1 << link.0);
    }

    /// Whether a link is in it.
    #[must_use]
    pub fn contains(self, link: LinkId) -> bool {
        self.0 & (1 << link.0) != 0
    }

    /// The links of both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The links, lowest first.
    pub fn iter(self) -> impl Iterator<Item = LinkId> {
        (0..64).map(LinkId).filter(move |link| self.contains(*link))
    }
}

#[derive(Debug)]
struct Link {
    eager: bool,
    /// Held messages before this position were pushed or announced to it, or came by it.
    cursor: u64,
    /// Nothing more is announced to it before.
    paused: Option<Millis>,
}

#[derive(Debug)]
pub(super) struct Links {
    fanout: usize,
    links: BTreeMap<LinkId, Link>,
}

impl Links {
    pub(super) fn new(fanout: usize) -> Self {
        Self { fanout, links: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, cursor: u64) -> Option<LinkId> {
        let free =
            (0..MAX_LINKS).filter_map(|n| u8::try_from(n).ok().map(LinkId)).find(|id| !self.links.contains_key(id))?;
        let eager = self.eager().len() < self.fanout;
        self.links.insert(free, Link { eager, cursor, paused: None });
        Some(free)
    }

    /// Another number of eager links from now on: those over it become lazy, or lazy ones take
    /// the places that are new.
    pub(super) fn resize(&mut self, fanout: usize) {
        self.fanout = fanout;
        let mut eager = self.eager().len();
        for link in self.links.values_mut() {
            if eager > fanout && link.eager {
                link.eager = false;
                eager -= 1;
            } else if eager < fanout && !link.eager {
                link.eager = true;
                eager += 1;
            }
        }
    }

    pub(super) fn remove(&mut self, link: LinkId) {
        let was_eager = self.links.remove(&link).is_some_and(|link| link.eager);
        // A branch fell off: another takes its place at once, rather than by the next graft.
        if was_eager && let Some(spare) = self.links.values_mut().find(|link| !link.eager) {
            spare.eager = true;
        }
    }

    pub(super) fn rewind(&mut self, link: LinkId, cursor: u64) {
        if let Some(link) = self.links.get_mut(&link) {
            link.cursor = cursor;
        }
    }

    /// What is held from this position on is to be announced to every link that may lack it.
    pub(super) fn rewind_all(&mut self, cursor: u64) {
        self.links.values_mut().for_each(|link| link.cursor = link.cursor.min(cursor));
    }

    pub(super) fn pause(&mut self, link: LinkId, until: Millis) {
        if let Some(link) = self.links.get_mut(&link) {
            link.paused = Some(until);
        }
    }

    pub(super) fn is_paused(&self, link: LinkId, now: Millis) -> bool {
        self.links.get(&link).and_then(|link| link.paused).is_some_and(|until| now < until)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = LinkId> {
        self.links.keys().copied()
    }

    pub(super) fn eager(&self) -> Vec<LinkId> {
        self.links.iter().filter(|(_, link)| link.eager).map(|(id, _)| *id).collect()
    }

    /// Makes a link eager, another one lazy where `fanout` asks for it.
    pub(super) fn make_eager(&mut self, link: LinkId) {
        let full = self.eager().len() >= self.fanout;
        match self.links.get_mut(&link) {
            Some(entry) if !entry.eager => entry.eager = true,
            Some(_) | None => return,
        }
        if full && let Some((_, other)) = self.links.iter_mut().find(|(id, other)| **id != link && other.eager) {
            other.eager = false;
        }
    }

    /// Makes a link lazy. Whether it was not before.
    pub(super) fn make_lazy(&mut self, link: LinkId) -> bool {
        self.links.get_mut(&link).is_some_and(|link| std::mem::replace(&mut link.eager, false))
    }

    pub(super) fn cursor(&self, link: LinkId) -> u64 {
        self.links.get(&link).map_or(u64::MAX, |link| link.cursor)
    }
}
