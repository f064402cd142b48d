//! What an OverlayNode's status says, from what was seen: a pure function. Decides
//! conditions by the kstatus convention (`Reconciling` and `Stalled` are true when something
//! is the matter) and keeps `lastTransitionTime` unless a condition flips. Never writes.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use super::rollout::Rollout;
use crate::api::{Effective, OverlayNodeStatus, TlsSource, TlsStatus};

/// Longest message that is kept of what others say: the API server's errors can be pages.
const MAX_MESSAGE: usize = 1_024;
/// Pods that a message names.
const MAX_NAMED: usize = 5;

/// Why things are as they are: the reasons of conditions, a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// Every daemon is ready.
    AllReady,
    /// None is wanted.
    ScaledToZero,
    /// Pods are being made, or rolled.
    Progressing,
    /// All are ready, and some do not run yet what was written for them.
    ConfigPending,
    /// As that, and the operator cannot ask them.
    DaemonUnreachable,
    /// All were ready, and some no longer are.
    DaemonsNotReady,
    /// A child's name is somebody else's.
    NameConflict,
    /// What a deleted OverlayNode of this name left is not collected yet.
    AwaitingCollection,
    /// The configuration does not fit.
    ConfigTooLarge,
    /// The spec got past the schema and cannot be built.
    InvalidSpec,
    /// The installation lost its CA or token root while OverlayNodes use it.
    CaMissing,
    /// The installation's CA or token root cannot be read.
    CaInvalid,
    /// The cluster lacks what the spec asks for.
    UnsupportedCluster,
    /// The API server refused an object for good.
    Rejected,
    /// The API server could not be asked, or refused for now.
    ApplyFailed,
    /// An image cannot be pulled.
    ImagePullFailed,
    /// A container ends as often as it is started.
    CrashLooping,
    /// A ResourceQuota refuses pods.
    QuotaExceeded,
    /// Pod Security, a policy or a webhook refuses pods.
    AdmissionDenied,
    /// Pods are refused for another cause.
    PodsNotCreated,
    /// The container runtime refuses a container.
    ContainerNotCreated,
    /// A volume cannot be mounted.
    VolumeNotMounted,
    /// No node takes a pod.
    Unschedulable,
    /// Pods run, and say that they are not ready.
    NotReady,
    /// Certificate and tokens are current.
    Issued,
    /// Nothing left to do.
    UpToDate,
    /// Nothing waits for a person.
    NotStalled,
}

impl Reason {
    /// As a condition has it.
    #[must_use]
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::AllReady => "AllReady",
            Self::ScaledToZero => "ScaledToZero",
            Self::Progressing => "Progressing",
            Self::ConfigPending => "ConfigPending",
            Self::DaemonUnreachable => "DaemonUnreachable",
            Self::DaemonsNotReady => "DaemonsNotReady",
            Self::NameConflict => "NameConflict",
            Self::AwaitingCollection => "AwaitingCollection",
            Self::ConfigTooLarge => "ConfigTooLarge",
            Self::InvalidSpec => "InvalidSpec",
            Self::CaMissing => "CAMissing",
            Self::CaInvalid => "CAInvalid",
            Self::UnsupportedCluster => "UnsupportedCluster",
            Self::Rejected => "Rejected",
            Self::ApplyFailed => "ApplyFailed",
            Self::ImagePullFailed => "ImagePullFailed",
            Self::CrashLooping => "CrashLooping",
            Self::QuotaExceeded => "QuotaExceeded",
            Self::AdmissionDenied => "AdmissionDenied",
            Self::PodsNotCreated => "PodsNotCreated",
            Self::ContainerNotCreated => "ContainerNotCreated",
            Self::VolumeNotMounted => "VolumeNotMounted",
            Self::Unschedulable => "Unschedulable",
            Self::NotReady => "NotReady",
            Self::Issued => "Issued",
            Self::UpToDate => "UpToDate",
            Self::NotStalled => "NotStalled",
        }
    }

    /// Whether a person has to act before anything can change.
    #[must_use]
    pub(super) fn is_stall(self) -> bool {
        matches!(
            self,
            Self::NameConflict
                | Self::ConfigTooLarge
                | Self::InvalidSpec
                | Self::CaMissing
                | Self::CaInvalid
                | Self::UnsupportedCluster
                | Self::Rejected
        )
    }

    fn is_about_trust(self) -> bool {
        matches!(self, Self::CaMissing | Self::CaInvalid)
    }
}

/// What keeps the spec from being applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// Of which sort.
    pub reason: Reason,
    /// In words, with what to do about it.
    pub message: String,
}

/// How far the pods are, as their StatefulSet tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pods {
    /// That exist.
    pub existing: i32,
    /// That are ready.
    pub ready: i32,
    /// Of the newest revision.
    pub updated: i32,
    /// Whether the controller has seen the newest spec and no rollout is under way.
    pub settled: bool,
}

