//! One node of a real Kubernetes, as `kind` would give, but with neither Docker nor a
//! registry: a folder, a cgroup and a sandbox of namespaces in which the control plane, a
//! kubelet, containerd, kube-proxy and CoreDNS run as processes.
//!
//! From the outside in:
//! - [`Cluster`] (here) starts and ends it, and runs kubectl and helm inside its network;
//! - [`record`] remembers what exists, so that whoever comes next can clean up after a crash;
//! - [`sandbox`] is what the node has instead of the machine's own network, mounts and settings;
//! - [`node`] starts the programs, as the sandbox's first process;
//! - [`image`] makes images of programs and loads them;
//! - [`footprint`] compares the machine before and after.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::kubectl::Kubectl;
use crate::process::Process;
use crate::programs::{self, Kubernetes};
use crate::wait::{self, Look};

pub mod footprint;
pub mod image;
pub mod node;
pub mod record;
pub mod sandbox;

use record::Record;

/// The node's name.
pub const NODE: &str = "node";
/// containerd's socket, inside the sandbox.
const RUNTIME: &str = "/run/containerd/containerd.sock";
/// The file that says that the node is ready.
const READY: &str = "ready";

/// How long all of it may take to start.
const START_LIMIT: Duration = Duration::from_secs(180);
/// How long the kernel may take to end what is in the sandbox.
const END_LIMIT: Duration = Duration::from_secs(30);

/// A node that runs.
#[derive(Debug)]
pub struct Cluster {
    record: Record,
    programs: Kubernetes,
    admin: Kubectl,
    /// Where it ends with this value; a cluster that goes on by itself has none.
    sandbox: Option<Process>,
}

impl Cluster {
    /// Starts a node that lives as long as the value, and ends with the calling thread at the
    /// latest. What an earlier one of that name left is cleaned up first.
    ///
    /// # Errors
    /// One of that name runs already, or it did not become ready.
    pub fn start(name: &str) -> Result<Self> {
        let (record, arguments) = prepare(name)?;
        let log = record.folder().join("node.log");
        let process = Process::start("the node", Path::new("unshare"), &log, |command| {
            command.args(arguments);
        })?;
        let record = record.with_sandbox(process.id(), true)?;
        Self::wait_until_ready(record, Some(process))
    }

