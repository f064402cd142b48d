//! Keys (the seam `ron-kms`): which certificates and tokens this daemon shows, and which it
//! believes. Decides on key exchange, chains, identities and signatures; every primitive is
//! rustls's, jsonwebtoken's and aws-lc's. Who may peer, and what a token allows, is decided
//! by its callers and the core.
//!
//! What is zeroed when it goes: every file as it was read, a private key as it was parsed, the
//! token for peers. What is not: the signing key inside aws-lc, which frees it cleansed by its
//! own rules, and what a token was copied into on its way through a socket's buffers.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use overlay_core::config;
use overlay_core::frame::MAX_CAP;
use overlay_core::grant::TokenKey;
use overlay_core::identity::SpiffeId;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ServerConfig};
use zeroize::Zeroizing;

mod chain;
mod leaf;
mod reload;
mod tls;
mod token;

#[cfg(test)]
pub(crate) mod authority;
#[cfg(test)]
mod tests;

pub use leaf::{IdentityError, Leaf};
pub use reload::{Keys, POLL_INTERVAL};
pub use tls::{ALPN, KeyExchangeGroup, QuicKeys};
pub use token::{MAX_TOKEN_KEYS, TokenKeys, Verifier};

/// Bytes of any one file that is read here.
const MAX_FILE: u64 = 1 << 20;

/// Why key material cannot be used. Names the configuration's field and the file, never what
/// stands in it.
#[derive(Debug, thiserror::Error)]
pub enum KmsError {
    /// The file cannot be read.
    #[error("{field}: cannot read {}: {source}", path.display())]
    Read {
        /// The configuration's field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What stands in the file is not usable.
    #[error("{field}: {}: {message}", path.display())]
    Invalid {
        /// The configuration's field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why, and what would be right.
        message: String,
    },
}

/// A file that the configuration names.
#[derive(Clone, Copy)]
struct Source<'a> {
    field: &'static str,
    path: &'a Path,
}

impl Source<'_> {
    /// The whole file, in memory that is zeroed when it is dropped.
    fn read(&self) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.try_read().map_err(|source| KmsError::Read { field: self.field, path: self.path.to_owned(), source })
    }

    fn try_read(&self) -> io::Result<Zeroizing<Vec<u8>>> {
        let file = File::open(self.path)?;
        let size = file.metadata()?.len().min(MAX_FILE);
        // Room for all of it at once: a buffer that grows leaves copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1));
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_FILE} bytes")));
        }
        Ok(bytes)
    }

    fn invalid(&self, message: impl fmt::Display) -> KmsError {
        KmsError::Invalid { field: self.field, path: self.path.to_owned(), message: message.to_string() }
    }
}

/// The files behind a [`KeySet`].
#[derive(Clone, Copy)]
struct Sources<'a> {
    certificate: Source<'a>,
    key: Source<'a>,
    ca: Source<'a>,
    token_keys: Source<'a>,
    peer_token: Source<'a>,
    key_exchange: config::KeyExchange,
}

impl<'a> Sources<'a> {
    fn new(tls: &'a config::Tls, token: &'a config::Token) -> Self {
        Self {
            certificate: Source { field: "tls.certificate", path: &tls.certificate },
            key: Source { field: "tls.key", path: &tls.key },
            ca: Source { field: "tls.ca", path: &tls.ca },
            token_keys: Source { field: "token.keys", path: &token.keys },
            peer_token: Source { field: "token.file", path: &token.file },
            key_exchange: tls.key_exchange,
        }
    }

    fn all(&self) -> [Source<'a>; 5] {
        [self.certificate, self.key, self.ca, self.token_keys, self.peer_token]
    }
}

/// What stood in [`Sources`] at one time.
struct Contents {
    /// In the order of [`Sources::all`].
    files: [Zeroizing<Vec<u8>>; 5],
    /// Tells one set of contents from another.
    digest: blake3::Hash,
}

impl Contents {
    /// Reads every file; every one that cannot be read is reported.
    fn read(sources: &Sources<'_>) -> Result<Self, Vec<KmsError>> {
        let mut files: [Zeroizing<Vec<u8>>; 5] = Default::default();
        let mut errors = Vec::new();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[sources.key_exchange as u8]);
        for (index, source) in sources.all().into_iter().enumerate() {
            // A bundle of certificate and key is read once: between two reads it may be replaced.
            let read = match sources.all()[..index].iter().position(|earlier| earlier.path == source.path) {
                Some(earlier) => Ok(files[earlier].clone()),
                None => source.read(),
            };
            let slot = &mut files[index];
            match read {
                Ok(bytes) => {
                    hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
                    *slot = bytes;
                }
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(Self { files, digest: hasher.finalize() }) } else { Err(errors) }
    }
}

/// One consistent set of keys: the leaf matches its private key and chains to the authorities,
/// whose TLS configurations are ready to use.
pub struct KeySet {
    leaf: Leaf,
    audience: SpiffeId,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    quic: Option<QuicKeys>,
    _showing: tls::Showing,
    authorities: tls::Authorities,
    /// Tells one bundle of authorities from another.
    bundle: blake3::Hash,
    token_keys: TokenKeys,
    peer_token: Zeroizing<Vec<u8>>,
    generation: u64,
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { leaf, generation, .. } = self;
        f.debug_struct("KeySet").field("leaf", leaf).field("generation", generation).finish_non_exhaustive()
    }
}

