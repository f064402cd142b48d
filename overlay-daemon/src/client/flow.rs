//! A publisher's window: how many messages may be unanswered, and what a refusal does.
//! Decides when to send, wait, try again and give up; it is told the time and does no I/O.
//!
//! The window halves with every 429 or 503 and grows by one for each windowful accepted, as
//! TCP's does, so that a publisher settles at what the daemon takes. A wait counts as a
//! failure only until something is accepted again: `retries` bounds how often in a row.

use std::collections::VecDeque;
use std::time::Duration;

use overlay_core::frame::{Flags, Frame};
use overlay_core::record::MessageId;
use tokio::time::Instant;

use super::connection::{ANSWER_TIMEOUT, ConnectionError, Refused};
use super::input::Body;

/// A message on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    /// What to call it in an error.
    pub(super) name: String,
    /// What it is.
    pub(super) body: Body,
}

/// What an answer says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The daemon has it, under this id.
    Accepted(MessageId),
    /// Not now: it is sent again after this time.
    Later(Refused, Duration),
    /// Not at all, or not within the retries.
    Refused(Outgoing, Refused),
    /// The daemon ended the stream: these were not answered.
    Ended(Vec<Outgoing>, Option<Refused>),
}

/// The messages between their source and the daemon's answers.
#[derive(Debug)]
pub(super) struct Flow {
    most: usize,
    window: usize,
    accepted: usize,
    /// To be sent, again or for the first time.
    waiting: VecDeque<Outgoing>,
    /// Sent and not answered, in order.
    inflight: VecDeque<(Outgoing, Instant)>,
    /// Nothing is sent before.
    resume: Option<Instant>,
    retries: u32,
    refusals: u32,
}

impl Flow {
    /// A flow with at most `max_inflight` messages unanswered, and `retries` waits in a row.
    pub(super) fn new(max_inflight: u32, retries: u32) -> Self {
        /// More would only queue on this side.
        const MOST: u32 = 256;
        let most = max_inflight.clamp(1, MOST) as usize;
        let (waiting, inflight) = (VecDeque::new(), VecDeque::new());
        Self { most, window: most, accepted: 0, waiting, inflight, resume: None, retries, refusals: 0 }
    }

    /// Whether the next message may be read.
    pub(super) fn wants_more(&self) -> bool {
        self.waiting.is_empty() && self.inflight.len() < self.window
    }

    /// Takes a message in, to be sent when its turn comes.
    pub(super) fn handle_input(&mut self, message: Outgoing) {
        self.waiting.push_back(message);
    }

    /// The message to send now, if there is one.
    pub(super) fn poll_send(&mut self, now: Instant) -> Option<Body> {
        if self.inflight.len() >= self.window || self.resume.is_some_and(|at| now < at) {
            return None;
        }
        self.resume = None;
        let message = self.waiting.pop_front()?;
        let body = message.body.clone();
        self.inflight.push_back((message, now));
        Some(body)
    }

    /// An answer on the stream: it is for the oldest message that has none.
    pub(super) fn handle_answer(&mut self, frame: &Frame, now: Instant) -> Result<Outcome, ConnectionError> {
        if !frame.flags.has(Flags::RESP) {
            return Err(ConnectionError::Protocol("the daemon sent something else than answers to a publisher"));
        }
        if frame.flags.has(Flags::END) {
            let left = self.inflight.drain(..).map(|(message, _)| message).chain(self.waiting.drain(..)).collect();
            return Ok(Outcome::Ended(left, (frame.code >= 400).then(|| Refused::of(frame))));
        }
        let (message, _) = self
            .inflight
            .pop_front()
            .ok_or(ConnectionError::Protocol("the daemon answered a message that was not published"))?;
        match frame.code {
            200 => {
                let id = <[u8; 32]>::try_from(&frame.payload[..])
                    .map_err(|_| ConnectionError::Protocol("the daemon's answer is not a message id of 32 bytes"))?;
                self.grow();
                Ok(Outcome::Accepted(MessageId(id)))
            }
            400.. => Ok(self.refuse(message, Refused::of(frame), now)),
            _ => Err(ConnectionError::Protocol("a message was not answered by 200 or a refusal")),
        }
    }

    fn grow(&mut self) {
        self.refusals = 0;
        self.accepted += 1;
        if self.accepted >= self.window {
            self.accepted = 0;
            self.window = self.most.min(self.window + 1);
        }
    }

    fn refuse(&mut self, message: Outgoing, refused: Refused, now: Instant) -> Outcome {
        let Some(wait) = refused.retry_after else { return Outcome::Refused(message, refused) };
        // Those that were under way with it are refused for the same reason: one failure.
        if self.resume.is_none_or(|at| now >= at) {
            self.refusals += 1;
            self.window = (self.window / 2).max(1);
            self.accepted = 0;
        }
        if self.refusals > self.retries {
            return Outcome::Refused(message, refused);
        }
        let until = now + wait;
        self.resume = Some(self.resume.map_or(until, |at| at.max(until)));
        // Behind those refused before it, and before all that was not sent yet: in order.
        self.waiting.push_back(message);
        Outcome::Later(refused, wait)
    }

    /// When [`Self::poll_send`] or [`Self::handle_timeout`] has something to say.
    pub(super) fn poll_timeout(&self, now: Instant) -> Instant {
        let answer = self.inflight.front().map(|(_, sent)| *sent + ANSWER_TIMEOUT);
        let resume = self.resume.filter(|_| !self.waiting.is_empty());
        [answer, resume].into_iter().flatten().min().unwrap_or(now + ANSWER_TIMEOUT)
    }

