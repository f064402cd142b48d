//! A text of manifests, document by document; all that is wrong in any is reported.

use serde_json::Value;

use super::schema::{self, Finding};
use super::yaml::{self, Part};
use super::{Admitted, ManifestError};
use crate::api::{API_VERSION, GROUP, KIND, OverlayNode};
use crate::build::names::DEFAULT_NAMESPACE;

/// The OverlayNodes of a text of YAML documents, with their defaults. `source` is what the
/// text is called in errors.
///
/// # Errors
/// Everything that `kubectl apply` would refuse, and documents that are not OverlayNodes.
pub fn documents(text: &str, source: &str) -> Result<Vec<Admitted>, Vec<ManifestError>> {
    let parts = yaml::split(text.strip_prefix('\u{feff}').unwrap_or(text));
    if parts.is_empty() {
        let message = format!("there is no document; expected at least one {KIND} of {API_VERSION}");
        return Err(vec![error(source, 0, None, Finding { field: String::new(), message })]);
    }
    let (mut admitted, mut errors) = (Vec::new(), Vec::new());
    for (index, part) in parts.iter().enumerate() {
        match document(part, source, index + 1) {
            Ok(one) => admitted.push(one),
            Err(more) => errors.extend(more),
        }
    }
    if errors.is_empty() { Ok(admitted) } else { Err(errors) }
}

fn document(part: &Part<'_>, source: &str, number: usize) -> Result<Admitted, Vec<ManifestError>> {
    let read = part
        .read()
        .map_err(|e| vec![error(source, number, e.line, Finding { field: String::new(), message: e.message })])?;
    let located = |finding: Finding| {
        let line = nearest(&finding.field, |path| read.lines.get(path).copied()).or(Some(part.first));
        error(source, number, line, finding)
    };
    let all = |findings: Vec<Finding>| findings.into_iter().map(&located).collect::<Vec<_>>();
    let object = identify(read.value.clone()).map_err(|finding| all(vec![finding]))?;
    let object = schema::check(object).map_err(all)?;
    let mut node: OverlayNode = serde_json::from_value(object)
        .map_err(|e| all(vec![Finding { field: String::new(), message: e.to_string() }]))?;
    let namespace = node.metadata.namespace.take().filter(|ns| !ns.is_empty());
    node.metadata.namespace = Some(namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()));
    Ok(Admitted { node, document: number, line: part.first })
}

/// Checks that it is an OverlayNode at all, and drops what only a server writes.
fn identify(mut value: Value) -> Result<Value, Finding> {
    let finding = |field: &str, message: String| Err(Finding { field: field.to_owned(), message });
    let Some(object) = value.as_object_mut() else {
        return finding("", format!("must be an object with apiVersion: {API_VERSION} and kind: {KIND}"));
    };
    for (field, wanted) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        match object.get(field).and_then(Value::as_str) {
            Some(found) if found == wanted => {}
            Some(found) if field == "apiVersion" && found.starts_with(GROUP) => {
                return finding(field, format!("version {found:?} is not known, it is {wanted}"));
            }
            Some(found) => {
                return finding(
                    field,
                    format!("must be {wanted}, not {found:?}: only {KIND} resources can be used here"),
                );
            }
            None => return finding(field, format!("is required: {wanted}")),
        }
    }
    if object.get("metadata").and_then(|m| m.get("generateName")).is_some_and(|name| !name.is_null()) {
        return finding("metadata.generateName", "cannot be used with apply; give metadata.name".into());
    }
    object.remove("status");
    Ok(value)
}

/// The line of a field, or of what it would stand in.
fn nearest(field: &str, line: impl Fn(&str) -> Option<usize>) -> Option<usize> {
    let mut path = field;
    loop {
        if let Some(found) = line(path) {
            return Some(found);
        }
        path = &path[..path.rfind(['.', '['])?];
    }
}

fn error(source: &str, document: usize, line: Option<usize>, finding: Finding) -> ManifestError {
    ManifestError { source: source.to_owned(), document, line, field: finding.field, message: finding.message }
}
