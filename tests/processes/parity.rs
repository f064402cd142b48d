//! The session suite: what a session is to its clients and peers, over every transport and in both
//! profiles. `table` runs each of its tests for each pair, so that a row that is missing shows
//! as a test that is missing.

use std::fs;
use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use overlay_core::config::{DaemonConfig, Profile, Transport};
use overlay_core::control::{HelloReply, Open};
use overlay_core::frame::Flags;
use overlay_core::grant::Claims;
use overlay_core::record::{Publish, Record};
use overlay_core::status::ErrorBody;
use overlay_tests::daemon::Daemon;
use overlay_tests::files::replace;
use overlay_tests::oap::{Any, Offer, TLS12_ONLY, request};
use overlay_tests::profile::amnesia;
use overlay_tests::trust::{Authority, NODE};
use overlay_tests::{http, wait};
use rustix::process::Signal;
use rustls::AlertDescription;
use rustls::crypto::SupportedKxGroup;
use rustls::crypto::aws_lc_rs::kx_group;

use crate::local::mesh::{self, LIMIT, Mesh};

/// Who publishes and subscribes.
const CLIENT: &str = "spiffe://overlay.test/ns/test/client/parity";

/// What a test runs over.
#[derive(Clone, Copy)]
struct Case {
    profile: Profile,
    transport: Transport,
}

impl Case {
    /// The line of `/metrics` that says so many sessions by the hybrid key exchange.
    fn active(self, sessions: u32) -> String {
        let amnesia = amnesia(self.profile);
        format!("overlay_sessions_active{{group=\"hybrid\",amnesia=\"{amnesia}\"}} {sessions}\n")
    }
}

/// Transport × profile × test.
macro_rules! table {
    ($($test:ident: $($column:ident $transport:ident),+;)+) => {$(
        mod $test {$(
            mod $column {
                use overlay_core::config::{Profile, Transport};

                use crate::parity::Case;

                #[test]
                fn micronode() -> anyhow::Result<()> {
                    crate::parity::$test(Case { profile: Profile::Micronode, transport: Transport::$transport })
                }

                #[test]
                fn macronode() -> anyhow::Result<()> {
                    crate::parity::$test(Case { profile: Profile::Macronode, transport: Transport::$transport })
                }
            }
        )+}
    )+};
}

// What an onion service forwards is Tor's listener's matter here; daemons that are peers through a
// network of relays are in `tests/tor`.
table!(
    a_handshake_that_proves_less_is_refused: tcp Tcp, quic Quic, tor Tor;
    a_session_is_named_by_its_transport: tcp Tcp, quic Quic, tor Tor;
    every_start_needs_its_own_token: tcp Tcp, quic Quic, tor Tor;
    what_is_published_is_delivered: tcp Tcp, quic Quic, tor Tor;
    a_byte_over_a_mebibyte_is_413: tcp Tcp, quic Quic, tor Tor;
    a_broken_frame_is_told_and_ends_the_session: tcp Tcp, quic Quic, tor Tor;
    silence_ends_a_session: tcp Tcp, quic Quic, tor Tor;
    s1_a_reader_that_takes_nothing_is_dropped: tcp Tcp, quic Quic, tor Tor;
    k1_a_token_that_dies_ends_its_stream_alone: tcp Tcp, quic Quic, tor Tor;
    t6_keys_change_and_sessions_stay: tcp Tcp, quic Quic, tor Tor;
    what_was_accepted_is_delivered_when_it_stops: tcp Tcp, quic Quic, tor Tor;
    peers_carry_messages_and_files: tcp Tcp, quic Quic;
    a_killed_peer_comes_back: tcp Tcp, quic Quic;
);

/// A daemon that accepts sessions over the transport.
struct Target {
    case: Case,
    daemon: Daemon,
}

impl Target {
    fn start(case: Case) -> Result<Self> {
        Self::start_with(case, 15_000, |_| {})
    }

    fn start_with(case: Case, idle_timeout_ms: u64, change: impl FnOnce(&mut DaemonConfig)) -> Result<Self> {
        let daemon = Daemon::start(case.profile, |config| {
            config.overlay.idle_timeout_ms = idle_timeout_ms;
            config.tor.idle_timeout_ms = idle_timeout_ms;
            config.tor.listen = (case.transport == Transport::Tor).then_some(config.overlay.listen);
            config.overlay.listen_quic = (case.transport == Transport::Quic).then_some(config.overlay.listen);
            change(config);
        })?;
        Ok(Self { case, daemon })
    }

