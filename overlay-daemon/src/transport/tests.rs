//! Real handshakes over loopback: who is let in, and what the others are told.

use std::sync::Arc;

use overlay_core::config::KeyExchange;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, HandshakeKind, SignatureScheme, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::pending::Pending;
use super::*;
use crate::clock::Clock;
use crate::kms::authority::{Authority, LeafOptions, NODE, TokenRoot, Volume};
use crate::kms::{Keys, client_config};

pub(crate) const CONFIG: TransportConfig = TransportConfig {
    handshake: Duration::from_secs(3),
    read: Duration::from_secs(5),
    write: Duration::from_secs(5),
    idle: Duration::from_secs(15),
    max_handshakes_in_flight: 64,
    max_pending: 4_096,
    max_reading: 32 << 20,
    decompression_ratio: overlay_core::compress::MAX_RATIO,
};

/// Keys that `authority` vouches for, with a leaf of `options`.
pub(crate) fn keys(authority: &Authority, policy: KeyExchange) -> Keys {
    let volume = Volume::new(&Volume::files(authority, &TokenRoot::new(), LeafOptions::default()));
    let (tls, token) = volume.config(policy);
    Keys::load(&tls, &token, Clock::start().unix_ms()).unwrap()
}

/// The daemon's own way to dial.
pub(super) fn client(authority: &Authority, policy: KeyExchange) -> Arc<ClientConfig> {
    let volume = Volume::new(&Volume::files(authority, &TokenRoot::new(), LeafOptions::default()));
    client_config(&volume.config(policy).0, Clock::start().unix_ms()).unwrap().0
}

/// A client that checks nothing and shows whatever it is given.
fn stranger(
    leaf: Option<(String, String)>,
    versions: &[&'static SupportedProtocolVersion],
    alpn: &[&[u8]],
) -> Arc<ClientConfig> {
    use rustls::pki_types::PrivateKeyDer;
    use rustls::pki_types::pem::PemObject;
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous));
    let mut config = match leaf {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// What a connection came to at either end: the server's identity for its peer, its group and
/// the handshake's kind; at the client, the last thing that it read or was told.
type Outcome = (Result<(String, KeyExchangeGroup, Option<HandshakeKind>), HandshakeError>, Result<(), String>);

/// One connection, until a byte has arrived at the client or it has been told why not.
async fn connect(server: &Keys, client: &Arc<ClientConfig>) -> Outcome {
    let clock = Clock::start();
    let mut listener =
        Listener::bind("127.0.0.1:0".parse().unwrap(), CONFIG, Descriptors::of(1_024), clock).await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async {
        let mut accepted = listener.accept().await.unwrap().handshake(&server.current()).await?;
        accepted.stream.write_all(b"x").await.unwrap();
        accepted.stream.flush().await.unwrap();
        let kind = match &accepted.stream {
            Stream::Tcp(stream) => stream.get_ref().1.handshake_kind(),
            Stream::Quic(_) => None,
        };
        Ok((accepted.peer.to_string(), accepted.group, kind))
    };
    let dial = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("overlay.invalid").unwrap();
        let told = |error: std::io::Error| error.to_string();
        let mut stream = tokio_rustls::TlsConnector::from(Arc::clone(client)).connect(name, tcp).await.map_err(told)?;
        stream.read_u8().await.map(|_| ()).map_err(told)
    };
    tokio::join!(accept, dial)
}

/// I-11, G-10: the groups that each pair of policies agrees on, or that it does not.
#[tokio::test]
async fn key_exchange_follows_the_policies() {
    use KeyExchange::{Classical, PreferHybrid, RequireHybrid};
    let authority = Authority::new();
    let (hybrid, classical) = (Some(KeyExchangeGroup::Hybrid), Some(KeyExchangeGroup::Classical));
    for (server, dialler, want) in [
        (RequireHybrid, RequireHybrid, hybrid),
        (RequireHybrid, PreferHybrid, hybrid),
        (RequireHybrid, Classical, None),
        (PreferHybrid, RequireHybrid, hybrid),
        (PreferHybrid, PreferHybrid, hybrid),
        (PreferHybrid, Classical, classical),
        (Classical, RequireHybrid, None),
        (Classical, PreferHybrid, classical),
        (Classical, Classical, classical),
    ] {
        let case = format!("{server:?} accepts {dialler:?}");
        match (connect(&keys(&authority, server), &client(&authority, dialler)).await, want) {
            ((Ok((peer, group, _)), Ok(())), Some(want)) => assert_eq!((peer.as_str(), group), (NODE, want), "{case}"),
            ((Err(error), Err(told)), None) => {
                assert_eq!(error.reason(), Some(Reason::Tls), "{case}: {error}");
                assert!(told.contains("HandshakeFailure"), "{case}: {told}");
            }
            (outcome, _) => panic!("{case}: {outcome:?}"),
        }
    }
}

