//! Pods that the API server refuses: the OverlayNode says so, and only for as long as it does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use overlay_tests::wait;
use serde_json::{Value, json};

use crate::world::{LIMIT, World, find_condition};

/// From the first refusal to the message.
const TOLD_WITHIN: Duration = Duration::from_secs(10);

pub(crate) fn quota_is_told_while_it_lasts(world: &World) -> Result<()> {
    let (namespace, name) = ("quota", "full");
    world.namespace(namespace)?;
    world.admin().run(&["create", "quota", "-n", namespace, "none", "--hard=pods=0"])?;
    wait::until_true("the quota to be in force", LIMIT, || {
        Ok(world.admin().must_get(namespace, "resourcequota", "none")?["status"]["hard"]["pods"] == "0")
    })?;
    let told = refused(world, namespace, name, "QuotaExceeded")?;
    ensure!(told.contains("2 pods cannot be created") && told.contains("exceeded quota: none"), "{told}");
    let columns = world.admin().run(&["get", "overlaynode", "-n", namespace, name])?;
    ensure!(columns.contains("QuotaExceeded") && columns.contains("exceeded quota: none"), "{columns}");

    world.admin().run(&["delete", "quota", "-n", namespace, "none"])?;
    gone(world, namespace, name)
}

pub(crate) fn refused_pods_are_told(world: &World) -> Result<()> {
    let (namespace, name) = ("refused", "unwanted");
    // No label of Pod Security: a pod made by hand shall come as far as the policy.
    world.admin().run(&["create", "namespace", namespace])?;
    world.admin().apply("default", &policy(namespace).to_string())?;
    wait::until_true("the policy to be in force", LIMIT, || {
        let run = ["run", "probe", "-n", namespace, "--image=none", "--dry-run=server"];
        Ok(world.admin().try_run(&run, None)?.stderr.contains("no pods on Sundays"))
    })?;
    let told = refused(world, namespace, name, "AdmissionDenied")?;
    ensure!(told.contains("no pods on Sundays"), "{told}");

    world.admin().run(&["delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", "no-pods"])?;
    gone(world, namespace, name)
}

/// Makes an OverlayNode whose pods are refused, and gives what is told of it.
fn refused(world: &World, namespace: &str, name: &str, reason: &str) -> Result<String> {
    world.apply_node(namespace, name, "{replicas: 2}")?;
    wait::until_true("the first refusal", LIMIT, || {
        let events = ["get", "events", "-n", namespace, "--field-selector=reason=FailedCreate", "-o", "name"];
        Ok(!world.admin().run(&events)?.is_empty())
    })?;
    let from = wait::now();
    let node = world.condition(namespace, name, "Ready", ("False", reason))?;
    let took = from.elapsed();
    ensure!(took < TOLD_WITHIN, "told {took:?} after the first refusal");
    for (kind, expected) in [("Reconciling", ("True", reason)), ("Stalled", ("False", "NotStalled"))] {
        let condition = find_condition(&node, kind).with_context(|| format!("no condition {kind}"))?;
        assert_eq!((&condition["status"], &condition["reason"]), (&json!(expected.0), &json!(expected.1)));
    }
    let ready = find_condition(&node, "Ready").context("no condition Ready")?;
    Ok(ready["message"].as_str().unwrap_or_default().to_owned())
}

/// The pods are made, and nothing is told of the past though its events still stand.
fn gone(world: &World, namespace: &str, name: &str) -> Result<()> {
    world.condition(namespace, name, "Ready", ("False", "Progressing"))?;
    world.settled(namespace, name)?;
    let node: Value = world.condition(namespace, name, "Ready", ("False", "Progressing"))?;
    let ready = find_condition(&node, "Ready").context("no condition Ready")?;
    assert_eq!(ready["message"], "0 of 2 daemons are ready");
    Ok(())
}

fn policy(namespace: &str) -> Value {
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": { "name": "no-pods" },
        "spec": {
            "matchConstraints": { "resourceRules": [
                { "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"] },
            ] },
            "validations": [{ "expression": "false", "message": "no pods on Sundays" }],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": { "name": "no-pods" },
        "spec": {
            "policyName": "no-pods", "validationActions": ["Deny"],
            "matchResources": { "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": namespace } } },
        },
    });
    json!({ "apiVersion": "v1", "kind": "List", "items": [policy, binding] })
}
