use super::*;
use clap::Parser;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn parse(arguments: &[&str]) -> Result<Args, String> {
    Cli::try_parse_from(std::iter::once(&"local").chain(arguments)).map(|cli| cli.args).map_err(|e| e.to_string())
}

#[test]
fn arguments_have_their_defaults() {
    let args = parse(&["mesh.yaml", "more", "-"]).unwrap();
    let want = Args {
        inputs: vec!["mesh.yaml".into(), "more".into(), "-".into()],
        dry_run: false,
        exit_when_ready: false,
        ready_timeout: Duration::from_secs(60),
        output: None,
        quiet: false,
        trust_domain: "overlay.local".to_owned(),
    };
    assert_eq!(args, want);
    let args = parse(&[
        "m",
        "--exit-when-ready",
        "--ready-timeout",
        "1m30s",
        "--output",
        "json",
        "--trust-domain",
        "a.example",
    ])
    .unwrap();
    assert_eq!((args.ready_timeout, args.output), (Duration::from_secs(90), Some(OutputForm::Json)));
}

#[test]
fn wrong_arguments_say_why() {
    let table: [(&[&str], &str); 6] = [
        (&[], "required"),
        (&["m", "--ready-timeout", "5s"], "--exit-when-ready"),
        (&["m", "--exit-when-ready", "--ready-timeout", "5"], "must be a duration"),
        (&["m", "--output", "yaml"], "[possible values: table, plain, json]"),
        (&["m", "--trust-domain", "Not/One"], "lowercase letters"),
        (&["m", "--dry-run", "--output", "json"], "cannot be used with"),
    ];
    for (arguments, part) in table {
        let message = parse(arguments).unwrap_err();
        assert!(message.contains(part), "{arguments:?}: {message}");
    }
}

#[test]
fn only_a_kubelet_gives_pods_certificates() {
    for (source, refused) in [("Auto", false), ("SelfManaged", false), ("PodCertificate", true)] {
        let node: OverlayNode = serde_json::from_value(serde_json::json!({
            "apiVersion": "overlay.rustyonions.io/v1alpha1", "kind": "OverlayNode",
            "metadata": { "namespace": "a", "name": "mesh" }, "spec": { "tls": { "source": source } },
        }))
        .unwrap();
        let message = lacking(&node);
        assert_eq!(message.is_some(), refused, "{source}");
        assert!(message.is_none_or(|m| m.starts_with("OverlayNode a/mesh: spec.tls.source: PodCertificate")));
    }
}
