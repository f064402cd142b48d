//! A real daemon against clients that it must refuse: what the handshake proves (I-11, G-10),
//! what a frame may be (G-6), and that each refusal is counted. The client is rustls and the
//! core's codec, not the daemon's own.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use overlay_core::control::{Hello, HelloReply, Open, json, parse};
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::TenantId;
use overlay_core::status::ErrorBody;
use overlay_core::{codec, record};
use overlay_tests::http;
use overlay_tests::wait;
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion, version,
};

use crate::local::mesh::{Daemon, LIMIT, Mesh};

static TLS13_ONLY: [&SupportedProtocolVersion; 1] = [&version::TLS13];
static TLS12_ONLY: [&SupportedProtocolVersion; 1] = [&version::TLS12];

const ONE: &str = "apiVersion: overlay.rustyonions.io/v1alpha1
kind: OverlayNode
metadata: {name: one}
spec: {replicas: 1, drain: {delay: 0s, timeout: 1s}}
";

/// One daemon, and the trust that its own replicas would have.
struct Target {
    _mesh: Mesh,
    daemon: Daemon,
    trust: PathBuf,
}

impl Target {
    fn start() -> Result<Self> {
        let mesh = Mesh::start(ONE, &[])?;
        let daemon = mesh.ready()?.remove(0);
        let trust = daemon.socket.with_file_name("trust");
        Ok(Self { _mesh: mesh, daemon, trust })
    }

    fn rejected(&self, reason: &str) -> Result<f64> {
        let metrics = http::get(self.daemon.admin, "/metrics")?.body;
        let label = format!("reason=\"{reason}\"");
        let line = metrics.lines().find(|line| line.starts_with("overlay_rejected_total{") && line.contains(&label));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).with_context(|| format!("no {label} in /metrics"))
    }

    /// Asserts that `refused` moves the counter of `reason` by one.
    fn counts(&self, reason: &str, refused: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.rejected(reason)?;
        refused()?;
        wait::until_true(&format!("overlay_rejected_total of {reason} moved"), LIMIT, || {
            Ok(self.rejected(reason)? == before + 1.0)
        })
    }

    fn token(&self) -> Result<Bytes> {
        Ok(Bytes::from(fs::read_to_string(self.daemon.socket.with_file_name("token"))?.trim().to_owned()))
    }

    /// A session on the Unix socket, HELLO done.
    fn local(&self) -> Result<Wire<UnixStream>> {
        let stream = UnixStream::connect(&self.daemon.socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut wire = Wire { stream, read: BytesMut::new() };
        wire.hello()?;
        Ok(wire)
    }
}

/// OAP/1 over any stream.
struct Wire<S> {
    stream: S,
    read: BytesMut,
}

impl<S: Read + Write> Wire<S> {
    fn send(&mut self, frame: &Frame) -> Result<()> {
        Ok(self.stream.write_all(&codec::encoded(frame)?)?)
    }

    /// The next frame; none where the daemon closed.
    fn receive(&mut self) -> Result<Option<Frame>> {
        let mut chunk = [0; 4_096];
        loop {
            if let Some(frame) = codec::decode(&mut self.read)? {
                return Ok(Some(frame));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(n) => self.read.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn hello(&mut self) -> Result<HelloReply> {
        self.send(&Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 1, json(&Hello::default())))?;
        let answer = self.receive()?.context("the daemon closed instead of answering HELLO")?;
        ensure!(answer.code == 200, "HELLO got {}", answer.code);
        parse(&answer.payload).context("the answer to HELLO")
    }

    /// Sends a START and gives the code that answers it.
    fn start(&mut self, corr_id: u64, open: &Open, cap: Bytes) -> Result<u16> {
        let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), corr_id, json(open));
        self.send(&Frame { cap, ..start })?;
        Ok(self.receive()?.context("the daemon closed")?.code)
    }
}

/// What a client offers.
struct Offer {
    groups: Vec<&'static dyn SupportedKxGroup>,
    versions: &'static [&'static SupportedProtocolVersion],
    certificate: Option<(PathBuf, PathBuf)>,
    alpn: &'static [u8],
}

