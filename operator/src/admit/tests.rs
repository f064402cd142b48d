use std::fs;
use std::path::PathBuf;

use overlay_core::config;

use super::*;
use crate::api::TlsSource;
use crate::build::{self, Placement, names};

const HEAD: &str = "apiVersion: overlay.rustyonions.io/v1alpha1\nkind: OverlayNode\n";

fn one(body: &str) -> OverlayNode {
    let mut admitted = documents(&format!("{HEAD}{body}"), "mesh.yaml").unwrap();
    assert_eq!(admitted.len(), 1);
    admitted.remove(0).node
}

fn errors(text: &str) -> Vec<String> {
    documents(text, "mesh.yaml").unwrap_err().iter().map(ToString::to_string).collect()
}

fn rows(folder: &str) -> Vec<(String, String)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/manifests").join(folder);
    let mut rows: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(path).unwrap()))
        .collect();
    rows.sort();
    assert!(rows.len() >= 10, "the table is there");
    rows
}

/// The table that an API server is asked about too. A row's first line may say which field or
/// rule must be named.
#[test]
fn bad_manifests_are_refused_and_say_why() {
    for (row, text) in rows("bad") {
        let names = text.lines().next().and_then(|line| line.strip_prefix("# names: ")).unwrap_or_default();
        let errors = documents(&text, &row).expect_err(&row);
        let shown: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert!(shown.iter().any(|e| e.contains(names)), "{row} does not name {names}: {shown:#?}");
        assert!(errors.iter().all(|e| e.document == 0 || e.line.is_some()), "{row}: {shown:#?}");
    }
}

#[test]
fn good_manifests_are_admitted_and_make_a_configuration_that_daemons_read() {
    for (row, text) in rows("good") {
        let admitted = documents(&text, &row).unwrap_or_else(|e| panic!("{row}: {e:#?}"));
        for Admitted { node, .. } in admitted {
            let config = build::daemon_config(&node, &Placement::pod(&node, TlsSource::SelfManaged));
            let text = config.to_toml().unwrap();
            assert_eq!(config::daemon(&text).unwrap_or_else(|e| panic!("{row}: {e:#?}\n{text}")), config, "{row}");
            let id = names::identity(&node, names::DEFAULT_TRUST_DOMAIN).unwrap();
            for ordinal in 0..u32::try_from(node.spec.replicas).unwrap() {
                let peers =
                    build::peers_config(&node, ordinal, &id, |_| id.clone(), |other| names::pod_address(&node, other));
                let text = peers.to_toml().unwrap();
                assert_eq!(config::peers(&text).unwrap_or_else(|e| panic!("{row}: {e:#?}\n{text}")), peers, "{row}");
            }
        }
    }
}

#[test]
fn the_example_is_admitted() {
    let text = include_str!("../../../deploy/examples/mesh.yaml");
    let nodes = documents(text, "mesh.yaml").unwrap();
    assert_eq!(nodes.len(), 1);
    assert_eq!((names::name(&nodes[0].node), nodes[0].node.spec.replicas), ("mesh", 3));
}

#[test]
fn defaults_are_those_of_the_types() {
    let node = one("metadata: {name: m}\nspec: {}\n");
    assert_eq!(node.spec, crate::api::OverlayNodeSpec::default());
    assert_eq!(node.metadata.namespace.as_deref(), Some("default"));
    // Nested ones too, beside what is given.
    let node =
        one("metadata: {name: m, namespace: other}\nspec: {limits: {timeouts: {idle: 1m}}, gossip: {fanout: 2}}\n");
    assert_eq!(node.spec.limits.timeouts.idle, crate::api::Duration::from_secs(60));
    assert_eq!((node.spec.limits.timeouts.read.as_millis(), node.spec.limits.inflight), (5_000, 512));
    assert_eq!((node.spec.gossip.fanout, node.spec.gossip.dedupe.window.as_millis()), (2, 120_000));
    assert_eq!(node.metadata.namespace.as_deref(), Some("other"));
}

