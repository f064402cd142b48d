//! The memory-backed folder of local daemons: which one it is, who may have it, and that
//! nothing is left in it.
//!
//! ```text
//! ROOT/lock                       held while the folder's entries change
//! ROOT/NAMESPACE.NAME.lock        held by the run that has this OverlayNode; its process id
//! ROOT/NAMESPACE.NAME.token-root  the key that signs its tokens, for `token create`
//! ROOT/NAMESPACE.POD/             one daemon's files, socket and process
//! ```
//! A lock dies with the process that holds it, so one that is free belongs to a run that was
//! killed: its daemons are ended and its folders removed by whoever runs next.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, statfs};
use rustix::io::Errno;

use super::process::Identity;

/// `f_type` of tmpfs and ramfs, statfs(2): what lives in memory.
const MEMORY_BACKED: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// The lock around changes of the folder.
const ROOT_LOCK: &str = "lock";
/// How the file of an OverlayNode's token root ends.
const TOKEN_ROOT: &str = ".token-root";
/// The file in a daemon's folder that says which process it is.
const PROCESS: &str = "process";
/// Where Linux has shared memory.
const SHARED_MEMORY: &str = "/dev/shm";

/// Why there is no folder to run in.
#[derive(Debug, thiserror::Error)]
pub(super) enum RuntimeDirError {
    /// Keys stay in memory (I-8), so there has to be some.
    #[error(
        "no memory-backed folder for keys and sockets: XDG_RUNTIME_DIR is {xdg}, and /dev/shm is not a tmpfs; set XDG_RUNTIME_DIR to a folder on a tmpfs"
    )]
    NotInMemory { xdg: String },
    /// Someone else's, or open to others.
    #[error("{path} is not private: {what}; remove it, or set XDG_RUNTIME_DIR to a folder of your own on a tmpfs")]
    NotPrivate { path: PathBuf, what: String },
    /// Another run has it.
    #[error(
        "OverlayNode {node} is running already, in process {pid} (it holds {lock}); stop that one first, or give this one another name"
    )]
    Held { node: String, pid: String, lock: PathBuf },
    /// The file system refused.
    #[error("{path}: {what}: {error}")]
    Io { path: PathBuf, what: &'static str, error: io::Error },
}

