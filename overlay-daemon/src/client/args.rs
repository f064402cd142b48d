//! The options of `pub`, `sub` and `status`: their names, defaults and help. What they mean
//! is decided where they are used.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use overlay_core::config::KeyExchange;
use overlay_core::identity::{SpiffeId, TenantId, Topic};

/// What a client asks of a daemon.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publish a message on a topic
    #[command(after_long_help = PUBLISH_HELP)]
    Pub(Box<PublishArgs>),
    /// Receive the messages of topics
    #[command(after_long_help = SUBSCRIBE_HELP)]
    Sub(Box<SubscribeArgs>),
    /// Show a daemon's conditions, sessions and messages
    #[command(after_long_help = STATUS_HELP)]
    Status(Box<StatusArgs>),
}

const PUBLISH_HELP: &str = "\
The id of each accepted message (64 hexadecimal digits) goes to standard output, one a line,
in the order of acceptance.
A message is at most 1 MiB; what is larger, the daemon refuses with 413.

Examples:
  overlay-daemon pub news hello
  overlay-daemon pub news --file report.pdf
  date | overlay-daemon pub news
  tail -f app.log | overlay-daemon pub log.app --lines --quiet
  overlay-daemon pub news hello --connect mesh.default.svc:9500 --certificate tls.crt \\
      --key tls.key --ca ca.crt --token-file token

Exit code: 0 all accepted, 1 refused or not reached, 2 usage.";

const SUBSCRIBE_HELP: &str = "\
Output:
  raw   Each payload as it is, then a newline if it does not end in one. With --count 1 and
        standard output not a terminal: the payload alone, byte for byte.
  json  One object a line: topic, tenant, id, origin, incarnation, sequence, time, size, b3,
        and payload (text) or payload_base64 (anything else). Messages that the daemon had to
        leave out: {\"gap\":N}.

A payload is written only after the whole of it was verified against its BLAKE3.
\"subscribed to TOPIC\" on standard error says that messages published from now on arrive.

Examples:
  overlay-daemon sub news
  overlay-daemon sub news alerts --output json | jq .payload
  overlay-daemon sub backup --count 1 > backup.tar
  overlay-daemon sub news --count 1 --timeout 10s

Exit code: 0 after --count messages, or after --timeout without --count; 1 refused, not
reached, or the daemon went away; 2 usage.";

const STATUS_HELP: &str = "\
Needs a token with the action admin, and the Unix socket: the state of sessions is not
served over the network.

Examples:
  overlay-daemon status
  overlay-daemon status --socket /run/overlay/overlay.sock
  overlay-daemon status --output json | jq .sessions

Exit code: 0, also where the daemon is not ready; 1 refused or not reached; 2 usage.";

/// `overlay-daemon pub`.
#[derive(Debug, Args)]
pub struct PublishArgs {
    /// Where the message goes: 1 to 255 bytes, no control characters, no '*'
    pub topic: Topic,
    /// The message; '-', or none where standard input is not a terminal, reads standard input
    #[arg(conflicts_with = "file", allow_negative_numbers = true)]
    pub message: Option<String>,
    /// Publish the contents of this file
    #[arg(long, short = 'f', value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Publish each line of the input as a message of its own, without its newline
    #[arg(long, short = 'l')]
    pub lines: bool,
    /// With --lines, do not wait for one line's answer before the next: faster, and lines change
    /// places where the daemon asks to wait
    #[arg(long, requires = "lines")]
    pub unordered: bool,
    /// The tenant: 0, a UUID, a ULID or 32 hexadecimal digits
    #[arg(long, default_value = "0")]
    pub tenant: TenantId,
    /// Print no message ids
    #[arg(long, short = 'q')]
    pub quiet: bool,
    /// How often in a row to wait and try again where the daemon says 429 or 503
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    pub retries: u32,
    /// Which daemon.
    #[command(flatten)]
    pub target: TargetArgs,
}

/// `overlay-daemon sub`.
#[derive(Debug, Args)]
pub struct SubscribeArgs {
    /// The topics; 1 to 64
    #[arg(required = true, num_args = 1.., value_name = "TOPIC")]
    pub topics: Vec<Topic>,
    /// End after this many messages
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// How messages are written
    #[arg(long, short = 'o', value_enum, default_value_t = OutputFormat::Raw)]
    pub output: OutputFormat,
    /// The tenant: 0, a UUID, a ULID or 32 hexadecimal digits
    #[arg(long, default_value = "0")]
    pub tenant: TenantId,
    /// End after so long, such as 500ms, 10s, 5m or 1h; with --count, exit 1 if they have not all come
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Which daemon.
    #[command(flatten)]
    pub target: TargetArgs,
}

/// `overlay-daemon status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How it is written
    #[arg(long, short = 'o', value_enum, default_value_t = StatusFormat::Table)]
    pub output: StatusFormat,
    /// By its socket.
    #[command(flatten)]
    pub local: SocketArgs,
}

/// How `sub` writes messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// The payloads
    Raw,
    /// One JSON object a line
    Json,
}

/// How `status` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StatusFormat {
    /// For a person
    Table,
    /// As the daemon answers
    Json,
}

/// A daemon on this machine.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Daemon")]
pub struct SocketArgs {
    /// The daemon's Unix socket [env: OVERLAY_SOCKET] [default: /run/overlay/overlay.sock, else
    /// that of the one daemon that 'overlay-operator local' runs]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The capability token to present [env: OVERLAY_TOKEN_FILE] [default: the file 'token'
    /// beside the socket]
    #[arg(long, value_name = "PATH")]
    pub token_file: Option<PathBuf>,
}

