//! What a daemon says of its sessions when it is asked: its report, as `overlay-daemon status`
//! shows it, and its log.

use std::fs;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::{LogLevel, Profile};
use overlay_core::control::Open;
use overlay_core::frame::Flags;
use overlay_core::record::Publish;
use overlay_tests::daemon::{Daemon, LIMIT};
use overlay_tests::oap::{Wire, request};
use overlay_tests::on_both_profiles;
use overlay_tests::wait::{self, Look};
use serde_json::Value;

on_both_profiles!(a_report_shows_what_each_session_is_and_holds, the_log_says_which_session_ended_and_why);

const CLIENT: &str = "spiffe://overlay.test/ns/test/client/status";

/// What `status` prints.
fn status(daemon: &Daemon, output: &str) -> Result<String> {
    let token = daemon.folder().join("status-token");
    fs::write(&token, daemon.local_token()?)?;
    overlay_tests::status::status(&daemon.socket(), Some(&token), output)
}

fn report(daemon: &Daemon) -> Result<Value> {
    Ok(serde_json::from_str(&status(daemon, "json")?)?)
}

/// The session whose member `name` is `value`.
fn session(report: &Value, name: &str, value: &str) -> Result<Value> {
    let sessions = report["sessions"].as_array().context("no sessions")?;
    sessions.iter().find(|session| session[name] == value).cloned().with_context(|| format!("none in {report}"))
}

fn number(value: &Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("{value} is no number"))
}

/// I-10: a session over TLS that reads nothing, beside local ones: who it is, its state, transport
/// and key exchange, how old it is, how long nothing went either way, and what waits for it. What
/// is held for repair goes by itself after the window (I-8).
fn a_report_shows_what_each_session_is_and_holds(profile: Profile) -> Result<()> {
    const MESSAGE: usize = 60_000;
    let daemon = Daemon::start(profile, |config| {
        config.overlay.write_timeout_ms = 600_000;
        config.overlay.idle_timeout_ms = 600_000;
        config.gossip.dedupe_window_ms = 2_000;
    })?;
    let (mut reader, _) = daemon.offer(CLIENT)?.greet(daemon.address)?;
    ensure!(reader.start(3, &Open::Subscribe { topics: vec!["t".parse()?] }, daemon.token(CLIENT)?)? == 200);
    let before = report(&daemon)?;
    let young = session(&before, "identity", CLIENT)?;
    let known =
        [("kind", "client"), ("state", "active"), ("direction", "in"), ("transport", "tcp+tls"), ("group", "hybrid")];
    for (name, value) in known {
        ensure!(young[name] == value, "{name}: {young}");
    }
    ensure!(young["streams"] == 1 && young["queued_frames"] == 0, "{young}");
    let own = session(&before, "identity", "local")?;
    for (name, value) in [("kind", "local"), ("state", "active"), ("transport", "unix"), ("group", "none")] {
        ensure!(own[name] == value, "{name}: {own}");
    }
    ensure!(number(&before["messages"]["held"])? == 0, "{before}");

    let mut publisher = Wire::local(&daemon.socket())?;
    ensure!(publisher.start(3, &Open::Publish { topic: "t".parse()? }, daemon.local_token()?)? == 200);
    let waiting = wait::until("something to wait for the reader", LIMIT, || {
        // Sockets hold some megabytes, and a look takes a process.
        for _ in 0..32 {
            let message = Publish::Message(Bytes::from(vec![7; MESSAGE])).encode();
            publisher.send(&request(3, Flags::default(), message))?;
            let code = publisher.receive()?.context("the publisher was dropped")?.code;
            ensure!([200, 429, 503].contains(&code), "a message got {code}");
        }
        let report = report(&daemon)?;
        let (session, messages) = (session(&report, "identity", CLIENT)?, &report["messages"]);
        let held = number(&messages["held"])? > 0 && number(&messages["bytes"])? > MESSAGE as u64;
        Ok(if held && number(&session["queued_frames"])? > 0 {
            Look::Holds(session)
        } else {
            Look::NotYet(session.to_string())
        })
    })?;
    ensure!(number(&waiting["queued_bytes"])? > MESSAGE as u64, "{waiting}");
    ensure!(number(&waiting["age_ms"])? > number(&young["age_ms"])?, "{young}, then {waiting}");
    ensure!(number(&waiting["idle_ms"])? <= number(&waiting["age_ms"])?, "{waiting}");
    ensure!(waiting["id"] == young["id"], "{young}, then {waiting}");
    let table = status(&daemon, "table")?;
    let line = table.lines().find(|line| line.contains(CLIENT)).context("not in the table")?;
    let cells: Vec<&str> = line.split_whitespace().collect();
    ensure!(cells[..7] == [&waiting["id"].to_string(), "client", "-", "active", "in", "tcp+tls", "hybrid"], "{line}");
    wait::until("what is held to be gone", LIMIT, || {
        let messages = report(&daemon)?["messages"].clone();
        Ok(if messages["held"] == 0 && messages["bytes"] == 0 {
            Look::Holds(())
        } else {
            Look::NotYet(messages.to_string())
        })
    })
}

/// Each line that is logged on behalf of a session says which one it is: how it came, what was
/// wrong with it, and why it ended.
fn the_log_says_which_session_ended_and_why(profile: Profile) -> Result<()> {
    let mut daemon = Daemon::start(profile, |config| {
        config.observability.log_level = LogLevel::Debug;
        config.overlay.read_timeout_ms = 500;
    })?;
    let offer = daemon.offer(CLIENT)?;
    let (mut broken, _) = offer.greet(daemon.address)?;
    std::io::Write::write_all(&mut broken.stream, &[0xff; 64])?;
    ensure!(broken.receive()?.context("no answer")?.code == 413, "what claims 4 GiB");
    let (mut stalled, _) = offer.greet(daemon.address)?;
    std::io::Write::write_all(&mut stalled.stream, &[0])?;
    wait::until_true("both sessions to be gone", LIMIT, || Ok(daemon.metric("session_close_total")? == 2.0))?;
    drop((broken, stalled));
    daemon.process.stop()?;
    let log = daemon.process.log();
    let lines =
        log.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>().context("a line is no JSON")?;
    let of = |message: &str| -> Vec<&Value> { lines.iter().filter(|line| line["message"] == message).collect() };
    let opened = of("session opened");
    ensure!(opened.len() == 2 && opened.iter().all(|line| line["identity"] == CLIENT), "{opened:?}");
    let number = |line: &Value| line["span"]["session"].clone();
    let (first, second) = (number(opened[0]), number(opened[1]));
    ensure!(first.is_u64() && second.is_u64() && first != second, "{opened:?}");
    let refused = of("broken frame");
    ensure!(refused.len() == 1 && number(refused[0]) == first && refused[0]["code"] == 413, "{refused:?}");
    let why = |of_whom: &Value| of("session closed").iter().find(|l| number(l) == *of_whom).map(|l| l["why"].clone());
    ensure!(why(&first).context("the first is not closed")? == "this side closed it", "{log}");
    ensure!(
        why(&second).context("the second is not closed")? == "the rest of a frame did not come within the read timeout",
        "{log}"
    );
    Ok(())
}
