//! `overlay-daemon/PROTOCOL.md` as somebody reads it who has nothing else: a client in Python,
//! written from that document, has a conversation with a real daemon. It knows neither the
//! daemon's code nor this crate's.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use overlay_core::config::{KeyExchange, Profile};
use overlay_core::grant::Action;
use overlay_core::identity::TenantId;
use overlay_tests::daemon::Daemon;
use overlay_tests::on_both_profiles;
use overlay_tests::programs::repository;
use overlay_tests::trust::{Authority, NODE};
use overlay_tests::wait::{self, Look};

const LIMIT: Duration = Duration::from_secs(30);
const CLIENT: &str = "spiffe://overlay.test/ns/test/client/python";
const TOPIC: &str = "news/é";
/// Not 0, so that the order of its bytes shows.
const TENANT: &str = "01234567-89ab-4def-8123-456789abcdef";
/// What it says that it did, a line each.
const SAID: &str = "says hello
pings
receives what it publishes
compresses
asks for its window
renews
is refused what is too large
is refused what is illegal
is refused what its token does not allow
is refused past the rate
";

on_both_profiles!(a_client_written_from_the_document_is_understood, a_client_without_the_hybrid_group_is_refused);

/// A daemon, and the command of a client that may publish and subscribe on one topic.
fn client(profile: Profile, key_exchange: KeyExchange, what: &str) -> Result<(Daemon, Command)> {
    let tenant: TenantId = TENANT.parse().context("a tenant")?;
    let daemon = Daemon::start(profile, |config| {
        config.tls.key_exchange = key_exchange;
        config.overlay.tenants.push(tenant);
    })?;
    let (certificate, key) = daemon.authority.leaf_pem(CLIENT)?;
    let mut claims = Authority::claims(CLIENT)?;
    claims.tenants = vec![tenant];
    claims.topics = vec![TOPIC.to_owned()];
    claims.actions = vec![Action::Publish, Action::Subscribe];
    let token = daemon.authority.token(&claims)?;
    claims.exp += 1;
    let next = daemon.authority.token(&claims)?;
    let folder = daemon.folder();
    let mut command = Command::new("python3");
    // Nothing is written beside the sources.
    command.arg("-B").arg(repository().join("tests/processes/protocol/client.py")).arg(what);
    for (option, text) in
        [("certificate", certificate.as_bytes()), ("key", key.as_bytes()), ("token", &token), ("next-token", &next)]
    {
        let path: PathBuf = folder.join(format!("client.{option}"));
        fs::write(&path, text)?;
        command.arg(format!("--{option}")).arg(path);
    }
    command.arg("--authorities").arg(folder.join("ca.crt"));
    let address = daemon.address.to_string();
    command.args(["--daemon", NODE, "--tenant", TENANT, "--topic", TOPIC, "--address", &address]);
    Ok((daemon, command))
}

fn said(mut command: Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().context("python3 is missing (Debian: apt-get install python3)")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}: {errors}after: {said}", output.status);
    Ok(said)
}

/// The whole of what a client needs: HELLO, subscribe, publish, renewal, and every refusal.
fn a_client_written_from_the_document_is_understood(profile: Profile) -> Result<()> {
    let (mut daemon, command) = client(profile, KeyExchange::PreferHybrid, "conversation")?;
    ensure!(said(command)? == SAID);
    daemon.assert_alive()
}

/// I-11: a TLS library that does not know the hybrid group gets no session where it is
/// required, and an alert; one that knows it gets in.
fn a_client_without_the_hybrid_group_is_refused(profile: Profile) -> Result<()> {
    let (mut daemon, command) = client(profile, KeyExchange::RequireHybrid, "require-hybrid")?;
    let said = said(command)?;
    let counted = match said.as_str() {
        "without the hybrid group: refused\n" => (1.0, 0.0),
        "with the hybrid group: taken\n" => (0.0, 1.0),
        _ => anyhow::bail!("{said}"),
    };
    // The client may know before the daemon has counted.
    wait::until("it to be counted", LIMIT, || {
        let seen = (daemon.rejected("tls")?, daemon.metric("session_open_total")?);
        Ok(if seen == counted { Look::Holds(()) } else { Look::NotYet(format!("{seen:?}")) })
    })?;
    daemon.assert_alive()
}
