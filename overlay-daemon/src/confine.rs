//! What the process gives up before it does anything: dumping its memory, being traced, and,
//! with amnesia, writing to file systems at all (I-8). Decides what is essential and what is
//! only told of; the kernel enforces it.
//!
//! A restriction holds for the thread that asks for it and those it starts, so [`apply`] comes
//! before the runtime and its threads.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};
use rustix::fs::fstatfs;
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// `f_type` of tmpfs and ramfs, statfs(2): what lives in memory.
const MEMORY_BACKED: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// Where Linux says what memory is swapped to: a line of headings, then one a device or file.
const SWAPS: &str = "/proc/swaps";
/// The newest Landlock whose rights over files are asked for; older kernels give what they have.
const LANDLOCK: ABI = ABI::V5;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Memory could be dumped, or another process could read it.
    #[error("cannot forbid core dumps and tracing: {0}")]
    Dump(io::Error),
    /// The socket's folder is on a disk.
    #[error(
        "unix.socket: {}: with amnesia its folder must be in memory, and it is not on a tmpfs: mount one there, or name a folder under /dev/shm or XDG_RUNTIME_DIR",
        .0.display()
    )]
    NotInMemory(PathBuf),
    /// The socket's folder cannot be looked at.
    #[error("unix.socket: {}: its folder cannot be opened: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Landlock is there and refused.
    #[error("amnesia: Landlock refused its rules: {0}")]
    Landlock(#[from] RulesetError),
    /// Landlock is not there, and was asked for.
    #[error(
        "amnesia: this kernel's Landlock does not deny all writes (Linux 6.10 and newer, with landlock in its list of security modules), and --require-landlock was given"
    )]
    NoLandlock,
}

/// Something that is kept from happening, as far as the system allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// No core dump, and no other process reads this one's memory.
    Dump,
    /// No page of memory is written to a disk: there is no swap, or all pages are locked.
    Swap,
    /// No file is written: Landlock enforces it.
    Landlock,
}

impl Measure {
    /// Every measure, in the order of declaration.
    pub const ALL: [Self; 3] = [Self::Dump, Self::Swap, Self::Landlock];

    /// The label's value.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Dump => "dump",
            Self::Swap => "swap",
            Self::Landlock => "landlock",
        }
    }
}

/// What holds from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    amnesia: bool,
    /// Why pages may be written to a disk.
    swap: Option<String>,
    /// Why files may be written.
    landlock: Option<&'static str>,
}

impl Confinement {
    /// Whether a measure holds.
    #[must_use]
    pub fn holds(&self, measure: Measure) -> bool {
        match measure {
            Measure::Dump => true, // or the daemon would not have started
            Measure::Swap => self.swap.is_none(),
            Measure::Landlock => self.amnesia && self.landlock.is_none(),
        }
    }

    /// Says, once, what amnesia asks for and the system does not give.
    pub fn log(&self) {
        if !self.amnesia {
            return;
        }
        if let Some(why) = &self.swap {
            tracing::warn!("amnesia: memory may be swapped to a disk: {why}");
        }
        if let Some(why) = self.landlock {
            tracing::warn!("amnesia: the kernel does not enforce that no file is written: {why}");
        }
    }
}

/// Confines the calling thread and those that it starts. `socket` is the Unix socket, which
/// with amnesia is the one file that may come and go.
///
/// # Errors
/// Something essential cannot be had.
pub fn apply(amnesia: bool, socket: &Path, require_landlock: bool) -> Result<Confinement, ConfineError> {
    forbid_dumps().map_err(ConfineError::Dump)?;
    let swap = keep_in_memory(amnesia).err();
    let landlock = if amnesia { forbid_writes(folder_of(socket), require_landlock)? } else { None };
    Ok(Confinement { amnesia, swap, landlock })
}

/// N1: keys and payloads are in this process's memory alone.
fn forbid_dumps() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Locks memory where there is swap and it is allowed. Where there is none nothing is locked:
/// pages that are locked cannot be given back to the system one by one.
fn keep_in_memory(amnesia: bool) -> Result<(), String> {
    let swap = fs::read_to_string(SWAPS).map_or(0, |swaps| swaps.lines().skip(1).count());
    if swap == 0 {
        return Ok(());
    }
    let may = getrlimit(Resource::Memlock).current.is_none()
        || capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if !amnesia || !may {
        return Err("this machine has swap, and neither CAP_IPC_LOCK nor an unlimited RLIMIT_MEMLOCK is given".into());
    }
    // On fault: what is reserved and never touched costs nothing.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
        .map_err(|error| format!("this machine has swap, and locking memory failed: {error}"))
}

