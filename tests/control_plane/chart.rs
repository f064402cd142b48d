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
    let alone = ["--namespace", namespace, "--set", "replicas=1,fullnameOverride=alone"];
    for values in [&["--namespace", namespace][..], &everything, &alone] {
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
        ("daemonImage.pullPolicy=Sometimes", "pullPolicy"),
        ("logging.level=loud", "level"),
        ("logging.format=xml", "format"),
        ("crd.install=maybe", "install"),
        ("trustDomain=Not A Domain", "trustDomain"),
        ("serviceAccount.create=false", "serviceAccount.name"),
        ("replicas=-1", "replicas"),
        ("replicas=two", "replicas"),
        ("monitoring.enabled=perhaps", "enabled"),
        ("monitoring.interval=soon", "interval"),
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
    let daemon = format!("daemonImage.repository=r/d,daemonImage.tag=v9,daemonImage.digest={digest}");
    for (values, expected) in [
        ("replicas=2".to_owned(), vec!["--daemon-image=ghcr.io/rustyonions/overlay-daemon:0.1.0".to_owned()]),
        (
            format!("{daemon},daemonImage.pullPolicy=Never"),
            vec![format!("--daemon-image=r/d@{digest}"), "--daemon-image-pull-policy=Never".to_owned()],
        ),
    ] {
        let text = helm_template(&world.plane, &["--show-only", "templates/deployment.yaml", "--set", &values])?;
        let deployment = to_json(world, &text)?;
        let arguments =
            deployment["spec"]["template"]["spec"]["containers"][0]["args"].as_array().context("no args")?;
        let about = |argument: &&Value| argument.as_str().is_some_and(|a| a.starts_with("--daemon-image"));
        assert_eq!(arguments.iter().filter(about).cloned().collect::<Vec<_>>(), expected);
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
        if words("resources").any(|resource| resource == "leases") && words("verbs").any(|verb| verb != "create") {
            ensure!(words("resourceNames").eq(["overlay-operator"]), "any Lease: {rule}");
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
        ("list", "pods", "yes"),
        ("list", "events", "yes"),
        ("create", "events", "no"),
        ("update", "leases.coordination.k8s.io", "no"),
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

/// What stands only where it is asked for.
pub(crate) fn monitors_and_replicas(world: &World) -> Result<()> {
    let plain = documents(world, &[])?;
    let one = documents(world, &["--set", "replicas=1"])?;
    let find = |all: &[Value], kind: &str| all.iter().find(|document| document["kind"] == kind).cloned();
    let deployment = find(&plain, "Deployment").context("no Deployment")?;
    assert_eq!(
        (&deployment["spec"]["replicas"], &deployment["spec"]["strategy"]["type"]),
        (&2.into(), &"RollingUpdate".into())
    );
    let pod = &deployment["spec"]["template"]["spec"];
    let spread = &pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0];
    assert_eq!(spread["podAffinityTerm"]["labelSelector"], deployment["spec"]["selector"]);
    let budget = find(&plain, "PodDisruptionBudget").context("no PodDisruptionBudget")?;
    assert_eq!(
        (&budget["spec"]["maxUnavailable"], &budget["spec"]["selector"]),
        (&1.into(), &deployment["spec"]["selector"])
    );
    ensure!(find(&one, "PodDisruptionBudget").is_none(), "a budget over one pod stops every drain");
    ensure!(find(&plain, "PodMonitor").is_none() && find(&plain, "ServiceMonitor").is_none());

    let set = "monitoring.enabled=true,monitoring.interval=30s,monitoring.labels.release=prometheus,metrics.service.create=false";
    let all = documents(world, &["--set", set])?;
    let (pods, operator) = (find(&all, "PodMonitor").context("none")?, find(&all, "ServiceMonitor").context("none")?);
    for monitor in [&pods, &operator] {
        assert_eq!(
            (&monitor["apiVersion"], &monitor["metadata"]["labels"]["release"]),
            (&"monitoring.coreos.com/v1".into(), &"prometheus".into())
        );
    }
    assert_eq!(pods["spec"]["namespaceSelector"]["any"], true);
    let endpoint = &pods["spec"]["podMetricsEndpoints"][0];
    assert_eq!((&endpoint["port"], &endpoint["interval"]), (&"overlay-admin".into(), &"30s".into()));
    let labels = pods["spec"]["selector"]["matchLabels"].as_object().context("it selects by no label")?;
    world.apply_node("monitored", "seen", "{replicas: 1}")?;
    let set = world.settled("monitored", "seen")?["StatefulSet/seen"].clone();
    let template = &set["spec"]["template"];
    ensure!(labels.iter().all(|(key, value)| template["metadata"]["labels"][key] == *value), "{labels:?}");
    ensure!(
        template["spec"]["containers"][0]["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|p| p["name"] == endpoint["port"])
    );
    let service = find(&all, "Service").context("the ServiceMonitor has no Service")?;
    let selected = operator["spec"]["selector"]["matchLabels"].as_object().context("it selects by no label")?;
    ensure!(selected.iter().all(|(key, value)| service["metadata"]["labels"][key] == *value), "{selected:?}");
    assert_eq!(operator["spec"]["endpoints"][0]["port"], service["spec"]["ports"][0]["name"]);
    Ok(())
}

/// The CRD outlives the release; the same release goes on with it, and another is told how to.
pub(crate) fn is_installed_again(world: &World) -> Result<()> {
    world.apply_node("kept", "kept", "{replicas: 1}")?;
    let chart = programs::repository().join("charts/overlay-operator");
    let chart = chart.to_string_lossy();
    let install = |release: &str, namespace: &str| {
        // No operator beside the one of these cases.
        let arguments = ["install", release, &*chart, "-n", namespace, "--create-namespace", "--set", "replicas=0"];
        helm(&world.plane, &arguments)
    };
    let refused = |release: &str, namespace: &str, named: &str| {
        let error = install(release, namespace).err().map(|e| format!("{e:#}")).context("helm took the CRD over")?;
        ensure!(error.contains(named) && error.contains("crd.install=false"), "{error}");
        // The commands that the message gives, as they stand there.
        let commands: Vec<&str> = error.lines().filter_map(|line| line.trim().strip_prefix("kubectl ")).collect();
        ensure!(!commands.is_empty(), "no command in: {error}");
        commands.iter().try_for_each(|c| world.admin().run(&c.split_whitespace().collect::<Vec<_>>()).map(|_| ()))
    };
    // The operator of these cases is one, though no release of helm's: another is refused beside it.
    let beside = install("first", "helm-first").err().map(|e| format!("{e:#}")).context("helm installed a second")?;
    let theirs = format!("release {} in namespace {NAMESPACE}", operator::RELEASE);
    ensure!(beside.contains(&theirs), "{beside}");
    let label = |label: &str| {
        let arguments = ["label", "deployment", "overlay-operator", "-n", NAMESPACE, "--overwrite", label];
        world.admin().run(&arguments)
    };
    label("app.kubernetes.io/name=overlooked")?;
    refused("first", "helm-first", "was not installed by helm")?;
    install("first", "helm-first")?;
    for release in ["first", "second"] {
        let namespace = format!("helm-{release}");
        if release == "second" {
            refused(release, &namespace, "release first in namespace helm-first")?;
            install(release, &namespace)?;
        }
        helm(&world.plane, &["uninstall", release, "-n", &namespace, "--wait"])?;
        world.admin().must_get("kept", "overlaynode", "kept")?;
        install(release, &namespace)?;
        helm(&world.plane, &["uninstall", release, "-n", &namespace, "--wait"])?;
    }
    label("app.kubernetes.io/name=overlay-operator")?;
    Ok(())
}

/// The rendered chart without its CRD.
fn documents(world: &World, arguments: &[&str]) -> Result<Vec<Value>> {
    let text = helm_template(&world.plane, &[&["--set", "crd.install=false"], arguments].concat())?;
    text.split("\n---\n").filter(|part| part.contains("kind:")).map(|part| Ok(serde_yaml::from_str(part)?)).collect()
}

/// Through kubectl, so that this reads YAML as the cluster does.
fn to_json(world: &World, yaml: &str) -> Result<Value> {
    let arguments = ["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-"];
    Ok(serde_json::from_str(&world.admin().run_with(&arguments, Some(yaml))?)?)
}
