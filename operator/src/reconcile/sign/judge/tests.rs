use k8s_openapi::ByteString;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};
use serde_json::{Value, json};

use super::*;
use crate::build::{Placement, daemon_config, pod_template};

fn csr(key: &KeyPair) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serialize_request(key).unwrap().der().to_vec()
}

fn request() -> PodCertificateRequest {
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    serde_json::from_value(json!({
        "metadata": { "namespace": "a", "name": "req" },
        "spec": {
            "signerName": "overlay.rustyonions.io/mesh", "podName": "mesh-1", "podUID": "pod-uid",
            "serviceAccountName": "mesh", "serviceAccountUID": "sa-uid", "nodeName": "n1", "nodeUID": "n1-uid",
            "maxExpirationSeconds": 86_400, "stubPKCS10Request": ByteString(csr(&key)),
        },
    }))
    .unwrap()
}

fn owner(api_version: &str, kind: &str, name: &str, uid: &str) -> Value {
    json!([{ "apiVersion": api_version, "kind": kind, "name": name, "uid": uid, "controller": true }])
}

fn pod_json() -> Value {
    json!({
        "metadata": {
            "name": "mesh-1", "uid": "pod-uid", "ownerReferences": owner("apps/v1", "StatefulSet", "mesh", "set-uid"),
            "labels": { "overlay.rustyonions.io/name": "mesh" },
        },
        "spec": { "nodeName": "n1", "serviceAccountName": "mesh", "containers": [] },
    })
}

fn node_json() -> Value {
    json!({
        "apiVersion": "overlay.rustyonions.io/v1alpha1", "kind": "OverlayNode",
        "metadata": { "namespace": "a", "name": "mesh", "uid": "node-uid" }, "spec": {},
    })
}

fn set_json() -> Value {
    let node: OverlayNode = serde_json::from_value(node_json()).unwrap();
    let source = TlsSource::PodCertificate;
    let template =
        pod_template(&node, &daemon_config(&node, &Placement::pod(&node, source)), "x", None, source).unwrap();
    json!({
        "metadata": {
            "name": "mesh", "uid": "set-uid",
            "ownerReferences": owner("overlay.rustyonions.io/v1alpha1", "OverlayNode", "mesh", "node-uid"),
        },
        "spec": { "selector": {}, "serviceName": "mesh-peers", "template": template },
    })
}

/// What is said of the request, where the API server has these.
fn judged(request: &PodCertificateRequest, shown: [Option<Value>; 3]) -> Result<String, Refusal> {
    fn read<T: serde::de::DeserializeOwned>(value: Option<Value>) -> Option<T> {
        value.map(|value| serde_json::from_value(value).unwrap())
    }
    let [the_pod, the_set, the_node] = shown;
    key(request)?;
    let owner = pod(request, read(the_pod).as_ref())?;
    let owner = stateful_set(&owner, read(the_set).as_ref())?;
    overlay_node(request, &owner, read(the_node).as_ref(), "example.org").map(|id| id.to_string())
}

fn with(mut object: Value, pointer: &str, value: Value) -> Option<Value> {
    *object.pointer_mut(pointer).unwrap() = value;
    Some(object)
}

