//! From options to a greeted session: over the Unix socket of a daemon here, or over TLS to
//! one elsewhere. Decides whom a token may be shown to.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use overlay_core::config::{KeyExchange, Tls};
use overlay_core::control::HelloReply;
use overlay_core::identity::SpiffeId;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::args::{RemoteArgs, SocketArgs, TargetArgs};
use super::connection::{Connection, ConnectionError, HELLO_TIMEOUT};
use super::locate::{Surroundings, TokenFile};
use super::{ClientError, connection};
use crate::clock::Clock;
use crate::kms::{self, KmsError};
use crate::transport::{self, TransportConfig};

/// Why the daemon cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// Nobody answers on the socket.
    #[error("cannot connect to the daemon at {}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// TCP or TLS failed.
    #[error(transparent)]
    Transport(#[from] transport::DialError),
    /// A certificate, key or bundle cannot be used.
    #[error("{}", options(.0))]
    Keys(Vec<KmsError>),
    /// Somebody else answered.
    #[error("{address} is {found}, not {wanted}: give --identity if that is who you mean")]
    Identity {
        /// What was dialled.
        address: String,
        /// Who answered.
        found: SpiffeId,
        /// Who should have.
        wanted: SpiffeId,
    },
    /// The token does not say whom it is for.
    #[error("the token names no audience to compare the daemon with: give --identity SPIFFE-ID")]
    Audience,
    /// HELLO failed.
    #[error("{place}: {source}{}", hint(.source))]
    Hello {
        /// The socket or address.
        place: String,
        /// Why.
        source: ConnectionError,
    },
}

/// What to look at where a daemon says nothing of its reasons.
fn hint(error: &ConnectionError) -> &'static str {
    match error {
        ConnectionError::Closed => {
            " before it said HELLO: it is full or stopping, or does not admit this user or certificate; its log says which"
        }
        _ => "",
    }
}

/// The errors in the words of the options that gave the files.
fn options(errors: &[KmsError]) -> String {
    const NAMES: [(&str, &str); 3] = [("tls.certificate", "--certificate"), ("tls.key", "--key"), ("tls.ca", "--ca")];
    let option =
        |field: &'static str| NAMES.iter().find(|(name, _)| *name == field).map_or(field, |(_, option)| option);
    let words = |text: &str| NAMES.iter().fold(text.to_owned(), |text, (name, option)| text.replace(name, option));
    let line = |error: &KmsError| match error {
        KmsError::Read { field, path, source } => {
            format!("{}: cannot read {}: {source}", option(field), path.display())
        }
        KmsError::Invalid { field, path, message } => {
            format!("{}: {}: {}", option(field), path.display(), words(message))
        }
    };
    errors.iter().map(line).collect::<Vec<_>>().join("\n  ")
}

/// Either kind of byte stream.
pub(super) trait Transport: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Transport for T {}

/// A session, and what came with it.
pub(super) struct Session {
    pub(super) connection: Connection<Box<dyn Transport>>,
    pub(super) welcome: HelloReply,
    pub(super) token: Bytes,
    /// Where the token stands: whoever wrote it may write another.
    pub(super) token_file: TokenFile,
}

/// A session with the daemon that the options name.
pub(super) async fn target(args: &TargetArgs) -> Result<Session, ClientError> {
    match &args.remote.connect {
        Some(address) => remote(address, &args.remote, &args.local).await,
        None => local(&args.local).await,
    }
}

/// A session with a daemon on this machine.
pub(super) async fn local(args: &SocketArgs) -> Result<Session, ClientError> {
    let surroundings = Surroundings::of_process();
    let path = surroundings.socket(args)?;
    let refused = |source| DialError::Socket { path: path.clone(), source };
    let stream = timeout(HELLO_TIMEOUT, UnixStream::connect(&path))
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(refused)?;
    // After the socket: where there is none, its missing token is not the news.
    let token_file = surroundings.token_file(args, Some(&path))?;
    let token = token_file.read()?;
    greet(Box::new(stream), path.display().to_string(), token, token_file).await
}

