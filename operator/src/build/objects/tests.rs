use overlay_core::identity::{SpiffeId, TenantId};
use serde_json::{Value, json};

use super::*;
use crate::api::{
    Duration, Image, KeyExchange, LogLevel, OverlayNodeSpec, PullPolicy, Quantity, Resources, SecretName,
};
use crate::build::{Placement, daemon_config, image, peers_config, pull_policy};

const ID: &str = "spiffe://overlay.local/ns/a/overlaynode/mesh";

fn node(change: impl FnOnce(&mut OverlayNodeSpec)) -> OverlayNode {
    let mut spec = OverlayNodeSpec::default();
    change(&mut spec);
    let mut node = OverlayNode::new("mesh", spec);
    node.metadata.namespace = Some("a".into());
    node.metadata.uid = Some("11111111-2222-3333-4444-555555555555".into());
    node
}

fn build(node: &OverlayNode) -> Result<Objects, BuildError> {
    build_with(node, LeafSecret::Holds { certificate: b"certificate".to_vec(), key: b"key".to_vec() })
}

fn build_with(node: &OverlayNode, leaf: LeafSecret) -> Result<Objects, BuildError> {
    let id: SpiffeId = ID.parse().unwrap();
    let source = match leaf {
        LeafSecret::Holds { .. } => TlsSource::SelfManaged,
        LeafSecret::Absent | LeafSecret::Emptied => TlsSource::PodCertificate,
    };
    let config = daemon_config(node, &Placement::pod(node, source));
    let replicas = u32::try_from(node.spec.replicas).unwrap();
    let peers: Vec<_> =
        (0..replicas).map(|n| peers_config(node, n, &id, |_| id.clone(), |m| names::pod_address(node, m))).collect();
    let some = |text: &str| text.as_bytes().to_vec();
    let credentials = Credentials {
        leaf,
        ca: some("ca"),
        token_keys: some("{}"),
        peer_token: some("peer token"),
        local_token: some("local token"),
    };
    let image = image(node, "registry.example/overlay-daemon:1.0");
    objects(&Inputs {
        node,
        config: &config,
        peers: &peers,
        image: &image,
        pull_policy: pull_policy(node, None),
        source,
        credentials: &credentials,
    })
}

fn stateful_set(node: &OverlayNode) -> Value {
    serde_json::to_value(build(node).unwrap().stateful_set).unwrap()
}

#[test]
fn everything_is_named_labelled_and_owned() {
    let o = build(&node(|_| ())).unwrap();
    let metadata = [
        ("mesh", &o.service_account.metadata),
        ("mesh-tls", &o.tls.as_ref().unwrap().metadata),
        ("mesh-token", &o.token.metadata),
        ("mesh-config", &o.config.metadata),
        ("mesh-peers", &o.peers.metadata),
        ("mesh", &o.client.metadata),
        ("mesh", &o.stateful_set.metadata),
    ];
    for (name, metadata) in metadata {
        assert_eq!((metadata.name.as_deref(), metadata.namespace.as_deref()), (Some(name), Some("a")));
        let labels = metadata.labels.as_ref().unwrap();
        assert_eq!((labels[labels::NAME].as_str(), labels[labels::MANAGED_BY].as_str()), ("mesh", labels::OPERATOR));
        let owner = serde_json::to_value(&metadata.owner_references).unwrap();
        let want = json!([{
            "apiVersion": "overlay.rustyonions.io/v1alpha1", "kind": "OverlayNode", "name": "mesh",
            "uid": "11111111-2222-3333-4444-555555555555", "controller": true,
        }]);
        assert_eq!(owner, want);
    }
}

/// The pods fit the restricted Pod Security standard, and mount nothing that is not theirs.
#[test]
fn the_stateful_set() {
    let mut got = stateful_set(&node(|_| ()));
    // What is hashed is the core's to say.
    got["spec"]["template"]["metadata"]["annotations"][labels::RESTART_HASH] = json!("HASH");
    let want: Value = serde_json::from_str(include_str!("stateful-set.json")).unwrap();
    assert_eq!(got, want, "got:\n{}", serde_json::to_string_pretty(&got).unwrap());
}

