//! One daemon's life: when its program is started, started again, and counted as ready.
//!
//! Decides on times that it is told, as durations since the run began. It never starts,
//! signals or asks a process: that is `child`'s and `probe`'s.
//!
//! A kubelet waits 10 s to 5 min between restarts; on a developer's machine the wait is 1 s,
//! doubled at every exit up to 60 s, and 1 s again once the daemon was ready for 60 s on end.

use std::time::Duration;

/// The wait before the first restart.
pub(super) const FIRST_BACK_OFF: Duration = Duration::from_secs(1);
/// The longest wait before a restart.
pub(super) const MAX_BACK_OFF: Duration = Duration::from_secs(60);
/// Ready for so long, and the next wait is [`FIRST_BACK_OFF`] again.
pub(super) const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// A condition of `/readyz` that is not met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) name: String,
    pub(super) reason: String,
}

/// What asking a daemon's admin address gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Probe {
    /// `/readyz` said 200; sessions that are open, where `/metrics` tells.
    Ready { sessions: Option<u64> },
    /// `/readyz` said otherwise; the conditions that it names as missing.
    NotReady { missing: Vec<Missing>, sessions: Option<u64> },
    /// Nobody answered.
    Unreachable,
}

/// Where a daemon stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not running; its program is due at that time.
    Waiting { until: Duration },
    /// Running; ready without a break since then, if it is.
    Running { ready_since: Option<Duration>, missing: Vec<Missing>, sessions: Option<u64> },
    /// Told to end, still running.
    Stopping,
    /// Not running, and not to be started again.
    Stopped,
}

/// The machine. Inputs are `handle_*`, outputs are their results and `poll_start`.
#[derive(Clone, Debug)]
pub(super) struct Life {
    phase: Phase,
    stop: bool,
    restarts: u32,
    back_off: Duration,
    last_exit: Option<String>,
}

