//! What a row attacks, one at a time: they would disturb each other's measurements.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use overlay_core::config::{DaemonConfig, Profile};
use overlay_tests::daemon::{Daemon, raise_descriptors};

/// Whoever is not the probe.
pub(crate) const CLIENT: &str = "spiffe://overlay.test/ns/test/client/other";

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A daemon, and the right to attack.
pub(crate) struct Target {
    daemon: Daemon,
    _alone: MutexGuard<'static, ()>,
}

impl Target {
    /// A daemon whose caps do not stand in an attack's way; `change` says which the row is about.
    pub(crate) fn start(profile: Profile, change: impl FnOnce(&mut DaemonConfig)) -> Result<Self> {
        Self::start_under(profile, &[], change)
    }

    /// The same under another program, with its options: prlimit(1), or env(1).
    pub(crate) fn start_under(
        profile: Profile,
        under: &[&str],
        change: impl FnOnce(&mut DaemonConfig),
    ) -> Result<Self> {
        // A test that failed has let go of what it held.
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        raise_descriptors()?;
        let daemon = Daemon::start_under(profile, under, |config| {
            // What the probe published would be memory that grows for two minutes.
            config.gossip.dedupe_window_ms = 2_000;
            change(config);
        })?;
        Ok(Self { daemon, _alone: alone })
    }
}

impl Deref for Target {
    type Target = Daemon;
    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for Target {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// How much of an attack: `full` in a soak, else what fits beside the other tests.
pub(crate) fn scale(short: usize, full: usize) -> usize {
    if std::env::var_os("OVERLAY_SOAK").is_some() { full } else { short }
}

/// How much more memory a later round may leave than one half way, as a multiple: ten thousand
/// connections show within 5% what is kept for each. In the short form the allocator's own coming
/// and going is that much.
pub(crate) fn later() -> f64 {
    if std::env::var_os("OVERLAY_SOAK").is_some() { 1.05 } else { 1.10 }
}

/// Whether the daemon has closed a connection, whatever it said before.
pub(crate) fn is_closed(stream: &mut TcpStream) -> Result<bool> {
    stream.set_nonblocking(true)?;
    let mut bytes = [0; 1024];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(_) => return Ok(true),
        }
    }
}
