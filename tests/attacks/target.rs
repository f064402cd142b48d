//! What a row attacks, one at a time: they would disturb each other's measurements.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use overlay_core::config::{DaemonConfig, Profile, Transport};
use overlay_core::control::Open;
use overlay_core::identity::Topic;
use overlay_tests::daemon::{Daemon, raise_descriptors};
use overlay_tests::oap::Wire;
use overlay_tests::wait;

use crate::probe::Seen;

/// Whoever is not the probe.
pub(crate) const CLIENT: &str = "spiffe://overlay.test/ns/test/client/other";

const LIMIT: Duration = Duration::from_secs(60);

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

    /// The same under another program, with its options: prlimit(1).
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
        warm_up(&daemon)?;
        Ok(Self { daemon, _alone: alone })
    }

    /// **P** and **M**, once an attack is over and the probe has ended: the daemon lives, and its
    /// memory is what it was before.
    pub(crate) fn survived(&mut self, seen: &Seen) -> Result<()> {
        self.assert_alive()?;
        self.until_memory_is_back(seen.resident_kib)
    }
}

/// A few sessions, over all that it listens on: what the first ones bring stays, whoever they
/// were. Pages of the program, of its threads' stacks and of its allocator's own.
fn warm_up(daemon: &Daemon) -> Result<()> {
    let (offer, topic) = (daemon.offer(CLIENT)?, "warm-up".parse::<Topic>()?);
    for _ in 0..20 {
        offer.greet(daemon.address)?;
        if let Ok(address) = daemon.listens(Transport::Quic) {
            offer.greet_over(Transport::Quic, address)?;
        }
        let mut wire = Wire::local(&daemon.socket())?;
        let code = wire.start(3, &Open::Subscribe { topics: vec![topic.clone()] }, daemon.local_token()?)?;
        ensure!(code == 200, "a subscription got {code}");
    }
    let ended = || Ok(daemon.metric("overlay_sessions_active")? == 0.0 && daemon.connections()? == 0);
    wait::until_true("the first sessions to end", LIMIT, ended)
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
