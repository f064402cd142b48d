//! Where the programs under test and their data are. It finds them, and never builds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::control_plane::Reach;

/// The repository's root.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// A program of this workspace (`overlay-daemon`, `overlay-operator`), built with the same profile
/// and into the same target folder as the test that asks, unless `OVERLAY_PROGRAMS` names a folder:
/// programs that were built another way.
pub fn built(name: &str) -> Result<PathBuf> {
    if let Some(folder) = env::var_os("OVERLAY_PROGRAMS") {
        return Ok(Path::new(&folder).join(name));
    }
    let test = env::current_exe().context("the path of the running test")?;
    // TARGET/debug/deps/control_plane-HASH, or TARGET/debug/cluster -> TARGET/debug
    let folder = test.parent().context("a program lies in a folder")?;
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let program = folder.join(name);
    if !program.is_file() {
        bail!(
            "{} is not built: run `cargo build -p overlay-daemon -p overlay-operator --bins` first, as tests/run does",
            program.display()
        );
    }
    Ok(program)
}

/// The Kubernetes programs, found or built by `tests/kubernetes/build`.
#[derive(Clone, Debug)]
pub struct Kubernetes {
    folder: PathBuf,
}

impl Kubernetes {
    /// Asks the build script for the folder. With nothing cached this takes ten minutes and more.
    pub fn find(reach: Reach) -> Result<Self> {
        let script = repository().join("tests/kubernetes/build");
        let output = Command::new(&script)
            .arg(match reach {
                Reach::Loopback => "control-plane",
                Reach::Node(_) => "cluster",
            })
            .stderr(std::process::Stdio::inherit())
            .output()
            .with_context(|| format!("running {}", script.display()))?;
        if !output.status.success() {
            bail!("{} failed ({}): its messages are above", script.display(), output.status);
        }
        let folder = String::from_utf8(output.stdout)?.trim().into();
        Ok(Self { folder })
    }

    /// One of them.
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}
