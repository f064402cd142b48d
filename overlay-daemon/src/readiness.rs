//! Gathers the facts that readiness rests on, five times a second, and tells whoever asks.
//! Runs beside the hub, not in it, so that a hub that hangs shows.

use std::sync::Arc;
use std::time::Duration;

use overlay_core::config::Readiness;
use overlay_core::readiness::{Facts, Gate, Report};
use rustix::process::{Resource, getrlimit};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::clock::Clock;
use crate::hub::{Heartbeat, Input};
use crate::kms::Keys;
use crate::metrics::Metrics;

/// Between two judgements.
const EVERY: Duration = Duration::from_millis(200);

/// What readiness is judged by.
pub struct Watch {
    /// The thresholds, as they are now.
    pub config: watch::Receiver<Readiness>,
    /// What the hub says.
    pub heartbeat: watch::Receiver<Heartbeat>,
    /// Whether SIGTERM came.
    pub draining: watch::Receiver<bool>,
    /// Certificates and trust.
    pub keys: Arc<Keys>,
    /// The one clock.
    pub clock: Clock,
    /// Where `/readyz` looks.
    pub report: watch::Sender<Report>,
    /// Is told whether to shed.
    pub hub: mpsc::Sender<Input>,
    /// Shows it too.
    pub metrics: Arc<Metrics>,
}

impl Watch {
    /// Judges until its owner drops the task.
    pub async fn run(self) {
        let mut gate = Gate::new(self.config.borrow().clone());
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut told = None;
        loop {
            ticks.tick().await;
            gate.handle_config(&self.config.borrow());
            let now = self.clock.now();
            let report = gate.handle_facts(&self.facts(), now);
            self.metrics.ready(report.ready);
            if *self.report.borrow() != report {
                log_change(&self.report.borrow(), &report);
            }
            self.report.send_replace(report.clone());
            let judged = (report, gate.is_shedding());
            // A hub that is too busy to be told is told at the next tick.
            if told.as_ref() != Some(&judged) && self.hub.try_send(Input::Readiness(judged.0.clone(), judged.1)).is_ok()
            {
                told = Some(judged);
            }
        }
    }

    fn facts(&self) -> Facts {
        let beat = *self.heartbeat.borrow();
        let expired = self.keys.current().not_after_ms() <= self.clock.unix_ms();
        Facts {
            listeners: true, // they are bound before this runs, and live as long as it does
            bus_age_ms: self.clock.now().since(beat.at),
            kms: expired.then_some("this daemon's certificate has expired"),
            queues_percent: beat.pressure,
            descriptors_percent: descriptors_percent(),
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

/// Open descriptors of those allowed, 0 to 100; 0 where the system does not say.
fn descriptors_percent() -> u8 {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return 0 };
    let Some(limit) = getrlimit(Resource::Nofile).current else { return 0 };
    overlay_core::admission::percent(open.count() as u64, limit)
}
