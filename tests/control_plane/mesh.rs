//! `deploy/examples/mesh.yaml`: what the API server holds of it, from apply to delete.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use overlay_tests::kubectl::Kubectl;
use overlay_tests::operator;
use overlay_tests::programs;
use overlay_tests::trust::Authority;
use overlay_tests::wait::{self, Look};
use serde_json::{Value, json};

use crate::world::{LIMIT, QUIET, World, find_condition};

const NAMESPACE: &str = "mesh";

/// Applies the example as a reader of it would, and gives the name of its first OverlayNode.
fn example(world: &World) -> Result<String> {
    world.namespace(NAMESPACE)?;
    let file = programs::repository().join("deploy/examples/mesh.yaml");
    let applied = world.admin().run(&["apply", "-n", NAMESPACE, "-o", "name", "-f", &file.to_string_lossy()])?;
    let name = applied.lines().find_map(|line| line.strip_prefix("overlaynode.overlay.rustyonions.io/"));
    let name = name.with_context(|| format!("no OverlayNode in {}: {applied}", file.display()))?.to_owned();
    world.settled(NAMESPACE, &name)?;
    Ok(name)
}

pub(crate) fn crd_is_established_and_named(world: &World) -> Result<()> {
    let file = programs::repository().join(overlay_tests::operator::CRD);
    let bytes = fs::metadata(&file)?.len();
    ensure!(bytes < 200 * 1024, "{} is {bytes} bytes, too large for `kubectl apply`", file.display());
    let crd = world.admin().must_get("default", "crd", "overlaynodes.overlay.rustyonions.io")?;
    let conditions = crd["status"]["conditions"].as_array().context("no conditions")?;
    ensure!(conditions.iter().any(|condition| condition["type"] == "Established"), "{conditions:?}");
    for condition in conditions {
        let expected = if condition["type"] == "NonStructuralSchema" { "False" } else { "True" };
        assert_eq!(condition["status"], expected, "{condition}");
    }
    world.namespace(NAMESPACE)?;
    for name in ["overlaynodes", "overlaynode", "onode", "overlay", "OverlayNode"] {
        world.admin().run(&["get", "-n", NAMESPACE, name])?;
    }
    Ok(())
}

pub(crate) fn objects_and_owners(world: &World) -> Result<()> {
    let name = example(world)?;
    let node = world.admin().must_get(NAMESPACE, "overlaynode", &name)?;
    let children = world.settled(NAMESPACE, &name)?;
    let expected = [
        format!("ConfigMap/{name}-config"),
        format!("Secret/{name}-tls"),
        format!("Secret/{name}-token"),
        format!("Service/{name}"),
        format!("Service/{name}-peers"),
        format!("ServiceAccount/{name}"),
        format!("StatefulSet/{name}"),
    ];
    assert_eq!(children.keys().cloned().collect::<Vec<_>>(), expected);
    for (id, child) in &children {
        let owners = child["metadata"]["ownerReferences"].as_array().with_context(|| format!("{id} has no owner"))?;
        assert_eq!(owners.len(), 1, "{id}");
        assert_eq!(owners[0]["uid"], node["metadata"]["uid"], "{id}");
        assert_eq!(owners[0]["kind"], "OverlayNode", "{id}");
        assert_eq!(owners[0]["apiVersion"], "overlay.rustyonions.io/v1alpha1", "{id}");
        assert_eq!(owners[0]["controller"], true, "{id}");
        assert_eq!(child["metadata"]["labels"]["app.kubernetes.io/managed-by"], "overlay-operator", "{id}");
    }
    let account = &children[&format!("ServiceAccount/{name}")];
    assert_eq!(account["automountServiceAccountToken"], false);
    let peers = &children[&format!("Service/{name}-peers")]["spec"];
    assert_eq!((&peers["clusterIP"], &peers["publishNotReadyAddresses"]), (&json!("None"), &json!(true)));
    let set = &children[&format!("StatefulSet/{name}")]["spec"];
    assert_eq!(
        (&set["podManagementPolicy"], &set["serviceName"]),
        (&json!("Parallel"), &json!(format!("{name}-peers")))
    );
    for (secret, keys) in [("tls", ["ca.crt", "tls.crt", "tls.key"]), ("token", ["local", "peer", "token-keys.json"])] {
        let data = children[&format!("Secret/{name}-{secret}")]["data"].as_object().context("a Secret without data")?;
        assert_eq!(data.keys().collect::<Vec<_>>(), keys);
    }
    trust_is_the_installations(world, &children[&format!("Secret/{name}-tls")])
}

