//! What a process writes anywhere: a watch over every file system that there is (fanotify(7)), and
//! a look through the places that everybody may write to.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use walkdir::WalkDir;

/// File systems that the kernel makes up: nothing that is written there is kept.
const MADE_UP: [&str; 16] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "securityfs",
    "sysfs",
    "tracefs",
];
/// Where programs put things whoever runs them (hier(7)).
const PLACES: [&str; 6] = ["/dev/shm", "/run", "/tmp", "/var/crash", "/var/log", "/var/tmp"];

/// Sees every file that anybody writes to or opens for writing, from [`Watch::start`] on.
pub struct Watch {
    events: Fanotify,
}

impl Watch {
    /// Watches every file system that is mounted to be written to.
    ///
    /// # Errors
    /// This is not root, or the kernel is built without fanotify.
    pub fn start() -> Result<Self> {
        let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_NONBLOCK | InitFlags::FAN_CLOEXEC;
        // Others on the machine write too, and none of it is read before the end.
        let flags = flags | InitFlags::FAN_UNLIMITED_QUEUE;
        let events = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC | EventFFlags::O_LARGEFILE)
            .context("only root may watch whole file systems: run these tests as root")?;
        let written = MaskFlags::FAN_MODIFY | MaskFlags::FAN_CLOSE_WRITE;
        for place in mounts()? {
            events
                .mark(MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM, written, File::open("/")?, Some(&place))
                .with_context(|| format!("watching {}", place.display()))?;
        }
        Ok(Self { events })
    }

    /// What was written to or opened for writing, and closed again: by the process `ours`, and by
    /// this one, which shows that the watch sees.
    ///
    /// # Errors
    /// The kernel left something out.
    pub fn finish(self, ours: u32) -> Result<BTreeSet<PathBuf>> {
        let (mut seen, mut control) = (BTreeSet::new(), false);
        let witness = tempfile::NamedTempFile::new()?;
        fs::write(witness.path(), "seen")?;
        loop {
            let events = match self.events.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => break,
                Err(error) => return Err(error).context("reading what was seen"),
            };
            for event in events {
                ensure!(!event.mask().contains(MaskFlags::FAN_Q_OVERFLOW), "the kernel left something out");
                let Some(file) = event.fd() else { continue };
                let path = || fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
                if u32::try_from(event.pid()) == Ok(ours) {
                    seen.insert(path()?);
                } else if u32::try_from(event.pid()) == Ok(std::process::id()) {
                    control |= path()? == witness.path();
                }
            }
        }
        ensure!(control, "the watch did not see what this test wrote itself");
        Ok(seen)
    }
}

/// Where something is mounted that can be written to, and that keeps it.
fn mounts() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let kept = mounts.lines().filter_map(|line| {
        // proc(5): id, parent, device, root, mount point, options, optional fields, "-", type …
        let (mount, file_system) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let made_up = MADE_UP.contains(&file_system.split(' ').next()?);
        let writable = mount.get(5)?.split(',').any(|option| option == "rw");
        (writable && !made_up).then(|| PathBuf::from(mount[4]))
    });
    Ok(kept.collect())
}

/// Regular files in the places that everybody may write to that have changed after `start`, but
/// for what is below `except`.
pub fn changed_since(start: SystemTime, except: &Path) -> impl Iterator<Item = PathBuf> {
    let start = start.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
    let places = PLACES.iter().map(PathBuf::from).chain([std::env::temp_dir()]);
    let except = except.to_owned();
    places
        .flat_map(move |place| {
            let except = except.clone();
            WalkDir::new(place).same_file_system(true).into_iter().filter_entry(move |entry| entry.path() != except)
        })
        // Others make and remove files meanwhile.
        .filter_map(Result::ok)
        .filter(move |entry| entry.file_type().is_file() && entry.metadata().is_ok_and(|data| data.ctime() >= start))
        .map(walkdir::DirEntry::into_path)
}
