//! The operator as its chart runs it: arguments and environment of the rendered Deployment, and
//! the identity of its service account, but as a process on loopback, since no pod can run here.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::control_plane::{ControlPlane, free_ports};
use crate::http;
use crate::kubectl::Kubectl;
use crate::process::Process;
use crate::programs;
use crate::wait::{self, Look};

/// The namespace that the chart is installed in.
pub const NAMESPACE: &str = "overlay-system";
/// The release's name.
pub const RELEASE: &str = "overlay";
/// The CRD, as committed.
pub const CRD: &str = "crds/overlaynodes.overlay.rustyonions.io.yaml";

const READY_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// What an operator is ready for, as its `/readyz` has it.
pub const LEADER: &str = "leader";
/// Ready to take over.
pub const STANDBY: &str = "standby";

/// The installed operator; running or stopped.
#[derive(Debug)]
pub struct Operator {
    program: PathBuf,
    folder: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    address: SocketAddr,
    identity: Kubectl,
    process: Option<Process>,
}

impl Operator {
    /// Installs the CRD by `kubectl apply` and the rest of the chart after it, makes a token for
    /// the service account, and starts the operator with it.
    pub fn install(plane: &ControlPlane) -> Result<Self> {
        let admin = plane.admin();
        let crds = programs::repository().join("crds");
        admin.run(&["apply", "-f", &crds.to_string_lossy()])?;
        admin.run(&["wait", "--for=condition=Established", "--timeout=60s", "-f", &crds.to_string_lossy()])?;
        admin.run(&["create", "namespace", NAMESPACE])?;
        let [port] = free_ports()?;
        let chart = helm_template(plane, &["--set", "crd.install=false", "--set", &format!("port={port}")])?;
        admin.apply(NAMESPACE, &chart)?;

        let deployment = admin.must_get(NAMESPACE, "deployment", "overlay-operator")?;
        let pod = &deployment["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let account = pod["serviceAccountName"].as_str().context("the Deployment names no service account")?;
        let token = admin.run(&["create", "token", "-n", NAMESPACE, account, "--duration=2h"])?;
        let mut operator = Self {
            program: programs::built("overlay-operator")?,
            folder: plane.folder().to_owned(),
            log: plane.folder().join("overlay-operator.log"),
            arguments: strings(&container["args"]),
            environment: environment(&container["env"])?,
            address: (Ipv4Addr::LOCALHOST, port).into(),
            identity: plane.with_token(account, token.trim())?,
            process: None,
        };
        operator.start()?;
        Ok(operator)
    }

    /// Another replica of the same Deployment, not started yet.
    pub fn another(&self, pod: &str) -> Result<Self> {
        let [port] = free_ports()?;
        let (mine, its) = (format!(":{}", self.address.port()), format!(":{port}"));
        let admin = |argument: &String| match argument.strip_prefix("--admin-addr=") {
            Some(_) => argument.replace(&mine, &its),
            None => argument.clone(),
        };
        let named = |(name, value): &(String, String)| {
            (name.clone(), if name == "POD_NAME" { pod.to_owned() } else { value.clone() })
        };
        Ok(Self {
            program: self.program.clone(),
            folder: self.folder.clone(),
            log: self.folder.join(format!("{pod}.log")),
            arguments: self.arguments.iter().map(admin).collect(),
            environment: self.environment.iter().map(named).collect(),
            address: (Ipv4Addr::LOCALHOST, port).into(),
            identity: self.identity.clone(),
            process: None,
        })
    }

    /// Starts it and waits until it leads, and `/readyz` says so.
    pub fn start(&mut self) -> Result<()> {
        self.start_as(LEADER)
    }

    /// Starts it and waits until `/readyz` says that it is ready for `role`.
    pub fn start_as(&mut self, role: &str) -> Result<()> {
        let prepare = |command: &mut Command| {
            command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
            command.env("KUBECONFIG", self.identity.kubeconfig());
        };
        let mut process = Process::start("overlay-operator", &self.program, &self.log, prepare)?;
        let (address, role) = (self.address, format!("\"role\":\"{role}\""));
        wait::until("the operator to be ready", READY_LIMIT, || {
            process.check()?;
            Ok(match http::get(address, "/readyz") {
                Ok(answer) if answer.status == 200 && answer.body.contains(&role) => Look::Holds(()),
                Ok(answer) => Look::NotYet(answer.body),
                Err(error) => Look::NotYet(error.to_string()),
            })
        })
        .with_context(|| process.log_tail())?;
        self.process = Some(process);
        Ok(())
    }

    /// SIGTERM; it must leave by itself.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let mut process = self.process.take().context("the operator is not running")?;
        process.signal(rustix::process::Signal::TERM);
        process.wait(STOP_LIMIT)
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the operator is not running")?;
        process.signal(rustix::process::Signal::KILL);
        process.wait(STOP_LIMIT).map(|_| ())
    }

    /// Waits until it ends by itself.
    pub fn ends(&mut self) -> Result<ExitStatus> {
        let mut process = self.process.take().context("the operator is not running")?;
        process.wait(STOP_LIMIT)
    }

    /// Whether it is ready for `role`.
    pub fn is(&self, role: &str) -> bool {
        let answer = http::get(self.address, "/readyz");
        answer.is_ok_and(|a| a.status == 200 && a.body.contains(&format!("\"role\":\"{role}\"")))
    }

    /// The service account's own kubectl.
    pub fn identity(&self) -> &Kubectl {
        &self.identity
    }

    /// One metric, summed over its labels.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let answer = http::get(self.address, "/metrics")?;
        http::metric_sum(&answer.body, name).with_context(|| format!("no metric {name} in:\n{}", answer.body))
    }

    /// One of its HTTP routes.
    pub fn get(&self, path: &str) -> Result<http::Answer> {
        http::get(self.address, path)
    }

    /// What it logged, since the first start.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }
}

/// `helm template` of the committed chart.
pub fn helm_template(plane: &ControlPlane, arguments: &[&str]) -> Result<String> {
    let chart = programs::repository().join("charts/overlay-operator");
    let mut all = vec!["template", RELEASE];
    let chart = chart.to_string_lossy();
    all.extend([&*chart, "--namespace", NAMESPACE]);
    all.extend(arguments);
    helm(plane, &all)
}

/// helm, with nothing of the user's own configuration.
pub fn helm(plane: &ControlPlane, arguments: &[&str]) -> Result<String> {
    let output = Command::new(plane.programs().program("helm"))
        .args(arguments)
        .env("HOME", plane.folder())
        .env("KUBECONFIG", plane.admin().kubeconfig())
        .output()
        .context("starting helm")?;
    if !output.status.success() {
        bail!("helm {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// A list of strings.
fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The container's environment, with what the kubelet would fill in.
fn environment(list: &Value) -> Result<Vec<(String, String)>> {
    let mut environment = Vec::new();
    for variable in list.as_array().into_iter().flatten() {
        let name = variable["name"].as_str().context("a variable without a name")?;
        let field = variable["valueFrom"]["fieldRef"]["fieldPath"].as_str();
        let value = match (variable["value"].as_str(), field) {
            (Some(value), _) => value,
            (None, Some("metadata.namespace")) => NAMESPACE,
            (None, Some("metadata.name")) => "overlay-operator-one",
            _ => bail!("the Deployment's variable {name} has a source that these tests do not know"),
        };
        environment.push((name.to_owned(), value.to_owned()));
    }
    Ok(environment)
}
