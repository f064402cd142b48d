//! T1, T2, T4, T5, T7, T10: what costs a daemon something before anybody has shown who they are.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use overlay_core::codec;
use overlay_core::config::Profile;
use overlay_tests::oap::{Offer, TLS12_ONLY, hello};
use overlay_tests::on_both_profiles;
use overlay_tests::trust::{NODE, ca_params, leaf_params};
use overlay_tests::wait;
use rcgen::{
    CertificateParams, Issuer, KeyPair, PKCS_ED25519, PKCS_RSA_SHA256, PublicKeyData, SanType, SignatureAlgorithm,
};
use rustls::crypto::aws_lc_rs::kx_group;
use rustls::pki_types::CertificateDer;
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{AlertDescription, SignatureScheme};

use crate::probe::{self, Probe};
use crate::target::{Target, is_closed, scale};

// The others end before there is anything that a profile decides.
on_both_profiles!(by crate::probe::run: t1_silence_and_dripped_hellos_end_at_one_deadline, t4_less_than_hybrid_tls13_and_alpn_is_refused);

probe::rows!(
    t2_a_hello_and_then_goodbye_leaves_it_idle,
    t5_expensive_certificates_are_refused_cheaply,
    t7_handshakes_in_mass_are_taken_a_few_at_a_time,
    t10_early_data_opens_nothing,
);

const LIMIT: Duration = Duration::from_secs(60);
/// Who shakes hands honestly.
const HONEST: &str = "spiffe://overlay.test/ns/test/client/honest";

/// Greets again and again from now on, a session each; says how often it was let in.
struct Honest {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize>>,
}

impl Honest {
    fn start(offer: Offer, address: SocketAddr) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut greeted = 0;
            while !stopped.load(Ordering::Relaxed) {
                offer.greet(address).with_context(|| format!("honest handshake {}", greeted + 1))?;
                greeted += 1;
            }
            Ok(greeted)
        });
        Self { stop, thread }
    }

    /// Every one of them was let in.
    fn finish(self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("it panicked"))?
    }
}

fn all_closed(streams: &mut [TcpStream]) -> Result<()> {
    for stream in streams {
        wait::until_true("the daemon to close it", LIMIT, || is_closed(stream))?;
    }
    Ok(())
}