/// The CA that daemons are given is the installation's; its key stays in the operator's namespace.
fn trust_is_the_installations(world: &World, leaf: &Value) -> Result<()> {
    let ca = world.admin().must_get(operator::NAMESPACE, "secret", "overlay-ca")?;
    assert_eq!(leaf["data"]["ca.crt"], ca["data"]["tls.crt"]);
    assert_ne!(leaf["data"]["tls.key"], ca["data"]["tls.key"]);
    ensure!(ca["metadata"]["ownerReferences"].is_null(), "the installation's CA belongs to nobody");
    world.admin().must_get(operator::NAMESPACE, "secret", "overlay-token-root")?;
    Ok(())
}

pub(crate) fn conditions(world: &World) -> Result<()> {
    let name = example(world)?;
    let node = world.condition(NAMESPACE, &name, "TrustReady", ("True", "Issued"))?;
    // No kubelet: the pods exist, and none is ever ready.
    for (kind, status, reason) in [
        ("Ready", "False", Some("Progressing")),
        ("Reconciling", "True", Some("Progressing")),
        ("Stalled", "False", None),
        ("Degraded", "False", None),
        ("TrustReady", "True", Some("Issued")),
    ] {
        let condition = find_condition(&node, kind).with_context(|| format!("no condition {kind}"))?;
        assert_eq!(condition["status"], status, "{condition}");
        ensure!(condition["reason"].as_str().is_some_and(|is| reason.is_none_or(|reason| is == reason)), "{condition}");
        assert_eq!(condition["observedGeneration"], node["metadata"]["generation"], "{condition}");
        ensure!(condition["lastTransitionTime"].is_string(), "{condition}");
    }
    let status = &node["status"];
    assert_eq!(status["observedGeneration"], node["metadata"]["generation"]);
    assert_eq!((&status["replicas"], &status["readyReplicas"]), (&node["spec"]["replicas"], &json!(0)));
    assert_eq!(status["tls"]["secretName"], format!("{name}-tls"));
    assert_eq!(status["effective"]["keyExchange"], "RequireHybrid");
    ensure!(status["configHash"].is_string() && status["selector"].is_string(), "{status}");
    // What kubectl and other tools make of it.
    let waited = ["wait", "-n", NAMESPACE, "--for=condition=TrustReady", "--timeout=5s", "overlaynode", &name];
    world.admin().run(&waited)?;
    Ok(())
}

pub(crate) fn columns(world: &World) -> Result<()> {
    let name = example(world)?;
    let node = world.admin().must_get(NAMESPACE, "overlaynode", &name)?;
    let replicas = node["spec"]["replicas"].to_string();
    let message = format!("0 of {replicas} daemons are ready");
    let image = node["status"]["effective"]["image"].as_str().context("no effective image")?;
    let narrow = ["NAME", "PROFILE", "DESIRED", "READY", "STATUS", "PQ", "AGE", "MESSAGE"];
    let row = [name.as_str(), "Micronode", &replicas, "0", "Progressing", "RequireHybrid", "<age>", &message];
    for resource in ["overlaynodes", "onode", "overlay"] {
        assert_eq!(
            table(world, &[resource, &name][..usize::from(resource != "overlay") + 1])?,
            [narrow.to_vec(), row.to_vec()]
        );
    }
    let wide = [&narrow[..], &["IMAGE"]].concat();
    assert_eq!(table(world, &["overlaynodes", &name, "-o", "wide"])?, [wide, [&row[..], &[image]].concat()]);
    Ok(())
}

