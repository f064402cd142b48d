//! An OAP/1 client for tests: rustls and the core's codec over blocking sockets, nothing of
//! the daemon's own. It can be made to offer, show and send whatever a server must refuse;
//! what the answers should be is for its callers.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use overlay_core::codec;
use overlay_core::config::Transport;
use overlay_core::control::{Hello, HelloReply, Open, json, parse};
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::TenantId;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme,
    StreamOwned, SupportedProtocolVersion, version,
};

use crate::quic;

/// For an answer that is expected to come.
const ANSWER: Duration = Duration::from_secs(30);
/// TLS 1.3 alone: what the daemon speaks.
pub static TLS13_ONLY: [&SupportedProtocolVersion; 1] = [&version::TLS13];
/// TLS 1.2 alone.
pub static TLS12_ONLY: [&SupportedProtocolVersion; 1] = [&version::TLS12];

/// A stream of bytes, whatever carries it.
pub trait Bytestream: Read + Write + Send {}

impl<T: Read + Write + Send> Bytestream for T {}

/// OAP/1 over any transport.
pub type Any = Wire<Box<dyn Bytestream>>;

/// What one look at a connection found.
#[derive(Debug)]
pub enum Heard {
    /// A frame.
    Frame(Frame),
    /// Nothing within the socket's read timeout.
    Nothing,
    /// The other side closed.
    Closed,
}

/// OAP/1 over any stream.
#[derive(Debug)]
pub struct Wire<S> {
    /// The stream, for those who want to send what is not a frame.
    pub stream: S,
    read: BytesMut,
}

/// OAP/1 over TLS.
pub type Tls = Wire<StreamOwned<ClientConnection, TcpStream>>;

impl<S: Read + Write> Wire<S> {
    /// Over a stream on which nothing was said yet.
    pub fn new(stream: S) -> Self {
        Self { stream, read: BytesMut::new() }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// It is none, or the connection is gone.
    pub fn send(&mut self, frame: &Frame) -> Result<()> {
        Ok(self.stream.write_all(&codec::encoded(frame)?)?)
    }

    /// The next frame, if it comes within the socket's read timeout.
    ///
    /// # Errors
    /// TLS or QUIC failed, or what came is no frame.
    pub fn poll(&mut self) -> Result<Heard> {
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some(frame) = codec::decode(&mut self.read)? {
                return Ok(Heard::Frame(frame));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(Heard::Closed),
                Ok(n) => self.read.extend_from_slice(&chunk[..n]),
                Err(error) if is_silence(&error) => return Ok(Heard::Nothing),
                Err(error) if is_end(&error) => return Ok(Heard::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next frame; none where the daemon closed.
    ///
    /// # Errors
    /// None came in time, or as [`Self::poll`].
    pub fn receive(&mut self) -> Result<Option<Frame>> {
        match self.poll()? {
            Heard::Frame(frame) => Ok(Some(frame)),
            Heard::Closed => Ok(None),
            Heard::Nothing => bail!("no frame came in time"),
        }
    }

    /// HELLO and its answer.
    ///
    /// # Errors
    /// Any other answer.
    pub fn hello(&mut self) -> Result<HelloReply> {
        self.send(&hello())?;
        let answer = self.receive()?.context("the daemon closed instead of answering HELLO")?;
        ensure!(answer.code == 200, "HELLO got {}", answer.code);
        parse(&answer.payload).context("the answer to HELLO")
    }

    /// Sends a START and gives the code that answers it.
    ///
    /// # Errors
    /// The daemon closed.
    pub fn start(&mut self, corr_id: u64, open: &Open, cap: Bytes) -> Result<u16> {
        self.send(&start(corr_id, open, cap))?;
        Ok(self.receive()?.context("the daemon closed")?.code)
    }
}

impl Wire<UnixStream> {
    /// A session on the Unix socket, HELLO done.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn local(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut wire = Self::new(stream);
        wire.hello()?;
        Ok(wire)
    }
}

fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Whether a read's or write's error only says that the other side is gone.
#[must_use]
pub fn is_end(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    let tls = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
    let gone = matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof);
    gone && !tls
}

/// The first frame of a session.
#[must_use]
pub fn hello() -> Frame {
    Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 1, json(&Hello::default()))
}

/// A START of protocol 1, tenant 0.
#[must_use]
pub fn start(corr_id: u64, open: &Open, cap: Bytes) -> Frame {
    let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), corr_id, json(open));
    Frame { cap, ..start }
}

/// A frame of a stream that a START of protocol 1, tenant 0, opened.
#[must_use]
pub fn request(corr_id: u64, flags: Flags, payload: Bytes) -> Frame {
    Frame::new(Flags::REQ | flags, AppProto::PUBSUB, TenantId(0), corr_id, payload)
}

/// What a client offers in its handshake. [`Offer::honest`] has all that a daemon wants; each
/// field may be changed to less, or to something else.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Key exchange groups.
    pub groups: Vec<&'static dyn SupportedKxGroup>,
    /// TLS versions.
    pub versions: &'static [&'static SupportedProtocolVersion],
    /// The certificates shown, and what signs for them: nothing checks that they fit.
    pub certificate: Option<Arc<CertifiedKey>>,
    /// Application protocols.
    pub alpn: Vec<Vec<u8>>,
    /// Whom the client believes.
    pub roots: Arc<RootCertStore>,
}

