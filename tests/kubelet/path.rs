//! A user's path, with a user's tools: `helm install`, `kubectl apply`, pods that run and
//! speak, a cap that changes while they do, a pod that is lost, `kubectl delete`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use overlay_tests::http::metric_sum;
use overlay_tests::wait::{self, Look};

use crate::world::{APPS, LIMIT, SOON, SYSTEM, World};

const RELEASE: &str = "overlay-operator";

pub(crate) fn helm_installs_the_operator(world: &World) -> Result<()> {
    let chart = World::file("charts/overlay-operator");
    world.cluster.helm(&["install", RELEASE, &chart, "--namespace", SYSTEM, "--wait", "--timeout", "90s"])?;
    let leaders = || -> Result<Vec<String>> {
        let names =
            world.kubectl(&format!("get pods -n {SYSTEM} -l app.kubernetes.io/name=overlay-operator -o name"))?;
        let mut leaders = Vec::new();
        for pod in names.lines().filter_map(|line| line.strip_prefix("pod/")) {
            let text =
                world.kubectl(&format!("get --raw /api/v1/namespaces/{SYSTEM}/pods/{pod}:8080/proxy/metrics"))?;
            if metric_sum(&text, "overlay_operator_leader") == Some(1.0) {
                leaders.push(pod.to_owned());
            }
        }
        Ok(leaders)
    };
    world.until("one operator to lead", LIMIT, || {
        let leaders = leaders()?;
        Ok(if leaders.len() == 1 { Look::Holds(()) } else { Look::NotYet(format!("{leaders:?}")) })
    })?;
    let service = world
        .kubectl(&format!("get --raw /api/v1/namespaces/{SYSTEM}/services/{RELEASE}-metrics:metrics/proxy/metrics"))?;
    ensure!(service.contains("overlay_operator_"), "the operator's own metrics by its Service: {service}");
    Ok(())
}

pub(crate) fn the_example_becomes_ready(world: &World) -> Result<()> {
    world.kubectl(&format!("apply -n {APPS} -f {}", World::file("deploy/examples/mesh.yaml")))?;
    world.wait_ready(APPS, "mesh")?;
    let pods = world.pods(APPS, "mesh")?;
    ensure!(pods.len() == 3 && pods.iter().all(|pod| pod.ready && pod.restarts == 0), "{pods:?}");
    Ok(())
}

pub(crate) fn columns(world: &World) -> Result<()> {
    let shown = world.kubectl(&format!("get overlaynode mesh -n {APPS} -o wide"))?;
    let mut lines = shown.lines();
    let header: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    ensure!(header == ["NAME", "PROFILE", "DESIRED", "READY", "STATUS", "PQ", "AGE", "MESSAGE", "IMAGE"], "{header:?}");
    let row: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    ensure!(row.starts_with(&["mesh", "Micronode", "3", "3", "AllReady", "RequireHybrid"]), "{row:?}");
    Ok(())
}

/// I-11 too: every session of every daemon is post-quantum.
pub(crate) fn messages_reach_every_pod(world: &World) -> Result<()> {
    let message = world.cluster.folder().join("hello");
    fs::write(&message, "hello")?;
    let others = ["mesh-1", "mesh-2"];
    let subscribers: Vec<_> =
        others.iter().map(|pod| world.subscribe(APPS, pod, &["news", "--count", "1"])).collect::<Result<_>>()?;
    world.publish(APPS, "mesh-0", "news", &message)?;
    for (pod, subscriber) in others.iter().zip(subscribers) {
        ensure!(subscriber.finish(LIMIT)? == b"hello", "{pod} got another message");
    }
    for pod in ["mesh-0", "mesh-1", "mesh-2"] {
        let metrics = world.admin_route(APPS, pod, "/metrics")?;
        let count = |group: &str| {
            let series = format!("overlay_key_exchange_total{{group=\"{group}\"");
            let line = metrics.lines().find(|line| line.starts_with(&series));
            line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        };
        ensure!(count("hybrid").is_some_and(|n| n > 0.0), "{pod} counts no hybrid key exchange");
        ensure!(count("classical") == Some(0.0), "{pod} has a session without the hybrid key exchange");
        // I-8: under the container runtime's own restrictions too.
        let enforced = "overlay_confined{measure=\"landlock\",amnesia=\"on\"} 1";
        ensure!(metrics.lines().any(|line| line == enforced), "{pod} may write to its file systems");
    }
    Ok(())
}

pub(crate) fn a_mebibyte_arrives_whole(world: &World) -> Result<()> {
    let file = world.cluster.folder().join("mebibyte");
    let bytes: Vec<u8> = (0_u32..1 << 18).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    fs::write(&file, &bytes)?;
    let subscriber = world.subscribe(APPS, "mesh-2", &["files", "--count", "1"])?;
    world.publish(APPS, "mesh-1", "files", &file)?;
    let got = subscriber.finish(LIMIT)?;
    ensure!(got.len() == 1 << 20 && blake3::hash(&got) == blake3::hash(&bytes), "{} other bytes arrived", got.len());
    Ok(())
}