/// Every way not to be let in: counted as `tls`, and told so where TLS can.
#[tokio::test]
async fn strangers_are_refused() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let server = keys(&authority, KeyExchange::RequireHybrid);
    let tls13 = &[&rustls::version::TLS13];
    let tls12 = &[&rustls::version::TLS12];
    let oap1: &[&[u8]] = &[ALPN];
    let leaf = |options| Some(authority.leaf(options));
    let good = || leaf(LeafOptions::default());
    let server_only = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let twice = [NODE, "spiffe://overlay.local/ns/a/overlaynode/other"];
    let table = [
        ("TLS 1.2", stranger(good(), tls12, oap1), "ProtocolVersion"),
        ("no client certificate", stranger(None, tls13, oap1), "CertificateRequired"),
        ("another authority's", stranger(Some(foreign.leaf(LeafOptions::default())), tls13, oap1), "DecryptError"),
        (
            "expired",
            stranger(leaf(LeafOptions { until_year: 2020, ..Default::default() }), tls13, oap1),
            "CertificateExpired",
        ),
        ("not for clients", stranger(leaf(LeafOptions { usages: server_only, ..Default::default() }), tls13, oap1), ""),
        ("no identity", stranger(leaf(LeafOptions { uris: &[], ..Default::default() }), tls13, oap1), ""),
        ("two identities", stranger(leaf(LeafOptions { uris: &twice, ..Default::default() }), tls13, oap1), ""),
        ("no ALPN", stranger(good(), tls13, &[]), ""),
        ("another ALPN", stranger(good(), tls13, &[b"h2"]), ""),
    ];
    for (case, client, alert) in table {
        let (accepted, told) = connect(&server, &client).await;
        let error = accepted.expect_err(case);
        assert_eq!(error.reason(), Some(Reason::Tls), "{case}: {error}");
        let told = told.expect_err(case);
        assert!(told.contains(alert), "{case}: {told}");
    }
    let (accepted, told) = connect(&server, &stranger(good(), tls13, oap1)).await;
    assert!(accepted.is_ok() && told.is_ok(), "the same client, with nothing wrong: {accepted:?} {told:?}");
}

/// A daemon believes no server that its own bundle does not vouch for.
#[tokio::test]
async fn a_dial_refuses_another_authority() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let server = keys(&foreign, KeyExchange::RequireHybrid);
    let (accepted, told) = connect(&server, &client(&authority, KeyExchange::RequireHybrid)).await;
    assert_eq!(accepted.unwrap_err().reason(), Some(Reason::Tls));
    assert!(told.unwrap_err().contains("BadSignature"));
}

/// No session is ever resumed, however willing the client.
#[tokio::test]
async fn nothing_is_resumed() {
    let authority = Authority::new();
    let server = keys(&authority, KeyExchange::RequireHybrid);
    let willing = stranger(Some(authority.leaf(LeafOptions::default())), &[&rustls::version::TLS13], &[ALPN]);
    for _ in 0..2 {
        let (accepted, _) = connect(&server, &willing).await;
        assert_ne!(accepted.unwrap().2, Some(HandshakeKind::Resumed));
    }
    assert_eq!(server.current().server().send_tls13_tickets, 0);
}

