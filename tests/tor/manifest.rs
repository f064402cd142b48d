//! What a person writes: a manifest with a peer that is elsewhere and is reached by Tor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use overlay_core::config::{KeyExchange, Peer, Profile, Tls, Token};
use overlay_tests::process::Process;
use overlay_tests::programs;
use overlay_tests::subscriber::Subscriber;
use overlay_tests::tor::LIMIT;
use overlay_tests::wait::{self, Look};
use serde_json::Value;

use crate::world::{HARBOUR, World, command_at, sessions, subscribe, token_file, unreachable};

/// `overlay-operator local` runs the manifest; the peer has its trust, as a daemon elsewhere would.
pub(crate) fn a_manifest_has_a_peer_by_tor(world: &World) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("overlay-test-").tempdir_in("/dev/shm")?;
    let (operator, socket) = local(world, folder.path())?;
    let token = socket.with_file_name("token");
    let trust = |name: &str| socket.with_file_name("trust").join(name);
    let identity = "spiffe://overlay.local/ns/default/overlaynode/mesh".parse()?;
    let mesh = Peer { identity, ..unreachable("mesh-0")? };
    let harbour = world.daemon(Profile::Micronode, HARBOUR, vec![mesh], |config| {
        let (certificate, key, ca) = (trust("tls.crt"), trust("tls.key"), trust("ca.crt"));
        config.tls = Tls { certificate, key, ca, key_exchange: KeyExchange::RequireHybrid };
        config.token = Token { keys: trust("token-keys.json"), file: trust("peer") };
        config.tor.listen = Some(world.harbour);
    })?;
    fs::copy(&token, token_file(&harbour))?;
    wait::until("them to be peers", LIMIT, || {
        let (_, reason) = harbour.condition("peers")?;
        Ok(if reason.starts_with("1 of") { Look::Holds(()) } else { Look::NotYet(operator.log_tail()) })
    })?;
    let peers = sessions(&harbour, "peer")?;
    ensure!(peers.len() == 1 && peers[0]["peer"] == "mesh-0" && peers[0]["transport"] == "tor", "{peers:?}");

    let there = Subscriber::start(command_at(&socket, &token, &["sub", "news", "--count", "1", "--output", "raw"])?)?;
    let here = subscribe(&harbour, "news", 1)?;
    let sent = command_at(&socket, &token, &["pub", "news", "ahoy"])?.output()?;
    ensure!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    for subscriber in [here, there] {
        ensure!(subscriber.lines(1)? == ["ahoy"]);
    }
    Ok(())
}

/// A run of the manifest, and the socket of its daemon.
fn local(world: &World, folder: &Path) -> Result<(Process, PathBuf)> {
    let (socks, onion) = (world.network.client().socks, world.harbour_peer()?.address);
    let manifest = format!(
        "apiVersion: overlay.rustyonions.io/v1alpha1
kind: OverlayNode
metadata: {{name: mesh}}
spec:
  replicas: 1
  drain: {{delay: 0s, timeout: 1s}}
  transports: {{tor: {{enabled: true, socksAddress: \"{socks}\"}}}}
  peers: {{static: [{{name: {HARBOUR}, address: \"{onion}\", transport: Tor}}]}}
"
    );
    let (file, events) = (folder.join("mesh.yaml"), folder.join("events"));
    fs::write(&file, manifest)?;
    let output = File::create(&events)?;
    let program = programs::built("overlay-operator")?;
    let mut operator = Process::start("overlay-operator local", &program, &folder.join("log"), |command| {
        command.arg("local").arg(&file).args(["--output", "json"]);
        command.env("XDG_RUNTIME_DIR", folder).env_remove("OVERLAY_DAEMON").stdout(output);
    })?;
    let ready: Value = wait::until("the manifest's daemon to be ready", LIMIT, || {
        operator.check()?;
        let text = fs::read_to_string(&events)?;
        let whole = text.split_once('\n').map(|(first, _)| serde_json::from_str(first)).transpose()?;
        Ok(whole.map_or_else(|| Look::NotYet(operator.log_tail()), Look::Holds))
    })?;
    let socket = ready["daemons"][0]["socket"].as_str().with_context(|| format!("no socket in {ready}"))?;
    Ok((operator, socket.into()))
}