/// In effect within seconds, by the hash that each daemon reports; no pod is another one, no
/// container restarted, no session closed.
pub(crate) fn a_gossip_cap_changes_in_running_daemons(world: &World) -> Result<()> {
    let pods = world.pods(APPS, "mesh")?;
    // What the cases before ran in the pods has ended; that the daemons have seen it as well
    // is awaited, or it would count as sessions closed here.
    world.until("the pods' own clients to have gone", SOON, || {
        let mut busy = Vec::new();
        for pod in &pods {
            let metrics = world.admin_route(APPS, &pod.name, "/metrics")?;
            let local = metrics.lines().find(|line| line.starts_with("overlay_sessions_active{group=\"none\""));
            busy.extend(local.filter(|line| !line.ends_with(" 0")).map(|line| format!("{}: {line}", pod.name)));
        }
        Ok(if busy.is_empty() { Look::Holds(()) } else { Look::NotYet(format!("{busy:?}")) })
    })?;
    let closed = |pod: &str| world.metric(APPS, pod, "session_close_total");
    let before: Vec<f64> = pods.iter().map(|pod| closed(&pod.name)).collect::<Result<_>>()?;
    let hash = || -> Result<String> {
        let node = world.admin().must_get(APPS, "overlaynode", "mesh")?;
        Ok(node["status"]["configHash"].as_str().context("no configHash")?.to_owned())
    };
    let old = hash()?;

    world.kubectl(&format!(
        r#"patch overlaynode mesh -n {APPS} --type=merge -p {{"spec":{{"gossip":{{"fanout":3}}}}}}"#
    ))?;
    world.until("every daemon to run the new configuration", SOON, || {
        let new = hash()?;
        let mut behind = Vec::new();
        for pod in &pods {
            let info = world.admin_route(APPS, &pod.name, "/metrics")?;
            let info = info.lines().find(|line| line.starts_with("overlay_config_info{")).unwrap_or_default();
            if new == old || !info.contains(&format!("hash=\"{new}\"")) {
                behind.push(format!("{}: {info}", pod.name));
            }
        }
        Ok(if behind.is_empty() { Look::Holds(()) } else { Look::NotYet(format!("status has {new}; {behind:?}")) })
    })?;
    world.until("the operator to have seen it", SOON, || {
        let [status, reason, message] = world.condition(APPS, "mesh", "Ready")?;
        Ok(if status == "True" { Look::Holds(()) } else { Look::NotYet(format!("{reason}: {message}")) })
    })?;
    ensure!(world.pods(APPS, "mesh")? == pods, "the same pods, not restarted");
    let after: Vec<f64> = pods.iter().map(|pod| closed(&pod.name)).collect::<Result<_>>()?;
    ensure!(before == after, "a session was closed: {before:?} {after:?}");
    Ok(())
}