/// A daemon anywhere.
#[derive(Clone, Debug, Default, Args)]
pub struct TargetArgs {
    /// By its socket.
    #[command(flatten)]
    pub local: SocketArgs,
    /// By its address.
    #[command(flatten)]
    pub remote: RemoteArgs,
}

/// A daemon over TLS.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Daemon elsewhere, over TLS")]
pub struct RemoteArgs {
    /// The daemon's address, instead of a socket
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "socket", requires_all = ["certificate", "key", "ca"],
          value_parser = address)]
    pub connect: Option<String>,
    /// PEM: the certificate to present, then intermediates
    #[arg(long, value_name = "PATH", requires = "connect")]
    pub certificate: Option<PathBuf>,
    /// PEM: its private key
    #[arg(long, value_name = "PATH", requires = "connect")]
    pub key: Option<PathBuf>,
    /// PEM: the authorities that the daemon's certificate must chain to
    #[arg(long, value_name = "PATH", requires = "connect")]
    pub ca: Option<PathBuf>,
    /// Who the daemon must be, or lie below [default: the audience of the token]
    #[arg(long, value_name = "SPIFFE-ID", requires = "connect")]
    pub identity: Option<SpiffeId>,
    /// The key exchanges to offer; hybrid is X25519MLKEM768 [default: require-hybrid]
    #[arg(long, value_name = "POLICY", value_enum, requires = "connect")]
    pub key_exchange: Option<KeyExchangePolicy>,
}

/// `--key-exchange`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KeyExchangePolicy {
    /// Hybrid or no session
    RequireHybrid,
    /// Hybrid where the daemon can, else X25519
    PreferHybrid,
    /// X25519 only
    Classical,
}

impl From<KeyExchangePolicy> for KeyExchange {
    fn from(policy: KeyExchangePolicy) -> Self {
        match policy {
            KeyExchangePolicy::RequireHybrid => Self::RequireHybrid,
            KeyExchangePolicy::PreferHybrid => Self::PreferHybrid,
            KeyExchangePolicy::Classical => Self::Classical,
        }
    }
}

/// `HOST:PORT`, an IPv6 host in brackets.
fn address(text: &str) -> Result<String, String> {
    let port = |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    match text.rsplit_once(':') {
        Some((host, number)) if !host.is_empty() && port(number) && (host.starts_with('[') || !host.contains(':')) => {
            Ok(text.to_owned())
        }
        _ => Err("must be HOST:PORT, such as mesh.default.svc:9500 or [::1]:9500".to_owned()),
    }
}

/// A whole number and its unit, above 0.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit_ms = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    let ms = unit_ms.and_then(|unit| number.parse::<u64>().ok()?.checked_mul(unit));
    // A timer past a year serves nobody, and an Instant must not overflow.
    match ms.filter(|ms| (1..=365 * 86_400_000).contains(ms)) {
        Some(ms) => Ok(Duration::from_millis(ms)),
        None => Err("must be a number and a unit, such as 500ms, 10s, 5m or 1h; at most a year".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Command,
    }

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(std::iter::once("overlay-daemon").chain(line.split_whitespace())).map(|cli| cli.command)
    }

    #[test]
    fn what_is_accepted() {
        for line in [
            "pub news hello",
            "pub news -",
            "pub news - --lines",
            "pub news -5",
            "pub news",
            "pub news --lines",
            "pub news --file f --lines -q --retries 0",
            "pub news hi --tenant 01ARZ3NDEKTSV4RRFFQ69G5FAV --socket s --token-file t",
            "pub news hi --connect h:1 --certificate c --key k --ca a",
            "pub news hi --connect [::1]:9500 --certificate c --key k --ca a",
            "pub news --lines --unordered",
            "pub news hi --connect h:1 --certificate c --key k --ca a --token-file t --key-exchange classical \
             --identity spiffe://overlay.local/ns/default/overlaynode/mesh",
            "sub news",
            "sub a b c -n 3 -o json --timeout 500ms",
            "status",
            "status -o json --socket s",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
    }

    /// Each is refused as usage, and the message names what is wrong.
    #[test]
    fn what_is_refused() {
        let long = format!("pub {} x", "t".repeat(256));
        for (line, names) in [
            ("pub", "<TOPIC>"),
            ("pub new* x", "'*'"),
            (long.as_str(), "1 to 255 bytes"),
            ("pub news x --file f", "--file"),
            ("pub news x --tenant 7", "UUID"),
            ("pub news x --retries=-1", "--retries"),
            ("pub news x --connect h:1", "--certificate"),
            ("pub news x --connect h:1 --certificate c --key k", "--ca"),
            ("pub news x --certificate c", "--connect"),
            ("pub news x --connect h:1 --certificate c --key k --ca a --socket s", "--socket"),
            ("pub news x --connect h:1 --certificate c --key k --ca a --identity mesh", "spiffe://"),
            ("pub news x --connect nonsense --certificate c --key k --ca a", "HOST:PORT"),
            ("pub news x --connect h:70000 --certificate c --key k --ca a", "HOST:PORT"),
            ("pub news x --connect ::1:9500 --certificate c --key k --ca a", "HOST:PORT"),
            ("pub news x --unordered", "--lines"),
            ("sub", "<TOPIC>"),
            ("sub news --count 0", "--count"),
            ("sub news --output xml", "--output"),
            ("sub news --timeout 5", "500ms"),
            ("sub news --timeout 0s", "500ms"),
            ("sub news --timeout 999999999999h", "a year"),
            ("status --connect h:1", "--connect"),
            ("status --output yaml", "--output"),
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(names), "{line}: {error}");
        }
    }

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
