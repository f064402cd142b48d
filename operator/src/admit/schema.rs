//! The CRD as a validator: structural schema (strict), defaults, rules. Made once from
//! [`crate::api::crd`]; nothing about a field is written down twice.

use std::sync::LazyLock;

use jsonschema::error::ValidationErrorKind as Kind;
use jsonschema::{JsonType, ValidationError, Validator};
use kube::core::cel;
use serde_json::{Map, Value, json};

use crate::api;

/// What is wrong with a value: the field, and the rule or bound that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// The field's path.
    pub(super) field: String,
    /// What it should be.
    pub(super) message: String,
}

struct Schema {
    /// As the CRD has it: defaults and rules.
    crd: Value,
    /// With what strict validation adds.
    document: Value,
    /// The same, compiled.
    strict: Validator,
}

/// `None` would mean that the CRD is not a schema, which a test rules out.
static SCHEMA: LazyLock<Option<Schema>> = LazyLock::new(|| {
    let mut definition = api::crd_json().ok()?;
    let crd = definition.pointer_mut("/spec/versions/0/schema/openAPIV3Schema")?.take();
    let mut strict = crd.clone();
    let properties = strict.get_mut("properties")?.as_object_mut()?;
    // What the server itself fills in, and answers.
    properties.remove("status");
    properties.insert("metadata".into(), object_meta());
    for name in ["apiVersion", "kind"] {
        properties.insert(name.into(), json!({ "type": "string" }));
    }
    strict.as_object_mut()?.insert("required".into(), json!(["apiVersion", "kind", "metadata", "spec"]));
    harden(&mut strict);
    Some(Schema { strict: jsonschema::draft202012::new(&strict).ok()?, document: strict, crd })
});

/// The object with its defaults, or everything that is wrong with it.
pub(super) fn check(object: Value) -> Result<Value, Vec<Finding>> {
    let Some(schema) = SCHEMA.as_ref() else {
        return Err(vec![Finding { field: String::new(), message: "the CRD's schema is damaged".into() }]);
    };
    let object = cel::apply_defaults(&schema.crd, &without_nulls(object, &schema.document));
    let mut findings = Vec::new();
    let mut blocked = false;
    for error in schema.strict.iter_errors(&object) {
        blocked |= !matches!(
            error.kind(),
            Kind::Minimum { .. } | Kind::Maximum { .. } | Kind::Pattern { .. } | Kind::AdditionalProperties { .. }
        );
        describe(&error, &schema.document, &mut findings);
    }
    // As an API server does: rules are not asked about values of the wrong shape.
    if !blocked && let Err(errors) = cel::Validator::new().validate(&schema.crd, &object, None) {
        for error in errors {
            let evaluated = error.kind == cel::ErrorKind::ValidationFailure;
            let known = findings.iter().any(|f| f.field == error.field_path);
            if !known && (evaluated || findings.is_empty()) {
                findings.push(rule(error));
            }
        }
    }
    if findings.is_empty() { Ok(object) } else { Err(findings) }
}

/// A root rule names its field in its message, since it may not point below `metadata`.
fn rule(error: cel::ValidationError) -> Finding {
    if error.field_path.is_empty()
        && let Some((field, message)) = error.message.split_once(": ")
    {
        return Finding { field: field.to_owned(), message: message.to_owned() };
    }
    Finding { field: error.field_path, message: error.message }
}

/// Nothing is nullable: a field or an entry that is null is as if left out. Elements of lists
/// cannot be left out, and what no schema knows is refused later.
fn without_nulls(value: Value, schema: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let entry = schema.get("additionalProperties").filter(|s| s.is_object());
            let inner = |key: &str| schema.get("properties").and_then(|p| p.get(key)).or(entry);
            let kept = map.into_iter().filter(|(key, value)| !(value.is_null() && inner(key).is_some()));
            Value::Object(
                kept.map(|(key, value)| {
                    let value = without_nulls(value, inner(&key).unwrap_or(&Value::Null));
                    (key, value)
                })
                .collect(),
            )
        }
        Value::Array(items) => {
            let schema = schema.get("items").unwrap_or(&Value::Null);
            Value::Array(items.into_iter().map(|item| without_nulls(item, schema)).collect())
        }
        other => other,
    }
}

/// What an API server checks besides plain JSON Schema: no unknown fields, no element of a
/// set twice, and its own type of whole numbers and strings.
fn harden(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    if map.contains_key("properties") && !map.contains_key("additionalProperties") {
        map.insert("additionalProperties".into(), false.into());
    }
    if map.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
        map.insert("anyOf".into(), json!([{ "type": "integer" }, { "type": "string" }]));
    }
    if map.get("x-kubernetes-list-type").and_then(Value::as_str) == Some("set") {
        map.insert("uniqueItems".into(), true.into());
    }
    if let Some(properties) = map.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(harden);
    }
    for key in ["items", "additionalProperties"] {
        map.get_mut(key).into_iter().for_each(harden);
    }
}

