//! What a daemon's pods look like: the StatefulSet. Fits the restricted Pod Security
//! standard; decides security context, probes, mounts and grace period, and nothing about
//! what the daemon does.

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetUpdateStrategy};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapProjection, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, HTTPGetAction, KeyToPath, LocalObjectReference, ObjectFieldSelector, PodCertificateProjection,
    PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ProjectedVolumeSource, SeccompProfile, SecretVolumeSource,
    SecurityContext, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::labels::{self, labels, selector};
use super::objects::{Inputs, metadata};
use super::{names, placement};
use crate::api::{OverlayNode, PullPolicy, TlsSource};
use crate::trust::LEAF_LIFETIME;

/// User and group of the daemon: the number that images without users have for "nobody".
const UID: i64 = 65_532;
/// Seconds beyond delay and timeout of the drain, to be gone before the kubelet kills.
const GRACE_MARGIN: u64 = 5;
/// Seconds that a daemon may take to answer at all.
const STARTUP_SECONDS: i32 = 120;

/// The volume of the certificate.
const TLS_VOLUME: &str = "tls";
/// The sort of key that the kubelet makes.
const KEY_TYPE: &str = "ED25519";

/// NAME, its pods annotated with `restart_hash`, so that another one rolls them.
pub(super) fn stateful_set(inputs: &Inputs<'_>, restart_hash: &str) -> StatefulSet {
    let node = inputs.node;
    let name = names::name(node);
    StatefulSet {
        metadata: metadata(node, name.to_owned()),
        spec: Some(StatefulSetSpec {
            replicas: Some(node.spec.replicas),
            service_name: Some(names::peers_service(node)),
            // Daemons wait for one another to be ready, so none may wait for another to be started.
            pod_management_policy: Some("Parallel".to_owned()),
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: None,
            }),
            selector: LabelSelector { match_labels: Some(selector(name)), ..Default::default() },
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels(name)),
                    annotations: Some(
                        [
                            (labels::RESTART_HASH.to_owned(), restart_hash.to_owned()),
                            ("kubectl.kubernetes.io/default-container".to_owned(), names::CONTAINER.to_owned()),
                        ]
                        .into(),
                    ),
                    ..Default::default()
                }),
                spec: Some(pod(inputs)),
            },
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The daemon's image: what the spec says of it, and for the rest what `default` does. A
/// repository without tag or digest takes the default's tag, never its digest, which is of
/// another repository; and this version's, where the default has a digest alone.
#[must_use]
pub fn image(node: &OverlayNode, default: &str) -> String {
    let (default, default_digest) = match default.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (default, None),
    };
    let slash = default.rfind('/').map_or(0, |i| i + 1);
    let (default_repository, default_tag) = match default.get(slash..).and_then(|last| last.find(':')) {
        Some(colon) => (&default[..slash + colon], Some(&default[slash + colon + 1..])),
        None => (default, None),
    };
    let spec = node.spec.image.clone().unwrap_or_default();
    let repository = spec.repository.as_deref().unwrap_or(default_repository);
    let own = default_digest.is_some().then_some(env!("CARGO_PKG_VERSION"));
    let inherited = match (&spec.digest, &spec.repository) {
        (Some(_), _) => None,
        (None, None) => default_tag,
        (None, Some(_)) => default_tag.or(own),
    };
    let tag = spec.tag.as_deref().or(inherited);
    let digest = match (&spec.digest, &spec.tag, &spec.repository) {
        (Some(digest), ..) => Some(digest.as_str()),
        (None, None, None) => default_digest,
        _ => None,
    };
    let mut image = repository.to_owned();
    for (mark, part) in [(':', tag), ('@', digest)] {
        if let Some(part) = part {
            image.push(mark);
            image.push_str(part);
        }
    }
    image
}

fn pod(inputs: &Inputs<'_>) -> PodSpec {
    let node = inputs.node;
    let drain_ms = inputs.config.drain.delay_ms.saturating_add(inputs.config.drain.timeout_ms);
    let grace = drain_ms.div_ceil(1_000).saturating_add(GRACE_MARGIN);
    PodSpec {
        service_account_name: Some(names::name(node).to_owned()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: i64::try_from(grace).ok(),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(UID),
            run_as_group: Some(UID),
            fs_group: Some(UID),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
            ..Default::default()
        }),
        image_pull_secrets: some(
            node.spec.image_pull_secrets.iter().map(|s| LocalObjectReference { name: s.name.clone() }).collect(),
        ),
        node_selector: (!node.spec.node_selector.is_empty()).then(|| node.spec.node_selector.clone()),
        tolerations: some(node.spec.tolerations.clone()),
        containers: vec![container(inputs)],
        volumes: Some(volumes(node, inputs.source)),
        ..Default::default()
    }
}

fn some<T>(items: Vec<T>) -> Option<Vec<T>> {
    (!items.is_empty()).then_some(items)
}

