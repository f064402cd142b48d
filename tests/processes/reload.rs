//! Configuration that changes while a daemon runs: what is in effect follows the files, no
//! session is lost, and what cannot be taken up is said and counted (G-3's caps, I-9).

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use overlay_core::config::Profile;
use overlay_tests::files::replace;
use overlay_tests::http;
use overlay_tests::on_both_profiles;
use overlay_tests::programs;
use overlay_tests::status::report;
use overlay_tests::wait;
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::local::mesh::{Daemon, LIMIT, Mesh, one_mesh};

on_both_profiles!(
    caps_change_and_no_session_is_lost,
    peers_come_and_go,
    what_cannot_be_taken_up_is_counted_once,
    a_policy_without_keys_is_not_said_to_be_running,
);

/// A daemon of a mesh of two, and the files that it was started with.
struct Target {
    mesh: Mesh,
    daemon: Daemon,
}

impl Target {
    fn start(profile: Profile) -> Result<Self> {
        let mesh = Mesh::start(&one_mesh("two", profile, "replicas: 2, readiness: {minPeers: 1}"), &[])?;
        let daemon = mesh.ready()?.remove(0);
        Ok(Self { mesh, daemon })
    }

    /// Replaces a piece of one of the files, whole, as Kubernetes does.
    fn edit(&self, file: &str, from: &str, to: &str) -> Result<()> {
        let path = self.file(file);
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(from), "{file} has no {from}:\n{text}");
        replace(&path, text.replace(from, to))
    }

    fn file(&self, file: &str) -> PathBuf {
        self.daemon.socket.with_file_name(file)
    }

    /// What `/readyz` says is running.
    fn running(&self, which: &str) -> Result<String> {
        let body: Value = serde_json::from_str(&http::get(self.daemon.admin, "/readyz")?.body)?;
        Ok(body[which].as_str().with_context(|| format!("no {which} in {body}"))?.to_owned())
    }

    fn metrics(&self) -> Result<String> {
        Ok(http::get(self.daemon.admin, "/metrics")?.body)
    }

    /// Waits until something else is running, and says what.
    fn changed(&self, which: &str, was: &str) -> Result<String> {
        wait::until_true(&format!("another {which} to be running"), LIMIT, || Ok(self.running(which)? != was))?;
        self.running(which)
    }

    /// The number of the session with the peer, as `status` shows it.
    fn peer_session(&self) -> Result<Value> {
        let status = report(&self.daemon.socket, None)?;
        let sessions = status["sessions"].as_array().context("no sessions")?;
        Ok(sessions.iter().find(|session| session["kind"] == "peer").context("no peer")?["id"].clone())
    }

    fn failed_reloads(&self) -> Result<f64> {
        http::sample(&self.metrics()?, "overlay_config_reloads_total", "result=\"failed\"")
    }
}

fn caps_change_and_no_session_is_lost(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let was = target.running("config")?;
    let session = target.peer_session()?;
    // One request a second, so that a second one is refused.
    let rate = match profile {
        Profile::Micronode => 200,
        Profile::Macronode => 500,
    };
    target.edit("overlay.toml", &format!("per_peer_rps = {rate}"), "per_peer_rps = 1")?;
    target.edit("overlay.toml", "fanout = 6", "fanout = 2")?;
    wait::until_true("all three to be taken up", LIMIT, || {
        let hash = target.running("config")?;
        let info = target.metrics()?.contains(&format!("overlay_config_info{{hash=\"{hash}\""));
        target.mesh.publish(&target.daemon, "t", &["probe", "--retries", "0"]).ok();
        Ok(hash != was && info && quota(&target)? > 0.0)
    })?;
    ensure!(target.metrics()?.matches("overlay_config_info{").count() == 1, "one configuration is running");
    ensure!(target.peer_session()? == session, "the session with the peer is the one that it was");
    Ok(())
}

fn quota(target: &Target) -> Result<f64> {
    http::sample(&target.metrics()?, "overlay_rejected_total", "reason=\"quota\"")
}

/// A peer that is taken out loses its series at once, and stops being a peer when it had time
/// to drain; what it dials after that is a client's session. Put back, it is the peer that it was.
fn peers_come_and_go(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let path = target.file("peers-two-0.toml");
    let text = fs::read_to_string(&path)?;
    let alone = text.split("[[peer]]").next().context("a peers file")?.to_owned();
    let was = target.running("peers")?;
    let series =
        |target: &Target| Ok::<_, anyhow::Error>(target.metrics()?.contains("overlay_inflight{peer=\"two-1\""));
    ensure!(series(&target)?);

    let write = |text: &str| replace(&path, text);
    write(&alone)?;
    target.changed("peers", &was)?;
    ensure!(!series(&target)?, "the series of a peer that is no longer configured goes");
    let peers = |count: u32| {
        Ok::<_, anyhow::Error>(
            http::get(target.daemon.admin, "/readyz")?.body.contains(&format!("\"{count} of at least")),
        )
    };
    wait::until_true("it to be a peer no more", LIMIT, || peers(0))?;

    write(&text)?;
    wait::until_true("the peer to be back", LIMIT, || {
        Ok(target.running("peers")? == was && series(&target)? && peers(1)?)
    })
}

