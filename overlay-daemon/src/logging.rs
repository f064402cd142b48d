//! Where logs go: to standard error, as JSON or as text. Decides nothing but form and level.

use overlay_core::config::{LogFormat, LogLevel, Observability};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Changes the level of a running log.
pub struct Level(Box<dyn Fn(EnvFilter) + Send + Sync>);

impl Level {
    /// From now on.
    pub fn set(&self, level: LogLevel) {
        (self.0)(EnvFilter::new(filter(level)));
    }
}

/// Sends the process's logs to standard error, from now on. Libraries are heard from `warn`
/// on only: what they say below that is theirs to choose, and could quote a payload.
///
/// # Errors
/// Logging has been set up before.
pub fn start(config: &Observability) -> Result<Level, TryInitError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter(config.log_level)))
        .with_writer(std::io::stderr);
    // A handle whose log is gone has nothing left to change.
    match config.log_format {
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_current_span(false).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.finish().try_init()?;
            Ok(Level(Box::new(move |filter| drop(handle.reload(filter)))))
        }
        LogFormat::Text => {
            let builder = builder.with_ansi(false).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.finish().try_init()?;
            Ok(Level(Box::new(move |filter| drop(handle.reload(filter)))))
        }
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
