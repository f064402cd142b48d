use serde_json::{Value, json};

use super::*;

const T0: i64 = 1_800_000_000;

fn time_at(seconds: i64) -> String {
    Timestamp::from_second(T0 + seconds).unwrap().to_string()
}

/// A pod of the StatefulSet, made at `made`.
fn pod(name: &str, made: i64, status: &Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "name": name, "uid": format!("uid-{name}"), "creationTimestamp": time_at(made) },
        "status": status,
    }))
    .unwrap()
}

fn ready(name: &str, made: i64) -> Pod {
    pod(name, made, &json!({ "conditions": [{ "type": "Ready", "status": "True" }] }))
}

/// The daemon's container as the kubelet tells of it.
fn container(state: &Value, last: &Value) -> Value {
    json!({ "containerStatuses": [{
        "name": "overlay-daemon", "image": "r/d:1", "imageID": "", "ready": false, "restartCount": 0,
        "state": state, "lastState": last,
    }] })
}

fn waiting(reason: &str, message: &str) -> Value {
    container(&json!({ "waiting": { "reason": reason, "message": message } }), &json!({}))
}

fn running(since: i64) -> Value {
    container(&json!({ "running": { "startedAt": time_at(since) } }), &json!({}))
}

fn event(kind: &str, about: &str, reason: &str, at: i64, message: &str) -> Event {
    serde_json::from_value(json!({
        "metadata": { "name": format!("{about}.{at}"), "creationTimestamp": time_at(0) },
        "involvedObject": { "kind": kind, "name": about, "uid": format!("uid-{about}") },
        "reason": reason, "message": message, "firstTimestamp": time_at(0), "lastTimestamp": time_at(at),
    }))
    .unwrap()
}

fn refused(at: i64, why: &str) -> Event {
    let message = format!("create Pod mesh-0 in StatefulSet mesh failed error: pods \"mesh-0\" is forbidden: {why}");
    event("StatefulSet", "mesh", "FailedCreate", at, &message)
}

const QUOTA: &str = "exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0";
const SECURITY: &str = "violates PodSecurity \"restricted:latest\": runAsNonRoot != true";

/// What is told of a mesh of three at second 100.
fn told(pods: &[Pod], events: &[Event]) -> Option<(Reason, String)> {
    cause(pods, events, 3, Timestamp::from_second(T0 + 100).unwrap()).map(|cause| (cause.reason, cause.message))
}

fn expect(case: &str, pods: &[Pod], events: &[Event], want: Option<(Reason, &str)>) {
    let got = told(pods, events);
    let got = got.as_ref().map(|(reason, message)| (*reason, message.as_str()));
    match (got, want) {
        (None, None) => {}
        (Some((reason, message)), Some((wanted, part))) => {
            assert_eq!(reason, wanted, "{case}: {message}");
            assert!(message.contains(part), "{case}: {part:?} is not in {message:?}");
        }
        (got, want) => assert_eq!(got, want, "{case}"),
    }
}