/// … unless SIGHUP asks for it.
fn what_cannot_be_taken_up_is_counted_once(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let was = target.running("config")?;
    target.edit("overlay.toml", "delay_ms = 0", "delay_ms = 7")?;
    wait::until_true(
        "a setting that waits for a restart to be counted",
        LIMIT,
        || Ok(target.failed_reloads()? == 1.0),
    )?;
    ensure!(target.running("config")? == was, "what is in effect is what it was");

    // Another setting that waits is told of too.
    target.edit("overlay.toml", "delay_ms = 7", "delay_ms = 8")?;
    wait::until_true("the next one to be counted", LIMIT, || Ok(target.failed_reloads()? == 2.0))?;

    target.edit("overlay.toml", "fanout = 6", "fanout = 0")?;
    wait::until_true("a broken file to be counted", LIMIT, || Ok(target.failed_reloads()? == 3.0))?;
    ensure!(target.running("config")? == was);

    // Nothing changed but that somebody asks, who is told of it again.
    let session = target.peer_session()?;
    kill_process(target.mesh.process_of(&target.daemon)?, Signal::HUP)?;
    wait::until_true("SIGHUP to have it looked at", LIMIT, || Ok(target.failed_reloads()? == 4.0))?;
    ensure!(target.peer_session()? == session, "the session with the peer is the one that it was");

    // Beside a setting that waits, one that does not is taken up.
    target.edit("overlay.toml", "fanout = 0", "fanout = 3")?;
    target.changed("config", &was)?;
    wait::until_true("what still waits to be counted again", LIMIT, || Ok(target.failed_reloads()? == 5.0))?;
    Ok(())
}

/// What is reported is what holds: a policy that cannot be put in force, for want of keys, is not
/// said to be running; once the keys are there again, it is.
fn a_policy_without_keys_is_not_said_to_be_running(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let was = target.running("config")?;
    let key = target.file("trust").join("tls.key");
    let text = fs::read_to_string(&key)?;
    fs::write(&key, "broken")?;
    target.edit("overlay.toml", "RequireHybrid", "PreferHybrid")?;
    wait::until_true("the policy to be refused", LIMIT, || Ok(target.failed_reloads()? == 1.0))?;
    ensure!(target.running("config")? == was, "what is in effect is what it was");
    fs::write(&key, text)?;
    target.changed("config", &was)?;
    Ok(())
}

/// QUIC takes the hybrid key exchange: a policy without it is not taken up while QUIC is accepted
/// or a peer is dialled over it, the field is named, and sessions go on.
#[test]
fn quic_keeps_the_hybrid_key_exchange() -> Result<()> {
    let spec = "replicas: 2, readiness: {minPeers: 1}, transports: {quic: {enabled: true}}, peers: {transport: QUIC}";
    let mesh = Mesh::start(&one_mesh("two", Profile::Micronode, spec), &[])?;
    let daemon = mesh.ready()?.remove(0);
    let target = Target { mesh, daemon };
    let was = target.running("config")?;
    target.edit("overlay.toml", "\"RequireHybrid\"", "\"PreferHybrid\"")?;
    let failed = "overlay_config_reloads_total{result=\"failed\"";
    wait::until_true("the new policy to be refused", LIMIT, || {
        let metrics = target.metrics()?;
        let line = metrics.lines().find(|line| line.starts_with(failed));
        Ok(line.is_some_and(|line| !line.ends_with(" 0")))
    })?;
    let log = target.mesh.operator.log();
    ensure!(log.contains("tls.key_exchange: must be RequireHybrid with overlay.listen_quic"), "{log}");
    ensure!(target.running("config")? == was, "another configuration is running");

    let check = |file: &str| {
        let mut command = Command::new(programs::built("overlay-daemon")?);
        command.arg("check").arg("--config").arg(target.file("overlay.toml")).arg("--peers").arg(target.file(file));
        anyhow::Ok(String::from_utf8_lossy(&command.output()?.stderr).into_owned())
    };
    let peers = format!("peers-{}.toml", target.daemon.name);
    target.edit("overlay.toml", "listen_quic", "# listen_quic")?;
    let said = check(&peers)?;
    ensure!(said.contains("peer[0].transport: must be TCP, or tls.key_exchange RequireHybrid"), "{said}");
    target.edit("overlay.toml", "\"PreferHybrid\"", "\"RequireHybrid\"")?;
    let said = check(&peers)?;
    ensure!(said.is_empty(), "{said}");
    ensure!(http::get(target.daemon.admin, "/readyz")?.status == 200, "the session goes on");
    Ok(())
}
