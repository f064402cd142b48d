//! Certificates of the pods' own: what the cluster must have for it, and who is given one. What
//! a kubelet does (ask, and mount the answer) is done by hand: no kubelet is here.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use k8s_openapi::ByteString;
use overlay_tests::operator::NAMESPACE as OPERATOR_NAMESPACE;
use overlay_tests::programs;
use overlay_tests::wait::{self, Look};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::world::{LIMIT, QUIET, World};

const NAMESPACE: &str = "pod-certificates";
const MESH: &str = "own";
const NODE: &str = "by-hand";
const SIGNER: &str = "overlay.rustyonions.io/mesh";

/// A Node object, as a kubelet of this version registers it.
struct Kubelet<'a> {
    world: &'a World,
    name: &'static str,
}

impl<'a> Kubelet<'a> {
    fn register(world: &'a World, name: &'static str, version: &str) -> Result<Self> {
        let unknown = "none";
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
            "status": { "nodeInfo": {
                "kubeletVersion": version, "architecture": "amd64", "operatingSystem": "linux", "bootID": unknown,
                "containerRuntimeVersion": unknown, "kernelVersion": unknown, "kubeProxyVersion": "",
                "machineID": unknown, "osImage": unknown, "systemUUID": unknown,
            } },
        });
        world.admin().run_with(&["create", "-f", "-"], Some(&node.to_string()))?;
        let kubelet = Self { world, name };
        let stored = world.admin().must_get("default", "node", name)?;
        assert_eq!(stored["status"]["nodeInfo"]["kubeletVersion"], version);
        Ok(kubelet)
    }
}

impl Drop for Kubelet<'_> {
    fn drop(&mut self) {
        let _ = self.world.admin().try_run(&["delete", "node", self.name, "--wait=false"], None);
    }
}

/// An OverlayNode whose pods have certificates of their own: no Secret holds a key.
fn mesh(world: &World) -> Result<std::collections::BTreeMap<String, Value>> {
    world.apply_node(NAMESPACE, MESH, "{replicas: 2, tls: {source: PodCertificate}}")?;
    world.settled(NAMESPACE, MESH)
}

/// I-8: no private key of a pod is anywhere but in that pod.
pub(crate) fn no_secret_holds_a_key(world: &World) -> Result<()> {
    let children = mesh(world)?;
    let node = world.condition(NAMESPACE, MESH, "TrustReady", ("True", "Issued"))?;
    assert_eq!(node["status"]["tls"], json!({ "source": "PodCertificate" }));
    ensure!(!children.contains_key(&format!("Secret/{MESH}-tls")), "{:?}", children.keys());
    let pod = &children[&format!("StatefulSet/{MESH}")]["spec"]["template"]["spec"];
    let volumes = pod["volumes"].as_array().context("no volumes")?;
    let tls = volumes.iter().find(|volume| volume["name"] == "tls").context("no volume tls")?;
    let certificate = &tls["projected"]["sources"][0]["podCertificate"];
    assert_eq!((&certificate["signerName"], &certificate["keyType"]), (&json!(SIGNER), &json!("ED25519")));
    let config = &children[&format!("ConfigMap/{MESH}-config")]["data"];
    let ca = world.admin().must_get(OPERATOR_NAMESPACE, "secret", "overlay-ca")?;
    assert_eq!(json!(ByteString(text(&config["ca.crt"]).into())), ca["data"]["tls.crt"]);
    let peers = text(&config[format!("peers-{MESH}-0.toml")]);
    ensure!(peers.contains(&format!("/ns/{NAMESPACE}/overlaynode/{MESH}/pod/{MESH}-1\"")), "{peers}");

    // What the API server adds to such a volume is not taken for a difference.
    let operator = world.operator.borrow();
    let reconciles = operator.metric("overlay_operator_reconciles_total")?;
    world.admin().run(&["annotate", "-n", NAMESPACE, "statefulset", MESH, "example.com/touched=yes", "--overwrite"])?;
    let before = world.versions(NAMESPACE, MESH)?;
    wait::until_true("another reconcile", LIMIT, || {
        Ok(operator.metric("overlay_operator_reconciles_total")? > reconciles)
    })?;
    wait::throughout("nothing is written", QUIET, || Ok(world.versions(NAMESPACE, MESH)? == before))
}

