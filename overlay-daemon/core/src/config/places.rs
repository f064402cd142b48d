//! Configured peers by place: a small number that a peer keeps for as long as it is
//! configured, whoever else comes and goes. Sessions, diallers and gauges go by it.

use super::Peer;

/// The places of the configured peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    slots: Vec<Option<Peer>>,
}

impl Places {
    /// Each peer at its place in the file.
    #[must_use]
    pub fn new(peers: &[Peer]) -> Self {
        Self { slots: peers.iter().cloned().map(Some).collect() }
    }

    /// Takes up a new list: who is in both, by name, keeps its place, and places that have
    /// become free are given to those who are new. Returns the places whose peer is no longer
    /// who or where it was.
    pub fn update(&mut self, peers: &[Peer]) -> Vec<usize> {
        let before = self.slots.clone();
        for slot in &mut self.slots {
            *slot = slot.take().and_then(|old| peers.iter().find(|peer| peer.name == old.name).cloned());
        }
        for peer in peers {
            if self.slots.iter().flatten().any(|known| known.name == peer.name) {
                continue;
            }
            match self.slots.iter_mut().find(|slot| slot.is_none()) {
                Some(free) => *free = Some(peer.clone()),
                None => self.slots.push(Some(peer.clone())),
            }
        }
        (0..self.slots.len()).filter(|place| before.get(*place).unwrap_or(&None) != &self.slots[*place]).collect()
    }

    /// The peer at a place.
    #[must_use]
    pub fn get(&self, place: usize) -> Option<&Peer> {
        self.slots.get(place)?.as_ref()
    }

    /// Every peer with its place.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Peer)> {
        self.slots.iter().enumerate().filter_map(|(place, slot)| Some((place, slot.as_ref()?)))
    }

    /// Places, taken or free: every place is below it.
    #[must_use]
    pub fn span(&self) -> usize {
        self.slots.len()
    }
}
