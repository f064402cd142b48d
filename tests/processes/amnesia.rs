//! What a daemon leaves behind: nothing on a disk (I-8, G-7), no core (N1), and no secret or
//! payload where it does not belong (N2). The same repertoire with amnesia and without it (G-5).

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::{Profile, Transport};
use overlay_core::control::Open;
use overlay_core::frame::Flags;
use overlay_core::record::Publish;
use overlay_tests::daemon::{Daemon, LIMIT};
use overlay_tests::files::replace;
use overlay_tests::oap::{self, Wire};
use overlay_tests::status::status;
use overlay_tests::subscriber::Subscriber;
use overlay_tests::trust::{Authority, NODE};
use overlay_tests::watch::{Watch, changed_since};
use overlay_tests::{http, on_both_profiles, programs, wait};
use rustix::process::Signal;
use rustls::pki_types::pem::PemObject;

/// What every payload holds.
const CANARY: &str = "canary-of-a-payload-4e1f";
const TOPIC: &str = "canary.topic-77aa";

on_both_profiles!(
    n1_a_crash_leaves_no_core,
    n2_no_secret_is_told,
    n2_a_key_that_was_replaced_is_not_in_memory,
    n2_nothing_reaches_a_disk,
);

/// A daemon that accepts sessions over every transport.
fn start(profile: Profile) -> Result<Daemon> {
    Daemon::start(profile, |config| {
        config.overlay.listen_quic = Some(config.overlay.listen);
        config.tor.listen = Some(config.overlay.listen);
        // Sessions that say nothing are there all the while.
        config.overlay.idle_timeout_ms = 600_000;
        config.tor.idle_timeout_ms = 600_000;
    })
}

/// All that a client can make a daemon do: each kind of frame, each refusal, what changes while
/// it runs. What was secret or somebody else's on the way.
fn repertoire(daemon: &Daemon) -> Result<Vec<Vec<u8>>> {
    edit(daemon, "overlay.toml", "log_level = \"info\"", "log_level = \"trace\"")?;
    let reloads = |daemon: &Daemon| daemon.metric("overlay_config_reloads_total");
    wait::until_true("the log level to be taken up", LIMIT, || Ok(reloads(daemon)? > 0.0))?;

    let token = daemon.local_token()?;
    let large = CANARY.repeat(20_000);
    let mut subscriber = Command::new(programs::built("overlay-daemon")?);
    subscriber.args(["sub", TOPIC, "--count", "2", "--output", "raw", "--socket"]).arg(daemon.socket());
    let token_file = daemon.folder().join("client");
    fs::write(&token_file, &token)?;
    subscriber.arg("--token-file").arg(&token_file);
    let subscriber = Subscriber::start(subscriber)?;
    let mut publisher = Command::new(programs::built("overlay-daemon")?)
        .args(["pub", TOPIC, "--socket"])
        .arg(daemon.socket())
        .arg("--token-file")
        .arg(&token_file)
        .stdin(Stdio::piped())
        .spawn()?;
    publisher.stdin.take().context("its input")?.write_all(large.as_bytes())?;
    ensure!(publisher.wait()?.success(), "pub of {} bytes", large.len());

    let mut wire = Wire::local(&daemon.socket())?;
    let publish = Open::Publish { topic: TOPIC.parse()? };
    ensure!(wire.start(3, &publish, token.clone())? == 200, "START");
    wire.send(&oap::request(3, Flags::APP_E2E, Publish::Message(Bytes::from_static(CANARY.as_bytes())).encode()))?;
    ensure!(wire.receive()?.is_some_and(|answer| answer.code == 200), "a message");
    wire.send(&oap::request(3, Flags::default(), Publish::Begin { size: 2 << 20, hash: [0; 32] }.encode()))?;
    ensure!(wire.receive()?.is_some_and(|answer| answer.code == 413), "2 MiB");
    let forged = forge(&token);
    ensure!(wire.start(5, &publish, forged.clone())? == 401, "a forged token");
    ensure!(wire.start(7, &Open::Subscribe { topics: vec![TOPIC.parse()?] }, token.clone())? == 200, "subscribe");
    wire.stream.write_all(CANARY.as_bytes())?; // what is no frame
    let received = subscriber.finish(LIMIT)?;
    // Each message on a line of its own.
    ensure!(received.len() == large.len() + CANARY.len() + 2, "{} bytes were delivered", received.len());

    let remote = daemon.token(NODE)?;
    for (_, transport) in Transport::ALL {
        let (mut session, _) = daemon.offer(NODE)?.greet_over(transport, daemon.listens(transport)?)?;
        ensure!(session.start(3, &publish, remote.clone())? == 200, "over {transport:?}");
        ensure!(session.start(5, &publish, token.clone())? == 401, "a local token over TLS (K5)");
    }

    let (certificate, key) = daemon.authority.leaf_pem(NODE)?;
    let old_key = fs::read(daemon.folder().join("tls.key"))?;
    let taken = key_reloads(daemon)?;
    replace(&daemon.folder().join("tls.crt"), certificate.as_bytes())?;
    replace(&daemon.folder().join("tls.key"), key.as_bytes())?;
    wait::until_true("the new keys to be taken up", LIMIT, || Ok(key_reloads(daemon)? > taken))?;

    let peer = fs::read(daemon.folder().join("peer"))?;
    let mut secrets = vec![CANARY.as_bytes().to_vec(), token.to_vec(), forged.to_vec(), remote.to_vec(), peer];
    // A line of a key's text: what a program would have to quote to quote any of it.
    for key in [old_key.as_slice(), key.as_bytes()] {
        secrets.extend(key.split(|byte| *byte == b'\n').filter(|line| line.len() > 40).map(<[u8]>::to_vec));
    }
    // And a token's signature, which alone would do harm. Its claims are no secret, and those of other
    // tests' tokens of the same second.
    let signature = |token: &Bytes| token.rsplit(|byte| *byte == b'.').next().map(<[u8]>::to_vec);
    secrets.extend([token, remote].iter().filter_map(signature));
    Ok(secrets)
}

