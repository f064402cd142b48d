//! Who is a peer, which of two sessions between one pair stays, and the links that gossip
//! runs over. Peers come from configuration alone (I-1).

use std::collections::BTreeSet;

use super::entry::Remote;
use super::pace::gossip_bucket;
use super::{Clock, Entry, Kind, Node, Output, Party, SessionId, Wire};
use crate::Millis;
use crate::config::{Peer, Places};
use crate::control::{DaemonHello, Open, json, parse};
use crate::frame::{AppProto, Flags, Frame};
use crate::gossip::MAX_LINKS;
use crate::grant::Holder;
use crate::identity::SpiffeId;
use crate::lanes::Class;
use crate::session::Role;
use crate::status::{ErrorBody, Reason, Status};

/// Bytes of a daemon's name, as configuration bounds them too.
const MAX_NAME: usize = 63;
/// After a refusal that names no time, a gossip stream is asked for again.
const REFUSED_MS: u64 = 10_000;

/// Milliseconds to wait after this refusal at the least: none where it only says "not now",
/// and how long is left to the delays of Backoff.
pub(super) fn wait_ms(refusal: &Frame) -> u64 {
    let soon = refusal.code == Status::QuotaExhausted.code() || refusal.code == Status::Unavailable.code();
    let wait = parse::<ErrorBody>(&refusal.payload).and_then(|body| body.retry_after_ms);
    wait.filter(|_| soon).unwrap_or(if soon { 0 } else { REFUSED_MS })
}

