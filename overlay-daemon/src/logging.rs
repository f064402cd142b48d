//! Where logs go: to standard error, as JSON or as text. Decides form and level, and how often
//! one and the same line may be said: whoever can make a daemon log must not be able to make it
//! do nothing else.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

use overlay_core::config::{LogFormat, LogLevel, Observability};
use prometheus::IntCounter;
use tracing::callsite::Identifier;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, fmt, registry, reload};

use crate::clock::Clock;

/// Lines a second that one place in the program may write. What a peer can cause comes from few
/// places; what an operator needs to see comes once.
const LINES_PER_SECOND: u32 = 10;

/// Changes the level of a running log.
pub struct Level(Box<dyn Fn(EnvFilter) + Send + Sync>);

impl Level {
    /// From now on.
    pub fn set(&self, level: LogLevel) {
        (self.0)(EnvFilter::new(filter(level)));
    }
}

/// Sends the process's logs to standard error, from now on, and counts the lines left out.
/// Libraries are heard from `warn` on only: what they say below that is theirs to choose, and
/// could quote a payload.
///
/// # Errors
/// Logging has been set up before.
pub fn start(config: &Observability, clock: Clock, suppressed: IntCounter) -> Result<Level, TryInitError> {
    let (level, handle) = reload::Layer::new(EnvFilter::new(filter(config.log_level)));
    let limit = Limit { clock, places: Mutex::default(), suppressed };
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match config.log_format {
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(true).with_span_list(false).with_filter(limit).boxed()
        }
        LogFormat::Text => lines.with_ansi(false).with_filter(limit).boxed(),
    };
    registry().with(level).with(lines).try_init()?;
    // A handle whose log is gone has nothing left to change.
    Ok(Level(Box::new(move |filter| drop(handle.reload(filter)))))
}

/// Lets each place say [`LINES_PER_SECOND`] lines, and counts what it leaves out.
struct Limit {
    clock: Clock,
    places: Mutex<Places<Identifier>>,
    suppressed: IntCounter,
}

/// What each place has said: as many as the program has events, which are part of its text.
struct Places<P>(HashMap<P, Said>);

#[derive(Default)]
struct Said {
    second: u64,
    lines: u32,
}

impl<P> Default for Places<P> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<P: Eq + Hash> Places<P> {
    /// Whether `place` may say one more line in this second.
    fn admit(&mut self, place: P, second: u64) -> bool {
        let said = self.0.entry(place).or_default();
        if said.second != second {
            *said = Said { second, lines: 0 };
        }
        said.lines = said.lines.saturating_add(1);
        said.lines <= LINES_PER_SECOND
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Filter<S> for Limit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let second = self.clock.now().0 / 1_000;
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = places.admit(event.metadata().callsite(), second);
        if !admitted {
            self.suppressed.inc();
        }
        admitted
    }
}

fn filter(level: LogLevel) -> String {
    let (own, others) = match level {
        LogLevel::Error => ("error", "error"),
        LogLevel::Warn => ("warn", "warn"),
        LogLevel::Info => ("info", "warn"),
        LogLevel::Debug => ("debug", "warn"),
        LogLevel::Trace => ("trace", "warn"),
    };
    format!("{others},overlay_daemon={own},overlay_core={own}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// M1: a place that says too much is cut off for the rest of the second, and no other is.
    #[test]
    fn m1_one_place_cannot_flood_the_log() {
        let mut places = Places::default();
        let mut admitted = |place, second| (0..100).filter(|_| places.admit(place, second)).count();
        assert_eq!([admitted('a', 5), admitted('b', 5), admitted('a', 5), admitted('a', 6)], [10, 10, 0, 10]);
    }
}