/// How often new keys were taken up.
fn key_reloads(daemon: &Daemon) -> Result<f64> {
    http::sample(&daemon.metrics()?, "overlay_key_reloads_total", "result=\"ok\"")
}

/// A token whose signature does not hold.
fn forge(token: &Bytes) -> Bytes {
    let mut forged = token.to_vec();
    let last = forged.len() - 20;
    forged[last] = if forged[last] == b'A' { b'B' } else { b'A' };
    forged.into()
}

fn edit(daemon: &Daemon, file: &str, from: &str, to: &str) -> Result<()> {
    let path = daemon.folder().join(file);
    let text = fs::read_to_string(&path)?;
    ensure!(text.contains(from), "{file} has no {from}:\n{text}");
    replace(&path, text.replace(from, to))
}

fn contains(text: &[u8], what: &[u8]) -> bool {
    memchr::memmem::find(text, what).is_some()
}

fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    Ok(fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
}

/// Bytes that the process had the kernel write to any disk (proc(5), `write_bytes`).
fn written(daemon: &Daemon) -> Result<u64> {
    let io = fs::read_to_string(format!("/proc/{}/io", daemon.process.id()))
        .context("only root may look at a process that cannot be dumped: run these tests as root")?;
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).context("no write_bytes")?;
    Ok(line.parse()?)
}

/// Regular files that the process has open for writing.
fn open_for_writing(daemon: &Daemon) -> Result<BTreeSet<PathBuf>> {
    let process = PathBuf::from(format!("/proc/{}", daemon.process.id()));
    let mut open = BTreeSet::new();
    for entry in fs::read_dir(process.join("fd"))? {
        let descriptor = entry?.file_name();
        let Ok(path) = fs::read_link(process.join("fd").join(&descriptor)) else { continue };
        let info = fs::read_to_string(process.join("fdinfo").join(&descriptor)).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t")).unwrap_or("0");
        let writes = u32::from_str_radix(flags, 8)? & 0o3 != 0;
        if writes && path.is_absolute() && !path.starts_with("/dev/null") {
            open.insert(path);
        }
    }
    Ok(open)
}

