//! The threads that everything runs on: those of sessions; those of handshakes, which yield to
//! them; and those of QUIC. A handshake costs what hundreds of messages do, and anybody may ask for
//! one: on common threads, a thousand that came at once stood before the hub in their queues.
//!
//! QUIC's handshakes are not apart from its packets, for one lock is held for both: on threads that
//! yield, a caller would have its endpoint wait for a processor, and every session over it with it.
//! Whom this daemon dials, over TLS or QUIC, runs with the sessions: it was chosen.

use std::io;
use std::num::NonZero;
use std::panic::resume_unwind;
use std::thread::{self, available_parallelism};

use rustix::process::nice;
use tokio::runtime::{Builder, Handle, Runtime};

/// How much less than sessions handshakes may claim (nice(2)): where both want a processor, a
/// tenth of it is theirs.
const YIELDING: i32 = 10;

/// The threads of a daemon.
#[derive(Debug)]
pub struct Runtimes {
    /// For the hub, sessions and all that is decided: a thread a processor.
    sessions: Runtime,
    /// For half of the processors.
    handshakes: Runtime,
    /// For half of the processors.
    quic: Runtime,
}

/// Where what callers ask for runs, before a session's bytes.
#[derive(Debug)]
pub struct ForCallers {
    /// Accepting over TCP, and TLS handshakes.
    pub handshakes: Handle,
    /// Accepting over QUIC: handshakes and packets.
    pub quic: Handle,
}

impl Runtimes {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system gives none.
    pub fn start() -> io::Result<Self> {
        let half = available_parallelism().map_or(1, NonZero::get).div_ceil(2);
        let yielding = || {
            // Where the system refuses, handshakes are only as urgent as the rest.
            let _refused = nice(YIELDING);
        };
        let builder = Builder::new_multi_thread;
        Ok(Self {
            sessions: builder().enable_all().build()?,
            handshakes: builder().worker_threads(half).on_thread_start(yielding).enable_all().build()?,
            quic: builder().worker_threads(half).enable_all().build()?,
        })
    }

    /// Waits for what `run` gives, which runs with the sessions.
    ///
    /// The calling thread waits in pthread_join(3), for the sake of `tests/run tsan`: in a futex(2),
    /// where a runtime waits, the ThreadSanitizer puts off the signals that come to it.
    ///
    /// # Errors
    /// The system gives no thread.
    ///
    /// # Panics
    /// As what `run` gives.
    pub fn wait_for<T, F>(&self, run: impl FnOnce(ForCallers) -> F + Send) -> io::Result<T>
    where
        T: Send,
        F: Future<Output = T>,
    {
        let callers = ForCallers { handshakes: self.handshakes.handle().clone(), quic: self.quic.handle().clone() };
        thread::scope(|scope| {
            let running = thread::Builder::new().spawn_scoped(scope, || self.sessions.block_on(run(callers)))?;
            running.join().map_or_else(|panic| resume_unwind(panic), Ok)
        })
    }

    /// Ends the threads, whatever they wait for: a name that is still being looked up, say.
    pub fn shutdown(self) {
        let Self { sessions, handshakes, quic } = self;
        [sessions, handshakes, quic].into_iter().for_each(Runtime::shutdown_background);
    }
}
