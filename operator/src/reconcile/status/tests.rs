use k8s_openapi::api::apps::v1::StatefulSetStatus;
use kube::api::ObjectMeta;

use super::*;
use crate::api::{OverlayNode, OverlayNodeSpec, TlsSource};
use crate::build;

const T0: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(T0 + seconds).unwrap()
}

fn built(hash: &str) -> Built {
    let node = OverlayNode::new("mesh", OverlayNodeSpec::default());
    Built {
        selector: "a=b".into(),
        config_hash: hash.into(),
        running_hash: format!("{hash}-and-peers"),
        effective: build::effective(&node, Some("overlay-daemon:1".into())),
        tls: TlsStatus {
            source: TlsSource::SelfManaged,
            not_after: Some(Time(at(86_400))),
            secret_name: Some("mesh-tls".into()),
        },
    }
}

fn pods(existing: i32, ready: i32, updated: i32, settled: bool) -> Pods {
    Pods { existing, ready, updated, settled }
}

fn facts(previous: Option<&OverlayNodeStatus>, pods: Pods, seconds: i64) -> Facts<'_> {
    Facts {
        previous,
        generation: Some(1),
        wanted: 3,
        pods,
        built: Some(built("h1")),
        problem: None,
        cause: None,
        rollout: None,
        now: at(seconds),
    }
}

fn problem(reason: Reason) -> Problem {
    Problem { reason, message: "why".into() }
}

/// `Ready/Reconciling/Stalled/Degraded/TrustReady` as one letter each, `-` where there is none.
fn letters(status: &OverlayNodeStatus) -> String {
    ["Ready", "Reconciling", "Stalled", "Degraded", "TrustReady"]
        .map(|kind| find(Some(status), kind).map_or('-', |c| c.status.chars().next().unwrap()))
        .iter()
        .collect()
}

fn reason(status: &OverlayNodeStatus, kind: &str) -> String {
    find(Some(status), kind).unwrap().reason.clone()
}

/// The life of a mesh, each row on what the one before left.
#[test]
fn conditions_over_a_life() {
    let stall = |reason| Some(problem(reason));
    let rows = [
        ("nothing there yet", pods(0, 0, 0, false), 3, 1, None, "FTFFT", "Progressing"),
        ("pods made", pods(3, 0, 3, true), 3, 1, None, "FTFFT", "Progressing"),
        ("some ready", pods(3, 2, 3, true), 3, 1, None, "FTFFT", "Progressing"),
        ("all ready", pods(3, 3, 3, true), 3, 1, None, "TFFFT", "AllReady"),
        ("one lost", pods(3, 2, 3, true), 3, 1, None, "FFFTT", "DaemonsNotReady"),
        ("its pod is gone", pods(2, 2, 2, true), 3, 1, None, "FFFTT", "DaemonsNotReady"),
        ("back", pods(3, 3, 3, true), 3, 1, None, "TFFFT", "AllReady"),
        ("a roll", pods(3, 2, 1, false), 3, 1, None, "FTFFT", "Progressing"),
        ("rolled", pods(3, 3, 3, true), 3, 1, None, "TFFFT", "AllReady"),
        ("scaled up", pods(3, 3, 3, true), 5, 2, None, "FTFFT", "Progressing"),
        ("scaled down, one left to stop", pods(4, 4, 4, true), 3, 3, None, "FTFFT", "Progressing"),
        ("scaled down", pods(3, 3, 3, true), 3, 3, None, "TFFFT", "AllReady"),
        ("stalled", pods(3, 3, 3, true), 3, 4, stall(Reason::NameConflict), "FFTFT", "NameConflict"),
        ("the API server is away", pods(3, 3, 3, true), 3, 4, stall(Reason::ApplyFailed), "FTFFT", "ApplyFailed"),
        ("the CA is gone", pods(3, 3, 3, true), 3, 4, stall(Reason::CaMissing), "FFTFF", "CAMissing"),
        (
            "another problem hides trust",
            pods(3, 3, 3, true),
            3,
            4,
            stall(Reason::ConfigTooLarge),
            "FFTFF",
            "ConfigTooLarge",
        ),
        ("well", pods(3, 3, 3, true), 3, 4, None, "TFFFT", "AllReady"),
        ("none wanted", pods(0, 0, 0, true), 0, 5, None, "TFFFT", "ScaledToZero"),
    ];
    let mut previous: Option<OverlayNodeStatus> = None;
    for (seconds, (case, pods, wanted, generation, problem, conditions, ready)) in (0..).zip(rows) {
        let status =
            status(&Facts { wanted, generation: Some(generation), problem, ..facts(previous.as_ref(), pods, seconds) });
        assert_eq!(letters(&status), conditions, "{case}");
        assert_eq!(reason(&status, "Ready"), ready, "{case}");
        assert!(status.conditions.iter().all(|c| c.observed_generation == Some(generation)), "{case}");
        assert_eq!(status.observed_generation, Some(generation), "{case}");
        for condition in &status.conditions {
            let before = find(previous.as_ref(), &condition.type_).map(|c| (&c.status, &c.last_transition_time));
            let kept = before.filter(|(status, _)| **status == condition.status).map(|(_, time)| time.clone());
            assert_eq!(
                condition.last_transition_time,
                kept.unwrap_or(Time(at(seconds))),
                "{case}: {}",
                condition.type_
            );
        }
        previous = Some(status);
    }
}

