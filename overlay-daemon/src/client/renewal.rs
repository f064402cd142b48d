//! A stream that outlives its token: whoever wrote the token's file writes another one, and the
//! stream goes on by that. Decides when to look at the file, and which stream number frames
//! bear meanwhile; its user keeps the stream that it opened.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use overlay_core::frame::{Flags, Frame};
use serde::Deserialize;
use tokio::time::Instant;

use super::connection::{ANSWER_TIMEOUT, ConnectionError, Refused};

/// From half its lifetime on a token's file is read again: every hundredth of the lifetime,
/// within these.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// What a frame is, once renewals are out of the way.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sorted {
    /// For the stream's user.
    User(Frame),
    /// It was about the renewal.
    Ours,
    /// The renewal was refused: the stream is as it was.
    Refused(Refused),
}

/// The renewals of one stream.
#[derive(Debug)]
pub(super) struct Renewal {
    /// The number that its user knows.
    opened: u64,
    /// The number that it has.
    current: u64,
    /// The number that it had, until that ends.
    previous: Option<u64>,
    /// What was asked for and is not answered: the new number and the token.
    asked: Option<(u64, Bytes)>,
    token: Bytes,
    due: Instant,
}

impl Renewal {
    /// Those of stream `opened`, which was opened with `token`.
    pub(super) fn new(opened: u64, token: Bytes, now: Instant, unix_ms: u64) -> Self {
        let due = now + until_half(&token, unix_ms);
        Self { opened, current: opened, previous: None, asked: None, token, due }
    }

    /// When [`Self::handle_time`] has something to do.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Whether an answer is awaited. Nothing is sent on the stream meanwhile: a refusal would
    /// have the daemon drop it.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether the stream is `corr_id` to its user.
    pub(super) fn is_of(&self, corr_id: u64) -> bool {
        self.opened == corr_id
    }

    /// The number that frames to be sent bear.
    pub(super) fn current(&self) -> u64 {
        self.current
    }

    /// Time to look: `file` is what the token's file holds now, if it can be read. The token to
    /// renew with, if it is another.
    pub(super) fn handle_time(&mut self, file: Option<Bytes>, now: Instant) -> Result<Option<Bytes>, ConnectionError> {
        if self.asked.is_some() {
            return Err(ConnectionError::Timeout("a renewal", ANSWER_TIMEOUT));
        }
        self.due = now + lifetime(&self.token).map_or(LOOK_AGAIN[1], |(_, life)| again(life));
        Ok(file.filter(|file| *file != self.token))
    }

    /// The renewal was sent, as stream `corr_id`.
    pub(super) fn handle_asked(&mut self, corr_id: u64, token: Bytes, now: Instant) {
        self.asked = Some((corr_id, token));
        self.due = now + ANSWER_TIMEOUT;
    }

    /// Sorts a frame that arrived.
    pub(super) fn sort(&mut self, frame: Frame, now: Instant, unix_ms: u64) -> Sorted {
        let is_answer = frame.flags.has(Flags::RESP);
        let opened = self.opened;
        let user = |frame| Sorted::User(Frame { corr_id: opened, ..frame });
        if is_answer && self.asked.as_ref().is_some_and(|(new, _)| *new == frame.corr_id) {
            let Some((new, token)) = self.asked.take() else { return Sorted::Ours };
            if frame.code != 200 {
                let refused = Refused::of(&frame);
                self.due = now + refused.retry_after.unwrap_or(LOOK_AGAIN[1]);
                return Sorted::Refused(refused);
            }
            self.previous = Some(std::mem::replace(&mut self.current, new));
            self.due = now + until_half(&token, unix_ms);
            self.token = token;
            return Sorted::Ours;
        }
        if is_answer && frame.flags.has(Flags::END) && frame.code == 200 && self.previous == Some(frame.corr_id) {
            self.previous = None;
            return Sorted::Ours;
        }
        // Events of the new number may overtake its answer.
        let asked = self.asked.as_ref().map(|(new, _)| *new);
        if [Some(self.current), self.previous, asked].contains(&Some(frame.corr_id)) {
            user(frame)
        } else {
            Sorted::User(frame)
        }
    }
}

/// From when a token is valid, and how long it lives. Not verified: the daemon does that.
fn lifetime(token: &[u8]) -> Option<(Duration, Duration)> {
    #[derive(Deserialize)]
    struct Times {
        nbf: u64,
        exp: u64,
    }
    let claims = token.split(|byte| *byte == b'.').nth(1)?;
    let Times { nbf, exp } = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    Some((Duration::from_secs(nbf), Duration::from_secs(exp.saturating_sub(nbf))))
}

