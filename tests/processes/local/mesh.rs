//! One run of `overlay-operator local --output json` with a runtime folder of its own, and the
//! clients that a person would use beside it.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use overlay_core::config::Profile;
use overlay_tests::process::Process;
use overlay_tests::profile;
use overlay_tests::programs;
use overlay_tests::subscriber::Subscriber;
use overlay_tests::wait::{self, Look};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

/// For anything that is expected to happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A daemon, as the event `ready` describes it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Daemon {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) socket: PathBuf,
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
}

/// A run.
pub(crate) struct Mesh {
    // Before the folder: stopped before its files go.
    pub(crate) operator: Process,
    folder: TempDir,
    runs: usize,
}

/// The manifest of one mesh of a profile; `spec` in flow form, without its braces.
pub(crate) fn one_mesh(name: &str, profile: Profile, spec: &str) -> String {
    let profile = profile::manifest(profile);
    format!(
        "apiVersion: overlay.rustyonions.io/v1alpha1
kind: OverlayNode
metadata: {{name: {name}}}
spec: {{{profile}, {spec}, drain: {{delay: 0s, timeout: 1s}}}}
"
    )
}

/// A memory-backed folder that is private, as `XDG_RUNTIME_DIR` is.
pub(crate) fn runtime_folder() -> Result<TempDir> {
    tempfile::Builder::new().prefix("overlay-test-").tempdir_in("/dev/shm").context("a folder in /dev/shm")
}

impl Mesh {
    /// Runs a manifest.
    pub(crate) fn start(manifest: &str, arguments: &[&str]) -> Result<Self> {
        let folder = runtime_folder()?;
        let file = write_manifest(folder.path(), manifest)?;
        Self::start_in(folder, &[&file.to_string_lossy()], arguments)
    }

    /// Runs manifests that are files already.
    pub(crate) fn start_files(files: &[&str], arguments: &[&str]) -> Result<Self> {
        Self::start_in(runtime_folder()?, files, arguments)
    }

    fn start_in(folder: TempDir, files: &[&str], arguments: &[&str]) -> Result<Self> {
        let operator = operator(folder.path(), 0, files, arguments)?;
        Ok(Self { operator, folder, runs: 1 })
    }

    /// Another run in the same folder, after the first ended.
    pub(crate) fn restart(&mut self, manifest: &str) -> Result<()> {
        let file = write_manifest(self.folder.path(), manifest)?;
        self.operator = operator(self.folder.path(), self.runs, &[&file.to_string_lossy()], &[])?;
        self.runs += 1;
        Ok(())
    }

    /// The command of another run in the same folder.
    pub(crate) fn again(&self, manifest: &str) -> Result<Command> {
        let file = self.folder.path().join("second.yaml");
        fs::write(&file, manifest)?;
        let mut command = Command::new(programs::built("overlay-operator")?);
        command.arg("local").arg(file).env("XDG_RUNTIME_DIR", self.folder.path()).stdin(Stdio::null());
        Ok(command)
    }

    /// For files of the test.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until all daemons are ready.
    pub(crate) fn ready(&self) -> Result<Vec<Daemon>> {
        let event = self.event("ready")?;
        ensure!(self.events()?.first() == Some(&event), "`ready` comes first");
        Ok(serde_json::from_value(event["daemons"].clone())?)
    }

    /// Waits for the first event of a kind.
    pub(crate) fn event(&self, kind: &str) -> Result<Value> {
        wait::until(&format!("the event {kind}"), LIMIT, || {
            let events = self.events()?;
            Ok(match events.iter().find(|event| event["event"] == kind) {
                Some(event) => Look::Holds(event.clone()),
                None => Look::NotYet(format!("{events:?}\n{}", self.operator.log_tail())),
            })
        })
    }

    /// Every event so far.
    pub(crate) fn events(&self) -> Result<Vec<Value>> {
        let text = fs::read_to_string(self.folder.path().join(format!("events-{}", self.runs - 1)))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
    }

    /// The process that a daemon is now.
    pub(crate) fn process_of(&self, daemon: &Daemon) -> Result<Pid> {
        let path = self.root().join(format!("{}.{}/process", daemon.namespace, daemon.name));
        let record: Value = serde_json::from_slice(&fs::read(path)?)?;
        let pid = record["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 0);
        pid.and_then(Pid::from_raw).context("the record has no process")
    }

    /// Whether nothing of the run is left.
    pub(crate) fn runtime_is_empty(&self) -> Result<bool> {
        Ok(!self.root().try_exists()?)
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("overlay")
    }

    /// `overlay-daemon pub`.
    pub(crate) fn publish(&self, at: &Daemon, topic: &str, message: &[&str]) -> Result<()> {
        let output = Command::new(programs::built("overlay-daemon")?)
            .args(["pub", topic])
            .args(message)
            .arg("--socket")
            .arg(&at.socket)
            .stdin(Stdio::null())
            .output()?;
        ensure!(output.status.success(), "pub: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// `overlay-daemon sub`, once the daemon has confirmed it.
    pub(crate) fn subscribe(&self, at: &Daemon, topic: &str, count: u32) -> Result<Subscriber> {
        let count = count.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(programs::built("overlay-daemon")?);
        command.args(["sub", topic, "--count", &count, "--output", "raw", "--socket"]).arg(&at.socket);
        Subscriber::start(command)
    }
}

fn write_manifest(folder: &Path, manifest: &str) -> Result<PathBuf> {
    let file = folder.join("mesh.yaml");
    fs::write(&file, manifest)?;
    Ok(file)
}

fn operator(folder: &Path, run: usize, files: &[&str], arguments: &[&str]) -> Result<Process> {
    let events = File::create(folder.join(format!("events-{run}")))?;
    let program = programs::built("overlay-operator")?;
    Process::start("overlay-operator local", &program, &folder.join(format!("log-{run}")), |command| {
        command.arg("local").args(files).args(["--output", "json"]).args(arguments);
        command.env("XDG_RUNTIME_DIR", folder).env_remove("OVERLAY_DAEMON").stdout(events);
    })
}

/// Ends a process at once.
pub(crate) fn kill(process: Pid) -> Result<()> {
    Ok(kill_process(process, Signal::KILL)?)
}

/// Whether a process runs. One that ended and that its parent has not asked about does not.
pub(crate) fn is_alive(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_pid())).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !"ZX".contains(state))
}