    /// Starts a node that goes on when the caller has ended.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn up(name: &str) -> Result<Self> {
        let (record, arguments) = prepare(name)?;
        let log = fs::File::create(record.folder().join("node.log"))?;
        // A session of its own: Ctrl-C in this terminal later on is not meant for it.
        let mut command = Command::new("setsid");
        command.arg("unshare").args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("starting setsid")?;
        let cluster = Self::wait_until_ready(record.with_sandbox(child.id(), true)?, None)?;
        // Until now it was the caller's, so that whoever finds it after Ctrl-C may take it away.
        cluster.record.disown()?;
        Ok(cluster)
    }

    /// The node of that name that runs.
    ///
    /// # Errors
    /// None runs.
    pub fn running(name: &str) -> Result<Self> {
        let record = Record::read(name)?.filter(Record::is_running);
        let record =
            record.with_context(|| format!("no cluster {name} runs: start it with tests/cluster --name {name} up"))?;
        Self::attach(record)
    }

    /// Ends the node of that name, running or not, and takes away what it left.
    ///
    /// # Errors
    /// Something of it could not be taken away.
    pub fn down(name: &str) -> Result<()> {
        let _lock = record::lock(name)?;
        Record::read(name)?.map_or(Ok(()), |record| clean_up(&record))
    }

    fn attach(record: Record) -> Result<Self> {
        let programs = Kubernetes::find(crate::control_plane::Reach::Node(sandbox::ADDRESS))?;
        let folder = record.folder();
        let admin = Kubectl::inside(
            record.pid(),
            programs.program("kubectl"),
            folder.join("admin.kubeconfig"),
            folder.join("kubectl-cache"),
        );
        Ok(Self { record, programs, admin, sandbox: None })
    }

    fn wait_until_ready(record: Record, sandbox: Option<Process>) -> Result<Self> {
        let kept = record.clone();
        let ready = || {
            let mut cluster = Self::attach(record)?;
            cluster.sandbox = sandbox;
            let ready = cluster.folder().join(READY);
            wait::until("the cluster", START_LIMIT, || {
                if !cluster.record.is_running() {
                    bail!("the node ended:\n{}", cluster.log("node"));
                }
                Ok(if ready.exists() { Look::Holds(()) } else { Look::NotYet(cluster.log("node")) })
            })?;
            Ok(cluster)
        };
        ready().map_err(|error: anyhow::Error| match clean_up(&kept) {
            Ok(()) => error,
            Err(left) => error.context(format!("and it is not cleaned up: {left:#}")),
        })
    }

    /// kubectl as a cluster administrator.
    pub fn admin(&self) -> &Kubectl {
        &self.admin
    }

    /// The folder of everything that the cluster writes.
    pub fn folder(&self) -> &Path {
        self.record.folder()
    }

    /// The process that holds the sandbox, seen from outside.
    pub fn process(&self) -> u32 {
        self.record.pid()
    }

    /// The Kubernetes programs.
    pub fn programs(&self) -> &Kubernetes {
        &self.programs
    }

    /// What a part of the node wrote: `kubelet`, `containerd`, `kube-apiserver` and so on.
    pub fn log(&self, part: &str) -> String {
        fs::read(self.folder().join(format!("{part}.log")))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// A program that runs in the node's network, and in this machine's files.
    pub fn in_network(&self, program: &Path) -> Command {
        self.enter(&["--net"], program)
    }

    /// A program that runs in the node's network and mounts, from the root folder.
    pub fn in_node(&self, program: &Path) -> Command {
        self.enter(&["--net", "--mount"], program)
    }

    fn enter(&self, namespaces: &[&str], program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.record.pid())).args(namespaces).arg("--").arg(program);
        command
    }

    /// helm as a cluster administrator, with nothing of the user's own configuration.
    ///
    /// # Errors
    /// It failed, with what it said.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .in_network(&self.programs.program("helm"))
            .args(arguments)
            .env("HOME", self.folder())
            .env("KUBECONFIG", self.admin.kubeconfig())
            .output()
            .context("starting helm")?;
        if !output.status.success() {
            bail!("helm {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Makes an image of programs and loads it into the node under `name`.
    ///
    /// # Errors
    /// A program is missing, or containerd refused the image.
    pub fn load(&self, name: &str, programs: &[PathBuf]) -> Result<()> {
        let archive = image::of(name, programs, "65532:65532", self.folder())?;
        let output = self.in_node(Path::new("ctr")).args(archive.import_arguments()).output()?;
        if !output.status.success() {
            bail!("loading {name}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        fs::remove_file(&archive.path)?;
        Ok(())
    }

    /// Loads the images of both programs, as the chart of this version names them.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_ours(&self) -> Result<()> {
        for program in ["overlay-operator", "overlay-daemon"] {
            let name = format!("ghcr.io/rustyonions/{program}:{}", env!("CARGO_PKG_VERSION"));
            self.load(&name, &[programs::built(program)?])?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut process) = self.sandbox.take()
            && let Err(error) = process.kill().and_then(|_| clean_up(&self.record))
        {
            eprintln!("the cluster is not cleaned up: {error:#}");
        }
    }
}

/// A record of what is about to be made, and what `unshare` is told to make it.
fn prepare(name: &str) -> Result<(Record, Vec<OsString>)> {
    let _lock = record::lock(name)?;
    if let Some(left) = Record::read(name)? {
        if left.is_being_made() || (left.is_running() && !left.is_abandoned()) {
            bail!("a cluster {name} runs already: end it with tests/cluster --name {name} down, or use it");
        }
        clean_up(&left)?;
    }
    let record = Record::new(name)?;
    let mut arguments: Vec<OsString> = sandbox::UNSHARE.iter().map(OsString::from).collect();
    arguments.extend([programs::built("cluster")?.into(), "boot".into()]);
    arguments.extend([record.folder().into(), record.cgroup().into()]);
    Ok((record, arguments))
}

/// Ends what runs, then takes away the cgroup and the folder: only what the record names.
fn clean_up(record: &Record) -> Result<()> {
    record.kill()?;
    wait::until("the sandbox to end", END_LIMIT, || {
        Ok(if record.is_alive() { Look::NotYet("alive".to_owned()) } else { Look::Holds(()) })
    })?;
    sandbox::remove_cgroup(record.cgroup())?;
    record.forget()
}