    /// Asserts that `refused` moves the counter of `reason` by one.
    fn counts(&self, reason: &str, refused: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.daemon.rejected(reason)?;
        refused()?;
        wait::until_true(&format!("overlay_rejected_total of {reason} moved"), LIMIT, || {
            Ok(self.daemon.rejected(reason)? == before + 1.0)
        })
    }

    fn greet(&self, offer: &Offer) -> Result<(Any, HelloReply)> {
        offer.greet_over(self.case.transport, self.daemon.listens(self.case.transport)?)
    }

    /// A session of an honest client.
    fn client(&self) -> Result<Any> {
        Ok(self.greet(&self.daemon.offer(CLIENT)?)?.0)
    }

    /// Asserts that it refuses, with one of these alerts, and counts it.
    fn refuses(&self, offer: &Offer, alerts: &[AlertDescription]) -> Result<()> {
        let Case { transport, .. } = self.case;
        self.counts("tls", || offer.refused_over(transport, self.daemon.listens(transport)?, alerts))
    }
}

/// I-11, G-10: the hybrid key exchange or an alert; TLS 1.3 or an alert; a certificate of
/// this CA or an alert. Each is counted, and none disturbs the next.
fn a_handshake_that_proves_less_is_refused(case: Case) -> Result<()> {
    use AlertDescription as Alert;
    let mut target = Target::start(case)?;
    let good = target.daemon.offer(CLIENT)?;
    let (_, reply) = target.greet(&good)?;
    ensure!(reply.max_frame == 1_048_576 && reply.daemon.is_some_and(|daemon| daemon.name == "target"));
    ensure!(reply.transports.contains(&case.transport.label().to_owned()), "{:?}", reply.transports);

    let classical = Offer { groups: vec![kx_group::X25519], ..good.clone() };
    target.refuses(&classical, &[Alert::HandshakeFailure])?;
    let both: Vec<&dyn SupportedKxGroup> = vec![kx_group::X25519, kx_group::X25519MLKEM768];
    target.greet(&Offer { groups: both, ..good.clone() }).context("hybrid among others is taken")?;

    // QUIC itself speaks no other version of TLS.
    if case.transport != Transport::Quic {
        let old = Offer { versions: &TLS12_ONLY, groups: vec![kx_group::X25519], ..good.clone() };
        target.refuses(&old, &[Alert::ProtocolVersion, Alert::HandshakeFailure])?;
    }
    target.refuses(&Offer { certificate: None, ..good.clone() }, &[Alert::CertificateRequired])?;
    let stranger = Offer { certificate: Some(Authority::new()?.leaf(NODE)?), ..good.clone() };
    target.refuses(&stranger, &[Alert::UnknownCA, Alert::BadCertificate, Alert::DecryptError])?;
    let other = Offer { alpn: vec![b"h3".to_vec()], ..good.clone() };
    let Case { transport, .. } = case;
    target.counts("tls", || {
        ensure!(other.greet_over(transport, target.daemon.listens(transport)?).is_err(), "another protocol got in");
        Ok(())
    })?;

    target.greet(&good).context("after all of them an honest one gets in")?;
    target.daemon.assert_alive()
}

/// The report of sessions and the metrics say what a session is.
fn a_session_is_named_by_its_transport(case: Case) -> Result<()> {
    let target = Target::start(case)?;
    let client = target.client()?;
    let mut command = std::process::Command::new(overlay_tests::programs::built("overlay-daemon")?);
    let token = target.daemon.folder().join("local-token");
    fs::write(&token, target.daemon.local_token()?)?;
    command.arg("status").arg("--socket").arg(target.daemon.socket()).arg("--token-file").arg(token);
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().find(|line| line.contains(CLIENT)).with_context(|| format!("{output:?}"))?;
    ensure!(line.contains(case.transport.label()) && line.contains("hybrid"), "{line}");
    let metrics = target.daemon.metrics()?;
    ensure!(metrics.contains(&case.active(1)), "{metrics}");
    drop(client);
    wait::until_true("the session to be gone", LIMIT, || Ok(target.daemon.metrics()?.contains(&case.active(0))))
}