/// A reason and a part of the message.
type Told = Option<(Reason, &'static str)>;

#[test]
fn refusals_of_pods() {
    let quota = || refused(50, QUOTA);
    let created =
        |at| event("StatefulSet", "mesh", "SuccessfulCreate", at, "create Pod mesh-0 in StatefulSet mesh successful");
    let all = || ["mesh-0", "mesh-1", "mesh-2"].map(|name| pod(name, 60, &json!({})));
    let leaving = || {
        let mut pod = ready("mesh-0", 10);
        pod.metadata.deletion_timestamp = pod.metadata.creation_timestamp.clone();
        pod
    };
    let bad = |why: &str| event("StatefulSet", "mesh", "FailedCreate", 50, why);
    let rows: Vec<(&str, Vec<Pod>, Vec<Event>, Told)> = vec![
        ("nothing known", vec![], vec![], None),
        (
            "quota",
            vec![],
            vec![quota()],
            Some((
                Reason::QuotaExceeded,
                "3 pods cannot be created: pods \"mesh-0\" is forbidden: exceeded quota: none",
            )),
        ),
        (
            "quota for the third",
            vec![ready("mesh-0", 10), ready("mesh-1", 50)],
            vec![quota()],
            Some((Reason::QuotaExceeded, "1 pods")),
        ),
        ("an older refusal than the last pod", vec![ready("mesh-0", 51)], vec![quota()], None),
        ("of which only the event is left", vec![], vec![quota(), created(51)], None),
        ("refused again", vec![], vec![created(40), quota()], Some((Reason::QuotaExceeded, "quota"))),
        ("all are there by now", all().into(), vec![quota()], None),
        (
            "one is on its way out",
            vec![leaving(), ready("mesh-1", 10), ready("mesh-2", 10)],
            vec![quota()],
            Some((Reason::QuotaExceeded, "1 pods")),
        ),
        ("Pod Security", vec![], vec![refused(50, SECURITY)], Some((Reason::AdmissionDenied, "violates PodSecurity"))),
        (
            "the newest is true",
            vec![],
            vec![refused(50, SECURITY), refused(60, QUOTA)],
            Some((Reason::QuotaExceeded, "quota")),
        ),
        (
            "a webhook",
            vec![],
            vec![bad(
                "create Pod mesh-0 in StatefulSet mesh failed error: admission webhook \"x\" denied the request: no",
            )],
            Some((Reason::AdmissionDenied, "3 pods cannot be created: admission webhook")),
        ),
        (
            "something else",
            vec![],
            vec![bad("create Pod mesh-0 in StatefulSet mesh failed error: the server is on fire")],
            Some((Reason::PodsNotCreated, "on fire")),
        ),
        (
            "a webhook that is away",
            vec![],
            vec![bad("x failed error: Internal error occurred: failed calling webhook \"x\"")],
            Some((Reason::PodsNotCreated, "failed calling webhook")),
        ),
    ];
    for (case, pods, events, want) in rows {
        expect(case, &pods, &events, want);
    }
}

#[test]
fn pods_that_do_not_come_up() {
    let ended = |code: i64, reason: &str, message: &str, at: i64| json!({ "terminated": { "exitCode": code, "reason": reason, "message": message, "finishedAt": time_at(at) } });
    let backoff =
        json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container" } });
    let crash = |last: Value| container(&backoff, &last);
    let unscheduled = json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available" }] });
    let about = |reason: &str, at: i64, message: &str| event("Pod", "mesh-0", reason, at, message);
    let failed = about("Failed", 40, "Failed to pull image \"r/d:1\": rpc error: not found");
    let creating = || waiting("ContainerCreating", "");
    let rows: Vec<(&str, Value, Vec<Event>, Told)> = vec![
        ("not scheduled yet, no kubelet", json!({}), vec![], None),
        ("being made", creating(), vec![], None),
        (
            "pull",
            waiting("ErrImagePull", "rpc error: not found"),
            vec![],
            Some((Reason::ImagePullFailed, "pod mesh-0: image r/d:1 cannot be pulled: rpc error: not found")),
        ),
        (
            "pull, backing off",
            waiting("ImagePullBackOff", "Back-off pulling image"),
            vec![failed.clone()],
            Some((Reason::ImagePullFailed, "pod mesh-0: image r/d:1 cannot be pulled: rpc error: not found")),
        ),
        (
            "pull, the same text before",
            waiting("ErrImagePull", "something"),
            vec![failed],
            Some((Reason::ImagePullFailed, "image r/d:1 cannot be pulled: rpc error: not found")),
        ),
        ("name", waiting("InvalidImageName", ""), vec![], Some((Reason::ImagePullFailed, "InvalidImageName"))),
        (
            "never pulled",
            waiting("ErrImageNeverPull", "not present"),
            vec![],
            Some((Reason::ImagePullFailed, "not present")),
        ),
        (
            "crash",
            crash(ended(1, "Error", "error: no\nkey", 90)),
            vec![],
            Some((Reason::CrashLooping, "pod mesh-0: container overlay-daemon ended with exit code 1: error: no key")),
        ),
        (
            "out of memory",
            crash(ended(137, "OOMKilled", "", 90)),
            vec![],
            Some((Reason::CrashLooping, "exit code 137 (OOMKilled)")),
        ),
        (
            "just ended",
            container(&ended(2, "Error", "", 99), &json!({})),
            vec![],
            Some((Reason::CrashLooping, "exit code 2")),
        ),
        (
            "up again since",
            container(&json!({ "running": { "startedAt": time_at(91) } }), &ended(2, "Error", "", 90)),
            vec![],
            Some((Reason::CrashLooping, "exit code 2")),
        ),
        (
            "up again for long",
            container(&json!({ "running": { "startedAt": time_at(-899) } }), &ended(2, "Error", "", -900)),
            vec![],
            Some((Reason::NotReady, "not ready: mesh-0")),
        ),
        ("no node", unscheduled, vec![], Some((Reason::Unschedulable, "pod mesh-0: 0/3 nodes are available"))),
        (
            "no Secret for the environment",
            waiting("CreateContainerConfigError", "secret \"x\" not found"),
            vec![],
            Some((Reason::ContainerNotCreated, "secret \"x\" not found")),
        ),
        (
            "volume",
            creating(),
            vec![about("FailedMount", 90, "MountVolume.SetUp failed for volume \"tls\"")],
            Some((Reason::VolumeNotMounted, "pod mesh-0: MountVolume.SetUp failed for volume \"tls\"")),
        ),
        ("volume, long ago", creating(), vec![about("FailedMount", -300, "MountVolume.SetUp failed")], None),
        (
            "volume, mounted since",
            running(95),
            vec![about("FailedMount", 90, "MountVolume.SetUp failed")],
            Some((Reason::NotReady, "mesh-0")),
        ),
        ("volume, of a pod before it", creating(), vec![event("Pod", "other", "FailedMount", 90, "no")], None),
        (
            "says why",
            running(50),
            vec![about("Unhealthy", 60, "Readiness probe failed: peers")],
            Some((Reason::NotReady, "not ready: mesh-0; mesh-0: Readiness probe failed: peers")),
        ),
        (
            "said why before it was started again",
            running(70),
            vec![about("Unhealthy", 60, "Readiness probe failed: peers")],
            Some((Reason::NotReady, "not ready: mesh-0")),
        ),
    ];
    for (case, status, events, want) in rows {
        let pods = [pod("mesh-0", 10, &status), ready("mesh-1", 10), ready("mesh-2", 10)];
        expect(case, &pods, &events, want);
        if case == "said why before it was started again" {
            assert!(!told(&pods, &events).unwrap().1.contains("probe"));
        }
        let mut gone = pods.clone();
        gone[0].metadata.deletion_timestamp = gone[0].metadata.creation_timestamp.clone();
        expect(case, &gone, &events, None);
        expect(case, &[ready("mesh-0", 10), ready("mesh-1", 10), ready("mesh-2", 10)], &events, None);
    }
}

#[test]
fn the_gravest_is_told_and_the_rest_counted() {
    let pull = || waiting("ErrImagePull", "no");
    let pods = [pod("mesh-0", 10, &running(20)), pod("mesh-1", 10, &pull()), pod("mesh-2", 10, &pull())];
    expect("image", &pods, &[], Some((Reason::ImagePullFailed, "pod mesh-1 and 1 more: image")));
    let many: Vec<Pod> = (0..5).map(|n| pod(&format!("mesh-{n}"), 10, &running(20))).collect();
    expect("many", &many, &[], Some((Reason::NotReady, "5 pods are not ready: mesh-0, mesh-1, mesh-2, …")));
}

/// Every look at the same failure says the same, or each would be a write; and no more than fits.
#[test]
fn messages_are_short_and_stay() {
    let pods = |text: &str| [pod("mesh-0", 10, &waiting("ErrImagePull", text))];
    let long = told(&pods(&"x".repeat(5_000)), &[]).unwrap().1;
    assert!(long.len() < MAX_TEXT + 100 && long.ends_with('…'), "{long}");
    let crash = |wait: &str| {
        let state = json!({ "waiting": { "reason": "CrashLoopBackOff", "message": wait } });
        told(&[pod("mesh-0", 10, &container(&state, &json!({ "terminated": { "exitCode": 1 } })))], &[])
    };
    assert_eq!(crash("back-off 10s"), crash("back-off 5m0s"));
}
