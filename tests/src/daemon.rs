//! One real daemon with a configuration of the test's own, and what can be seen of it from
//! outside: its admin HTTP, its log, its connections, its memory, its processor time.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::{self, DaemonConfig, PeersConfig, Profile, Transport};
use overlay_core::grant::LOCAL_HOLDER;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;
use tempfile::TempDir;

use crate::oap::Offer;
use crate::process::Process;
use crate::trust::{Authority, NODE};
use crate::wait::{self, Look};
use crate::{http, programs};

/// For anything that is expected to happen.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A daemon that runs.
pub struct Daemon {
    // Before the folder: stopped before its files go.
    /// The process.
    pub process: Process,
    folder: TempDir,
    home: TempDir,
    /// Whom it believes.
    pub authority: Arc<Authority>,
    /// Its TLS listener.
    pub address: SocketAddr,
    /// Its QUIC listener, if it has one.
    pub quic: Option<SocketAddr>,
    /// And for what an onion service forwards, if it does.
    pub onion: Option<SocketAddr>,
    /// Its admin HTTP.
    pub admin: SocketAddr,
}

impl Daemon {
    /// Starts one, with what `change` makes of the defaults of its profile: with amnesia on a
    /// Micronode, without it on a Macronode. It is ready.
    ///
    /// # Errors
    /// It does not start, with its log.
    pub fn start(profile: Profile, change: impl FnOnce(&mut DaemonConfig)) -> Result<Self> {
        Self::start_under(profile, &[], change)
    }

