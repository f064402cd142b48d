use serde_json::json;

use super::*;

const UID: &str = "11111111-2222-3333-4444-555555555555";

fn owner() -> Owner<'static> {
    Owner { name: "mesh", uid: UID }
}

fn wanted(object: &Value) -> Wanted {
    let kind = match object["kind"].as_str() {
        Some("Service") => Kind::Service,
        Some("ConfigMap") => Kind::ConfigMap,
        _ => Kind::StatefulSet,
    };
    Wanted::new(kind, object["metadata"]["name"].as_str().unwrap().to_owned(), object.clone())
}

/// What the builder makes, and what an API server (1.37) answered to it.
fn pair(wanted_text: &str, live_text: &str) -> (Wanted, Value) {
    let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let wanted = wanted(&parse(wanted_text));
    let mut live = parse(live_text);
    live["metadata"]["annotations"][DIGEST] = wanted.object["metadata"]["annotations"][DIGEST].clone();
    (wanted, live)
}

fn stateful_set() -> (Wanted, Value) {
    pair(include_str!("../../build/objects/stateful-set.json"), include_str!("live-stateful-set.json"))
}

fn sends(wanted: &Wanted, live: &Value) -> bool {
    let live = [Some(live.clone())];
    !plan(std::slice::from_ref(wanted), &live, owner()).unwrap().is_empty()
}

#[test]
fn nothing_is_sent_for_what_the_api_server_added() {
    let (wanted, live) = stateful_set();
    assert!(!sends(&wanted, &live));
    let (wanted, live) = pair(include_str!("service.json"), include_str!("live-service.json"));
    assert!(!sends(&wanted, &live));
}

/// One field of the live object off at a time.
#[test]
fn what_differs_is_sent() {
    let table: [(&str, Value); 12] = [
        ("/spec/replicas", json!(2)),
        ("/spec/template/spec/containers/0/image", json!("other")),
        ("/spec/template/spec/containers/0/args/0", json!("check")),
        ("/spec/template/spec/containers/0/args", json!(["run"])),
        ("/spec/template/spec/containers/0/ports/0/containerPort", json!(1)),
        ("/spec/template/spec/containers/0/securityContext/capabilities/drop", json!(["ALL", "NET_RAW"])),
        ("/spec/template/spec/automountServiceAccountToken", json!(true)),
        ("/spec/template/spec/volumes/3/emptyDir/medium", json!("")),
        ("/spec/template/spec/volumes/1", Value::Null),
        ("/metadata/labels", json!({ "overlay.rustyonions.io/name": "mesh" })),
        ("/metadata/annotations", json!({ DIGEST: "of another time" })),
        ("/metadata/annotations", Value::Null),
    ];
    let (wanted, live) = stateful_set();
    for (pointer, value) in table {
        let mut live = live.clone();
        *live.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer} is not in the live object")) = value;
        assert!(sends(&wanted, &live), "{pointer}");
    }
}

#[test]
fn what_others_add_is_left() {
    let (wanted, mut live) = stateful_set();
    live["metadata"]["annotations"]["deployment.example/restartedAt"] = json!("now");
    live["spec"]["template"]["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"] = json!("now");
    live["spec"]["template"]["spec"]["containers"].as_array_mut().unwrap().insert(0, json!({ "name": "proxy" }));
    live["spec"]["template"]["spec"]["containers"][1]["env"].as_array_mut().unwrap().insert(0, json!({ "name": "X" }));
    live["spec"]["template"]["spec"]["volumes"].as_array_mut().unwrap().reverse();
    assert!(!sends(&wanted, &live));
}

/// A subset alone would not see that a field is no longer wanted.
#[test]
fn what_is_no_longer_wanted_is_sent() {
    let base = json!({ "kind": "StatefulSet", "metadata": { "name": "mesh" }, "spec": { "replicas": 3 } });
    let mut selected = base.clone();
    selected["spec"]["nodeSelector"] = json!({ "disk": "fast" });
    let mut live = wanted(&selected).object;
    live["metadata"]["ownerReferences"] = json!([{ "uid": UID, "controller": true }]);
    assert!(!sends(&wanted(&selected), &live));
    assert!(sends(&wanted(&base), &live));
}

