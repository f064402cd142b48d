//! The exposition as Prometheus's own tool sees it (G-8, C-5).

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use overlay_core::config::Profile;
use overlay_tests::daemon::Daemon;
use overlay_tests::on_both_profiles;
use overlay_tests::profile::amnesia;

on_both_profiles!(promtool_finds_nothing_to_mend);

/// Names, units, help texts and types are as the field has them.
fn promtool_finds_nothing_to_mend(profile: Profile) -> Result<()> {
    let daemon = Daemon::start(profile, |_| {})?;
    let metrics = daemon.metrics()?;
    for golden in [
        "overlay_inflight{peer=\"other\"",
        "overlay_rejected_total{reason=\"quota\"",
        "overlay_gossip_frames_total{dir=\"tx\"",
        "request_latency_seconds_bucket{route=\"publish\"",
        "session_open_total{",
        "session_close_total{",
    ] {
        ensure!(metrics.lines().any(|line| line.starts_with(golden)), "no {golden} in:\n{metrics}");
    }
    let label = format!("amnesia=\"{}\"", amnesia(profile));
    let mut samples = metrics.lines().filter(|line| !line.starts_with('#'));
    ensure!(samples.all(|line| line.contains(&label)), "without {label}:\n{metrics}");
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("promtool is missing (Debian: apt-get install prometheus)")?;
    promtool.stdin.take().context("its input")?.write_all(metrics.as_bytes())?;
    let output = promtool.wait_with_output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && said.trim().is_empty(), "promtool: {said}");
    Ok(())
}
