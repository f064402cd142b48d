//! kubectl as a person runs it, against one kubeconfig. Tests speak to the API server only
//! through it, so that what they assert is what a user sees.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// kubectl with a kubeconfig.
#[derive(Clone, Debug)]
pub struct Kubectl {
    /// The process in whose network it runs; none means this one's.
    network_of: Option<u32>,
    program: PathBuf,
    kubeconfig: PathBuf,
    cache: PathBuf,
}

/// What a call came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit code 0.
    pub ok: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Kubectl {
    /// `cache` is a folder for kubectl's discovery cache.
    pub fn new(program: PathBuf, kubeconfig: PathBuf, cache: PathBuf) -> Self {
        Self { network_of: None, program, kubeconfig, cache }
    }

    /// The same in the network of another process.
    pub fn inside(pid: u32, program: PathBuf, kubeconfig: PathBuf, cache: PathBuf) -> Self {
        Self { network_of: Some(pid), program, kubeconfig, cache }
    }

    /// kubectl with its kubeconfig, ready for arguments.
    pub fn command(&self) -> Command {
        let mut command = match self.network_of {
            None => Command::new(&self.program),
            Some(pid) => {
                let mut command = Command::new("nsenter");
                command.args([&format!("--target={pid}"), "--net", "--"]).arg(&self.program);
                command
            }
        };
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--cache-dir").arg(&self.cache);
        command
    }

    /// The kubeconfig's path.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Runs kubectl and returns what came, also when it failed.
    pub fn try_run(&self, arguments: &[&str], input: Option<&str>) -> Result<Outcome> {
        let mut child = self
            .command()
            .args(arguments)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let stdin = child.stdin.take();
        let output = thread::scope(|scope| {
            // Written beside the reading: neither side can fill a pipe and wait for the other.
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                scope.spawn(move || {
                    let _ = stdin.write_all(input.as_bytes());
                });
            }
            child.wait_with_output()
        })?;
        Ok(Outcome {
            ok: output.status.success(),
            stdout: String::from_utf8(output.stdout)?,
            stderr: String::from_utf8(output.stderr)?,
        })
    }

    /// Runs kubectl; a failure is an error with its message.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.run_with(arguments, None)
    }

    /// [`Self::run`] with standard input.
    pub fn run_with(&self, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let outcome = self.try_run(arguments, input)?;
        if !outcome.ok {
            bail!("kubectl {}: {}", arguments.join(" "), outcome.stderr.trim());
        }
        Ok(outcome.stdout)
    }

    /// `kubectl apply -f -`.
    pub fn apply(&self, namespace: &str, manifest: &str) -> Result<String> {
        self.run_with(&["apply", "-n", namespace, "-f", "-"], Some(manifest))
    }

    /// One object, or a list where `name` is empty; none where it does not exist.
    pub fn get(&self, namespace: &str, kind: &str, name: &str) -> Result<Option<Value>> {
        let mut arguments =
            vec!["get", "-n", namespace, kind, "-o", "json", "--ignore-not-found", "--show-managed-fields"];
        if !name.is_empty() {
            arguments.push(name);
        }
        let text = self.run(&arguments)?;
        if text.trim().is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&text)?)) }
    }

    /// [`Self::get`], where the object must exist.
    pub fn must_get(&self, namespace: &str, kind: &str, name: &str) -> Result<Value> {
        self.get(namespace, kind, name)?.with_context(|| format!("there is no {kind} {namespace}/{name}"))
    }
}
