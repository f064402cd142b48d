//! A real daemon against clients that it must refuse: what a handshake proves, what a frame may
//! be (G-6), and that each refusal is counted. The client is rustls and the core's codec, not the
//! daemon's own. What holds over every transport is in [`crate::parity`].

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::Flags;
use overlay_core::record;
use overlay_core::status::ErrorBody;
use overlay_tests::files::replace;
use overlay_tests::oap::{Offer, Wire, request};
use overlay_tests::{http, on_both_profiles, wait};
use rustls::AlertDescription;
use rustls::crypto::aws_lc_rs::kx_group;

use crate::local::mesh::{Daemon, LIMIT, Mesh, one_mesh};

on_both_profiles!(
    a_key_exchange_policy_changes_without_a_restart,
    a_byte_over_a_mebibyte_is_413,
    a_broken_frame_is_told_and_ends_the_session,
    every_start_needs_its_own_token,
    a_goodbye_is_answered,
);

/// One daemon, and the trust that its own replicas would have.
struct Target {
    _mesh: Mesh,
    daemon: Daemon,
    trust: PathBuf,
}

impl Target {
    fn start(profile: Profile) -> Result<Self> {
        let mesh = Mesh::start(&one_mesh("one", profile, "replicas: 1"), &[])?;
        let daemon = mesh.ready()?.remove(0);
        let trust = daemon.socket.with_file_name("trust");
        Ok(Self { _mesh: mesh, daemon, trust })
    }

    fn rejected(&self, reason: &str) -> Result<f64> {
        let metrics = http::get(self.daemon.admin, "/metrics")?.body;
        http::sample(&metrics, "overlay_rejected_total", &format!("reason=\"{reason}\""))
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
        Wire::local(&self.daemon.socket)
    }

    /// Everything that the daemon's own replicas offer.
    fn offer(&self) -> Result<Offer> {
        Offer::of_folder(&self.trust)
    }

    fn greet(&self, offer: &Offer) -> Result<()> {
        offer.greet(self.daemon.address).map(drop)
    }

    /// Asserts that it refuses, with one of these alerts, and counts it.
    fn refuses(&self, offer: &Offer, alerts: &[AlertDescription]) -> Result<()> {
        self.counts("tls", || offer.refused(self.daemon.address, alerts))
    }
}

/// The policy is the file's, for handshakes to come; a session that is there goes on.
fn a_key_exchange_policy_changes_without_a_restart(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let mut session = target.local()?;
    let classical = Offer { groups: vec![kx_group::X25519], ..target.offer()? };
    target.refuses(&classical, &[AlertDescription::HandshakeFailure])?;

    let file = target.daemon.socket.with_file_name("overlay.toml");
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains("\"RequireHybrid\""), "{text}");
    replace(&file, text.replace("RequireHybrid", "PreferHybrid"))?;
    wait::until_true("a classical handshake to be accepted", LIMIT, || Ok(target.greet(&classical).is_ok()))?;
    target.greet(&target.offer()?)?;
    ensure!(session.start(3, &Open::Subscribe { topics: vec!["t".parse()?] }, target.token()?)? == 200);
    Ok(())
}

/// G-6, I-9: one byte over 1 MiB is 413 and counted, by the command that a person types.
fn a_byte_over_a_mebibyte_is_413(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
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
fn a_broken_frame_is_told_and_ends_the_session(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
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
fn every_start_needs_its_own_token(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
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
    wire.send(&request(9, Flags::default(), message))?;
    ensure!(
        wire.receive()?.is_some_and(|answer| answer.code == 200 && answer.payload.len() == 32),
        "accepted, and named"
    );
    Ok(())
}

/// RFC 8446, 6.1: who says goodbye in TLS hears one, or its library would report an attack.
fn a_goodbye_is_answered(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let (mut wire, _) = target.offer()?.greet(target.daemon.address)?;
    wire.stream.conn.send_close_notify();
    wire.stream.flush()?;
    ensure!(wire.stream.read(&mut [0])? == 0, "it says more");
    Ok(())
}
