//! A child process that never outlives its owner: stopped by its own pid on drop, also while a
//! panic unwinds, and by the kernel if the test itself is killed. Its output goes to a file.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

use crate::wait::{self, Look};

/// How long a process may take to leave after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// How much of a log's end an error shows.
const LOG_TAIL_BYTES: usize = 4096;

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `program` with its output appended to `log`. `prepare` adds arguments and environment.
    ///
    /// `setpriv --pdeathsig` has the kernel end the child if the starting thread dies, so start
    /// processes from a thread that lives as long as they should.
    pub fn start(name: &str, program: &Path, log: &Path, prepare: impl FnOnce(&mut Command)) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new("setpriv");
        command.args([OsStr::new("--pdeathsig"), OsStr::new("KILL"), OsStr::new("--"), program.as_os_str()]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        prepare(&mut command);
        let child = command.spawn().with_context(|| format!("starting {} through setpriv", program.display()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), ended: None })
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// KiB of memory resident.
    pub fn resident_kib(&self) -> Result<u64> {
        self.status_kib("VmRSS:")
    }

    /// KiB of memory resident at the most, so far.
    pub fn most_resident_kib(&self) -> Result<u64> {
        self.status_kib("VmHWM:")
    }

    fn status_kib(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Processor time of all threads that it has.
    pub fn processor_time(&self) -> Result<Duration> {
        processor_time(self.id())
    }

    /// An error with the end of the log, if the process is no longer running.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.poll()? {
            anyhow::bail!("{} ended ({status}):\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// Sends a signal. A process that has already ended is no error.
    pub fn signal(&self, signal: Signal) {
        if self.ended.is_none()
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// Descriptors that it has open.
    ///
    /// # Errors
    /// It is gone, or its descriptors are root's to look at and this is not root.
    pub fn descriptors(&self) -> Result<u64> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.id()))
            .context("only root may look at a process that cannot be dumped: run these tests as root")?;
        Ok(open.count() as u64)
    }

    /// It may have so many descriptors open from now on, and no more.
    ///
    /// # Errors
    /// It is gone, or it was allowed fewer.
    pub fn limit_descriptors(&self, most: u64) -> Result<()> {
        let pid = i32::try_from(self.id()).ok().and_then(Pid::from_raw).context("a process's number")?;
        let allowed = fs::read_to_string(format!("/proc/{}/limits", self.id()))?;
        let allowed = allowed.lines().find(|line| line.starts_with("Max open files")).context("no limit of files")?;
        let maximum = allowed.split_whitespace().nth(4).and_then(|hard| hard.parse().ok());
        prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(most), maximum })?;
        Ok(())
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait::until(&what, limit, || {
            Ok(match self.poll()? {
                Some(status) => Look::Holds(status),
                None => Look::NotYet("still running".to_owned()),
            })
        })
    }

    /// SIGTERM, then SIGKILL after a grace period. Says how it ended.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.poll()? {
            return Ok(status);
        }
        self.signal(Signal::TERM);
        if let Ok(status) = self.wait(GRACE) {
            return Ok(status);
        }
        eprintln!("{} does not end on SIGTERM and is killed", self.name);
        self.kill()
    }

    /// SIGKILL. Says how it ended.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        let status = self.child.wait()?;
        self.ended = Some(status);
        Ok(status)
    }

    /// All that the process wrote.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The end of what it wrote, for an error message.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let mut from = log.len().saturating_sub(LOG_TAIL_BYTES);
        while !log.is_char_boundary(from) {
            from += 1;
        }
        log[from..].to_owned()
    }

    fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }
}

/// Processor time of all threads that a process has, by the scheduler's own nanoseconds.
pub fn processor_time(process: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("stopping {}: {error}", self.name);
        }
    }
}