#[tokio::test]
async fn a_dial_ends_in_a_connection_or_names_the_address() {
    let authority = Authority::new();
    let (server, clock) = (keys(&authority, KeyExchange::RequireHybrid), Clock::start());
    let tls = client(&authority, KeyExchange::RequireHybrid);
    let mut listener =
        Listener::bind("127.0.0.1:0".parse().unwrap(), CONFIG, Descriptors::of(1_024), clock).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accept = async { listener.accept().await.unwrap().handshake(&server.current()).await };
    let (accepted, dialled) = tokio::join!(accept, dial(&address, &tls, &CONFIG, clock));
    let (accepted, dialled) = (accepted.unwrap(), dialled.unwrap());
    assert_eq!((accepted.peer.as_str(), dialled.peer.as_str()), (NODE, NODE));
    assert_eq!((accepted.group, dialled.group), (KeyExchangeGroup::Hybrid, KeyExchangeGroup::Hybrid));
    assert_eq!(dialled.peer_not_after_ms / 1_000, 13_569_465_600, "the leaf's end, 2400-01-01");
    drop(listener);
    let error = dial(&address, &tls, &CONFIG, clock).await.unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot connect to {address}: ")), "{error}");
}

/// One deadline for all of it, from the accept on. Time is paused: nothing here waits.
#[tokio::test(start_paused = true)]
async fn the_silent_are_closed_at_the_deadline() {
    let server = keys(&Authority::new(), KeyExchange::RequireHybrid);
    let mut listener =
        Listener::bind("127.0.0.1:0".parse().unwrap(), CONFIG, Descriptors::of(1_024), Clock::start()).await.unwrap();
    for said in [&b""[..], &[0x16, 3, 1, 0, 0x80, 1][..]] {
        let mut silent = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        silent.write_all(said).await.unwrap();
        let accepted = listener.accept().await.unwrap();
        assert_eq!(listener.pending().len(), 1);
        let keys = server.current();
        let handshake = accepted.handshake(&keys);
        // The design allows a silent connection 1 KiB beside its descriptor.
        assert!(size_of_val(&handshake) <= 1_024, "{}", size_of_val(&handshake));
        let error = handshake.await.unwrap_err();
        assert!(matches!(error, HandshakeError::Timeout), "{error}");
        assert_eq!((error.reason(), listener.pending().len()), (Some(Reason::Timeout), 0));
        assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or(0), 0, "closed");
    }
}

#[tokio::test]
async fn what_is_not_tls_is_refused_and_what_leaves_is_not() {
    let server = keys(&Authority::new(), KeyExchange::RequireHybrid);
    let mut listener =
        Listener::bind("127.0.0.1:0".parse().unwrap(), CONFIG, Descriptors::of(1_024), Clock::start()).await.unwrap();
    for (said, want) in [(&b"GET / HTTP/1.1\r\n\r\n"[..], Some(Reason::Tls)), (&b""[..], None)] {
        let mut caller = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        caller.write_all(said).await.unwrap();
        caller.shutdown().await.unwrap();
        let error = listener.accept().await.unwrap().handshake(&server.current()).await.unwrap_err();
        assert_eq!(error.reason(), want, "{error}");
    }
}

/// Past the bound the oldest silent connection makes room, and no other.
#[tokio::test]
async fn the_oldest_silent_connection_makes_room() {
    let (pending, descriptors) = (Pending::default(), Descriptors::of(64));
    let enter = || pending.enter(2, descriptors.take()).unwrap();
    let (mut first, second) = (enter(), enter());
    drop(second);
    let mut third = enter();
    assert_eq!(pending.len(), 2);
    let _fourth = enter();
    assert_eq!(pending.len(), 2);
    first.evicted().await;
    drop(first);
    assert_eq!(pending.len(), 2, "the place of the first is the fourth's now");
    let kept = tokio::select! { biased; () = third.evicted() => false, () = std::future::ready(()) => true };
    assert!(kept);
}

