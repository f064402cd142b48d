//! Whether the daemon is ready, as named conditions with reasons, and whether it sheds
//! writes. Writes go first, `/readyz` follows, and both come back with hysteresis (I-6, G-3).

use crate::Millis;
use crate::config::Readiness;
use crate::node::Clock;

/// One condition of readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Its name: one of a closed set, such as `listeners` or `peers`.
    pub name: &'static str,
    /// Whether it holds.
    pub ok: bool,
    /// Why it does not, or what it rests on; for a person.
    pub reason: String,
    /// Since when it holds, or does not: milliseconds since 1970.
    pub since_ms: u64,
}

/// What `/readyz` answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Whether every condition holds.
    pub ready: bool,
    /// All of them.
    pub conditions: Vec<Condition>,
}

/// What the conditions rest on, as the shell last saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Every listener is bound, and none has failed to accept for want of a descriptor or of
    /// memory within the last second.
    pub listeners: bool,
    /// Milliseconds since the hub last answered.
    pub bus_age_ms: u64,
    /// Certificates, trust and token keys are loaded and valid; else why not.
    pub kms: Option<&'static str>,
    /// The configuration's files, as they are now, are in use. Where they are not, what was
    /// in use before still is: that is no reason not to be ready, and is said all the same.
    pub config: Option<&'static str>,
    /// Why peers cannot be dialled over Tor. Those of other transports can: that alone is no
    /// reason not to be ready, and is said all the same.
    pub proxy: Option<String>,
    /// How full queues and in-flight are, 0 to 100: see [`crate::node::Node::pressure`].
    pub queues_percent: u8,
    /// How much of the memory budget is used, 0 to 100: see [`crate::memory`]. Part of the
    /// condition `queues`, since queues and what waits for them are what uses it.
    pub memory_percent: u8,
    /// File descriptors in use, of those allowed, 0 to 100.
    pub descriptors_percent: u8,
    /// Distinct daemons with an active session.
    pub peers: u32,
    /// SIGTERM came.
    pub draining: bool,
}

/// How long the hub may be silent.
const BUS_MS: u64 = 1_000;

/// The conditions over time.
#[derive(Debug)]
pub struct Gate {
    config: Readiness,
    shedding: bool,
    overloaded: bool,
    /// When enough peers were last seen.
    enough_peers: Option<Millis>,
    /// What was said last.
    said: Vec<Condition>,
}

impl Gate {
    /// A gate that has seen nothing yet.
    #[must_use]
    pub fn new(config: Readiness) -> Self {
        Self { config, shedding: false, overloaded: false, enough_peers: None, said: Vec::new() }
    }

    /// Other thresholds from now on; what was said stays said until they say otherwise.
    pub fn handle_config(&mut self, config: &Readiness) {
        if self.config != *config {
            self.config = config.clone();
        }
    }

    /// Judges the facts at `clock`.
    pub fn handle_facts(&mut self, facts: &Facts, clock: Clock) -> Report {
        let now = clock.now;
        let waiting = facts.queues_percent.max(facts.memory_percent);
        let pressure = waiting.max(facts.descriptors_percent);
        self.shedding =
            pressure >= self.config.shed_at_percent || (self.shedding && pressure >= self.config.recover_at_percent);
        self.overloaded = pressure >= self.config.unready_at_percent
            || (self.overloaded && pressure >= self.config.recover_at_percent);
        if facts.peers >= self.config.min_peers {
            self.enough_peers = Some(now);
        }
        let grace = self.config.peer_loss_grace_ms;
        let peers = facts.peers >= self.config.min_peers || self.enough_peers.is_some_and(|at| now.since(at) < grace);
        let within = |percent: u8| !self.overloaded || percent < self.config.recover_at_percent;
        let bus = facts.bus_age_ms < BUS_MS;
        let mut conditions = vec![
            condition("listeners", facts.listeners, "accepting connections fails"),
            condition("bus", bus, "the hub has not answered for a second"),
            counted("config", true, facts.config.unwrap_or_default().to_owned()),
            transport(facts),
            condition("kms", facts.kms.is_none(), facts.kms.unwrap_or_default()),
            counted(
                "queues",
                within(waiting),
                format!("{}% full, {}% of memory used", facts.queues_percent, facts.memory_percent),
            ),
            counted("peers", peers, format!("{} of at least {} peers", facts.peers, self.config.min_peers)),
            counted("descriptors", within(facts.descriptors_percent), format!("{}% in use", facts.descriptors_percent)),
            condition("draining", !facts.draining, "the daemon was told to stop"),
        ];
        for (condition, before) in conditions.iter_mut().zip(self.said.iter().map(Some).chain(std::iter::repeat(None)))
        {
            let same = before.filter(|before| before.ok == condition.ok);
            condition.since_ms = same.map_or(clock.unix_ms, |before| before.since_ms);
        }
        self.said.clone_from(&conditions);
        Report { ready: conditions.iter().all(|condition| condition.ok), conditions }
    }

    /// Whether writes get 503 now.
    #[must_use]
    pub fn is_shedding(&self) -> bool {
        self.shedding
    }
}

fn condition(name: &'static str, ok: bool, otherwise: &str) -> Condition {
    Condition { name, ok, reason: if ok { String::new() } else { otherwise.to_owned() }, since_ms: 0 }
}

fn transport(facts: &Facts) -> Condition {
    let ok = facts.listeners && facts.kms.is_none();
    let reason = if ok { facts.proxy.as_deref().unwrap_or_default() } else { "no session can be accepted or dialled" };
    counted("transport", ok, reason.to_owned())
}

