use clap::Parser;
use overlay_core::grant::{Grant, Holder as Presenter, SignedBy, TokenKey};

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn parse(line: &[&str]) -> Result<CreateArgs, String> {
    let parsed = Cli::try_parse_from(["token", "create"].iter().chain(line)).map_err(|error| error.to_string())?;
    let Command::Create(args) = parsed.args.command;
    Ok(*args)
}

const ID: &str = "spiffe://example.org/ns/edge/overlaynode/mesh";

fn node() -> OverlayNode {
    serde_json::from_value(serde_json::json!({
        "apiVersion": "overlay.rustyonions.io/v1alpha1",
        "kind": "OverlayNode",
        "metadata": { "namespace": "edge", "name": "mesh" },
        "spec": { "replicas": 1, "auth": { "tenants": ["0", "00000000-0000-0000-0000-000000000005"] } },
    }))
    .unwrap()
}

fn minted(line: &[&str]) -> Result<Claims, String> {
    let args = parse(&[&["--file", "m.yaml", "--topics", "news", "--actions", "publish"], line].concat())?;
    let root = TokenRoot::generate().unwrap();
    let holder = holder(&args, &node()).map_err(|error| error.to_string())?;
    check(&args, &node(), &holder).map_err(|error| error.to_string())?;
    let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let token = mint(&args, &root, ID.parse().unwrap(), holder, now).map_err(|error| error.to_string())?;
    assert!(!format!("{args:?}").contains(&*token));
    root.read(&token).map_err(|error| error.to_string())
}

/// What is minted is what was asked for, and a daemon grants exactly that.
#[test]
fn a_token_says_what_was_asked_for() {
    let claims = minted(&["--topics", "log.*", "--actions", "subscribe,publish", "--ttl", "90m"]).unwrap();
    assert_eq!(claims.topics, ["news", "log.*"]);
    assert_eq!(claims.actions, [Action::Publish, Action::Subscribe]);
    assert_eq!((claims.nbf, claims.exp), (1_800_000_000, 1_800_005_400));
    assert_eq!((claims.sub.as_str(), claims.aud.as_str()), ("local", ID));
    let by = SignedBy { key: TokenKey([0; 32]), generation: 1 };
    let grant = Grant::new(claims.clone(), by, &claims.aud, &Presenter::Local, 1_800_000_000_000).unwrap();
    let permits =
        |topic: &str, tenant| grant.permit(Action::Subscribe, TenantId(tenant), Some(&topic.parse().unwrap())).is_ok();
    assert_eq!(
        [permits("log.a", 0), permits("news", 0), permits("other", 0), permits("news", 5)],
        [true, true, false, false]
    );
    for (line, sub) in
        [(&["--client", "collector"][..], "spiffe://example.org/ns/edge/client/collector"), (&["--holder", ID], ID)]
    {
        assert_eq!(minted(line).unwrap().sub, sub);
    }
}

/// Each error names the option, and what would be right.
#[test]
fn what_is_refused_names_the_option() {
    let many: Vec<String> = (0..64).map(|n| format!("{n:0>60}")).collect();
    let more: Vec<String> = (0..65).map(|n| n.to_string()).collect();
    let (many, more) = (many.join(","), more.join(","));
    let table: [(&[&str], &str); 10] = [
        (&["--topics", "a*b"], "--topics: \"a*b\": must be a topic"),
        (&["--topics", ""], "--topics: \"\": must be a topic"),
        (&["--topics", &more], "--topics: 66 of them; a token lists at most 64"),
        (&["--topics", many.trim_start_matches("0,")], "--topics: 65 of them"),
        (&["--tenant", "6"], "--tenant"),
        (
            &["--tenant", "00000000-0000-0000-0000-000000000006"],
            "is not in spec.auth.tenants of OverlayNode edge/mesh: 0, ",
        ),
        (&["--actions", "admin", "--client", "c"], "--actions: admin is allowed on the Unix socket only"),
        (&["--client", "a/b"], "--client: a/b: must be letters"),
        (&["--ttl", "0s"], "must be 1s to 8760h"),
        (&["--holder", "mesh"], "--holder"),
    ];
    for (line, part) in table {
        let error = minted(line).unwrap_err();
        assert!(error.contains(part), "{line:?}: {error}");
    }
    let long: Vec<String> = (0..30).map(|n| format!("{n:0>60}")).collect();
    let error = minted(&["--topics", &long.join(",")]).unwrap_err();
    assert!(error.contains("the token would have") && error.contains("at most 2048"), "{error}");
}

#[test]
fn one_overlay_node_is_chosen() {
    let other = {
        let mut n = node();
        n.metadata.name = Some("other".into());
        n
    };
    let admitted = |nodes: &[OverlayNode]| -> Vec<Admitted> {
        nodes.iter().map(|node| Admitted { node: node.clone(), document: 1, line: 1 }).collect()
    };
    let both = [node(), other];
    assert_eq!(names::name(&choose(admitted(&both), Some("other")).unwrap()), "other");
    assert!(choose(admitted(&both), None).unwrap_err().contains("mesh, other"));
    assert!(choose(admitted(&both), Some("third")).unwrap_err().contains("it has mesh, other"));
    assert!(choose(Vec::new(), None).unwrap_err().contains("no OverlayNode"));
}