impl Pods {
    /// From a live StatefulSet.
    #[must_use]
    pub(super) fn of(set: &StatefulSet) -> Self {
        let Some(status) = &set.status else { return Self::default() };
        let seen = status.observed_generation >= set.metadata.generation;
        Self {
            existing: status.replicas,
            ready: status.ready_replicas.unwrap_or(0),
            updated: status.updated_replicas.unwrap_or(0),
            settled: seen && status.current_revision == status.update_revision,
        }
    }
}

/// What was built, whether or not it could be applied.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Built {
    /// The label selector of the pods.
    pub selector: String,
    /// The configuration's hash.
    pub config_hash: String,
    /// The hash of it and of every peers file.
    pub running_hash: String,
    /// Values in force.
    pub effective: Effective,
    /// The certificate.
    pub tls: TlsStatus,
}

/// What a status is made from.
pub(super) struct Facts<'a> {
    /// The status that stands.
    pub previous: Option<&'a OverlayNodeStatus>,
    /// The generation of the spec that was reconciled.
    pub generation: Option<i64>,
    /// `spec.replicas`.
    pub wanted: i32,
    /// The pods.
    pub pods: Pods,
    /// None while a problem keeps it from being built.
    pub built: Option<Built>,
    /// What is the matter.
    pub problem: Option<Problem>,
    /// Why daemons are not ready, where pods or events tell.
    pub cause: Option<Problem>,
    /// How far the daemons are with what was written; none where they are known to run it.
    pub rollout: Option<Rollout>,
    /// The time.
    pub now: Timestamp,
}

/// One condition before it is compared with what stands.
struct Verdict {
    holds: bool,
    reason: Reason,
    message: String,
}

impl Verdict {
    fn yes(reason: Reason, message: impl Into<String>) -> Self {
        Self { holds: true, reason, message: message.into() }
    }

    fn no(reason: Reason, message: impl Into<String>) -> Self {
        Self { holds: false, reason, message: message.into() }
    }
}

/// The status that `facts` call for.
#[must_use]
pub(super) fn status(facts: &Facts<'_>) -> OverlayNodeStatus {
    let mut status = facts.previous.cloned().unwrap_or_default();
    let conditions = [
        ("Ready", ready(facts)),
        ("Reconciling", reconciling(facts)),
        ("Stalled", stalled(facts)),
        ("Degraded", degraded(facts)),
        ("TrustReady", trust_ready(facts)),
    ];
    status.conditions =
        conditions.into_iter().filter_map(|(kind, verdict)| Some(condition(facts, kind, verdict?))).collect();
    status.observed_generation = facts.generation;
    status.replicas = facts.pods.existing;
    status.ready_replicas = facts.pods.ready;
    status.updated_replicas = facts.pods.updated;
    if let Some(built) = &facts.built {
        status.selector = Some(built.selector.clone());
        status.effective = Some(built.effective.clone());
        // What is not applied is not what runs: hash and certificate stay what they were.
        if facts.problem.is_none() {
            status.config_hash = Some(built.config_hash.clone());
            // Not what it was: some may have taken up the new one, and going back is a change too.
            status.running_hash = (!is_pending(facts)).then(|| built.running_hash.clone());
            status.tls = Some(built.tls.clone());
        }
    }
    status
}

fn condition(facts: &Facts<'_>, kind: &str, verdict: Verdict) -> Condition {
    let status = if verdict.holds { "True" } else { "False" };
    let kept = find(facts.previous, kind).filter(|c| c.status == status).map(|c| c.last_transition_time.clone());
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        observed_generation: facts.generation,
        last_transition_time: kept.unwrap_or_else(|| Time(whole_seconds(facts.now))),
        reason: verdict.reason.as_str().to_owned(),
        message: clip_to(verdict.message, MAX_MESSAGE),
    }
}

fn find<'a>(status: Option<&'a OverlayNodeStatus>, kind: &str) -> Option<&'a Condition> {
    status?.conditions.iter().find(|c| c.type_ == kind)
}

