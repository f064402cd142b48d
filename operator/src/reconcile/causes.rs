//! Why replicas are short, from pods and their events: a pure function. Decides which of several
//! causes is told, and which events are still true; never reads or writes.
//!
//! A refusal to create a pod stands only in events, and events stay for an hour: one is true only
//! while pods are missing and none was created since. An event about a pod is true only while that
//! pod is in the state that it tells of. No text that changes from one look to the next, such as
//! how long the kubelet will wait, gets into a message: each would be a write.
//!
//! None of the causes is a stall. Each goes away by itself once what caused it does, without a
//! change of the OverlayNode: by the kstatus convention that is reconciling, or degraded.

use std::cmp::Reverse;

use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Event, Pod};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::status::{Problem, Reason, clip_to};

/// Longest text of others in a message.
const MAX_TEXT: usize = 400;
/// Pods that a message names.
const MAX_NAMES: usize = 3;
/// The kubelet tries to mount again within two minutes, and says so each time.
const MOUNT_EVENT_HOLDS: SignedDuration = SignedDuration::from_mins(5);
/// A container that ended badly within this, and whose pod is not ready, is crashing.
const CRASH_HOLDS: SignedDuration = SignedDuration::from_mins(5);

/// Of pods that are short: what is to be told, if anything is known.
///
/// `pods` are those of the StatefulSet by name, `events` those of it and of its pods, in any order.
#[must_use]
pub(super) fn cause(pods: &[Pod], events: &[Event], wanted: i32, now: Timestamp) -> Option<Problem> {
    let mut newest_first: Vec<&Event> = events.iter().collect();
    newest_first.sort_by_key(|event| Reverse(time(event)));
    let seen = Seen { pods, events: &newest_first, wanted, now };
    seen.image()
        .or_else(|| seen.crash())
        .or_else(|| seen.refused())
        .or_else(|| seen.not_created())
        .or_else(|| seen.volume())
        .or_else(|| seen.unschedulable())
        .or_else(|| seen.not_ready())
}

/// Whether the events of `pod` may have something to add.
#[must_use]
pub(super) fn is_waiting(pod: &Pod) -> bool {
    !is_ready(pod) && pod.metadata.deletion_timestamp.is_none()
}

/// When it last happened.
fn time(event: &Event) -> Timestamp {
    let series = event.series.as_ref().and_then(|s| s.last_observed_time.as_ref()).map(|t| t.0);
    let last = event.last_timestamp.as_ref().map(|t| t.0);
    let at = event.event_time.as_ref().map(|t| t.0);
    let made = event.metadata.creation_timestamp.as_ref().map(|t| t.0);
    series.max(last).max(at).or(made).unwrap_or(Timestamp::MIN)
}

/// What one look showed.
struct Seen<'a> {
    pods: &'a [Pod],
    /// Newest first.
    events: &'a [&'a Event],
    wanted: i32,
    now: Timestamp,
}

