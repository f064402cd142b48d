//! What the cases share: one control plane with the operator installed, and how they look at it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use overlay_tests::control_plane::ControlPlane;
use overlay_tests::kubectl::Kubectl;
use overlay_tests::operator::Operator;
use overlay_tests::wait::{self, Look};
use serde_json::Value;

/// How long the operator or a controller may take for one step.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// For how long something must not happen.
pub(crate) const QUIET: Duration = Duration::from_secs(3);

/// The kinds that an OverlayNode owns.
pub(crate) const CHILD_KINDS: &str = "serviceaccounts,secrets,configmaps,services,statefulsets.apps";

pub(crate) struct World {
    // Before the control plane, so that it ends before its API server does.
    pub(crate) operator: RefCell<Operator>,
    pub(crate) plane: ControlPlane,
}

impl World {
    pub(crate) fn start() -> Result<Self> {
        let plane = ControlPlane::start()?;
        let operator = Operator::install(&plane)?;
        Ok(Self { operator: RefCell::new(operator), plane })
    }

    pub(crate) fn admin(&self) -> &Kubectl {
        self.plane.admin()
    }

    /// A namespace that admits only restricted pods, and no object of the operator's in it yet.
    /// One that another case has made already is taken as it is.
    pub(crate) fn namespace(&self, name: &str) -> Result<()> {
        if self.admin().get("default", "namespace", name)?.is_none() {
            self.admin().run(&["create", "namespace", name])?;
            self.admin().run(&["label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"])?;
        }
        // Pods are refused until the controller manager has made it.
        wait::until_true("the default service account", LIMIT, || {
            Ok(self.admin().get(name, "serviceaccount", "default")?.is_some())
        })
    }

    /// Applies an OverlayNode, and waits until the operator has seen this generation of it.
    pub(crate) fn apply_node(&self, namespace: &str, name: &str, spec: &str) -> Result<Value> {
        self.namespace(namespace)?;
        let manifest = format!(
            "{{apiVersion: overlay.rustyonions.io/v1alpha1, kind: OverlayNode, metadata: {{name: {name}}}, spec: {spec}}}"
        );
        self.admin().apply(namespace, &manifest)?;
        self.observed(namespace, name)
    }

    /// The OverlayNode, once its status is about the generation that stands.
    pub(crate) fn observed(&self, namespace: &str, name: &str) -> Result<Value> {
        self.node_where(namespace, name, "its generation to be observed", |node| {
            node["status"]["observedGeneration"] == node["metadata"]["generation"]
        })
    }

    /// The OverlayNode, once its condition `kind` has this status and reason.
    pub(crate) fn condition(&self, namespace: &str, name: &str, kind: &str, expected: (&str, &str)) -> Result<Value> {
        let what = format!("{kind}={}/{}", expected.0, expected.1);
        self.node_where(namespace, name, &what, |node| {
            find_condition(node, kind).is_some_and(|c| c["status"] == expected.0 && c["reason"] == expected.1)
        })
    }

    /// The OverlayNode, once `holds` says so.
    pub(crate) fn node_where(
        &self,
        namespace: &str,
        name: &str,
        what: &str,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        wait::until(&format!("overlaynode {namespace}/{name}: {what}"), LIMIT, || {
            let node = self.admin().must_get(namespace, "overlaynode", name)?;
            Ok(if holds(&node) { Look::Holds(node) } else { Look::NotYet(node["status"].to_string()) })
        })
        .map_err(|error| anyhow!("{error:#}\nthe operator's log ends:\n{}", tail(&self.operator.borrow().log())))
    }

    /// `KIND/NAME` of all that belongs to an OverlayNode, by its label.
    pub(crate) fn children(&self, namespace: &str, name: &str) -> Result<BTreeMap<String, Value>> {
        let label = format!("overlay.rustyonions.io/name={name}");
        let text = self.admin().run(&["get", "-n", namespace, CHILD_KINDS, "-l", &label, "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        let items = list["items"].as_array().context("kubectl printed no list")?;
        let id = |item: &Value| Some(format!("{}/{}", item["kind"].as_str()?, item["metadata"]["name"].as_str()?));
        items.iter().map(|item| Ok((id(item).context("an item without kind or name")?, item.clone()))).collect()
    }

    /// The children, once the controllers have done all that they can without a kubelet: every
    /// pod exists, and the operator has said so in the status.
    pub(crate) fn settled(&self, namespace: &str, name: &str) -> Result<BTreeMap<String, Value>> {
        self.node_where(namespace, name, "all pods to exist", |node| {
            node["status"]["observedGeneration"] == node["metadata"]["generation"]
                && node["status"]["replicas"] == node["spec"]["replicas"]
                && node["status"]["updatedReplicas"] == node["spec"]["replicas"]
        })?;
        self.children(namespace, name)
    }

    /// How often anything of an OverlayNode has been written, by object.
    pub(crate) fn versions(&self, namespace: &str, name: &str) -> Result<BTreeMap<String, Value>> {
        let mut objects = self.children(namespace, name)?;
        objects.insert("OverlayNode".to_owned(), self.admin().must_get(namespace, "overlaynode", name)?);
        Ok(objects.into_iter().map(|(id, object)| (id, object["metadata"]["resourceVersion"].clone())).collect())
    }
}

pub(crate) fn find_condition<'a>(node: &'a Value, kind: &str) -> Option<&'a Value> {
    node["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)
}

/// The last lines of a log, each cut to what tells them apart.
fn tail(log: &str) -> String {
    let lines: Vec<String> = log.lines().rev().take(8).map(|line| line.chars().take(240).collect()).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}
