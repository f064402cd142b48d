//! `pub`: messages from their source to the daemon, and their ids to standard output.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use overlay_core::control::Open;
use overlay_core::frame::{AppProto, Flags};
use overlay_core::identity::TenantId;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep, sleep_until};

use super::args::PublishArgs;
use super::connection::{Connection, ConnectionError, Refused, Stream};
use super::flow::{Flow, Outcome, Outgoing};
use super::input::{Cut, Input};
use super::locate::TokenFile;
use super::{ClientError, dial};

/// At most one note about waiting in so long.
const NOTE_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn run(args: PublishArgs) -> Result<(), ClientError> {
    let job = Job {
        open: Open::Publish { topic: args.topic.clone() },
        tenant: args.tenant,
        retries: args.retries,
        quiet: args.quiet,
    };
    let input = source(args.message, args.file.as_deref(), args.lines).await?;
    let mut session = dial::target(&args.target).await?;
    // One under way at a time keeps the order: of several, a later one may be accepted while an
    // earlier one is told to wait.
    let max_inflight = if args.unordered { session.welcome.max_inflight } else { 1 };
    let by = By { token: session.token, file: Some(session.token_file), max_inflight };
    publish(&mut session.connection, by, &job, input, &mut tokio::io::stdout()).await?;
    session.connection.close().await;
    Ok(())
}

async fn source(message: Option<String>, file: Option<&Path>, lines: bool) -> Result<Input, ClientError> {
    let usage = |text: &str| Err(ClientError::Usage(text.to_owned()));
    let cut = if lines { Cut::Lines } else { Cut::Whole };
    match (message.as_deref(), file) {
        (_, Some(path)) => Input::file(path, cut).await,
        (Some("-"), None) => Ok(Input::stdin(cut)),
        (Some(_), None) if lines => usage("--lines reads standard input or --file PATH, not an argument"),
        (Some(text), None) => Ok(Input::argument(text.to_owned())),
        (None, None) if std::io::stdin().is_terminal() => {
            usage("nothing to publish: give the message as an argument, --file PATH, or '-' to type it")
        }
        (None, None) => Ok(Input::stdin(cut)),
    }
}

/// What is published, and how.
struct Job {
    open: Open,
    tenant: TenantId,
    retries: u32,
    quiet: bool,
}

/// By what it is published.
struct By {
    token: Bytes,
    /// Where another token may come to stand.
    file: Option<TokenFile>,
    max_inflight: u32,
}

/// Publishes all of `input`; ids go to `out`.
async fn publish<S: AsyncRead + AsyncWrite>(
    connection: &mut Connection<S>,
    by: By,
    job: &Job,
    mut input: Input,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), ClientError> {
    let stream = open(connection, &by.token, job).await?;
    if let Some(file) = by.file {
        connection.keep(stream, &by.token, file);
    }
    let mut flow = Flow::new(by.max_inflight, job.retries);
    let mut tally = Tally::default();
    let mut more = true;
    loop {
        while connection.has_room() {
            let Some(body) = flow.poll_send(Instant::now()) else { break };
            for payload in body.payloads() {
                connection.send(stream, Flags::REQ, payload)?;
            }
        }
        if !more && flow.is_idle() {
            break;
        }
        tokio::select! {
            next = input.next(), if more && flow.wants_more() && connection.has_room() => match next? {
                Some((name, body)) => flow.handle_input(Outgoing { name, body }),
                None => more = false,
            },
            frame = connection.next() => {
                let frame = frame?;
                stream.expect(&frame)?;
                let outcome = flow.handle_answer(&frame, Instant::now())?;
                tally.handle_outcome(outcome, job, out).await?;
            }
            () = sleep_until(flow.poll_timeout(Instant::now())) => flow.handle_timeout(Instant::now())?,
        }
    }
    connection.end(stream).await?;
    tally.verdict()
}

/// Opens the stream, waiting where the daemon asks for it.
async fn open<S: AsyncRead + AsyncWrite>(
    connection: &mut Connection<S>,
    token: &Bytes,
    job: &Job,
) -> Result<Stream, ClientError> {
    let mut refusals = 0;
    loop {
        match connection.open(AppProto::PUBSUB, job.tenant, token, &job.open).await {
            Ok((stream, _)) => return Ok(stream),
            Err(ConnectionError::Refused(refused)) => match refused.retry_after.filter(|_| refusals < job.retries) {
                Some(wait) => {
                    refusals += 1;
                    note_wait(&refused, wait);
                    // Short beside the idle timeout, so that no ping is missed.
                    sleep(wait.min(Duration::from_secs(4))).await;
                }
                None => return Err(ConnectionError::Refused(refused).into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
}

fn note_wait(refused: &Refused, wait: Duration) {
    crate::notice::tell(format_args!("note: {refused}; trying again in {} ms", wait.as_millis()));
}

/// What became of the messages.
#[derive(Debug, Default)]
struct Tally {
    accepted: u64,
    refused: u64,
    last: Option<String>,
    noted: Option<Instant>,
}

impl Tally {
    async fn handle_outcome(
        &mut self,
        outcome: Outcome,
        job: &Job,
        out: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), ClientError> {
        match outcome {
            Outcome::Accepted(id) => {
                self.accepted += 1;
                if !job.quiet {
                    out.write_all(format!("{id}\n").as_bytes()).await.map_err(ClientError::output)?;
                    out.flush().await.map_err(ClientError::output)?;
                }
            }
            Outcome::Later(refused, wait) => {
                let now = Instant::now();
                if self.noted.is_none_or(|at| now >= at + NOTE_EVERY) {
                    self.noted = Some(now);
                    note_wait(&refused, wait);
                }
            }
            Outcome::Refused(message, refused) if refused.retry_after.is_some() => {
                let Self { accepted, .. } = self;
                return Err(ClientError::Failed(format!(
                    "{}: {refused}; gave up after {} retries, with {accepted} accepted before",
                    message.name, job.retries
                )));
            }
            Outcome::Refused(message, refused) => {
                self.refused += 1;
                if let Some(earlier) = self.last.replace(format!("{}: {refused}", message.name)) {
                    crate::notice::tell(format_args!("error: {earlier}"));
                }
            }
            Outcome::Ended(left, refused) => {
                let why =
                    refused.map_or_else(|| "the daemon ended the stream".to_owned(), |refused| refused.to_string());
                return Err(ClientError::Failed(match left.len() {
                    0 => why,
                    1 => format!("{why}; 1 message was not answered"),
                    n => format!("{why}; {n} messages were not answered"),
                }));
            }
        }
        Ok(())
    }

    /// The last refusal, with a count where there were others.
    fn verdict(self) -> Result<(), ClientError> {
        match (self.last, self.refused) {
            (None, _) => Ok(()),
            (Some(last), 1) if self.accepted == 0 => Err(ClientError::Failed(last)),
            (Some(last), refused) => Err(ClientError::Failed(format!(
                "{last}\nerror: {refused} of {} messages were refused",
                refused + self.accepted
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
