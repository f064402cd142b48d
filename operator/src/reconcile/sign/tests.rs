use std::time::UNIX_EPOCH;

use super::*;

fn request(status: serde_json::Value) -> PodCertificateRequest {
    serde_json::from_value(json!({ "metadata": { "name": "r" }, "spec": {}, "status": status })).unwrap()
}

/// The API server compares these with the certificate, to the second.
#[test]
fn what_is_answered() {
    let begin = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let leaf =
        LeafCertificate { cert_pem: "PEM".into(), not_before: begin, not_after: begin + Duration::from_secs(86_400) };
    let id = "spiffe://example.org/ns/a/overlaynode/mesh/pod/mesh-0".parse().unwrap();
    let mut got = issued(&request(json!({})), &id, &leaf).unwrap();
    let condition = got["conditions"][0].take();
    assert_eq!(
        got,
        json!({
            "certificateChain": "PEM", "notBefore": "2027-01-15T08:00:00Z", "notAfter": "2027-01-16T08:00:00Z",
            "beginRefreshAt": "2027-01-15T16:00:00Z", "conditions": [null],
        })
    );
    assert_eq!((&condition["type"], &condition["status"]), (&json!("Issued"), &json!("True")));
    assert!(!condition["lastTransitionTime"].as_str().unwrap().contains('.'), "{condition}");
}

#[test]
fn what_is_answered_stays_answered() {
    let condition = |kind: &str| {
        json!({ "conditions": [{
            "type": kind, "status": "True", "reason": "X", "message": "", "lastTransitionTime": "2027-01-15T08:00:00Z",
        }] })
    };
    for (status, want) in [
        (json!(null), false),
        (json!({}), false),
        (condition("Issued"), true),
        (condition("Denied"), true),
        (condition("Failed"), true),
        (condition("Seen"), false),
    ] {
        assert_eq!(request(status.clone()).is_answered(), want, "{status}");
    }
}

#[test]
fn the_older_the_rarer() {
    let ms = |age| retry(Duration::from_millis(age)).as_millis();
    assert_eq!([0, 400, 2_000, 20_000, 60_000, 900_000].map(ms), [250, 250, 1_000, 10_000, 30_000, 30_000]);
}
