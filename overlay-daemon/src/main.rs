//! The program's command line: which part runs, and its exit code.

mod allocator;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use overlay_daemon::check;
use overlay_daemon::client;
use overlay_daemon::clock::Clock;
use overlay_daemon::inspect::{InspectArgs, inspect};
use overlay_daemon::run::{RunArgs, Start, run};
use overlay_daemon::runtime::Runtimes;

/// Post-quantum sessions and bounded gossip: a node of the overlay, and its command-line client.
#[derive(Debug, Parser)]
#[command(name = "overlay-daemon", version, propagate_version = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // parsed once a process
enum Command {
    /// Run a daemon until SIGTERM, which drains it; a second signal ends it at once
    Run(RunArgs),
    /// Check configuration files and print what they come to, secrets left out
    Check(CheckArgs),
    /// Look at capability tokens
    #[command(subcommand)]
    Token(TokenCommand),
    #[command(flatten)]
    Client(client::Command),
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Show what a token says and allows, and how long it holds
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The configuration: overlay.toml
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// A peers file too
    #[arg(long, value_name = "FILE")]
    peers: Option<PathBuf>,
    /// Also read and check the certificates, keys and tokens that the configuration names
    #[arg(long)]
    files: bool,
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => daemon(&args),
        Command::Check(args) => check_files(&args),
        Command::Token(TokenCommand::Inspect(args)) => inspect_token(&args),
        Command::Client(command) => client::execute(command),
    }
}

fn daemon(args: &RunArgs) -> ExitCode {
    // Before the runtime: what is given up is given up for threads to come, not for those there.
    let start = match Start::prepare(args) {
        Ok(start) => start,
        Err(error) => return fail(&format!("{error:#}")),
    };
    if let Err(error) = allocator::start_giving_back() {
        return fail(&format!("cannot start: no thread that gives memory back: {error}"));
    }
    let ended = Runtimes::start().and_then(|runtimes| {
        let ended = runtimes.wait_for(|callers| run(start, callers));
        // All that had to end has.
        runtimes.shutdown();
        ended
    });
    match ended.context("cannot start").flatten() {
        Ok(code) => code,
        Err(error) => fail(&format!("{error:#}")),
    }
}

fn check_files(args: &CheckArgs) -> ExitCode {
    let files_at_ms = args.files.then(|| Clock::start().unix_ms());
    let request = check::Request { config: &args.config, peers: args.peers.as_deref(), files_at_ms };
    match check::check(request, &mut io::stdout().lock(), &mut io::stderr().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail(&format!("cannot write: {error}")),
    }
}

fn inspect_token(args: &InspectArgs) -> ExitCode {
    match inspect(args, Clock::start().unix_ms(), &mut io::stdout().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail(&error.to_string()),
    }
}

fn fail(message: &str) -> ExitCode {
    overlay_daemon::notice::tell(format_args!("error: {message}"));
    ExitCode::FAILURE
}