fn wrong(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> RuntimeDirError {
    let path = path.to_owned();
    move |error| RuntimeDirError::Io { path, what, error }
}

/// Where local daemons of user `uid` live: `$XDG_RUNTIME_DIR/overlay` if that is in memory,
/// else `/dev/shm/overlay-UID`. `overlay-daemon` looks for sockets in the same place.
///
/// # Errors
/// Neither is in memory.
pub(super) fn root(xdg: Option<&OsStr>, uid: u32) -> Result<PathBuf, RuntimeDirError> {
    root_in(xdg, uid, is_memory_backed)
}

fn root_in(xdg: Option<&OsStr>, uid: u32, in_memory: impl Fn(&Path) -> bool) -> Result<PathBuf, RuntimeDirError> {
    let xdg = xdg.filter(|x| !x.is_empty()).map(Path::new);
    if let Some(folder) = xdg.filter(|folder| folder.is_absolute() && in_memory(folder)) {
        return Ok(folder.join("overlay"));
    }
    if in_memory(Path::new(SHARED_MEMORY)) {
        return Ok(Path::new(SHARED_MEMORY).join(format!("overlay-{uid}")));
    }
    Err(RuntimeDirError::NotInMemory {
        xdg: xdg.map_or_else(|| "not set".to_owned(), |x| format!("{}, which is not on a tmpfs", x.display())),
    })
}

fn is_memory_backed(path: &Path) -> bool {
    // `f_type` is a word of either sign, by architecture; its lower 32 bits are the number.
    statfs(path).is_ok_and(|s| MEMORY_BACKED.contains(&((s.f_type as u64) & 0xffff_ffff)))
}

/// What one run holds of the folder; removed when dropped.
#[derive(Debug)]
pub(super) struct RuntimeDir {
    root: PathBuf,
    locks: Vec<(PathBuf, File)>,
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
    ended: Vec<PathBuf>,
}

impl RuntimeDir {
    /// Takes the OverlayNodes (namespace, name) and clears what killed runs left behind.
    ///
    /// # Errors
    /// The folder is not ours alone, or another run has one of them.
    pub(super) fn take(root: &Path, nodes: &[(String, String)], uid: u32) -> Result<Self, RuntimeDirError> {
        // Dropped after the lock, which giving up what was taken needs too.
        let mut dir = Self {
            root: root.to_owned(),
            locks: Vec::new(),
            folders: Vec::new(),
            files: Vec::new(),
            ended: Vec::new(),
        };
        let _changing = lock_root(root, uid)?;
        dir.ended = clear_abandoned(root)?;
        for (namespace, name) in nodes {
            let path = root.join(format!("{namespace}.{name}.lock"));
            match try_lock(&path).map_err(wrong(&path, "cannot be locked"))? {
                Some(mut file) => {
                    write!(file, "{}", std::process::id()).map_err(wrong(&path, "cannot be written"))?;
                    dir.locks.push((path, file));
                }
                None => {
                    let pid = fs::read_to_string(&path).unwrap_or_default();
                    return Err(RuntimeDirError::Held { node: format!("{namespace}/{name}"), pid, lock: path });
                }
            }
        }
        Ok(dir)
    }

    /// The folders of daemons that killed runs had left running, and that were ended.
    pub(super) fn ended(&self) -> &[PathBuf] {
        &self.ended
    }

    /// Where a daemon's files are.
    pub(super) fn folder(root: &Path, namespace: &str, pod: &str) -> PathBuf {
        root.join(format!("{namespace}.{pod}"))
    }

    /// Makes a daemon's folder, for this user alone.
    ///
    /// # Errors
    /// The file system refused.
    pub(super) fn make(&mut self, folder: &Path) -> Result<(), RuntimeDirError> {
        DirBuilder::new().mode(0o700).create(folder).map_err(wrong(folder, "cannot be made"))?;
        self.folders.push(folder.to_owned());
        Ok(())
    }

    /// Keeps an OverlayNode's token root, for this user alone.
    ///
    /// # Errors
    /// The file system refused.
    pub(super) fn keep_token_root(&mut self, namespace: &str, name: &str, key: &str) -> Result<(), RuntimeDirError> {
        let path = token_root(&self.root, namespace, name);
        write_private(&path, key)?;
        self.files.push(path);
        Ok(())
    }

    /// Removes what this run made, and the root with the last run in it.
    ///
    /// # Errors
    /// The file system refused; what came after is left too.
    pub(super) fn remove(&mut self) -> Result<(), RuntimeDirError> {
        if self.locks.is_empty() && self.folders.is_empty() {
            return Ok(());
        }
        let _changing = lock_existing(&self.root)?;
        // The last first: one may lie in another.
        while let Some(folder) = self.folders.pop() {
            fs::remove_dir_all(&folder).map_err(wrong(&folder, "cannot be removed"))?;
        }
        while let Some(file) = self.files.pop() {
            fs::remove_file(&file).map_err(wrong(&file, "cannot be removed"))?;
        }
        for (path, held) in self.locks.drain(..) {
            fs::remove_file(&path).map_err(wrong(&path, "cannot be removed"))?;
            drop(held);
        }
        let others = fs::read_dir(&self.root)
            .map_err(wrong(&self.root, "cannot be read"))?
            .flatten()
            .any(|e| e.file_name() != ROOT_LOCK);
        if !others {
            let lock = self.root.join(ROOT_LOCK);
            fs::remove_file(&lock).map_err(wrong(&lock, "cannot be removed"))?;
            fs::remove_dir(&self.root).map_err(wrong(&self.root, "cannot be removed"))?;
        }
        Ok(())
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("error: the runtime folder is not removed: {error}");
        }
    }
}

/// Where an OverlayNode's token root is while a run has it.
pub(super) fn token_root(root: &Path, namespace: &str, name: &str) -> PathBuf {
    root.join(format!("{namespace}.{name}{TOKEN_ROOT}"))
}

/// Writes down which process a daemon is, for [`RuntimeDir::take`] of a later run.
pub(super) fn record_process(folder: &Path, pid: u32) -> io::Result<()> {
    Identity::of(pid)?.save(&folder.join(PROCESS))
}