/// T1, P-2: thousands of connections that say nothing, more of them all the time, and hellos a
/// byte at a time. One deadline for the whole handshake ends them all, however they drip;
/// honest handshakes beside them all succeed, each within that same deadline, or the daemon
/// would have closed it.
fn t1_silence_and_dripped_hellos_end_at_one_deadline(profile: Profile) -> Result<()> {
    let count = scale(5_000, 10_000);
    let mut target = Target::start(profile, |_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let mut drip = offer.client_hello()?.into_iter();
    let mut silent = Vec::with_capacity(count);
    for _ in 0..count {
        silent.push(TcpStream::connect(target.address)?);
    }
    let honest = Honest::start(offer, target.address);
    let mut dripping = (0..100).map(|_| TcpStream::connect(target.address)).collect::<Result<Vec<_>, _>>()?;
    // A byte each and one more silent connection a turn, until every dripping one is closed:
    // a deadline a read would never come.
    wait::until_true("hellos a byte at a time to be cut off", LIMIT, || {
        silent.push(TcpStream::connect(target.address)?);
        let Some(byte) = drip.next() else { return Err(anyhow!("a whole hello got through")) };
        let mut open = false;
        for stream in &mut dripping {
            open |= !is_closed(stream)? && stream.write_all(&[byte]).is_ok();
        }
        Ok(!open)
    })?;
    all_closed(&mut silent)?;
    let greeted = honest.finish()?;
    ensure!(greeted > 0);
    println!("t1: {greeted} honest handshakes succeeded beside {} silent connections", silent.len());
    target.until_connections(1)?;
    target.survived(&probe.finish("t1")?)
}

/// T2: a hello and then close_notify (an acceptor that asked such a connection for more spun
/// for ever, and one that does not look at what came with the hello keeps it for its deadline):
/// closed at once, and afterwards the daemon is as idle as it was before.
fn t2_a_hello_and_then_goodbye_leaves_it_idle() -> Result<()> {
    const WINDOW: Duration = Duration::from_secs(1);
    let mut target = Target::start(Profile::Macronode, |_| {})?;
    let probe = Probe::start(&target)?;
    let mut bytes = target.offer(HONEST)?.client_hello()?;
    bytes.extend([21, 3, 3, 0, 2, 1, 0]);
    let timeouts = target.rejected("timeout")?;
    let busy = || -> Result<Duration> {
        let before = target.processor_time()?;
        wait::throughout("the daemon to run", WINDOW, || Ok(true))?;
        Ok(target.processor_time()? - before)
    };
    let before = busy()?;
    for _ in 0..scale(20, 1_000) {
        let mut streams = Vec::new();
        for _ in 0..100 {
            let mut stream = TcpStream::connect(target.address)?;
            stream.write_all(&bytes)?;
            streams.push(stream);
        }
        all_closed(&mut streams)?;
    }
    target.until_connections(1)?;
    let after = busy()?;
    println!("t2: {before:?} of processor time in {WINDOW:?} before, {after:?} after");
    ensure!(after <= before + WINDOW / 10, "it is not idle: {after:?} in {WINDOW:?}");
    ensure!(target.rejected("timeout")? == timeouts, "some were kept until their deadline");
    target.survived(&probe.finish("t2")?)
}

/// T4, I-11, G-10: with hybrid required, an X25519-only hello gets an alert and is counted; so
/// are TLS 1.2, no ALPN and another's ALPN. No group is a way in.
fn t4_less_than_hybrid_tls13_and_alpn_is_refused(profile: Profile) -> Result<()> {
    use AlertDescription as Alert;
    let mut target = Target::start(profile, |_| {})?;
    let (probe, good) = (Probe::start(&target)?, target.offer(HONEST)?);
    let counted = |alerts: &[Alert], offer: Offer| -> Result<()> {
        let (tls, opened) = (target.rejected("tls")?, target.metric("session_open_total")?);
        offer.refused(target.address, alerts)?;
        wait::until_true("the refusal to be counted", LIMIT, || Ok(target.rejected("tls")? == tls + 1.0))?;
        ensure!(target.metric("session_open_total")? == opened);
        Ok(())
    };
    probe.beside(|| {
        for group in [kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1, kx_group::MLKEM768] {
            counted(&[Alert::HandshakeFailure], Offer { groups: vec![group], ..good.clone() })
                .with_context(|| format!("{group:?}"))?;
        }
        let old = Offer { versions: &TLS12_ONLY, groups: vec![kx_group::X25519], ..good.clone() };
        counted(&[Alert::ProtocolVersion, Alert::HandshakeFailure], old)?;
        for alpn in [vec![], vec![b"h2".to_vec()]] {
            // Which alert, if any, is the daemon's choice; that nobody gets in is not.
            let (tls, offer) = (target.rejected("tls")?, Offer { alpn, ..good.clone() });
            ensure!(offer.greet(target.address).is_err(), "let in with ALPN {:?}", offer.alpn);
            wait::until_true("the refusal to be counted", LIMIT, || Ok(target.rejected("tls")? == tls + 1.0))?;
        }
        Ok(())
    })?;
    good.greet(target.address)?;
    target.survived(&probe.finish("t4")?)
}

/// A public key that nobody has the private half of.
struct Rsa(Vec<u8>);

impl Rsa {
    /// PKCS #1: SEQUENCE { modulus, 65537 }.
    fn of_bits(bits: usize) -> Self {
        let mut modulus = vec![0xa5; bits / 8];
        modulus[bits / 8 - 1] |= 1;
        let mut body = der(0x02, &[&[0], &modulus[..]].concat());
        body.extend(der(0x02, &[1, 0, 1]));
        Self(der(0x30, &body))
    }
}

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes();
    let length = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    let mut out = vec![tag];
    if content.len() >= 128 {
        out.push(0x80 | length.len() as u8);
    }
    out.extend(length);
    out.extend(content);
    out
}

impl PublicKeyData for Rsa {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_RSA_SHA256
    }
}

/// Signs with any RSA key, badly.
#[derive(Debug)]
struct Forger {
    bytes: usize,
}

impl SigningKey for Forger {
    fn choose_scheme(&self, _: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        Some(Box::new(Self { bytes: self.bytes }))
    }

    fn algorithm(&self) -> rustls::SignatureAlgorithm {
        rustls::SignatureAlgorithm::RSA
    }
}

impl Signer for Forger {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        Ok(vec![0x17; self.bytes])
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::RSA_PSS_SHA256
    }
}

