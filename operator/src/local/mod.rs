//! `overlay-operator local`: the embedded default, without a cluster. The same manifests as
//! `kubectl apply` takes, admitted by the same rules and built by the same code, run as child
//! processes on loopback.
//!
//! This file composes: manifests → admit → daemon program → runtime folder → plan →
//! credentials → run. Nothing is started before all of a manifest is known to be good, and
//! nothing is left when it returns.

mod child;
mod credentials;
mod daemon_program;
mod events;
mod log;
mod manifests;
mod output;
mod plan;
mod ports;
mod probe;
mod process;
mod run;
mod runtime_dir;
mod supervise;
mod table;

use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use overlay_core::identity::SpiffeId;

use self::events::Event;
use self::output::{Form, Output};
use self::run::{Goal, Outcome, Run, Signals};
use self::runtime_dir::RuntimeDir;
use crate::admit::Admitted;
use crate::api::{CertificateSource, OverlayNode};
use crate::build::{SOCKET_TOKEN, names};
use crate::trust::{TokenRoot, TrustError, Zeroizing};

/// Run the daemons of OverlayNode manifests on this machine, without a cluster.
///
/// The manifests are those of kubectl apply, checked by the same schema and rules. Each daemon
/// gets free ports on 127.0.0.1; sockets, keys and tokens are in a memory-backed folder that
/// goes with the run. A daemon that dies is started again after 1 s, doubled at every exit up
/// to 60 s, and 1 s again once it was ready for 60 s. Ctrl-C drains and stops all of them,
/// a second one kills them.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Args {
    /// Manifests: files, folders, or - for standard input.
    #[arg(value_name = "FILE|DIR|-", required = true)]
    pub inputs: Vec<PathBuf>,
    /// Check the manifests, and start nothing.
    #[arg(long, conflicts_with_all = ["exit_when_ready", "output"])]
    pub dry_run: bool,
    /// Stop everything once all daemons are ready; fails if they are not in time.
    #[arg(long)]
    pub exit_when_ready: bool,
    /// How long --exit-when-ready waits: 60s, 1m30s.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration, requires = "exit_when_ready")]
    pub ready_timeout: Duration,
    /// What standard output shows; a table on a terminal, else plain.
    #[arg(long, value_enum)]
    pub output: Option<OutputForm>,
    /// Leave out what the daemons log.
    #[arg(long)]
    pub quiet: bool,
    /// The trust domain of the daemons' identities.
    #[arg(long, value_name = "DOMAIN", default_value = names::DEFAULT_TRUST_DOMAIN, value_parser = names::trust_domain)]
    pub trust_domain: String,
}