fn container(inputs: &Inputs<'_>) -> Container {
    let text = str::to_owned;
    let config = |file: &str| format!("{}/{file}", placement::POD_CONFIG);
    let port = |name: &str, protocol: &str, number: u16| ContainerPort {
        name: Some(text(name)),
        container_port: i32::from(number),
        protocol: Some(text(protocol)),
        ..Default::default()
    };
    let mut ports = vec![port(names::SESSION_PORT, "TCP", inputs.config.overlay.listen.port())];
    ports.extend(inputs.config.overlay.listen_quic.map(|quic| port(names::QUIC_PORT, "UDP", quic.port())));
    ports.extend(inputs.config.tor.listen.map(|tor| port(names::TOR_PORT, "TCP", tor.port())));
    ports.push(port(names::ADMIN_PORT, "TCP", inputs.config.observability.metrics.port()));
    Container {
        name: text(names::CONTAINER),
        image: Some(text(inputs.image)),
        image_pull_policy: inputs.pull_policy.map(|policy| policy.as_str().to_owned()),
        command: Some(vec![text("overlay-daemon")]),
        args: Some(vec![
            text("run"),
            text("--config"),
            config(names::CONFIG_FILE),
            text("--peers"),
            config(&names::peers_file("$(POD_NAME)")),
        ]),
        env: Some(vec![
            EnvVar {
                name: text("POD_NAME"),
                value_from: Some(EnvVarSource {
                    field_ref: Some(ObjectFieldSelector { field_path: text("metadata.name"), api_version: None }),
                    ..Default::default()
                }),
                ..Default::default()
            },
            EnvVar {
                name: text("OVERLAY_TOKEN_FILE"),
                value: Some(format!("{}/{}", placement::POD_TOKEN, placement::LOCAL_TOKEN)),
                ..Default::default()
            },
        ]),
        ports: Some(ports),
        // Startup and liveness never depend on peers: a mesh that cannot form must not be restarted over it.
        startup_probe: Some(probe("/healthz", 1, STARTUP_SECONDS)),
        liveness_probe: Some(probe("/healthz", 10, 3)),
        readiness_probe: Some(probe("/readyz", 2, 2)),
        resources: inputs.node.spec.resources.as_ref().map(crate::api::Resources::to_container),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec![text("ALL")]), add: None }),
            read_only_root_filesystem: Some(true),
            ..Default::default()
        }),
        volume_mounts: Some(vec![
            mount("config", placement::POD_CONFIG, true),
            mount(TLS_VOLUME, placement::POD_TLS, true),
            mount("token", placement::POD_TOKEN, true),
            mount("run", placement::POD_RUN, false),
        ]),
        ..Default::default()
    }
}

/// When the kubelet pulls the image of `node`: as the spec says, or else as the installation does.
#[must_use]
pub fn pull_policy(node: &OverlayNode, default: Option<PullPolicy>) -> Option<PullPolicy> {
    node.spec.image.as_ref().and_then(|image| image.pull_policy).or(default)
}

fn probe(path: &str, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(names::ADMIN_PORT.to_owned()),
            ..Default::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(2),
        failure_threshold: Some(failures),
        ..Default::default()
    }
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..Default::default()
    }
}

/// Whole directories, never single files: only those are refreshed in a running pod.
fn volumes(node: &OverlayNode, source: TlsSource) -> Vec<Volume> {
    let secret = |volume: &str, secret: String| Volume {
        name: volume.to_owned(),
        secret: Some(SecretVolumeSource { secret_name: Some(secret), default_mode: Some(0o440), ..Default::default() }),
        ..Default::default()
    };
    vec![
        Volume {
            name: "config".to_owned(),
            config_map: Some(ConfigMapVolumeSource { name: names::config_map(node), ..Default::default() }),
            ..Default::default()
        },
        match source {
            TlsSource::PodCertificate => pod_certificate(node),
            TlsSource::SelfManaged => secret(TLS_VOLUME, names::tls_secret(node)),
        },
        secret("token", names::token_secret(node)),
        Volume {
            name: "run".to_owned(),
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some("Memory".to_owned()),
                size_limit: Some(Quantity("1Mi".to_owned())),
            }),
            ..Default::default()
        },
    ]
}

/// A key that the kubelet makes and a certificate that it asks of our signer, in the pod's
/// memory; the accepted authorities beside them.
fn pod_certificate(node: &OverlayNode) -> Volume {
    let certificate = PodCertificateProjection {
        signer_name: names::SIGNER.to_owned(),
        key_type: KEY_TYPE.to_owned(),
        credential_bundle_path: Some(placement::TLS_BUNDLE.to_owned()),
        max_expiration_seconds: i32::try_from(LEAF_LIFETIME.as_secs()).ok(),
        ..Default::default()
    };
    let ca = placement::TLS_CA.to_owned();
    let authorities = ConfigMapProjection {
        name: names::config_map(node),
        items: Some(vec![KeyToPath { key: ca.clone(), path: ca, mode: None }]),
        optional: None,
    };
    let sources = vec![
        VolumeProjection { pod_certificate: Some(certificate), ..Default::default() },
        VolumeProjection { config_map: Some(authorities), ..Default::default() },
    ];
    Volume {
        name: TLS_VOLUME.to_owned(),
        projected: Some(ProjectedVolumeSource { default_mode: Some(0o440), sources: Some(sources) }),
        ..Default::default()
    }
}

/// Where the pods of a template have their certificate from.
#[must_use]
pub fn source_of(template: &PodTemplateSpec) -> TlsSource {
    let volumes = template.spec.iter().flat_map(|pod| pod.volumes.iter().flatten());
    let mut projections =
        volumes.filter_map(|volume| volume.projected.as_ref()).flat_map(|p| p.sources.iter().flatten());
    let asks_us = |p: &VolumeProjection| p.pod_certificate.as_ref().is_some_and(|c| c.signer_name == names::SIGNER);
    if projections.any(asks_us) { TlsSource::PodCertificate } else { TlsSource::SelfManaged }
}
