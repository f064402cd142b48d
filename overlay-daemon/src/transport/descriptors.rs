//! File descriptors: how many connections may take, so that admin HTTP, dialling and files
//! always find one.

use std::fs::File;
use std::io;
use std::sync::Arc;

use overlay_core::admission::percent;
use overlay_core::config::MAX_PEERS;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Kept from accepted connections: one for each peer that is dialled, 64 for admin HTTP, 64 for
/// the daemon's own files, listeners and lookups.
const RESERVED: u64 = MAX_PEERS as u64 + 64 + 64;

/// The descriptors of accepted connections.
#[derive(Clone, Debug)]
pub struct Descriptors {
    free: Arc<Semaphore>,
    most: usize,
}

/// One of them; given back when it is dropped, together with its connection.
#[derive(Debug)]
pub struct Descriptor(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Descriptors {
    /// What the system allows, once it was asked for all that it may.
    #[must_use]
    pub fn raise() -> Self {
        let allowed = getrlimit(Resource::Nofile);
        let wanted = Rlimit { current: allowed.maximum, maximum: allowed.maximum };
        // Where it refuses, what it allows is as it was.
        let _ = setrlimit(Resource::Nofile, wanted);
        Self::of(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
    }

    /// Of a process that may have `limit` open; at least half of them.
    #[must_use]
    pub fn of(limit: u64) -> Self {
        let most = usize::try_from(limit.saturating_sub(RESERVED).max(limit / 2)).unwrap_or(usize::MAX);
        let most = most.min(Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(most)), most }
    }

    /// One for a connection, if one is left.
    #[must_use]
    pub fn take(&self) -> Option<Descriptor> {
        Arc::clone(&self.free).try_acquire_owned().ok().map(Descriptor)
    }

    /// How full they are, 0 to 100: connections of those allowed, or all that is open of the
    /// limit, whichever is more.
    #[must_use]
    pub fn percent(&self) -> u8 {
        let taken = self.most - self.free.available_permits().min(self.most);
        percent(taken as u64, self.most as u64).max(open_percent())
    }
}

/// Open descriptors of those allowed; 0 where the system does not say.
fn open_percent() -> u8 {
    match count_open() {
        Ok(open) => getrlimit(Resource::Nofile).current.map_or(0, |limit| percent(open, limit)),
        Err(error) if is_exhaustion(&error) => 100,
        Err(_) => 0,
    }
}

/// From Linux 6.2 on the folder's size is their number. To list ten thousand of them, as before
/// that, takes 5 ms, in which a thread that sessions wait for does nothing else.
fn count_open() -> io::Result<u64> {
    const OPEN: &str = "/proc/self/fd";
    // Opened, and not only asked for its size: where there is no descriptor left this says so.
    match File::open(OPEN)?.metadata()?.len() {
        0 => Ok(std::fs::read_dir(OPEN)?.count() as u64),
        open => Ok(open),
    }
}

/// Whether the process or the system has no descriptor left.
fn is_exhaustion(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S3: whatever the limit, something is left for others than connections.
    #[test]
    fn s3_connections_never_take_every_descriptor() {
        for (limit, most) in [(1_048_576, 1_048_384), (1_024, 832), (256, 128), (64, 32), (1, 0)] {
            let descriptors = Descriptors::of(limit);
            assert_eq!(descriptors.most, most, "{limit}");
            let taken: Vec<Descriptor> = std::iter::from_fn(|| descriptors.take()).take(2_000).collect();
            assert_eq!(taken.len(), most.min(2_000), "{limit}");
            assert!(most > 2_000 || descriptors.percent() == 100, "{limit}");
        }
        let descriptors = Descriptors::of(1_000_000);
        drop(descriptors.take());
        assert_eq!(descriptors.free.available_permits(), descriptors.most, "given back");
        assert_eq!(Descriptors::of(u64::MAX).most, Semaphore::MAX_PERMITS);
    }
}