/// P-4: no START without a token of its own holder; a local client's is worth nothing here.
fn every_start_needs_its_own_token(case: Case) -> Result<()> {
    let target = Target::start(case)?;
    let open = Open::Publish { topic: "news".parse()? };
    let good = target.daemon.token(CLIENT)?;
    let mut changed = good.to_vec();
    let last = changed.len() - 1;
    changed[last] = if changed[last] == b'A' { b'B' } else { b'A' };
    let mut wire = target.client()?;
    let others = target.daemon.token("spiffe://overlay.test/ns/test/client/other")?;
    let cases = [
        (Bytes::new(), 401),
        (target.daemon.local_token()?, 401),
        (others, 401),
        (Bytes::from(changed), 401),
        (good, 200),
    ];
    for (n, (cap, code)) in (1_u64..).zip(cases) {
        let got = wire.start(2 * n + 1, &open, cap)?;
        ensure!(got == code, "token {n}: {got}, not {code}");
    }
    Ok(())
}

/// Subscribes and publishes on one session: streams 3 and 5.
fn subscribed(target: &Target) -> Result<Any> {
    let mut wire = target.client()?;
    let token = target.daemon.token(CLIENT)?;
    ensure!(wire.start(3, &Open::Subscribe { topics: vec!["news".parse()?] }, token.clone())? == 200);
    ensure!(wire.start(5, &Open::Publish { topic: "news".parse()? }, token)? == 200);
    Ok(wire)
}

/// The next message of a subscription; answers to what was published are counted.
fn next_message(wire: &mut Any, answers: &mut usize) -> Result<Option<Bytes>> {
    loop {
        let Some(frame) = wire.receive()? else { return Ok(None) };
        if frame.flags.has(Flags::RESP) {
            ensure!(frame.code == 200, "an answer {}", frame.code);
            *answers += 1;
            continue;
        }
        if frame.flags.has(Flags::END) {
            continue;
        }
        return match Record::decode(frame.payload).context("an event that is no record")? {
            Record::Message { payload, .. } => Ok(Some(payload)),
            other => bail!("not a message: {other:?}"),
        };
    }
}

/// Small frames and frames of 60 KiB, in order, each once, while another session does the same.
fn what_is_published_is_delivered(case: Case) -> Result<()> {
    let target = Target::start(case)?;
    let (mut here, mut there) = (subscribed(&target)?, subscribed(&target)?);
    for (number, size) in (0_u32..).zip([0, 1, 1_000, 60_000, 7, 60_000, 60_000, 2]) {
        let text = Bytes::from([&number.to_be_bytes()[..], &vec![7; size]].concat());
        here.send(&request(5, Flags::default(), Publish::Message(text.clone()).encode()))?;
        let mut answers = 0;
        for wire in [&mut here, &mut there] {
            let got = next_message(wire, &mut answers)?;
            ensure!(got.as_ref() == Some(&text), "message {number}: {:?}", got.map(|got| got.len()));
        }
    }
    Ok(())
}

/// G-6, I-9: an upload of one byte over 1 MiB is 413 and counted, and the session goes on.
fn a_byte_over_a_mebibyte_is_413(case: Case) -> Result<()> {
    let target = Target::start(case)?;
    let mut wire = subscribed(&target)?;
    let begin = |size| Publish::Begin { size, hash: [7; 32] }.encode();
    target.counts("size", || {
        wire.send(&request(5, Flags::default(), begin((1 << 20) + 1)))?;
        let answer = wire.receive()?.context("it closed")?;
        ensure!(answer.code == 413, "{}", answer.code);
        Ok(())
    })?;
    wire.send(&request(5, Flags::default(), Publish::Message("hello".into()).encode()))?;
    ensure!(next_message(&mut wire, &mut 0)?.is_some_and(|message| message == "hello"));
    Ok(())
}

/// G-1: a length over 1 MiB is refused from the header alone, told, and the session ends.
fn a_broken_frame_is_told_and_ends_the_session(case: Case) -> Result<()> {
    let mut target = Target::start(case)?;
    for (length, reason, code) in [(0x0010_0001_u32, "size", 413), (0x25, "protocol", 400)] {
        let mut wire = target.client()?;
        target.counts(reason, || Ok(wire.stream.write_all(&length.to_be_bytes())?))?;
        let refusal = wire.receive()?.context("it closed without a word")?;
        let body: ErrorBody = serde_json::from_slice(&refusal.payload)?;
        ensure!((refusal.code, body.retryable) == (code, false), "{body:?}");
        ensure!(wire.receive()?.is_none(), "the session ends");
    }
    target.client()?;
    target.daemon.assert_alive()
}