    /// The same as the daemon of a mesh: with this name and these peers, and the authority that
    /// all of them believe.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_in_mesh(
        profile: Profile,
        authority: Arc<Authority>,
        peers: PeersConfig,
        change: impl FnOnce(&mut DaemonConfig),
    ) -> Result<Self> {
        Self::start_with(profile, &[], authority, peers, change)
    }

    /// The same under another program, with its options: prlimit(1).
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_under(profile: Profile, under: &[&str], change: impl FnOnce(&mut DaemonConfig)) -> Result<Self> {
        let peers = PeersConfig { format: config::FORMAT, name: "target".to_owned(), peers: Vec::new() };
        Self::start_with(profile, under, Arc::new(Authority::new()?), peers, change)
    }

    fn start_with(
        profile: Profile,
        under: &[&str],
        authority: Arc<Authority>,
        peers: PeersConfig,
        change: impl FnOnce(&mut DaemonConfig),
    ) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("overlay-daemon-").tempdir_in("/dev/shm")?;
        let home = tempfile::Builder::new().prefix("overlay-daemon-").tempdir()?;
        let config = write(folder.path(), &authority, profile, &peers, change)?;
        let daemon = programs::built("overlay-daemon")?;
        let program = under.first().map_or_else(|| daemon.clone(), PathBuf::from);
        let mut process = Process::start("overlay-daemon", &program, &folder.path().join("log"), |command| {
            if let [_, options @ ..] = under {
                command.args(options).arg(&daemon);
            }
            command.current_dir(home.path()).env("HOME", home.path()).env("TMPDIR", home.path());
            command.arg("run").arg("--config").arg(config).arg("--peers").arg(folder.path().join("peers.toml"));
        })?;
        let said = wait::until("the daemon to listen", LIMIT, || {
            process.check()?;
            let lines = process.log();
            let said = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut said = said.filter(|line| line["message"] == "listening");
            Ok(said.next().map_or_else(|| Look::NotYet(process.log_tail()), Look::Holds))
        })?;
        let address = |name: &str| -> Result<SocketAddr> {
            Ok(said[name].as_str().with_context(|| format!("no {name} in {said}"))?.parse()?)
        };
        let (address, admin) = (address("address")?, address("admin")?);
        let quic = said["quic"].as_str().map(str::parse).transpose()?;
        let onion = said["onion"].as_str().map(str::parse).transpose()?;
        let daemon = Self { process, folder, home, authority, address, quic, onion, admin };
        wait::until_true("the daemon to be ready", LIMIT, || Ok(daemon.is_ready()))?;
        Ok(daemon)
    }

    /// Where it accepts sessions over a transport.
    ///
    /// # Errors
    /// It does not.
    pub fn listens(&self, transport: Transport) -> Result<SocketAddr> {
        match transport {
            Transport::Tcp => Ok(self.address),
            Transport::Quic => self.quic.context("it does not listen for QUIC"),
            Transport::Tor => self.onion.context("it does not listen for an onion service"),
        }
    }

    /// The folder of its configuration, its keys, its socket and its log, in memory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its working folder, home and place for temporary files: on a disk, and empty.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Its Unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// What `sub` may offer: a leaf of its own.
    ///
    /// # Errors
    /// The id is no URI.
    pub fn offer(&self, id: &str) -> Result<Offer> {
        Offer::honest(self.authority.ca_der(), self.authority.leaf(id)?)
    }

    /// A token that allows a Unix-socket client everything.
    ///
    /// # Errors
    /// None in practice.
    pub fn local_token(&self) -> Result<Bytes> {
        self.token(LOCAL_HOLDER)
    }

    /// A token that allows `sub` everything.
    ///
    /// # Errors
    /// None in practice.
    pub fn token(&self, sub: &str) -> Result<Bytes> {
        self.authority.token(&Authority::claims(sub)?)
    }

    /// **P**: the process is there and answers, and nothing in it panicked.
    ///
    /// # Errors
    /// It is not so.
    pub fn assert_alive(&mut self) -> Result<()> {
        self.process.check()?;
        let log = self.process.log();
        for word in ["panicked at", "a task that never ends", "overflow"] {
            ensure!(!log.contains(word), "the daemon's log says {word:?}:\n{}", self.process.log_tail());
        }
        ensure!(http::get(self.admin, "/healthz")?.status == 200, "/healthz");
        Ok(())
    }

    /// What `/readyz` says of a condition: whether it holds, and why.
    ///
    /// # Errors
    /// It names no such condition.
    pub fn condition(&self, name: &str) -> Result<(bool, String)> {
        let body: Value = serde_json::from_str(&http::get(self.admin, "/readyz")?.body)?;
        let conditions = body["conditions"].as_array().with_context(|| format!("no conditions in {body}"))?;
        let found = conditions.iter().find(|c| c["name"] == name).with_context(|| format!("no {name} in {body}"))?;
        Ok((found["ok"] == true, found["reason"].as_str().unwrap_or_default().to_owned()))
    }

    /// Whether `/readyz` answers 200.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        http::get(self.admin, "/readyz").is_ok_and(|answer| answer.status == 200)
    }

    /// The exposition.
    ///
    /// # Errors
    /// Admin HTTP does not answer.
    pub fn metrics(&self) -> Result<String> {
        Ok(http::get(self.admin, "/metrics")?.body)
    }

    /// One metric, summed over its labels.
    ///
    /// # Errors
    /// There is none.
    pub fn metric(&self, name: &str) -> Result<f64> {
        http::metric_sum(&self.metrics()?, name).with_context(|| format!("no metric {name}"))
    }

    /// What was refused for `reason`.
    ///
    /// # Errors
    /// There is no such series.
    pub fn rejected(&self, reason: &str) -> Result<f64> {
        http::sample(&self.metrics()?, "overlay_rejected_total", &format!("reason=\"{reason}\""))
    }

    /// Series of the exposition.
    ///
    /// # Errors
    /// Admin HTTP does not answer.
    pub fn series(&self) -> Result<usize> {
        Ok(self.metrics()?.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).count())
    }

    /// KiB of memory resident.
    ///
    /// # Errors
    /// The process is gone.
    pub fn resident_kib(&self) -> Result<u64> {
        self.process.resident_kib()
    }

    /// Waits until the memory resident is back to `base` KiB and 5% (**M**), and what jemalloc keeps
    /// of the most that there was since it started: a descriptor of 128 bytes for every run of pages
    /// that it ever held, for those to come; a run of small objects is one page of 4 KiB at the least.
    ///
    /// # Errors
    /// It is not within a minute.
    pub fn until_memory_is_back(&self, base: u64) -> Result<()> {
        let peak = self.process.most_resident_kib()?;
        let most = base + base / 20 + peak.saturating_sub(base) * 128 / 4_096;
        let after = wait::until("the memory to be given back", 2 * LIMIT, || {
            let resident = self.resident_kib()?;
            if resident <= most {
                return Ok(Look::Holds(resident));
            }
            Ok(Look::NotYet(format!("{resident} KiB, {base} before, {peak} at the most")))
        })?;
        println!("KiB resident: {base} before, {peak} at the most, {after} of {most} at the end");
        Ok(())
    }

    /// Processor time of all threads that it has.
    ///
    /// # Errors
    /// The process is gone.
    pub fn processor_time(&self) -> Result<Duration> {
        self.process.processor_time()
    }

    /// Connections that it has accepted and not closed, of TCP and of the Unix socket, as the
    /// kernel lists them: `/proc/PID/fd` is closed to others where a process is not dumpable.
    ///
    /// # Errors
    /// The kernel's lists cannot be read.
    pub fn connections(&self) -> Result<usize> {
        let listens = format!(":{:04X}", self.address.port());
        let tcp = fs::read_to_string("/proc/net/tcp")?;
        let tcp = tcp.lines().skip(1).filter(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // local_address, st (0A listens), inode (0 while no process has it)
            fields.len() > 9 && fields[1].ends_with(&listens) && fields[3] != "0A" && fields[9] != "0"
        });
        let socket = self.socket();
        let socket = socket.to_string_lossy();
        let unix = fs::read_to_string("/proc/net/unix")?;
        let unix = unix.lines().skip(1).filter(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Flags (00010000 listens), inode, path
            fields.len() > 7 && fields[7] == socket && fields[3] != "00010000" && fields[6] != "0"
        });
        Ok(tcp.count() + unix.count())
    }

    /// Waits until it holds `count` connections.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn until_connections(&self, count: usize) -> Result<()> {
        wait::until(&format!("the daemon to hold {count} connections"), 2 * LIMIT, || {
            let held = self.connections()?;
            Ok(if held == count { Look::Holds(()) } else { Look::NotYet(format!("it holds {held}")) })
        })
    }
}

