//! One publisher to eight subscribers, as fast as it goes: the server's processor time for each
//! message delivered.

use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use overlay_tests::process::processor_time;
use overlay_tests::wait::now;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;

use crate::Scale;
use crate::dialect::{Dialect, Event, Reach, room};
use crate::figures::Figures;
use crate::link::Link;
use crate::machine::Cores;
use crate::servers::Servers;

/// Who gets every message.
pub(crate) const SUBSCRIBERS: usize = 8;
/// Bytes, and messages, that the publisher may be ahead of the slowest subscriber: enough to keep
/// the server busy, and less than any server's queues, so that none drops.
const AHEAD_BYTES: usize = 4 << 20;
const AHEAD_MESSAGES: usize = 4_096;
/// Bytes that the publisher hands to TLS at a time.
const BURST_BYTES: usize = 64 * 1024;
const WARM_UP: Duration = Duration::from_millis(500);

/// Bytes of a message, by default.
pub(crate) const SIZES: [usize; 4] = [256, 1_024, 64 * 1_024, 900 * 1_024];
/// How long one round of one server is looked at.
const SPAN: Duration = Duration::from_secs(2);

/// Prints the rows: for each size the floor, then who is measured beside it, as its multiple.
pub(crate) fn rows(cores: &Cores, scale: Scale, sizes: &[usize]) -> Result<()> {
    let servers = Servers::start(cores)?;
    let (floor, broker) = (Load::Writer { apart: false }, Load::Broker);
    let measured = [
        ("floor: raw rustls writer", &servers.to_floor, servers.floor.process.id(), floor),
        ("floor, a record a message", &servers.to_floor, servers.floor.process.id(), Load::Writer { apart: true }),
        ("nats-server", &servers.to_nats, servers.nats.process.id(), Load::Broker),
        ("overlay-daemon", &servers.to_daemon, servers.daemon.process.id(), broker),
    ];
    println!("\nfan-out, 1 publisher to {SUBSCRIBERS} subscribers, TLS 1.3, saturated");
    println!(
        "| bytes | server | CPU ns a delivered message | multiple of the floor | delivered/s | server, generator: % of a core |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for &size in sizes {
        let mut rounds = vec![Vec::new(); measured.len()];
        for _ in 0..scale.repeat {
            for (place, (_, reach, process, load)) in measured.iter().enumerate() {
                rounds[place].push(round(reach, *process, size, load, scale.time(SPAN))?);
            }
        }
        for ((name, ..), of) in measured.iter().zip(&rounds) {
            let figures = |of_round: &dyn Fn(&Round) -> f64| Figures::of_rounds(of.iter().map(of_round));
            let multiples = of.iter().zip(&rounds[0]).map(|(round, floor)| round.nanoseconds / floor.nanoseconds);
            println!(
                "| {size} | {name} | {:.0} | {} | {:.0} | {:.0}, {:.0} |",
                figures(&|round| round.nanoseconds),
                Figures::of_rounds(multiples),
                figures(&|round| round.rate).median(),
                100.0 * figures(&|round| round.server).median(),
                100.0 * figures(&|round| round.generator).median(),
            );
        }
    }
    Ok(())
}

/// What one round saw.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Round {
    /// Server processor time a message delivered, in nanoseconds.
    pub(crate) nanoseconds: f64,
    /// Messages delivered a second, all subscribers together.
    pub(crate) rate: f64,
    /// Parts of a core that server and generator used.
    pub(crate) server: f64,
    pub(crate) generator: f64,
}

/// Who is measured.
pub(crate) enum Load {
    /// A server to which one publishes.
    Broker,
    /// The floor, that writes by itself; each message its own record where told.
    Writer { apart: bool },
}

struct Fanout<'a> {
    dialect: &'a Dialect,
    size: usize,
    poll: OwnedFd,
    subscribers: Vec<Link>,
    publisher: Option<Link>,
    delivered: Vec<u64>,
    published: u64,
    burst: Vec<u8>,
    in_burst: u64,
    ahead: u64,
    room: Vec<u8>,
}

/// One round against the server with that process id.
pub(crate) fn round(reach: &Reach, process: u32, size: usize, load: &Load, span: Duration) -> Result<Round> {
    let mut fanout = Fanout::connect(reach, size, load)?;
    fanout.run(WARM_UP)?;
    let own = std::process::id();
    let (began, server, generator) = (now(), processor_time(process)?, processor_time(own)?);
    let before: u64 = fanout.delivered.iter().sum();
    fanout.run(span)?;
    let delivered = (fanout.delivered.iter().sum::<u64>() - before) as f64;
    let (server, generator) = (processor_time(process)? - server, processor_time(own)? - generator);
    let elapsed = began.elapsed().as_secs_f64();
    ensure!(delivered > 0.0, "{} delivered nothing", reach.name);
    Ok(Round {
        nanoseconds: server.as_nanos() as f64 / delivered,
        rate: delivered / elapsed,
        server: server.as_secs_f64() / elapsed,
        generator: generator.as_secs_f64() / elapsed,
    })
}

impl<'a> Fanout<'a> {
    fn connect(reach: &'a Reach, size: usize, load: &Load) -> Result<Self> {
        let mut subscribers = Vec::new();
        for _ in 0..SUBSCRIBERS {
            subscribers.push(match load {
                Load::Broker => reach.subscribe()?,
                Load::Writer { apart } => reach.take(size, *apart)?,
            });
        }
        let publisher = matches!(load, Load::Broker).then(|| reach.publish(size)).transpose()?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (place, link) in subscribers.iter().chain(&publisher).enumerate() {
            link.unblock()?;
            epoll::add(&poll, &link.socket, EventData::new_u64(place as u64), EventFlags::IN)?;
        }
        let message = reach.dialect.message(&Bytes::from(vec![7; size]))?;
        let in_burst = (BURST_BYTES / size).max(1);
        Ok(Self {
            dialect: &reach.dialect,
            size,
            poll,
            delivered: vec![0; subscribers.len()],
            subscribers,
            publisher,
            published: 0,
            burst: message.repeat(in_burst),
            in_burst: in_burst as u64,
            ahead: (AHEAD_BYTES / size).clamp(4, AHEAD_MESSAGES) as u64,
            room: room(),
        })
    }

    fn run(&mut self, span: Duration) -> Result<()> {
        let began = now();
        let mut events = Vec::with_capacity(2 * SUBSCRIBERS);
        while began.elapsed() < span {
            // A full socket is tried again after the next read, which is what empties it.
            let wait = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
            self.publish()?;
            epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&wait))?;
            for event in events.drain(..) {
                self.read(usize::try_from(event.data.u64())?)?;
            }
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        let Some(publisher) = &mut self.publisher else { return Ok(()) };
        let slowest = self.delivered.iter().min().copied().unwrap_or_default();
        while publisher.flush()? && self.published + self.in_burst <= slowest + self.ahead {
            publisher.queue(&self.burst)?;
            self.published += self.in_burst;
        }
        Ok(())
    }

    fn read(&mut self, place: usize) -> Result<()> {
        let link = match self.subscribers.get_mut(place) {
            Some(link) => link,
            None => match &mut self.publisher {
                Some(publisher) => publisher,
                None => return Ok(()),
            },
        };
        link.receive(&mut self.room)?;
        while let Some(event) = self.dialect.next(&mut link.read, self.size)? {
            if let Event::Message(_) = event {
                self.delivered[place] += 1;
            }
        }
        Ok(())
    }
}
