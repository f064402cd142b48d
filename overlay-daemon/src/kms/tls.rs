//! TLS as every session has it: 1.3 only, certificates both ways, ALPN, a key exchange of the
//! policy's, no tickets and no resumption (a resumed session would skip the check of the
//! client's certificate), no early data.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use overlay_core::config::KeyExchange;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, Error, NamedGroup, RootCertStore, ServerConfig, SignatureScheme,
};
use tokio::sync::watch;
use zeroize::Zeroize;

use super::chain::ShortChains;
use super::{KmsError, Leaf, Sources};

/// The application protocol of every session.
pub const ALPN: &[u8] = b"ron/oap1";
/// Certificates of a chain, or authorities of a bundle, that a file may hold.
const MAX_CERTIFICATES: usize = 256;

/// What a handshake agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyExchangeGroup {
    /// X25519MLKEM768 (I-11).
    Hybrid,
    /// X25519.
    Classical,
}

impl KeyExchangeGroup {
    /// Every group.
    pub const ALL: [Self; 2] = [Self::Hybrid, Self::Classical];

    /// The value of the metric label `group`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Hybrid => "hybrid",
            Self::Classical => "classical",
        }
    }

    /// What the handshake of `connection` agreed on, if it is over.
    #[must_use]
    pub fn of(connection: &CommonState) -> Option<Self> {
        let hybrid = connection.negotiated_key_exchange_group()?.name() == NamedGroup::X25519MLKEM768;
        Some(if hybrid { Self::Hybrid } else { Self::Classical })
    }
}

/// aws-lc's primitives, narrowed to TLS 1.3 and the key exchanges of `policy`.
pub(super) fn provider(policy: KeyExchange) -> CryptoProvider {
    let kx_groups: Vec<&'static dyn SupportedKxGroup> = match policy {
        KeyExchange::RequireHybrid => vec![kx_group::X25519MLKEM768],
        KeyExchange::PreferHybrid => vec![kx_group::X25519MLKEM768, kx_group::X25519],
        KeyExchange::Classical => vec![kx_group::X25519],
    };
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.retain(|suite| suite.tls13().is_some());
    CryptoProvider { kx_groups, ..provider }
}

/// The leaf and its key, as configurations of TLS show it to the other side. Of QUIC's every
/// connection keeps one for as long as it lives, and the listener its first: the key is taken out
/// of them when its set goes.
pub(super) struct Shown(watch::Receiver<Option<Arc<CertifiedKey>>>);

impl Shown {
    fn get(&self) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().clone()
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.get()
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _authorities: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.get()
    }

    fn has_certs(&self) -> bool {
        self.get().is_some()
    }
}

/// A key that is shown until this goes.
pub(super) struct Showing(watch::Sender<Option<Arc<CertifiedKey>>>);

impl Drop for Showing {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

/// A leaf with its key, and the authorities that others must chain to.
pub(super) struct Material {
    pub(super) leaf: Leaf,
    key: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl Material {
    /// Parses the three files and checks them against each other.
    pub(super) fn parse(
        sources: &Sources<'_>,
        certificate: &[u8],
        key: &[u8],
        ca: &[u8],
        unix_ms: u64,
    ) -> Result<Self, Vec<KmsError>> {
        let provider = provider(sources.key_exchange);
        let chain = certificates(certificate).map_err(|message| sources.certificate.invalid(message));
        let key = private_key(key).map_err(|message| sources.key.invalid(message));
        let roots = certificates(ca).and_then(roots).map_err(|message| sources.ca.invalid(message));
        let (chain, key, roots) = match (chain, key, roots) {
            (Ok(chain), Ok(key), Ok(roots)) => (chain, key, roots),
            (chain, key, roots) => {
                return Err([chain.err(), key.err(), roots.err()].into_iter().flatten().collect());
            }
        };
        let leaf = Leaf::of_chain(Some(&chain)).map_err(|error| vec![sources.certificate.invalid(error)])?;
        verify_chain(&chain, &roots, UnixTime::since_unix_epoch(Duration::from_millis(unix_ms)), &provider)
            .map_err(|error| vec![sources.certificate.invalid(describe(&error))])?;
        let key = CertifiedKey::from_der(chain, key, &provider).map_err(|error| {
            vec![sources.key.invalid(match error {
                Error::InconsistentKeys(_) => "is not the private key of tls.certificate".to_owned(),
                error => format!("cannot be used: {error}"),
            })]
        })?;
        Ok(Self { leaf, key: Arc::new(key), roots: Arc::new(roots), provider: Arc::new(provider) })
    }

    /// Both configurations, and what keeps the key in them.
    pub(super) fn configs(&self) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>, Showing), ConfigurationError> {
        let (showing, shown) = watch::channel(Some(Arc::clone(&self.key)));
        let shown = Arc::new(Shown(shown));
        let server = self.server(Arc::<Shown>::clone(&shown))?;
        Ok((server, self.dialling(shown)?, Showing(showing)))
    }

    /// Whom the bundle vouches for.
    pub(super) fn authorities(&self) -> Result<Authorities, ConfigurationError> {
        Ok(Authorities { clients: self.clients()?, servers: self.servers() })
    }