/// A chain as an attacker makes it: `length` authorities below a CA that calls itself what the
/// real one is called, each with the same name, and a leaf.
fn long_chain(length: usize) -> Result<Vec<CertificateDer<'static>>> {
    let mut issuer = Issuer::new(ca_params(), KeyPair::generate_for(&PKCS_ED25519)?);
    let mut chain = Vec::with_capacity(length + 1);
    for _ in 0..length {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        chain.push(ca_params().signed_by(&key, &issuer)?.der().clone());
        issuer = Issuer::new(ca_params(), key);
    }
    let leaf = leaf_params(NODE)?.signed_by(&KeyPair::generate_for(&PKCS_ED25519)?, &issuer)?;
    chain.push(leaf.der().clone());
    chain.reverse();
    Ok(chain)
}

/// T5: keys, chains and names made to be expensive, by strangers and by one whom the real CA
/// certified: refused and counted, at about the processor time of an honest handshake.
fn t5_expensive_certificates_are_refused_cheaply() -> Result<()> {
    const EACH: usize = 20;
    let mut target = Target::start(Profile::Macronode, |_| {})?;
    let (probe, good) = (Probe::start(&target)?, target.offer(HONEST)?);
    let honest_key = Arc::clone(&good.certificate.as_ref().context("an offer with a certificate")?.key);
    let with = |chain: Vec<CertificateDer<'static>>, key: Arc<dyn SigningKey>| Offer {
        certificate: Some(Arc::new(CertifiedKey::new(chain, key))),
        ..good.clone()
    };
    let names = |count: usize| -> Result<CertificateParams> {
        let mut params = leaf_params(NODE)?;
        for n in 0..count {
            params.subject_alt_names.push(SanType::DnsName(format!("{n:x}").try_into()?));
        }
        Ok(params)
    };
    let rsa = |bits: usize| -> Result<Offer> {
        let leaf = target.authority.issue(&leaf_params(HONEST)?, &Rsa::of_bits(bits))?;
        Ok(with(vec![leaf.der().clone()], Arc::new(Forger { bytes: bits / 8 })))
    };
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    let many = |count| -> Result<Offer> {
        Ok(with(vec![target.authority.issue(&names(count)?, &key)?.der().clone()], Arc::clone(&honest_key)))
    };
    let attacks = [
        ("an 8,192-bit RSA key of the CA's own client", rsa(8_192)?),
        ("a 16,384-bit RSA key of the CA's own client", rsa(16_384)?),
        ("a chain of 3", with(long_chain(3)?, Arc::clone(&honest_key))),
        ("a chain of 10", with(long_chain(10)?, Arc::clone(&honest_key))),
        ("a chain of 100", with(long_chain(100)?, Arc::clone(&honest_key))),
        ("7,000 names, certified", many(7_000)?),
        ("10,000 names, certified", many(10_000)?),
    ];

    // What the probe costs in a second is not the handshakes'.
    let spent = |work: &dyn Fn() -> Result<()>| -> Result<(f64, f64)> {
        let (began, before) = (wait::now(), target.processor_time()?);
        work()?;
        Ok(((target.processor_time()? - before).as_secs_f64(), began.elapsed().as_secs_f64()))
    };
    let (alone, lasted) = spent(&|| wait::throughout("the probe to run", Duration::from_secs(1), || Ok(true)))?;
    let cost = |attempt: &dyn Fn() -> Result<()>| -> Result<f64> {
        let (all, seconds) = spent(&|| (0..EACH).try_for_each(|_| attempt()))?;
        Ok((all - alone / lasted * seconds).max(0.0) / EACH as f64)
    };
    let honest = cost(&|| good.greet(target.address).map(drop))?;
    println!("t5: an honest handshake takes {:.2} ms of processor time", honest * 1e3);
    for (what, offer) in &attacks {
        let counted = target.rejected("tls")?;
        let each = cost(&|| {
            ensure!(offer.greet(target.address).is_err(), "{what} was let in");
            Ok(())
        })?;
        println!("t5: {what}: {:.2} ms, {:.2} times", each * 1e3, each / honest);
        wait::until_true("each refusal to be counted", LIMIT, || Ok(target.rejected("tls")? == counted + EACH as f64))
            .context(*what)?;
        ensure!(each <= 5.0 * honest, "{what} costs {:.1} honest handshakes", each / honest);
    }
    good.greet(target.address)?;
    target.survived(&probe.finish("t5")?)
}

/// Hellos that got the daemon's: its half of the key exchange is done.
fn answered(streams: &[TcpStream]) -> Result<usize> {
    const HANDSHAKE_RECORD: u8 = 22;
    let mut answered = 0;
    for stream in streams {
        stream.set_nonblocking(true)?;
        let mut first = [0];
        answered += usize::from(matches!(stream.peek(&mut first), Ok(1)) && first[0] == HANDSHAKE_RECORD);
    }
    Ok(answered)
}