fn again(lifetime: Duration) -> Duration {
    (lifetime / 100).clamp(LOOK_AGAIN[0], LOOK_AGAIN[1])
}

/// From now to half a token's lifetime.
fn until_half(token: &[u8], unix_ms: u64) -> Duration {
    // An Instant must not overflow, and the file may be looked at once a day whatever it says.
    const LONGEST: Duration = Duration::from_secs(86_400);
    let Some((from, life)) = lifetime(token) else { return LOOK_AGAIN[1] };
    from.saturating_add(life / 2).saturating_sub(Duration::from_millis(unix_ms)).min(LONGEST).max(LOOK_AGAIN[0])
}

#[cfg(test)]
mod tests {
    use overlay_core::frame::AppProto;
    use overlay_core::identity::TenantId;
    use overlay_core::status::{Refusal, Status};

    use super::*;

    const NOW: u64 = 1_000_000;

    /// A token that is valid for 100 s from `NOW`.
    fn token(word: &str) -> Bytes {
        let claims = format!(r#"{{"nbf":{NOW},"exp":{},"sub":"{word}"}}"#, NOW + 100);
        format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims)).into()
    }

    fn frame(flags: Flags, code: u16, corr_id: u64) -> Frame {
        Frame { code, ..Frame::new(flags, AppProto::PUBSUB, TenantId(0), corr_id, Bytes::new()) }
    }

    /// From half the lifetime on the file is looked at; a token that is another is asked for,
    /// and the stream's number changes under its user.
    #[tokio::test(start_paused = true)]
    async fn a_rewritten_token_renews_at_half_its_life() {
        let at = Instant::now();
        let mut renewal = Renewal::new(3, token("a"), at, NOW * 1_000);
        assert_eq!(renewal.due() - at, Duration::from_secs(50));
        assert_eq!(renewal.handle_time(Some(token("a")), at).unwrap(), None);
        assert_eq!(renewal.due() - at, Duration::from_secs(1));
        assert_eq!(renewal.handle_time(None, at).unwrap(), None, "a file that is gone for a moment");
        assert_eq!(renewal.handle_time(Some(token("b")), at).unwrap(), Some(token("b")));
        renewal.handle_asked(5, token("b"), at);
        assert!(renewal.is_asked() && renewal.current() == 3);
        let mut sort = |frame| renewal.sort(frame, at, NOW * 1_000);
        for corr_id in [3, 5] {
            assert_eq!(sort(frame(Flags::EVENT, 0, corr_id)), Sorted::User(frame(Flags::EVENT, 0, 3)));
        }
        assert_eq!(sort(frame(Flags::RESP, 200, 5)), Sorted::Ours);
        assert_eq!(sort(frame(Flags::EVENT, 0, 3)), Sorted::User(frame(Flags::EVENT, 0, 3)));
        let over = frame(Flags::RESP | Flags::END, 200, 3);
        assert_eq!(sort(over), Sorted::Ours);
        let end = frame(Flags::RESP | Flags::END, 401, 5);
        assert_eq!(sort(end.clone()), Sorted::User(Frame { corr_id: 3, ..end }));
        assert!(renewal.current() == 5 && !renewal.is_asked());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_renewal_leaves_the_stream() {
        let at = Instant::now();
        let mut renewal = Renewal::new(3, token("a"), at, NOW * 1_000);
        renewal.handle_asked(5, token("b"), at);
        assert!(renewal.handle_time(None, at).is_err(), "no answer");
        let body = Refusal::new(Status::Unauthorized, "the token's key is not known").body(5);
        let refusal = Frame { payload: body, ..frame(Flags::RESP | Flags::END, 401, 5) };
        assert!(matches!(renewal.sort(refusal, at, 0), Sorted::Refused(refused) if refused.code == 401));
        assert_eq!(renewal.current(), 3);
        assert_eq!(renewal.handle_time(Some(token("b")), at).unwrap(), Some(token("b")), "and asked for again");
    }

    #[test]
    fn a_token_without_times_is_looked_at_every_minute() {
        for token in ["a.b.c", "", "a.e30.c"] {
            assert_eq!(until_half(token.as_bytes(), 0), LOOK_AGAIN[1]);
        }
    }
}
