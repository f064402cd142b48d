//! What a session at rest keeps resident in the server.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::Result;
use overlay_tests::process::Process;
use overlay_tests::wait::{self, Look};

use crate::Scale;
use crate::dialect::Reach;
use crate::figures::Figures;
use crate::machine::Cores;
use crate::servers::Servers;

const SESSIONS: u32 = 10_000;
/// Sessions before the first look, so that what a server makes once is not counted.
const FIRST: u32 = 100;
const SETTLE: Duration = Duration::from_secs(30);

/// Prints the rows. Servers are new each round: what one returned to its allocator would count
/// for less the second time.
pub(crate) fn rows(cores: &Cores, scale: Scale) -> Result<()> {
    let count = scale.count(SESSIONS);
    let [mut floor, mut nats, mut daemon] = [const { Figures::new() }; 3];
    for _ in 0..scale.repeat {
        let servers = Servers::start(cores)?;
        floor.push(each(&servers.to_floor, &servers.floor.process, count)?);
        nats.push(each(&servers.to_nats, &servers.nats.process, count)?);
        daemon.push(each(&servers.to_daemon, &servers.daemon.process, count)?);
    }
    println!("\n{count} sessions at rest");
    println!("| server | KiB resident each |");
    println!("| --- | --- |");
    println!("| floor: raw rustls acceptor, mTLS, X25519MLKEM768 | {floor:.1} |");
    println!("| nats-server, no client certificate, X25519 | {nats:.1} |");
    println!("| overlay-daemon: mTLS, X25519MLKEM768, HELLO | {daemon:.1} |");
    Ok(())
}

fn each(reach: &Reach, process: &Process, count: u32) -> Result<f64> {
    let open = |numbers: std::ops::Range<u32>| -> Result<Vec<TcpStream>> {
        numbers.map(|number| Ok(reach.hold(number)?.into_socket())).collect()
    };
    let first = open(0..FIRST)?;
    let before = settled(process)?;
    let held = open(FIRST..FIRST + count)?;
    let after = settled(process)?;
    drop((first, held));
    Ok((after as f64 - before as f64) / f64::from(count))
}

/// Once it no longer changes from one look to the next.
fn settled(process: &Process) -> Result<u64> {
    let mut last = 0;
    wait::until("memory to settle", SETTLE, || {
        let resident = process.resident_kib()?;
        let same = resident.abs_diff(std::mem::replace(&mut last, resident)) < 64;
        Ok(if same { Look::Holds(resident) } else { Look::NotYet(format!("{resident} KiB")) })
    })
}