/// What a kubelet asks for a pod of its node.
struct Ask<'a> {
    name: &'a str,
    signer: &'a str,
    pod: &'a str,
    key: &'a KeyPair,
}

fn ask(world: &World, ask: &Ask<'_>) -> Result<()> {
    let pod = world.admin().must_get(NAMESPACE, "pod", ask.pod)?;
    let account = text(&pod["spec"]["serviceAccountName"]);
    let account = world.admin().must_get(NAMESPACE, "serviceaccount", account)?;
    let node = world.admin().must_get("default", "node", NODE)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "PodCertificateRequest",
        "metadata": { "name": ask.name, "namespace": NAMESPACE },
        "spec": {
            "signerName": ask.signer, "podName": ask.pod, "podUID": pod["metadata"]["uid"],
            "serviceAccountName": account["metadata"]["name"], "serviceAccountUID": account["metadata"]["uid"],
            "nodeName": NODE, "nodeUID": node["metadata"]["uid"], "maxExpirationSeconds": 86_400,
            "stubPKCS10Request": ByteString(params.serialize_request(ask.key)?.der().to_vec()),
        },
    });
    world.admin().run_with(&["create", "-f", "-"], Some(&request.to_string())).map(|_| ())
}

/// The condition that the request has been answered with, and the whole status.
fn answer(world: &World, name: &str) -> Result<(Value, Value)> {
    wait::until(&format!("an answer to {name}"), LIMIT, || {
        let status = world.admin().must_get(NAMESPACE, "podcertificaterequest", name)?["status"].clone();
        let condition = status["conditions"][0].clone();
        Ok(if condition.is_object() { Look::Holds((condition, status)) } else { Look::NotYet(status.to_string()) })
    })
    .map_err(|error| anyhow!("{error:#}\n{}", world.operator.borrow().log()))
}

/// The scheduler's part.
fn bind(world: &World, pod: &str) -> Result<()> {
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding", "metadata": { "name": pod, "namespace": NAMESPACE },
        "target": { "apiVersion": "v1", "kind": "Node", "name": NODE },
    });
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}/binding");
    world.admin().run_with(&["create", "--raw", &path, "-f", "-"], Some(&binding.to_string())).map(|_| ())
}

/// A pod of the mesh gets a certificate in its own name; one that looks like it never does; and
/// requests to other signers are theirs.
pub(crate) fn only_the_meshs_pods_are_certified(world: &World) -> Result<()> {
    mesh(world)?;
    // Old, so that no other mesh takes to such certificates meanwhile.
    let _kubelet = Kubelet::register(world, NODE, "v1.36.0")?;
    let pod = format!("{MESH}-0");
    bind(world, &pod)?;
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    ask(world, &Ask { name: "others", signer: "example.org/other", pod: &pod, key: &key })?;

    ask(world, &Ask { name: "right", signer: SIGNER, pod: &pod, key: &key })?;
    let (condition, status) = answer(world, "right")?;
    assert_eq!((&condition["type"], &condition["status"]), (&json!("Issued"), &json!("True")), "{condition}");
    let ca = world.admin().must_get(NAMESPACE, "configmap", &format!("{MESH}-config"))?;
    verify(&status, text(&ca["data"]["ca.crt"]), &key)?;
    the_daemon_takes_it(world, text(&status["certificateChain"]), &key)?;

    impostor(world)?;
    ask(world, &Ask { name: "wrong", signer: SIGNER, pod: "impostor", key: &key })?;
    let (condition, status) = answer(world, "wrong")?;
    assert_eq!((&condition["type"], &condition["reason"]), (&json!("Denied"), &json!("NotAnOverlayNodesPod")));
    ensure!(status["certificateChain"].is_null(), "{status}");

    let p256 = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    ask(world, &Ask { name: "p256", signer: SIGNER, pod: &pod, key: &p256 })?;
    let (condition, _) = answer(world, "p256")?;
    assert_eq!((&condition["type"], &condition["reason"]), (&json!("Denied"), &json!("UnsupportedKeyType")));

    let others = world.admin().must_get(NAMESPACE, "podcertificaterequest", "others")?;
    ensure!(others["status"]["conditions"].is_null(), "the first to be asked, and not by us: {others}");
    let operator = world.operator.borrow();
    ensure!(operator.metric("overlay_operator_certificate_requests_total")? >= 3.0);
    Ok(())
}

