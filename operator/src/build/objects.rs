//! The objects that an OverlayNode owns, but for what its pods look like (that is
//! [`super::workload`]). A pure function of the OverlayNode, its configuration and its
//! credentials: the same inputs give the same bytes. Never asks what is there.

use std::collections::BTreeMap;
use std::fmt::Display;

use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{
    ConfigMap, PodTemplateSpec, Secret, Service, ServiceAccount, ServicePort, ServiceSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Resource;
use overlay_core::config::{DaemonConfig, PeersConfig};

use super::{labels, names, placement, workload};
use crate::api::{OverlayNode, PullPolicy, TlsSource};

/// Most bytes of configuration that one ConfigMap is given; the API server takes 1 MiB with
/// everything around it.
pub const MAX_CONFIG: usize = 900 * 1024;

/// What becomes of the Secret NAME-tls. No `Debug`.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum LeafSecret {
    /// Each pod has a key of its own, and there is no such Secret.
    #[default]
    Absent,
    /// Each pod has a key of its own; the Secret is from before, and its key is taken out. What
    /// is left of it goes with its owner, so that nothing needs to be deleted.
    Emptied,
    /// The pods share a certificate.
    Holds {
        /// PEM: the leaf.
        certificate: Vec<u8>,
        /// PEM: its private key.
        key: Vec<u8>,
    },
}

/// Certificate, key and tokens of one OverlayNode, as its Secrets hold them. No `Debug`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// The leaf, where the pods share one.
    pub leaf: LeafSecret,
    /// PEM: the installation's CA.
    pub ca: Vec<u8>,
    /// The JSON Web Key Set that tokens are verified with.
    pub token_keys: Vec<u8>,
    /// The token that the daemons present to one another.
    pub peer_token: Vec<u8>,
    /// The token of Unix-socket clients.
    pub local_token: Vec<u8>,
}

/// What the objects are made from.
pub struct Inputs<'a> {
    /// The OverlayNode; named, in a namespace and with a UID, as the API server has it.
    pub node: &'a OverlayNode,
    /// `overlay.toml`.
    pub config: &'a DaemonConfig,
    /// A peers file for each pod.
    pub peers: &'a [PeersConfig],
    /// The image, resolved.
    pub image: &'a str,
    /// When it is pulled; the kubelet's own default where this is none.
    pub pull_policy: Option<PullPolicy>,
    /// Where the certificate comes from.
    pub source: TlsSource,
    /// Certificate and tokens.
    pub credentials: &'a Credentials,
}

/// The owned objects. No `Debug`: private keys are in it.
pub struct Objects {
    /// NAME: its token is mounted nowhere.
    pub service_account: ServiceAccount,
    /// NAME-tls, where there is one.
    pub tls: Option<Secret>,
    /// NAME-token.
    pub token: Secret,
    /// NAME-config.
    pub config: ConfigMap,
    /// NAME-peers: every pod's name in DNS, ready or not, since peers must meet before they are ready.
    pub peers: Service,
    /// NAME: ready pods, for clients.
    pub client: Service,
    /// NAME.
    pub stateful_set: StatefulSet,
}

/// Why there are no objects.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Too much configuration for a ConfigMap.
    #[error(
        "the configuration of {replicas} replicas takes {bytes} bytes, and at most {MAX_CONFIG} fit: lower spec.replicas"
    )]
    ConfigTooLarge {
        /// How many peers files there are.
        replicas: usize,
        /// All files together.
        bytes: usize,
    },
    /// The configuration has no TOML form.
    #[error("the configuration cannot be written as TOML: {0}")]
    Toml(String),
}

/// Everything that `inputs` calls for.
///
/// # Errors
/// As [`BuildError`] has them.
pub fn objects(inputs: &Inputs<'_>) -> Result<Objects, BuildError> {
    let node = inputs.node;
    let restart_hash = inputs.config.restart_hash().map_err(|e| BuildError::Toml(e.to_string()))?;
    let credentials = inputs.credentials;
    Ok(Objects {
        service_account: ServiceAccount {
            metadata: metadata(node, names::name(node).to_owned()),
            automount_service_account_token: Some(false),
            ..Default::default()
        },
        tls: tls_secret(node, credentials),
        token: token_secret(node, credentials),
        config: config_map(inputs)?,
        peers: service(inputs, names::peers_service(node), true),
        client: service(inputs, names::name(node).to_owned(), false),
        stateful_set: workload::stateful_set(inputs, &restart_hash),
    })
}

/// What pods are made from with another `source` than the one that was chosen, for comparing.
///
/// # Errors
/// As [`objects`].
pub fn pod_template(
    node: &OverlayNode,
    config: &DaemonConfig,
    image: &str,
    pull_policy: Option<PullPolicy>,
    source: TlsSource,
) -> Result<PodTemplateSpec, BuildError> {
    let restart_hash = config.restart_hash().map_err(|e| BuildError::Toml(e.to_string()))?;
    let inputs = Inputs { node, config, peers: &[], image, pull_policy, source, credentials: &Credentials::default() };
    Ok(workload::stateful_set(&inputs, &restart_hash).spec.map(|spec| spec.template).unwrap_or_default())
}