async fn remote(address: &str, args: &RemoteArgs, local: &SocketArgs) -> Result<Session, ClientError> {
    let token_file = Surroundings::of_process().token_file(local, None)?;
    let token = token_file.read()?;
    // A token is worth something to whoever holds it: it is shown to its audience alone.
    let wanted = args.identity.clone().or_else(|| audience(&token)).ok_or(DialError::Audience)?;
    let file = |path: &Option<PathBuf>| path.as_deref().map(Path::to_owned).unwrap_or_default();
    let key_exchange = args.key_exchange.map_or(KeyExchange::RequireHybrid, Into::into);
    let tls = Tls { certificate: file(&args.certificate), key: file(&args.key), ca: file(&args.ca), key_exchange };
    let clock = Clock::start();
    let (tls, _) = kms::client_config(&tls, clock.unix_ms()).map_err(DialError::Keys)?;
    let config = TransportConfig {
        handshake: HELLO_TIMEOUT,
        read: connection::ANSWER_TIMEOUT,
        write: connection::ANSWER_TIMEOUT,
        idle: connection::ANSWER_TIMEOUT,
        max_handshakes_in_flight: 1,
        decompression_ratio: overlay_core::compress::MAX_RATIO,
        max_pending: 1,
        max_reading: u64::MAX,
    };
    let dialled = transport::dial(address, &tls, &config, clock).await.map_err(DialError::Transport)?;
    if !wanted.covers(&dialled.peer) {
        return Err(DialError::Identity { address: address.to_owned(), found: dialled.peer, wanted }.into());
    }
    greet(Box::new(dialled.stream), address.to_owned(), token, token_file).await
}

async fn greet(
    stream: Box<dyn Transport>,
    place: String,
    token: Bytes,
    token_file: TokenFile,
) -> Result<Session, ClientError> {
    let (connection, welcome) = Connection::greet(stream).await.map_err(|source| DialError::Hello { place, source })?;
    Ok(Session { connection, welcome, token, token_file })
}

/// Whom a token is for. Not verified here: the daemon does that, and this side only compares
/// it with who answered.
fn audience(token: &[u8]) -> Option<SpiffeId> {
    #[derive(Deserialize)]
    struct Audience {
        aud: SpiffeId,
    }
    let claims = token.split(|byte| *byte == b'.').nth(1)?;
    let claims = URL_SAFE_NO_PAD.decode(claims).ok()?;
    serde_json::from_slice::<Audience>(&claims).ok().map(|claims| claims.aud)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_whom_it_is_for() {
        let token = |claims: &str| format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims));
        let id = "spiffe://overlay.local/ns/default/overlaynode/mesh";
        let whole = token(&format!(r#"{{"aud":"{id}","sub":"x"}}"#));
        assert_eq!(audience(whole.as_bytes()), Some(id.parse().unwrap()));
        for bad in [token("{}"), token(r#"{"aud":"mesh"}"#), "a.b.c".to_owned(), "a".to_owned()] {
            assert_eq!(audience(bad.as_bytes()), None, "{bad}");
        }
    }

    /// Files that are missing are named by the options that named them, all at once.
    #[tokio::test]
    async fn key_errors_speak_of_options() {
        let missing = |name: &str| Some(PathBuf::from("/nonexistent").join(name));
        let tls = RemoteArgs {
            certificate: missing("tls.crt"),
            key: missing("tls.key"),
            ca: missing("ca.crt"),
            identity: Some("spiffe://overlay.local/ns/default/overlaynode/mesh".parse().unwrap()),
            ..RemoteArgs::default()
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "a.b.c").unwrap();
        let local = SocketArgs { socket: None, token_file: Some(dir.path().join("token")) };
        let Err(error) = remote("127.0.0.1:1", &tls, &local).await else { panic!("connected") };
        let text = error.to_string();
        for option in ["--certificate: ", "--key: ", "--ca: "] {
            assert!(text.contains(option), "{text}");
        }
        // A file may be called as a field is.
        for name in ["tls.crt", "tls.key", "ca.crt"] {
            assert!(text.contains(&format!("/nonexistent/{name}: ")), "{text}");
        }
    }
}