    /// A deadline passed.
    pub(super) fn handle_timeout(&self, now: Instant) -> Result<(), ConnectionError> {
        match self.inflight.front() {
            Some((_, sent)) if now >= *sent + ANSWER_TIMEOUT => {
                Err(ConnectionError::Timeout("a published message", ANSWER_TIMEOUT))
            }
            _ => Ok(()),
        }
    }

    /// Whether every message has its answer.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.inflight.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use overlay_core::frame::AppProto;
    use overlay_core::identity::TenantId;
    use overlay_core::status::{Refusal, Status};

    use super::*;

    fn message(n: u8) -> Outgoing {
        Outgoing { name: format!("line {n}"), body: Body::Whole(Bytes::from(vec![n])) }
    }

    fn answer(code: u16, payload: Bytes, end: bool) -> Frame {
        let request = Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(0), 3, Bytes::new());
        Frame::response(&request, code, end, payload)
    }

    fn accepted() -> Frame {
        answer(200, Bytes::from(vec![9; 32]), false)
    }

    fn refused(status: Status, after: u64) -> Frame {
        answer(status.code(), Refusal::later(status, "no", after).body(3), false)
    }

    fn fill(flow: &mut Flow, count: u8, now: Instant) -> usize {
        (0..count).for_each(|n| flow.handle_input(message(n)));
        std::iter::from_fn(|| flow.poll_send(now)).count()
    }

    #[tokio::test(start_paused = true)]
    async fn the_window_bounds_what_is_under_way() {
        let now = Instant::now();
        let mut flow = Flow::new(4, 3);
        assert_eq!(fill(&mut flow, 10, now), 4);
        assert_eq!(flow.handle_answer(&accepted(), now).unwrap(), Outcome::Accepted(MessageId([9; 32])));
        assert!(flow.poll_send(now).is_some() && flow.poll_send(now).is_none());
    }

    /// 429 and 503: everything waits as long as it was told, then goes on in order.
    #[tokio::test(start_paused = true)]
    async fn a_refusal_for_now_is_waited_out() {
        let now = Instant::now();
        let mut flow = Flow::new(4, 3);
        fill(&mut flow, 3, now);
        for _ in 0..3 {
            let outcome = flow.handle_answer(&refused(Status::QuotaExhausted, 40), now).unwrap();
            assert!(matches!(outcome, Outcome::Later(_, wait) if wait == Duration::from_millis(40)));
        }
        let at = now + Duration::from_millis(40);
        assert_eq!((flow.poll_send(now), flow.poll_timeout(now), flow.window), (None, at, 2), "halved once");
        assert_eq!(flow.poll_send(at), Some(message(0).body));
        assert_eq!(flow.poll_send(at), Some(message(1).body));
        assert_eq!(flow.poll_send(at), None);
    }

    #[tokio::test(start_paused = true)]
    async fn retries_are_bounded_until_something_is_accepted() {
        let mut now = Instant::now();
        let mut flow = Flow::new(1, 2);
        flow.handle_input(message(1));
        let mut again = |flow: &mut Flow, frame: Frame| {
            now += Duration::from_millis(40);
            assert!(flow.poll_send(now).is_some());
            flow.handle_answer(&frame, now).unwrap()
        };
        let busy = || refused(Status::Unavailable, 40);
        for _ in 0..2 {
            assert!(matches!(again(&mut flow, busy()), Outcome::Later(..)));
        }
        assert!(matches!(again(&mut flow, accepted()), Outcome::Accepted(_)));
        flow.handle_input(message(2));
        for _ in 0..2 {
            assert!(matches!(again(&mut flow, busy()), Outcome::Later(..)));
        }
        assert!(matches!(again(&mut flow, busy()), Outcome::Refused(m, _) if m == message(2)));
        assert!(flow.is_idle());
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_retry_can_help() {
        let now = Instant::now();
        for status in [Status::PayloadTooLarge, Status::Forbidden, Status::Internal] {
            let mut flow = Flow::new(2, 3);
            fill(&mut flow, 2, now);
            let outcome = flow.handle_answer(&refused(status, 0), now).unwrap();
            assert!(matches!(outcome, Outcome::Refused(m, r) if m == message(0) && r.code == status.code()));
            assert!(matches!(flow.handle_answer(&accepted(), now), Ok(Outcome::Accepted(_))), "the next goes on");
        }
        let mut flow = Flow::new(1, 3);
        fill(&mut flow, 2, now);
        let over = answer(503, Refusal::later(Status::Unavailable, "draining", 1).body(3), true);
        let outcome = flow.handle_answer(&over, now).unwrap();
        assert!(matches!(outcome, Outcome::Ended(left, Some(_)) if left == [message(0), message(1)]));
    }

    #[tokio::test(start_paused = true)]
    async fn nonsense_is_an_error() {
        let now = Instant::now();
        for (case, frame, sent) in [
            ("an answer to nothing", accepted(), 0),
            ("an id that is too short", answer(200, Bytes::from_static(b"id"), false), 1),
            ("a code of no kind", answer(100, Bytes::new(), false), 1),
            ("an event", Frame { flags: Flags::EVENT, ..accepted() }, 1),
        ] {
            let mut flow = Flow::new(2, 3);
            fill(&mut flow, sent, now);
            assert!(matches!(flow.handle_answer(&frame, now), Err(ConnectionError::Protocol(_))), "{case}");
        }
        let mut flow = Flow::new(2, 3);
        fill(&mut flow, 1, now);
        let late = flow.poll_timeout(now);
        assert!(flow.handle_timeout(now).is_ok() && flow.handle_timeout(late).is_err());
    }
}
