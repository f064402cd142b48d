//! The servers that are measured: the floor, nats-server and the daemon, each a process of its
//! own on the servers' core, stopped when it is dropped.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use overlay_core::config::{DaemonConfig, Profile};
use overlay_tests::daemon::Daemon;
use overlay_tests::process::Process;
use overlay_tests::trust::{Authority, NODE};
use overlay_tests::wait::{self, Look};
use tempfile::TempDir;

use crate::dialect::{CLIENT, Dialect, Reach};
use crate::machine::Cores;

const START: Duration = Duration::from_secs(30);

/// A server that is none of ours to look into: the floor, or nats-server.
pub(crate) struct Other {
    // Before the folder: stopped before its files go.
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
    _folder: TempDir,
}

fn folder(authority: &Authority) -> Result<TempDir> {
    let folder = tempfile::Builder::new().prefix("overlay-bench-").tempdir_in("/dev/shm")?;
    let (certificate, key) = authority.leaf_pem(NODE)?;
    fs::write(folder.path().join("tls.crt"), certificate)?;
    fs::write(folder.path().join("tls.key"), key)?;
    fs::write(folder.path().join("ca.crt"), authority.ca_pem())?;
    Ok(folder)
}

fn listening(mut process: Process, folder: TempDir, port: impl Fn(&str) -> Option<u16>) -> Result<Other> {
    let port = wait::until("a server to listen", START, || {
        process.check()?;
        Ok(port(&process.log()).map_or_else(|| Look::NotYet(process.log_tail()), Look::Holds))
    })?;
    Ok(Other { process, address: SocketAddr::from(([127, 0, 0, 1], port)), _folder: folder })
}

/// The floor: this program under another name.
pub(crate) fn floor(authority: &Authority) -> Result<Other> {
    let folder = folder(authority)?;
    let program = std::env::current_exe()?;
    let process = Process::start("the floor", &program, &folder.path().join("log"), |command| {
        command.arg("serve-floor").arg(folder.path());
    })?;
    listening(process, folder, |log| log.lines().next()?.parse().ok())
}

/// nats-server with TLS, its caps raised beyond what is sent.
pub(crate) fn nats(program: &Path, authority: &Authority) -> Result<Other> {
    let folder = folder(authority)?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let ports = folder.path().join("ports");
    fs::create_dir(&ports)?;
    let config = format!(
        "listen: \"127.0.0.1:-1\"\nports_file_dir: {:?}\nmax_payload: 2MB\nmax_pending: 256MB\nmax_connections: 20000\n\
         ping_interval: \"1h\"\nwrite_deadline: \"30s\"\ntls {{ cert_file: {:?}, key_file: {:?}, timeout: 10 }}\n",
        ports.display().to_string(),
        path("tls.crt"),
        path("tls.key"),
    );
    fs::write(folder.path().join("nats.conf"), config)?;
    let process = Process::start("nats-server", program, &folder.path().join("log"), |command| {
        command.arg("-c").arg(folder.path().join("nats.conf"));
    })?;
    listening(process, folder, |_| nats_port(&ports))
}

/// From the file that it writes once it listens: `{"nats": ["nats://127.0.0.1:PORT"]}`.
fn nats_port(ports: &Path) -> Option<u16> {
    let file = fs::read_dir(ports).ok()?.next()?.ok()?.path();
    let ports: serde_json::Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let url = ports["nats"].as_array()?.first()?.as_str()?;
    url.rsplit(':').next()?.parse().ok()
}

/// Where `tests/bench` built nats-server.
pub(crate) fn nats_program() -> Result<PathBuf> {
    let path = std::env::var_os("OVERLAY_BENCH_NATS").context("OVERLAY_BENCH_NATS: run tests/bench")?;
    Ok(path.into())
}

/// What is changed of the daemon's defaults: caps that a benchmark would only measure, and how
/// long a session may be at rest.
pub(crate) fn raise_caps(config: &mut DaemonConfig) {
    let overlay = &mut config.overlay;
    (overlay.rps, overlay.per_peer_rps) = (10_000_000, 10_000_000);
    (overlay.inflight, overlay.per_peer_inflight) = (1_000_000, 1_000_000);
    (overlay.max_sessions, overlay.max_pending) = (16_384, 16_384);
    overlay.memory_bytes = 4 << 30;
    overlay.idle_timeout_ms = 3_600_000;
    config.gossip.lane_depth_frames = 16_384;
    config.gossip.store_bytes = 2 << 30;
}

/// [`raise_caps`], as it is printed.
pub(crate) const RAISED: &str = "rps and per_peer_rps 10,000,000; inflight and per_peer_inflight 1,000,000; max_pending 16,384; \
     memory_bytes 4 GiB; idle_timeout_ms 3,600,000; lane_depth_frames 16,384; store_bytes 2 GiB";

/// The daemon with [`raise_caps`].
pub(crate) fn daemon() -> Result<Daemon> {
    Daemon::start(Profile::Macronode, raise_caps)
}

/// All three, for one row: what one row leaves behind does not weigh on the next.
pub(crate) struct Servers {
    pub(crate) floor: Other,
    pub(crate) nats: Other,
    pub(crate) daemon: Daemon,
    pub(crate) to_floor: Reach,
    pub(crate) to_nats: Reach,
    pub(crate) to_daemon: Reach,
}

impl Servers {
    /// Starts them on their core.
    pub(crate) fn start(cores: &Cores) -> Result<Self> {
        cores.serve(|| {
            let daemon = daemon()?;
            let authority = &daemon.authority;
            let (floor, nats) = (floor(authority)?, nats(&nats_program()?, authority)?);
            let oap = Dialect::Oap(daemon.token(CLIENT)?);
            Ok(Self {
                to_floor: Reach::new("floor", floor.address, Dialect::Floor, authority)?,
                to_nats: Reach::new("nats-server", nats.address, Dialect::Nats, authority)?,
                to_daemon: Reach::new("overlay-daemon", daemon.address, oap, authority)?,
                floor,
                nats,
                daemon,
            })
        })
    }
}
