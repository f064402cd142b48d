//! What goes wrong: a restart, a name that is taken, a child that someone changed, a lost CA.

use anyhow::{Context, Result, ensure};
use overlay_tests::operator::NAMESPACE as OPERATOR_NAMESPACE;
use overlay_tests::wait;
use serde_json::{Value, json};

use crate::world::{LIMIT, QUIET, World, find_condition};

pub(crate) fn restart_changes_nothing(world: &World) -> Result<()> {
    let (namespace, name) = ("restart", "steady");
    world.apply_node(namespace, name, "{replicas: 2}")?;
    world.settled(namespace, name)?;
    let ended = world.operator.borrow_mut().stop()?;
    ensure!(ended.success(), "the operator ended with {ended} on SIGTERM");
    let before = world.versions(namespace, name)?;
    world.operator.borrow_mut().start()?;
    let operator = world.operator.borrow();
    wait::until_true("a reconcile after the restart", LIMIT, || {
        Ok(operator.metric("overlay_operator_reconciles_total")? > 0.0)
    })?;
    wait::throughout("nothing is written", QUIET, || Ok(operator.metric("overlay_operator_writes_total")? == 0.0))?;
    assert_eq!(world.versions(namespace, name)?, before);
    Ok(())
}

pub(crate) fn foreign_child_stalls(world: &World) -> Result<()> {
    let (namespace, name) = ("conflict", "taken");
    world.namespace(namespace)?;
    world.admin().run(&["create", "configmap", "-n", namespace, "taken-config", "--from-literal=mine=yes"])?;
    let foreign = world.admin().must_get(namespace, "configmap", "taken-config")?;
    world.apply_node(namespace, name, "{replicas: 1}")?;
    let node = world.condition(namespace, name, "Stalled", ("True", "NameConflict"))?;
    let stalled = find_condition(&node, "Stalled").context("no condition Stalled")?;
    ensure!(stalled["message"].as_str().is_some_and(|m| m.contains("taken-config")), "{stalled}");
    world.condition(namespace, name, "Ready", ("False", "NameConflict"))?;
    assert_eq!(world.admin().must_get(namespace, "configmap", "taken-config")?, foreign, "it was touched");
    ensure!(world.admin().get(namespace, "statefulset", name)?.is_none(), "pods were made beside the conflict");

    world.admin().run(&["delete", "-n", namespace, "configmap", "taken-config"])?;
    world.node_where(namespace, name, "Stalled=False", |node| {
        find_condition(node, "Stalled").is_some_and(|stalled| stalled["status"] == "False")
    })?;
    world.settled(namespace, name)?;
    Ok(())
}

/// One reading of the message is enough to clear the way.
pub(crate) fn every_taken_name_is_told(world: &World) -> Result<()> {
    let (namespace, name) = ("conflicts", "twice");
    world.namespace(namespace)?;
    world.admin().run(&["create", "configmap", "-n", namespace, "twice-config"])?;
    world.admin().run(&["create", "service", "clusterip", "-n", namespace, "twice-peers", "--tcp=80"])?;
    world.apply_node(namespace, name, "{replicas: 1}")?;
    let node = world.condition(namespace, name, "Stalled", ("True", "NameConflict"))?;
    let message = find_condition(&node, "Stalled").context("no condition Stalled")?["message"].to_string();
    ensure!(message.contains("ConfigMap twice-config") && message.contains("Service twice-peers"), "{message}");
    Ok(())
}

/// What runs is given new credentials though its spec cannot be carried out: it would else end
/// within a day.
pub(crate) fn a_stall_keeps_no_mesh_from_its_tokens(world: &World) -> Result<()> {
    let (namespace, name) = ("conflicts", "stalled");
    world.apply_node(namespace, name, "{replicas: 1}")?;
    world.settled(namespace, name)?;
    world.admin().run(&["create", "configmap", "-n", namespace, "somebody"])?;
    let uid = world.admin().must_get(namespace, "configmap", "somebody")?["metadata"]["uid"].clone();
    let owner =
        json!([{ "apiVersion": "v1", "kind": "ConfigMap", "name": "somebody", "uid": uid, "controller": true }]);
    let taken = json!({ "metadata": { "ownerReferences": owner } }).to_string();
    world.admin().run(&["patch", "-n", namespace, "configmap", "stalled-config", "--type=merge", "-p", &taken])?;
    world.apply_node(namespace, name, "{replicas: 2}")?;
    world.condition(namespace, name, "Stalled", ("True", "NameConflict"))?;
    world.admin().run(&["delete", "-n", namespace, "secret", "stalled-token"])?;
    wait::until_true("the tokens to be back", LIMIT, || {
        Ok(world.admin().get(namespace, "secret", "stalled-token")?.is_some())
    })?;
    world.condition(namespace, name, "Stalled", ("True", "NameConflict"))?;
    Ok(())
}

