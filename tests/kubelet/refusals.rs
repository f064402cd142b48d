//! What stands only in pods' statuses and events shows in `kubectl get overlaynode`, within ten
//! seconds of the first refusal, with a reason and a message that name the cause; and goes
//! when the cause does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use overlay_tests::wait::{self, Look};
use serde_json::Value;

use crate::world::{LIMIT, SOON, World};

/// A tag that no registry has, since no registry is reachable.
pub(crate) fn an_image_that_is_not_there_shows(world: &World) -> Result<()> {
    world.restricted_namespace("no-image")?;
    world.apply_node("no-image", "broken", "{replicas: 1, image: {tag: never-built}, drain: {delay: 0s}}")?;
    shows(world, "no-image", "broken", "ImagePullFailed", &["overlay-daemon:never-built"], |event| {
        event["reason"] == "Failed"
    })?;
    world.kubectl(r#"patch overlaynode broken -n no-image --type=json -p [{"op":"remove","path":"/spec/image"}]"#)?;
    world.wait_ready("no-image", "broken")?;
    world.kubectl("delete namespace no-image --wait=false").map(|_| ())
}

pub(crate) fn a_quota_of_zero_pods_shows(world: &World) -> Result<()> {
    world.restricted_namespace("no-pods")?;
    world.kubectl("create quota none --hard=pods=0 -n no-pods")?;
    world.apply_node("no-pods", "refused", "{replicas: 1, drain: {delay: 0s}}")?;
    shows(world, "no-pods", "refused", "QuotaExceeded", &["exceeded quota: none"], |event| {
        event["reason"] == "FailedCreate"
    })?;
    world.kubectl("delete quota none -n no-pods")?;
    world.wait_ready("no-pods", "refused")?;
    world.kubectl("delete namespace no-pods --wait=false").map(|_| ())
}

/// The daemons' pods fit the restricted standard, so a policy of the namespace's own is what
/// refuses them.
pub(crate) fn a_namespace_that_refuses_the_pod_shows(world: &World) -> Result<()> {
    world.restricted_namespace("walled")?;
    world.admin().apply("walled", POLICY)?;
    // The API server takes a moment to enforce it.
    world.until("the policy to be enforced", LIMIT, || {
        let outcome = world.admin().try_run(&["create", "-n", "walled", "--dry-run=server", "-f", "-"], Some(POD))?;
        Ok(if outcome.stderr.contains("not welcome") { Look::Holds(()) } else { Look::NotYet(outcome.stderr) })
    })?;
    world.apply_node("walled", "refused", "{replicas: 1, drain: {delay: 0s}}")?;
    shows(world, "walled", "refused", "AdmissionDenied", &["not welcome"], |event| event["reason"] == "FailedCreate")?;
    world.kubectl("delete validatingadmissionpolicybinding walled")?;
    world.wait_ready("walled", "refused")?;
    world.kubectl("delete namespace walled --wait=false").map(|_| ())
}

/// A pod that fits the restricted standard.
const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: probe}
spec:
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: probe
      image: localhost/pause:1
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
";

const POLICY: &str = "
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: walled}
spec:
  matchConstraints:
    resourceRules:
      - {apiGroups: [''], apiVersions: [v1], operations: [CREATE], resources: [pods]}
  validations:
    - {expression: 'false', message: not welcome}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: walled}
spec:
  policyName: walled
  validationActions: [Deny]
  matchResources:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: walled}}
";

/// Waits for the first refusal among the events, and from then on not longer than promised for
/// the columns to say so.
fn shows(
    world: &World,
    namespace: &str,
    name: &str,
    reason: &str,
    words: &[&str],
    refusal: impl Fn(&Value) -> bool,
) -> Result<()> {
    world.until("the first refusal", LIMIT, || {
        let text = world.kubectl(&format!("get events -n {namespace} -o json"))?;
        let list: Value = serde_json::from_str(&text)?;
        let refused = list["items"].as_array().context("no list")?.iter().any(&refusal);
        Ok(if refused { Look::Holds(()) } else { Look::NotYet(world.state(namespace)) })
    })?;
    let row = wait::until("the refusal to show", SOON + Duration::from_secs(1), || {
        let row = world.kubectl(&format!("get overlaynode {name} -n {namespace}"))?;
        Ok(if row.contains(reason) { Look::Holds(row) } else { Look::NotYet(row) })
    })?;
    for word in words {
        ensure!(row.contains(word), "the message names {word}: {row}");
    }
    Ok(())
}