/// Denies every write to every file system, but sockets in `folder`. Descriptors that are open
/// already (standard error above all) are not concerned, nor are sockets and reading. Why it is
/// not enforced, where it is not.
fn forbid_writes(folder: &Path, required: bool) -> Result<Option<&'static str>, ConfineError> {
    let refused = |source| ConfineError::Folder { path: folder.to_owned(), source };
    // Opened once: what is looked at is what the rule is about.
    let opened = PathFd::new(folder).map_err(|error| refused(io::Error::other(error)))?;
    if !is_memory_backed(&opened).map_err(refused)? {
        return Err(ConfineError::NotInMemory(folder.to_owned()));
    }
    let sockets = PathBeneath::new(opened, AccessFs::MakeSock | AccessFs::RemoveFile);
    let RestrictionStatus { ruleset, .. } = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_write(LANDLOCK))?
        .create()?
        .add_rule(sockets)?
        .restrict_self()?;
    match ruleset {
        RulesetStatus::FullyEnforced => Ok(None),
        RulesetStatus::PartiallyEnforced | RulesetStatus::NotEnforced if required => Err(ConfineError::NoLandlock),
        RulesetStatus::PartiallyEnforced => Ok(Some("its Landlock is older than Linux 6.10, and denies not all of it")),
        RulesetStatus::NotEnforced => Ok(Some("it has no Landlock (Linux 5.13 and newer)")),
    }
}

fn folder_of(socket: &Path) -> &Path {
    socket.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn is_memory_backed(folder: impl AsFd) -> io::Result<bool> {
    // `f_type` is a word of either sign, by architecture; its lower 32 bits are the number.
    Ok(MEMORY_BACKED.contains(&((fstatfs(folder)?.f_type as u64) & 0xffff_ffff)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn memory() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    /// I-8: the kernel says no, also to a thread that starts later; sockets come and go, and
    /// reading goes on. In a thread of its own: what it gives up, it gives up for good.
    #[test]
    fn nothing_is_written_but_the_socket() {
        let (memory, disk) = (memory(), tempfile::tempdir().unwrap());
        fs::write(memory.path().join("there"), "x").unwrap();
        let (socket, disk) = (memory.path().join("overlay.sock"), disk.path().to_owned());
        fs::create_dir_all(&disk).unwrap();
        let there = memory.path().join("there");
        let confined = thread::spawn(move || {
            assert_eq!(forbid_writes(folder_of(&socket), true).unwrap(), None);
            let later = thread::spawn(move || {
                for _again in 0..2 {
                    drop(UnixListener::bind(&socket).unwrap());
                    fs::remove_file(&socket).unwrap();
                }
                assert_eq!(fs::read_to_string(&there).unwrap(), "x");
                let denied = |done: io::Result<()>| done.unwrap_err().kind() == io::ErrorKind::PermissionDenied;
                let folder = socket.parent().unwrap();
                [
                    denied(fs::write(disk.join("file"), "x")),
                    denied(fs::create_dir(disk.join("folder"))),
                    denied(fs::write(folder.join("file"), "x")),
                    denied(fs::write(&there, "y")),
                    denied(fs::rename(&there, folder.join("elsewhere"))),
                    denied(std::os::unix::fs::symlink(&there, folder.join("link"))),
                    denied(UnixListener::bind(disk.join("socket")).map(drop)),
                ]
            });
            later.join().unwrap()
        });
        assert_eq!(confined.join().unwrap(), [true; 7]);
    }

    /// N1: the kernel is asked, not believed.
    #[test]
    fn n1_memory_is_nobody_elses() {
        forbid_dumps().unwrap();
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(getrlimit(Resource::Core), Rlimit { current: Some(0), maximum: Some(0) });
    }

    #[test]
    fn a_socket_on_a_disk_is_refused_with_amnesia() {
        let disk = Path::new(env!("CARGO_MANIFEST_DIR"));
        let error = forbid_writes(disk, false).unwrap_err();
        assert!(error.to_string().starts_with("unix.socket: "), "{error}");
        let gone = forbid_writes(&disk.join("no-such-folder"), false).unwrap_err();
        assert!(matches!(gone, ConfineError::Folder { .. }), "{gone}");
        assert_eq!(folder_of(Path::new("overlay.sock")), Path::new("."));
    }

    #[test]
    fn every_measure_stands_in_its_order() {
        assert!(Measure::ALL.iter().enumerate().all(|(i, measure)| *measure as usize == i));
    }
}
