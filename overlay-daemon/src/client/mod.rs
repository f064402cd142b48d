//! The command-line client: `pub`, `sub` and `status`. Decides how their options become
//! requests to one daemon and its answers become output and an exit code. It never retries
//! for ever, never holds more than a bounded part of what passes through it, and delivers
//! nothing that it has not verified.
//!
//! [`Command`] is composed into the program's command line; [`execute`] runs it.

use std::process::ExitCode;

mod args;
mod assembly;
mod connection;
mod dial;
mod flow;
mod input;
mod locate;
mod output;
mod publish;
mod renewal;
mod status;
mod subscribe;

#[cfg(test)]
mod protocol_examples;
#[cfg(test)]
mod testing;

pub use args::{
    Command, KeyExchangePolicy, OutputFormat, PublishArgs, RemoteArgs, SocketArgs, StatusArgs, StatusFormat,
    SubscribeArgs, TargetArgs,
};
pub use connection::{Connection, ConnectionError, Refused, Stream};
pub use status::Report;

/// The exit code of a request that was refused, or of a connection that failed.
const FAILED: u8 = 1;
/// The exit code of a command line that makes no sense; clap's too.
const USAGE: u8 = 2;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum ClientError {
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// No daemon, or no token for it.
    #[error(transparent)]
    Locate(#[from] locate::LocateError),
    /// The daemon cannot be reached.
    #[error(transparent)]
    Dial(#[from] dial::DialError),
    /// The session, or a request in it, came to nothing.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// What was to be published cannot be read.
    #[error("cannot read {name}: {source}")]
    Input {
        /// The file, or standard input.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// Standard output failed.
    #[error("cannot write to standard output: {0}")]
    Output(std::io::Error),
    /// What the daemon delivered is not what it says it is.
    #[error("{0}")]
    Corrupt(#[from] assembly::Corrupt),
    /// The rest: the command has said what happened, or says it here.
    #[error("{0}")]
    Failed(String),
    /// Whoever read standard output has gone: there is nobody left to work for.
    #[error("standard output was closed")]
    NobodyReads,
}

impl ClientError {
    fn output(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe { Self::NobodyReads } else { Self::Output(error) }
    }
}

/// Runs a command to its end, on a runtime of its own. Errors go to standard error.
#[must_use]
pub fn execute(command: Command) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            crate::notice::tell(format_args!("error: cannot start: {error}"));
            return ExitCode::from(FAILED);
        }
    };
    let done = runtime.block_on(async {
        match command {
            Command::Pub(args) => publish::run(*args).await,
            Command::Sub(args) => subscribe::run(*args).await,
            Command::Status(args) => status::run(*args).await,
        }
    });
    // A read of standard input cannot be cancelled; waiting for it would hold the exit up.
    runtime.shutdown_background();
    match done {
        Ok(()) | Err(ClientError::NobodyReads) => ExitCode::SUCCESS,
        Err(error) => {
            crate::notice::tell(format_args!("error: {error}"));
            ExitCode::from(if matches!(error, ClientError::Usage(_)) { USAGE } else { FAILED })
        }
    }
}