impl<'a> Seen<'a> {
    /// Pods that are not ready, and not on their way out.
    fn waiting(&self) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().filter(|pod| is_waiting(pod))
    }

    /// Events of `reason` about `pod`, newest first.
    fn of(&self, pod: &Pod, reason: &str) -> impl Iterator<Item = &'a Event> {
        let uid = pod.metadata.uid.clone();
        let reason = reason.to_owned();
        self.events.iter().copied().filter(move |event| {
            uid.is_some() && event.involved_object.uid == uid && event.reason.as_deref() == Some(&reason)
        })
    }

    /// The first pod of which `tell` has something to say, and how many there are.
    fn first(&self, reason: Reason, tell: impl Fn(&Pod) -> Option<String>) -> Option<Problem> {
        let mut told = self.waiting().filter_map(|pod| Some((name(pod), tell(pod)?)));
        let (pod, text) = told.next()?;
        let message = match told.count() {
            0 => format!("pod {pod}: {text}"),
            more => format!("pod {pod} and {more} more: {text}"),
        };
        Some(Problem { reason, message })
    }

    fn image(&self) -> Option<Problem> {
        self.first(Reason::ImagePullFailed, |pod| {
            let (status, reason, said) = waiting_because(pod, |reason| {
                matches!(reason, "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull")
            })?;
            // The event says why in every phase; what the pod says alternates with "Back-off".
            let pulled = |event: &Event| event.message.as_deref().and_then(after_failed_to_pull);
            let text = self.of(pod, "Failed").find_map(pulled).or(said).unwrap_or_else(|| reason.to_owned());
            Some(format!("image {} cannot be pulled: {}", clip(&status.image), clip(&text)))
        })
    }

    fn crash(&self) -> Option<Problem> {
        self.first(Reason::CrashLooping, |pod| {
            let backing_off = waiting_because(pod, |reason| reason == "CrashLoopBackOff").map(|(status, ..)| status);
            let crashed = || statuses(pod).find(|status| self.crashed_lately(status));
            let status = backing_off.or_else(crashed)?;
            let Some(ended) = ended(status) else {
                return Some(format!("container {} keeps ending", status.name));
            };
            let why = ended.reason.as_deref().filter(|why| !why.is_empty() && *why != "Error");
            let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
            let said = ended.message.as_deref().map(str::trim).filter(|said| !said.is_empty());
            let said = said.map(|said| format!(": {}", clip(said))).unwrap_or_default();
            Some(format!("container {} ended with exit code {}{why}{said}", status.name, ended.exit_code))
        })
    }

    fn crashed_lately(&self, status: &ContainerStatus) -> bool {
        let lately = |ended: &ContainerStateTerminated| {
            let at = ended.finished_at.as_ref().map(|t| t.0);
            ended.exit_code != 0 && at.is_some_and(|at| self.now.duration_since(at) < CRASH_HOLDS)
        };
        !status.ready && ended(status).is_some_and(lately)
    }

    /// The StatefulSet's pods are refused.
    fn refused(&self) -> Option<Problem> {
        let staying = self.pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).count();
        if i32::try_from(staying).is_ok_and(|staying| staying >= self.wanted) {
            return None;
        }
        let event = self.events.iter().find(|event| is_create(event, "FailedCreate"))?;
        // Both are whole seconds; a pod made in the second of the refusal says nothing of it.
        if time(event).as_second() < self.last_created().map_or(i64::MIN, Timestamp::as_second) {
            return None;
        }
        let text = event.message.as_deref().unwrap_or_default();
        let text = text.split_once(" failed error: ").map_or(text, |(_, why)| why);
        let reason = if text.contains("exceeded quota") || text.contains("failed quota") {
            Reason::QuotaExceeded
        } else if text.contains(" is forbidden: ") || text.contains("admission webhook") || text.contains("denied") {
            Reason::AdmissionDenied
        } else {
            Reason::PodsNotCreated
        };
        let missing = self.wanted.saturating_sub(i32::try_from(staying).unwrap_or(i32::MAX));
        Some(Problem { reason, message: format!("{missing} pods cannot be created: {}", clip(text)) })
    }

    /// When a pod of the StatefulSet was last made.
    fn last_created(&self) -> Option<Timestamp> {
        let pods = self.pods.iter().filter_map(|pod| pod.metadata.creation_timestamp.as_ref().map(|t| t.0));
        let events = self.events.iter().filter(|event| is_create(event, "SuccessfulCreate")).map(|event| time(event));
        pods.chain(events).max()
    }

    fn not_created(&self) -> Option<Problem> {
        self.first(Reason::ContainerNotCreated, |pod| {
            let (status, reason, said) = waiting_because(pod, |reason| {
                matches!(reason, "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError")
            })?;
            let said = said.unwrap_or_else(|| reason.to_owned());
            Some(format!("container {} cannot be created: {}", status.name, clip(&said)))
        })
    }

    fn volume(&self) -> Option<Problem> {
        self.first(Reason::VolumeNotMounted, |pod| {
            if statuses(pod).any(|status| started(status).is_some() || ended(status).is_some()) {
                return None;
            }
            let mut events = self.of(pod, "FailedMount").chain(self.of(pod, "FailedAttachVolume"));
            let event = events.find(|event| self.now.duration_since(time(event)) < MOUNT_EVENT_HOLDS)?;
            Some(clip(event.message.as_deref().unwrap_or("a volume cannot be mounted")))
        })
    }

    fn unschedulable(&self) -> Option<Problem> {
        self.first(Reason::Unschedulable, |pod| {
            let conditions = pod.status.as_ref()?.conditions.as_deref()?;
            let scheduled = conditions.iter().find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
            let said = scheduled.message.as_deref().filter(|said| !said.is_empty());
            Some(clip(said.unwrap_or("no node takes it")))
        })
    }

    /// They run, and say that they are not ready.
    fn not_ready(&self) -> Option<Problem> {
        let running: Vec<&Pod> = self.waiting().filter(|pod| statuses(pod).any(|s| started(s).is_some())).collect();
        if running.is_empty() {
            return None;
        }
        let mut message = match running.len() {
            1 => "not ready: ".to_owned(),
            many => format!("{many} pods are not ready: "),
        };
        message.push_str(&running.iter().take(MAX_NAMES).map(|pod| name(pod)).collect::<Vec<_>>().join(", "));
        if running.len() > MAX_NAMES {
            message.push_str(", …");
        }
        let unhealthy = running.iter().find_map(|pod| {
            let since = statuses(pod).filter_map(started).max()?;
            let event = self.of(pod, "Unhealthy").find(|event| time(event) >= since)?;
            Some(format!("; {}: {}", name(pod), clip(event.message.as_deref()?)))
        });
        message.push_str(&unhealthy.unwrap_or_default());
        Some(Problem { reason: Reason::NotReady, message })
    }
}

fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Init containers first, as they run.
fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.iter();
    status.flat_map(|s| s.init_container_statuses.iter().flatten().chain(s.container_statuses.iter().flatten()))
}

/// The first container that waits for a reason that `is` one of those, with what is said of it.
fn waiting_because(pod: &Pod, is: impl Fn(&str) -> bool) -> Option<(&ContainerStatus, &str, Option<String>)> {
    statuses(pod).find_map(|status| {
        let waiting = status.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().filter(|reason| is(reason))?;
        let said = waiting.message.as_deref().map(str::trim).filter(|said| !said.is_empty());
        Some((status, reason, said.map(str::to_owned)))
    })
}

/// Since when it runs.
fn started(status: &ContainerStatus) -> Option<Timestamp> {
    status.state.as_ref()?.running.as_ref()?.started_at.as_ref().map(|t| t.0)
}

/// How it ended, now or the last time.
fn ended(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    let now = status.state.as_ref().and_then(|state| state.terminated.as_ref());
    now.or_else(|| status.last_state.as_ref().and_then(|state| state.terminated.as_ref()))
}

/// The StatefulSet controller also creates claims, and tells of them alike.
fn is_create(event: &Event, reason: &str) -> bool {
    event.involved_object.kind.as_deref() == Some("StatefulSet") && event.reason.as_deref() == Some(reason)
}

/// The kubelet's `Failed to pull image "NAME": WHY`.
fn after_failed_to_pull(message: &str) -> Option<String> {
    let rest = message.strip_prefix("Failed to pull image ")?;
    Some(rest.split_once("\": ").map_or(rest, |(_, why)| why).to_owned())
}

/// On one line, and not too long for a column.
pub(super) fn clip(text: &str) -> String {
    clip_to(text.split_whitespace().collect::<Vec<_>>().join(" "), MAX_TEXT)
}

#[cfg(test)]
mod tests;
