//! OverlayNodes with fewer daemons ready than wanted: since when, and when their pods and events
//! are looked at. Decides the pace; reads nothing itself.
//!
//! The StatefulSet tells that pods are short, not why: a refusal stands in an event, a failed pull
//! in a pod, and neither changes the StatefulSet. So they are polled, and only while short.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::time::Instant;

use super::backoff::doubled;
use super::status::{Pods, Problem};
use crate::api::{OverlayNode, OverlayNodeStatus};

/// Pods come up within this, mostly, and then nothing needs to be explained.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between the first looks: a cause shows within this, and 3 s at the start.
const PACE: Duration = Duration::from_secs(5);
/// So many looks at [`PACE`]; after that what is the matter is known, or slow to come.
const STEADY_LOOKS: u32 = 24;
/// Between looks at most.
const SLOWEST: Duration = Duration::from_secs(30);
/// However many changes there are, looks are no closer than this.
const CLOSEST: Duration = Duration::from_secs(1);

/// Shortages by OverlayNode. Bounded by the OverlayNodes that there are: those that are gone leave
/// when another shortage begins.
#[derive(Default)]
pub(super) struct Shortages(Mutex<HashMap<ObjectRef<OverlayNode>, Shortage>>);

struct Shortage {
    since: Instant,
    pods: Pods,
    looked: Option<Instant>,
    /// Since the pods last got on.
    looks: u32,
    /// They got on since the last look.
    changed: bool,
    cause: Option<Problem>,
}

/// What to do about a shortage now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Look at the pods and events.
    Look,
    /// This is known; look in so long.
    Wait(Option<Problem>, Duration),
}

impl Shortages {
    /// `node` is short, with `pods` as they are.
    pub(super) fn poll(&self, node: &OverlayNode, pods: Pods, existing: &Store<OverlayNode>, now: Instant) -> Next {
        let mut shortages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = ObjectRef::from_obj(node);
        if !shortages.contains_key(&key) {
            shortages.retain(|node, _| existing.get(node).is_some());
        }
        let shortage = shortages.entry(key).or_insert_with(|| {
            let already = not_ready_for(node.status.as_ref(), Timestamp::now()).min(PATIENCE);
            let since = now.checked_sub(already).unwrap_or(now);
            Shortage { since, pods, looked: None, looks: 0, changed: false, cause: None }
        });
        if shortage.pods != pods {
            (shortage.pods, shortage.looks, shortage.changed) = (pods, 0, true);
        }
        let due = match shortage.looked {
            None => shortage.since + PATIENCE,
            Some(looked) if shortage.changed => looked + CLOSEST,
            Some(looked) => looked + pace(shortage.looks),
        };
        let wait = due.saturating_duration_since(now);
        if wait.is_zero() { Next::Look } else { Next::Wait(shortage.cause.clone(), wait) }
    }

    /// What a look at `node` showed; says when to look again.
    pub(super) fn looked(&self, node: &OverlayNode, cause: Option<Problem>, now: Instant) -> Duration {
        let mut shortages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(shortage) = shortages.get_mut(&ObjectRef::from_obj(node)) else { return PACE };
        shortage.looks = if shortage.cause == cause { shortage.looks.saturating_add(1) } else { 1 };
        (shortage.looked, shortage.changed) = (Some(now), false);
        shortage.cause = cause;
        pace(shortage.looks)
    }

    /// What was last known of `node`.
    #[must_use]
    pub(super) fn known(&self, node: &OverlayNode) -> Option<Problem> {
        let shortages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shortages.get(&ObjectRef::from_obj(node))?.cause.clone()
    }

    /// `node` has all that it wants.
    pub(super) fn over(&self, node: &OverlayNode) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&ObjectRef::from_obj(node));
    }
}

fn pace(looks: u32) -> Duration {
    doubled(PACE, looks.saturating_sub(STEADY_LOOKS), SLOWEST)
}

/// An operator that has just begun to lead need not wait for what its predecessor has seen.
fn not_ready_for(status: Option<&OverlayNodeStatus>, now: Timestamp) -> Duration {
    let ready = status.and_then(|status| status.conditions.iter().find(|c| c.type_ == "Ready" && c.status == "False"));
    let since = ready.map(|c| now.duration_since(c.last_transition_time.0));
    since.and_then(|since| Duration::try_from(since).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::status::Reason;
    use super::*;

    fn stored() -> (Store<OverlayNode>, OverlayNode) {
        let (store, mut writer) = kube::runtime::reflector::store();
        let mut node = OverlayNode::new("mesh", crate::api::OverlayNodeSpec::default());
        node.metadata.namespace = Some("a".into());
        writer.apply_watcher_event(&kube::runtime::watcher::Event::Apply(node.clone()));
        (store, node)
    }

    #[test]
    fn looks_after_three_seconds_and_then_at_a_pace() {
        let (store, node) = stored();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let seconds = Duration::from_secs;
        let shortages = Shortages::default();
        let pods = Pods { existing: 1, ready: 1, updated: 1, settled: true };
        let poll = |pods, now| shortages.poll(&node, pods, &store, now);
        assert_eq!(poll(pods, at(0)), Next::Wait(None, seconds(3)));
        assert_eq!(poll(pods, at(2)), Next::Wait(None, seconds(1)));
        assert_eq!(poll(pods, at(3)), Next::Look);
        let quota = Some(Problem { reason: Reason::QuotaExceeded, message: "why".into() });
        assert_eq!(shortages.looked(&node, quota.clone(), at(3)), seconds(5));
        assert_eq!(poll(pods, at(4)), Next::Wait(quota.clone(), seconds(4)));
        assert_eq!(poll(pods, at(8)), Next::Look);
        let more = Pods { existing: 2, ..pods };
        shortages.looked(&node, quota.clone(), at(8));
        assert_eq!(poll(more, at(8)), Next::Wait(quota.clone(), seconds(1)), "the pods get on");
        assert_eq!(poll(more, at(9)), Next::Look);
        let paces: Vec<u64> = (0..30).map(|_| shortages.looked(&node, quota.clone(), at(9)).as_secs()).collect();
        assert_eq!((paces[0], paces[20], paces[29]), (5, 5, 30));
        shortages.over(&node);
        assert_eq!((shortages.known(&node), poll(more, at(9))), (None, Next::Wait(None, seconds(3))));
    }
}