/// Fields that are ours are put back; fields that are not are left.
pub(crate) fn changed_child_is_put_back(world: &World) -> Result<()> {
    let (namespace, name) = ("changed", "drift");
    world.apply_node(namespace, name, "{replicas: 1}")?;
    world.settled(namespace, name)?;
    let others = r#"{"metadata":{"annotations":{"example.com/note":"kept"}}}"#;
    world.admin().run(&["patch", "-n", namespace, "statefulset", name, "--type=merge", "-p", others])?;
    let ours = r#"{"spec":{"publishNotReadyAddresses":false}}"#;
    let peers = format!("{name}-peers");
    world.admin().run(&["patch", "-n", namespace, "service", &peers, "--type=merge", "-p", ours])?;
    world.admin().run(&["delete", "-n", namespace, "configmap", &format!("{name}-config")])?;
    wait::until_true("the children to be as they were", LIMIT, || {
        let service = world.admin().must_get(namespace, "service", &peers)?;
        let config = world.admin().get(namespace, "configmap", &format!("{name}-config"))?;
        Ok(service["spec"]["publishNotReadyAddresses"] == true && config.is_some())
    })?;
    let set = world.admin().must_get(namespace, "statefulset", name)?;
    assert_eq!(set["metadata"]["annotations"]["example.com/note"], "kept");
    Ok(())
}

/// A new CA would cut every running daemon off from every new one: the operator says what is
/// missing and waits for a person. With the Secret back, all goes on.
pub(crate) fn missing_ca_is_never_replaced(world: &World) -> Result<()> {
    let (namespace, name) = ("lost-ca", "orphan");
    world.apply_node(namespace, name, "{replicas: 1}")?;
    world.condition(namespace, name, "TrustReady", ("True", "Issued"))?;
    let mut ca = world.admin().must_get(OPERATOR_NAMESPACE, "secret", "overlay-ca")?;
    world.operator.borrow_mut().stop()?;
    world.admin().run(&["delete", "-n", OPERATOR_NAMESPACE, "secret", "overlay-ca"])?;
    let leaf = world.admin().must_get(namespace, "secret", &format!("{name}-tls"))?;
    world.operator.borrow_mut().start()?;

    let node = world.condition(namespace, name, "TrustReady", ("False", "CAMissing"))?;
    let message = find_condition(&node, "TrustReady").map(|c| c["message"].clone()).unwrap_or_default();
    ensure!(message.as_str().is_some_and(|m| m.contains("overlay-ca")), "does not name the Secret: {message}");
    ensure!(world.admin().get(OPERATOR_NAMESPACE, "secret", "overlay-ca")?.is_none(), "a new CA was made");
    assert_eq!(world.admin().must_get(namespace, "secret", &format!("{name}-tls"))?, leaf, "the leaf was touched");

    ca["metadata"] = kept_metadata(&ca);
    world.admin().run_with(&["create", "-f", "-"], Some(&ca.to_string()))?;
    world.condition(namespace, name, "TrustReady", ("True", "Issued"))?;
    let again = world.admin().must_get(namespace, "secret", &format!("{name}-tls"))?;
    assert_eq!(again["data"]["ca.crt"], ca["data"]["tls.crt"]);
    Ok(())
}

/// What a backup of a Secret keeps.
fn kept_metadata(object: &Value) -> Value {
    let metadata = &object["metadata"];
    json!({
        "name": metadata["name"], "namespace": metadata["namespace"],
        "labels": metadata["labels"], "annotations": metadata["annotations"],
    })
}