/// Makes the root if needed, checks that it is ours alone, and locks it for a change.
fn lock_root(root: &Path, uid: u32) -> Result<File, RuntimeDirError> {
    loop {
        match DirBuilder::new().mode(0o700).create(root) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(wrong(root, "cannot be made")(error));
            }
            _ => {}
        }
        let private = |what: String| RuntimeDirError::NotPrivate { path: root.to_owned(), what };
        match fs::symlink_metadata(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(wrong(root, "cannot be read")(error)),
            Ok(m) if !m.is_dir() => return Err(private("it is not a folder".to_owned())),
            Ok(m) if m.uid() != uid => return Err(private(format!("it belongs to user {}", m.uid()))),
            Ok(m) if m.mode() & 0o077 != 0 => {
                return Err(private(format!("its mode is {:04o}, not 0700", m.mode() & 0o7777)));
            }
            Ok(_) => {}
        }
        match lock_existing(root) {
            Err(RuntimeDirError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
    }
}

/// Waits for the root's lock. `NotFound` if whoever held it removed the root.
fn lock_existing(root: &Path) -> Result<File, RuntimeDirError> {
    let path = root.join(ROOT_LOCK);
    let file = open_lock(&path).map_err(wrong(&path, "cannot be opened"))?;
    loop {
        match flock(&file, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            other => break other.map_err(|e| wrong(&path, "cannot be locked")(e.into()))?,
        }
    }
    let held = file.metadata().map_err(wrong(&path, "cannot be read"))?.ino();
    let there = fs::metadata(&path).map_err(wrong(&path, "cannot be read"))?.ino();
    if held == there { Ok(file) } else { Err(wrong(&path, "was replaced")(io::ErrorKind::NotFound.into())) }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// `None` if another process holds it.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = open_lock(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Ends the daemons of runs that were killed, and removes their folders. Those that were
/// still running.
fn clear_abandoned(root: &Path) -> Result<Vec<PathBuf>, RuntimeDirError> {
    let mut ended = Vec::new();
    let unreadable = |error| wrong(root, "cannot be read")(error);
    let entries: Vec<_> = fs::read_dir(root).map_err(unreadable)?.collect::<Result<_, _>>().map_err(unreadable)?;
    let names: Vec<String> = entries.iter().filter_map(|e| e.file_name().into_string().ok()).collect();
    for node in names.iter().filter_map(|name| name.strip_suffix(".lock")) {
        let lock = root.join(format!("{node}.lock"));
        let Some(_held) = try_lock(&lock).map_err(wrong(&lock, "cannot be locked"))? else { continue };
        for folder in names.iter().filter(|name| is_daemon_of(name, node)) {
            let folder = root.join(folder);
            let left = Identity::load(&folder.join(PROCESS)).and_then(|process| process.end());
            fs::remove_dir_all(&folder).map_err(wrong(&folder, "cannot be removed"))?;
            if matches!(left, Ok(true)) {
                ended.push(folder);
            }
        }
        let key = root.join(format!("{node}{TOKEN_ROOT}"));
        if names.iter().any(|name| key.file_name() == Some(OsStr::new(name))) {
            fs::remove_file(&key).map_err(wrong(&key, "cannot be removed"))?;
        }
        fs::remove_file(&lock).map_err(wrong(&lock, "cannot be removed"))?;
    }
    Ok(ended)
}

/// Whether a folder is `NODE-ORDINAL`.
fn is_daemon_of(folder: &str, node: &str) -> bool {
    let ordinal = folder.strip_prefix(node).and_then(|rest| rest.strip_prefix('-'));
    ordinal.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// Writes a file that only this user may read. It must not exist yet.
///
/// # Errors
/// The file system refused.
pub(super) fn write_private(path: &Path, text: &str) -> Result<(), RuntimeDirError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(wrong(path, "cannot be made"))?;
    file.write_all(text.as_bytes()).map_err(wrong(path, "cannot be written"))
}

/// Replaces a file that only this user may read, whole: who reads it finds the old text or the
/// new one.
///
/// # Errors
/// The file system refused.
pub(super) fn replace_private(path: &Path, text: &str) -> Result<(), RuntimeDirError> {
    let mut next = path.as_os_str().to_owned();
    next.push(".next");
    let next = PathBuf::from(next);
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(wrong(&next, "cannot be removed")(error)),
        _ => {}
    }
    write_private(&next, text)?;
    fs::rename(&next, path).map_err(wrong(path, "cannot be replaced"))
}

#[cfg(test)]
mod tests;
