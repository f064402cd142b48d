//! Compares what is wanted with what is there. Decides which objects are sent, and whether a
//! name is taken; never sends anything.
//!
//! Live objects carry what the API server and others added, so equality is "wanted is a
//! subset of live", with quantities by value and the lists that server-side apply merges
//! by their keys. A subset cannot see a field that is no longer wanted: for that every object
//! carries [`DIGEST`], the digest of all that was wanted when it was last applied.

use std::fmt;

use serde_json::{Map, Value, json};

use super::quantity;
use crate::api::{GROUP, KIND};
use crate::build::labels;

/// The annotation with the digest of what was last applied.
pub(super) const DIGEST: &str = "overlay.rustyonions.io/applied";

/// The kinds of object that an OverlayNode owns, in the order in which they are applied:
/// what pods need stands before the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    ServiceAccount,
    Secret,
    ConfigMap,
    Service,
    StatefulSet,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::ServiceAccount, Self::Secret, Self::ConfigMap, Self::Service, Self::StatefulSet];

    /// As `kind` has it.
    #[must_use]
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::ServiceAccount => "ServiceAccount",
            Self::Secret => "Secret",
            Self::ConfigMap => "ConfigMap",
            Self::Service => "Service",
            Self::StatefulSet => "StatefulSet",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An object as it shall be. No `Debug`: a Secret's content is in it.
#[derive(Clone, PartialEq)]
pub(super) struct Wanted {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// The whole of it, as it is applied.
    pub object: Value,
}

impl Wanted {
    /// `object` with its digest noted on it.
    #[must_use]
    pub(super) fn new(kind: Kind, name: String, mut object: Value) -> Self {
        let mut digest = blake3::hash(object.to_string().as_bytes()).to_hex().to_string();
        digest.truncate(16);
        let metadata = entry(&mut object, "metadata");
        let annotations = entry(metadata, "annotations");
        if let Value::Object(annotations) = annotations {
            annotations.insert(DIGEST.to_owned(), Value::String(digest));
        }
        Self { kind, name, object }
    }
}

fn entry<'a>(object: &'a mut Value, key: &str) -> &'a mut Value {
    if !object.get(key).is_some_and(Value::is_object) {
        object[key] = json!({});
    }
    &mut object[key]
}

/// Who is asking.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner<'a> {
    /// The OverlayNode's name.
    pub name: &'a str,
    /// And which of the OverlayNodes that ever had that name it is.
    pub uid: &'a str,
}

/// What stands in the way of applying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// The name is somebody else's.
    Taken {
        /// Of the object that has it.
        kind: Kind,
        /// The name.
        name: String,
        /// Whose it is, where that is known.
        by: Option<String>,
    },
    /// A deleted OverlayNode of this name left it, and the garbage collector has not come by yet.
    Leftover {
        /// Of the object.
        kind: Kind,
        /// Its name.
        name: String,
    },
}

/// Which of `wanted` must be sent, given the live object for each in the same order.
///
/// # Errors
/// Every object whose name is not free for us.
pub(super) fn plan<'a>(
    wanted: &'a [Wanted],
    live: &[Option<Value>],
    owner: Owner<'_>,
) -> Result<Vec<&'a Wanted>, Vec<Obstacle>> {
    let mut send = Vec::new();
    let mut obstacles = Vec::new();
    for (wanted, live) in wanted.iter().zip(live) {
        match live {
            None => send.push(wanted),
            Some(live) => match check_owner(wanted, live, owner) {
                Err(obstacle) => obstacles.push(obstacle),
                Ok(()) if is_subset(&wanted.object, live) => {}
                Ok(()) => send.push(wanted),
            },
        }
    }
    if obstacles.is_empty() { Ok(send) } else { Err(obstacles) }
}

fn check_owner(wanted: &Wanted, live: &Value, owner: Owner<'_>) -> Result<(), Obstacle> {
    let (kind, name) = (wanted.kind, wanted.name.clone());
    let references = live.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let controller = references.into_iter().flatten().find(|r| r["controller"] == true);
    let Some(controller) = controller else {
        let ours = live["metadata"]["labels"][labels::NAME] == *owner.name;
        return if ours { Ok(()) } else { Err(Obstacle::Taken { kind, name, by: None }) };
    };
    if controller["uid"] == *owner.uid {
        return Ok(());
    }
    let text = |key: &str| controller[key].as_str().unwrap_or_default().to_owned();
    let group = text("apiVersion").split_once('/').map(|(group, _)| group.to_owned());
    if text("kind") == KIND && text("name") == owner.name && group.as_deref() == Some(GROUP) {
        return Err(Obstacle::Leftover { kind, name });
    }
    Err(Obstacle::Taken { kind, name, by: Some(format!("{}/{}", text("kind"), text("name"))) })
}

/// Whether all that `wanted` says holds in `live`.
#[must_use]
pub(super) fn is_subset(wanted: &Value, live: &Value) -> bool {
    subset(wanted, live, "", "")
}

/// `field` is the key that holds the value, `parent` the one that holds that.
fn subset(wanted: &Value, live: &Value, field: &str, parent: &str) -> bool {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => object_subset(wanted, live, field),
        (Value::Array(wanted), Value::Array(live)) => array_subset(wanted, live, field, parent),
        (Value::String(a), Value::String(b)) if is_quantity(field, parent) => quantity::equal(a, b),
        _ => wanted == live,
    }
}

fn object_subset(wanted: &Map<String, Value>, live: &Map<String, Value>, field: &str) -> bool {
    wanted.iter().all(|(key, wanted)| match live.get(key) {
        Some(live) => subset(wanted, live, key, field),
        // The API server leaves out what is empty.
        None => match wanted {
            Value::Null => true,
            Value::String(s) => s.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            _ => false,
        },
    })
}

fn array_subset(wanted: &[Value], live: &[Value], field: &str, parent: &str) -> bool {
    match merge_keys(field) {
        Some(keys) => wanted.iter().all(|w| {
            let same = |l: &&Value| keys.iter().all(|k| w[*k] == l[*k]);
            live.iter().find(same).is_some_and(|l| subset(w, l, field, parent))
        }),
        None => wanted.len() == live.len() && wanted.iter().zip(live).all(|(w, l)| subset(w, l, field, parent)),
    }
}

/// The lists that server-side apply merges, of those that we set, and what tells their
/// items apart; every other list is ours as a whole.
fn merge_keys(field: &str) -> Option<&'static [&'static str]> {
    Some(match field {
        "containers" | "env" | "imagePullSecrets" | "ports" | "volumes" => &["name"],
        "volumeMounts" => &["mountPath"],
        "ownerReferences" => &["uid"],
        _ => return None,
    })
}

fn is_quantity(field: &str, parent: &str) -> bool {
    matches!(parent, "limits" | "requests") || field == "sizeLimit"
}

#[cfg(test)]
mod tests;