/// Times in the API have no fractions; one that had would differ from itself once stored.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// `message`, of at most `max` bytes and an ellipsis.
pub(super) fn clip_to(mut message: String, max: usize) -> String {
    if message.len() > max {
        let end = (0..=max).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    message
}

/// Whether some daemon does not run yet what was written for it.
fn is_pending(facts: &Facts<'_>) -> bool {
    facts.rollout.as_ref().is_some_and(|rollout| !rollout.is_complete())
}

/// What to say of daemons that are all ready, and do not all run what they are to.
fn pending(facts: &Facts<'_>) -> Option<(Reason, String)> {
    let rollout = facts.rollout.as_ref().filter(|rollout| !rollout.is_complete())?;
    let running = format!("{} of {} daemons run the new configuration", rollout.current, rollout.wanted);
    let silent = rollout.silent.iter().take(MAX_NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    Some(match rollout.silent.len() {
        0 => (Reason::ConfigPending, running),
        _ => (
            Reason::DaemonUnreachable,
            format!(
                "{running}; the operator gets no answer from port overlay-admin of {silent}: does a NetworkPolicy keep it out?"
            ),
        ),
    })
}

fn complete(facts: &Facts<'_>) -> bool {
    let (pods, wanted) = (facts.pods, facts.wanted);
    pods.settled && pods.ready == wanted && pods.existing == wanted && pods.updated == wanted
}

/// Whether this generation was complete before and no rollout is under way: then what is
/// missing was lost, rather than not there yet.
fn lost(facts: &Facts<'_>) -> bool {
    let holds = |kind| {
        find(facts.previous, kind).is_some_and(|c| c.status == "True" && c.observed_generation == facts.generation)
    };
    facts.pods.settled && facts.pods.ready < facts.wanted && (holds("Ready") || holds("Degraded"))
}

fn count(facts: &Facts<'_>) -> String {
    format!("{} of {} daemons are ready", facts.pods.ready, facts.wanted)
}

fn progress(facts: &Facts<'_>) -> String {
    let (pods, wanted) = (facts.pods, facts.wanted);
    if pods.existing > wanted {
        format!("{}, {} too many are being stopped", count(facts), pods.existing - wanted)
    } else if pods.updated < wanted {
        format!("{}, {} of them updated", count(facts), pods.updated)
    } else {
        count(facts)
    }
}

/// `usual` and `text`, or what pods and events tell in the one's stead and after the other.
fn explained(facts: &Facts<'_>, usual: Reason, text: String) -> (Reason, String) {
    match &facts.cause {
        Some(cause) => (cause.reason, format!("{text}; {}", cause.message)),
        None => (usual, text),
    }
}

fn ready(facts: &Facts<'_>) -> Option<Verdict> {
    Some(if let Some(problem) = &facts.problem {
        Verdict::no(problem.reason, problem.message.clone())
    } else if complete(facts) && facts.wanted == 0 {
        Verdict::yes(Reason::ScaledToZero, "no daemons are wanted")
    } else if let (true, Some((reason, message))) = (complete(facts), pending(facts)) {
        Verdict::no(reason, message)
    } else if complete(facts) {
        Verdict::yes(Reason::AllReady, count(facts))
    } else if lost(facts) {
        let (reason, message) = explained(facts, Reason::DaemonsNotReady, count(facts));
        Verdict::no(reason, message)
    } else {
        let (reason, message) = explained(facts, Reason::Progressing, progress(facts));
        Verdict::no(reason, message)
    })
}

fn reconciling(facts: &Facts<'_>) -> Option<Verdict> {
    Some(match &facts.problem {
        Some(problem) if problem.reason.is_stall() => Verdict::no(problem.reason, ""),
        Some(problem) => Verdict::yes(problem.reason, problem.message.clone()),
        None if complete(facts) && is_pending(facts) => {
            let (reason, message) = pending(facts).unwrap_or((Reason::ConfigPending, String::new()));
            Verdict::yes(reason, message)
        }
        None if complete(facts) || lost(facts) => Verdict::no(Reason::UpToDate, ""),
        None => {
            let (reason, message) = explained(facts, Reason::Progressing, progress(facts));
            Verdict::yes(reason, message)
        }
    })
}

fn stalled(facts: &Facts<'_>) -> Option<Verdict> {
    Some(match &facts.problem {
        Some(problem) if problem.reason.is_stall() => Verdict::yes(problem.reason, problem.message.clone()),
        _ => Verdict::no(Reason::NotStalled, ""),
    })
}

fn degraded(facts: &Facts<'_>) -> Option<Verdict> {
    Some(if lost(facts) {
        let (reason, message) = explained(facts, Reason::DaemonsNotReady, count(facts));
        Verdict::yes(reason, message)
    } else if let Some(problem) = &facts.problem {
        Verdict::no(problem.reason, "")
    } else if complete(facts) {
        Verdict::no(if facts.wanted == 0 { Reason::ScaledToZero } else { Reason::AllReady }, "")
    } else {
        Verdict::no(Reason::Progressing, "")
    })
}

fn trust_ready(facts: &Facts<'_>) -> Option<Verdict> {
    match (&facts.problem, &facts.built) {
        (Some(problem), _) if problem.reason.is_about_trust() => {
            Some(Verdict::no(problem.reason, problem.message.clone()))
        }
        (None, Some(built)) => {
            let secret = built.tls.secret_name.as_deref().unwrap_or_default();
            let message = match built.tls.source {
                TlsSource::PodCertificate => {
                    "each pod is issued a certificate of its own when it asks, and tokens are current".to_owned()
                }
                TlsSource::SelfManaged => format!("certificate in Secret {secret} and tokens are current"),
            };
            Some(Verdict::yes(Reason::Issued, message))
        }
        // Some other problem says nothing about trust: what stood stands.
        _ => find(facts.previous, "TrustReady").map(|c| Verdict {
            holds: c.status == "True",
            reason: match c.reason.as_str() {
                "CAMissing" => Reason::CaMissing,
                "CAInvalid" => Reason::CaInvalid,
                _ => Reason::Issued,
            },
            message: c.message.clone(),
        }),
    }
}

#[cfg(test)]
mod tests;
