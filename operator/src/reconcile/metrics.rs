//! What the operator counts. Labels are closed enums; nothing here decides anything.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::plan::Kind;

/// What a mutating request is sent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteKind {
    /// A child, or one of the installation's Secrets.
    Object(Kind),
    /// The status of an OverlayNode.
    Status,
    /// The answer to a pod's request for a certificate.
    CertificateRequestStatus,
}

impl WriteKind {
    /// As the label `kind` has it.
    #[must_use]
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Object(kind) => kind.as_str(),
            Self::Status => "OverlayNodeStatus",
            Self::CertificateRequestStatus => "PodCertificateRequestStatus",
        }
    }
}

/// How a reconciliation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// What is wanted is applied.
    Applied,
    /// A person has to change something.
    Stalled,
    /// It will be tried again.
    Failed,
}

impl Ended {
    const ALL: [Self; 3] = [Self::Applied, Self::Stalled, Self::Failed];

    fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Stalled => "stalled",
            Self::Failed => "failed",
        }
    }
}

/// What became of a pod's request for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was signed.
    Issued,
    /// It was refused for good.
    Denied,
    /// It could not be answered, and is looked at again.
    Failed,
}

impl Answer {
    const ALL: [Self; 3] = [Self::Issued, Self::Denied, Self::Failed];

    fn as_str(self) -> &'static str {
        match self {
            Self::Issued => "issued",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

/// The operator's metrics, registered once. Handles are resolved here, so that every series
/// is there from the start.
pub(super) struct Metrics {
    registry: Registry,
    writes: Vec<(WriteKind, IntCounter)>,
    reconciles: Vec<(Ended, IntCounter)>,
    answers: Vec<(Answer, IntCounter)>,
    /// Seconds that one reconciliation took.
    duration: Histogram,
    /// Leaf certificates issued.
    pub certificates: IntCounter,
    /// Sets of tokens issued.
    pub tokens: IntCounter,
    /// Watches that broke off with an error.
    pub watch_errors: IntCounter,
    /// OverlayNodes in the operator's cache.
    pub nodes: IntGauge,
    /// 1 while this operator leads.
    pub leader: IntGauge,
    /// Mutating requests held back, since the lease may have run out.
    pub writes_refused: IntCounter,
}

impl Metrics {
    /// All at zero.
    ///
    /// # Errors
    /// A name or label is not one that Prometheus takes; not with those that stand here.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let writes = IntCounterVec::new(
            Opts::new("overlay_operator_writes_total", "Mutating requests sent to the API server."),
            &["kind"],
        )?;
        let reconciles = IntCounterVec::new(
            Opts::new("overlay_operator_reconciles_total", "Reconciliations, by how they ended."),
            &["result"],
        )?;
        let answers = IntCounterVec::new(
            Opts::new(
                "overlay_operator_certificate_requests_total",
                "Looks at the certificate requests of pods, by what came of them; failed ones are looked at again.",
            ),
            &["result"],
        )?;
        let duration = Histogram::with_opts(
            HistogramOpts::new("overlay_operator_reconcile_duration_seconds", "Time that a reconciliation took.")
                .buckets(vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]),
        )?;
        let info = IntGaugeVec::new(
            Opts::new("overlay_operator_build_info", "1, labelled with the operator's version."),
            &["version"],
        )?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let counter = |name: &str, help: &str| IntCounter::new(name, help);
        let metrics = Self {
            writes: Kind::ALL
                .into_iter()
                .map(WriteKind::Object)
                .chain([WriteKind::Status, WriteKind::CertificateRequestStatus])
                .map(|kind| (kind, writes.with_label_values(&[kind.as_str()])))
                .collect(),
            reconciles: Ended::ALL.into_iter().map(|e| (e, reconciles.with_label_values(&[e.as_str()]))).collect(),
            answers: Answer::ALL.into_iter().map(|a| (a, answers.with_label_values(&[a.as_str()]))).collect(),
            duration,
            certificates: counter("overlay_operator_certificates_issued_total", "Leaf certificates issued.")?,
            tokens: counter("overlay_operator_tokens_issued_total", "Sets of capability tokens issued.")?,
            watch_errors: counter("overlay_operator_watch_errors_total", "Watches of the API server that broke off.")?,
            nodes: IntGauge::new("overlay_operator_overlaynodes", "OverlayNodes that the operator looks after.")?,
            leader: IntGauge::new("overlay_operator_leader", "1 while this operator leads, 0 while it stands by.")?,
            writes_refused: counter(
                "overlay_operator_writes_refused_total",
                "Mutating requests not sent, since the lease may have run out.",
            )?,
            registry,
        };
        let all: [Box<dyn Collector>; 11] = [
            Box::new(writes),
            Box::new(reconciles),
            Box::new(answers),
            Box::new(metrics.duration.clone()),
            Box::new(info),
            Box::new(metrics.certificates.clone()),
            Box::new(metrics.tokens.clone()),
            Box::new(metrics.watch_errors.clone()),
            Box::new(metrics.nodes.clone()),
            Box::new(metrics.leader.clone()),
            Box::new(metrics.writes_refused.clone()),
        ];
        for collector in all {
            metrics.registry.register(collector)?;
        }
        Ok(metrics)
    }

    /// One mutating request is about to be sent.
    pub(super) fn wrote(&self, kind: WriteKind) {
        if let Some((_, counter)) = self.writes.iter().find(|(k, _)| *k == kind) {
            counter.inc();
        }
    }

    /// One look at a pod's request is over.
    pub(super) fn answered(&self, answer: Answer) {
        if let Some((_, counter)) = self.answers.iter().find(|(a, _)| *a == answer) {
            counter.inc();
        }
    }

    /// One reconciliation is over.
    pub(super) fn reconciled(&self, ended: Ended, took: Duration) {
        self.duration.observe(took.as_secs_f64());
        if let Some((_, counter)) = self.reconciles.iter().find(|(e, _)| *e == ended) {
            counter.inc();
        }
    }

    /// The text format.
    ///
    /// # Errors
    /// As the encoder has them; none with a registry that holds something.
    pub(super) fn encode(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// I-10: every series is there before anything happened.
    #[test]
    fn series_from_the_start() {
        let metrics = Metrics::new().unwrap();
        metrics.wrote(WriteKind::Object(Kind::Secret));
        metrics.wrote(WriteKind::Status);
        metrics.reconciled(Ended::Stalled, Duration::from_millis(3));
        let text = metrics.encode().unwrap();
        for line in [
            "overlay_operator_writes_total{kind=\"Secret\"} 1",
            "overlay_operator_writes_total{kind=\"StatefulSet\"} 0",
            "overlay_operator_writes_total{kind=\"OverlayNodeStatus\"} 1",
            "overlay_operator_reconciles_total{result=\"stalled\"} 1",
            "overlay_operator_reconciles_total{result=\"applied\"} 0",
            "overlay_operator_reconcile_duration_seconds_count 1",
            "overlay_operator_watch_errors_total 0",
            "overlay_operator_certificate_requests_total{result=\"denied\"} 0",
            "overlay_operator_leader 0",
            "overlay_operator_writes_refused_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}
