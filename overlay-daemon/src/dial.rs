//! One task a configured peer: dials while there is no session with it, and backs off with
//! jitter while that fails. Where peers are comes from configuration alone (I-1).

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use overlay_core::config::Peer;
use overlay_core::identity::SpiffeId;
use overlay_core::status::Reason;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::kms::Keys;
use crate::session::Context;
use crate::transport::{Connection, DialError, dial};

/// The first pause; it doubles up to [`LONGEST`], and is up to twice as long by jitter, so
/// that a mesh that starts at once does not dial in step.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest pause before jitter.
const LONGEST: Duration = Duration::from_secs(10);
/// A session that lived so long was a good one: the next pause is short again.
const GOOD: Duration = Duration::from_secs(10);

/// Why there is no session with a peer.
#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("{found} answered there, not {wanted}")]
    Identity { wanted: SpiffeId, found: SpiffeId },
}

/// A peer to hold a session with.
pub struct Dialler {
    /// Its place.
    pub place: usize,
    /// Who and where it is.
    pub peer: Peer,
    /// Whether it has a session, whoever dialled.
    pub up: watch::Receiver<bool>,
    /// Tells it not to dial any more. A session that it holds goes on.
    pub retired: CancellationToken,
    /// With what to dial.
    pub keys: Arc<Keys>,
    /// What a session needs.
    pub context: Context,
}

impl Dialler {
    /// Dials until it is retired. Dropping the task ends the session too.
    pub async fn run(mut self) {
        let mut pauses = pauses();
        let mut warned = false;
        let retired = self.retired.clone();
        loop {
            let connecting = async {
                self.up.wait_for(|up| !up).await.ok()?;
                Some(self.connect().await)
            };
            let Some(Some(connected)) = retired.run_until_cancelled(connecting).await else { return };
            match connected {
                Ok(connection) => {
                    warned = false;
                    let began = self.context.clock.stamp();
                    self.context.hold(connection, Some(self.place)).await;
                    if began.elapsed() >= GOOD {
                        pauses = self::pauses();
                    }
                }
                // Once for each time it goes away: a peer may be down for days.
                Err(error) if !warned => {
                    warned = true;
                    tracing::warn!(peer = %self.peer.name, %error, "no session with this peer yet; dialling goes on");
                }
                Err(error) => tracing::debug!(peer = %self.peer.name, %error, "dialling failed"),
            }
            if retired.run_until_cancelled(sleep(pauses.next().unwrap_or(LONGEST))).await.is_none() {
                return;
            }
        }
    }

    async fn connect(&self) -> Result<Connection, PeerError> {
        let tls = Arc::clone(self.keys.current().client());
        let connection = dial(&self.peer.address, &tls, &self.context.timing.now(), self.context.clock).await?;
        self.context.metrics.key_exchange(connection.group);
        if !self.peer.identity.covers(&connection.peer) {
            self.context.metrics.rejected(Reason::Auth).inc();
            return Err(PeerError::Identity { wanted: self.peer.identity.clone(), found: connection.peer });
        }
        Ok(connection)
    }
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(SHORTEST)
        .with_max_delay(LONGEST)
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
        .build()
}
