//! What is written down of a cluster before it is made, so that it can be taken away by
//! whoever finds it: a folder, a cgroup, and processes by pid and start time, since pids are
//! used again.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// One cluster, as its folder's `record.json` has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    folder: PathBuf,
    cgroup: String,
    /// `unshare`, outside the sandbox that it made.
    sandbox: Option<Instance>,
    /// The sandbox's first process, whose end is the end of all in it.
    init: Option<Instance>,
    /// The test that it belongs to; a cluster to play with belongs to nobody.
    owner: Option<Instance>,
}

/// A process that cannot be mistaken for a later one with its pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Instance {
    pid: u32,
    /// In clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)).
    started: u64,
}

impl Instance {
    fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field, the program's name in parentheses, may itself hold spaces.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let gone = matches!(fields.first(), Some(&"Z" | &"X"));
        let started = fields.get(22 - 3)?.parse().ok()?;
        (!gone).then_some(Self { pid, started })
    }

    fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

impl Record {
    /// A new one, written down.
    pub(super) fn new(name: &str) -> Result<Self> {
        let folder = folder(name)?;
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let record = Self {
            folder,
            cgroup: format!("overlay-cluster-{name}"),
            sandbox: None,
            init: None,
            owner: Instance::of(std::process::id()),
        };
        record.write()?;
        Ok(record)
    }

    /// From now on it belongs to nobody, and goes on without its maker.
    pub(super) fn disown(&self) -> Result<()> {
        Self { owner: None, ..self.clone() }.write()
    }

    /// With the process that holds the sandbox; `owned` by the caller, or by nobody.
    pub(super) fn with_sandbox(mut self, pid: u32, owned: bool) -> Result<Self> {
        self.sandbox = Instance::of(pid);
        self.owner = owned.then(|| Instance::of(std::process::id())).flatten();
        self.write()?;
        let children = format!("/proc/{pid}/task/{pid}/children");
        self.init = crate::wait::until("the sandbox's first process", super::START_LIMIT, || {
            let text = fs::read_to_string(&children).context("the sandbox ended at once: are you root?")?;
            let first = text.split_whitespace().next().and_then(|pid| pid.parse().ok()).and_then(Instance::of);
            Ok(first.map_or(crate::wait::Look::NotYet(text), |init| crate::wait::Look::Holds(Some(init))))
        })?;
        self.write()?;
        Ok(self)
    }

    /// The one of that name, if any is written down.
    pub(super) fn read(name: &str) -> Result<Option<Self>> {
        let folder = folder(name)?;
        if !folder.exists() {
            return Ok(None);
        }
        let text = fs::read(folder.join(FILE)).unwrap_or_default();
        // Cut off while it was written: nothing had been started yet.
        let unfinished =
            Self { folder, cgroup: format!("overlay-cluster-{name}"), sandbox: None, init: None, owner: None };
        Ok(Some(serde_json::from_slice(&text).unwrap_or(unfinished)))
    }

    fn write(&self) -> Result<()> {
        let (path, partial) = (self.folder.join(FILE), self.folder.join("record.partial"));
        fs::write(&partial, serde_json::to_vec_pretty(self)?)?;
        fs::rename(partial, path)?;
        Ok(())
    }

    /// Whether anything of it still runs.
    pub(super) fn is_alive(&self) -> bool {
        [self.sandbox, self.init].into_iter().flatten().any(Instance::is_alive)
    }

    /// Whether somebody is just making it.
    pub(super) fn is_being_made(&self) -> bool {
        self.init.is_none() && self.owner.is_some_and(Instance::is_alive)
    }

    /// Whether it works as a whole, rather than being about to end.
    pub(super) fn is_running(&self) -> bool {
        [self.sandbox, self.init].into_iter().all(|instance| instance.is_some_and(Instance::is_alive))
    }

    /// Whether it belonged to a test that is gone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.owner.is_some_and(|owner| !owner.is_alive())
    }

    pub(super) fn kill(&self) -> Result<()> {
        for instance in [self.init, self.sandbox].into_iter().flatten().filter(|instance| instance.is_alive()) {
            if let Some(pid) = i32::try_from(instance.pid).ok().and_then(Pid::from_raw) {
                // It may have ended since.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        Ok(())
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// The process whose network and mounts are the node's.
    pub(super) fn pid(&self) -> u32 {
        self.sandbox.map_or(0, |sandbox| sandbox.pid)
    }

    /// The last step: nothing is left to be remembered.
    pub(super) fn forget(&self) -> Result<()> {
        if !self.folder.exists() {
            return Ok(());
        }
        fs::remove_dir_all(&self.folder).with_context(|| format!("removing {}", self.folder.display()))
    }
}

const FILE: &str = "record.json";

/// Held while the cluster of that name is begun or taken away: one at a time.
pub(super) fn lock(name: &str) -> Result<fs::File> {
    let path = folder(name)?.with_extension("lock");
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    let file = fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
    file.lock()?;
    Ok(file)
}

/// `${XDG_CACHE_HOME:-~/.cache}/overlay-tests/clusters/NAME`: on a disk, since images take space.
fn folder(name: &str) -> Result<PathBuf> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
        bail!("a cluster's name is lowercase letters, digits and '-', not {name:?}");
    }
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    Ok(cache.context("HOME is not set")?.join("overlay-tests/clusters").join(name))
}