    fn clients(&self) -> Result<Arc<dyn ClientCertVerifier>, ConfigurationError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| ConfigurationError(error.to_string()))?;
        Ok(Arc::new(ShortChains(verifier)))
    }

    fn servers(&self) -> ChainVerifier {
        ChainVerifier { roots: Arc::clone(&self.roots), provider: Arc::clone(&self.provider) }
    }

    fn server(&self, shown: Arc<dyn ResolvesServerCert>) -> Result<Arc<ServerConfig>, ConfigurationError> {
        let verifier = self.clients()?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| ConfigurationError(error.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(shown);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Arc::new(config))
    }

    /// For a client, whose keys are not replaced.
    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, ConfigurationError> {
        self.dialling(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))))
    }

    fn dialling(&self, shown: Arc<dyn ResolvesClientCert>) -> Result<Arc<ClientConfig>, ConfigurationError> {
        let verifier = self.servers();
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| ConfigurationError(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(shown);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        // A peer is who its certificate says, never a name that it was dialled by.
        config.enable_sni = false;
        Ok(Arc::new(config))
    }
}

/// The same configurations for QUIC, which does not tell the key exchange: only of a policy that
/// leaves one.
pub struct QuicKeys {
    server: Arc<QuicServerConfig>,
    client: Arc<QuicClientConfig>,
}

impl QuicKeys {
    /// None where `policy` leaves a choice of key exchanges.
    pub(super) fn new(
        policy: KeyExchange,
        server: &Arc<ServerConfig>,
        client: &Arc<ClientConfig>,
    ) -> Result<Option<Self>, ConfigurationError> {
        if policy != KeyExchange::RequireHybrid {
            return Ok(None);
        }
        let unfit = |error: quinn::crypto::rustls::NoInitialCipherSuite| ConfigurationError(error.to_string());
        Ok(Some(Self {
            server: Arc::new(QuicServerConfig::try_from(Arc::clone(server)).map_err(unfit)?),
            client: Arc::new(QuicClientConfig::try_from(Arc::clone(client)).map_err(unfit)?),
        }))
    }

    /// For accepting.
    #[must_use]
    pub fn server(&self) -> &Arc<QuicServerConfig> {
        &self.server
    }

    /// For dialling.
    #[must_use]
    pub fn client(&self) -> &Arc<QuicClientConfig> {
        &self.client
    }
}

/// TLS refuses the combination of keys and policy.
#[derive(Debug, thiserror::Error)]
#[error("cannot be used for TLS: {0}")]
pub(super) struct ConfigurationError(String);

fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_slice_iter(text).take(MAX_CERTIFICATES + 1).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if found.is_empty() => Err("holds no PEM certificate".into()),
        Ok(found) if found.len() > MAX_CERTIFICATES => Err(format!("holds more than {MAX_CERTIFICATES} certificates")),
        Ok(found) => Ok(found),
        Err(error) => Err(format!("is not PEM: {error}")),
    }
}

fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    let mut keys = PrivateKeyDer::pem_slice_iter(text);
    match (keys.next(), keys.next()) {
        (Some(Ok(key)), None) => Ok(key),
        (Some(Ok(mut key)), Some(other)) => {
            key.zeroize();
            if let Ok(mut other) = other {
                other.zeroize();
            }
            Err("holds several private keys, must hold one".into())
        }
        // The parser's error could quote the key.
        (Some(Err(pem::Error::NoItemsFound)), _) | (None, _) => Err("holds no PEM private key".into()),
        (Some(Err(_)), _) => Err("is not PEM".into()),
    }
}

fn roots(authorities: Vec<CertificateDer<'static>>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for (index, authority) in authorities.into_iter().enumerate() {
        roots.add(authority).map_err(|error| format!("certificate {} is not an authority: {error}", index + 1))?;
    }
    Ok(roots)
}

/// Whether a chain leads from a server's leaf to one of `roots`, at `now`. No name is checked.
fn verify_chain(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: UnixTime,
    provider: &CryptoProvider,
) -> Result<(), Error> {
    let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
    verify_leaf(leaf, intermediates, roots, now, provider)
}

fn verify_leaf(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: UnixTime,
    provider: &CryptoProvider,
) -> Result<(), Error> {
    let leaf = ParsedCertificate::try_from(leaf)?;
    let algorithms = provider.signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&leaf, roots, intermediates, now, algorithms)
}

fn describe(error: &Error) -> String {
    use rustls::CertificateError::{
        BadSignature, Expired, ExpiredContext, NotValidYet, NotValidYetContext, UnknownIssuer,
    };
    match error {
        // An authority of the same name with another key shows as a bad signature.
        Error::InvalidCertificate(UnknownIssuer | BadSignature) => "is signed by no authority in tls.ca".to_owned(),
        Error::InvalidCertificate(Expired | ExpiredContext { .. }) => "has expired".to_owned(),
        Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. }) => "is not valid yet".to_owned(),
        error => format!("cannot be used: {error}"),
    }
}

/// The authorities of a bundle, as they judge who has shown a certificate already.
pub(super) struct Authorities {
    clients: Arc<dyn ClientCertVerifier>,
    servers: ChainVerifier,
}

impl Authorities {
    /// Whether a chain that a handshake took still leads to one of them at `unix_ms`. `server`
    /// says whose it is: that of whoever was dialled, or of whoever dialled.
    pub(super) fn vouch(&self, chain: &[CertificateDer<'_>], server: bool, unix_ms: u64) -> bool {
        let now = UnixTime::since_unix_epoch(Duration::from_millis(unix_ms));
        let Some((leaf, intermediates)) = chain.split_first() else { return false };
        if server {
            verify_leaf(leaf, intermediates, &self.servers.roots, now, &self.servers.provider).is_ok()
        } else {
            self.clients.verify_client_cert(leaf, intermediates, now).is_ok()
        }
    }
}

/// Believes a server whose chain leads to the bundle, whatever its name: who it is, the
/// caller compares by the URI SAN.
struct ChainVerifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for ChainVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChainVerifier").field("authorities", &self.roots.len()).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for ChainVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_leaf(end_entity, intermediates, &self.roots, now, &self.provider)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