/// Only what is proven wrong is denied; what may yet turn out right waits.
#[test]
fn who_gets_a_certificate() {
    use Denial::{NotAnOverlayNodesPod, PodMismatch};
    let (pod, set, node) = (Some(pod_json()), Some(set_json()), Some(node_json()));
    let pod_with = |pointer, value| with(pod_json(), pointer, value);
    let set_with = |pointer, value| with(set_json(), pointer, value);
    let owners = "/metadata/ownerReferences";
    let deny = |reason, part| Err((Some(reason), part));
    let wait = |part| Err((None, part));
    let shared = with(set_json(), "/spec/template/spec/volumes", json!([]));
    let self_managed = with(node_json(), "/spec", json!({ "tls": { "source": "SelfManaged" } }));
    let gone = with(node_json(), "/metadata/uid", json!("later"));
    let table = [
        ("as it should be", pod.clone(), set.clone(), node.clone(), Ok(())),
        ("no pod", None, set.clone(), node.clone(), wait("there is no Pod mesh-1")),
        (
            "a later pod of the name",
            pod_with("/metadata/uid", json!("x")),
            set.clone(),
            node.clone(),
            deny(PodMismatch, "another one"),
        ),
        ("no node yet", pod_with("/spec/nodeName", json!(null)), set.clone(), node.clone(), wait("has no node yet")),
        (
            "another node",
            pod_with("/spec/nodeName", json!("n2")),
            set.clone(),
            node.clone(),
            deny(PodMismatch, "runs on node n2, not on n1"),
        ),
        (
            "another service account",
            pod_with("/spec/serviceAccountName", json!("x")),
            set.clone(),
            node.clone(),
            deny(PodMismatch, "service account x"),
        ),
        (
            "labels alone",
            pod_with(owners, json!([])),
            set.clone(),
            node.clone(),
            deny(NotAnOverlayNodesPod, "labels make no member"),
        ),
        (
            "an owner that does not control it",
            pod_with("/metadata/ownerReferences/0/controller", json!(false)),
            set.clone(),
            node.clone(),
            deny(NotAnOverlayNodesPod, "controlled by no StatefulSet"),
        ),
        (
            "a Deployment's",
            pod_with(owners, owner("apps/v1", "ReplicaSet", "mesh", "set-uid")),
            set.clone(),
            node.clone(),
            deny(NotAnOverlayNodesPod, "controlled by ReplicaSet mesh"),
        ),
        (
            "a StatefulSet of another group",
            pod_with(owners, owner("example.org/v1", "StatefulSet", "mesh", "set-uid")),
            set.clone(),
            node.clone(),
            deny(NotAnOverlayNodesPod, "controlled by"),
        ),
        (
            "no replica by its name",
            pod_with(owners, owner("apps/v1", "StatefulSet", "mes", "set-uid")),
            set.clone(),
            node.clone(),
            deny(NotAnOverlayNodesPod, "not named as"),
        ),
        ("the StatefulSet is not there", pod.clone(), None, node.clone(), wait("there is no StatefulSet mesh")),
        (
            "a later StatefulSet of the name",
            pod.clone(),
            set_with("/metadata/uid", json!("x")),
            node.clone(),
            deny(NotAnOverlayNodesPod, "StatefulSet mesh is another one"),
        ),
        (
            "a StatefulSet of one's own",
            pod.clone(),
            set_with(owners, json!([])),
            node.clone(),
            deny(NotAnOverlayNodesPod, "controlled by no OverlayNode"),
        ),
        (
            "an OverlayNode of another group",
            pod.clone(),
            set_with(owners, owner("example.org/v1", "OverlayNode", "mesh", "node-uid")),
            node.clone(),
            deny(NotAnOverlayNodesPod, "controlled by"),
        ),
        ("it gives no such certificates", pod.clone(), shared, node.clone(), wait("no certificates of their own")),
        ("the OverlayNode is not there", pod.clone(), set.clone(), None, wait("there is no OverlayNode mesh")),
        (
            "a later OverlayNode of the name",
            pod.clone(),
            set.clone(),
            gone,
            deny(NotAnOverlayNodesPod, "OverlayNode mesh is another one"),
        ),
        ("it wants none", pod, set, self_managed, wait("has spec.tls.source SelfManaged")),
    ];
    for (case, pod, set, node, want) in table {
        let got = judged(&request(), [pod, set, node]);
        match (got, want) {
            (Ok(id), Ok(())) => assert_eq!(id, "spiffe://example.org/ns/a/overlaynode/mesh/pod/mesh-1", "{case}"),
            (Err(Refusal::Denied { reason, message }), Err((Some(expected), part))) => {
                assert_eq!(reason, expected, "{case}");
                assert!(message.contains(part), "{case}: {message}");
            }
            (Err(Refusal::Pending(message)), Err((None, part))) => assert!(message.contains(part), "{case}: {message}"),
            (got, want) => panic!("{case}: {got:?}, not {want:?}"),
        }
    }
}

#[test]
fn which_keys_are_certified() {
    let all = || [Some(pod_json()), Some(set_json()), Some(node_json())];
    let asked = |change: &dyn Fn(&mut PodCertificateRequest)| {
        let mut request = request();
        change(&mut request);
        match judged(&request, all()) {
            Err(Refusal::Denied { reason, .. }) => Some(reason),
            other => {
                assert!(other.is_ok(), "{other:?}");
                None
            }
        }
    };
    let (mine, other) = (KeyPair::generate_for(&PKCS_ED25519).unwrap(), KeyPair::generate_for(&PKCS_ED25519).unwrap());
    let p256 = csr(&KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap());
    // Another's public key in a request that one has signed oneself.
    let mut stolen = csr(&mine);
    let at = stolen.windows(32).position(|w| w == mine.public_key_raw()).unwrap();
    stolen[at..at + 32].copy_from_slice(other.public_key_raw());
    let mut trailing = csr(&mine);
    trailing.push(0);
    let put = |der: Vec<u8>| move |r: &mut PodCertificateRequest| r.spec.stub_pkcs10_request = ByteString(der.clone());
    assert_eq!(asked(&put(csr(&mine))), None);
    assert_eq!(asked(&put(p256)), Some(Denial::UnsupportedKeyType));
    assert_eq!(asked(&put(stolen)), Some(Denial::InvalidRequest));
    assert_eq!(asked(&put(trailing)), Some(Denial::InvalidRequest));
    assert_eq!(asked(&put(Vec::new())), Some(Denial::InvalidRequest));
    assert_eq!(
        asked(&|r| drop(r.spec.unverified_user_annotations.insert("example.org/x".into(), "y".into()))),
        Some(Denial::InvalidUnverifiedUserAnnotations)
    );
}

#[test]
fn no_longer_than_asked_and_no_longer_than_a_day() {
    for (asked, want) in [(None, 86_400), (Some(3_600), 3_600), (Some(86_400), 86_400), (Some(7_862_400), 86_400)] {
        let mut request = request();
        request.spec.max_expiration_seconds = asked;
        assert_eq!(lifetime(&request).as_secs(), want, "{asked:?}");
    }
}
