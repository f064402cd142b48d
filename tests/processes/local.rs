//! `overlay-operator local`: a mesh comes up, carries messages, survives the death of a
//! member, and leaves nothing behind.

pub(crate) mod mesh;
mod refusals;

use std::fs;
use std::process::Stdio;

use anyhow::{Result, ensure};
use overlay_tests::{http, programs, wait};
use rustix::process::Signal;

use self::mesh::{LIMIT, Mesh, is_alive};

/// Three replicas that do not linger when stopped.
const THREE: &str = "\
apiVersion: overlay.rustyonions.io/v1alpha1
kind: OverlayNode
metadata: {name: mesh}
spec:
  replicas: 3
  readiness: {minPeers: 2}
  drain: {delay: 0s, timeout: 5s}
";

/// One, and one of another name.
fn single(name: &str, drain: &str) -> String {
    format!(
        "apiVersion: overlay.rustyonions.io/v1alpha1\nkind: OverlayNode\nmetadata: {{name: {name}}}\nspec:\n  replicas: 1\n  drain: {drain}\n"
    )
}

/// The first three minutes of a user: the example, a message, a file, and what was counted.
#[test]
fn the_example_carries_messages_and_files() -> Result<()> {
    let example = programs::repository().join("deploy/examples/mesh.yaml");
    let mesh = Mesh::start_files(&[&example.to_string_lossy()], &[])?;
    let daemons = mesh.ready()?;
    ensure!(daemons.len() == 3, "three daemons: {daemons:?}");
    for daemon in &daemons {
        ensure!(http::get(daemon.admin, "/readyz")?.status == 200, "{} is ready", daemon.name);
    }

    let subscriber = mesh.subscribe(&daemons[0], "news", 1)?;
    mesh.publish(&daemons[2], "news", &["hello"])?;
    let got = subscriber.finish(LIMIT)?;
    ensure!(got == b"hello", "{:?}", String::from_utf8_lossy(&got));

    let file = mesh.folder().join("object");
    let bytes: Vec<u8> = (0_u32..1 << 18).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    ensure!(bytes.len() == 1 << 20);
    fs::write(&file, &bytes)?;
    let subscriber = mesh.subscribe(&daemons[1], "files", 1)?;
    mesh.publish(&daemons[0], "files", &["--file", &file.to_string_lossy()])?;
    let got = subscriber.finish(LIMIT)?;
    ensure!(blake3::hash(&got) == blake3::hash(&bytes), "another file arrived: {} bytes", got.len());

    for daemon in &daemons {
        let metrics = http::get(daemon.admin, "/metrics")?.body;
        let sum = |name: &str| http::metric_sum(&metrics, name).unwrap_or(-1.0);
        let hybrid = label_sum(&metrics, "overlay_key_exchange_total", "group=\"hybrid\"");
        let active = label_sum(&metrics, "overlay_sessions_active", "group=\"hybrid\"");
        ensure!(sum("overlay_gossip_frames_total") > 0.0, "{}: gossip frames", daemon.name);
        ensure!(active >= 2.0, "{}: a session with each of two peers, not {active}", daemon.name);
        ensure!(
            hybrid > 0.0 && hybrid == sum("overlay_key_exchange_total"),
            "{}: every key exchange is hybrid",
            daemon.name
        );
    }
    Ok(())
}

