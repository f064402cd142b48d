//! What is counted: the golden set (C-5, I-10) and what goes with it, in one registry. Every
//! label is from a closed enum, save `peer`, which configuration bounds. Handles are made here
//! once; hot paths only add.

use overlay_core::gossip::Counts;
use overlay_core::status::Reason;
use prometheus::{
    Encoder, Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::confine::Measure;
use crate::kms::KeyExchangeGroup;

/// The value of `peer` for every session that is not a configured peer's.
pub const OTHER: &str = "other";
/// The media type of [`Metrics::render`].
pub const TEXT_FORMAT: &str = prometheus::TEXT_FORMAT;

/// Which way a gossip frame went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To a peer.
    Tx,
    /// From a peer.
    Rx,
}

/// What a request was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A session's first exchange.
    Hello,
    /// Ping to pong.
    Ping,
    /// Publish to its answer.
    Publish,
    /// Subscribe to its answer.
    Subscribe,
    /// Renewal of a client's stream to its answer.
    Renew,
    /// A peer's gossip stream, opened.
    Gossip,
    /// The daemon's state, over the Unix socket.
    Status,
    /// `/metrics`.
    AdminMetrics,
    /// `/healthz`.
    AdminHealthz,
    /// `/readyz`.
    AdminReadyz,
    /// `/version`.
    AdminVersion,
}

impl Route {
    /// Every route, in the order of declaration.
    pub const ALL: [Self; 11] = [
        Self::Hello,
        Self::Ping,
        Self::Publish,
        Self::Subscribe,
        Self::Renew,
        Self::Gossip,
        Self::Status,
        Self::AdminMetrics,
        Self::AdminHealthz,
        Self::AdminReadyz,
        Self::AdminVersion,
    ];

    /// The label's value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Ping => "ping",
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
            Self::Renew => "renew",
            Self::Gossip => "gossip",
            Self::Status => "status",
            Self::AdminMetrics => "admin_metrics",
            Self::AdminHealthz => "admin_healthz",
            Self::AdminReadyz => "admin_readyz",
            Self::AdminVersion => "admin_version",
        }
    }
}

/// The metrics of one daemon.
pub struct Metrics {
    registry: Registry,
    inflight: IntGaugeVec,
    config_info: IntGaugeVec,
    config_reloads: [IntCounter; 2],
    rejected: [IntCounter; Reason::ALL.len()],
    gossip: [IntCounter; 2],
    latency: [Histogram; Route::ALL.len()],
    session_open: IntCounter,
    session_close: IntCounter,
    key_exchange: [IntCounter; KeyExchangeGroup::ALL.len()],
    sessions: [IntGauge; KeyExchangeGroup::ALL.len()],
    sessions_local: IntGauge,
    accept_errors: IntCounter,
    session_panics: IntCounter,
    memory: IntGauge,
    key_reloads: [IntCounter; 2],
    certificate_expiry: IntGauge,
    ready: IntGauge,
    confined: [IntGauge; Measure::ALL.len()],
    log_suppressed: IntCounter,
    gossip_duplicates: IntCounter,
    gossip_grafts: IntCounter,
    gossip_lost: IntCounter,
}