/// G-7, I-8, N2: of all that a daemon does, a watch over every file system sees it write to
/// nothing but the log that it was given; the kernel counts no byte written to a disk, no folder
/// that it might use has anything new, and no file that changed meanwhile where everybody may
/// write tells a secret. G-5: the same on both profiles, though only amnesia has the kernel see to it.
fn n2_nothing_reaches_a_disk(profile: Profile) -> Result<()> {
    let (began, watch) = (SystemTime::now(), Watch::start()?);
    let mut daemon = start(profile)?;
    let mut before = files(daemon.folder())?;
    let secrets = repertoire(&daemon)?;
    before.insert(daemon.folder().join("client")); // the test's own
    let (label, confined) = if profile == Profile::Micronode { ("on", 1) } else { ("off", 0) };
    let confined = format!("overlay_confined{{measure=\"landlock\",amnesia=\"{label}\"}} {confined}\n");
    ensure!(daemon.metrics()?.contains(&confined), "not {confined}");
    let log = BTreeSet::from([daemon.folder().join("log")]);
    assert_eq!(written(&daemon)?, 0);
    assert_eq!(open_for_writing(&daemon)?, log);
    daemon.process.signal(Signal::TERM);
    ensure!(daemon.process.wait(LIMIT)?.success(), "it stops:\n{}", daemon.process.log_tail());
    assert_eq!(watch.finish(daemon.process.id())?, log);
    before.remove(&daemon.socket());
    assert_eq!(files(daemon.folder())?, before);
    assert_eq!(files(daemon.home())?, BTreeSet::new());
    for path in changed_since(began, daemon.folder()) {
        let Ok(text) = fs::read(&path) else { continue };
        ensure!(!secrets.iter().any(|secret| contains(&text, secret)), "{} tells a secret", path.display());
    }
    Ok(())
}

/// N2: tokens, keys and payloads stand in no log line, at any level, nor in anything that the
/// daemon shows; G-5: the same on both profiles.
fn n2_no_secret_is_told(profile: Profile) -> Result<()> {
    let mut daemon = start(profile)?;
    let secrets = repertoire(&daemon)?;
    let status = status(&daemon.socket(), Some(&daemon.folder().join("client")), "json")?;
    let mut told = vec![("status", status.into_bytes())];
    for path in ["/metrics", "/readyz", "/version", "/healthz"] {
        told.push((path, http::get(daemon.admin, path)?.body.into_bytes()));
    }
    daemon.assert_alive()?;
    daemon.process.stop()?;
    told.push(("log", daemon.process.log().into_bytes()));
    for (place, text) in &told {
        let found = secrets.iter().find(|secret| contains(text, secret));
        ensure!(found.is_none(), "{place} tells {:?}", found.map(|secret| String::from_utf8_lossy(secret)));
        let topics = *place != "status" && contains(text, TOPIC.as_bytes());
        ensure!(!topics, "{place} tells a topic");
    }
    ensure!(contains(&told.last().context("the log")?.1, b"listening"), "the log was looked at");
    Ok(())
}

/// N1: a daemon that is started with permission to leave a core gives it up, and leaves none,
/// whether it aborts or reads where nothing is; a program that gives up nothing does leave one.
fn n1_a_crash_leaves_no_core(profile: Profile) -> Result<()> {
    let permitted = "--core=unlimited:unlimited";
    for (signal, name) in [(Signal::ABORT, "ABRT"), (Signal::SEGV, "SEGV")] {
        let mut daemon = Daemon::start_under(profile, &["prlimit", permitted, "--"], |_| {})?;
        let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.process.id()))?;
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).context("no core limit")?;
        assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
        // Rust's runtime looks at a SIGSEGV for an overflowing stack: it is the next one that ends the process.
        wait::until_true("the daemon to crash", LIMIT, || {
            daemon.process.signal(signal);
            Ok(daemon.process.check().is_err())
        })?;
        let ended = daemon.process.wait(LIMIT)?;
        assert_eq!((ended.signal(), ended.core_dumped()), (Some(signal.as_raw()), false), "{name}");
        assert_eq!(files(daemon.home())?, BTreeSet::new(), "{name}");

        let folder = tempfile::tempdir()?;
        let crash = ["--", "sh", "-c", &format!("kill -{name} $$")];
        let other = Command::new("prlimit").arg(permitted).args(crash).current_dir(folder.path()).status()?;
        ensure!(other.core_dumped(), "this machine writes no cores at all: the test would show nothing");
    }
    Ok(())
}

