//! One task a configured peer: dials while there is no session with it, and before the one that
//! it dialled ends with a certificate; backs off with jitter while that fails. Where peers are comes from configuration alone (I-1).

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use overlay_core::config::{Peer, Transport};
use overlay_core::identity::SpiffeId;
use overlay_core::status::Reason;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::kms::{KeySet, Keys};
use crate::session::Context;
use crate::transport::{Connection, DialError, Isolation, Via, dial, dial_quic, dial_tor};

/// The first pause; it doubles up to [`LONGEST`], and is up to twice as long by jitter, so
/// that a mesh that starts at once does not dial in step.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest pause before jitter.
const LONGEST: Duration = Duration::from_secs(10);
/// A session that lived so long was a good one: the next pause is short again.
const GOOD: Duration = Duration::from_secs(10);
/// The longest that a session is planned for, whatever its certificates say.
const FAR: Duration = Duration::from_secs(365 * 86_400);

/// Why there is no session with a peer.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("{found} answered there, not {wanted}")]
    Identity { wanted: SpiffeId, found: SpiffeId },
}

/// A peer to hold a session with.
pub struct Dialler {
    /// Its place.
    pub place: usize,
    /// Who and where it is.
    pub peer: Peer,
    /// What keeps its circuits apart, where it is dialled over Tor.
    pub isolation: Isolation,
    /// Whether it has a session, whoever dialled.
    pub up: watch::Receiver<bool>,
    /// Tells it not to dial any more. A session that it holds goes on.
    pub retired: CancellationToken,
    /// With what to dial.
    pub keys: Arc<Keys>,
    /// What a session needs.
    pub context: Context,
}

impl Dialler {
    /// Dials until it is retired. Dropping the task ends the sessions too.
    pub async fn run(mut self) {
        let retired = self.retired.clone();
        let mut holding = JoinSet::new();
        let mut plan = Plan::new(self.context.clock);
        let mut warned = false;
        loop {
            match next(&plan, &mut self.up, &retired, &mut holding).await {
                Next::Leave => break,
                Next::Ended(number) => {
                    plan.handle_end(number, !holding.is_empty());
                    continue;
                }
                Next::Dial => {}
            }
            let Some(connected) = retired.run_until_cancelled(self.connect()).await else { break };
            match connected {
                Ok((connection, own)) => {
                    warned = false;
                    let ends_ms = connection.peer_not_after_ms.min(own.not_after_ms());
                    let number = plan.handle_session(ends_ms, connection.deadline);
                    // Not the keys themselves: they would stay for as long as the session does.
                    let (context, place, bundle) = (self.context.clone(), self.place, own.bundle());
                    holding.spawn(async move {
                        context.hold(connection, Some(place), bundle).await;
                        number
                    });
                    continue;
                }
                // Once for each time it goes away: a peer may be down for days.
                Err(error) if !warned => {
                    warned = true;
                    tracing::warn!(peer = %self.peer.name, %error, "no session with this peer yet; dialling goes on");
                }
                Err(error) => tracing::debug!(peer = %self.peer.name, %error, "dialling failed"),
            }
            plan.handle_failure();
        }
        while holding.join_next().await.is_some() {}
    }

    async fn dial(&self, keys: &KeySet) -> Result<Connection, DialError> {
        let (address, clock) = (&self.peer.address, self.context.clock);
        let timing = self.context.timing.of(self.peer.transport);
        match self.peer.transport {
            Transport::Tcp => dial(address, keys.client(), &timing.now(), clock).await,
            Transport::Quic => dial_quic(address, keys, &timing.now(), clock, &self.context.endpoints).await,
            Transport::Tor => {
                let via = Via { proxy: &timing.socks(), isolation: &self.isolation };
                let dialled = dial_tor(address, via, keys.client(), &timing.now(), clock).await;
                self.context.proxy.handle_dial(&dialled, clock.now());
                dialled
            }
        }
    }

    /// A connection, and the keys that it was made with.
    async fn connect(&self) -> Result<(Connection, Arc<KeySet>), PeerError> {
        let keys = self.keys.current();
        let connection = self.dial(&keys).await?;
        self.context.metrics.key_exchange(connection.group);
        if !self.peer.identity.covers(&connection.peer) {
            self.context.metrics.rejected(Reason::Auth).inc();
            return Err(PeerError::Identity { wanted: self.peer.identity.clone(), found: connection.peer });
        }
        Ok((connection, keys))
    }
}

/// What a dialler does next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Dial,
    /// See to the end of the session of this number, if it was one's own.
    Ended(Option<u64>),
    /// Dial no more. What is held goes on.
    Leave,
}

async fn next(
    plan: &Plan,
    up: &mut watch::Receiver<bool>,
    retired: &CancellationToken,
    holding: &mut JoinSet<u64>,
) -> Next {
    tokio::select! {
        biased;
        () = retired.cancelled() => Next::Leave,
        Some(ended) = holding.join_next() => Next::Ended(ended.ok()),
        // Where it is an error nobody looks after this peer any more, which is as good as being told.
        due = plan.due(up) => if due.is_ok() { Next::Dial } else { Next::Leave },
    }
}