/// What `--output` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputForm {
    /// A live table.
    Table,
    /// A line for whatever happens.
    Plain,
    /// One JSON object a line, the first once all daemons are ready.
    Json,
}

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
enum LocalError {
    #[error("{}", .0.join("\n"))]
    Manifests(Vec<String>),
    #[error(transparent)]
    Program(#[from] daemon_program::NotFound),
    #[error(transparent)]
    RuntimeDir(#[from] runtime_dir::RuntimeDirError),
    #[error(transparent)]
    Plan(#[from] plan::PlanError),
    #[error(transparent)]
    Credentials(#[from] credentials::CredentialsError),
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
    #[error("no free ports on loopback: {0}")]
    Ports(#[source] io::Error),
    #[error("signals cannot be caught: {0}")]
    Signals(#[source] io::Error),
}

/// Runs to the end. Everything that is wrong was told on standard error.
pub async fn run(args: Args) -> ExitCode {
    match run_inner(&args).await {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("error: {line}");
            }
            ExitCode::FAILURE
        }
    }
}

async fn run_inner(args: &Args) -> Result<Outcome, LocalError> {
    let admitted = manifests::read(&args.inputs).map_err(LocalError::Manifests)?;
    let lacking: Vec<String> = admitted.iter().filter_map(|admitted| lacking(&admitted.node)).collect();
    if !lacking.is_empty() {
        return Err(LocalError::Manifests(lacking));
    }
    if args.dry_run {
        let mut out = io::stdout().lock();
        admitted.iter().try_for_each(|admitted| writeln!(out, "{}", good(admitted))).map_err(LocalError::Output)?;
        return Ok(Outcome::Done);
    }
    let nodes: Vec<OverlayNode> = admitted.into_iter().map(|admitted| admitted.node).collect();
    let program = daemon_program::find()?;
    // From here on a signal ends the run in order.
    let mut signals = Signals::install().map_err(LocalError::Signals)?;
    let ports = ports::free(plan::count(&nodes) * plan::PORTS_EACH).map_err(LocalError::Ports)?;
    let uid = rustix::process::geteuid().as_raw();
    let root = runtime_dir::root(std::env::var_os("XDG_RUNTIME_DIR").as_deref(), uid)?;
    let daemons = plan::daemons(&nodes, &root, &args.trust_domain, &ports)?;
    let taken: Vec<_> =
        nodes.iter().map(|node| (names::namespace(node).to_owned(), names::name(node).to_owned())).collect();
    let mut dir = RuntimeDir::take(&root, &taken, uid)?;
    for folder in dir.ended() {
        eprintln!("ended a daemon that a killed run had left running in {}", folder.display());
    }
    let tokens = credentials::write(&mut dir, &nodes, &daemons, SystemTime::now())?;

    let output = Output::new(form(args.output), args.quiet, io::stdout(), io::stderr());
    let goal = if args.exit_when_ready { Goal::Ready(args.ready_timeout) } else { Goal::Stay };
    let (run, lines) = Run::new(daemons, tokens, program, goal, output);
    let (outcome, mut output) = run.drive(lines, &mut signals).await;
    dir.remove()?;
    output.say("stopped", Some(&Event::Stopped));
    Ok(outcome)
}

/// Why tokens cannot be minted for a run on this machine.
#[derive(Debug, thiserror::Error)]
pub enum LocalTokenError {
    /// There is no folder that a run could have.
    #[error("{0}")]
    NoFolder(String),
    /// No run has this OverlayNode.
    #[error(
        "OverlayNode {node} is not running on this machine (no {}): start 'overlay-operator local' with it, or give --namespace to mint for a cluster", path.display()
    )]
    NotRunning {
        /// Namespace and name.
        node: String,
        /// Where its key would be.
        path: PathBuf,
    },
    /// A file of the run is not as the run wrote it.
    #[error("{}: {message}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

/// The token root of the run that has this OverlayNode, and the identity that its daemons have.
///
/// # Errors
/// No run has it, or its files cannot be read.
pub fn token_root(node: &OverlayNode) -> Result<(TokenRoot, SpiffeId), LocalTokenError> {
    let uid = rustix::process::geteuid().as_raw();
    let root = runtime_dir::root(std::env::var_os("XDG_RUNTIME_DIR").as_deref(), uid)
        .map_err(|error| LocalTokenError::NoFolder(error.to_string()))?;
    token_root_in(&root, node)
}

fn token_root_in(root: &Path, node: &OverlayNode) -> Result<(TokenRoot, SpiffeId), LocalTokenError> {
    let (namespace, name) = (names::namespace(node), names::name(node));
    let path = runtime_dir::token_root(root, namespace, name);
    let not_running = || LocalTokenError::NotRunning { node: format!("{namespace}/{name}"), path: path.clone() };
    let read = |path: &Path| match std::fs::read_to_string(path) {
        Ok(text) => Ok(Zeroizing::new(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_running()),
        Err(error) => Err(LocalTokenError::Damaged { path: path.to_owned(), message: error.to_string() }),
    };
    let damaged =
        |path: &Path, error: TrustError| LocalTokenError::Damaged { path: path.to_owned(), message: error.to_string() };
    let tokens = TokenRoot::from_pem(&read(&path)?).map_err(|error| damaged(&path, error))?;
    // The run knows its trust domain; a token of its own says it.
    let standing = RuntimeDir::folder(root, namespace, &names::daemon(node, 0)).join(SOCKET_TOKEN);
    let claims = tokens.read(&read(&standing)?).map_err(|error| damaged(&standing, error))?;
    Ok((tokens, claims.aud))
}

/// What a manifest asks for that only a cluster has.
fn lacking(node: &OverlayNode) -> Option<String> {
    (node.spec.tls.source == CertificateSource::PodCertificate).then(|| {
        format!(
            "OverlayNode {}/{}: spec.tls.source: PodCertificate takes a kubelet, and there is none here: use Auto or SelfManaged",
            names::namespace(node),
            names::name(node)
        )
    })
}

fn good(admitted: &Admitted) -> String {
    let node = &admitted.node;
    format!("OverlayNode {}/{} is valid: {} replicas", names::namespace(node), names::name(node), node.spec.replicas)
}

fn form(asked: Option<OutputForm>) -> Form {
    match asked {
        Some(OutputForm::Table) => Form::Table,
        Some(OutputForm::Plain) => Form::Plain,
        Some(OutputForm::Json) => Form::Json,
        None if io::stdout().is_terminal() && output::terminal().is_some() => Form::Table,
        None => Form::Plain,
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration: crate::api::Duration = text.parse().map_err(|error: crate::api::DurationError| error.to_string())?;
    Ok(duration.get())
}

#[cfg(test)]
mod tests;
