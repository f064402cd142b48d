//! Three daemons, each behind an onion service of its own, each a peer of the other two, all
//! dialling through one client; and what a person would type beside them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use overlay_core::config::{DaemonConfig, FORMAT, Peer, PeersConfig, Profile, Transport};
use overlay_core::identity::SpiffeId;
use overlay_tests::control_plane::free_ports;
use overlay_tests::daemon::Daemon;
use overlay_tests::programs;
use overlay_tests::subscriber::Subscriber;
use overlay_tests::tor::Network;
use overlay_tests::trust::{Authority, NODE};
use serde_json::Value;

/// The daemons that run from the start.
pub(crate) const NAMES: [&str; 3] = ["a", "b", "c"];
/// One that cases start behind an onion service of its own, and no peer of those.
pub(crate) const HARBOUR: &str = "harbour";
/// One that a case starts: `a` knows it, and cannot reach it.
pub(crate) const LATE: &str = "late";

pub(crate) struct World {
    // Before the network: their sessions go by it.
    daemons: Vec<Daemon>,
    /// Where the onion service of [`HARBOUR`] forwards to.
    pub(crate) harbour: SocketAddr,
    pub(crate) network: Network,
    pub(crate) authority: Arc<Authority>,
}

impl World {
    pub(crate) fn start() -> Result<Self> {
        let ports: [u16; NAMES.len() + 1] = free_ports()?;
        let forwards = ports.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let network = Network::start(&forwards)?;
        let (authority, harbour) = (Arc::new(Authority::new()?), forwards[NAMES.len()]);
        let mut world = Self { daemons: Vec::new(), harbour, network, authority };
        let profiles = [Profile::Macronode, Profile::Micronode].into_iter().cycle();
        for ((name, forward), profile) in NAMES.iter().zip(forwards).zip(profiles) {
            let others = NAMES.iter().filter(|other| *other != name);
            let mut peers = others.map(|other| world.peer(other)).collect::<Result<Vec<_>>>()?;
            if *name == NAMES[0] {
                peers.push(unreachable(LATE)?);
            }
            let socks = world.network.client().socks;
            let daemon = world.daemon(profile, name, peers, |config| {
                config.tor.socks = socks.to_string();
                config.tor.listen = Some(forward);
            })?;
            world.daemons.push(daemon);
        }
        Ok(world)
    }

    /// A daemon of the mesh.
    pub(crate) fn daemon(
        &self,
        profile: Profile,
        name: &str,
        peers: Vec<Peer>,
        change: impl FnOnce(&mut DaemonConfig),
    ) -> Result<Daemon> {
        let peers = PeersConfig { format: FORMAT, name: name.to_owned(), peers };
        let daemon = Daemon::start_in_mesh(profile, Arc::clone(&self.authority), peers, change)?;
        fs::write(token_file(&daemon), daemon.local_token()?)?;
        Ok(daemon)
    }

    /// [`HARBOUR`], as a peer by its onion service.
    pub(crate) fn harbour_peer(&self) -> Result<Peer> {
        peer(HARBOUR, &self.network.onion(NAMES.len())?)
    }

    /// One of [`NAMES`], as a peer by its onion service.
    pub(crate) fn peer(&self, name: &str) -> Result<Peer> {
        let index = NAMES.iter().position(|known| *known == name).with_context(|| format!("no daemon {name}"))?;
        peer(name, &self.network.onion(index)?)
    }

    pub(crate) fn daemons(&self) -> impl Iterator<Item = (&'static str, &Daemon)> {
        NAMES.into_iter().zip(&self.daemons)
    }
}

/// A peer that has to dial, since it cannot be dialled: port 9 is discard's, and nobody's here.
pub(crate) fn unreachable(name: &str) -> Result<Peer> {
    Ok(Peer { transport: Transport::Tcp, ..peer(name, "127.0.0.1:9")? })
}

fn peer(name: &str, address: &str) -> Result<Peer> {
    let identity: SpiffeId = NODE.parse()?;
    Ok(Peer { name: name.to_owned(), address: address.to_owned(), identity, transport: Transport::Tor })
}

/// The token of the daemon's local clients.
pub(crate) fn token_file(daemon: &Daemon) -> PathBuf {
    daemon.folder().join("local-token")
}

fn command(daemon: &Daemon, arguments: &[&str]) -> Result<Command> {
    command_at(&daemon.socket(), &token_file(daemon), arguments)
}

/// `overlay-daemon`, of the daemon that has this socket.
pub(crate) fn command_at(socket: &Path, token: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(programs::built("overlay-daemon")?).args(arguments);
    command.arg("--socket").arg(socket).arg("--token-file").arg(token).stdin(Stdio::null());
    Ok(command)
}

/// `overlay-daemon`, to its end; it succeeds.
pub(crate) fn run(daemon: &Daemon, arguments: &[&str]) -> Result<Output> {
    let output = command(daemon, arguments)?.output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

/// `overlay-daemon sub`, once it is subscribed.
pub(crate) fn subscribe(daemon: &Daemon, topic: &str, count: usize) -> Result<Subscriber> {
    Subscriber::start(command(daemon, &["sub", topic, "--count", &count.to_string(), "--output", "raw"])?)
}

/// The sessions of a kind, as `overlay-daemon status` shows them.
pub(crate) fn sessions(daemon: &Daemon, kind: &str) -> Result<Vec<Value>> {
    let status: Value = serde_json::from_slice(&run(daemon, &["status", "--output", "json"])?.stdout)?;
    let sessions = status["sessions"].as_array().with_context(|| format!("no sessions in {status}"))?;
    Ok(sessions.iter().filter(|session| session["kind"] == kind).cloned().collect())
}