impl Metrics {
    /// Registers everything, every series at 0 but those of peers, which begin with
    /// [`Self::inflight`].
    ///
    /// # Errors
    /// A label's value is one that the exposition format has no place for.
    pub fn new(amnesia: bool, config_hash: &str) -> Result<Self, Error> {
        let amnesia = if amnesia { "on" } else { "off" };
        let registry = Registry::new_custom(None, Some([("amnesia".to_owned(), amnesia.to_owned())].into()))?;
        let r = &registry;
        let config_info = info(r, "overlay_config_info", "The configuration that is running.", "hash", config_hash)?;
        info(r, "overlay_build_info", "The program that is running.", "version", env!("CARGO_PKG_VERSION"))?;

        let inflight = IntGaugeVec::new(
            Opts::new(
                "overlay_inflight",
                "Requests not yet answered, by peer; sessions of no configured peer are other.",
            ),
            &["peer"],
        )?;
        r.register(Box::new(inflight.clone()))?;

        let rejected = counters(r, "overlay_rejected_total", "What was refused, by reason.", "reason")?;
        let gossip = counters(r, "overlay_gossip_frames_total", "Gossip frames, by direction.", "dir")?;
        let key_exchange =
            counters(r, "overlay_key_exchange_total", "TLS handshakes completed, by key exchange group.", "group")?;
        let sessions = IntGaugeVec::new(
            Opts::new(
                "overlay_sessions_active",
                "Sessions that are open, by key exchange group; none on the Unix socket.",
            ),
            &["group"],
        )?;
        r.register(Box::new(sessions.clone()))?;
        let config_reloads = counters(
            r,
            "overlay_config_reloads_total",
            "New configurations found, by result: failed where some of it was not taken up.",
            "result",
        )?;
        let confined = IntGaugeVec::new(
            Opts::new("overlay_confined", "Whether a measure that keeps memory and files to the daemon holds."),
            &["measure"],
        )?;
        r.register(Box::new(confined.clone()))?;
        let key_reloads = counters(r, "overlay_key_reloads_total", "Attempts to reload keys, by result.", "result")?;

        Ok(Self {
            inflight,
            config_info,
            config_reloads: ["ok", "failed"].map(|result| config_reloads.with_label_values(&[result])),
            rejected: Reason::ALL.map(|reason| rejected.with_label_values(&[reason.label()])),
            gossip: ["tx", "rx"].map(|dir| gossip.with_label_values(&[dir])),
            latency: latency(r)?,
            session_open: counter(r, "session_open_total", "Sessions that became active.")?,
            session_close: counter(r, "session_close_total", "Sessions that ended after being active.")?,
            key_exchange: KeyExchangeGroup::ALL.map(|group| key_exchange.with_label_values(&[group.label()])),
            sessions: KeyExchangeGroup::ALL.map(|group| sessions.with_label_values(&[group.label()])),
            sessions_local: sessions.with_label_values(&["none"]),
            accept_errors: counter(r, "overlay_accept_errors_total", "Times that accepting a connection failed.")?,
            session_panics: counter(
                r,
                "overlay_session_panics_total",
                "Sessions that a fault of the daemon's own ended.",
            )?,
            memory: gauge(r, "overlay_memory_bytes", "Bytes used of the budget for sessions, queues and messages.")?,
            key_reloads: ["ok", "failed"].map(|result| key_reloads.with_label_values(&[result])),
            certificate_expiry: gauge(
                r,
                "overlay_certificate_expiry_timestamp_seconds",
                "When this daemon's certificate ceases to be valid, seconds since 1970.",
            )?,
            ready: gauge(r, "overlay_ready", "Whether /readyz answers 200.")?,
            log_suppressed: counter(
                r,
                "overlay_log_suppressed_total",
                "Log lines left out, since one place in the program said too many in a second.",
            )?,
            gossip_duplicates: counter(r, "overlay_gossip_duplicates_total", "Messages from peers seen before.")?,
            gossip_grafts: counter(r, "overlay_gossip_grafts_total", "Messages asked of peers that announced them.")?,
            gossip_lost: counter(
                r,
                "overlay_gossip_lost_total",
                "Messages that peers announced and none could give in the end.",
            )?,
            confined: Measure::ALL.map(|measure| confined.with_label_values(&[measure.label()])),
            registry,
        })
    }

    /// Requests not yet answered by a configured peer, or, with `None`, by all other sessions
    /// together; resolved once a peer. Configuration bounds how many there are.
    #[must_use]
    pub fn inflight(&self, peer: Option<&str>) -> IntGauge {
        self.inflight.with_label_values(&[peer.unwrap_or(OTHER)])
    }

    /// A peer is no longer configured: its series goes.
    pub fn forget_peer(&self, peer: &str) {
        // It may be there twice, or not at all, where a list of peers is wrong.
        let _ = self.inflight.remove_label_values(&[peer]);
    }

    /// Another configuration is running.
    pub fn config(&self, old: &str, new: &str) {
        if old != new {
            self.config_info.with_label_values(&[new]).set(1);
            let _ = self.config_info.remove_label_values(&[old]);
        }
    }

    /// A configuration was found, and taken or refused.
    pub fn config_reload(&self, ok: bool) {
        self.config_reloads[usize::from(!ok)].inc();
    }

    /// What was refused for `reason`.
    #[must_use]
    pub fn rejected(&self, reason: Reason) -> &IntCounter {
        &self.rejected[reason as usize]
    }

    /// Gossip frames that went `direction`.
    #[must_use]
    pub fn gossip_frames(&self, direction: Direction) -> &IntCounter {
        &self.gossip[direction as usize]
    }

    /// Seconds from request to answer on `route`.
    #[must_use]
    pub fn latency(&self, route: Route) -> &Histogram {
        &self.latency[route as usize]
    }

    /// A session became active; `None` is the Unix socket. The guard's end is the session's.
    pub fn session(&self, group: Option<KeyExchangeGroup>) -> ActiveSession {
        let active = group.map_or(&self.sessions_local, |group| &self.sessions[group as usize]).clone();
        self.session_open.inc();
        active.inc();
        ActiveSession { active, close: self.session_close.clone() }
    }