/// Pods and events explain; they change no condition's status.
#[test]
fn a_cause_is_told_where_daemons_are_short() {
    let cause = || Some(Problem { reason: Reason::QuotaExceeded, message: "no room".into() });
    let first = status(&Facts { cause: cause(), ..facts(None, pods(1, 1, 1, true), 0) });
    assert_eq!(letters(&first), "FTFFT");
    for kind in ["Ready", "Reconciling"] {
        let condition = find(Some(&first), kind).unwrap();
        let told = (condition.reason.as_str(), condition.message.as_str());
        assert_eq!(told, ("QuotaExceeded", "1 of 3 daemons are ready, 1 of them updated; no room"), "{kind}");
    }
    let well = status(&Facts { cause: cause(), ..facts(Some(&first), pods(3, 3, 3, true), 1) });
    assert_eq!((letters(&well), reason(&well, "Ready")), ("TFFFT".into(), "AllReady".into()));
    let inactive = ["Reconciling", "Stalled", "Degraded"].map(|kind| reason(&well, kind));
    assert_eq!(inactive, ["UpToDate", "NotStalled", "AllReady"]);
    let lost = status(&Facts { cause: cause(), ..facts(Some(&well), pods(3, 2, 3, true), 2) });
    assert_eq!((letters(&lost), reason(&lost, "Degraded")), ("FFFTT".into(), "QuotaExceeded".into()));
    let stalled = status(&Facts {
        cause: cause(),
        problem: Some(problem(Reason::NameConflict)),
        ..facts(Some(&lost), pods(3, 2, 3, true), 3)
    });
    assert_eq!(reason(&stalled, "Ready"), "NameConflict", "what keeps the spec from being applied comes first");
}

#[test]
fn the_same_facts_later_are_the_same_status() {
    let first = status(&facts(None, pods(3, 3, 3, true), 0));
    let json = serde_json::to_string(&first).unwrap();
    let stored: OverlayNodeStatus = serde_json::from_str(&json).unwrap();
    let mut later = facts(Some(&stored), pods(3, 3, 3, true), 100);
    later.now = later.now.checked_add(k8s_openapi::jiff::SignedDuration::from_millis(123)).unwrap();
    assert_eq!(status(&later), stored);
}

/// What is not applied is not what runs.
#[test]
fn a_problem_leaves_hash_and_certificate() {
    let first = status(&facts(None, pods(3, 3, 3, true), 0));
    let mut stalled = facts(Some(&first), pods(3, 3, 3, true), 1);
    (stalled.built, stalled.problem) = (Some(built("h2")), Some(problem(Reason::NameConflict)));
    let second = status(&stalled);
    assert_eq!((second.config_hash.as_deref(), second.tls), (Some("h1"), first.tls));
    let never =
        status(&Facts { problem: Some(problem(Reason::CaMissing)), built: None, ..facts(None, Pods::default(), 0) });
    assert_eq!((never.tls, never.config_hash, never.effective), (None, None, None));
}

#[test]
fn long_messages_are_cut_between_characters() {
    let mut long = facts(None, Pods::default(), 0);
    long.problem = Some(Problem { reason: Reason::ApplyFailed, message: format!("x{}", "ä".repeat(MAX_MESSAGE)) });
    let message = find(Some(&status(&long)), "Ready").unwrap().message.clone();
    assert!(message.len() <= MAX_MESSAGE + '…'.len_utf8() && message.ends_with("ä…"));
}

#[test]
fn pods_from_a_stateful_set() {
    let set = |generation, observed, current: &str, update: &str| StatefulSet {
        metadata: ObjectMeta { generation: Some(generation), ..Default::default() },
        status: Some(StatefulSetStatus {
            observed_generation: observed,
            replicas: 3,
            ready_replicas: Some(2),
            updated_replicas: Some(1),
            current_revision: Some(current.into()),
            update_revision: Some(update.into()),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(Pods::of(&set(2, Some(2), "a", "a")), pods(3, 2, 1, true));
    assert_eq!(Pods::of(&set(2, Some(1), "a", "a")), pods(3, 2, 1, false), "not seen yet");
    assert_eq!(Pods::of(&set(2, None, "a", "a")), pods(3, 2, 1, false), "never seen");
    assert_eq!(Pods::of(&set(2, Some(2), "a", "b")), pods(3, 2, 1, false), "rolling");
    assert_eq!(Pods::of(&StatefulSet::default()), Pods::default());
}

/// All are ready, and one does not run yet what was written: not Ready, and it says who.
#[test]
fn a_change_is_pending_until_every_daemon_runs_it() {
    let before = status(&facts(None, pods(3, 3, 3, true), 0));
    assert_eq!((letters(&before).as_str(), before.running_hash.as_deref()), ("TFFFT", Some("h1-and-peers")));
    let rollout = |current, silent: &[&str]| {
        Some(Rollout { current, wanted: 3, silent: silent.iter().map(|s| (*s).to_owned()).collect() })
    };
    for (rollout, want) in [
        (rollout(2, &[]), "ConfigPending"),
        (rollout(2, &["mesh-1"]), "DaemonUnreachable"),
        (rollout(3, &[]), "AllReady"),
    ] {
        let facts = Facts {
            generation: Some(2),
            built: Some(built("h2")),
            rollout,
            ..facts(Some(&before), pods(3, 3, 3, true), 5)
        };
        let now = status(&facts);
        let pending = want != "AllReady";
        assert_eq!(
            (letters(&now).as_str(), reason(&now, "Ready").as_str()),
            (if pending { "FTFFT" } else { "TFFFT" }, want)
        );
        assert_eq!(now.config_hash.as_deref(), Some("h2"));
        assert_eq!(now.running_hash.as_deref(), (!pending).then_some("h2-and-peers"));
        let message = find(Some(&now), "Ready").unwrap().message.clone();
        assert_eq!(message.contains("mesh-1"), want == "DaemonUnreachable", "{message}");
    }
}
