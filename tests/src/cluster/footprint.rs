//! What a cluster could leave on a machine: namespaces (every process of it lives in some of
//! its own), cgroups, mounts, network devices, kernel settings. Taken before and after, it is the
//! same; what systemd and others start and end meanwhile is left out, another cluster is not.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::wait::{self, Look};

/// Settings that the kernel or any process changes all the time.
const RESTLESS: &[&str] = &[
    "/proc/sys/fs/",
    "/proc/sys/kernel/random/",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/kernel/pty/",
    "/proc/sys/net/netfilter/nf_conntrack_count",
];

/// How long the kernel may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The machine's state, one line a fact.
#[derive(Clone, Debug)]
pub struct Footprint {
    facts: BTreeSet<String>,
}

impl Footprint {
    /// As it is now.
    ///
    /// # Errors
    /// Something could not be read.
    pub fn take() -> Result<Self> {
        // The kernel loads what a table of addresses takes with the first look, and keeps it.
        let _ = Command::new("iptables").args(["--table", "nat", "--list", "--numeric"]).output();
        let mut facts = BTreeSet::new();
        for mount in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // Its fifth field is where it is mounted.
            facts.insert(format!("mount {}", mount.split(' ').nth(4).unwrap_or(mount)));
        }
        for device in fs::read_dir("/sys/class/net")? {
            facts.insert(format!("network device {}", device?.file_name().to_string_lossy()));
        }
        for process in fs::read_dir("/proc")? {
            let path = process?.path();
            for kind in ["net", "pid"] {
                // A process may end while it is looked at, and kernel threads have none to show.
                if let Ok(namespace) = fs::read_link(path.join("ns").join(kind)) {
                    facts.insert(format!("namespace {}", namespace.display()));
                }
            }
        }
        walk(Path::new("/sys/fs/cgroup"), &mut |path, folder| {
            let systemds = [".slice", ".scope", ".service"].iter().any(|unit| path.to_string_lossy().contains(unit));
            // One that holds a process is told by that process's namespaces, or is somebody else's.
            if folder && !systemds && fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().is_empty() {
                facts.insert(format!("cgroup {}", path.display()));
            }
        });
        walk(Path::new("/proc/sys"), &mut |path, folder| {
            let text = path.to_string_lossy();
            if !folder && !RESTLESS.iter().any(|prefix| text.starts_with(prefix)) {
                // Some cannot be read; that they are there is a fact too.
                let value = fs::read(path).unwrap_or_default();
                facts.insert(format!("setting {text} = {}", String::from_utf8_lossy(&value).trim()));
            }
        });
        Ok(Self { facts })
    }

    /// Waits until nothing of what there is now was not there already: the kernel takes a moment to
    /// dissolve what the last process has left.
    ///
    /// # Errors
    /// What has come or changed, and stays.
    pub fn wait_for_return(&self) -> Result<()> {
        wait::until("the machine to be as it was", LIMIT, || {
            let now = Self::take()?;
            let left: Vec<&str> = now.facts.difference(&self.facts).map(String::as_str).collect();
            Ok(if left.is_empty() { Look::Holds(()) } else { Look::NotYet(left.join("\n")) })
        })
    }
}

fn walk(path: &Path, visit: &mut impl FnMut(&Path, bool)) {
    let Ok(entries) = fs::read_dir(path) else { return };
    let mut children: Vec<(PathBuf, bool)> = Vec::new();
    for entry in entries.flatten() {
        if let Ok(kind) = entry.file_type() {
            children.push((entry.path(), kind.is_dir()));
        }
    }
    for (child, folder) in children {
        visit(&child, folder);
        if folder {
            walk(&child, visit);
        }
    }
}