/// Metadata of a child: labels, and who owns it.
pub(super) fn metadata(node: &OverlayNode, name: String) -> ObjectMeta {
    // `blockOwnerDeletion` is left out: setting it takes a verb on finalizers.
    let owner: Option<OwnerReference> = node.controller_owner_ref(&());
    ObjectMeta {
        name: Some(name),
        namespace: node.metadata.namespace.clone(),
        labels: Some(labels::labels(names::name(node))),
        owner_references: owner.map(|o| vec![o]),
        ..Default::default()
    }
}

/// The Secrets alone: NAME-tls, where there is one, and NAME-token.
#[must_use]
pub fn secrets(node: &OverlayNode, credentials: &Credentials) -> Vec<Secret> {
    tls_secret(node, credentials).into_iter().chain([token_secret(node, credentials)]).collect()
}

fn token_secret(node: &OverlayNode, credentials: &Credentials) -> Secret {
    let data = [
        (placement::TOKEN_KEYS, &credentials.token_keys),
        (placement::PEER_TOKEN, &credentials.peer_token),
        (placement::LOCAL_TOKEN, &credentials.local_token),
    ];
    secret(node, names::token_secret(node), "Opaque", data)
}

fn tls_secret(node: &OverlayNode, credentials: &Credentials) -> Option<Secret> {
    let nothing = Vec::new();
    let (certificate, key) = match &credentials.leaf {
        LeafSecret::Absent => return None,
        // The type takes both, and a Secret cannot change its type.
        LeafSecret::Emptied => (&nothing, &nothing),
        LeafSecret::Holds { certificate, key } => (certificate, key),
    };
    let data =
        [(placement::TLS_CERTIFICATE, certificate), (placement::TLS_KEY, key), (placement::TLS_CA, &credentials.ca)];
    Some(secret(node, names::tls_secret(node), "kubernetes.io/tls", data))
}

fn secret<'a>(
    node: &OverlayNode,
    name: String,
    kind: &str,
    data: impl IntoIterator<Item = (&'a str, &'a Vec<u8>)>,
) -> Secret {
    Secret {
        metadata: metadata(node, name),
        type_: Some(kind.to_owned()),
        data: Some(data.into_iter().map(|(key, bytes)| (key.to_owned(), ByteString(bytes.clone()))).collect()),
        ..Default::default()
    }
}

fn config_map(inputs: &Inputs<'_>) -> Result<ConfigMap, BuildError> {
    let toml = |error: &dyn Display| BuildError::Toml(error.to_string());
    let mut data = BTreeMap::new();
    data.insert(names::CONFIG_FILE.to_owned(), inputs.config.to_toml().map_err(|e| toml(&e))?);
    for peers in inputs.peers {
        data.insert(names::peers_file(&peers.name), peers.to_toml().map_err(|e| toml(&e))?);
    }
    if inputs.source == TlsSource::PodCertificate {
        // Certificates are public, and the volume of the pod's own certificate takes it in.
        let ca = String::from_utf8_lossy(&inputs.credentials.ca).into_owned();
        data.insert(placement::TLS_CA.to_owned(), ca);
    }
    let bytes = data.iter().map(|(file, text)| file.len() + text.len()).sum();
    if bytes > MAX_CONFIG {
        return Err(BuildError::ConfigTooLarge { replicas: inputs.peers.len(), bytes });
    }
    let name = names::config_map(inputs.node);
    Ok(ConfigMap { metadata: metadata(inputs.node, name), data: Some(data), ..Default::default() })
}

fn service(inputs: &Inputs<'_>, name: String, headless: bool) -> Service {
    let port = |name: &str, protocol: &str, number: u16| ServicePort {
        name: Some(name.to_owned()),
        port: i32::from(number),
        protocol: Some(protocol.to_owned()),
        target_port: Some(IntOrString::String(name.to_owned())),
        ..Default::default()
    };
    let mut ports = vec![port(names::SESSION_PORT, "TCP", inputs.config.overlay.listen.port())];
    ports.extend(inputs.config.overlay.listen_quic.map(|quic| port(names::QUIC_PORT, "UDP", quic.port())));
    ports.extend(inputs.config.tor.listen.map(|tor| port(names::TOR_PORT, "TCP", tor.port())));
    if headless {
        ports.push(port(names::ADMIN_PORT, "TCP", inputs.config.observability.metrics.port()));
    }
    Service {
        metadata: metadata(inputs.node, name),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            cluster_ip: headless.then(|| "None".to_owned()),
            publish_not_ready_addresses: headless.then_some(true),
            selector: Some(labels::selector(names::name(inputs.node))),
            ports: Some(ports),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