impl Offer {
    /// Everything that the daemon's own replicas offer.
    fn good(target: &Target) -> Self {
        let certificate = Some((target.trust.join("tls.crt"), target.trust.join("tls.key")));
        Self { groups: vec![kx_group::X25519MLKEM768], versions: &TLS13_ONLY, certificate, alpn: b"ron/oap1" }
    }

    /// Shakes hands and says HELLO: with TLS 1.3 a client learns that its certificate was
    /// refused only from what it reads first.
    fn greet(&self, target: &Target) -> Result<HelloReply> {
        let provider = CryptoProvider { kx_groups: self.groups.clone(), ..default_provider() };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(target.trust.join("ca.crt"))? {
            roots.add(certificate?)?;
        }
        let verifier =
            rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(provider.clone()))
                .build()?;
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(self.versions)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyName(verifier)));
        let mut config = match &self.certificate {
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![self.alpn.to_vec()];
        let stream = TcpStream::connect(target.daemon.address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let session = ClientConnection::new(Arc::new(config), ServerName::try_from("overlay.invalid")?)?;
        Wire { stream: StreamOwned::new(session, stream), read: BytesMut::new() }.hello()
    }

    /// Asserts that the daemon refuses with one of these alerts.
    fn refused(&self, target: &Target, alerts: &[AlertDescription]) -> Result<()> {
        let Err(error) = self.greet(target) else { bail!("the daemon let it in") };
        let alert = error.chain().find_map(|cause| {
            let tls = cause.downcast_ref::<rustls::Error>().or_else(|| {
                let io = cause.downcast_ref::<std::io::Error>()?;
                io.get_ref()?.downcast_ref::<rustls::Error>()
            });
            match tls {
                Some(rustls::Error::AlertReceived(alert)) => Some(*alert),
                _ => None,
            }
        });
        ensure!(alert.is_some_and(|alert| alerts.contains(&alert)), "no alert of {alerts:?}: {error:#}");
        Ok(())
    }
}

/// Checks the daemon's chain and signatures, not its name: identity is the URI SAN.
#[derive(Debug)]
struct AnyName(Arc<rustls::client::WebPkiServerVerifier>);

impl rustls::client::danger::ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        match self.0.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(rustls::client::danger::ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// I-11, G-10: the hybrid key exchange or an alert; TLS 1.3 or an alert; a certificate of
/// this CA or an alert. Each is counted, and none disturbs the next.
#[test]
fn a_handshake_that_proves_less_is_refused() -> Result<()> {
    use AlertDescription as Alert;
    let target = Target::start()?;
    let good = || Offer::good(&target);
    let reply = good().greet(&target)?;
    ensure!(reply.max_frame == 1_048_576 && reply.daemon.is_some_and(|daemon| daemon.name == "one-0"));

    let classical = Offer { groups: vec![kx_group::X25519], ..good() };
    target.counts("tls", || classical.refused(&target, &[Alert::HandshakeFailure]))?;
    let both: Vec<&dyn SupportedKxGroup> = vec![kx_group::X25519, kx_group::X25519MLKEM768];
    Offer { groups: both, ..good() }.greet(&target).context("hybrid among others is taken")?;

    let old = Offer { versions: &TLS12_ONLY, groups: vec![kx_group::X25519], ..good() };
    target.counts("tls", || old.refused(&target, &[Alert::ProtocolVersion, Alert::HandshakeFailure]))?;

    let anonymous = Offer { certificate: None, ..good() };
    target.counts("tls", || anonymous.refused(&target, &[Alert::CertificateRequired]))?;

    let folder = tempfile::tempdir()?;
    let stranger = Offer { certificate: Some(foreign_leaf(folder.path())?), ..good() };
    target
        .counts("tls", || stranger.refused(&target, &[Alert::UnknownCA, Alert::BadCertificate, Alert::DecryptError]))?;

    good().greet(&target).context("after all of them an honest one gets in")?;
    Ok(())
}

/// The policy is the file's, for handshakes to come; a session that is there goes on.
#[test]
fn a_key_exchange_policy_changes_without_a_restart() -> Result<()> {
    let target = Target::start()?;
    let mut session = target.local()?;
    let classical = || Offer { groups: vec![kx_group::X25519], ..Offer::good(&target) };
    target.counts("tls", || classical().refused(&target, &[AlertDescription::HandshakeFailure]))?;

    let file = target.daemon.socket.with_file_name("overlay.toml");
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains("\"RequireHybrid\""), "{text}");
    fs::write(file.with_extension("new"), text.replace("RequireHybrid", "PreferHybrid"))?;
    fs::rename(file.with_extension("new"), &file)?;
    wait::until_true("a classical handshake to be accepted", LIMIT, || Ok(classical().greet(&target).is_ok()))?;
    Offer::good(&target).greet(&target)?;
    ensure!(session.start(3, &Open::Subscribe { topics: vec!["t".parse()?] }, target.token()?)? == 200);
    Ok(())
}

