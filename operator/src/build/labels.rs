//! The labels and annotations that objects of an OverlayNode carry. Constants and maps;
//! decides nothing else.

use std::collections::BTreeMap;

/// The OverlayNode that something belongs to.
pub const NAME: &str = "overlay.rustyonions.io/name";
/// The standard label of who manages an object.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Its value, and the field manager of everything that is applied.
pub const OPERATOR: &str = "overlay-operator";
/// The annotation of a pod template with the hash of what takes a restart to change: another
/// one rolls the pods.
pub const RESTART_HASH: &str = "overlay.rustyonions.io/restart-hash";
/// The annotation of a pod with the hash of what was last written for it, and how often it was
/// told: another value has the kubelet refresh the pod's volumes at once, rather than within a
/// minute or two.
pub const CONFIG_HASH: &str = "overlay.rustyonions.io/config-hash";

/// Labels of everything that belongs to the OverlayNode `name`.
#[must_use]
pub fn labels(name: &str) -> BTreeMap<String, String> {
    let mut labels = selector(name);
    for (key, value) in [
        ("app.kubernetes.io/component", "daemon"),
        ("app.kubernetes.io/instance", name),
        ("app.kubernetes.io/part-of", "overlay"),
        (MANAGED_BY, OPERATOR),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    labels
}

/// The labels that its pods are selected by; they can never change.
#[must_use]
pub fn selector(name: &str) -> BTreeMap<String, String> {
    [("app.kubernetes.io/name", "overlay-daemon"), (NAME, name)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// [`selector`] as `kubectl -l` takes it.
#[must_use]
pub fn selector_text(name: &str) -> String {
    selector(name).iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}
