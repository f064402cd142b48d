//! Tokens in the life of real programs: minted by the operator, looked at by the daemon's
//! command, renewed while streams are open, and their end.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::TenantId;
use overlay_core::record::Publish;
use overlay_tests::files::replace;
use overlay_tests::oap::{Wire, request};
use overlay_tests::subscriber::Subscriber;
use overlay_tests::wait;
use overlay_tests::{http, on_both_profiles, programs};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::local::mesh::{Daemon, LIMIT, Mesh, one_mesh};

const NODE: &str = "spiffe://overlay.local/ns/default/overlaynode/two";

on_both_profiles!(
    a_minted_token_allows_what_was_asked_for,
    k1_a_token_that_dies_ends_its_stream,
    k1_a_key_that_is_removed_ends_its_streams,
    streams_outlive_their_tokens,
    t6_a_broken_file_changes_nothing,
);

struct Target {
    mesh: Mesh,
    daemons: Vec<Daemon>,
}

impl Target {
    fn start(profile: Profile) -> Result<Self> {
        let mesh = Mesh::start(&one_mesh("two", profile, "replicas: 2, readiness: {minPeers: 1}"), &[])?;
        let daemons = mesh.ready()?;
        Ok(Self { mesh, daemons })
    }

    /// `overlay-operator token create` for the mesh.
    fn create(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(programs::built("overlay-operator")?);
        command.args(["token", "create", "--file"]).arg(self.mesh.folder().join("mesh.yaml")).args(arguments);
        Ok(command.env("XDG_RUNTIME_DIR", self.mesh.folder()).stdin(Stdio::null()).output()?)
    }

    /// The token alone.
    fn minted(&self, arguments: &[&str]) -> Result<String> {
        let output = self.create(arguments)?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let token = String::from_utf8(output.stdout)?;
        ensure!(token.ends_with('\n') && token.matches(['\n', '.']).count() == 3, "the token and nothing else");
        Ok(token)
    }

    fn subscribe(&self, at: &Daemon, token: &PathBuf, more: &[&str]) -> Result<Command> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(programs::built("overlay-daemon")?);
        command.args(["sub", "news", "--socket"]).arg(&at.socket).arg("--token-file").arg(token).args(more);
        Ok(command)
    }

    /// Waits until a token has expired, as its inspection says.
    fn expired(&self, token: &PathBuf) -> Result<()> {
        wait::until_true("the token to expire", LIMIT, || Ok(inspect(token, &[])?.1.contains("expired")))
    }
}

/// `overlay-daemon token inspect`: whether all is well, and what it says.
fn inspect(token: &PathBuf, more: &[&str]) -> Result<(bool, String)> {
    let mut command = Command::new(programs::built("overlay-daemon")?);
    let output = command.args(["token", "inspect"]).arg(token).args(more).stdin(Stdio::null()).output()?;
    Ok((output.status.success(), String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?))
}

/// What is minted is what was asked for: it verifies by the daemons' keys, allows that, and
/// nothing else; what cannot be minted says which option is wrong.
fn a_minted_token_allows_what_was_asked_for(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let [daemon, _] = &target.daemons[..] else { anyhow::bail!("two daemons") };
    let file = target.mesh.folder().join("client-token");
    let token = target.minted(&["--topics", "news", "--actions", "publish", "--ttl", "1h"])?;
    replace(&file, &token)?;
    let keys = daemon.socket.with_file_name("trust").join("token-keys.json");
    let (good, said) = inspect(&file, &["--keys", &keys.to_string_lossy()])?;
    ensure!(good && said.contains("signature  holds") && said.contains(NODE) && !said.contains(token.trim()), "{said}");
    let publish = |topic: &str| {
        let mut command = Command::new(programs::built("overlay-daemon")?);
        command.args(["pub", topic, "hello", "--token-file"]).arg(&file).arg("--socket").arg(&daemon.socket);
        Ok::<_, anyhow::Error>(command.stdin(Stdio::null()).output()?)
    };
    ensure!(publish("news")?.status.success());
    ensure!(String::from_utf8(publish("other")?.stderr)?.contains("403 forbidden"));
    for (arguments, part) in [
        (&["--topics", "a*b", "--actions", "publish"][..], "--topics: \"a*b\""),
        (&["--topics", "a", "--actions", "publish", "--name", "none"], "--name: no OverlayNode none"),
        (&["--topics", "a", "--actions", "fly"], "--actions"),
    ] {
        let output = target.create(arguments)?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(!output.status.success() && output.stdout.is_empty() && said.contains(part), "{said}");
    }
    Ok(())
}

/// K1: a token that dies while its stream is open ends it, and the reader is told why.
fn k1_a_token_that_dies_ends_its_stream(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let file = target.mesh.folder().join("client-token");
    replace(&file, &target.minted(&["--topics", "news", "--actions", "subscribe", "--ttl", "2s"])?)?;
    let output = target.subscribe(&target.daemons[0], &file, &[])?.stdin(Stdio::null()).output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success() && said.contains("401 unauthorized: the token has expired"), "{said}");
    ensure!(inspect(&file, &[])?.1.contains("expired"), "not before its time");
    Ok(())
}