impl Life {
    /// A daemon that is due at once.
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Waiting { until: Duration::ZERO },
            stop: false,
            restarts: 0,
            back_off: FIRST_BACK_OFF,
            last_exit: None,
        }
    }

    /// Whether to start the program now; says so once.
    pub(super) fn poll_start(&mut self, now: Duration) -> bool {
        let due = matches!(self.phase, Phase::Waiting { until } if until <= now);
        if due {
            self.phase = Phase::Running { ready_since: None, missing: Vec::new(), sessions: None };
        }
        due
    }

    /// When [`Self::poll_start`] is worth asking again.
    pub(super) fn next_start(&self) -> Option<Duration> {
        match self.phase {
            Phase::Waiting { until } => Some(until),
            _ => None,
        }
    }

    /// Takes in an answer, and says whether readiness changed. An answer from before an exit
    /// is of no use and is dropped.
    pub(super) fn handle_probe(&mut self, now: Duration, probe: Probe) -> bool {
        let Phase::Running { ready_since, missing, sessions } = &mut self.phase else { return false };
        let before = ready_since.is_some();
        match probe {
            Probe::Ready { sessions: open } => {
                *ready_since = ready_since.or(Some(now));
                missing.clear();
                *sessions = open;
            }
            Probe::NotReady { missing: names, sessions: open } => {
                *ready_since = None;
                *missing = names;
                *sessions = open;
            }
            Probe::Unreachable => {
                *ready_since = None;
                *sessions = None;
            }
        }
        before != ready_since.is_some()
    }

    /// The program ended, or could not be started. The wait before it is started again;
    /// `None` once it was told to stop.
    pub(super) fn handle_exit(&mut self, now: Duration, reason: String) -> Option<Duration> {
        self.last_exit = Some(reason);
        if self.stop {
            self.phase = Phase::Stopped;
            return None;
        }
        let healthy = matches!(self.phase, Phase::Running { ready_since: Some(since), .. } if now.saturating_sub(since) >= HEALTHY_AFTER);
        let wait = if healthy { FIRST_BACK_OFF } else { self.back_off };
        self.back_off = (wait * 2).min(MAX_BACK_OFF);
        self.restarts = self.restarts.saturating_add(1);
        self.phase = Phase::Waiting { until: now + wait };
        Some(wait)
    }

    /// From now on nothing is started.
    pub(super) fn handle_stop(&mut self) {
        self.stop = true;
        self.phase = match self.phase {
            Phase::Running { .. } | Phase::Stopping => Phase::Stopping,
            Phase::Waiting { .. } | Phase::Stopped => Phase::Stopped,
        };
    }

    /// Whether the daemon answered as ready, last time it was asked.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Running { ready_since: Some(_), .. })
    }

    /// Where it stands.
    pub(super) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Times that it was started again, or is about to be.
    pub(super) fn restarts(&self) -> u32 {
        self.restarts
    }

    /// In a few words, why it is not ready; `None` if it is.
    pub(super) fn why_not_ready(&self) -> Option<String> {
        match &self.phase {
            Phase::Running { ready_since: Some(_), .. } => None,
            Phase::Running { missing, .. } if !missing.is_empty() => {
                let each = missing
                    .iter()
                    .map(|m| if m.reason.is_empty() { m.name.clone() } else { format!("{} ({})", m.name, m.reason) });
                Some(format!("not ready: {}", each.collect::<Vec<_>>().join(", ")))
            }
            Phase::Running { .. } => Some("started, does not answer on its admin address yet".to_owned()),
            Phase::Waiting { .. } | Phase::Stopping | Phase::Stopped => {
                Some(self.last_exit.clone().unwrap_or_else(|| "not started".to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn missing() -> Vec<Missing> {
        [("peers", "0 of 2"), ("kms", "")]
            .map(|(name, reason)| Missing { name: name.into(), reason: reason.into() })
            .into()
    }

    fn ready() -> Probe {
        Probe::Ready { sessions: Some(2) }
    }

    /// A daemon that dies at once: the wait doubles to its bound, and each is kept.
    #[test]
    fn back_off_doubles_to_its_bound() {
        let mut life = Life::new();
        let mut now = s(0);
        for (nth, want) in [1, 2, 4, 8, 16, 32, 60, 60].into_iter().enumerate() {
            assert!(life.poll_start(now), "start {nth}");
            assert!(!life.poll_start(now), "a start is said once");
            assert_eq!(life.handle_exit(now, "exited with status 1".into()), Some(s(want)), "exit {nth}");
            assert_eq!(life.next_start(), Some(now + s(want)));
            assert!(!life.poll_start(now + s(want) - Duration::from_millis(1)), "too early {nth}");
            now += s(want);
        }
        assert_eq!(life.restarts(), 8);
    }

    /// How long it was ready decides on the wait, not how long it ran.
    #[test]
    fn back_off_starts_over_after_health() {
        for (ready_at, exit_at, want) in [(None, 500, 2), (Some(0), 59, 2), (Some(0), 60, 1), (Some(450), 500, 2)] {
            let mut life = Life::new();
            assert!(life.poll_start(s(0)));
            assert_eq!(life.handle_exit(s(0), "first".into()), Some(s(1)));
            assert!(life.poll_start(s(1)));
            if let Some(at) = ready_at {
                assert!(life.handle_probe(s(1 + at), ready()));
            }
            assert_eq!(
                life.handle_exit(s(1 + exit_at), "second".into()),
                Some(s(want)),
                "ready at {ready_at:?}, exit at {exit_at}"
            );
        }
    }

    #[test]
    fn a_break_in_readiness_starts_the_count_again() {
        let mut life = Life::new();
        assert!(life.poll_start(s(0)));
        assert!(life.handle_probe(s(1), ready()));
        assert!(!life.handle_probe(s(2), ready()), "nothing changed");
        assert!(life.handle_probe(s(50), Probe::NotReady { missing: missing(), sessions: Some(0) }));
        assert_eq!(life.why_not_ready().unwrap(), "not ready: peers (0 of 2), kms");
        assert!(life.handle_probe(s(51), ready()));
        assert_eq!(life.phase(), &Phase::Running { ready_since: Some(s(51)), missing: vec![], sessions: Some(2) });
        assert!(life.handle_probe(s(52), Probe::Unreachable));
        assert!(!life.is_ready());
    }

    /// An answer that comes after the exit does not make a dead daemon ready.
    #[test]
    fn a_late_answer_is_dropped() {
        let mut life = Life::new();
        assert!(life.poll_start(s(0)));
        life.handle_exit(s(1), "killed by SIGKILL".into());
        assert!(!life.handle_probe(s(1), ready()));
        assert!(!life.is_ready());
        assert_eq!(life.why_not_ready().unwrap(), "killed by SIGKILL");
    }

    #[test]
    fn stopping_starts_nothing() {
        let mut running = Life::new();
        assert!(running.poll_start(s(0)));
        running.handle_stop();
        assert_eq!(running.phase(), &Phase::Stopping);
        assert_eq!(running.handle_exit(s(3), "exited with status 0".into()), None);
        assert_eq!(running.phase(), &Phase::Stopped);
        assert_eq!(running.restarts(), 0);

        let mut waiting = Life::new();
        assert!(waiting.poll_start(s(0)));
        waiting.handle_exit(s(0), "exited with status 1".into());
        waiting.handle_stop();
        assert!(!waiting.poll_start(s(1_000)), "in back-off when stopped");
        assert_eq!((waiting.phase(), waiting.next_start()), (&Phase::Stopped, None));
    }
}
