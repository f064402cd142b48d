//! Where the program's memory comes from, and that it goes back there: jemalloc(3), also for what C
//! allocates. glibc's keeps what a burst took, an arena for each thread: after 10,000 connections
//! five times what the daemon had before them (**M** of the attack catalogue). How soon it goes
//! back is compiled in: `.cargo/config.toml`. Nothing goes back where memory is locked (mlockall(2)
//! in `confine`: amnesia, on a machine with swap): the kernel does not take single locked pages.
//!
//! Not under the ThreadSanitizer: it sees no lock of jemalloc's, and would take memory that is
//! used again for a race.

// Fails a build that has not read .cargo/config.toml. What the settings are it does not check.
const _: &str =
    env!("JEMALLOC_SYS_WITH_MALLOC_CONF", "build from within the repository: .cargo/config.toml has the settings");

#[cfg(not(tsan))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Starts the allocator's own thread, which gives back what is free also where nobody allocates.
/// To be called once the process is confined: a thread that runs before that is not.
///
/// # Errors
/// The system gives no thread.
pub(crate) fn start_giving_back() -> tikv_jemalloc_ctl::Result<()> {
    #[cfg(not(tsan))]
    tikv_jemalloc_ctl::background_thread::write(true)?;
    Ok(())
}
