//! Ten thousand sessions that come and go, with the daemon's limits as they are by default: what
//! its memory does, what it refuses, what `/readyz` says, and what an honest client notices.
//!
//! Each session pings as a real one does. A probe publishes to a topic of its own and waits
//! for the event, before the crowd comes and throughout.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use bytes::{Bytes, BytesMut};
use overlay_core::codec;
use overlay_core::config::Profile;
use overlay_core::frame::{AppProto, Flags, Frame};
use overlay_core::identity::TenantId;
use overlay_tests::daemon::Daemon;
use overlay_tests::http;
use overlay_tests::process::processor_time;
use overlay_tests::wait::now;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::Scale;
use crate::dialect::{CLIENT, Dialect, Reach, await_frame, room};
use crate::figures::percentile;
use crate::link::Link;
use crate::machine::Cores;

const SESSIONS: u32 = 10_000;
const SPAN: Duration = Duration::from_secs(600);
/// How long the probe is alone at first.
const QUIET: Duration = Duration::from_secs(20);
/// Sessions that end and are replaced, a second: each several times in all, or what only the first
/// replacement costs would look like growth.
const CHURN: u32 = 80;
/// A third of the default idle timeout, as the dialling side is told to.
const PING: Duration = Duration::from_secs(5);
const PROBE: Duration = Duration::from_millis(50);
/// One line of the table.
const LINE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_secs(1);

/// What the probe and `/readyz` said since the last line.
#[derive(Default)]
struct Seen {
    /// Milliseconds from publishing to the event.
    latencies: Vec<f64>,
    ready: u32,
    unready: Vec<String>,
}

/// Runs and prints.
pub(crate) fn rows(cores: &Cores, scale: Scale) -> Result<()> {
    let daemon = cores.serve(|| Daemon::start(Profile::Macronode, |_| {}))?;
    let oap = Dialect::Oap(daemon.token(CLIENT)?);
    let reach = Reach::new("overlay-daemon", daemon.address, oap, &daemon.authority)?;
    let (seen, over) = (Mutex::new(Seen::default()), AtomicBool::new(false));
    println!(
        "\n{} sessions, {CHURN} of them replaced each second, pings every {PING:?}, default limits",
        scale.count(SESSIONS)
    );
    std::thread::scope(|scope| {
        let probe = scope.spawn(|| probe(&reach, &seen, &over));
        let look = scope.spawn(|| look(&daemon, &seen, &over));
        let crowd = crowd(&daemon, &reach, scale, &seen);
        over.store(true, Ordering::Relaxed);
        let ended = |joined: std::thread::Result<Result<()>>| joined.map_err(|_| anyhow!("a thread panicked"))?;
        crowd.and(ended(probe.join())).and(ended(look.join()))
    })
}

fn crowd(daemon: &Daemon, reach: &Reach, scale: Scale, seen: &Mutex<Seen>) -> Result<()> {
    println!(
        "| s | sessions | came and went | refused or lost | rejected_total | RSS MiB | /readyz 200 of | probe p50, p99 ms | daemon, generator: % of a core |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut crowd = Crowd::new(reach)?;
    crowd.turn_until(now() + scale.time(QUIET))?;
    line(daemon, &crowd, seen, "alone")?;
    for _ in 0..scale.count(SESSIONS) {
        crowd.come()?;
        crowd.turn()?;
    }
    crowd.turn_until(now() + PING)?;
    line(daemon, &crowd, seen, "all here")?;
    let began = now();
    crowd.churn_from = Some((began, 0));
    let span = scale.time(SPAN);
    while began.elapsed() < span {
        let until = (began.elapsed() + scale.time(LINE)).min(span);
        crowd.turn_until(began + until)?;
        line(daemon, &crowd, seen, &format!("{}", began.elapsed().as_secs()))?;
    }
    Ok(())
}

fn line(daemon: &Daemon, crowd: &Crowd<'_>, seen: &Mutex<Seen>, when: &str) -> Result<()> {
    let mut seen = std::mem::take(&mut *seen.lock().map_err(|_| anyhow!("a thread panicked"))?);
    seen.latencies.sort_by(f64::total_cmp);
    let part = |before: Duration, after: Duration| (after - before).as_secs_f64() * 100.0;
    let mut used = crowd.used.lock().map_err(|_| anyhow!("a thread panicked"))?;
    let (at, server, own) = (now(), daemon.processor_time()?, processor_time(std::process::id())?);
    let elapsed = used.0.elapsed().as_secs_f64();
    let (server_part, own_part) = (part(used.1, server) / elapsed, part(used.2, own) / elapsed);
    *used = (at, server, own);
    println!(
        "| {when} | {} | {} | {} | {} | {:.1} | {} of {} | {:.1}, {:.1} | {server_part:.0}, {own_part:.0} |",
        crowd.open,
        crowd.gone,
        crowd.refused,
        daemon.metric("overlay_rejected_total")?,
        daemon.resident_kib()? as f64 / 1_024.0,
        seen.ready,
        seen.ready as usize + seen.unready.len(),
        percentile(&seen.latencies, 50),
        percentile(&seen.latencies, 99),
    );
    for body in seen.unready {
        println!("/readyz: {body}");
    }
    Ok(())
}

/// Asks `/readyz` once a second.
fn look(daemon: &Daemon, seen: &Mutex<Seen>, over: &AtomicBool) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        let answer = http::get(daemon.admin, "/readyz");
        let mut seen = seen.lock().map_err(|_| anyhow!("a thread panicked"))?;
        match answer {
            Ok(answer) if answer.status == 200 => seen.ready += 1,
            Ok(answer) => seen.unready.push(answer.body),
            Err(error) => seen.unready.push(format!("{error:#}")),
        }
        drop(seen);
        std::thread::park_timeout(LOOK);
    }
    Ok(())
}