/// K1: a key that is taken away ends the streams of its tokens and no others, and the session goes
/// on without them: it is answered, what a token of the key that stays opened goes on, and such a
/// token opens more.
fn k1_a_key_that_is_removed_ends_its_streams(profile: Profile) -> Result<()> {
    let (target, next) = (Target::start(profile)?, Target::start(profile)?);
    let at = &target.daemons[0];
    let files = |target: &Target| {
        let socket = &target.daemons[0].socket;
        (socket.with_file_name("trust").join("token-keys.json"), socket.with_file_name("token"))
    };
    let ((keys, token), (next_keys, next_token)) = (files(&target), files(&next));
    let mut command = target.subscribe(at, &token, &["--timeout", "30s"])?;
    let mut reader = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(reader.stderr.take().context("a pipe for standard error")?);
    let mut line = String::new();
    said.read_line(&mut line)?;
    ensure!(line == "subscribed to news\n", "{line}");

    let (cap, next_cap, next_keys) = (cap(&token)?, cap(&next_token)?, fs::read_to_string(next_keys)?);
    replace(&keys, &both(&fs::read_to_string(&keys)?, &next_keys)?)?;
    let subscribe = Open::Subscribe { topics: vec!["news".parse()?] };
    let publish = Open::Publish { topic: "news".parse()? };
    wait::until_true("the next key to be taken up", LIMIT, || {
        Ok(Wire::local(&at.socket)?.start(3, &publish, next_cap.clone())? == 200)
    })?;
    let mut session = Wire::local(&at.socket)?;
    ensure!(session.start(3, &subscribe, cap.clone())? == 200, "a token of the first key");
    ensure!(session.start(5, &publish, next_cap.clone())? == 200, "a token of the next");
    replace(&keys, &next_keys)?;
    let mut rest = String::new();
    said.read_to_string(&mut rest)?;
    ensure!(!reader.wait()?.success() && rest.contains("401 unauthorized: the token's key is not known"), "{rest}");

    let end = session.receive()?.context("the daemon closed the session")?;
    ensure!((end.corr_id, end.code, end.flags.has(Flags::END)) == (3, 401, true), "{end:?}");
    session.send(&Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 7, Bytes::from_static(b"there?")))?;
    ensure!(session.receive()?.is_some_and(|pong| pong.payload == "there?"), "a ping");
    session.send(&request(5, Flags::default(), Publish::Message("x".into()).encode()))?;
    ensure!(session.receive()?.is_some_and(|answer| (answer.corr_id, answer.code) == (5, 200)), "what was open");
    ensure!(session.start(9, &subscribe, cap)? == 401, "a token of the key that is gone");
    ensure!(session.start(11, &subscribe, next_cap)? == 200, "a token of the key that stays");
    Ok(())
}

/// The token of a file, as a START carries it.
fn cap(file: &Path) -> Result<Bytes> {
    Ok(Bytes::from(fs::read_to_string(file)?.trim().to_owned()))
}

/// The keys of two sets in one.
fn both(one: &str, other: &str) -> Result<String> {
    let (mut one, mut other): (Value, Value) = (serde_json::from_str(one)?, serde_json::from_str(other)?);
    let others = other["keys"].as_array_mut().context("no keys")?;
    one["keys"].as_array_mut().context("no keys")?.append(others);
    Ok(one.to_string())
}

/// A client and the daemons' own gossip go on past the life of the tokens that they began with,
/// as long as their files are rewritten in time.
fn streams_outlive_their_tokens(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let [near, far] = &target.daemons[..] else { anyhow::bail!("two daemons") };
    let (file, old) = (target.mesh.folder().join("client-token"), target.mesh.folder().join("old-token"));
    let peers: Vec<PathBuf> =
        target.daemons.iter().map(|daemon| daemon.socket.with_file_name("trust").join("peer")).collect();
    let mint = |ttl: &str| -> Result<(String, String)> {
        let client = target.minted(&["--topics", "news", "--actions", "subscribe", "--ttl", ttl])?;
        let peer = target.minted(&["--topics", "*", "--actions", "publish", "--ttl", ttl, "--holder", NODE])?;
        Ok((client, peer))
    };
    let write = |(client, peer): (String, String)| -> Result<()> {
        replace(&file, &client)?;
        peers.iter().try_for_each(|path| replace(path, &peer))
    };
    let short = mint("8s")?;
    replace(&old, &short.0)?;
    write(short)?;
    let reader = Subscriber::start(target.subscribe(far, &file, &["--count", "2"])?)?;
    target.mesh.publish(near, "news", &["before"])?;
    write(mint("1h")?)?;
    target.expired(&old)?;
    target.mesh.publish(near, "news", &["after"])?;
    ensure!(reader.finish(LIMIT)? == b"before\nafter\n");
    Ok(())
}

/// T6: files that are broken while a daemon runs change nothing but the counts, and SIGHUP has
/// them looked at.
fn t6_a_broken_file_changes_nothing(profile: Profile) -> Result<()> {
    let target = Target::start(profile)?;
    let daemon = &target.daemons[0];
    let failed = || -> Result<f64> {
        let metrics = http::get(daemon.admin, "/metrics")?.body;
        http::sample(&metrics, "overlay_key_reloads_total", "result=\"failed\"")
    };
    let trust = daemon.socket.with_file_name("trust");
    for name in ["tls.crt", "tls.key", "ca.crt", "token-keys.json"] {
        let (path, before) = (trust.join(name), failed()?);
        let good = fs::read(&path)?;
        fs::write(&path, "broken")?;
        kill_process(target.mesh.process_of(daemon)?, Signal::HUP)?;
        wait::until_true(&format!("{name} to be refused"), LIMIT, || Ok(failed()? > before))?;
        target.mesh.publish(daemon, "news", &["still here"])?;
        ensure!(http::get(daemon.admin, "/readyz")?.body.contains("\"ready\":true"), "{name}");
        fs::write(&path, good)?;
    }
    Ok(())
}

/// Whoever reads a command's standard error may be gone: what it could not say is no panic, and its
/// exit code is its own.
#[test]
fn a_closed_standard_error_is_no_panic() -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let mut command = Command::new(programs::built("overlay-daemon")?);
    let status = command.args(["token", "inspect", "/nonexistent"]).stderr(writer).status()?;
    assert_eq!(status.code(), Some(1));
    Ok(())
}