#[test]
fn messages_name_source_document_line_field_and_bound() {
    for (body, want) in [
        (
            "metadata: {name: m}\nspec:\n  transports:\n    tcp:\n      port: 70000\n",
            "mesh.yaml, document 1, line 7: spec.transports.tcp.port: must be at most 65535, not 70000",
        ),
        (
            "metadata: {name: m}\nspec:\n  replica: 3\n",
            "mesh.yaml, document 1, line 5: spec.replica: unknown field, did you mean replicas?",
        ),
        (
            "metadata: {name: m}\nspec:\n\treplicas: 3\n",
            "mesh.yaml, document 1, line 5: a tab: YAML does not allow tabs for indentation, use spaces",
        ),
        (
            "metadata: {name: m}\nspec:\n  replicas: 3\n\tlimits: {}\n",
            "mesh.yaml, document 1, line 6: a tab: YAML does not allow tabs for indentation, use spaces",
        ),
        (
            "metadata: {name: m}\nspec:\n  replicas: 3\n  replicas: 4\n",
            "mesh.yaml, document 1, line 6: replicas stands here a second time",
        ),
        (
            "metadata: {name: m}\nspec:\n  drain: {delay: soon}\n",
            "mesh.yaml, document 1, line 5: spec.drain.delay: must be a duration from 0s to 10m, such as 500ms, 10s or 1m30s",
        ),
        (
            "metadata: {name: m}\nspec: {replicas: '3'}\n",
            "mesh.yaml, document 1, line 4: spec.replicas: must be a whole number, not \"3\"",
        ),
        (
            "metadata: {name: m}\nspec: {profile: Giga}\n",
            "mesh.yaml, document 1, line 4: spec.profile: must be one of Micronode, Macronode, not \"Giga\"",
        ),
        (
            "metadata: {name: M}\nspec: {}\n",
            "mesh.yaml, document 1, line 3: metadata.name: must be lowercase letters, digits and '-', start with a letter and end with a letter or digit",
        ),
        (
            "metadata: {generateName: m}\nspec: {}\n",
            "mesh.yaml, document 1, line 3: metadata.generateName: cannot be used with apply; give metadata.name",
        ),
        ("spec: {}\n", "mesh.yaml, document 1, line 1: metadata: is required"),
        ("metadata: {name: m}\nspec: [\n", "mesh.yaml, document 1, line 4: not YAML: unclosed bracket '['"),
    ] {
        assert_eq!(errors(&format!("{HEAD}{body}")), [want]);
    }
}

#[test]
fn every_error_of_every_document_is_reported() {
    let text = format!(
        "{HEAD}metadata: {{name: m}}\nspec:\n  replicas: -1\n  amnesia: false\n  readiness: {{shedAtPercent: 95}}\n\
         --- # the second\nkind: Pod\napiVersion: v1\n---\n- a\n---\n# nothing\n---\n\
         apiVersion: overlay.rustyonions.io/v1\nkind: OverlayNode\n"
    );
    let got = errors(&text);
    for (index, want) in [
        "document 1, line 5: spec.replicas: must be at least 0, not -1",
        "document 1, line 6: spec.amnesia: must be true with profile Micronode",
        "document 1, line 7: spec.readiness.shedAtPercent: must be at most unreadyAtPercent",
        "document 2, line 10: apiVersion: must be overlay.rustyonions.io/v1alpha1, not \"v1\"",
        "document 3, line 12: must be an object with apiVersion",
        "document 4, line 16: apiVersion: version \"overlay.rustyonions.io/v1\" is not known",
    ]
    .iter()
    .enumerate()
    {
        assert!(got[index].contains(want), "{want}: {got:#?}");
    }
    assert_eq!(got.len(), 6, "{got:#?}");
}

#[test]
fn text_without_a_document_is_refused() {
    for text in ["", "\n", "# nothing\n", "---\n---\n", "\u{feff}"] {
        let got = errors(text);
        assert_eq!(got.len(), 1);
        assert!(got[0].starts_with("mesh.yaml: there is no document"), "{got:?}");
    }
}

#[test]
fn what_a_server_writes_is_dropped() {
    let node = one("metadata: {name: m, uid: abc, creationTimestamp: null}\nspec: {}\nstatus: {replicas: 4}\n");
    assert_eq!(node.status, None);
}

/// A bomb of aliases and a deep nest end in an error, not in memory.
#[test]
fn hostile_yaml_is_refused() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        bomb.push_str(&format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 9].join(", ")));
    }
    for text in [bomb, "[".repeat(10_000), format!("a: {}", "{b: ".repeat(10_000))] {
        assert!(documents(&text, "bomb").is_err());
    }
}
