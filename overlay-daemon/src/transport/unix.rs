//! The socket of local clients. Decides who may connect, by what the kernel says of them;
//! what they may do is for their token.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};

use overlay_core::status::Reason;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

use super::pace::{Pace, is_callers};
use super::{Descriptor, Descriptors, Timing};
use crate::clock::Clock;

/// Owner and group may connect, nobody else.
const MODE: u32 = 0o660;

/// Why there is no socket, or no connection.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// Another daemon answers there.
    #[error("unix.socket: {}: another daemon is listening there", .0.display())]
    InUse(PathBuf),
    /// Something stands there that is not a socket, and is left alone.
    #[error("unix.socket: {}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("unix.socket: {}: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The caller's user is not in `unix.allow_uids`.
    #[error("user {0} may not connect: it is neither root, nor the daemon's own, nor in unix.allow_uids")]
    Forbidden(u32),
    /// No descriptor was left for it.
    #[error("as many connections are open as descriptors allow")]
    Crowded,
    /// Accepting failed.
    #[error(transparent)]
    Accept(io::Error),
}

impl LocalError {
    /// Which `reason` of `overlay_rejected_total` counts it.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Forbidden(_) => Some(Reason::Auth),
            Self::Crowded => Some(Reason::Overflow),
            Self::InUse(_) | Self::NotASocket(_) | Self::Bind { .. } | Self::Accept(_) => None,
        }
    }

    /// Whether the daemon cannot accept anybody for now, for want of what the system gives.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Accept(error) if !is_callers(error))
    }
}

/// A local client.
#[derive(Debug)]
pub struct LocalConnection {
    /// The bytes.
    pub stream: UnixStream,
    /// Its user, as the kernel says.
    pub uid: u32,
    /// Until when HELLO must be answered.
    pub deadline: Instant,
    /// What it costs.
    pub descriptor: Descriptor,
}

/// The socket; its file goes when this does.
pub struct LocalListener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode: what stands at the path later may be another's.
    file: (u64, u64),
    own_uid: u32,
    allow_uids: Vec<u32>,
    timing: Timing,
    clock: Clock,
    descriptors: Descriptors,
    pace: Pace,
}

impl LocalListener {
    /// Binds `path`, whose folder must exist. A socket that nobody answers on is replaced.
    ///
    /// # Errors
    /// Somebody answers, something else stands there, or the system refuses.
    pub fn bind(
        path: &Path,
        allow_uids: &[u32],
        timing: impl Into<Timing>,
        descriptors: Descriptors,
        clock: Clock,
    ) -> Result<Self, LocalError> {
        let refused = |source| LocalError::Bind { path: path.to_owned(), source };
        clear(path)?;
        let socket = UnixListener::bind(path).map_err(refused)?;
        fs::set_permissions(path, fs::Permissions::from_mode(MODE)).map_err(refused)?;
        let file = fs::symlink_metadata(path).map_err(refused)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            file: (file.dev(), file.ino()),
            own_uid: rustix::process::geteuid().as_raw(),
            allow_uids: allow_uids.to_vec(),
            timing: timing.into(),
            clock,
            descriptors,
            pace: Pace::default(),
        })
    }

    /// The next client. Cancellation loses none; after an error call it again, as with
    /// [`super::Listener::accept`].
    ///
    /// # Errors
    /// The client's user may not connect, or accepting failed.
    pub async fn accept(&mut self) -> Result<LocalConnection, LocalError> {
        self.pace.ready().await;
        let accepted = self.socket.accept().await.inspect_err(|error| self.pace.failed(error, self.clock));
        let (stream, _) = accepted.map_err(LocalError::Accept)?;
        let uid = stream.peer_cred().map_err(LocalError::Accept)?.uid();
        if !self.allows(uid) {
            return Err(LocalError::Forbidden(uid));
        }
        let descriptor = self.descriptors.take().ok_or(LocalError::Crowded)?;
        Ok(LocalConnection { stream, uid, descriptor, deadline: self.clock.deadline(self.timing.now().handshake) })
    }

    fn allows(&self, uid: u32) -> bool {
        uid == 0 || uid == self.own_uid || self.allow_uids.contains(&uid)
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        let own = fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if own && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket's file stays");
        }
    }
}

/// Unlinks a socket that nobody answers on.
fn clear(path: &Path) -> Result<(), LocalError> {
    let refused = |source| LocalError::Bind { path: path.to_owned(), source };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(error)),
    };
    if !found.file_type().is_socket() {
        return Err(LocalError::NotASocket(path.to_owned()));
    }
    match BlockingStream::connect(path) {
        Ok(_) => Err(LocalError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(refused),
        Err(error) => Err(refused(error)),
    }
}
