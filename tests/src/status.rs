//! `overlay-daemon status`, as a person types it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::programs;

/// What it prints in the form `output`; `token` is the file of another token than the one beside
/// the socket.
///
/// # Errors
/// It fails, or says something on standard error.
pub fn status(socket: &Path, token: Option<&Path>, output: &str) -> Result<String> {
    let mut command = Command::new(programs::built("overlay-daemon")?);
    command.args(["status", "--output", output, "--socket"]).arg(socket);
    if let Some(token) = token {
        command.arg("--token-file").arg(token);
    }
    let shown = command.output()?;
    ensure!(shown.status.success() && shown.stderr.is_empty(), "{shown:?}");
    Ok(String::from_utf8(shown.stdout)?)
}

/// The report itself.
///
/// # Errors
/// As [`status`], or it is no JSON.
pub fn report(socket: &Path, token: Option<&Path>) -> Result<Value> {
    let text = status(socket, token, "json")?;
    serde_json::from_str(&text).with_context(|| text)
}
