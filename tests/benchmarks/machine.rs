//! The machine: which core who runs on, and what it is, for the record.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// One core for the servers, one for the generator.
pub(crate) struct Cores {
    servers: usize,
    generator: usize,
}

impl Cores {
    /// The first and the last that this process may use.
    pub(crate) fn find() -> Result<Self> {
        let may = sched_getaffinity(None)?;
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| may.is_set(*core)).collect();
        ensure!(cores.len() >= 2, "two cores are needed: one for the servers, one for the generator");
        Ok(Self { servers: cores[0], generator: cores[cores.len() - 1] })
    }

    /// What `start` starts stays on the servers' core; this thread goes back to the generator's.
    pub(crate) fn serve<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        pin(self.servers)?;
        let started = start();
        pin(self.generator)?;
        started
    }
}

fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).context("sched_setaffinity")
}

/// Processors, kernel and how busy it is with others' work.
pub(crate) fn describe() -> String {
    let field = |path: &str, name: &str| -> Option<String> {
        let text = fs::read_to_string(path).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let model = field("/proc/cpuinfo", "model name").unwrap_or_default();
    let memory = field("/proc/meminfo", "MemTotal").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let rust = Command::new("rustc").arg("--version").output().ok();
    let rust = rust.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    format!(
        "{cores} of {model}, {memory}, Linux {}, {rust}; load average at the start {}",
        kernel.trim(),
        load.split(' ').next().unwrap_or_default()
    )
}
