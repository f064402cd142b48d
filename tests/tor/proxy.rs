//! The SOCKS proxy goes and comes; the daemon says so, and is a peer whenever it can be.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Result, ensure};
use overlay_core::config::{LogLevel, Profile};
use overlay_tests::control_plane::free_ports;
use overlay_tests::daemon::Daemon;
use overlay_tests::tor::LIMIT;
use overlay_tests::wait::{self, Look};

use crate::world::{LATE, NAMES, World};

pub(crate) fn a_proxy_that_is_down_is_named_and_tried_again(world: &World) -> Result<()> {
    let [port] = free_ports()?;
    let socks = SocketAddr::from(([127, 0, 0, 1], port));
    let daemon = world.daemon(Profile::Micronode, LATE, vec![world.peer(NAMES[0])?], |config| {
        config.tor.socks = socks.to_string();
        config.observability.log_level = LogLevel::Debug;
        config.readiness.peer_loss_grace_ms = 0;
    })?;
    let named = format!("cannot use the SOCKS proxy {socks} (tor.socks): Connection refused");
    wait::until("readiness to name the proxy", LIMIT, || transport_says(&daemon, &named))?;
    ensure!(daemon.is_ready(), "no peers are asked for: a proxy alone is no reason not to be ready");
    // Asked for now, which is live.
    let file = daemon.folder().join("overlay.toml");
    fs::write(&file, fs::read_to_string(&file)?.replace("min_peers = 0", "min_peers = 1"))?;
    wait::until_true("it not to be ready without a peer", LIMIT, || Ok(!daemon.is_ready()))?;
    wait::until_true("the proxy to be tried again", LIMIT, || {
        Ok(daemon.process.log().matches("dialling failed").count() >= 3)
    })?;
    let log = daemon.process.log();
    ensure!(log.matches("no session with this peer yet").count() == 1, "told once:\n{}", daemon.process.log_tail());
    ensure!(log.contains(&named), "{}", daemon.process.log_tail());

    let proxy = world.network.another_client("late-client", socks)?;
    wait::until("it to be ready with its peer", LIMIT, || ready(&daemon))?;
    ensure!(daemon.condition("transport")? == (true, String::new()));

    proxy.stop()?;
    wait::until_true("its session to be gone", LIMIT, || Ok(!daemon.is_ready()))?;
    wait::until("readiness to name the proxy", LIMIT, || transport_says(&daemon, &named))?;
    let _proxy = world.network.another_client("late-client", socks)?;
    wait::until("it to be ready again", LIMIT, || ready(&daemon))
}

fn ready(daemon: &Daemon) -> Result<Look<()>> {
    Ok(if daemon.is_ready() { Look::Holds(()) } else { Look::NotYet(daemon.process.log_tail()) })
}

fn transport_says(daemon: &Daemon, want: &str) -> Result<Look<()>> {
    let (ok, reason) = daemon.condition("transport")?;
    Ok(if ok && reason.starts_with(want) { Look::Holds(()) } else { Look::NotYet(reason) })
}
