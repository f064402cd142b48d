use serde_json::Value;

use super::*;

const COMMITTED: &str = include_str!("../../../crds/overlaynodes.overlay.rustyonions.io.yaml");
/// Where client-side apply's annotation, and etcd after it, begin to refuse.
const MAX_BYTES: usize = 200_000;

#[test]
fn the_committed_definition_is_the_generated_one() {
    let now = crd_yaml().unwrap();
    assert!(now == COMMITTED, "run: overlay-operator crd > crds/overlaynodes.overlay.rustyonions.io.yaml\n{now}");
    assert!(now.len() < MAX_BYTES, "{} bytes", now.len());
}

#[test]
fn the_committed_definition_reads_back() {
    let read: Value = serde_yaml::from_str(COMMITTED).unwrap();
    assert_eq!(read, crd_json().unwrap());
}

/// What makes a schema structural, and its rules affordable: a type everywhere, a maximum on
/// every list, map and string, a description on every field of the spec.
#[test]
fn every_field_is_typed_bounded_and_described() {
    fn walk(path: &str, schema: &Value, spec: bool) {
        let int_or_string = schema.get("x-kubernetes-int-or-string").is_some();
        let kind = schema.get("type").and_then(Value::as_str);
        assert!(kind.is_some() || int_or_string, "{path} has no type");
        for forbidden in ["nullable", "$ref", "allOf", "oneOf", "not", "title"] {
            assert!(schema.get(forbidden).is_none(), "{path} has {forbidden}");
        }
        assert!(schema.get("format").and_then(Value::as_str).is_none_or(|f| !f.starts_with('u')), "{path}'s format");
        if spec {
            let has = |key: &str| schema.get(key).is_some();
            match kind {
                Some("array") => assert!(has("maxItems"), "{path} is unbounded"),
                Some("string") => assert!(has("maxLength") || has("enum"), "{path} is unbounded"),
                Some("integer") if !path.ends_with("tolerationSeconds") => {
                    assert!(has("minimum") && has("maximum"), "{path} is unbounded");
                }
                Some("object") if has("additionalProperties") => assert!(has("maxProperties"), "{path} is unbounded"),
                _ => {}
            }
        }
        for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let described =
                property.get("description").is_some() || path.contains("tolerations") || path.contains("conditions");
            assert!(described, "{path}.{name} is not described");
            walk(&format!("{path}.{name}"), property, spec);
        }
        if let Some(items) = schema.get("items") {
            walk(&format!("{path}[]"), items, spec);
        }
        if let Some(values) = schema.get("additionalProperties") {
            walk(&format!("{path}.*"), values, spec);
        }
    }
    let crd = crd_json().unwrap();
    let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema/properties").unwrap();
    walk("spec", &schema["spec"], true);
    walk("status", &schema["status"], false);
}

/// A default of an object carries those of its fields, so that defaulting once is enough.
#[test]
fn defaults_are_complete() {
    let crd = crd_json().unwrap();
    let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap();
    let once = kube::core::cel::apply_defaults(schema, &serde_json::json!({ "spec": {} }));
    assert_eq!(kube::core::cel::apply_defaults(schema, &once), once);
    assert_eq!(serde_json::from_value::<OverlayNodeSpec>(once["spec"].clone()).unwrap(), OverlayNodeSpec::default());
    assert_eq!(serde_json::to_value(OverlayNodeSpec::default()).unwrap(), once["spec"]);
}

#[test]
fn columns_names_and_subresources() {
    let crd = crd();
    let version = &crd.spec.versions[0];
    let columns: Vec<_> =
        version.additional_printer_columns.iter().flatten().map(|c| (c.name.as_str(), c.priority)).collect();
    let wide = ("Image", Some(1));
    let shown = ["Profile", "Desired", "Ready", "Status", "PQ", "Age", "Message"].map(|name| (name, None));
    assert_eq!(columns, [&shown[..], &[wide]].concat());
    assert_eq!(crd.metadata.name.as_deref(), Some("overlaynodes.overlay.rustyonions.io"));
    assert_eq!(crd.spec.names.short_names, Some(vec!["onode".to_owned()]));
    assert_eq!(crd.spec.names.categories, Some(vec!["overlay".to_owned()]));
    assert_eq!(crd.spec.scope, "Namespaced");
    let subresources = version.subresources.as_ref().unwrap();
    assert!(subresources.status.is_some());
    let scale = subresources.scale.as_ref().unwrap();
    assert_eq!(
        (scale.spec_replicas_path.as_str(), scale.status_replicas_path.as_str()),
        (".spec.replicas", ".status.replicas")
    );
    assert_eq!(scale.label_selector_path.as_deref(), Some(".status.selector"));
}

#[test]
fn a_quantity_may_be_a_whole_number() {
    let resources: Resources =
        serde_json::from_value(serde_json::json!({ "limits": { "cpu": 2, "memory": "64Mi" } })).unwrap();
    let container = resources.to_container();
    let limits = container.limits.unwrap();
    assert_eq!((limits["cpu"].0.as_str(), limits["memory"].0.as_str()), ("2", "64Mi"));
    assert_eq!(container.requests, None);
}