/// When to dial next. A session ends with either side's certificate, so its successor is
/// dialled before: the hub closes the old one when the new one is up.
struct Plan {
    clock: Clock,
    pauses: ExponentialBackoff,
    /// Not before this time.
    not_before: Instant,
    /// Although there is a session, from this time on.
    successor: Option<Instant>,
    /// The newest session, and when it began.
    newest: Option<(u64, Instant)>,
}

impl Plan {
    fn new(clock: Clock) -> Self {
        Self { clock, pauses: pauses(), not_before: clock.stamp(), successor: None, newest: None }
    }

    /// Waits until there is a reason to dial.
    async fn due(&self, up: &mut watch::Receiver<bool>) -> Result<(), watch::error::RecvError> {
        sleep_until(self.not_before).await;
        let succeed = async {
            match self.successor {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            down = up.wait_for(|up| !up) => down.map(|_| ()),
            () = succeed => Ok(()),
        }
    }

    /// There is a session, which ends at `ends_ms` since 1970 and says HELLO until `deadline`.
    /// Gives its number.
    fn handle_session(&mut self, ends_ms: u64, deadline: Instant) -> u64 {
        let now = self.clock.stamp();
        let left = Duration::from_millis(ends_ms.saturating_sub(self.clock.unix_ms())).min(FAR);
        let number = self.newest.map_or(1, |(number, _)| number + 1);
        self.newest = Some((number, now));
        self.successor = Some(now + left * 4 / 5);
        // By then the hub has told of it, or it has ended.
        self.not_before = deadline;
        number
    }

    /// A session has ended; `others` says whether another is still held.
    fn handle_end(&mut self, number: Option<u64>, others: bool) {
        let Some((_, began)) = self.newest.filter(|(newest, _)| number.is_none_or(|number| number == *newest)) else {
            return;
        };
        if began.elapsed() >= GOOD {
            self.pauses = pauses();
        }
        self.handle_failure();
        // A successor that came to nothing: the session that it was to replace ends soon.
        self.successor = others.then_some(self.not_before);
    }

    fn handle_failure(&mut self) {
        self.not_before = self.clock.deadline(self.pauses.next().unwrap_or(LONGEST));
    }
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(SHORTEST)
        .with_max_delay(LONGEST)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn waits(plan: &Plan, up: &mut watch::Receiver<bool>) -> Option<Duration> {
        let began = Instant::now();
        let due = tokio::time::timeout(Duration::from_secs(10 * 86_400), plan.due(up)).await;
        due.ok().map(|due| {
            due.unwrap();
            began.elapsed()
        })
    }

    /// A peer that is taken out of the configuration is told of twice, by its token and by the end
    /// of who tells whether it is up: whichever is seen first, its session is waited for.
    #[tokio::test(start_paused = true)]
    async fn who_is_retired_holds_on_to_its_session() {
        let clock = Clock::start();
        let mut plan = Plan::new(clock);
        plan.handle_session(clock.unix_ms() + 3_600_000, clock.deadline(Duration::from_secs(3)));
        tokio::time::advance(Duration::from_secs(4)).await;
        for (cancelled, dropped) in [(true, false), (false, true), (true, true)] {
            let (told, mut up) = watch::channel(true);
            let (retired, mut holding) = (CancellationToken::new(), JoinSet::new());
            holding.spawn(std::future::pending());
            if cancelled {
                retired.cancel();
            }
            let _kept = (!dropped).then_some(told);
            assert_eq!(next(&plan, &mut up, &retired, &mut holding).await, Next::Leave);
            assert_eq!(holding.len(), 1);
        }
    }

    /// The next session is dialled before the one that is held ends with its certificate, and
    /// once more if it comes to nothing; never while another holds and nothing ends.
    #[tokio::test(start_paused = true)]
    async fn a_successor_is_dialled_before_a_session_ends() {
        let clock = Clock::start();
        let (told, mut up) = watch::channel(false);
        let mut plan = Plan::new(clock);
        assert_eq!(waits(&plan, &mut up).await, Some(Duration::ZERO), "at once");
        let hour = 3_600_000;
        let first = plan.handle_session(clock.unix_ms() + hour, clock.deadline(Duration::from_secs(3)));
        told.send_replace(true);
        let waited = waits(&plan, &mut up).await.unwrap();
        assert!((2_879..=2_880).contains(&waited.as_secs()), "four fifths of it: {waited:?}");
        let second = plan.handle_session(clock.unix_ms() + hour, clock.deadline(Duration::from_secs(3)));
        plan.handle_end(Some(second), true);
        let waited = waits(&plan, &mut up).await.unwrap();
        assert!(waited <= SHORTEST * 2, "the first one still ends: {waited:?}");
        let third = plan.handle_session(clock.unix_ms() + 24 * hour, clock.deadline(Duration::from_secs(3)));
        plan.handle_end(Some(first), true);
        let waited = waits(&plan, &mut up).await.unwrap();
        assert!(waited > Duration::from_secs(19 * 3_600), "the one that was replaced is no reason: {waited:?}");
        plan.handle_end(Some(third), false);
        assert_eq!(waits(&plan, &mut up).await, None, "the other side's session took over");
        told.send_replace(false);
        assert!(waits(&plan, &mut up).await.is_some());
    }
}
