//! What a new session costs the server: TCP, TLS, and what its protocol asks for before it may
//! be used. One after the other, each closed before the next.

use anyhow::Result;
use bytes::Bytes;
use overlay_core::control::Open;
use overlay_tests::process::processor_time;
use overlay_tests::trust::Authority;

use crate::Scale;
use crate::dialect::{CLIENT, Reach, start};
use crate::figures::Figures;
use crate::machine::Cores;
use crate::servers::Servers;

/// Connections of one round.
const CONNECTIONS: u32 = 400;

/// Prints the rows.
pub(crate) fn rows(cores: &Cores, scale: Scale) -> Result<()> {
    let servers = Servers::start(cores)?;
    let count = scale.count(CONNECTIONS);
    let mut serial = 0;
    let [mut floor, mut nats, mut hello, mut token] = [const { Vec::new() }; 4];
    for _ in 0..scale.repeat {
        let held = |reach: &Reach| (0..count).try_for_each(|_| reach.hold(0).map(drop));
        floor.push(cost(servers.floor.process.id(), count, || held(&servers.to_floor))?);
        nats.push(cost(servers.nats.process.id(), count, || held(&servers.to_nats))?);
        hello.push(cost(servers.daemon.process.id(), count, || held(&servers.to_daemon))?);
        let tokens = tokens(&servers.daemon.authority, &mut serial, count)?;
        token.push(cost(servers.daemon.process.id(), count, || {
            let topics = vec!["bench".parse()?];
            for token in &tokens {
                let mut link = servers.to_daemon.open(0)?;
                start(&mut link, &Open::Subscribe { topics: topics.clone() }, token)?;
            }
            Ok(())
        })?);
    }
    println!("\naccept, {count} connections a round");
    println!("| server | CPU µs a connection | multiple of the floor |");
    println!("| --- | --- | --- |");
    for (name, of) in [
        ("floor: raw rustls acceptor, mTLS, X25519MLKEM768", &floor),
        ("nats-server, no client certificate, X25519", &nats),
        ("overlay-daemon: mTLS, X25519MLKEM768, HELLO", &hello),
        ("the same, and START with a token not seen before", &token),
    ] {
        let multiples = of.iter().zip(&floor).map(|(cost, floor)| cost / floor);
        println!("| {name} | {:.0} | {} |", Figures::of_rounds(of.iter().copied()), Figures::of_rounds(multiples));
    }
    let tokens = token.iter().zip(&hello).map(|(token, hello)| token - hello);
    println!("START with its token: {:.0} µs", Figures::of_rounds(tokens));
    Ok(())
}

/// Server processor time of each of `count` connections, in microseconds.
fn cost(process: u32, count: u32, connect: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = processor_time(process)?;
    connect()?;
    Ok((processor_time(process)? - before).as_secs_f64() * 1e6 / f64::from(count))
}

/// Tokens that no verifier has seen.
fn tokens(authority: &Authority, serial: &mut u64, count: u32) -> Result<Vec<Bytes>> {
    let mut tokens = Vec::new();
    for _ in 0..count {
        let mut claims = Authority::claims(CLIENT)?;
        *serial += 1;
        claims.exp -= *serial;
        tokens.push(authority.token(&claims)?);
    }
    Ok(tokens)
}
