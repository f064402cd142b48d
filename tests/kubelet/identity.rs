//! Who gets a certificate, and where its key stands: with `PodCertificate` nowhere but in the
//! pod's memory; with `SelfManaged` in a Secret of the OverlayNode's; for a foreign pod nowhere.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Secret;
use overlay_tests::wait::Look;
use serde_json::Value;

use crate::world::{APPS, LIMIT, SYSTEM, World};

/// Of every Secret in the cluster, those that hold a private key, as NAMESPACE/NAME.
fn secrets_with_keys(world: &World) -> Result<Vec<String>> {
    let text = world.kubectl("get secrets -A -o json")?;
    let list: Value = serde_json::from_str(&text)?;
    let mut found = Vec::new();
    for item in list["items"].as_array().context("no list")? {
        let secret: Secret = serde_json::from_value(item.clone())?;
        let values = secret.data.unwrap_or_default();
        if values.values().any(|value| String::from_utf8_lossy(&value.0).contains("PRIVATE KEY")) {
            let name = |value: Option<String>| value.unwrap_or_default();
            found.push(format!("{}/{}", name(secret.metadata.namespace), name(secret.metadata.name)));
        }
    }
    Ok(found)
}

fn source(world: &World, name: &str) -> Result<Value> {
    Ok(world.admin().must_get(APPS, "overlaynode", name)?["status"]["tls"]["source"].clone())
}

pub(crate) fn no_leaf_key_stands_in_a_secret(world: &World) -> Result<()> {
    ensure!(source(world, "mesh")? == "PodCertificate", "Auto is PodCertificate here");
    let mut keys = secrets_with_keys(world)?;
    keys.sort();
    let installation = [format!("{SYSTEM}/overlay-ca"), format!("{SYSTEM}/overlay-token-root")];
    ensure!(keys == installation, "private keys of the installation only: {keys:?}");
    let issued = world.kubectl(&format!("get podcertificaterequests -n {APPS} -o json"))?;
    ensure!(issued.contains("\"Issued\""), "the kubelet asked, and was answered: {issued}");
    Ok(())
}

pub(crate) fn self_managed_keeps_its_leaf_in_a_secret(world: &World) -> Result<()> {
    world.apply_node(
        APPS,
        "managed",
        "{replicas: 2, tls: {source: SelfManaged}, readiness: {minPeers: 1}, drain: {delay: 0s}}",
    )?;
    world.wait_ready(APPS, "managed")?;
    ensure!(source(world, "managed")? == "SelfManaged");
    ensure!(secrets_with_keys(world)?.contains(&format!("{APPS}/managed-tls")), "its leaf key is in its Secret");
    world.kubectl(&format!("delete overlaynode managed -n {APPS}"))?;
    Ok(())
}

/// It carries every label of a daemon's pod and asks the same signer.
pub(crate) fn a_foreign_pod_gets_no_certificate(world: &World) -> Result<()> {
    world.admin().apply(APPS, FOREIGN)?;
    world.until("its request to be denied", LIMIT, || {
        let text = world.kubectl(&format!("get podcertificaterequests -n {APPS} -o json"))?;
        let list: Value = serde_json::from_str(&text)?;
        let requests = list["items"].as_array().into_iter().flatten();
        let own: Vec<&Value> = requests.filter(|request| request["spec"]["podName"] == "foreign").collect();
        ensure!(own.iter().all(|request| request["status"]["certificateChain"].is_null()), "it got a certificate");
        let denied = own.iter().any(|request| request["status"]["conditions"][0]["type"] == "Denied");
        Ok(if denied { Look::Holds(()) } else { Look::NotYet(format!("{own:?}")) })
    })?;
    let pod = world.admin().must_get(APPS, "pod", "foreign")?;
    ensure!(pod["status"]["containerStatuses"][0]["state"]["running"].is_null(), "it never ran");
    world.kubectl(&format!("delete pod foreign -n {APPS} --wait=false"))?;
    Ok(())
}

const FOREIGN: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: foreign
  labels:
    app.kubernetes.io/name: overlay-daemon
    app.kubernetes.io/managed-by: overlay-operator
    overlay.rustyonions.io/name: mesh
spec:
  automountServiceAccountToken: false
  serviceAccountName: mesh
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: foreign
      image: localhost/pause:1
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      volumeMounts: [{name: tls, mountPath: /tls}]
  volumes:
    - name: tls
      projected:
        sources:
          - podCertificate:
              signerName: overlay.rustyonions.io/mesh
              keyType: ED25519
              credentialBundlePath: bundle.pem
";