/// What `kubectl get` prints, cell by cell; the age is written as `<age>`.
fn table(world: &World, arguments: &[&str]) -> Result<Vec<Vec<String>>> {
    let text = world.admin().run(&[&["get", "-n", NAMESPACE], arguments].concat())?;
    let header = text.lines().next().context("kubectl printed nothing")?;
    // A column begins where its title does: titles have no spaces in them, cells may.
    let starts: Vec<usize> = (0..header.len())
        .filter(|&at| header.as_bytes()[at] != b' ' && (at == 0 || header.as_bytes()[at - 1] == b' '))
        .collect();
    let cell = |line: &str, column: usize| {
        let end = starts.get(column + 1).copied().unwrap_or(line.len()).min(line.len());
        line.get(starts[column]..end).unwrap_or_default().trim().to_owned()
    };
    let mut rows: Vec<Vec<String>> =
        text.lines().map(|line| (0..starts.len()).map(|column| cell(line, column)).collect()).collect();
    let age = rows[0].iter().position(|title| title == "AGE").context("no column AGE")?;
    for row in rows.iter_mut().skip(1) {
        ensure!(row[age].starts_with(|c: char| c.is_ascii_digit()), "not an age: {row:?}");
        row[age] = "<age>".to_owned();
    }
    Ok(rows)
}

/// The ConfigMap laid out as a pod's volume shows it passes `overlay-daemon check` for every pod,
/// and the check would notice if it did not.
pub(crate) fn configuration_passes_check(world: &World) -> Result<()> {
    let name = example(world)?;
    let config = world.admin().must_get(NAMESPACE, "configmap", &format!("{name}-config"))?;
    let files = config["data"].as_object().context("a ConfigMap without data")?;
    let folder = world.plane.folder().join("mounted");
    fs::create_dir_all(&folder)?;
    for (file, text) in files {
        fs::write(folder.join(file), text.as_str().context("a file that is not text")?)?;
    }
    let node = world.admin().must_get(NAMESPACE, "overlaynode", &name)?;
    let replicas = node["spec"]["replicas"].as_u64().context("no replicas")?;
    assert_eq!(files.len() as u64, replicas + 1, "overlay.toml and one peers file a pod: {:?}", files.keys());
    for ordinal in 0..replicas {
        let peers = format!("peers-{name}-{ordinal}.toml");
        let (passed, output) = check(&folder, &peers)?;
        ensure!(passed, "{peers}: {output}");
        for other in (0..replicas).filter(|other| *other != ordinal) {
            let address = format!("{name}-{other}.{name}-peers.{NAMESPACE}.svc:");
            ensure!(output.contains(&address), "{peers} does not lead to {address} {output}");
        }
    }
    let broken = folder.join("overlay.toml");
    fs::write(&broken, format!("{}\n[nonsense]\n", fs::read_to_string(&broken)?))?;
    let (passed, output) = check(&folder, &format!("peers-{name}-0.toml"))?;
    ensure!(!passed && output.contains("nonsense"), "a broken file passed: {output}");
    Ok(())
}