fn label_sum(metrics: &str, name: &str, label: &str) -> f64 {
    let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// SIGKILL of one: the others go on, it is started again and rejoins, nothing else restarts.
#[test]
fn a_killed_daemon_rejoins() -> Result<()> {
    let mesh = Mesh::start(THREE, &[])?;
    let daemons = mesh.ready()?;
    let others = [mesh.process_of(&daemons[0])?, mesh.process_of(&daemons[1])?];
    let victim = mesh.process_of(&daemons[2])?;
    mesh::kill(victim)?;

    let exited = mesh.event("exited")?;
    ensure!(exited["name"] == "mesh-2" && exited["restart_in_ms"] == 1_000, "{exited}");
    ensure!(exited["reason"].as_str().is_some_and(|reason| reason.contains("SIGKILL")), "{exited}");
    let subscriber = mesh.subscribe(&daemons[1], "news", 1)?;
    mesh.publish(&daemons[0], "news", &["still here"])?;
    ensure!(subscriber.finish(LIMIT)? == b"still here");

    ensure!(mesh.event("started")?["name"] == "mesh-2");
    wait::until_true("mesh-2 to be ready again", LIMIT, || {
        Ok(http::get(daemons[2].admin, "/readyz").is_ok_and(|answer| answer.status == 200))
    })?;
    // Another topic: what it missed may still be on its way to it.
    let subscriber = mesh.subscribe(&daemons[2], "later news", 1)?;
    mesh.publish(&daemons[0], "later news", &["welcome back"])?;
    ensure!(subscriber.finish(LIMIT)? == b"welcome back");

    ensure!(mesh.process_of(&daemons[2])? != victim, "a new process");
    ensure!(
        [mesh.process_of(&daemons[0])?, mesh.process_of(&daemons[1])?] == others,
        "the others are the same processes"
    );
    let events = mesh.events()?;
    ensure!(events.iter().filter(|event| event["event"] == "exited").count() == 1, "{events:?}");
    Ok(())
}

/// Ctrl-C: exit code 0, no process and no file left, and `stopped` is the last word.
#[test]
fn ctrl_c_leaves_nothing() -> Result<()> {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut mesh = Mesh::start(THREE, &[])?;
        let daemons = mesh.ready()?;
        let processes: Vec<_> = daemons.iter().map(|daemon| mesh.process_of(daemon)).collect::<Result<_>>()?;
        mesh.operator.signal(signal);
        let status = mesh.operator.wait(LIMIT)?;
        ensure!(status.success(), "{signal:?}: {status}: {}", mesh.operator.log_tail());
        ensure!(mesh.events()?.last().is_some_and(|event| event["event"] == "stopped"));
        ensure!(!processes.into_iter().any(is_alive), "{signal:?}: a daemon is left");
        ensure!(mesh.runtime_is_empty()?, "{signal:?}: the runtime folder is left");
    }
    Ok(())
}

/// The drain is waited for, and a second Ctrl-C cuts it short.
#[test]
fn a_second_ctrl_c_kills() -> Result<()> {
    let mut mesh = Mesh::start(&single("slow", "{delay: 10m, timeout: 10m}"), &[])?;
    let daemons = mesh.ready()?;
    let process = mesh.process_of(&daemons[0])?;
    mesh.operator.signal(Signal::INT);
    wait::until_true("the daemon to drain", LIMIT, || {
        Ok(http::get(daemons[0].admin, "/readyz").is_ok_and(|answer| answer.status == 503))
    })?;
    ensure!(is_alive(process), "draining, not dead");
    mesh.operator.signal(Signal::INT);
    ensure!(mesh.operator.wait(LIMIT)?.success());
    ensure!(!is_alive(process) && mesh.runtime_is_empty()?);
    Ok(())
}

/// What a killed operator leaves running is ended by the next run, of whatever name.
#[test]
fn the_next_run_clears_after_a_killed_operator() -> Result<()> {
    let mut mesh = Mesh::start(&single("left", "{delay: 0s, timeout: 1s}"), &[])?;
    let left = mesh.ready()?;
    let orphan = mesh.process_of(&left[0])?;
    mesh.operator.signal(Signal::KILL);
    mesh.operator.wait(LIMIT)?;
    ensure!(is_alive(orphan), "a daemon outlives a killed operator");
    mesh.restart(&single("next", "{delay: 0s, timeout: 1s}"))?;
    mesh.ready()?;
    ensure!(!is_alive(orphan) && !left[0].socket.exists(), "nothing is left of the first run");
    Ok(())
}

/// One name, one run; and two OverlayNodes of one run are two meshes.
#[test]
fn names_are_held_and_meshes_apart() -> Result<()> {
    let drain = "{delay: 0s, timeout: 1s}";
    let both = format!("{}---\n{}", single("one", drain), single("two", drain));
    let mesh = Mesh::start(&both, &[])?;
    let daemons = mesh.ready()?;
    ensure!(daemons.iter().map(|daemon| daemon.name.as_str()).collect::<Vec<_>>() == ["one-0", "two-0"]);

    let refused = mesh.again(&single("two", drain))?.stdout(Stdio::piped()).output()?;
    let message = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(1), "{message}");
    let pid = mesh.operator.id().to_string();
    ensure!(
        message.contains("default/two is running already") && message.contains(&pid),
        "names the process: {message}"
    );
    ensure!(http::get(daemons[1].admin, "/readyz")?.status == 200, "the first run is untouched");

    // Peers are those of the own OverlayNode: what one mesh says, the other does not hear.
    let subscriber = mesh.subscribe(&daemons[1], "news", 1)?;
    mesh.publish(&daemons[0], "news", &["for one"])?;
    mesh.publish(&daemons[1], "news", &["for two"])?;
    ensure!(subscriber.finish(LIMIT)? == b"for two");
    Ok(())
}