/// Publishes to itself at a steady pace.
fn probe(reach: &Reach, seen: &Mutex<Seen>, over: &AtomicBool) -> Result<()> {
    let mut link = reach.open(1)?;
    let Dialect::Oap(token) = &reach.dialect else { return Ok(()) };
    let open = |op: &str| format!("{{\"op\":{op}}}");
    for (stream, op) in
        [(3, open("\"subscribe\",\"topics\":[\"probe\"]")), (5, open("\"publish\",\"topic\":\"probe\""))]
    {
        let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), stream, Bytes::from(op));
        link.send(&codec::encoded(&Frame { cap: token.clone(), ..start })?)?;
        anyhow::ensure!(await_frame(&mut link)?.code == 200, "the probe's stream was refused");
    }
    let message = Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(0), 5, Bytes::from_static(b"\0probe"));
    let message = codec::encoded(&message)?;
    while !over.load(Ordering::Relaxed) {
        let sent = now();
        link.send(&message)?;
        let (mut answered, mut came) = (false, false);
        while !answered || !came {
            let frame = await_frame(&mut link)?;
            anyhow::ensure!(frame.code == 200 || frame.flags.has(Flags::EVENT), "the probe got {}", frame.code);
            answered |= frame.flags.has(Flags::RESP);
            came |= frame.flags.has(Flags::EVENT);
        }
        let took = sent.elapsed();
        let mut seen = seen.lock().map_err(|_| anyhow!("a thread panicked"))?;
        seen.latencies.push(took.as_secs_f64() * 1e3);
        drop(seen);
        std::thread::park_timeout(PROBE.saturating_sub(took));
    }
    Ok(())
}

/// The sessions.
struct Crowd<'a> {
    reach: &'a Reach,
    poll: rustix::fd::OwnedFd,
    /// In order of their coming; none where it is gone.
    links: Vec<Option<Link>>,
    /// Whose ping is due when, in order.
    due: VecDeque<(Instant, usize)>,
    oldest: usize,
    churn_from: Option<(Instant, u32)>,
    open: u32,
    gone: u32,
    refused: u32,
    ping: Bytes,
    room: Vec<u8>,
    /// When the last line was printed, and the processor time of daemon and generator then.
    used: Mutex<(Instant, Duration, Duration)>,
}

impl<'a> Crowd<'a> {
    fn new(reach: &'a Reach) -> Result<Self> {
        Ok(Self {
            reach,
            poll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            links: Vec::new(),
            due: VecDeque::new(),
            oldest: 0,
            churn_from: None,
            open: 0,
            gone: 0,
            refused: 0,
            ping: codec::encoded(&Frame::new(Flags::REQ, AppProto::CONTROL, TenantId(0), 1, Bytes::new()))?,
            room: room(),
            used: Mutex::new((now(), Duration::ZERO, Duration::ZERO)),
        })
    }

    fn come(&mut self) -> Result<()> {
        let place = self.links.len();
        match self.reach.open(2 + u32::try_from(place)?) {
            Ok(link) => {
                link.unblock()?;
                epoll::add(&self.poll, &link.socket, EventData::new_u64(place as u64), EventFlags::IN)?;
                self.links.push(Some(link));
                self.due.push_back((now() + PING, place));
                self.open += 1;
            }
            Err(_) => {
                self.links.push(None);
                self.refused += 1;
            }
        }
        Ok(())
    }

    /// The oldest that is still there goes.
    fn go(&mut self) {
        while let Some(place) = self.links.get_mut(self.oldest) {
            self.oldest += 1;
            if place.take().is_some() {
                self.open -= 1;
                self.gone += 1;
                return;
            }
        }
    }

    fn turn_until(&mut self, until: Instant) -> Result<()> {
        while now() < until {
            self.turn()?;
            if let Some((from, count)) = self.churn_from
                && from.elapsed() >= Duration::from_secs(1) * count / CHURN
            {
                self.churn_from = Some((from, count + 1));
                self.go();
                self.come()?;
            }
        }
        Ok(())
    }

    /// Sends what is due and reads what is there.
    fn turn(&mut self) -> Result<()> {
        while let Some((at, place)) = self.due.front().copied() {
            if at > now() {
                break;
            }
            self.due.pop_front();
            let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { continue };
            if link.queue(&self.ping).and_then(|()| link.flush()).is_err() {
                self.lose(place);
                continue;
            }
            self.due.push_back((at + PING, place));
        }
        let mut events = Vec::with_capacity(256);
        let wait = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&wait))?;
        for event in events {
            let place = usize::try_from(event.data.u64()).context("a place")?;
            let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { continue };
            match link.receive(&mut self.room) {
                // Pongs, and nothing else.
                Ok(_) => link.read = BytesMut::new(),
                Err(_) => self.lose(place),
            }
        }
        Ok(())
    }

    /// One that the daemon ended.
    fn lose(&mut self, place: usize) {
        self.links[place] = None;
        self.open -= 1;
        self.refused += 1;
    }
}