#[tokio::test]
async fn a_unix_socket_is_its_owners() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("overlay.sock");
    let bind = || LocalListener::bind(&path, &[], CONFIG, Descriptors::of(1_024), Clock::start());
    let mut listener = bind().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(matches!(bind(), Err(LocalError::InUse(_))), "somebody answers");
    let _waiting = listener.accept().await.unwrap();

    let (client, accepted) = tokio::join!(tokio::net::UnixStream::connect(&path), listener.accept());
    assert!(client.is_ok());
    assert_eq!(accepted.unwrap().uid, rustix::process::geteuid().as_raw());

    drop(listener);
    assert!(!path.exists(), "the file goes with its listener");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let stale = std::fs::symlink_metadata(&path).unwrap();
    let listener = bind().expect("nobody answers on the stale socket");
    drop((listener, stale));

    std::fs::write(&path, "not a socket").unwrap();
    assert!(matches!(bind(), Err(LocalError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"not a socket");
    let nowhere = LocalListener::bind(
        &folder.path().join("no/overlay.sock"),
        &[],
        CONFIG,
        Descriptors::of(1_024),
        Clock::start(),
    );
    assert!(matches!(nowhere, Err(LocalError::Bind { .. })));
}

/// S3: without a descriptor left, the oldest silent connection makes room; what has spoken never
/// does, and the newcomer is turned away.
#[tokio::test]
async fn s3_descriptors_are_taken_from_the_silent_alone() {
    let (pending, descriptors) = (Pending::default(), Descriptors::of(2));
    let mut silent = pending.enter(10, descriptors.take()).unwrap();
    assert!(descriptors.take().is_none());
    let speaks = pending.enter(10, None).expect("the silent one's");
    silent.evicted().await;
    let descriptor = speaks.leave().unwrap();
    assert!(silent.leave().is_none() && pending.enter(10, None).is_none());
    drop(descriptor);
    assert!(pending.enter(10, descriptors.take()).is_some());
}

/// S3: a caller past what descriptors allow is closed at once, is no failure of accepting, and
/// the next is let in as soon as there is room.
#[tokio::test]
async fn s3_past_the_descriptors_callers_are_closed_and_later_ones_let_in() {
    let descriptors = Descriptors::of(2);
    let held = descriptors.take().unwrap();
    let mut listener =
        Listener::bind("127.0.0.1:0".parse().unwrap(), CONFIG, descriptors, Clock::start()).await.unwrap();
    let address = listener.local_addr().unwrap();
    for _ in 0..100 {
        let mut caller = TcpStream::connect(address).await.unwrap();
        let error = listener.accept().await.err().expect("no descriptor");
        assert!(matches!(error, AcceptError::Crowded) && !error.is_failure());
        assert_eq!(caller.read(&mut [0; 1]).await.unwrap_or(0), 0, "closed");
    }
    drop(held);
    let _caller = TcpStream::connect(address).await.unwrap();
    assert!(listener.accept().await.is_ok());
}

/// T7: past the handshakes under way and those that wait, the rest is refused at once, not at
/// its deadline.
#[tokio::test]
async fn t7_handshakes_that_wait_are_bounded() {
    let authority = Authority::new();
    let (server, clock) = (keys(&authority, KeyExchange::RequireHybrid), Clock::start());
    let config = TransportConfig { handshake: Duration::from_secs(600), max_handshakes_in_flight: 1, ..CONFIG };
    let mut listener =
        Listener::bind("127.0.0.1:0".parse().unwrap(), config, Descriptors::of(1_024), clock).await.unwrap();
    let address = listener.local_addr().unwrap();
    let name = ServerName::try_from("overlay.invalid").unwrap();
    let mut tls = rustls::ClientConnection::new(client(&authority, KeyExchange::RequireHybrid), name).unwrap();
    let mut hello = Vec::new();
    tls.write_tls(&mut hello).unwrap();
    let (mut callers, mut handshakes) = (Vec::new(), tokio::task::JoinSet::new());
    let key_set = server.current();
    for _ in 0..20 {
        let mut caller = TcpStream::connect(address).await.unwrap();
        caller.write_all(&hello).await.unwrap(); // and nothing more, ever
        callers.push(caller);
        let (accepted, keys) = (listener.accept().await.unwrap(), Arc::clone(&key_set));
        handshakes.spawn(async move { accepted.handshake(&keys).await });
    }
    for _ in 0..3 {
        let error = handshakes.join_next().await.unwrap().unwrap().unwrap_err();
        assert!(matches!(error, HandshakeError::Busy) && error.reason() == Some(Reason::Overflow), "{error}");
    }
    assert_eq!(handshakes.len(), 17, "one under way, sixteen that wait");
}