fn counted(name: &'static str, ok: bool, reason: String) -> Condition {
    Condition { name, ok, reason, since_ms: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calm() -> Facts {
        Facts { listeners: true, ..Facts::default() }
    }

    fn at(ms: u64) -> Clock {
        Clock { now: Millis(ms), unix_ms: 1_000_000 + ms }
    }

    fn missing(report: &Report) -> Vec<&'static str> {
        report.conditions.iter().filter(|c| !c.ok).map(|c| c.name).collect()
    }

    /// I-6: each condition alone takes readiness away, and is named.
    #[test]
    fn each_condition_is_named() {
        let config = Readiness { min_peers: 1, ..Readiness::default() };
        let with_peer = Facts { peers: 1, ..calm() };
        for (facts, want) in [
            (with_peer.clone(), vec![]),
            (Facts { listeners: false, ..with_peer.clone() }, vec!["listeners", "transport"]),
            (Facts { bus_age_ms: 1_000, ..with_peer.clone() }, vec!["bus"]),
            (Facts { kms: Some("expired"), ..with_peer.clone() }, vec!["transport", "kms"]),
            (Facts { queues_percent: 90, ..with_peer.clone() }, vec!["queues"]),
            (Facts { memory_percent: 90, ..with_peer.clone() }, vec!["queues"]),
            (Facts { config: Some("refused"), ..with_peer.clone() }, vec![]),
            (Facts { descriptors_percent: 95, ..with_peer.clone() }, vec!["descriptors"]),
            (Facts { proxy: Some("down".into()), ..with_peer.clone() }, vec![]),
            (Facts { draining: true, ..with_peer.clone() }, vec!["draining"]),
            (calm(), vec!["peers"]),
        ] {
            let report = Gate::new(config.clone()).handle_facts(&facts, at(5));
            assert_eq!((missing(&report), report.ready), (want.clone(), want.is_empty()));
        }
    }

    /// A proxy that is down is named, and is no reason not to be ready.
    #[test]
    fn a_proxy_that_is_down_is_named() {
        let reason = |facts: Facts| {
            let report = Gate::new(Readiness::default()).handle_facts(&facts, at(0));
            report.conditions.into_iter().find(|c| c.name == "transport").map(|c| (c.ok, c.reason)).unwrap()
        };
        let down = Facts { proxy: Some("cannot use the SOCKS proxy".into()), ..calm() };
        assert_eq!(reason(down.clone()), (true, "cannot use the SOCKS proxy".into()));
        assert_eq!(reason(calm()), (true, String::new()));
        let worse = Facts { listeners: false, ..down };
        assert_eq!(reason(worse), (false, "no session can be accepted or dialled".into()));
    }

    /// G-3: writes shed first, `/readyz` flips next, and both return below `recover`.
    #[test]
    fn pressure_sheds_first_and_recovers_last() {
        let mut gate = Gate::new(Readiness::default());
        let seen: Vec<_> = [79, 80, 89, 90, 80, 60, 59, 80]
            .map(|queues_percent| {
                let report = gate.handle_facts(&Facts { queues_percent, ..calm() }, at(0));
                (gate.is_shedding(), report.ready)
            })
            .into();
        let want = [
            (false, true),
            (true, true),
            (true, true),
            (true, false),
            (true, false),
            (true, false),
            (false, true),
            (true, true),
        ];
        assert_eq!(seen, want);
    }

    /// I-6: each source of pressure alone sheds and recovers as queues do, with hysteresis.
    #[test]
    fn s3_descriptors_and_memory_recover_with_hysteresis() {
        type Fill = fn(u8) -> Facts;
        let descriptors: Fill = |percent| Facts { descriptors_percent: percent, ..calm() };
        let memory: Fill = |percent| Facts { memory_percent: percent, ..calm() };
        for fill in [descriptors, memory] {
            let mut gate = Gate::new(Readiness::default());
            let seen = [85, 95, 61, 59].map(|percent| {
                let report = gate.handle_facts(&fill(percent), at(0));
                (gate.is_shedding(), report.ready)
            });
            assert_eq!(seen, [(true, true), (true, false), (true, false), (false, true)]);
        }
    }

    /// Each condition says since when it is as it is; that another changes, or its reason does,
    /// is nothing to it.
    #[test]
    fn conditions_say_since_when() {
        let mut gate = Gate::new(Readiness::default());
        let mut since = |queues_percent, draining, ms| {
            let facts = Facts { queues_percent, draining, ..calm() };
            let report = gate.handle_facts(&facts, at(ms));
            ["queues", "draining"]
                .map(|name| report.conditions.iter().find(|c| c.name == name).map_or(0, |c| c.since_ms - 1_000_000))
        };
        assert_eq!(since(10, false, 5), [5, 5]);
        assert_eq!(since(95, false, 7), [7, 5]);
        assert_eq!(since(93, true, 9), [7, 9]);
        assert_eq!(since(50, true, 11), [11, 9]);
    }

    #[test]
    fn lost_peers_are_forgiven_for_a_while_but_not_at_the_start() {
        let mut gate = Gate::new(Readiness { min_peers: 1, ..Readiness::default() });
        let mut at = |peers, now| gate.handle_facts(&Facts { peers, ..calm() }, at(now)).ready;
        assert_eq!(
            [at(0, 0), at(1, 10), at(0, 20), at(0, 10_009), at(0, 10_010), at(1, 10_011)],
            [false, true, true, true, false, true]
        );
    }
}
