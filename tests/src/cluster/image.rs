//! Images without a registry: a root file system is packed into an archive, and containerd
//! takes it. What the project's own images hold is decided in `deploy/rootfs`, as for the
//! images that are published.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::RUNTIME;
use crate::programs::repository;

/// An image archive.
#[derive(Clone, Debug)]
pub struct Archive {
    /// Where it is.
    pub path: PathBuf,
}

/// An image of `programs`, the first of which a container starts.
///
/// # Errors
/// A program is missing, or one of the scripts failed.
pub fn of(name: &str, programs: &[PathBuf], user: &str, folder: &Path) -> Result<Archive> {
    let first = programs.first().and_then(|program| program.file_name()).context("an image without a program")?;
    let file = first.to_string_lossy();
    let (rootfs, path) = (folder.join(format!("{file}.rootfs")), folder.join(format!("{file}.tar")));
    if rootfs.exists() {
        fs::remove_dir_all(&rootfs)?;
    }
    script("deploy/rootfs", |command| {
        command.arg(&rootfs).args(programs);
    })?;
    script("tests/kubernetes/archive", |command| {
        command.arg(name).arg(&rootfs).arg(format!("/usr/bin/{file}")).arg(user).arg(&path);
    })?;
    fs::remove_dir_all(&rootfs)?;
    Ok(Archive { path })
}

/// The image that holds a pod's namespaces.
pub(super) fn pause(folder: &Path) -> Result<Archive> {
    let program = folder.join("pause");
    let source = repository().join("tests/kubernetes/pause.c");
    super::sandbox::run("cc", &["-O2", "-static", "-o", &program.to_string_lossy(), &source.to_string_lossy()])?;
    of("localhost/pause:1", &[program], "65535:65535", folder)
}

impl Archive {
    /// Hands it to the node's containerd, from inside the node's mount namespace.
    pub(super) fn import(&self) -> Result<()> {
        super::sandbox::run("ctr", &self.import_arguments())
    }

    /// What `ctr` is told for it.
    pub(super) fn import_arguments(&self) -> [&str; 7] {
        let path = self.path.to_str().unwrap_or_default();
        ["--address", RUNTIME, "--namespace", "k8s.io", "images", "import", path]
    }
}

fn script(name: &str, prepare: impl FnOnce(&mut Command)) -> Result<()> {
    let mut command = Command::new(repository().join(name));
    prepare(&mut command);
    let output = command.output().with_context(|| format!("starting {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
