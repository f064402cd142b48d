//! Daemons that know one another's onion addresses and nothing else.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use overlay_core::config::{Peer, Profile};
use overlay_tests::daemon::Daemon;
use overlay_tests::tor::{LIMIT, Stream};
use overlay_tests::wait::{self, Look};

use crate::world::{HARBOUR, NAMES, World, run, sessions, subscribe, unreachable};

/// Each holds a session with each of the others, by Tor at both of its ends, post-quantum as by
/// any transport.
pub(crate) fn three_daemons_become_peers_by_onion_services(world: &World) -> Result<()> {
    for (name, daemon) in world.daemons() {
        wait::until(&format!("{name} to have its peers"), LIMIT, || {
            let (_, reason) = daemon.condition("peers")?;
            Ok(if reason.starts_with("2 of") { Look::Holds(()) } else { Look::NotYet(daemon.process.log_tail()) })
        })?;
    }
    for (name, daemon) in world.daemons() {
        let peers = sessions(daemon, "peer")?;
        let names: BTreeSet<_> = peers.iter().filter_map(|session| session["peer"].as_str()).collect();
        let others: BTreeSet<_> = NAMES.into_iter().filter(|other| *other != name).collect();
        ensure!(names == others, "{name} has {names:?}");
        for session in &peers {
            ensure!(session["transport"] == "tor" && session["group"] == "hybrid", "{name}: {session}");
        }
        ensure!(daemon.condition("transport")? == (true, String::new()), "{name}");
    }
    Ok(())
}

/// What one publishes, all others hear: a word from each, and what takes many cells of Tor's.
pub(crate) fn messages_flow_both_ways(world: &World) -> Result<()> {
    let all = NAMES.len();
    let heard = world
        .daemons()
        .map(|(name, daemon)| Ok((name, subscribe(daemon, "word", all)?)))
        .collect::<Result<Vec<_>>>()?;
    for (name, daemon) in world.daemons() {
        run(daemon, &["pub", "word", name])?;
    }
    for (name, subscriber) in heard {
        let words: BTreeSet<String> = subscriber.lines(all)?.into_iter().collect();
        ensure!(words.iter().eq(&NAMES), "{name} heard {words:?}");
    }

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("large");
    let large: Vec<u8> = (0..300_000_u32).flat_map(|n| n.to_le_bytes()).take(1 << 20).collect();
    fs::write(&file, &large)?;
    let mut daemons = world.daemons();
    let (_, first) = daemons.next().context("a daemon")?;
    let heard = daemons.map(|(_, daemon)| subscribe(daemon, "large", 1)).collect::<Result<Vec<_>>>()?;
    run(first, &["pub", "large", "--file", &file.to_string_lossy()])?;
    for subscriber in heard {
        ensure!(subscriber.finish(LIMIT)? == large);
    }
    Ok(())
}

/// The client's own account of it: every connection to a peer is on a circuit that was built for
/// that daemon and that peer, and carries no other.
pub(crate) fn each_peer_has_a_circuit_of_its_own(world: &World) -> Result<()> {
    let pairs = NAMES.len() * (NAMES.len() - 1) / 2;
    // Of two sessions between a pair, one goes.
    let streams: Vec<Stream> = wait::until("one connection for each pair", LIMIT, || {
        let streams = world.network.client().streams()?;
        Ok(if streams.len() == pairs { Look::Holds(streams) } else { Look::NotYet(format!("{streams:#?}")) })
    })?;
    let circuits: BTreeSet<_> = streams.iter().map(|stream| &stream.circuit).collect();
    let isolations: BTreeSet<_> = streams.iter().map(|stream| &stream.isolation).collect();
    ensure!(circuits.len() == pairs && isolations.len() == pairs, "{streams:#?}");
    for stream in &streams {
        let peer: Peer = world.peer(&stream.isolation.0)?;
        ensure!(stream.target == peer.address, "{stream:?} is not for {}", peer.address);
    }
    Ok(())
}

/// Who answers at an onion address is judged by its certificate, as anywhere.
pub(crate) fn an_onion_address_is_no_identity(world: &World) -> Result<()> {
    let wanted = "spiffe://overlay.test/ns/test/overlaynode/other";
    let peer = Peer { name: "somebody".to_owned(), identity: wanted.parse()?, ..world.peer(NAMES[0])? };
    let socks = world.network.client().socks.to_string();
    let daemon = world.daemon(Profile::Micronode, "doubtful", vec![peer], |config| config.tor.socks = socks)?;
    wait::until("it to be refused by name", LIMIT, || {
        let log = daemon.process.log();
        let told = log.contains("answered there, not") && log.contains(wanted);
        Ok(if told { Look::Holds(()) } else { Look::NotYet(daemon.process.log_tail()) })
    })?;
    ensure!(sessions(&daemon, "peer")?.is_empty());
    Ok(())
}

/// A peer that died is dialled until it is back, under the address that it had; in both profiles.
pub(crate) fn a_killed_peer_comes_back(world: &World) -> Result<()> {
    let has = |daemon: &Daemon, peers: &str| {
        let (_, reason) = daemon.condition("peers")?;
        Ok(if reason.starts_with(peers) { Look::Holds(()) } else { Look::NotYet(daemon.process.log_tail()) })
    };
    for profile in [Profile::Micronode, Profile::Macronode] {
        let there = || {
            world.daemon(profile, HARBOUR, vec![unreachable("near")?], |config| config.tor.listen = Some(world.harbour))
        };
        let mut first = there()?;
        let socks = world.network.client().socks.to_string();
        let near = world.daemon(profile, "near", vec![world.harbour_peer()?], |config| config.tor.socks = socks)?;
        wait::until("them to be peers", LIMIT, || has(&near, "1 of"))?;
        first.process.kill()?;
        wait::until("the dead one to be missed", LIMIT, || has(&near, "0 of"))?;
        let second = there()?;
        wait::until("them to be peers again", LIMIT, || has(&near, "1 of"))?;
        let heard = subscribe(&second, "again", 1)?;
        run(&near, &["pub", "again", "ahoy"])?;
        ensure!(heard.lines(1)? == ["ahoy"]);
    }
    Ok(())
}