/// Writes the daemon's files; the path of the first.
fn write(
    folder: &Path,
    authority: &Authority,
    profile: Profile,
    peers: &PeersConfig,
    change: impl FnOnce(&mut DaemonConfig),
) -> Result<PathBuf> {
    let (certificate, key) = authority.leaf_pem(NODE)?;
    let peer = authority.token(&Authority::claims(NODE)?)?;
    for (name, text) in [
        ("tls.crt", certificate.as_bytes()),
        ("tls.key", key.as_bytes()),
        ("ca.crt", authority.ca_pem().as_bytes()),
        ("keys.json", authority.jwks().as_bytes()),
        ("peer", &peer),
    ] {
        fs::write(folder.join(name), text)?;
    }
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let tls = config::Tls {
        certificate: folder.join("tls.crt"),
        key: folder.join("tls.key"),
        ca: folder.join("ca.crt"),
        key_exchange: config::KeyExchange::RequireHybrid,
    };
    let token = config::Token { keys: folder.join("keys.json"), file: folder.join("peer") };
    let socket = folder.join("socket");
    let mut config = DaemonConfig::with_defaults(profile, loopback, loopback, tls, token, socket);
    config.overlay.amnesia = profile == Profile::Micronode;
    config.drain = config::Drain { delay_ms: 0, timeout_ms: 5_000 };
    change(&mut config);
    fs::write(folder.join("peers.toml"), peers.to_toml()?)?;
    fs::write(folder.join("overlay.toml"), config.to_toml()?)?;
    Ok(folder.join("overlay.toml"))
}

/// Lets this process and the daemons that it starts from now on have as many descriptors as
/// the system allows; says how many.
///
/// # Errors
/// The system refuses what it allows.
pub fn raise_descriptors() -> Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}