impl KeySet {
    /// Makes a set of what was read; every file that is wrong is reported.
    fn build(sources: &Sources<'_>, contents: Contents, generation: u64, unix_ms: u64) -> Result<Self, Vec<KmsError>> {
        let [certificate, key, ca, token_keys, peer_token] = contents.files;
        let tls = tls::Material::parse(sources, &certificate, &key, &ca, unix_ms);
        let keys = TokenKeys::parse(&token_keys).map_err(|message| vec![sources.token_keys.invalid(message)]);
        let token = parse_token(&peer_token).map_err(|message| vec![sources.peer_token.invalid(message)]);
        match (tls, keys, token) {
            (Ok(tls), Ok(token_keys), Ok(peer_token)) => {
                let (server, client, showing) = tls.configs().map_err(|e| vec![sources.certificate.invalid(e)])?;
                let quic = QuicKeys::new(sources.key_exchange, &server, &client)
                    .map_err(|e| vec![sources.certificate.invalid(e)])?;
                let authorities = tls.authorities().map_err(|e| vec![sources.ca.invalid(e)])?;
                let (audience, bundle) = (tls.leaf.identity.without_pod(), blake3::hash(&ca));
                let leaf = tls.leaf;
                Ok(Self {
                    leaf,
                    audience,
                    server,
                    client,
                    quic,
                    _showing: showing,
                    authorities,
                    bundle,
                    token_keys,
                    peer_token,
                    generation,
                })
            }
            (tls, keys, token) => Err([tls.err(), keys.err(), token.err()].into_iter().flatten().flatten().collect()),
        }
    }

    /// This daemon's own identity.
    #[must_use]
    pub fn identity(&self) -> &SpiffeId {
        &self.leaf.identity
    }

    /// What a token for this daemon names as audience: its identity without the pod.
    #[must_use]
    pub fn audience(&self) -> &SpiffeId {
        &self.audience
    }

    /// When the leaf ceases to be valid, milliseconds since 1970.
    #[must_use]
    pub fn not_after_ms(&self) -> u64 {
        self.leaf.not_after_ms
    }

    /// For accepting.
    #[must_use]
    pub fn server(&self) -> &Arc<ServerConfig> {
        &self.server
    }

    /// For dialling.
    #[must_use]
    pub fn client(&self) -> &Arc<ClientConfig> {
        &self.client
    }

    /// For both over QUIC; none where the policy is not to require the hybrid key exchange.
    #[must_use]
    pub fn quic(&self) -> Option<&QuicKeys> {
        self.quic.as_ref()
    }

    /// Whether a chain that a handshake took still leads to an authority of the bundle at
    /// `unix_ms`. `server` says that it is that of whoever was dialled.
    #[must_use]
    pub fn vouches_for(&self, chain: &[CertificateDer<'_>], server: bool, unix_ms: u64) -> bool {
        self.authorities.vouch(chain, server, unix_ms)
    }

    /// Which bundle of authorities it has.
    #[must_use]
    pub fn bundle(&self) -> blake3::Hash {
        self.bundle
    }

    /// The token to present to peers.
    #[must_use]
    pub fn peer_token(&self) -> Bytes {
        zeroed(self.peer_token.clone())
    }

    /// The keys whose tokens are believed.
    #[must_use]
    pub fn token_keys(&self) -> BTreeSet<TokenKey> {
        self.token_keys.all()
    }

    /// Which set it is: each one that replaces another has a higher number.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// What a client without a daemon needs to dial one: its certificate and whom it believes.
///
/// # Errors
/// Every file that cannot be read or used.
pub fn client_config(tls: &config::Tls, unix_ms: u64) -> Result<(Arc<ClientConfig>, SpiffeId), Vec<KmsError>> {
    let token = config::Token { keys: PathBuf::new(), file: PathBuf::new() };
    let sources = Sources::new(tls, &token);
    let read = [sources.certificate, sources.key, sources.ca].map(|source| source.read());
    match read {
        [Ok(certificate), Ok(key), Ok(ca)] => {
            let material = tls::Material::parse(&sources, &certificate, &key, &ca, unix_ms)?;
            let client = material.client().map_err(|e| vec![sources.certificate.invalid(e)])?;
            Ok((client, material.leaf.identity))
        }
        read => Err(read.into_iter().filter_map(Result::err).collect()),
    }
}

/// Reads a token from `path`, of the configuration's `field` or a command's option: its text
/// without white space at either end.
///
/// # Errors
/// The file cannot be read, or does not hold a token's text.
pub fn read_token(field: &'static str, path: &Path) -> Result<Bytes, KmsError> {
    let source = Source { field, path };
    let token = parse_token(&source.read()?).map_err(|message| source.invalid(message))?;
    Ok(zeroed(token))
}

/// Shared bytes that are zeroed when the last of those who share them is gone.
fn zeroed(secret: Zeroizing<Vec<u8>>) -> Bytes {
    struct Owner(Zeroizing<Vec<u8>>);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Owner(secret))
}

/// Whether a key of the set at `path` signed `token`; else why it is not believed.
///
/// # Errors
/// The set cannot be read or used.
pub fn verify_signature(path: &Path, token: &[u8]) -> Result<Result<(), &'static str>, KmsError> {
    let source = Source { field: "token.keys", path };
    let keys = TokenKeys::parse(&source.read()?).map_err(|message| source.invalid(message))?;
    Ok(keys.claims(token).map(|_| ()).map_err(|refusal| refusal.message))
}

/// A token's text, as far as who merely presents it can judge.
fn parse_token(bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
    let text = bytes.trim_ascii();
    if text.is_empty() {
        return Err("is empty, must hold a token".into());
    }
    if text.len() > MAX_CAP {
        return Err(format!("holds {} bytes, a token has at most {MAX_CAP}", text.len()));
    }
    let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !text.iter().all(inner) || text.iter().filter(|b| **b == b'.').count() != 2 {
        return Err("does not hold a token (three base64url parts joined by dots)".into());
    }
    Ok(Zeroizing::new(text.to_vec()))
}
