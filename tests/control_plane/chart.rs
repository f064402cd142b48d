//! The chart: what helm says of it, what the API server says of it, and what its roles grant.

use std::fs;

use anyhow::{Context, Result, ensure};
use overlay_tests::operator::{self, CRD, NAMESPACE, helm, helm_template};
use overlay_tests::programs;
use serde_json::Value;

use crate::world::World;

pub(crate) fn lints(world: &World) -> Result<()> {
    let chart = programs::repository().join("charts/overlay-operator");
    helm(&world.plane, &["lint", "--strict", &chart.to_string_lossy()])?;
    Ok(())
}

/// As `helm template | kubectl apply --dry-run=server`, into a namespace that warns of pods that
/// are not restricted.
pub(crate) fn is_accepted(world: &World) -> Result<()> {
    let namespace = "chart-dry-run";
    world.namespace(namespace)?;
    let warn = "pod-security.kubernetes.io/warn=restricted";
    world.admin().run(&["label", "namespace", namespace, warn])?;
    let everything = [
        "--namespace",
        namespace,
        "--set",
        "fullnameOverride=other,priorityClassName=system-cluster-critical,podLabels.a=b,podAnnotations.a=b",
        "--set",
        "nodeSelector.disk=fast,imagePullSecrets[0].name=registry,tolerations[0].operator=Exists",
    ];
    for values in [&["--namespace", namespace][..], &everything] {
        let chart = helm_template(&world.plane, values)?;
        let arguments = ["apply", "--dry-run=server", "--validate=strict", "-f", "-"];
        let outcome = world.admin().try_run(&arguments, Some(&chart))?;
        ensure!(outcome.ok, "{}", outcome.stderr);
        // The CRD was installed by `kubectl apply` before, which is all that kubectl may warn of.
        ensure!(!outcome.stderr.contains("PodSecurity"), "{}", outcome.stderr);
    }
    Ok(())
}

pub(crate) fn values_are_checked(world: &World) -> Result<()> {
    for (nonsense, named) in [
        ("port=70000", "port"),
        ("port=80", "port"),
        ("imagge.tag=1", "imagge"),
        ("image.tga=1", "tga"),
        ("image.repository=", "repository"),
        ("image.digest=sha256:12", "digest"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("daemonImage.pullPolicy=Always", "pullPolicy"),
        ("logging.level=loud", "level"),
        ("logging.format=xml", "format"),
        ("crd.install=maybe", "install"),
        ("trustDomain=Not A Domain", "trustDomain"),
        ("serviceAccount.create=false", "serviceAccount.name"),
        ("replicas=2", "replicas"),
    ] {
        let error = helm_template(&world.plane, &["--set", nonsense]).err().map(|e| format!("{e:#}"));
        let error = error.with_context(|| format!("--set {nonsense} was accepted"))?;
        ensure!(error.contains(named), "--set {nonsense}: the error does not name {named}: {error}");
    }
    Ok(())
}

pub(crate) fn crd_is_the_committed_one_and_is_kept(world: &World) -> Result<()> {
    let root = programs::repository();
    let committed = fs::read_to_string(root.join(CRD))?;
    let name = CRD.rsplit('/').next().context("the CRD's file name")?;
    let shipped = fs::read_to_string(root.join("charts/overlay-operator/files").join(name))?;
    ensure!(committed == shipped, "copy {CRD} to charts/overlay-operator/files");

    let rendered = helm_template(&world.plane, &["--show-only", "templates/crd.yaml"])?;
    let mut rendered = to_json(world, &rendered)?;
    let annotations = rendered["metadata"].as_object_mut().and_then(|m| m.remove("annotations"));
    assert_eq!(annotations, Some(serde_json::json!({"helm.sh/resource-policy": "keep"})));
    assert_eq!(rendered, to_json(world, &committed)?);
    ensure!(!helm_template(&world.plane, &["--set", "crd.install=false"])?.contains("CustomResourceDefinition"));
    Ok(())
}

pub(crate) fn images_by_tag_and_digest(world: &World) -> Result<()> {
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    for (values, expected) in [
        (String::new(), "ghcr.io/rustyonions/overlay-operator:0.1.0".to_owned()),
        ("image.repository=r/o,image.tag=v9".to_owned(), "r/o:v9".to_owned()),
        (format!("image.repository=r/o,image.tag=v9,image.digest={digest}"), format!("r/o@{digest}")),
    ] {
        let text = helm_template(&world.plane, &["--show-only", "templates/deployment.yaml", "--set", &values])?;
        let deployment = to_json(world, &text)?;
        assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["image"], *expected);
    }
    Ok(())
}

/// No wildcard, nothing that grants more than it has, and Secrets are read by name only.
pub(crate) fn rbac_grants_the_least(world: &World) -> Result<()> {
    let label = format!("app.kubernetes.io/instance={}", operator::RELEASE);
    let text = world.admin().run(&["get", "clusterroles,roles", "-n", NAMESPACE, "-l", &label, "-o", "json"])?;
    let roles: Value = serde_json::from_str(&text)?;
    let roles = roles["items"].as_array().context("kubectl printed no list")?;
    assert_eq!(roles.len(), 2, "one ClusterRole and one Role");
    for rule in roles.iter().flat_map(|role| role["rules"].as_array().into_iter().flatten()) {
        let words = |key: &str| rule[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        for word in words("verbs").chain(words("resources")).chain(words("apiGroups")) {
            ensure!(!word.contains('*'), "a wildcard: {rule}");
            ensure!(!["bind", "escalate", "impersonate", "delete", "deletecollection"].contains(&word), "{rule}");
        }
        if words("resources").any(|resource| resource == "secrets") {
            ensure!(words("verbs").all(|verb| !["list", "watch"].contains(&verb)), "{rule}");
        }
    }
    let operator = world.operator.borrow();
    for (verb, resource, allowed) in [
        ("get", "secrets", "yes"),
        ("list", "secrets", "no"),
        ("watch", "secrets", "no"),
        ("watch", "overlaynodes.overlay.rustyonions.io", "yes"),
        ("patch", "overlaynodes.overlay.rustyonions.io", "no"),
        ("create", "pods", "no"),
        ("delete", "statefulsets.apps", "no"),
        ("create", "clusterrolebindings.rbac.authorization.k8s.io", "no"),
        ("create", "serviceaccounts --subresource=token", "no"),
        ("create", "pods --subresource=exec", "no"),
        ("get", "nodes", "no"),
        ("list", "nodes", "yes"),
        ("get", "pods", "yes"),
        ("patch", "podcertificaterequests.certificates.k8s.io", "no"),
        ("approve", "signers.certificates.k8s.io", "no"),
    ] {
        let mut question = vec!["auth", "can-i", "--all-namespaces", verb];
        question.extend(resource.split(' '));
        let outcome = operator.identity().try_run(&question, None)?;
        assert_eq!(outcome.stdout.trim(), allowed, "{verb} {resource}: {}", outcome.stderr);
    }
    Ok(())
}

/// Through kubectl, so that this reads YAML as the cluster does.
fn to_json(world: &World, yaml: &str) -> Result<Value> {
    let arguments = ["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-"];
    Ok(serde_json::from_str(&world.admin().run_with(&arguments, Some(yaml))?)?)
}