impl Node {
    /// HELLO was exchanged: a daemon that is configured becomes a link, anyone else a client.
    pub(super) fn meet(&mut self, id: SessionId, daemon: Option<DaemonHello>, clock: Clock) {
        let Some(entry) = self.sessions.get(&id) else { return };
        let dialled = entry.dialled;
        let Holder::Certificate(identity) = entry.holder.clone() else { return };
        let Some(daemon) = daemon else {
            if dialled.is_some() {
                self.drop_session(id, Some(Reason::Protocol)); // a peer that is not a daemon
            }
            return;
        };
        if daemon.name.len() > MAX_NAME {
            return self.drop_session(id, Some(Reason::Protocol)); // it would be kept, and is nobody's
        }
        if daemon.incarnation == self.hello.incarnation && identity == self.identity {
            self.drop_session(id, None); // dialled ourselves
            return;
        }
        let Some(configured) = self.recognise(&identity, &daemon.name, dialled) else {
            if dialled.is_some() {
                self.drop_session(id, Some(Reason::Auth)); // another identity answered there
            } else if let Some(entry) = self.sessions.get_mut(&id) {
                entry.stranger = Some(daemon);
            }
            return;
        };
        if !self.prefer(id, &identity, &daemon) {
            return;
        }
        if !self.leaves_room(configured) {
            self.drop_session(id, Some(Reason::Quota));
            return;
        }
        let Some(link) = self.engine.handle_link_up(clock.now) else {
            self.drop_session(id, Some(Reason::Quota));
            return;
        };
        self.links.insert(link, id);
        let burst = self.config.gossip.burst_frames;
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.lanes.limit(burst, clock.now);
            entry.gossip = Some(gossip_bucket(burst, clock.now));
            entry.party = Party::Peer(Remote {
                identity,
                incarnation: daemon.incarnation,
                name: daemon.name,
                configured,
                link,
                streams: std::collections::BTreeMap::new(),
                renew_at: None,
            });
        }
        self.outputs.extend(configured.map(|peer| Output::Peer { peer, up: true }));
        self.open_gossip(id);
    }

    /// Another list of peers from now on. A session whose peer is now somebody else is closed.
    /// One whose peer is no longer configured goes on for as long as that peer may take to
    /// drain: it is stopping, most likely, and what it still accepts must find its way out.
    ///
    /// A daemon that dialled before it was configured here becomes a peer by the session that
    /// it has: to the other side that session is the one to keep.
    pub fn handle_peers(&mut self, places: Places, clock: Clock) {
        let now = clock.now;
        let old = std::mem::replace(&mut self.places, places);
        let until = now.after(self.config.drain.delay_ms.saturating_add(self.config.drain.timeout_ms));
        let mut replaced = Vec::new();
        for (id, entry) in &mut self.sessions {
            let Some(place) = entry.remote().and_then(|remote| remote.configured).or(entry.dialled) else { continue };
            let who = |peer: &Peer| (peer.name.clone(), peer.identity.clone());
            let (before, after) = (old.get(place).map(who), self.places.get(place).map(who));
            if before == after {
                continue;
            }
            entry.dialled = None;
            if let Some(remote) = entry.remote_mut() {
                remote.configured = None;
            }
            let is_gone = before.is_none_or(|(name, _)| self.places.iter().all(|(_, peer)| peer.name != name));
            if is_gone {
                self.leaving.insert(*id, until);
            } else {
                replaced.push(*id);
            }
        }
        for id in replaced {
            self.drop_session(id, None);
        }
        self.take_back();
        let waiting = self.sessions.iter_mut().filter(|(_, entry)| !entry.closing);
        let strangers: Vec<_> = waiting.filter_map(|(id, entry)| Some((*id, entry.stranger.take()?))).collect();
        for (id, daemon) in strangers {
            self.meet(id, Some(daemon), clock);
        }
    }

    /// Who was on the way out and is configured again, goes on with the session that it has.
    fn take_back(&mut self) {
        let leaving: Vec<SessionId> = self.leaving.keys().copied().collect();
        for id in leaving {
            let remote = self.sessions.get(&id).and_then(|entry| entry.remote());
            let Some((identity, name)) = remote.map(|r| (r.identity.clone(), r.name.clone())) else { continue };
            let Some(configured) = self.recognise(&identity, &name, None) else { continue };
            self.leaving.remove(&id);
            if let Some(remote) = self.sessions.get_mut(&id).and_then(|entry| entry.remote_mut()) {
                remote.configured = configured;
            }
        }
    }

    /// Whether the peer at a place has a session.
    #[must_use]
    pub fn is_up(&self, place: usize) -> bool {
        self.remotes().any(|(_, entry, remote)| !entry.closing && remote.configured == Some(place))
    }

    /// The sessions with peers. By their links, and not by looking at every session for them:
    /// clients are thousands, and everybody waits meanwhile.
    pub(super) fn remotes(&self) -> impl Iterator<Item = (SessionId, &Entry, &Remote)> {
        self.links.values().filter_map(|id| {
            let entry = self.sessions.get(id)?.as_ref();
            Some((*id, entry, entry.remote()?))
        })
    }

    /// Closes the sessions of peers that are no longer configured and had time to drain.
    pub(super) fn close_leaving(&mut self, now: Millis) {
        let late: Vec<SessionId> = self.leaving.iter().filter(|(_, until)| **until <= now).map(|(id, _)| *id).collect();
        for id in late {
            self.leaving.remove(&id);
            self.drop_session(id, None);
        }
    }

    /// Whether this identity is a configured peer's, and which. The name in HELLO only tells
    /// apart those who share an identity.
    fn recognise(&self, identity: &SpiffeId, name: &str, dialled: Option<usize>) -> Option<Option<usize>> {
        let covers = |peer: usize| self.places.get(peer).is_some_and(|p| p.identity.covers(identity));
        if let Some(peer) = dialled {
            return covers(peer).then_some(Some(peer));
        }
        let candidates: Vec<usize> = (0..self.places.span()).filter(|peer| covers(*peer)).collect();
        let named = candidates.iter().copied().find(|peer| self.places.get(*peer).is_some_and(|p| p.name == name));
        match candidates[..] {
            [] => None,
            [only] => Some(Some(only)),
            [_, _, ..] => Some(named),
        }
    }

    /// Whether a session with this configured peer leaves a link for each of those that have
    /// none: a daemon that comes as many cannot keep the others out.
    fn leaves_room(&self, configured: Option<usize>) -> bool {
        let mut missing: BTreeSet<usize> = self.places.iter().map(|(place, _)| place).collect();
        for place in self.remotes().filter_map(|(_, _, remote)| remote.configured) {
            missing.remove(&place);
        }
        let awaited = configured.is_some_and(|place| missing.contains(&place));
        awaited || self.links.len() + missing.len() < MAX_LINKS
    }

    /// Of two sessions between one pair, the one dialled by the lower (identity, incarnation)
    /// stays; of two dialled by the same side, the newer. Whether that is `id`.
    fn prefer(&mut self, id: SessionId, identity: &SpiffeId, daemon: &DaemonHello) -> bool {
        let same = |remote: &Remote| remote.identity == *identity && remote.incarnation == daemon.incarnation;
        let other = self.remotes().find(|(other, entry, remote)| *other != id && !entry.closing && same(remote));
        let Some((other, ..)) = other else { return true };
        let role = |id| self.sessions.get(&id).map(|entry| entry.session.role());
        let we_are_lower = (&self.identity, self.hello.incarnation) < (identity, daemon.incarnation);
        let keeps = if we_are_lower { Role::Dialler } else { Role::Acceptor };
        let stays = role(id) == role(other) || role(id) == Some(keeps);
        self.drop_session(if stays { other } else { id }, None);
        stays
    }

    /// Asks for every gossip stream that the link does not have yet, one a tenant. In Backoff
    /// nothing is asked for: the end of the delay does.
    pub(super) fn open_gossip(&mut self, id: SessionId) {
        if !self.is_active(id) {
            return;
        }
        let token = self.token.clone();
        for tenant in self.config.overlay.tenants.clone() {
            let Some(entry) = self.sessions.get_mut(&id) else { return };
            let Some(remote) = entry.remote() else { return };
            let ours = |kind: &Kind| matches!(kind, Kind::GossipOut { .. });
            let asked = entry.session.streams().any(|(_, s)| s.tenant == tenant && ours(&s.kind));
            if asked || remote.streams.contains_key(&tenant) {
                continue;
            }
            let open = json(&Open::Gossip {});
            let kind = Kind::GossipOut { token: self.token_generation, renews: None };
            let start = entry.session.open_ours(AppProto::GOSSIP, tenant, token.clone(), open, kind);
            let Some(start) = start else { return self.close_when_sent(id) };
            self.push(id, Class::Control, start);
        }
    }

    /// A peer answered on a gossip stream of ours.
    pub(super) fn answered(&mut self, id: SessionId, frame: &Frame, clock: Clock) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let tenant = frame.tenant;
        let renews = entry.session.stream(frame.corr_id).and_then(|stream| match stream.kind {
            Kind::GossipOut { renews, .. } => renews,
            _ => None,
        });
        let is_current = entry.remote().is_some_and(|remote| remote.streams.get(&tenant) == Some(&frame.corr_id));
        match (frame.code, frame.flags.has(Flags::END), renews) {
            // What another stream took over has ended.
            (200, true, None) if !is_current => drop(entry.session.close_stream(frame.corr_id)),
            (200, false, Some(_)) => self.renewed(id, frame.corr_id),
            (200, false, None) => {
                entry.backoff.handle_success();
                let Some(remote) = entry.remote_mut() else { return };
                if remote.streams.insert(tenant, frame.corr_id).is_some() {
                    return; // said before: what is held is not announced anew for it
                }
                let link = remote.link;
                self.engine.handle_tenant_up(link, clock.now);
                self.renew_gossip(id);
            }
            // About a frame, and gossip asks for no answers.
            (_, false, None) if is_current || frame.code < Status::BadRequest.code() => {}
            (_, _, Some(old)) => self.renewal_refused(id, frame, old, clock),
            (_, _, None) => self.gossip_refused(id, frame, clock),
        }
    }

    fn gossip_refused(&mut self, id: SessionId, frame: &Frame, clock: Clock) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        entry.session.close_stream(frame.corr_id);
        if let Some(remote) = entry.remote_mut()
            && remote.streams.get(&frame.tenant) == Some(&frame.corr_id)
        {
            remote.streams.remove(&frame.tenant);
        }
        // Other refusals may pass too: the peer may not have the keys of a new token yet. A
        // session without its stream would count as a peer and carry nothing.
        self.back_off(id, wait_ms(frame), clock.now);
    }

    /// Closes a session without waiting for what it has queued.
    pub(super) fn drop_session(&mut self, id: SessionId, reason: Option<Reason>) {
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.closing = true;
            self.outputs.extend(reason.map(Output::Rejected));
            self.outputs.push_back(Output::Close(id));
        }
    }

    /// A session is gone: its link goes, and its peer unless another session took over.
    pub(super) fn unlink(&mut self, id: SessionId, entry: &Entry) {
        let Some(remote) = entry.remote() else { return };
        if self.links.get(&remote.link) == Some(&id) {
            self.links.remove(&remote.link);
            self.engine.handle_link_down(remote.link);
        }
        let Some(peer) = remote.configured else { return };
        let another = self.remotes().any(|(_, _, other)| other.configured == Some(peer));
        if !another {
            self.outputs.push_back(Output::Peer { peer, up: false });
        }
    }

    /// Distinct daemons with an active session.
    #[must_use]
    pub fn peers_up(&self) -> u32 {
        let mut seen: Vec<_> = self.remotes().map(|(_, _, r)| (&r.identity, r.incarnation)).collect();
        seen.sort_unstable();
        seen.dedup();
        u32::try_from(seen.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn wire(&mut self) -> (Wire<'_>, &mut crate::gossip::Engine) {
        let memory = (&mut self.memory, self.engine.memory().saturating_add(self.reading));
        (Wire::new(&mut self.sessions, &self.links, &mut self.sendable, memory), &mut self.engine)
    }
}
