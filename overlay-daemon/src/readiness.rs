//! Gathers the facts that readiness rests on, five times a second, and tells whoever asks.
//! Runs beside the hub, not in it, so that a hub that hangs shows.

use std::sync::Arc;
use std::time::Duration;

use overlay_core::config::Readiness;
use overlay_core::readiness::{Facts, Gate, Report};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::accept::Health;
use crate::clock::Clock;
use crate::hub::{Heartbeat, Judged};
use crate::kms::Keys;
use crate::metrics::Metrics;
use crate::transport::{Descriptors, Proxy};

/// Between two judgements.
const EVERY: Duration = Duration::from_millis(200);

/// Why `config` holds all the same: what ran before still runs, and a daemon that went unready
/// for a typo would take the whole mesh with it.
const NOT_TAKEN_UP: &str = "what the files say now is not in use as a whole; the log says why";

/// What readiness is judged by.
pub struct Watch {
    /// The thresholds, as they are now.
    pub config: watch::Receiver<Readiness>,
    /// What the hub says.
    pub heartbeat: watch::Receiver<Heartbeat>,
    /// Whether SIGTERM came.
    pub draining: watch::Receiver<bool>,
    /// How accepting goes.
    pub health: Health,
    /// What connections may take of descriptors.
    pub descriptors: Descriptors,
    /// Whether the configuration's files are in use as they are now.
    pub taken_up: watch::Receiver<bool>,
    /// How Tor's proxy was last found.
    pub proxy: Proxy,
    /// Certificates and trust.
    pub keys: Arc<Keys>,
    /// The one clock.
    pub clock: Clock,
    /// Where `/readyz` looks.
    pub report: watch::Sender<Report>,
    /// Where the hub looks: whether to shed too.
    pub judged: watch::Sender<Judged>,
    /// Shows it too.
    pub metrics: Arc<Metrics>,
}

impl Watch {
    /// Judges until its owner drops the task.
    pub async fn run(mut self) {
        let mut gate = Gate::new(self.config.borrow().clone());
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                // At once: whoever sends SIGTERM looks at `/readyz` next.
                Ok(()) = self.draining.changed() => {}
            }
            gate.handle_config(&self.config.borrow());
            let report = gate.handle_facts(&self.facts(), self.clock.time());
            self.metrics.ready(report.ready);
            if *self.report.borrow() != report {
                log_change(&self.report.borrow(), &report);
            }
            self.report.send_replace(report.clone());
            let judged = (report, gate.is_shedding());
            self.judged.send_if_modified(|told| {
                *told != judged && {
                    *told = judged;
                    true
                }
            });
        }
    }

    fn facts(&self) -> Facts {
        let beat = *self.heartbeat.borrow();
        let expired = self.keys.current().not_after_ms() <= self.clock.unix_ms();
        Facts {
            // Bound before this runs; a loop that ends, ends the process.
            listeners: self.health.is_good(self.clock.now()),
            bus_age_ms: self.clock.now().since(beat.at),
            kms: expired.then_some("this daemon's certificate has expired"),
            proxy: self.proxy.problem(self.clock.now()),
            config: (!*self.taken_up.borrow()).then_some(NOT_TAKEN_UP),
            queues_percent: beat.pressure,
            memory_percent: beat.memory,
            descriptors_percent: self.descriptors.percent(),
            peers: beat.peers,
            draining: *self.draining.borrow(),
        }
    }
}

fn log_change(was: &Report, is: &Report) {
    if was.ready == is.ready {
        return;
    }
    let missing: Vec<_> = is.conditions.iter().filter(|c| !c.ok).map(|c| format!("{}: {}", c.name, c.reason)).collect();
    if is.ready {
        tracing::info!("ready");
    } else {
        tracing::warn!(missing = missing.join("; "), "not ready");
    }
}
