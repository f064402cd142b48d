//! How fast a session may go on: windows that ACK_REQ asks for, the budget of useless frames,
//! and the delays of Backoff.

use bytes::Bytes;

use super::entry::{Kind, Upload};
use super::{Clock, Event, Node, Output, SessionId};
use crate::Millis;
use crate::admission::TokenBucket;
use crate::budget::{PAUSE_MS, Verdict};
use crate::frame::{Flags, Frame, MAX_BODY};
use crate::lanes::Class;
use crate::record::Record;
use crate::session::State;
use crate::status::{Reason, Refusal, Status};

/// The code of an acknowledgement: the stream goes on.
pub(super) const PARTIAL: u16 = 206;
/// Milliseconds for which sessions with peers open nothing while writes are shed here.
const PRESSURE_MS: u64 = 1_000;

/// Gossip records that a peer may send a second besides the messages and chunks that its own
/// bucket lets it send: announcements, what it asks for, prunes.
const RECORDS_PER_SECOND: u32 = 1_000;
/// Ids of an announcement that count as one record more.
const IDS_A_RECORD: usize = 64;

/// What a peer may send of gossip: twice what one that is configured alike sends at the most,
/// saved up for two seconds, so that no line, however it bunches things, is slowed.
pub(super) fn gossip_bucket(burst: u32, now: Millis) -> TokenBucket {
    let rate = burst.saturating_mul(2).saturating_add(RECORDS_PER_SECOND);
    TokenBucket::new(rate, rate.saturating_mul(2), now)
}

impl Node {
    /// A gossip record is about to be looked at. The daemon waits for none of its peers, but what
    /// one sends takes the time of all: past its bucket it is not read for a while. Nothing is
    /// dropped, and nobody is cut off for it.
    pub(super) fn pace_gossip(&mut self, id: SessionId, record: &Record, now: Millis) {
        let cost = match record {
            Record::Announce(ids) => 1 + ids.len() / IDS_A_RECORD,
            _ => 1,
        };
        let Some(bucket) = self.sessions.get_mut(&id).and_then(|entry| entry.gossip.as_mut()) else { return };
        if (0..cost).filter(|_| bucket.take(now)).count() < cost {
            self.outputs.push_back(Output::Pause(id, now.after(PAUSE_MS)));
        }
    }

    /// A frame arrived whose payload could not be inflated, and is not there. It is refused on
    /// its stream, and a message that was under way there with it.
    pub fn handle_unread(&mut self, id: SessionId, frame: Frame, refusal: &Refusal, clock: Clock) {
        let about = Frame { payload: Bytes::new(), cap: Bytes::new(), ..frame.clone() };
        match self.judge(id, frame, &about, clock) {
            Some(Event::Start(_)) => self.refuse(id, &about, refusal, true),
            Some(Event::Request(_)) => {
                self.refuse_upload(id, about.corr_id);
                self.refuse(id, &about, refusal, false);
            }
            Some(Event::Ended(_)) => self.end(id, &about),
            Some(_) => self.count_useless(id),
            None => return,
        }
        self.acknowledge(id, &about);
        self.settle_budget(id, clock.now);
    }

    /// Answers ACK_REQ: how much the sender may send on this stream before it asks again.
    pub(super) fn acknowledge(&mut self, id: SessionId, to: &Frame) {
        if !to.flags.has(Flags::ACK_REQ) {
            return;
        }
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        let Some(stream) = entry.session.stream_mut(to.corr_id).filter(|stream| !stream.ours) else { return };
        let held = match &stream.kind {
            Kind::Publish { upload: Upload::Open { bytes, .. }, .. } => *bytes,
            Kind::Publish { .. } | Kind::GossipIn => 0,
            Kind::Subscribe { .. } | Kind::GossipOut { .. } => return,
        };
        let window = u32::try_from(MAX_BODY.saturating_sub(held)).unwrap_or(u32::MAX);
        self.count_useless(id);
        self.push(
            id,
            Class::Control,
            Frame::response(to, PARTIAL, false, Bytes::copy_from_slice(&window.to_be_bytes())),
        );
    }

    /// The frame in hand brought nothing, or costs an answer that nobody needs.
    pub(super) fn count_useless(&mut self, id: SessionId) {
        if let Some(entry) = self.sessions.get_mut(&id) {
            entry.useless = entry.useless.saturating_add(1);
        }
    }

    /// Tells the budget what the frame in hand was.
    pub(super) fn settle_budget(&mut self, id: SessionId, now: Millis) {
        let Some(entry) = self.sessions.get_mut(&id).filter(|entry| !entry.closing && entry.useless > 0) else {
            return;
        };
        let useless = std::mem::take(&mut entry.useless);
        match entry.budget.spend(useless, now) {
            Verdict::Go => {}
            Verdict::Pause(until) => self.outputs.push_back(Output::Pause(id, until)),
            Verdict::Close => {
                self.outputs.push_back(Output::Pause(id, Millis::NEVER));
                self.refuse_session(id, &Refusal::later(Status::QuotaExhausted, "too many useless frames", 1_000));
            }
        }
    }

    /// Whether HELLO was answered, nothing was refused for now, and there is no pressure.
    pub(super) fn is_active(&self, id: SessionId) -> bool {
        self.sessions.get(&id).is_some_and(|entry| entry.session.state() == State::Active)
    }

    /// Whether HELLO was answered: frames of this session may be looked into.
    #[must_use]
    pub fn is_greeted(&self, id: SessionId) -> bool {
        let state = self.sessions.get(&id).map(|entry| entry.session.state());
        matches!(state, Some(State::Active | State::Backoff))
    }

    /// A peer refused for now: nothing new is asked of it for a while, `asked` ms at the least.
    /// Refused for too long, the session ends.
    pub(super) fn back_off(&mut self, id: SessionId, asked: u64, now: Millis) {
        let Some(entry) = self.sessions.get_mut(&id) else { return };
        // Several streams that are refused at once are one refusal.
        let again = entry.session.state() == State::Backoff && entry.backoff != Default::default();
        match if again {
            Some(asked.min(crate::backoff::MOST_MS))
        } else {
            entry.backoff.handle_refusal(asked, now, &mut self.jitter)
        } {
            Some(delay) => {
                entry.session.back_off(delay, now);
                self.reschedule(id);
            }
            None => {
                self.outputs.push_back(Output::Rejected(Reason::Timeout));
                self.close_when_sent(id);
            }
        }
    }

    /// I-6: while writes are shed here, this daemon opens nothing at its peers.
    pub(super) fn back_off_under_pressure(&mut self, now: Millis) {
        if !self.shedding {
            return;
        }
        let peers: Vec<SessionId> = self.links.values().copied().collect();
        for id in peers {
            let delay = PRESSURE_MS + self.jitter.below(PRESSURE_MS);
            if let Some(entry) = self.sessions.get_mut(&id) {
                entry.session.back_off(delay, now);
            }
            self.reschedule(id);
        }
    }
}