/// What every object's metadata must be.
fn object_meta() -> Value {
    let name = r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]";
    let key = format!(r"^([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{name}$");
    let time = || json!({ "type": "string" });
    json!({
        "type": "object",
        "required": ["name"],
        "additionalProperties": false,
        "properties": {
            "name": { "type": "string", "minLength": 1 },
            "namespace": { "type": "string", "maxLength": 63, "pattern": "^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$" },
            "labels": {
                "type": "object",
                "propertyNames": { "pattern": key },
                "additionalProperties": { "type": "string", "maxLength": 63, "pattern": format!("^({name})?$") },
            },
            "annotations": {
                "type": "object",
                "propertyNames": { "pattern": key },
                "additionalProperties": { "type": "string" },
            },
            "finalizers": { "type": "array", "items": { "type": "string" } },
            "ownerReferences": { "type": "array", "items": { "type": "object" } },
            "managedFields": { "type": "array", "items": { "type": "object" } },
            "creationTimestamp": time(),
            "deletionTimestamp": time(),
            "deletionGracePeriodSeconds": { "type": "integer" },
            "generation": { "type": "integer" },
            "resourceVersion": { "type": "string" },
            "selfLink": { "type": "string" },
            "uid": { "type": "string" },
        },
    })
}

fn describe(error: &ValidationError<'_>, strict: &Value, out: &mut Vec<Finding>) {
    let field = field(error.instance_path().as_str());
    if let Kind::AdditionalProperties { unexpected } = error.kind() {
        let known = known_fields(strict, error.instance_path().as_str());
        out.extend(unexpected.iter().map(|name| Finding {
            field: child(&field, name),
            message: format!("unknown field{}", suggestion(name, &known)),
        }));
        return;
    }
    let value = error.instance();
    let (field, message) = match error.kind() {
        Kind::Required { property } => (child(&field, property.as_str().unwrap_or_default()), "is required".into()),
        Kind::Type { kind: jsonschema::error::TypeKind::Single(wanted) } => {
            (field, format!("must be {}, not {}", type_name(*wanted), shown(value)))
        }
        Kind::AnyOf { .. } => (field, format!("must be a whole number or a string, not {}", shown(value))),
        Kind::Enum { options } => (field, format!("must be one of {}, not {}", list(options), shown(value))),
        Kind::Minimum { limit } => (field, format!("must be at least {limit}, not {}", shown(value))),
        Kind::Maximum { limit } => (field, format!("must be at most {limit}, not {}", shown(value))),
        Kind::MinItems { limit } => (field, format!("must have at least {limit} {}", plural(*limit, "element"))),
        Kind::MaxItems { limit } => (field, format!("must have at most {limit} {}", plural(*limit, "element"))),
        Kind::MaxProperties { limit } => (field, format!("must have at most {limit} entries")),
        Kind::MinLength { limit } => (field, format!("must have at least {limit} {}", plural(*limit, "character"))),
        Kind::MaxLength { limit } => (field, format!("must have at most {limit} characters")),
        Kind::UniqueItems => (field, "must not name the same element twice".into()),
        Kind::Pattern { pattern } => (field, format!("{} does not match {pattern}", shown(value))),
        Kind::PropertyNames { error } => {
            (field, format!("the key {} is not a qualified name", shown(error.instance())))
        }
        _ => (field, error.to_string()),
    };
    out.push(Finding { field, message });
}

/// `/spec/auth/tenants/0` as `spec.auth.tenants[0]`.
fn field(pointer: &str) -> String {
    let mut out = String::new();
    for segment in segments(pointer) {
        if segment.bytes().all(|b| b.is_ascii_digit()) {
            out.push_str(&format!("[{segment}]"));
        } else {
            out = child(&out, &segment);
        }
    }
    out
}

fn segments(pointer: &str) -> impl Iterator<Item = String> {
    pointer.split('/').skip(1).map(|s| s.replace("~1", "/").replace("~0", "~"))
}

fn child(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}

fn known_fields(schema: &Value, pointer: &str) -> Vec<String> {
    let mut at = schema.clone();
    for segment in segments(pointer) {
        let next = at.pointer_mut("/properties").and_then(|p| p.get_mut(&segment)).map(Value::take);
        at = next.or_else(|| at.get_mut("items").map(Value::take)).unwrap_or_default();
    }
    at.get("properties").and_then(Value::as_object).map_or_else(Vec::new, |p: &Map<_, _>| p.keys().cloned().collect())
}

/// The nearest known field, if one is near enough to have been meant.
fn suggestion(name: &str, known: &[String]) -> String {
    let lower = name.to_lowercase();
    let near = known.iter().map(|k| (strsim::damerau_levenshtein(&lower, &k.to_lowercase()), k)).min();
    match near {
        Some((distance, field)) if distance <= 2.min(name.len() / 3 + 1) => format!(", did you mean {field}?"),
        _ if known.is_empty() => String::new(),
        _ => format!("; there are {}", known.join(", ")),
    }
}

fn type_name(wanted: JsonType) -> &'static str {
    match wanted {
        JsonType::Array => "a list",
        JsonType::Boolean => "true or false",
        JsonType::Integer => "a whole number",
        JsonType::Null => "null",
        JsonType::Number => "a number",
        JsonType::Object => "an object",
        JsonType::String => "a string",
    }
}

/// A value in a message, cut short.
fn shown(value: &Value) -> String {
    const MOST: usize = 64;
    match value {
        Value::Object(_) => "an object".into(),
        Value::Array(_) => "a list".into(),
        Value::String(text) if text.chars().count() > MOST => {
            format!("\"{}…\"", text.chars().take(MOST).collect::<String>())
        }
        other => other.to_string(),
    }
}

fn list(options: &Value) -> String {
    let items = options.as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|o| o.as_str().map_or_else(|| o.to_string(), str::to_owned)).collect::<Vec<_>>().join(", ")
}

fn plural(count: u64, noun: &str) -> String {
    if count == 1 { noun.to_owned() } else { format!("{noun}s") }
}