/// The publisher's next message waits for the answer to the one before, so the traffic is as
/// fast as the mesh, and lasts until the pod is back.
pub(crate) fn a_deleted_pod_rejoins_under_traffic(world: &World) -> Result<()> {
    let old = world.pods(APPS, "mesh")?.pop().context("three pods")?;
    let subscriber = world.subscribe(APPS, "mesh-1", &["traffic"])?;
    let mut publisher = world
        .exec(APPS, "mesh-0", &["pub", "traffic", "--lines", "--retries", "100"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = publisher.stdin.take().context("a pipe")?;
    let mut accepted = BufReader::new(publisher.stdout.take().context("a pipe")?).lines();
    let mut publish = |line: &str| -> Result<()> {
        writeln!(lines, "{line}")?;
        accepted.next().context("pub ended")??;
        Ok(())
    };

    world.kubectl(&format!("delete pod {} -n {APPS} --wait=false", old.name))?;
    let mut sent = Vec::new();
    let deadline = wait::now() + LIMIT;
    loop {
        for _ in 0..50 {
            sent.push(format!("message {}", sent.len()));
            publish(&sent[sent.len() - 1])?;
        }
        let now = world.pods(APPS, "mesh")?;
        if now.iter().any(|pod| pod.name == old.name && pod.uid != old.uid && pod.ready) {
            break;
        }
        ensure!(wait::now() < deadline, "{} does not come back\n{}", old.name, world.state(APPS));
    }
    publish("last")?;
    drop(lines);
    ensure!(publisher.wait()?.success(), "pub");
    // A message that was asked for again may come after later ones, but every one comes, and once.
    sent.push("last".to_owned());
    let (got, sent) = (subscriber.lines(sent.len())?, BTreeSet::from_iter(sent));
    let distinct = BTreeSet::from_iter(got.iter().cloned());
    let missing: Vec<&String> = sent.difference(&distinct).take(5).collect();
    ensure!(missing.is_empty(), "of {} messages these never came: {missing:?}; others came twice", sent.len());
    // A topic of its own: what the pod missed may still be on its way to it.
    let back = world.subscribe(APPS, &old.name, &["back", "--count", "1"])?;
    let message = world.cluster.folder().join("back");
    fs::write(&message, "here")?;
    world.publish(APPS, "mesh-0", "back", &message)?;
    ensure!(back.finish(LIMIT)? == b"here", "the pod that came back is part of the mesh");
    world.wait_ready(APPS, "mesh")
}

/// The leader's pod goes, and what is asked for afterwards is done all the same.
pub(crate) fn another_operator_takes_over(world: &World) -> Result<()> {
    let holder = || world.kubectl(&format!("get lease -n {SYSTEM} {RELEASE} -o jsonpath={{.spec.holderIdentity}}"));
    let old = holder()?;
    let pod = world
        .kubectl(&format!("get pods -n {SYSTEM} -o name"))?
        .lines()
        .filter_map(|line| line.strip_prefix("pod/"))
        .find(|pod| old.starts_with(pod))
        .map(str::to_owned)
        .with_context(|| format!("the lease is held by no pod: {old}"))?;
    world.kubectl(&format!("delete pod {pod} -n {SYSTEM} --wait=false"))?;
    world.apply_node(APPS, "after", "{replicas: 1, drain: {delay: 0s}}")?;
    world.wait_ready(APPS, "after")?;
    ensure!(holder()? != old, "the lease has another holder");
    world.kubectl(&format!("delete overlaynode after -n {APPS}"))?;
    Ok(())
}

pub(crate) fn the_mesh_scales_to_five(world: &World) -> Result<()> {
    let before = world.pods(APPS, "mesh")?;
    world.kubectl(&format!("scale overlaynode mesh -n {APPS} --replicas=5"))?;
    world.until("five daemons", LIMIT, || {
        let node = world.admin().must_get(APPS, "overlaynode", "mesh")?;
        let [ready, _, message] = world.condition(APPS, "mesh", "Ready")?;
        let five = ready == "True" && node["status"]["readyReplicas"] == 5;
        Ok(if five { Look::Holds(()) } else { Look::NotYet(message) })
    })?;
    let after = world.pods(APPS, "mesh")?;
    ensure!(after.get(..3) == Some(&before[..]), "those that were there go on: {after:?}");
    // A peer of each, not only of one.
    world.until("a session between each two", LIMIT, || {
        let mut fewer = Vec::new();
        for pod in &after {
            let sessions = world.metric(APPS, &pod.name, "overlay_sessions_active")?;
            if sessions < 4.0 {
                fewer.push(format!("{} has {sessions}", pod.name));
            }
        }
        Ok(if fewer.is_empty() { Look::Holds(()) } else { Look::NotYet(format!("{fewer:?}")) })
    })
}

pub(crate) fn deletion_collects_everything(world: &World) -> Result<()> {
    world.kubectl(&format!("delete overlaynode mesh -n {APPS}"))?;
    let label = "overlay.rustyonions.io/name=mesh";
    world.until("everything of it to go", LIMIT, || {
        let left = world.kubectl(&format!(
            "get pods,statefulsets,services,configmaps,secrets,serviceaccounts,poddisruptionbudgets -n {APPS} -l {label} -o name"
        ))?;
        Ok(if left.is_empty() { Look::Holds(()) } else { Look::NotYet(left) })
    })
}

/// The CRD is kept, and with it every OverlayNode and its pods; so are the installation's keys.
pub(crate) fn helm_uninstall_keeps_what_the_values_say(world: &World) -> Result<()> {
    world.apply_node(APPS, "kept", "{replicas: 1, drain: {delay: 0s}}")?;
    world.wait_ready(APPS, "kept")?;
    let pods = world.pods(APPS, "kept")?;
    world.cluster.helm(&["uninstall", RELEASE, "--namespace", SYSTEM, "--wait", "--timeout", "90s"])?;
    let left = world.kubectl(&format!("get deployments,services,roles,leases,serviceaccounts -n {SYSTEM} -o name"))?;
    let ours: Vec<&str> = left.lines().filter(|name| name.contains(RELEASE) && !name.starts_with("lease")).collect();
    ensure!(ours.is_empty(), "{ours:?}");
    world.kubectl("get crd overlaynodes.overlay.rustyonions.io")?;
    world.kubectl(&format!("get secret overlay-ca overlay-token-root -n {SYSTEM}"))?;
    ensure!(world.pods(APPS, "kept")? == pods, "the pods run on");

    // And back: what was kept is taken up again, by the same keys.
    let chart = World::file("charts/overlay-operator");
    world.cluster.helm(&["install", RELEASE, &chart, "--namespace", SYSTEM, "--wait", "--timeout", "90s"])?;
    world.wait_ready(APPS, "kept")?;
    ensure!(world.pods(APPS, "kept")? == pods, "nothing was rolled");
    world.kubectl(&format!("delete overlaynode kept -n {APPS}"))?;

    // A second one would take the first one's OverlayNodes.
    let second = ["install", "second", &chart, "--namespace", APPS, "--set", "crd.install=false"];
    let refused = world.cluster.helm(&second).err().context("helm installed a second operator")?;
    ensure!(format!("{refused:#}").contains("is installed already, as release"), "{refused:#}");
    Ok(())
}