impl Offer {
    /// All that a daemon wants.
    ///
    /// # Errors
    /// `ca` is no CA's certificate.
    pub fn honest(ca: &CertificateDer<'_>, certificate: Arc<CertifiedKey>) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        Ok(Self {
            groups: vec![kx_group::X25519MLKEM768],
            versions: &TLS13_ONLY,
            certificate: Some(certificate),
            alpn: vec![b"ron/oap1".to_vec()],
            roots: Arc::new(roots),
        })
    }

    /// The same by a daemon's trust folder: `ca.crt`, and a leaf in `tls.crt` and `tls.key`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn of_folder(trust: &Path) -> Result<Self> {
        let leaf = certified(&trust.join("tls.crt"), &trust.join("tls.key"))?;
        Self::honest(&CertificateDer::from_pem_file(trust.join("ca.crt"))?, leaf)
    }

    /// As rustls has it.
    ///
    /// # Errors
    /// rustls refuses the combination.
    pub fn config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(CryptoProvider { kx_groups: self.groups.clone(), ..default_provider() });
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&provider)).build()?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyName(verifier)));
        let mut config = match &self.certificate {
            Some(certificate) => {
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certificate))))
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols.clone_from(&self.alpn);
        Ok(config)
    }

    /// Connects; TLS begins with the first byte that is sent or awaited.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(&self, address: SocketAddr) -> Result<Tls> {
        connect(Arc::new(self.config()?), address)
    }

    /// Shakes hands and says HELLO: with TLS 1.3 a client learns that its certificate was
    /// refused only from what it reads first.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn greet(&self, address: SocketAddr) -> Result<(Tls, HelloReply)> {
        let mut wire = self.connect(address)?;
        let reply = wire.hello()?;
        Ok((wire, reply))
    }

    /// The same over a transport of the caller's choice.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn greet_over(&self, transport: Transport, address: SocketAddr) -> Result<(Any, HelloReply)> {
        let stream: Box<dyn Bytestream> = match transport {
            // Who comes by an onion service arrives as its tor's TCP connection.
            Transport::Tcp | Transport::Tor => Box::new(self.connect(address)?.stream),
            Transport::Quic => Box::new(quic::connect(self.config()?, address, ANSWER)?),
        };
        let mut wire = Wire::new(stream);
        let reply = wire.hello()?;
        Ok((wire, reply))
    }

    /// Asserts that the daemon refuses with one of these alerts.
    ///
    /// # Errors
    /// It let the client in, or did anything else.
    pub fn refused(&self, address: SocketAddr, alerts: &[AlertDescription]) -> Result<()> {
        self.refused_over(Transport::Tcp, address, alerts)
    }

    /// The same over a transport of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::refused`].
    pub fn refused_over(&self, transport: Transport, address: SocketAddr, alerts: &[AlertDescription]) -> Result<()> {
        let Err(error) = self.greet_over(transport, address) else { bail!("the daemon let it in") };
        let alert = alert_of(&error);
        ensure!(alert.is_some_and(|alert| alerts.contains(&alert)), "no alert of {alerts:?}: {error:#}");
        Ok(())
    }

    /// The bytes of a whole ClientHello.
    ///
    /// # Errors
    /// rustls refuses the combination.
    pub fn client_hello(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        ClientConnection::new(Arc::new(self.config()?), server_name()?)?.write_tls(&mut bytes)?;
        Ok(bytes)
    }
}

/// [`Offer::connect`] for many connections of one configuration.
///
/// # Errors
/// Nobody listens.
pub fn connect(config: Arc<ClientConfig>, address: SocketAddr) -> Result<Tls> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    Ok(Wire::new(StreamOwned::new(ClientConnection::new(config, server_name()?)?, stream)))
}

/// The alert that a connection ended with.
#[must_use]
pub fn alert_of(error: &anyhow::Error) -> Option<AlertDescription> {
    error.chain().find_map(|cause| {
        let inner = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let lost = cause.downcast_ref().or_else(|| inner?.downcast_ref());
        if let Some(lost) = lost {
            return quic::alert_of(lost);
        }
        let tls = cause.downcast_ref::<rustls::Error>().or_else(|| {
            let io = cause.downcast_ref::<io::Error>()?;
            io.get_ref()?.downcast_ref::<rustls::Error>()
        });
        match tls {
            Some(rustls::Error::AlertReceived(alert)) => Some(*alert),
            _ => None,
        }
    })
}

/// A certificate chain and its key, from PEM files.
///
/// # Errors
/// A file cannot be read.
pub fn certified(certificate: &Path, key: &Path) -> Result<Arc<CertifiedKey>> {
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::new(CertifiedKey::from_der(chain, PrivateKeyDer::from_pem_file(key)?, &default_provider())?))
}

fn server_name() -> Result<ServerName<'static>> {
    Ok(ServerName::try_from("overlay.invalid")?)
}

/// Checks the daemon's chain and signatures, not its name: identity is the URI SAN.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        match self.0.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