/// I-2: who says nothing is closed, and another gets in.
fn silence_ends_a_session(case: Case) -> Result<()> {
    let target = Target::start_with(case, 600, |_| {})?;
    let mut silent = target.client()?;
    let ended = silent.receive().map(|frame| frame.is_none());
    // QUIC may time out at this side too.
    ensure!(ended.as_ref().is_ok_and(|ended| *ended) || case.transport == Transport::Quic, "{ended:?}");
    wait::until_true("the session to be gone", LIMIT, || Ok(target.daemon.metrics()?.contains(&case.active(0))))?;
    target.client().map(drop)
}

/// S1, I-2, I-5: who takes nothing of what is sent to it is dropped, and counted, and another
/// subscriber gets all of it.
fn s1_a_reader_that_takes_nothing_is_dropped(case: Case) -> Result<()> {
    let target = Target::start_with(case, 15_000, |config| {
        config.overlay.write_timeout_ms = 1_000;
        config.tor.write_timeout_ms = 1_000;
    })?;
    let (mut stopped, mut healthy) = (target.client()?, subscribed(&target)?);
    let subscribe = Open::Subscribe { topics: vec!["news".parse()?] };
    ensure!(stopped.start(3, &subscribe, target.daemon.token(CLIENT)?)? == 200);
    let dropped = target.daemon.rejected("timeout")?;
    let payload = Bytes::from(vec![7; 60_000]);
    wait::until_true("the one that reads nothing to be dropped", LIMIT, || {
        for _ in 0..10 {
            healthy.send(&request(5, Flags::default(), Publish::Message(payload.clone()).encode()))?;
            ensure!(next_message(&mut healthy, &mut 0)?.as_ref() == Some(&payload), "the healthy one missed a message");
        }
        Ok(target.daemon.rejected("timeout")? > dropped)
    })?;
    wait::until_true("its session to be gone", LIMIT, || Ok(target.daemon.metrics()?.contains(&case.active(1))))
}

/// K1, P-4: a token's end ends what it opened, within the session, and nothing else of it.
fn k1_a_token_that_dies_ends_its_stream_alone(case: Case) -> Result<()> {
    let target = Target::start(case)?;
    let mut wire = subscribed(&target)?;
    let claims = Authority::claims(CLIENT)?;
    let dying = target.daemon.authority.token(&Claims { exp: claims.nbf + 2, ..claims })?;
    ensure!(wire.start(7, &Open::Publish { topic: "news".parse()? }, dying)? == 200);
    let end = wire.receive()?.context("it closed")?;
    ensure!((end.corr_id, end.code, end.flags.has(Flags::END)) == (7, 401, true), "{end:?}");
    wire.send(&request(5, Flags::default(), Publish::Message("hello".into()).encode()))?;
    ensure!(next_message(&mut wire, &mut 0)?.is_some_and(|message| message == "hello"));
    Ok(())
}

/// T6: a broken certificate, and one that is replaced, keep nobody out who comes, and disturb
/// nobody who is there.
fn t6_keys_change_and_sessions_stay(case: Case) -> Result<()> {
    let target = Target::start(case)?;
    let mut wire = subscribed(&target)?;
    let folder = target.daemon.folder();
    let reloads = |result: &str| {
        let label = format!("result=\"{result}\"");
        http::sample(&target.daemon.metrics()?, "overlay_key_reloads_total", &label)
    };
    let (taken, failed) = (reloads("ok")?, reloads("failed")?);
    let (certificate, key) = target.daemon.authority.leaf_pem(NODE)?;
    replace(&folder.join("tls.crt"), "no certificate")?;
    wait::until_true("the broken file to be counted", LIMIT, || Ok(reloads("failed")? > failed))?;
    target.client()?;
    replace(&folder.join("tls.key"), key)?;
    replace(&folder.join("tls.crt"), certificate)?;
    wait::until_true("the new keys to be taken up", LIMIT, || Ok(reloads("ok")? > taken))?;
    target.client()?;
    wire.send(&request(5, Flags::default(), Publish::Message("hello".into()).encode()))?;
    ensure!(next_message(&mut wire, &mut 0)?.is_some_and(|message| message == "hello"));
    Ok(())
}