/// A pod with a mesh pod's labels, service account and node, which no StatefulSet has made.
fn impostor(world: &World) -> Result<()> {
    let mut pod = world.admin().must_get(NAMESPACE, "pod", &format!("{MESH}-0"))?;
    let labels = pod["metadata"]["labels"].clone();
    pod["metadata"] = json!({ "name": "impostor", "namespace": NAMESPACE, "labels": labels });
    pod["status"] = json!({});
    pod["spec"]["nodeName"] = json!(NODE);
    world.admin().run_with(&["create", "-f", "-"], Some(&pod.to_string())).map(|_| ())
}

/// The chain leads to the CA, for this key, in the pod's name.
fn verify(status: &Value, ca: &str, key: &KeyPair) -> Result<()> {
    let leaf = CertificateDer::from_pem_slice(text(&status["certificateChain"]).as_bytes())
        .map_err(|error| anyhow!("the chain: {error}"))?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).map_err(|error| anyhow!("the CA: {error}"))?)?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.into()).build()?;
    verifier.verify_client_cert(&leaf, &[], UnixTime::now())?;
    let (_, leaf) = X509Certificate::from_der(&leaf)?;
    ensure!(*leaf.public_key().subject_public_key.data == *key.public_key_raw(), "another key");
    let names = leaf.subject_alternative_name()?.context("no name")?;
    let id = format!("spiffe://overlay.local/ns/{NAMESPACE}/overlaynode/{MESH}/pod/{MESH}-0");
    assert_eq!(names.value.general_names, [GeneralName::URI(&id)]);
    let span = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(span, 86_400);
    Ok(())
}

