//! How long to wait after a reconciliation that did not get through: longer each time, for
//! each OverlayNode on its own. Counts; never waits.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kube::runtime::reflector::{ObjectRef, Store};

use crate::api::OverlayNode;

/// After the first failure.
const FIRST: Duration = Duration::from_secs(1);
/// Failures in a row, by OverlayNode. Bounded by the OverlayNodes that there are: those that
/// are gone leave with the next failure of any other.
pub(super) struct Backoff {
    failures: Mutex<HashMap<ObjectRef<OverlayNode>, u32>>,
    longest: Duration,
}

impl Backoff {
    /// One that waits no longer than `longest`.
    pub(super) fn new(longest: Duration) -> Self {
        Self { failures: Mutex::default(), longest }
    }

    /// Counts a failure and says how long to wait.
    pub(super) fn failed(&self, node: &OverlayNode, existing: &Store<OverlayNode>) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.retain(|node, _| existing.get(node).is_some());
        let count = failures.entry(ObjectRef::from_obj(node)).or_insert(0);
        let wait = doubled(FIRST, *count, self.longest);
        *count = count.saturating_add(1);
        wait
    }

    /// Starts over.
    pub(super) fn succeeded(&self, node: &OverlayNode) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(&ObjectRef::from_obj(node));
    }
}

/// `first`, doubled so many times, and never more than `longest`.
pub(super) fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    first.saturating_mul(2_u32.saturating_pow(times)).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_a_minute() {
        let seconds: Vec<u64> =
            [0, 1, 2, 5, 6, 31, 32, u32::MAX].map(|n| doubled(FIRST, n, Duration::from_secs(60)).as_secs()).into();
        assert_eq!(seconds, [1, 2, 4, 32, 60, 60, 60, 60]);
    }

    #[test]
    fn counts_for_each_and_forgets_the_gone() {
        let (store, mut writer) = kube::runtime::reflector::store();
        let node = |name: &str| {
            let mut node = OverlayNode::new(name, crate::api::OverlayNodeSpec::default());
            node.metadata.namespace = Some("a".into());
            node
        };
        let (one, two) = (node("one"), node("two"));
        for node in [&one, &two] {
            writer.apply_watcher_event(&kube::runtime::watcher::Event::Apply(node.clone()));
        }
        let backoff = Backoff::new(Duration::from_secs(60));
        assert_eq!([1, 2, 4].map(Duration::from_secs), [(); 3].map(|()| backoff.failed(&one, &store)));
        assert_eq!(backoff.failed(&two, &store), Duration::from_secs(1));
        backoff.succeeded(&one);
        assert_eq!(backoff.failed(&one, &store), Duration::from_secs(1));
        writer.apply_watcher_event(&kube::runtime::watcher::Event::Delete(two.clone()));
        assert_eq!(backoff.failed(&one, &store), Duration::from_secs(2));
        assert_eq!(backoff.failures.lock().unwrap().len(), 1);
    }
}