/// T7, H: of handshakes offered in mass a bounded number is worked on at a time; those past it
/// wait or are refused, and sessions that are there notice nothing.
fn t7_handshakes_in_mass_are_taken_a_few_at_a_time() -> Result<()> {
    const AT_ONCE: usize = 16;
    let count = scale(1_000, 10_000);
    let mut target = Target::start(Profile::Macronode, |config| {
        config.overlay.max_handshakes_in_flight = AT_ONCE as u32;
        // Nobody's is over before all are offered.
        config.overlay.handshake_timeout_ms = scale(30_000, 300_000) as u64;
    })?;
    let probe = Probe::start(&target)?;
    let bytes = target.offer(HONEST)?.client_hello()?;
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = TcpStream::connect(target.address)?;
        // One that was refused at once may be gone by now.
        let _ = stream.write_all(&bytes);
        streams.push(stream);
    }
    wait::until_true("as many to be answered as may be in flight", LIMIT, || Ok(answered(&streams)? >= AT_ONCE))?;
    wait::throughout("no more than that", Duration::from_secs(1), || Ok(answered(&streams)? == AT_ONCE))?;
    println!("t7: {AT_ONCE} of {count} hellos are answered");
    drop(streams);
    target.until_connections(1)?;
    target.offer(HONEST)?.greet(target.address).context("an honest handshake afterwards")?;
    target.survived(&probe.finish("t7")?)
}

/// T10: no early data is taken. The daemon gives no ticket that it could be sent with, and
/// bytes that come ahead of the handshake, announced as early data or not, open nothing.
fn t10_early_data_opens_nothing() -> Result<()> {
    let mut target = Target::start(Profile::Macronode, |_| {})?;
    let (probe, offer) = (Probe::start(&target)?, target.offer(HONEST)?);
    let mut config = offer.config()?;
    config.enable_early_data = true;
    let config = Arc::new(config);
    for _ in 0..2 {
        let mut wire = overlay_tests::oap::connect(Arc::clone(&config), target.address)?;
        ensure!(wire.stream.conn.early_data().is_none(), "a ticket from before offers early data");
        wire.hello()?;
        ensure!(wire.stream.conn.handshake_kind() == Some(rustls::HandshakeKind::Full));
        ensure!(wire.stream.conn.tls13_tickets_received() == 0, "it gave a ticket");
        ensure!(!wire.stream.conn.is_early_data_accepted());
    }
    target.until_connections(1)?;

    let opened = target.metric("session_open_total")?;
    let plain = offer.client_hello()?;
    let oap = codec::encoded(&hello())?;
    let mut record = vec![23, 3, 3];
    record.extend(u16::try_from(oap.len())?.to_be_bytes());
    record.extend(&oap);
    for announced in [false, true] {
        let mut bytes = if announced { with_extension(&plain, 42)? } else { plain.clone() };
        for _ in 0..20 {
            bytes.extend(&record);
        }
        let mut stream = TcpStream::connect(target.address)?;
        stream.write_all(&bytes)?;
        wait::until_true("it to be closed", LIMIT, || is_closed(&mut stream))?;
    }
    target.until_connections(1)?;
    ensure!(target.metric("session_open_total")? == opened, "early data opened a session");
    offer.greet(target.address)?;
    target.survived(&probe.finish("t10")?)
}

/// A ClientHello in one record, with an empty extension more.
fn with_extension(hello: &[u8], number: u16) -> Result<Vec<u8>> {
    // Record header 5, handshake header 4, version 2, random 32, then session id, cipher
    // suites, compression methods, extensions, each behind its length.
    let mut at = 5 + 4 + 2 + 32;
    at += 1 + usize::from(hello[at]);
    at += 2 + usize::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
    at += 1 + usize::from(hello[at]);
    let mut out = hello.to_vec();
    for length in [3, 7, at] {
        let longer = u16::from_be_bytes([out[length], out[length + 1]]) + 4;
        out[length..length + 2].copy_from_slice(&longer.to_be_bytes());
    }
    // In front of the others: a pre_shared_key would have to be the last.
    let extension = [&number.to_be_bytes()[..], &[0, 0]].concat();
    out.splice(at + 2..at + 2, extension);
    ensure!(usize::from(u16::from_be_bytes([out[3], out[4]])) + 5 == out.len(), "one record");
    Ok(out)
}
