//! One publisher to eight subscribers at a steady pace that leaves every server idle most of
//! the time: from the moment a message is sent to the moment each subscriber has it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use overlay_tests::process::processor_time;
use overlay_tests::wait::now;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::Scale;
use crate::dialect::{Event, Reach, room};
use crate::fanout::SUBSCRIBERS;
use crate::figures::{Figures, percentile};
use crate::link::Link;
use crate::machine::Cores;
use crate::servers::Servers;

const BYTES: usize = 1_024;
const A_SECOND: u32 = 2_000;
const SPAN: Duration = Duration::from_secs(4);
/// For the last messages to arrive.
const LATE: Duration = Duration::from_secs(2);

/// What one round saw, in microseconds.
struct Round {
    p50: f64,
    p99: f64,
    /// Server processor time a message delivered.
    cost: f64,
}

/// Prints the rows.
pub(crate) fn rows(cores: &Cores, scale: Scale) -> Result<()> {
    let servers = Servers::start(cores)?;
    let measured = [
        ("floor: raw rustls relay", &servers.to_floor, servers.floor.process.id()),
        ("nats-server", &servers.to_nats, servers.nats.process.id()),
        ("overlay-daemon", &servers.to_daemon, servers.daemon.process.id()),
    ];
    let mut rounds = measured.map(|_| Vec::new());
    for _ in 0..scale.repeat {
        for ((_, reach, process), rounds) in measured.iter().zip(&mut rounds) {
            rounds.push(round(reach, *process, scale.time(SPAN))?);
        }
    }
    println!("\nlatency, {A_SECOND} messages/s of {BYTES} bytes to {SUBSCRIBERS} subscribers");
    println!("| server | p50 µs | p99 µs | p50 / floor's | p99 / floor's | CPU µs a delivered message |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for ((name, ..), of) in measured.iter().zip(&rounds) {
        let figures = |of_round: &dyn Fn(&Round) -> f64| Figures::of_rounds(of.iter().map(of_round));
        let multiples = |of_round: &dyn Fn(&Round) -> f64| {
            Figures::of_rounds(of.iter().zip(&rounds[0]).map(|(round, floor)| of_round(round) / of_round(floor)))
        };
        println!(
            "| {name} | {:.0} | {:.0} | {} | {} | {:.1} |",
            figures(&|round| round.p50),
            figures(&|round| round.p99),
            multiples(&|round| round.p50),
            multiples(&|round| round.p99),
            figures(&|round| round.cost),
        );
    }
    Ok(())
}

fn round(reach: &Reach, process: u32, span: Duration) -> Result<Round> {
    let mut subscribers = (0..SUBSCRIBERS).map(|_| reach.subscribe()).collect::<Result<Vec<_>>>()?;
    let mut publisher = reach.publish(BYTES)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for (place, link) in subscribers.iter().chain([&publisher]).enumerate() {
        link.unblock()?;
        epoll::add(&poll, &link.socket, EventData::new_u64(place as u64), EventFlags::IN)?;
    }
    let total = u64::from(A_SECOND) * span.as_millis() as u64 / 1_000;
    let between = Duration::from_secs(1) / A_SECOND;
    let (began, before) = (now(), processor_time(process)?);
    let (mut sent, mut room, mut events) = (0, room(), Vec::with_capacity(16));
    let mut latencies = Vec::with_capacity(total as usize * SUBSCRIBERS);
    while latencies.len() < total as usize * SUBSCRIBERS {
        ensure!(
            began.elapsed() < span + LATE,
            "{} delivered {} of {total} to each",
            reach.name,
            latencies.len() / SUBSCRIBERS
        );
        while sent < total && began.elapsed() >= between * u32::try_from(sent)? {
            publisher.queue(&reach.dialect.message(&stamped(began))?)?;
            ensure!(publisher.flush()?, "the publisher's socket is full");
            sent += 1;
        }
        let due = if sent < total { between * u32::try_from(sent)? } else { span + LATE };
        let wait = due.saturating_sub(began.elapsed());
        let wait = Timespec { tv_sec: wait.as_secs().try_into()?, tv_nsec: wait.subsec_nanos().into() };
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), Some(&wait))?;
        for event in events.drain(..) {
            let link = subscribers.get_mut(usize::try_from(event.data.u64())?).unwrap_or(&mut publisher);
            read(reach, link, &mut room, began, &mut latencies)?;
        }
    }
    let cost = (processor_time(process)? - before).as_secs_f64() * 1e6 / latencies.len() as f64;
    latencies.sort_by(f64::total_cmp);
    Ok(Round { p50: percentile(&latencies, 50), p99: percentile(&latencies, 99), cost })
}

/// A message that says when it was sent.
fn stamped(began: Instant) -> Bytes {
    let mut message = vec![7; BYTES];
    message[..16].copy_from_slice(&began.elapsed().as_nanos().to_be_bytes());
    message.into()
}

fn read(reach: &Reach, link: &mut Link, room: &mut [u8], began: Instant, latencies: &mut Vec<f64>) -> Result<()> {
    link.receive(room)?;
    while let Some(event) = reach.dialect.next(&mut link.read, BYTES)? {
        if let Event::Message(message) = event {
            let sent = message.get(..16).and_then(|bytes| bytes.try_into().ok()).map(u128::from_be_bytes);
            let sent = sent.context("a message without its time")?;
            latencies.push((began.elapsed().as_nanos() - sent) as f64 / 1e3);
        }
    }
    Ok(())
}