/// A leaf with the daemon's own identity, by a CA of somebody else's.
fn foreign_leaf(folder: &std::path::Path) -> Result<(PathBuf, PathBuf)> {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PKCS_ED25519, SanType};
    let (ca_key, key) = (KeyPair::generate_for(&PKCS_ED25519)?, KeyPair::generate_for(&PKCS_ED25519)?);
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = Issuer::new(ca, ca_key);
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::URI("spiffe://overlay.local/ns/default/overlaynode/one".try_into()?)];
    let (certificate, private) = (folder.join("tls.crt"), folder.join("tls.key"));
    fs::write(&certificate, leaf.signed_by(&key, &issuer)?.pem())?;
    fs::write(&private, key.serialize_pem())?;
    Ok((certificate, private))
}

/// G-6, I-9: one byte over 1 MiB is 413 and counted, by the command that a person types.
#[test]
fn a_byte_over_a_mebibyte_is_413() -> Result<()> {
    let target = Target::start()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("large");
    fs::write(&file, vec![7; (1 << 20) + 1])?;
    target.counts("size", || {
        let output = std::process::Command::new(overlay_tests::programs::built("overlay-daemon")?)
            .args([
                "pub",
                "files",
                "--file",
                &file.to_string_lossy(),
                "--socket",
                &target.daemon.socket.to_string_lossy(),
            ])
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.contains("413"), "{said}");
        Ok(())
    })
}

/// G-1: a length over 1 MiB is refused from the header alone, told, and the session ends.
#[test]
fn a_broken_frame_is_told_and_ends_the_session() -> Result<()> {
    let target = Target::start()?;
    for (header, reason, code) in [("00100001", "size", 413), ("00000025", "protocol", 400)] {
        let mut wire = target.local()?;
        let length = u32::from_str_radix(header, 16)?;
        target.counts(reason, || Ok(wire.stream.write_all(&length.to_be_bytes())?))?;
        let refusal = wire.receive()?.context("it closed without a word")?;
        let body: ErrorBody = serde_json::from_slice(&refusal.payload)?;
        ensure!((refusal.code, body.retryable) == (code, false), "{body:?}");
        ensure!(wire.receive()?.is_none(), "the session ends");
    }
    ensure!(target.local()?.start(3, &Open::Subscribe { topics: vec!["news".parse()?] }, target.token()?)? == 200);
    Ok(())
}

/// P-4: no START without a token; a local client's token is worth nothing over TLS, and a
/// peer's nothing on the Unix socket.
#[test]
fn every_start_needs_its_own_token() -> Result<()> {
    let target = Target::start()?;
    let open = Open::Publish { topic: "news".parse()? };
    let peers = Bytes::from(fs::read(target.trust.join("peer"))?);
    let mut changed = target.token()?.to_vec();
    let last = changed.len() - 1;
    changed[last] = if changed[last] == b'A' { b'B' } else { b'A' };
    let mut wire = target.local()?;
    let cases = [(Bytes::new(), 401), (peers, 401), (Bytes::from(changed), 401), (target.token()?, 200)];
    for (n, (cap, code)) in (1_u64..).zip(cases) {
        let got = wire.start(2 * n + 1, &open, cap)?;
        ensure!(got == code, "token {n}: {got}, not {code}");
    }
    let message = record::Publish::Message("hello".into()).encode();
    wire.send(&Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(0), 9, message))?;
    ensure!(
        wire.receive()?.is_some_and(|answer| answer.code == 200 && answer.payload.len() == 32),
        "accepted, and named"
    );
    Ok(())
}