#[test]
fn services() {
    let o = build(&node(|spec| spec.transports.tcp.port = 7000)).unwrap();
    let spec = |service: &Service| serde_json::to_value(&service.spec).unwrap();
    let selector = json!({ "app.kubernetes.io/name": "overlay-daemon", "overlay.rustyonions.io/name": "mesh" });
    let session = json!({ "name": "overlay", "port": 7000, "protocol": "TCP", "targetPort": "overlay" });
    let admin = json!({ "name": "overlay-admin", "port": 9600, "protocol": "TCP", "targetPort": "overlay-admin" });
    let client = json!({ "type": "ClusterIP", "selector": selector, "ports": [session] });
    assert_eq!(spec(&o.client), client);
    let peers = json!({
        "type": "ClusterIP", "clusterIP": "None", "publishNotReadyAddresses": true,
        "selector": selector, "ports": [session, admin],
    });
    assert_eq!(spec(&o.peers), peers);
}

/// QUIC is UDP, and may have the number that TCP has; what an onion service forwards has a port of
/// its own.
#[test]
fn ports_of_quic_and_tor() {
    let o = build(&node(|spec| {
        spec.transports.quic.enabled = true;
        spec.transports.tor.enabled = true;
        spec.transports.tor.port = Some(9501);
    }))
    .unwrap();
    let ports = |spec: Value| {
        let ports = spec.as_array().unwrap().clone();
        ports
            .iter()
            .map(|p| {
                format!(
                    "{} {} {}",
                    p["name"],
                    p["protocol"],
                    p["port"].as_i64().or(p["containerPort"].as_i64()).unwrap()
                )
            })
            .collect::<Vec<_>>()
    };
    let (tcp, quic, admin) =
        ("\"overlay\" \"TCP\" 9500", "\"overlay-quic\" \"UDP\" 9500", "\"overlay-admin\" \"TCP\" 9600");
    let tor = "\"overlay-tor\" \"TCP\" 9501";
    let service = |service: &Service| ports(serde_json::to_value(&service.spec).unwrap()["ports"].clone());
    assert_eq!(service(&o.client), [tcp, quic, tor]);
    assert_eq!(service(&o.peers), [tcp, quic, tor, admin]);
    let set = serde_json::to_value(&o.stateful_set).unwrap();
    assert_eq!(ports(set["spec"]["template"]["spec"]["containers"][0]["ports"].clone()), [tcp, quic, tor, admin]);
}

#[test]
fn a_service_account_without_a_mounted_token() {
    let o = build(&node(|_| ())).unwrap();
    assert_eq!(o.service_account.automount_service_account_token, Some(false));
    assert_eq!(o.stateful_set.spec.unwrap().template.spec.unwrap().automount_service_account_token, Some(false));
}

#[test]
fn configuration_and_secrets() {
    let o = build(&node(|spec| spec.replicas = 2)).unwrap();
    let files = o.config.data.unwrap();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["overlay.toml", "peers-mesh-0.toml", "peers-mesh-1.toml"]);
    let peers = overlay_core::config::peers(&files["peers-mesh-1.toml"]).unwrap();
    assert_eq!((peers.name.as_str(), peers.peers.len()), ("mesh-1", 1));
    assert_eq!(peers.peers[0].address, "mesh-0.mesh-peers.a.svc:9500");
    let config = overlay_core::config::daemon(&files["overlay.toml"]).unwrap();
    let template = o.stateful_set.spec.unwrap().template.metadata.unwrap().annotations.unwrap();
    assert_eq!(template[labels::RESTART_HASH], config.restart_hash().unwrap());
    let keys = |secret: &Secret| secret.data.as_ref().unwrap().keys().cloned().collect::<Vec<_>>();
    let tls = o.tls.unwrap();
    assert_eq!(
        (keys(&tls), tls.type_.as_deref()),
        (vec!["ca.crt".into(), "tls.crt".into(), "tls.key".into()], Some("kubernetes.io/tls"))
    );
    assert_eq!(keys(&o.token), ["local", "peer", "token-keys.json"]);
}

