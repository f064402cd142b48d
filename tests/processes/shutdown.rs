//! What SIGTERM does to one daemon, in its order, and what a second one does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use overlay_core::config::Profile;
use overlay_core::control::Open;
use overlay_core::frame::Flags;
use overlay_core::record::Publish;
use overlay_tests::daemon::{Daemon, LIMIT};
use overlay_tests::oap::{Wire, request};
use overlay_tests::trust::NODE;
use overlay_tests::{http, on_both_profiles, wait};
use rustix::process::Signal;

on_both_profiles!(sigterm_serves_on_for_the_delay_and_a_second_one_aborts);

/// I-6, G-3: not ready at once, with the reason, while who is there and who comes is still served;
/// a second signal ends that at once, and says so in the exit code.
fn sigterm_serves_on_for_the_delay_and_a_second_one_aborts(profile: Profile) -> Result<()> {
    // Longer than anything here takes: only the second signal ends it.
    let delay = Duration::from_secs(600);
    let mut daemon = Daemon::start(profile, |config| config.drain.delay_ms = delay.as_millis() as u64)?;
    let open = Open::Publish { topic: "t".parse()? };
    let (mut there, _) = daemon.offer(NODE)?.greet(daemon.address)?;
    ensure!(there.start(3, &open, daemon.token(NODE)?)? == 200);
    daemon.process.signal(Signal::TERM);
    wait::until_true("it not to be ready", LIMIT, || Ok(!daemon.is_ready()))?;
    let body = http::get(daemon.admin, "/readyz")?.body;
    ensure!(body.contains("\"name\":\"draining\",\"ok\":false"), "{body}");
    ensure!(http::get(daemon.admin, "/healthz")?.status == 200, "it is live");

    let mut came = Wire::local(&daemon.socket())?;
    ensure!(came.start(3, &open, daemon.local_token()?)? == 200, "who comes is served");
    let message = request(3, Flags::default(), Publish::Message(Bytes::from_static(b"late")).encode());
    there.send(&message)?;
    came.send(&message)?;
    for answer in [there.receive()?, came.receive()?] {
        ensure!(answer.context("it closed")?.code == 200, "a message is accepted");
    }

    daemon.process.signal(Signal::TERM);
    let status = daemon.process.wait(LIMIT)?;
    ensure!(status.code() == Some(1), "{status}: {}", daemon.process.log_tail());
    ensure!(daemon.process.log().contains("stopped at once by a second signal"), "{}", daemon.process.log_tail());
    Ok(())
}
