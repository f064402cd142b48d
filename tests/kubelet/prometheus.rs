//! The Prometheus operator, as its users run it: the chart's monitors make every daemon and
//! the operator targets, and the golden metrics are there to be queried (I-10, C-5).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use overlay_tests::wait::Look;
use serde_json::Value;

use crate::world::{APPS, LIMIT, SYSTEM, World};

/// The metrics of the contract, and the labels that each must carry.
const GOLDEN: &[(&str, &[&str])] = &[
    ("overlay_inflight", &["peer"]),
    ("overlay_rejected_total", &["reason"]),
    ("overlay_gossip_frames_total", &["dir"]),
    ("request_latency_seconds_bucket", &["route", "le"]),
    ("session_open_total", &[]),
    ("session_close_total", &[]),
];

pub(crate) fn finds_and_queries_everything(world: &World) -> Result<()> {
    install(world)?;
    let chart = World::file("charts/overlay-operator");
    world.cluster.helm(&[
        "upgrade",
        "overlay-operator",
        &chart,
        "--namespace",
        SYSTEM,
        "--set",
        "monitoring.enabled=true",
        "--set",
        "monitoring.interval=2s",
        "--wait",
        "--timeout",
        "90s",
    ])?;
    world.wait_ready(APPS, "mesh")?;

    let daemons = world.pods(APPS, "mesh")?;
    world.until("every daemon and operator to be up", Duration::from_secs(300), || {
        let mut missing: Vec<String> = Vec::new();
        for pod in &daemons {
            if query(world, &format!("up{{namespace=\"{APPS}\",pod=\"{}\"}} == 1", pod.name))?.is_empty() {
                missing.push(pod.name.clone());
            }
        }
        if query(world, &format!("up{{namespace=\"{SYSTEM}\"}} == 1"))?.len() < 2 {
            missing.push("the operators".to_owned());
        }
        Ok(if missing.is_empty() { Look::Holds(()) } else { Look::NotYet(format!("not up: {missing:?}")) })
    })?;

    for (name, labels) in GOLDEN {
        let series = query(world, &format!("{name}{{namespace=\"{APPS}\"}}"))?;
        for pod in &daemons {
            let of_pod = series.iter().find(|one| one["metric"]["pod"] == *pod.name);
            let metric = &of_pod.with_context(|| format!("{name} of {} is not there", pod.name))?["metric"];
            ensure!(metric["amnesia"] == "on", "{name} says whether amnesia is on: {metric}");
            for label in *labels {
                ensure!(metric[*label].is_string(), "{name} has the label {label}: {metric}");
            }
        }
    }
    ensure!(!query(world, "overlay_operator_leader == 1")?.is_empty(), "the operator's own");
    Ok(())
}

fn install(world: &World) -> Result<()> {
    let ours = |name: &str| world.cluster.programs().program(name);
    for (image, program) in [
        ("localhost/prometheus-operator:1", ours("prometheus-operator")),
        ("localhost/prometheus-config-reloader:1", ours("prometheus-config-reloader")),
        ("localhost/prometheus:1", ours("prometheus")),
    ] {
        world.cluster.load(image, &[program])?;
    }
    let crds = ours("prometheus-operator-crd").canonicalize().context("the Prometheus operator's CRDs")?;
    // Their schemas are longer than the annotation of a client-side apply may be.
    world.kubectl(&format!("apply --server-side -f {}", crds.display()))?;
    world.kubectl(&format!("wait --for=condition=Established --timeout=60s -f {}", crds.display()))?;
    world.admin().apply("monitoring", include_str!("prometheus.yaml"))?;
    world.kubectl("rollout status -n monitoring deployment/prometheus-operator --timeout=90s")?;
    world.until("Prometheus", LIMIT, || {
        let set = world.admin().get("monitoring", "statefulset", "prometheus-one")?;
        let ready = set.is_some_and(|set| set["status"]["readyReplicas"] == 1);
        Ok(if ready { Look::Holds(()) } else { Look::NotYet(world.state("monitoring")) })
    })
}

/// An instant query, through the API server.
fn query(world: &World, expression: &str) -> Result<Vec<Value>> {
    let escaped: String = expression
        .bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect();
    let path =
        format!("/api/v1/namespaces/monitoring/services/prometheus-operated:web/proxy/api/v1/query?query={escaped}");
    let answer: Value = serde_json::from_str(&world.admin().run(&["get", "--raw", &path])?)?;
    Ok(answer["data"]["result"].as_array().context("no result")?.clone())
}
