//! How often accepting may fail. An accept loop that tries again at once spins: when descriptors
//! have run out the caller stays in the queue, and the next accept fails as the last did (S3).

use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::clock::Clock;

/// How long an accept loop waits once the system has no descriptor or memory for another
/// connection.
pub const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// And after an error that is the caller's: 100 of them a second at the most.
const CALLERS_PAUSE: Duration = Duration::from_millis(10);

/// The pace of one accept loop.
#[derive(Debug, Default)]
pub(super) struct Pace {
    not_before: Option<Instant>,
}

impl Pace {
    /// Returns once accepting may be tried. Cancellation does no harm.
    pub(super) async fn ready(&mut self) {
        if let Some(not_before) = self.not_before {
            sleep_until(not_before).await;
            self.not_before = None;
        }
    }

    /// Accepting failed.
    pub(super) fn failed(&mut self, error: &io::Error, clock: Clock) {
        self.not_before = Some(clock.deadline(if is_callers(error) { CALLERS_PAUSE } else { EXHAUSTED_PAUSE }));
    }
}

/// Whether accepting failed for the caller's sake (it had gone already) and not for ours.
#[must_use]
pub fn is_callers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    /// S3: EMFILE, ENFILE and ECONNABORTED, whichever comes and however often: at most 100 errors
    /// a second. Time is paused: nothing here waits.
    #[tokio::test(start_paused = true)]
    async fn s3_no_error_makes_an_accept_loop_spin() {
        let clock = Clock::start();
        for (errno, most) in [(Errno::MFILE, 10), (Errno::NFILE, 10), (Errno::NOMEM, 10), (Errno::CONNABORTED, 100)] {
            let mut pace = Pace::default();
            let until = clock.deadline(Duration::from_secs(1));
            let mut errors = 0;
            while clock.stamp() < until {
                pace.ready().await;
                pace.failed(&errno.into(), clock);
                errors += 1;
            }
            assert!(errors <= most + 1, "{errno}: {errors} errors in a second");
        }
    }
}
