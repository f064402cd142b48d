//! Which set of keys is current. A new set replaces the old when all of it is valid; until
//! then the old one stays, and whoever watches is told once. With each look, tokens that nobody shows
//! any more are forgotten.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use overlay_core::config::{KeyExchange, Tls, Token};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{Contents, KeySet, KmsError, Sources, Verifier};
use crate::clock::Clock;
use crate::metrics::Metrics;

/// How often the files are read again: a key that is taken away must be gone within a second.
/// Contents are compared, not names or times: Kubernetes swaps a symlink above them, and no
/// watch on the files themselves would see it.
pub const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The keys of a daemon.
pub struct Keys {
    tls: Tls,
    token: Token,
    current: watch::Sender<Arc<KeySet>>,
    verifier: Verifier,
    seen: Mutex<Seen>,
}

/// What the files last held.
struct Seen {
    /// The contents of the current set.
    current: blake3::Hash,
    /// What was last refused: contents, or what could not be read.
    refused: Option<blake3::Hash>,
    /// The policy that the next set is made for.
    key_exchange: KeyExchange,
}

/// What one look at the files came to.
#[derive(Debug)]
pub(super) enum Reload {
    /// The current set is what they hold.
    Unchanged,
    /// They hold a new set, which is current now.
    Replaced,
    /// They hold something unusable that was not there before.
    Refused(Vec<KmsError>),
    /// They still hold what was refused before.
    StillRefused,
}

impl Keys {
    /// Reads the first set. Blocks on files.
    ///
    /// # Errors
    /// Every file that cannot be read or used.
    pub fn load(tls: &Tls, token: &Token, unix_ms: u64) -> Result<Self, Vec<KmsError>> {
        let sources = Sources::new(tls, token);
        let contents = Contents::read(&sources)?;
        let seen = Mutex::new(Seen { current: contents.digest, refused: None, key_exchange: tls.key_exchange });
        let set = KeySet::build(&sources, contents, 1, unix_ms)?;
        let (current, follows) = watch::channel(Arc::new(set));
        Ok(Self { tls: tls.clone(), token: token.clone(), current, verifier: Verifier::new(follows), seen })
    }

    /// The current set.
    #[must_use]
    pub fn current(&self) -> Arc<KeySet> {
        Arc::clone(&self.current.borrow())
    }

    /// The current set, and every one that replaces it.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<KeySet>> {
        self.current.subscribe()
    }

    /// Makes a set for another policy, for handshakes to come. False, and the old policy stays,
    /// where the files hold nothing usable now. Blocks on them.
    pub fn handle_key_exchange(&self, policy: KeyExchange, unix_ms: u64) -> bool {
        // One turn of the lock: the files are also looked at by the clock, and a look in between
        // would take up a policy that is about to be taken back.
        let mut seen = self.lock();
        let old = std::mem::replace(&mut seen.key_exchange, policy);
        let taken = matches!(self.look(&mut seen, unix_ms), Reload::Replaced | Reload::Unchanged);
        if !taken {
            seen.key_exchange = old;
        }
        taken
    }

    /// A verifier of tokens that follows the current set.
    #[must_use]
    pub fn verifier(&self) -> Verifier {
        self.verifier.clone()
    }

    /// Looks at the files every [`POLL_INTERVAL`], and whenever `asked` to, until cancelled; and
    /// forgets tokens that nobody shows.
    pub async fn watch(
        self: Arc<Self>,
        metrics: Arc<Metrics>,
        clock: Clock,
        mut asked: watch::Receiver<u64>,
        cancel: CancellationToken,
    ) {
        let mut told = self.current().generation();
        metrics.certificate_expiry(self.current().not_after_ms());
        let mut tick = tokio::time::interval(POLL_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick is due at once, and the files have just been read.
        tick.tick().await;
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = tick.tick() => {}
                // Who asks wants to hear what is wrong, though it was said before.
                Ok(()) = asked.changed() => self.forget_refusal(),
            }
            self.verifier.forget_unused(clock.now());
            let keys = Arc::clone(&self);
            let Ok(outcome) = tokio::task::spawn_blocking(move || keys.reload(clock.unix_ms())).await else { continue };
            if let Reload::Refused(errors) = outcome {
                metrics.key_reload(false);
                let errors = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                tracing::warn!(errors, "keys not reloaded, the old ones stay");
            }
            // By their number: a change of policy may have found new files before this look did.
            let current = self.current();
            if current.generation() != told {
                told = current.generation();
                metrics.key_reload(true);
                metrics.certificate_expiry(current.not_after_ms());
                tracing::info!(generation = told, "keys reloaded");
            }
        }
    }

    fn forget_refusal(&self) {
        self.lock().refused = None;
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the files once. Blocks on them.
    pub(super) fn reload(&self, unix_ms: u64) -> Reload {
        self.look(&mut self.lock(), unix_ms)
    }

    fn look(&self, seen: &mut Seen, unix_ms: u64) -> Reload {
        let tls = Tls { key_exchange: seen.key_exchange, ..self.tls.clone() };
        let sources = Sources::new(&tls, &self.token);
        let (digest, built) = match Contents::read(&sources) {
            Ok(contents) if contents.digest == seen.current => {
                seen.refused = None;
                return Reload::Unchanged;
            }
            Ok(contents) => {
                let generation = self.current().generation().saturating_add(1);
                (contents.digest, KeySet::build(&sources, contents, generation, unix_ms))
            }
            Err(errors) => {
                let said: String = errors.iter().map(ToString::to_string).collect();
                (blake3::hash(said.as_bytes()), Err(errors))
            }
        };
        match built {
            Ok(set) => {
                (seen.current, seen.refused) = (digest, None);
                self.current.send_replace(Arc::new(set));
                Reload::Replaced
            }
            Err(_) if seen.refused == Some(digest) => Reload::StillRefused,
            Err(errors) => {
                seen.refused = Some(digest);
                Reload::Refused(errors)
            }
        }
    }
}