#[test]
fn quantities_by_value_and_empty_as_absent() {
    for (wanted, live, same) in [
        (json!({ "limits": { "cpu": "1000m" } }), json!({ "limits": { "cpu": "1" } }), true),
        (json!({ "requests": { "memory": "1024Mi" } }), json!({ "requests": { "memory": "1Gi" } }), true),
        (json!({ "sizeLimit": "1024Ki" }), json!({ "sizeLimit": "1Mi" }), true),
        (json!({ "limits": { "cpu": "1000m" } }), json!({ "limits": { "cpu": "2" } }), false),
        (json!({ "name": "1000m" }), json!({ "name": "1" }), false),
        (json!({ "a": {}, "b": [], "c": null, "d": "" }), json!({}), true),
        (json!({ "a": false }), json!({}), false),
        (json!({ "a": 0 }), json!({}), false),
        (json!({ "tolerations": [{ "key": "a" }] }), json!({ "tolerations": [{ "key": "a" }, { "key": "b" }] }), false),
        (json!({ "tolerations": [{ "key": "" }] }), json!({ "tolerations": [{}] }), true),
    ] {
        assert_eq!(is_subset(&wanted, &live), same, "{wanted} in {live}");
    }
}

#[test]
fn absent_objects_are_sent_in_order() {
    let all: Vec<Wanted> = ["ConfigMap", "Service", "StatefulSet"]
        .map(|kind| wanted(&json!({ "kind": kind, "metadata": { "name": "mesh" } })))
        .into();
    let kinds = |live: &[Option<Value>]| plan(&all, live, owner()).unwrap().iter().map(|w| w.kind).collect::<Vec<_>>();
    assert_eq!(kinds(&[None, None, None]), [Kind::ConfigMap, Kind::Service, Kind::StatefulSet]);
    let mut service = all[1].object.clone();
    service["metadata"]["labels"] = json!({ labels::NAME: "mesh" });
    assert_eq!(kinds(&[None, Some(service), None]), [Kind::ConfigMap, Kind::StatefulSet]);
}

#[test]
fn whose_a_name_is() {
    let object = wanted(&json!({ "kind": "ConfigMap", "metadata": { "name": "mesh-config" } }));
    let (kind, name) = (Kind::ConfigMap, "mesh-config".to_owned());
    let reference = |kind: &str, name: &str, uid: &str, controller: bool| json!({ "apiVersion": "overlay.rustyonions.io/v1alpha1", "kind": kind, "name": name, "uid": uid, "controller": controller });
    let label = json!({ labels::NAME: "mesh" });
    let taken = |by: Option<&str>| Some(Obstacle::Taken { kind, name: name.clone(), by: by.map(str::to_owned) });
    let table = [
        ("ours", json!([reference("OverlayNode", "mesh", UID, true)]), json!({}), None),
        ("nobody's, with our label", json!([]), label.clone(), None),
        ("not controlled, with our label", json!([reference("App", "app", "9", false)]), label.clone(), None),
        ("nobody's", json!([]), json!({}), taken(None)),
        ("labelled for another", json!([]), json!({ labels::NAME: "other" }), taken(None)),
        (
            "another's, with our label",
            json!([reference("App", "app", "9", true)]),
            label.clone(),
            taken(Some("App/app")),
        ),
        (
            "another OverlayNode's",
            json!([reference("OverlayNode", "other", "9", true)]),
            label.clone(),
            taken(Some("OverlayNode/other")),
        ),
        (
            "of our predecessor",
            json!([reference("OverlayNode", "mesh", "9", true)]),
            label,
            Some(Obstacle::Leftover { kind, name: name.clone() }),
        ),
    ];
    for (case, references, labels, want) in table {
        let live = json!({ "metadata": { "name": "mesh-config", "ownerReferences": references, "labels": labels } });
        let got = plan(std::slice::from_ref(&object), &[Some(live)], owner());
        assert_eq!(got.map(|send| send.len()).err(), want.map(|one| vec![one]), "{case}");
    }
}

/// A person who clears one name should not find the next one taken.
#[test]
fn every_name_that_is_taken_is_told() {
    let objects: Vec<Wanted> = ["mesh-config", "mesh", "mesh-peers"]
        .map(|name| wanted(&json!({ "kind": "Service", "metadata": { "name": name } })))
        .into();
    let foreign = json!({ "metadata": { "name": "any" } });
    let obstacles = plan(&objects, &[Some(foreign.clone()), None, Some(foreign)], owner()).err().unwrap();
    let name = |obstacle: &Obstacle| match obstacle {
        Obstacle::Taken { name, .. } | Obstacle::Leftover { name, .. } => name.clone(),
    };
    assert_eq!(obstacles.iter().map(name).collect::<Vec<_>>(), ["mesh-config", "mesh-peers"]);
}
