//! `overlay-operator`: the command line, and which part of the crate each command is.
//! Decides nothing else.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use overlay_operator::{api, local, reconcile, token};

/// Runs meshes of overlay daemons: in a cluster, or on this machine.
#[derive(Debug, Parser)]
#[command(name = "overlay-operator", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reconcile the OverlayNodes of a cluster until told to stop.
    Run(reconcile::Args),
    Local(local::Args),
    Token(token::Args),
    /// Print the CustomResourceDefinition of OverlayNode, for kubectl apply -f -.
    Crd,
}

#[tokio::main]
async fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => match reconcile::run(args).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Command::Local(args) => local::run(args).await,
        Command::Token(args) => token::run(args).await,
        Command::Crd => match api::crd_yaml() {
            Ok(text) => print(&text),
            Err(error) => failed(&error),
        },
    }
}

/// A reader that has gone away, as `head` does, is no failure.
fn print(text: &str) -> ExitCode {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => failed(&error),
        _ => ExitCode::SUCCESS,
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    let mut causes = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !causes.ends_with(&text) {
            causes = format!("{causes}: {text}");
        }
        next = cause.source();
    }
    eprintln!("error: {causes}");
    ExitCode::FAILURE
}
