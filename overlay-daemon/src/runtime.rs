//! The threads that everything runs on: those of sessions; those of handshakes, which yield to
//! them; and those of QUIC. A handshake costs what hundreds of messages do, and anybody may ask for
//! one: on common threads, a thousand that came at once stood before the hub in their queues.
//!
//! QUIC's handshakes are not apart from its packets, for one lock is held for both: on threads that
//! yield, a caller would have its endpoint wait for a processor, and every session over it with it.

use std::io;
use std::num::NonZero;
use std::thread::available_parallelism;

use rustix::process::nice;
use tokio::runtime::{Builder, Runtime};

/// How much less than sessions handshakes may claim (nice(2)): where both want a processor, a
/// tenth of it is theirs.
const YIELDING: i32 = 10;

/// For the hub, sessions and all that is decided: a thread a processor.
///
/// # Errors
/// The system gives no threads.
pub fn sessions() -> io::Result<Runtime> {
    Builder::new_multi_thread().enable_all().build()
}

/// For accept loops and TLS handshakes: threads for half of the processors.
///
/// # Errors
/// The system gives no threads.
pub fn handshakes() -> io::Result<Runtime> {
    let yielding = || {
        // Where the system refuses, handshakes are only as urgent as the rest.
        let _refused = nice(YIELDING);
    };
    half().on_thread_start(yielding).build()
}

/// For QUIC until its streams' bytes: handshakes and packets. Threads for half of the processors.
///
/// # Errors
/// The system gives no threads.
pub fn quic() -> io::Result<Runtime> {
    half().build()
}

fn half() -> Builder {
    let threads = available_parallelism().map_or(1, NonZero::get).div_ceil(2);
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(threads).enable_all();
    builder
}
