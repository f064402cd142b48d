//! Whether a lease is ours to make, to take or to renew: client-go's algorithm as a function of
//! the Lease that stands and the time. Never reads or writes.
//!
//! Another's lease has run out when it has not changed for its whole duration by our own
//! monotonic clock, counted from when we first saw it: the clocks of machines are not compared.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::ObjectMeta;
use tokio::time::Instant;

/// For so long after its last renewal nobody else takes it.
pub(super) const DURATION: Duration = Duration::from_secs(15);

/// What to do about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is none.
    Create,
    /// It is nobody's, or its holder is gone.
    Take,
    /// It is ours.
    Renew,
    /// It is another's.
    Wait,
}

/// Another's lease, and since when it stands as it does.
#[derive(Default)]
pub(super) struct Observed(Option<(LeaseSpec, Instant)>);

impl Observed {
    /// What `identity` does about `live`.
    pub(super) fn step(&mut self, live: Option<&Lease>, identity: &str, now: Instant) -> Step {
        let Some(live) = live else { return Step::Create };
        let spec = live.spec.clone().unwrap_or_default();
        match spec.holder_identity.as_deref() {
            Some(holder) if holder == identity => return Step::Renew,
            None | Some("") => return Step::Take,
            Some(_) => {}
        }
        let since = match &self.0 {
            Some((seen, since)) if *seen == spec => *since,
            _ => now,
        };
        let theirs = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).map(Duration::from_secs);
        self.0 = Some((spec, since));
        // An older or newer operator may hold for longer than we would.
        let lasts = theirs.unwrap_or(DURATION).max(DURATION);
        if now.saturating_duration_since(since) >= lasts { Step::Take } else { Step::Wait }
    }
}

/// The Lease as `identity` holds it from `now`. What `live` has besides is kept, its version
/// above all: if it changed meanwhile, the API server refuses the write.
#[must_use]
pub(super) fn held(live: Option<&Lease>, name: &str, identity: &str, now: Timestamp) -> Lease {
    let mut lease = live.cloned().unwrap_or_else(|| Lease {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..Default::default() },
        spec: None,
    });
    let mut spec = lease.spec.take().unwrap_or_default();
    if spec.holder_identity.as_deref() != Some(identity) {
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |n| n.saturating_add(1)));
        spec.holder_identity = Some(identity.to_owned());
    }
    spec.renew_time = Some(MicroTime(now));
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    lease.spec = Some(spec);
    lease
}

/// The Lease given back.
#[must_use]
pub(super) fn released(live: &Lease, now: Timestamp) -> Lease {
    let mut lease = live.clone();
    let spec = lease.spec.get_or_insert_default();
    spec.holder_identity = None;
    spec.renew_time = Some(MicroTime(now));
    spec.lease_duration_seconds = Some(1);
    lease
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    #[test]
    fn a_life_of_a_lease() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut two = Observed::default();
        assert_eq!(two.step(None, "two", at(0)), Step::Create);

        let one = held(None, "l", "one", t(0));
        assert_eq!(Observed::default().step(Some(&one), "one", at(0)), Step::Renew);
        assert_eq!(two.step(Some(&one), "two", at(100)), Step::Wait, "seen for the first time, however old");
        assert_eq!(two.step(Some(&one), "two", at(114)), Step::Wait);
        let renewed = held(Some(&one), "l", "one", t(2));
        assert_eq!(two.step(Some(&renewed), "two", at(114)), Step::Wait);
        assert_eq!(two.step(Some(&renewed), "two", at(128)), Step::Wait);
        assert_eq!(two.step(Some(&renewed), "two", at(129)), Step::Take);

        let taken = held(Some(&renewed), "l", "two", t(17)).spec.unwrap();
        assert_eq!((taken.lease_transitions, taken.holder_identity.as_deref()), (Some(1), Some("two")));
        assert_eq!((taken.acquire_time, taken.renew_time), (Some(MicroTime(t(17))), Some(MicroTime(t(17)))));
        assert_eq!(renewed.spec.as_ref().unwrap().acquire_time, Some(MicroTime(t(0))), "a renewal is no transition");

        let free = released(&renewed, t(3));
        assert_eq!(two.step(Some(&free), "two", at(130)), Step::Take, "at once");
        let mut empty = free.clone();
        empty.spec.as_mut().unwrap().holder_identity = Some(String::new());
        assert_eq!(two.step(Some(&empty), "two", at(130)), Step::Take, "as older writers leave it");
    }

    /// The version goes along, so that of two who take it one is refused.
    #[test]
    fn a_write_is_of_the_version_that_was_seen() {
        let mut live = held(None, "l", "one", t(0));
        live.metadata.resource_version = Some("7".into());
        live.metadata.annotations = Some([("a".to_owned(), "b".to_owned())].into());
        assert_eq!(held(Some(&live), "l", "two", t(20)).metadata, live.metadata);
        assert_eq!(released(&live, t(20)).metadata, live.metadata);
    }

    /// A holder that says it holds for longer is waited for.
    #[test]
    fn a_longer_duration_is_honoured() {
        let now = Instant::now();
        let mut lease = held(None, "l", "one", t(0));
        lease.spec.as_mut().unwrap().lease_duration_seconds = Some(60);
        let mut two = Observed::default();
        assert_eq!(two.step(Some(&lease), "two", now), Step::Wait);
        assert_eq!(two.step(Some(&lease), "two", now + Duration::from_secs(59)), Step::Wait);
        assert_eq!(two.step(Some(&lease), "two", now + Duration::from_secs(60)), Step::Take);
    }
}
