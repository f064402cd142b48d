//! `sub`: a subscription's events to standard output, verified first.

use std::io::IsTerminal;

use bytes::Bytes;
use overlay_core::control::{MAX_TOPICS, Open};
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::{TenantId, Topic};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::args::SubscribeArgs;
use super::assembly::{Assembly, Delivery};
use super::connection::{Connection, ConnectionError, Refused, Stream};
use super::output::Style;
use super::{ClientError, dial};

pub(super) async fn run(args: SubscribeArgs) -> Result<(), ClientError> {
    let style = Style::of(args.output, args.count, std::io::stdout().is_terminal());
    let mut session = dial::target(&args.target).await?;
    let (connection, token) = (&mut session.connection, &session.token);
    let stream = subscribe(connection, token, args.tenant, args.topics).await?;
    connection.keep(stream, token, session.token_file.clone());
    let mut subscription = Subscription {
        stream,
        tenant: args.tenant,
        assembly: Assembly::default(),
        style,
        count: args.count,
        received: 0,
    };
    let mut out = tokio::io::stdout();
    let receiving = subscription.receive(connection, &mut out);
    match args.timeout {
        None => receiving.await?,
        // Past it nothing more is written; a write that it cuts off was not whole anyway.
        Some(after) => match timeout_at(Instant::now() + after, receiving).await {
            Ok(received) => received?,
            Err(_) => subscription.timed_out()?,
        },
    }
    connection.end(stream).await?;
    session.connection.close().await;
    Ok(())
}

/// Opens the subscription, and says so once messages published from now on arrive.
async fn subscribe<S: AsyncRead + AsyncWrite>(
    connection: &mut Connection<S>,
    token: &Bytes,
    tenant: TenantId,
    topics: Vec<Topic>,
) -> Result<Stream, ClientError> {
    if topics.len() > MAX_TOPICS {
        return Err(ClientError::Usage(format!("{} topics; a subscription has at most {MAX_TOPICS}", topics.len())));
    }
    let names = topics.iter().map(Topic::as_str).collect::<Vec<_>>().join(", ");
    let (stream, _) = connection.open(AppProto::PUBSUB, tenant, token, &Open::Subscribe { topics }).await?;
    crate::notice::tell(format_args!("subscribed to {names}"));
    Ok(stream)
}

struct Subscription {
    stream: Stream,
    tenant: TenantId,
    assembly: Assembly,
    style: Style,
    count: Option<u64>,
    received: u64,
}

impl Subscription {
    /// Receives until `count` messages are written, or for ever.
    async fn receive<S: AsyncRead + AsyncWrite>(
        &mut self,
        connection: &mut Connection<S>,
        out: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), ClientError> {
        while self.count.is_none_or(|count| self.received < count) {
            let frame = connection.next().await.map_err(|error| self.over(error))?;
            self.stream.expect(&frame)?;
            if let Some(written) = self.handle_frame(frame)? {
                out.write_all(&written).await.map_err(ClientError::output)?;
                out.flush().await.map_err(ClientError::output)?;
            }
        }
        Ok(())
    }

    /// What to write for a frame, if anything.
    fn handle_frame(&mut self, frame: Frame) -> Result<Option<Bytes>, ClientError> {
        if frame.flags.has(Flags::RESP) {
            return Err(match frame.code {
                400.. => self.over(ConnectionError::Refused(Refused::of(&frame))),
                _ => self.over(ConnectionError::Protocol("the daemon ended the subscription without a reason")),
            });
        }
        match self.assembly.handle_event(frame.payload, self.tenant)? {
            None => Ok(None),
            Some(Delivery::Message(envelope, payload)) => {
                self.received += 1;
                Ok(Some(self.style.message(self.tenant, &envelope, payload)))
            }
            Some(Delivery::Gap(missed)) => {
                let written = self.style.gap(missed);
                if written.is_none() {
                    crate::notice::tell(format_args!(
                        "gap: {missed} message{} missed",
                        if missed == 1 { "" } else { "s" }
                    ));
                }
                Ok(written)
            }
        }
    }

    /// The subscription is over before its time.
    fn over(&self, error: ConnectionError) -> ClientError {
        let so_far = match (self.count, self.received) {
            (Some(count), received) => format!("{received} of {count} messages received"),
            (None, 1) => "1 message received".to_owned(),
            (None, received) => format!("{received} messages received"),
        };
        ClientError::Failed(format!("the subscription is over: {error} ({so_far})"))
    }

    fn timed_out(&self) -> Result<(), ClientError> {
        match self.count {
            None => Ok(()),
            Some(count) => {
                Err(ClientError::Failed(format!("timed out: {} of {count} messages received", self.received)))
            }
        }
    }
}

#[cfg(test)]
mod tests;