    /// A TLS handshake completed with `group`.
    pub fn key_exchange(&self, group: KeyExchangeGroup) {
        self.key_exchange[group as usize].inc();
    }

    /// Accepting a connection failed: descriptors ran out, or the caller had gone.
    pub fn accept_error(&self) {
        self.accept_errors.inc();
    }

    /// A session's task panicked.
    pub fn session_panic(&self) {
        self.session_panics.inc();
    }

    /// Bytes used of the memory budget.
    pub fn memory(&self, bytes: u64) {
        self.memory.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// New keys were found, and taken or refused.
    pub fn key_reload(&self, ok: bool) {
        self.key_reloads[usize::from(!ok)].inc();
    }

    /// When this daemon's certificate ends, milliseconds since 1970.
    pub fn certificate_expiry(&self, not_after_ms: u64) {
        self.certificate_expiry.set(i64::try_from(not_after_ms / 1_000).unwrap_or(i64::MAX));
    }

    /// What `/readyz` answers.
    pub fn ready(&self, ready: bool) {
        self.ready.set(i64::from(ready));
    }

    /// Log lines left out.
    #[must_use]
    pub fn log_suppressed(&self) -> &IntCounter {
        &self.log_suppressed
    }

    /// What gossip did between two counts.
    pub fn gossip(&self, was: Counts, is: Counts) {
        self.gossip_frames(Direction::Tx).inc_by(is.tx.saturating_sub(was.tx));
        self.gossip_frames(Direction::Rx).inc_by(is.rx.saturating_sub(was.rx));
        self.gossip_duplicates.inc_by(is.duplicates.saturating_sub(was.duplicates));
        self.gossip_grafts.inc_by(is.grafts.saturating_sub(was.grafts));
        self.gossip_lost.inc_by(is.lost.saturating_sub(was.lost));
    }

    /// Whether a measure of the process's confinement holds.
    pub fn confined(&self, measure: Measure, holds: bool) {
        self.confined[measure as usize].set(i64::from(holds));
    }

    /// Everything, in Prometheus's text format.
    ///
    /// # Errors
    /// None in practice: every family has a help text and at least one series.
    pub fn render(&self) -> Result<Vec<u8>, Error> {
        let mut text = Vec::with_capacity(16 * 1_024);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// A session that is counted as open until this is dropped.
#[must_use]
pub struct ActiveSession {
    active: IntGauge,
    close: IntCounter,
}

impl Drop for ActiveSession {
    fn drop(&mut self) {
        self.active.dec();
        self.close.inc();
    }
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, Error> {
    let metric = IntCounter::new(name, help)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counters(registry: &Registry, name: &str, help: &str, label: &str) -> Result<IntCounterVec, Error> {
    let metric = IntCounterVec::new(Opts::new(name, help), &[label])?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, Error> {
    let metric = IntGauge::new(name, help)?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// A gauge that is always 1 and says something in its label.
fn info(registry: &Registry, name: &str, help: &str, label: &str, value: &str) -> Result<IntGaugeVec, Error> {
    let metric = IntGaugeVec::new(Opts::new(name, help), &[label])?;
    metric.with_label_values(&[value]).set(1);
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// Latencies from 64 µs, doubling to 16.8 s: an answer from memory is at the low end, one
/// through a deadline at the high.
fn latency(registry: &Registry) -> Result<[Histogram; Route::ALL.len()], Error> {
    let buckets = prometheus::exponential_buckets(64e-6, 2.0, 19)?;
    let help = "Seconds from a request to its answer, by route.";
    let metric = HistogramVec::new(HistogramOpts::new("request_latency_seconds", help).buckets(buckets), &["route"])?;
    registry.register(Box::new(metric.clone()))?;
    Ok(Route::ALL.map(|route| metric.with_label_values(&[route.label()])))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C-5, I-8, G-8: the golden set is there before anything happens, labelled, and a peer
    /// that is not configured never makes a series.
    #[test]
    fn the_golden_set() {
        let metrics = Metrics::new(true, "0123456789abcdef").unwrap();
        metrics.inflight(Some("mesh-1")).set(3);
        metrics.inflight(Some("mesh-2")).set(0);
        metrics.inflight(Some("mesh-3")).inc();
        metrics.forget_peer("mesh-3");
        metrics.inflight(None).set(2);
        metrics.rejected(Reason::Quota).inc();
        metrics.rejected(Reason::Stale).inc_by(2);
        metrics.gossip_frames(Direction::Rx).inc_by(5);
        metrics.latency(Route::AdminVersion).observe(0.001);
        metrics.key_exchange(KeyExchangeGroup::Hybrid);
        let held = metrics.session(Some(KeyExchangeGroup::Hybrid));
        drop(metrics.session(None));
        let text = String::from_utf8(metrics.render().unwrap()).unwrap();
        for line in [
            "overlay_inflight{peer=\"mesh-1\",amnesia=\"on\"} 3",
            "overlay_inflight{peer=\"mesh-2\",amnesia=\"on\"} 0",
            "overlay_inflight{peer=\"other\",amnesia=\"on\"} 2",
            "overlay_rejected_total{reason=\"quota\",amnesia=\"on\"} 1",
            "overlay_rejected_total{reason=\"timeout\",amnesia=\"on\"} 0",
            "overlay_rejected_total{reason=\"overflow\",amnesia=\"on\"} 0",
            "overlay_rejected_total{reason=\"degraded\",amnesia=\"on\"} 0",
            "overlay_rejected_total{reason=\"stale\",amnesia=\"on\"} 2",
            "overlay_gossip_frames_total{dir=\"rx\",amnesia=\"on\"} 5",
            "overlay_gossip_frames_total{dir=\"tx\",amnesia=\"on\"} 0",
            "request_latency_seconds_bucket{route=\"admin_version\",amnesia=\"on\",le=\"0.001024\"} 1",
            "request_latency_seconds_bucket{route=\"hello\",amnesia=\"on\",le=\"16.777216\"} 0",
            "session_open_total{amnesia=\"on\"} 2",
            "session_close_total{amnesia=\"on\"} 1",
            "overlay_key_exchange_total{group=\"hybrid\",amnesia=\"on\"} 1",
            "overlay_sessions_active{group=\"hybrid\",amnesia=\"on\"} 1",
            "overlay_sessions_active{group=\"none\",amnesia=\"on\"} 0",
            "overlay_config_info{hash=\"0123456789abcdef\",amnesia=\"on\"} 1",
            "overlay_ready{amnesia=\"on\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("mesh-3"));
        let series: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(series.iter().all(|line| line.contains("amnesia=\"on\"")), "{text}");
        drop(held);
    }

    /// A3, C-5: however many peers, requests and refusals there were, the series are those of the
    /// configured peers.
    #[test]
    fn a3_series_do_not_grow() {
        let metrics = Metrics::new(true, "0123456789abcdef").unwrap();
        let series = || {
            let text = String::from_utf8(metrics.render().unwrap()).unwrap();
            text.lines().filter(|line| !line.starts_with('#')).count()
        };
        metrics.inflight(Some("mesh-1")).set(0);
        metrics.inflight(None).set(0);
        let quiet = series();
        for n in 0..100_000_usize {
            metrics.inflight(None).inc();
            metrics.rejected(Reason::ALL[n % Reason::ALL.len()]).inc();
            metrics.latency(Route::ALL[n % Route::ALL.len()]).observe(n as f64);
            drop(metrics.session(Some(KeyExchangeGroup::ALL[n % KeyExchangeGroup::ALL.len()])));
            metrics.config(&format!("{n:016x}"), &format!("{:016x}", n + 1));
        }
        metrics.config(&format!("{:016x}", 100_000), "0123456789abcdef");
        assert_eq!(series(), quiet);
    }

    /// C-5: every route has the same buckets, which double from 64 µs to 16.8 s.
    #[test]
    fn latencies_have_fixed_buckets() {
        let text = String::from_utf8(Metrics::new(true, "").unwrap().render().unwrap()).unwrap();
        for route in Route::ALL {
            let of_route = format!("request_latency_seconds_bucket{{route=\"{}\",", route.label());
            let bounds: Vec<&str> = text
                .lines()
                .filter(|line| line.starts_with(&of_route))
                .filter_map(|line| line.split("le=\"").nth(1)?.split('"').next())
                .collect();
            let (last, finite) = bounds.split_last().unwrap();
            let finite: Vec<f64> = finite.iter().map(|bound| bound.parse().unwrap()).collect();
            assert_eq!((*last, finite.len(), finite[0]), ("+Inf", 19, 64e-6));
            assert!(finite.windows(2).all(|pair| pair[1] == 2.0 * pair[0]) && finite[18] > 16.7, "{finite:?}");
        }
    }

    /// The arrays are indexed by their enum.
    #[test]
    fn every_enum_stands_in_its_order() {
        assert!(Reason::ALL.iter().enumerate().all(|(i, reason)| *reason as usize == i));
        assert!(Route::ALL.iter().enumerate().all(|(i, route)| *route as usize == i));
        assert!(KeyExchangeGroup::ALL.iter().enumerate().all(|(i, group)| *group as usize == i));
    }
}