/// The volumes as the kubelet would mount them, but for where: the daemon's own check finds key,
/// certificate, authorities and tokens good.
fn the_daemon_takes_it(world: &World, chain: &str, key: &KeyPair) -> Result<()> {
    let folder = world.plane.folder().join("pod");
    for volume in ["config", "tls", "token"] {
        fs::create_dir_all(folder.join(volume))?;
    }
    let config = world.admin().must_get(NAMESPACE, "configmap", &format!("{MESH}-config"))?;
    for (file, content) in config["data"].as_object().context("no data")? {
        let content = text(content).replace("/etc/overlay", &folder.to_string_lossy());
        fs::write(folder.join("config").join(file), &content)?;
        if file == "ca.crt" {
            fs::write(folder.join("tls").join(file), &content)?;
        }
    }
    fs::write(folder.join("tls/bundle.pem"), format!("{}{chain}", key.serialize_pem()))?;
    let tokens = world.admin().must_get(NAMESPACE, "secret", &format!("{MESH}-token"))?;
    for (file, content) in tokens["data"].as_object().context("no data")? {
        let ByteString(content) = serde_json::from_value(content.clone())?;
        fs::write(folder.join("token").join(file), content)?;
    }
    let output = Command::new(programs::built("overlay-daemon")?)
        .args(["check", "--files", "--config"])
        .arg(folder.join("config/overlay.toml"))
        .arg("--peers")
        .arg(folder.join(format!("config/peers-{MESH}-0.toml")))
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A new OverlayNode's source, once it is this one: the operator looks at the cluster at most
/// once a second.
fn new_mesh_has(world: &World, prefix: &str, expected: &str) -> Result<String> {
    let mut count = 0;
    wait::until(&format!("a new OverlayNode with {expected}"), LIMIT, || {
        count += 1;
        let name = format!("{prefix}-{count}");
        let node = world.apply_node(NAMESPACE, &name, "{replicas: 1}")?;
        let source = &node["status"]["tls"]["source"];
        Ok(if source == expected { Look::Holds(name) } else { Look::NotYet(source.to_string()) })
    })
}

/// Auto takes certificates of the pods' own where every kubelet can ask for them; what runs is
/// not rolled for it; and after the roll no key is left in a Secret.
pub(crate) fn auto_follows_the_cluster(world: &World) -> Result<()> {
    let before = new_mesh_has(world, "auto-none", "SelfManaged")?;
    let secret = format!("{before}-tls");
    let kubelet = Kubelet::register(world, "new", "v1.37.2")?;
    new_mesh_has(world, "auto-new", "PodCertificate")?;
    let kept = world.apply_node(NAMESPACE, &before, "{replicas: 2}")?;
    assert_eq!(kept["status"]["tls"]["source"], "SelfManaged", "it would have been rolled");
    world.settled(NAMESPACE, &before)?;
    all_ready(world, &before)?;
    // Its pods are said to be ready, and no daemon is there to say what it runs.
    world.condition(NAMESPACE, &before, "Ready", ("False", "ConfigPending"))?;

    let rolled = world.apply_node(NAMESPACE, &before, "{replicas: 2, image: {tag: newer}}")?;
    assert_eq!(rolled["status"]["tls"]["source"], "PodCertificate", "it is rolled anyway");
    // While a pod may still mount it, it stays; and while one still shares its identity with the
    // others, they know one another by it.
    ensure!(!knows_pods(world, &before)?, "the mesh falls in two");
    ensure!(has_key(&world.admin().must_get(NAMESPACE, "secret", &secret)?), "taken from a pod that runs");
    wait::until(&format!("{secret} to hold no key"), LIMIT, || {
        all_ready(world, &before)?;
        let secret = world.admin().must_get(NAMESPACE, "secret", &secret)?;
        Ok(if has_key(&secret) { Look::NotYet("it does".to_owned()) } else { Look::Holds(()) })
    })?;

    wait::until_true("each pod to be known by its own identity", LIMIT, || knows_pods(world, &before))?;

    let old = Kubelet::register(world, "old", "v1.36.3")?;
    new_mesh_has(world, "auto-old", "SelfManaged")?;
    drop((kubelet, old));
    Ok(())
}

fn knows_pods(world: &World, name: &str) -> Result<bool> {
    let config = world.admin().must_get(NAMESPACE, "configmap", &format!("{name}-config"))?;
    Ok(text(&config["data"][format!("peers-{name}-0.toml")]).contains(&format!("/pod/{name}-1")))
}

fn has_key(secret: &Value) -> bool {
    secret["data"]["tls.key"].as_str().is_some_and(|key| !key.is_empty())
}

/// The kubelet's part: every pod that exists says that it is ready.
fn all_ready(world: &World, name: &str) -> Result<()> {
    let ready = r#"{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}"#;
    let label = format!("overlay.rustyonions.io/name={name}");
    let pods = world.admin().run(&["get", "pods", "-n", NAMESPACE, "-l", &label, "-o", "name"])?;
    for pod in pods.lines() {
        // One that is being replaced may be gone by now.
        world
            .admin()
            .try_run(&["patch", "-n", NAMESPACE, pod, "--subresource=status", "--type=merge", "-p", ready], None)?;
    }
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
