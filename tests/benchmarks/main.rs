//! `tests/bench`: the speed of sessions, beside nats-server and beside what rustls and sockets
//! cost by themselves, in one run, taking turns. Prints tables; asserts nothing.

mod accept;
mod codec;
mod dialect;
mod fanout;
mod figures;
mod floor;
mod idle;
mod latency;
mod link;
mod machine;
mod servers;
mod sessions;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use overlay_tests::daemon::raise_descriptors;

use machine::Cores;

/// The speed of sessions, beside nats-server and beside rustls and sockets alone.
///
/// Servers run on one core and the generator on another; every figure is the median of the
/// rounds, with the least and the most. All traffic stays on loopback.
#[derive(Parser)]
#[command(name = "tests/bench", bin_name = "tests/bench", version)]
struct Arguments {
    /// Rounds of each row
    #[arg(long, default_value_t = 3, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// A quarter of the time and of the sessions, for trying
    #[arg(long, global = true)]
    short: bool,
    /// All rows but `sessions`, without one
    #[command(subcommand)]
    row: Option<Row>,
}

#[derive(Clone, Copy, Subcommand)]
enum Row {
    /// One publisher to 8 subscribers: processor time of the server for each message delivered
    Fanout {
        /// Messages of so many bytes alone
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
        bytes: Option<u32>,
    },
    /// The same at 2,000 messages a second: latency
    Latency,
    /// 10,000 sessions at rest: memory resident for each
    Idle,
    /// New sessions: processor time of the server for each
    Accept,
    /// Decoding frames
    Codec,
    /// Ten minutes of 10,000 sessions that come and go: memory, refusals, readiness, an honest
    /// client's latency
    Sessions,
}

/// How long and how often.
#[derive(Clone, Copy)]
struct Scale {
    repeat: u32,
    short: bool,
}

impl Scale {
    fn time(self, whole: Duration) -> Duration {
        if self.short { whole / 4 } else { whole }
    }

    fn count(self, whole: u32) -> u32 {
        if self.short { whole / 4 } else { whole }
    }
}

fn main() -> ExitCode {
    // Not for people: how the floor is started.
    let mut arguments = std::env::args_os().skip(1);
    let ended = match (arguments.next(), arguments.next()) {
        (Some(word), Some(trust)) if word == "serve-floor" => floor::serve(trust.as_ref()),
        _ => bench(&Arguments::parse()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    let cores = Cores::find()?;
    let scale = Scale { repeat: arguments.repeat, short: arguments.short };
    raise_descriptors()?;
    println!("{}", machine::describe());
    if !matches!(arguments.row, Some(Row::Sessions | Row::Codec)) {
        println!("overlay-daemon's caps: {}", servers::RAISED);
    }
    match arguments.row {
        Some(Row::Fanout { bytes: Some(bytes) }) => fanout::rows(&cores, scale, &[bytes as usize]),
        Some(Row::Fanout { bytes: None }) => fanout::rows(&cores, scale, &fanout::SIZES),
        Some(Row::Sessions) => sessions::rows(&cores, scale),
        Some(Row::Latency) => latency::rows(&cores, scale),
        Some(Row::Idle) => idle::rows(&cores, scale),
        Some(Row::Accept) => accept::rows(&cores, scale),
        Some(Row::Codec) => codec::rows(scale),
        None => {
            fanout::rows(&cores, scale, &fanout::SIZES)?;
            latency::rows(&cores, scale)?;
            idle::rows(&cores, scale)?;
            accept::rows(&cores, scale)?;
            codec::rows(scale)
        }
    }
}