/// S5: SIGTERM behind a burst. Whatever was answered with 200 is delivered, and the daemon ends
/// in order.
fn what_was_accepted_is_delivered_when_it_stops(case: Case) -> Result<()> {
    let mut target = Target::start(case)?;
    let mut wire = subscribed(&target)?;
    for number in 0..40_u32 {
        let payload = Bytes::from([&number.to_be_bytes()[..], &[7; 8_000]].concat());
        wire.send(&request(5, Flags::default(), Publish::Message(payload).encode()))?;
    }
    let (mut accepted, mut delivered) = (0, 0);
    let mut told = false;
    while let Some(frame) = wire.receive()? {
        if frame.flags.has(Flags::RESP) {
            accepted += usize::from(frame.code == 200 && frame.corr_id == 5 && !frame.flags.has(Flags::END));
        } else if let Some(Record::Message { .. }) = Record::decode(frame.payload) {
            delivered += 1;
        }
        if !told && accepted > 0 {
            told = true;
            target.daemon.process.signal(Signal::TERM);
        }
    }
    ensure!(told && delivered == accepted, "{accepted} accepted, {delivered} delivered");
    let status = target.daemon.process.wait(LIMIT)?;
    ensure!(status.success(), "{status}: {}", target.daemon.process.log_tail());
    Ok(())
}

fn manifest(case: Case) -> String {
    let quic = case.transport == Transport::Quic;
    format!(
        "apiVersion: overlay.rustyonions.io/v1alpha1\nkind: OverlayNode\nmetadata: {{name: mesh}}\nspec:\n  \
         profile: {:?}\n  replicas: 3\n  readiness: {{minPeers: 2}}\n  drain: {{delay: 0s, timeout: 5s}}\n  \
         transports: {{quic: {{enabled: {quic}}}}}\n  peers: {{transport: {}}}\n  \
         limits: {{timeouts: {{idle: 3s}}}}\n",
        case.profile,
        if quic { "QUIC" } else { "TCP" }
    )
}

/// Three daemons over the transport: a message and a file of 1 MiB reach the others.
fn peers_carry_messages_and_files(case: Case) -> Result<()> {
    let mesh = Mesh::start(&manifest(case), &[])?;
    let daemons = mesh.ready()?;
    let subscribers = [mesh.subscribe(&daemons[1], "news", 1)?, mesh.subscribe(&daemons[2], "news", 1)?];
    mesh.publish(&daemons[0], "news", &["hello"])?;
    for subscriber in subscribers {
        ensure!(subscriber.finish(LIMIT)? == b"hello");
    }
    let file = mesh.folder().join("object");
    let bytes: Vec<u8> = (0_u32..1 << 18).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    fs::write(&file, &bytes)?;
    let subscriber = mesh.subscribe(&daemons[1], "files", 1)?;
    mesh.publish(&daemons[0], "files", &["--file", &file.to_string_lossy()])?;
    ensure!(blake3::hash(&subscriber.finish(LIMIT)?) == blake3::hash(&bytes), "another file arrived");
    for daemon in &daemons {
        ensure!(sessions_over(daemon, case.transport)? >= 2, "{}: a session with each peer", daemon.name);
    }
    Ok(())
}

/// Sessions that a daemon says it holds over a transport.
fn sessions_over(daemon: &mesh::Daemon, transport: Transport) -> Result<usize> {
    let mut command = std::process::Command::new(overlay_tests::programs::built("overlay-daemon")?);
    let output = command.arg("status").arg("--socket").arg(&daemon.socket).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let over = |line: &&str| line.contains(transport.label()) && line.contains("hybrid");
    Ok(said.lines().filter(over).count())
}

/// SIGKILL of one: it is started again and rejoins over the transport.
fn a_killed_peer_comes_back(case: Case) -> Result<()> {
    let mesh = Mesh::start(&manifest(case), &[])?;
    let daemons = mesh.ready()?;
    mesh::kill(mesh.process_of(&daemons[2])?)?;
    mesh.event("exited")?;
    let subscriber = mesh.subscribe(&daemons[1], "news", 1)?;
    mesh.publish(&daemons[0], "news", &["still here"])?;
    ensure!(subscriber.finish(LIMIT)? == b"still here");
    mesh.event("started")?;
    wait::until_true("mesh-2 to be ready again", LIMIT, || {
        Ok(http::get(daemons[2].admin, "/readyz").is_ok_and(|answer| answer.status == 200))
    })?;
    let subscriber = mesh.subscribe(&daemons[2], "later news", 1)?;
    mesh.publish(&daemons[0], "later news", &["welcome back"])?;
    ensure!(subscriber.finish(LIMIT)? == b"welcome back");
    Ok(())
}