/// All memory that the process may read, region by region; those that the kernel does not show
/// (`[vvar]`) are left out.
fn memory(daemon: &Daemon) -> Result<Vec<Vec<u8>>> {
    let process = PathBuf::from(format!("/proc/{}", daemon.process.id()));
    let maps = fs::read_to_string(process.join("maps"))?;
    let memory = fs::File::open(process.join("mem"))
        .context("only root may look at a process that cannot be dumped: run these tests as root")?;
    let mut regions = Vec::new();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|rights| rights.starts_with("rw"))) {
        let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).context("a range")?;
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        let mut region = vec![0; usize::try_from(to - from)?];
        if memory.read_exact_at(&mut region, from).is_ok() {
            regions.push(region);
        }
    }
    Ok(regions)
}

/// The 32 bytes that an Ed25519 key is made of, from its PEM.
fn seed(pem: &[u8]) -> Result<Vec<u8>> {
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from_pem_slice(pem)?;
    let der = key.secret_pkcs8_der();
    ensure!(der.len() == 48, "PKCS #8 of the first version");
    Ok(der[16..].to_vec())
}

/// N2, I-8: canaries in a dump of the daemon's memory, after all that it can do. Of a private key
/// that was replaced nothing is left, though sessions go on that it began, nor of the text that either was read from, nor of the token
/// for peers that was. The key in use is found, as the signer holds it.
fn n2_a_key_that_was_replaced_is_not_in_memory(profile: Profile) -> Result<()> {
    let daemon = start(profile)?;
    let old = fs::read(daemon.folder().join("tls.key"))?;
    // One of its own: the repertoire shows tokens that say the same.
    let mut claims = Authority::claims(NODE)?;
    claims.exp += 1;
    let token = daemon.authority.token(&claims)?.to_vec();
    let (file, honest) = (daemon.folder().join("peer"), fs::read(daemon.folder().join("peer"))?);
    for peer in [&token, &honest] {
        let taken = key_reloads(&daemon)?;
        replace(&file, peer)?;
        wait::until_true("the token to be taken up", LIMIT, || Ok(key_reloads(&daemon)? > taken))?;
    }
    let there_before = Transport::ALL.map(|(_, transport)| {
        let (offer, address) = (daemon.offer(NODE)?, daemon.listens(transport)?);
        offer.greet_over(transport, address).map(|(session, _)| session)
    });
    let mut there_before = there_before.into_iter().collect::<Result<Vec<_>>>()?;
    repertoire(&daemon)?;
    let new = fs::read(daemon.folder().join("tls.key"))?;
    let line = |pem: &[u8]| pem.split(|byte| *byte == b'\n').nth(1).map(<[u8]>::to_vec).context("a line of the key");
    let there = |what: &[u8]| Ok::<_, anyhow::Error>(memory(&daemon)?.iter().any(|region| contains(region, what)));
    ensure!(there(&seed(&new)?)?, "the key in use is not found: this would find nothing");
    for (what, canary) in [
        ("the old key", seed(&old)?),
        ("the old key's text", line(&old)?),
        ("the new key's text", line(&new)?),
        ("the old token for peers", token),
    ] {
        ensure!(!there(&canary)?, "{what} is in memory");
    }
    let publish = Open::Publish { topic: TOPIC.parse()? };
    for session in &mut there_before {
        ensure!(session.start(3, &publish, daemon.token(NODE)?)? == 200, "sessions that were there go on");
    }
    Ok(())
}
