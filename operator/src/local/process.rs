//! Facts about processes that outlive the program that started them: who they are, and
//! ending them. Never ends one that it cannot tell from a stranger that took over its number.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// For how long a killed process may take to be gone.
const GONE_WITHIN: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// A process, told apart from a later one of the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pid: i32,
    /// Clock ticks from boot to its start: field 22 of `/proc/PID/stat`.
    start_time: u64,
    /// Its program: `/proc/PID/exe`.
    program: PathBuf,
}

impl Identity {
    /// What `/proc` says about a running process.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).map_err(io::Error::other)?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = start_time(&stat).ok_or_else(|| io::Error::other("/proc/PID/stat has no start time"))?;
        Ok(Self { pid, start_time, program: fs::read_link(format!("/proc/{pid}/exe"))? })
    }

    /// Writes it down, for a later run to find.
    pub(super) fn save(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
    }

    /// Reads what [`Self::save`] wrote.
    pub(super) fn load(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Kills the process if it still is the one that was written down, and waits until it is
    /// gone. Whether there was one.
    pub(super) fn end(&self) -> io::Result<bool> {
        let Some(pid) = Some(self.pid).filter(|pid| *pid > 0).and_then(Pid::from_raw) else { return Ok(false) };
        // The descriptor first: what is checked after it cannot become another process.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(false) };
        let same = u32::try_from(self.pid).is_ok_and(|pid| Self::of(pid).is_ok_and(|now| now.is_same(self)));
        if !same {
            return Ok(false);
        }
        pidfd_send_signal(&process, Signal::KILL)?;
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&GONE_WITHIN))?;
        Ok(true)
    }

    /// A program that was rebuilt meanwhile reads as `PATH (deleted)`.
    fn is_same(&self, recorded: &Self) -> bool {
        let deleted = format!("{} (deleted)", recorded.program.display());
        self.pid == recorded.pid
            && self.start_time == recorded.start_time
            && (self.program == recorded.program || self.program.as_os_str() == deleted.as_str())
    }
}

/// Field 22, counted behind the program's name, which may hold spaces and parentheses.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn the_start_time_is_the_22nd_field() {
        let rest = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        for name in ["(daemon)", "(a b)", "(a) 7 (b)", "())"] {
            assert_eq!(start_time(&format!("17 {name} {rest}")), Some(22), "{name}");
        }
        assert_eq!(start_time("17 (daemon) S 1"), None);
    }

    #[test]
    fn ends_the_process_that_was_written_down() {
        let mut child = sleeper();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("process");
        Identity::of(child.id()).unwrap().save(&path).unwrap();
        assert!(Identity::load(&path).unwrap().end().unwrap());
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
        assert!(!Identity::load(&path).unwrap().end().unwrap(), "and no other after it");
    }

    /// The number of a dead daemon may be anyone's by now.
    #[test]
    fn spares_a_stranger_of_the_same_number() {
        let mut child = sleeper();
        let real = Identity::of(child.id()).unwrap();
        for stranger in [
            Identity { start_time: real.start_time + 1, ..real.clone() },
            Identity { program: "/usr/bin/overlay-daemon".into(), ..real.clone() },
            Identity { pid: 0, ..real.clone() },
            Identity { pid: -1, ..real.clone() },
        ] {
            assert!(!stranger.end().unwrap(), "{stranger:?}");
        }
        assert!(child.try_wait().unwrap().is_none(), "still running");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