fn check(folder: &Path, peers: &str) -> Result<(bool, String)> {
    let output = Command::new(programs::built("overlay-daemon")?)
        .arg("check")
        .arg("--config")
        .arg(folder.join("overlay.toml"))
        .arg("--peers")
        .arg(folder.join(peers))
        .output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// `overlay-operator token create --namespace` by a person's kubeconfig: the keys that the
/// OverlayNode's daemons are given verify the token, and another's do not. What
/// stands in its way is named.
pub(crate) fn token_is_minted_from_the_clusters_secret(world: &World) -> Result<()> {
    let (namespace, name) = ("tokens", "mesh");
    world.apply_node(namespace, name, "{replicas: 1}")?;
    world.settled(namespace, name)?;
    let held = world.admin().run(&["get", "-n", namespace, "overlaynode", name, "-o", "yaml"])?;
    let manifest = world.plane.folder().join("held.yaml");
    fs::write(&manifest, held)?;
    let create = |by: &Kubectl, from: &str, more: &[&str]| create_token(by, &manifest, from, more);

    let minted = create(world.admin(), operator::NAMESPACE, &["--client", "collector"])?;
    ensure!(minted.status.success() && minted.stderr.is_empty(), "{minted:?}");
    let (token, keys) = (world.plane.folder().join("minted"), world.plane.folder().join("token-keys.json"));
    fs::write(&token, &minted.stdout)?;
    let template = r#"-o=go-template={{index .data "token-keys.json" | base64decode}}"#;
    let own = world.admin().run(&["get", "-n", namespace, "secret", &format!("{name}-token"), template])?;
    fs::write(&keys, own)?;
    let (holds, said) = inspect(&token, &keys)?;
    ensure!(holds, "{said}");
    for part in [
        "signature  holds",
        &format!("spiffe://overlay.local/ns/{namespace}/overlaynode/{name}"),
        &format!("spiffe://overlay.local/ns/{namespace}/client/collector"),
    ] {
        ensure!(said.contains(part), "no {part}: {said}");
    }
    fs::write(&keys, Authority::new()?.jwks())?;
    ensure!(!inspect(&token, &keys)?.0, "keys of somebody else's verify it");

    let account = world.admin().run(&["create", "token", "-n", namespace, "default"])?;
    let stranger = world.plane.with_token("stranger", account.trim())?;
    let secret = "Secret overlay-token-root:";
    for (by, from, more, parts) in [
        (world.admin(), operator::NAMESPACE, &["--name", "none"][..], &["--name: no OverlayNode none", name][..]),
        (world.admin(), "nowhere", &[], &["--namespace nowhere", secret, "is the operator installed"]),
        (world.admin(), namespace, &[], &["--namespace tokens", secret, "is the operator installed"]),
        (&stranger, operator::NAMESPACE, &[], &["--namespace overlay-system", secret, "forbidden"]),
    ] {
        let refused = create(by, from, more)?;
        let said = String::from_utf8(refused.stderr)?;
        ensure!(refused.status.code() == Some(1) && refused.stdout.is_empty(), "{from} {more:?}: {said}");
        ensure!(parts.iter().all(|part| said.contains(part)), "{from} {more:?}: {said}");
    }
    Ok(())
}

fn create_token(by: &Kubectl, manifest: &Path, namespace: &str, more: &[&str]) -> Result<Output> {
    let mut command = Command::new(programs::built("overlay-operator")?);
    command.args(["token", "create", "--topics", "news", "--actions", "publish", "--namespace", namespace]);
    command.args(more).arg("--file").arg(manifest).env("KUBECONFIG", by.kubeconfig());
    Ok(command.stdin(Stdio::null()).output()?)
}

/// `overlay-daemon token inspect --keys`: whether the signature holds, and all that it says.
fn inspect(token: &Path, keys: &Path) -> Result<(bool, String)> {
    let mut command = Command::new(programs::built("overlay-daemon")?);
    let output = command.args(["token", "inspect"]).arg(token).arg("--keys").arg(keys).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// The namespace enforces the restricted standard, so that pods which exist fit it.
pub(crate) fn pods_fit_restricted(world: &World) -> Result<()> {
    let name = example(world)?;
    let selector = format!("overlay.rustyonions.io/name={name}");
    let text = world.admin().run(&["get", "pods", "-n", NAMESPACE, "-l", &selector, "-o", "json"])?;
    let pods: Value = serde_json::from_str(&text)?;
    let pods = pods["items"].as_array().context("no list")?;
    ensure!(!pods.is_empty(), "there are no pods");
    for pod in pods {
        assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
        ensure!(pod["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/readyz", "{pod}");
    }
    Ok(())
}

pub(crate) fn second_reconcile_writes_nothing(world: &World) -> Result<()> {
    let name = example(world)?;
    let operator = world.operator.borrow();
    let writes = quiet_writes(world)?;
    let reconciles = operator.metric("overlay_operator_reconciles_total")?;
    // A note of somebody else's on a child has the operator look at all of it again.
    world.admin().run(&[
        "annotate",
        "-n",
        NAMESPACE,
        "statefulset",
        &name,
        "example.com/touched=yes",
        "--overwrite",
    ])?;
    let before = world.versions(NAMESPACE, &name)?;
    wait::until_true("another reconcile", LIMIT, || {
        Ok(operator.metric("overlay_operator_reconciles_total")? > reconciles)
    })?;
    wait::throughout("nothing is written", QUIET, || Ok(operator.metric("overlay_operator_writes_total")? == writes))?;
    assert_eq!(world.versions(NAMESPACE, &name)?, before);
    Ok(())
}

/// The operator's count of writes, once it no longer grows.
fn quiet_writes(world: &World) -> Result<f64> {
    let mut last = -1.0;
    wait::until("the operator to be quiet", LIMIT, || {
        let writes = world.operator.borrow().metric("overlay_operator_writes_total")?;
        let still = writes == last && writes > 0.0;
        last = writes;
        Ok(if still { Look::Holds(writes) } else { Look::NotYet(format!("{writes} writes")) })
    })
}

pub(crate) fn scales(world: &World) -> Result<()> {
    let (namespace, name) = ("scale", "scaled");
    world.apply_node(namespace, name, "{replicas: 2}")?;
    world.settled(namespace, name)?;
    for replicas in [4_u64, 1] {
        world.admin().run(&["scale", "-n", namespace, "overlaynode", name, &format!("--replicas={replicas}")])?;
        let children = world.settled(namespace, name)?;
        assert_eq!(children[&format!("StatefulSet/{name}")]["spec"]["replicas"], replicas);
        let files = children[&format!("ConfigMap/{name}-config")]["data"].as_object().context("no data")?;
        assert_eq!(files.keys().filter(|file| file.starts_with("peers-")).count() as u64, replicas);
        let path = format!("/apis/overlay.rustyonions.io/v1alpha1/namespaces/{namespace}/overlaynodes/{name}/scale");
        let scale: Value = serde_json::from_str(&world.admin().run(&["get", "--raw", &path])?)?;
        assert_eq!((&scale["spec"]["replicas"], &scale["status"]["replicas"]), (&json!(replicas), &json!(replicas)));
        let selector = scale["status"]["selector"].as_str().context("no selector for autoscalers")?;
        let pods = world.admin().run(&["get", "pods", "-n", namespace, "-l", selector, "-o", "name"])?;
        assert_eq!(pods.lines().count() as u64, replicas, "{pods}");
    }
    let refused = world.admin().try_run(&["scale", "-n", namespace, "overlaynode", name, "--replicas=65"], None)?;
    ensure!(!refused.ok && refused.stderr.contains("spec.replicas"), "{}", refused.stderr);
    Ok(())
}

pub(crate) fn children_are_collected(world: &World) -> Result<()> {
    let (namespace, name) = ("collected", "gone");
    world.apply_node(namespace, name, "{replicas: 2}")?;
    world.settled(namespace, name)?;
    world.admin().run(&["delete", "-n", namespace, "overlaynode", name, "--timeout=30s"])?;
    // The collector learns of new kinds every 30 s.
    wait::until("the children to be collected", 2 * LIMIT, || {
        let children = world.children(namespace, name)?;
        Ok(if children.is_empty() { Look::Holds(()) } else { Look::NotYet(format!("{:?}", children.keys())) })
    })
}

/// A gossip cap reaches running pods by their volumes, of which an annotation tells the kubelet;
/// the drain takes a restart.
pub(crate) fn live_changes_roll_nothing(world: &World) -> Result<()> {
    let (namespace, name) = ("live", "mesh");
    let annotations = || -> Result<Vec<Value>> {
        let text = world.admin().run(&["get", "pods", "-n", namespace, "-o", "json"])?;
        let pods: Value = serde_json::from_str(&text)?;
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        Ok(pods
            .iter()
            .map(|pod| pod["metadata"]["annotations"]["overlay.rustyonions.io/config-hash"].clone())
            .collect())
    };
    let generation = || {
        Ok::<_, anyhow::Error>(
            world.admin().must_get(namespace, "statefulset", name)?["metadata"]["generation"].clone(),
        )
    };
    let annotated = |what: &str, differs: &[Value]| {
        wait::until_true(what, LIMIT, || {
            let now = annotations()?;
            Ok(now.len() == 2 && now.iter().all(|one| one.is_string() && !differs.contains(one)))
        })
    };

    world.apply_node(namespace, name, "{replicas: 2}")?;
    world.settled(namespace, name)?;
    annotated("pods to be told of their configuration", &[])?;
    let (set, first) = (generation()?, annotations()?);
    world.apply_node(namespace, name, "{replicas: 2, gossip: {fanout: 2}}")?;
    annotated("pods to be told of another", &first)?;
    let config = world.admin().must_get(namespace, "configmap", "mesh-config")?;
    ensure!(config["data"]["overlay.toml"].as_str().is_some_and(|text| text.contains("fanout = 2")), "{config}");
    ensure!(generation()? == set, "the StatefulSet is as it was");
    world.apply_node(namespace, name, "{replicas: 2, gossip: {fanout: 2}, drain: {delay: 1s}}")?;
    wait::until_true("the pods to be rolled", LIMIT, || Ok(generation()? != set))
}