/// A key of its own for each pod: in no Secret, and what a Secret held from before is taken out.
#[test]
fn certificates_of_the_pods_own() {
    let node = node(|_| ());
    let o = build_with(&node, LeafSecret::Absent).unwrap();
    assert!(o.tls.is_none());
    let template = &o.stateful_set.spec.as_ref().unwrap().template;
    assert_eq!(workload::source_of(template), TlsSource::PodCertificate);
    let template = serde_json::to_value(template).unwrap();
    let volumes = template["spec"]["volumes"].as_array().unwrap();
    assert_eq!(
        volumes.iter().find(|v| v["name"] == "tls").unwrap()["projected"],
        json!({
            "defaultMode": 0o440,
            "sources": [
                { "podCertificate": {
                    "signerName": "overlay.rustyonions.io/mesh", "keyType": "ED25519",
                    "credentialBundlePath": "bundle.pem", "maxExpirationSeconds": 86_400,
                } },
                { "configMap": { "name": "mesh-config", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
            ],
        })
    );
    assert!(!template.to_string().contains("mesh-tls"));
    let mounts = template["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
    assert!(mounts.contains(&json!({ "name": "tls", "mountPath": "/etc/overlay/tls", "readOnly": true })));
    let files = o.config.data.unwrap();
    assert_eq!(files["ca.crt"], "ca");
    let tls = overlay_core::config::daemon(&files["overlay.toml"]).unwrap().tls;
    assert_eq!((tls.certificate.to_str(), tls.key), (Some("/etc/overlay/tls/bundle.pem"), tls.certificate.clone()));

    let emptied = build_with(&node, LeafSecret::Emptied).unwrap().tls.unwrap();
    let data = emptied.data.unwrap();
    assert!(data["tls.key"].0.is_empty() && data["tls.crt"].0.is_empty() && data["ca.crt"].0 == b"ca");

    let shared = build(&node).unwrap().stateful_set.spec.unwrap().template;
    assert_eq!(workload::source_of(&shared), TlsSource::SelfManaged);
    let config = |source| daemon_config(&node, &Placement::pod(&node, source));
    let alike = |source| {
        pod_template(&node, &config(source), &image(&node, "registry.example/overlay-daemon:1.0"), None, source)
    };
    assert_eq!(alike(TlsSource::SelfManaged).unwrap(), shared, "as it is built");
}

/// What a running daemon takes up rolls nothing: peers, limits, gossip caps and the like.
#[test]
fn what_rolls_pods() {
    let template = |change: fn(&mut OverlayNodeSpec)| stateful_set(&node(change))["spec"]["template"].clone();
    let base = template(|_| ());
    assert_eq!(base, template(|s| s.replicas = 5));
    assert_eq!(base, template(|s| s.limits.inflight = 100));
    assert_eq!(base, template(|s| s.gossip.fanout = 2));
    assert_eq!(base, template(|s| s.readiness.min_peers = 1));
    assert_eq!(base, template(|s| s.tls.key_exchange = KeyExchange::PreferHybrid));
    assert_eq!(base, template(|s| s.logging.level = LogLevel::Debug));
    assert_ne!(base, template(|s| s.drain.delay = Duration::from_secs(9)));
    assert_ne!(base, template(|s| s.auth.tenants = vec![TenantId(7)]));
    assert_ne!(base, template(|s| s.transports.tcp.port = 7000));
}

#[test]
fn what_a_spec_sets_of_a_pod() {
    let set = stateful_set(&node(|spec| {
        spec.replicas = 0;
        spec.image = Some(Image { pull_policy: Some(PullPolicy::Never), ..Default::default() });
        spec.image_pull_secrets = vec![SecretName { name: "registry".into() }];
        spec.resources =
            Some(Resources { limits: [("memory".to_owned(), Quantity("64Mi".into()))].into(), ..Default::default() });
        spec.node_selector = [("disk".to_owned(), "fast".to_owned())].into();
        spec.drain.delay = Duration::from_millis(1_500);
        spec.drain.timeout = Duration::from_secs(60);
    }));
    assert_eq!(set["spec"]["replicas"], 0);
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["terminationGracePeriodSeconds"], 67, "1.5 and 60, rounded up, and 5");
    assert_eq!(pod["imagePullSecrets"], json!([{ "name": "registry" }]));
    assert_eq!(pod["nodeSelector"], json!({ "disk": "fast" }));
    assert_eq!(pod["containers"][0]["resources"], json!({ "limits": { "memory": "64Mi" } }));
    assert_eq!(pod["containers"][0]["imagePullPolicy"], "Never");
}

#[test]
fn pull_policies() {
    use PullPolicy::{Always, Never};
    for (own, default, want) in [
        (None, None, None),
        (None, Some(Always), Some(Always)),
        (Some(Never), Some(Always), Some(Never)),
        (Some(Never), None, Some(Never)),
    ] {
        let node = node(|spec| spec.image = Some(Image { pull_policy: own, ..Default::default() }));
        assert_eq!(pull_policy(&node, default), want);
    }
}

#[test]
fn images() {
    let digest = format!("sha256:{}", "a".repeat(64));
    let some = |s: &str| Some(s.to_owned());
    let pinned = format!("r.example:5000/x:1@{digest}");
    let by_digest = format!("r.example:5000/x@{digest}"); // as the chart has it
    for (default, repository, tag, with_digest, want) in [
        ("overlay-daemon:1", None, None, false, "overlay-daemon:1".to_owned()),
        ("r.example:5000/x", None, None, false, "r.example:5000/x".to_owned()),
        (&pinned, None, None, false, pinned.clone()),
        (&pinned, None, Some("2"), false, "r.example:5000/x:2".to_owned()),
        (&pinned, Some("mine/y"), None, false, "mine/y:1".to_owned()),
        (&by_digest, None, None, false, by_digest.clone()),
        (&by_digest, None, Some("2"), false, "r.example:5000/x:2".to_owned()),
        (&by_digest, Some("mine/y"), None, false, format!("mine/y:{}", env!("CARGO_PKG_VERSION"))),
        ("x:1", Some("mine/y"), Some("2"), false, "mine/y:2".to_owned()),
        ("x:1", None, None, true, format!("x@{digest}")),
        ("x:1", Some("mine/y"), Some("2"), true, format!("mine/y:2@{digest}")),
    ] {
        let node = node(|spec| {
            spec.image = Some(Image {
                repository: repository.and_then(some),
                tag: tag.and_then(some),
                digest: with_digest.then(|| digest.clone()),
                pull_policy: None,
            });
        });
        assert_eq!(image(&node, default), want);
    }
}

#[test]
fn too_much_configuration() {
    let node = node(|_| ());
    let id: SpiffeId = format!("spiffe://overlay.local/ns/a/overlaynode/{}", "m".repeat(1_900)).parse().unwrap();
    let mut big = node.clone();
    big.spec.replicas = 64;
    let peers: Vec<_> =
        (0..64).map(|n| peers_config(&big, n, &id, |_| id.clone(), |m| names::pod_address(&big, m))).collect();
    let source = TlsSource::PodCertificate;
    let config = daemon_config(&big, &Placement::pod(&big, source));
    let credentials = Credentials::default();
    let inputs = Inputs {
        node: &big,
        config: &config,
        peers: &peers,
        image: "x",
        pull_policy: None,
        source,
        credentials: &credentials,
    };
    let result = objects(&inputs);
    match result {
        Err(BuildError::ConfigTooLarge { replicas: 64, bytes }) => assert!(bytes > MAX_CONFIG),
        _ => panic!("it was built"),
    }
}
