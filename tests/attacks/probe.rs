//! The honest client: one TLS session that publishes at a fixed pace and subscribes to what
//! it publishes. It knows of every message whether and when it came.

use std::collections::{HashMap, VecDeque};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use overlay_core::control::Open;
use overlay_core::frame::{Flags, Frame};
use overlay_core::record::{Publish, Record};
use overlay_core::status::ErrorBody;
use overlay_tests::daemon::Daemon;
use overlay_tests::oap::{Heard, Tls, request};
use overlay_tests::wait::{self, Look, now};
use rustix::thread::gettid;
use rustls::{ClientConnection, StreamOwned};

/// From one message to the next: half of what a session of a Micronode may send by default, and a
/// fifth of what one of a Macronode may.
const PACE: Duration = Duration::from_millis(10);
/// Bytes of a message.
const SIZE: usize = 256;
/// Messages of the quiet phase, and at least as many beside an attack that is made by
/// [`Probe::beside`]. Four of them are later than its p99; two, as with 200, had it off by half.
const QUIET: usize = 400;
/// How many times its quiet p99 the probe's p99 may be beside an attack (**H**).
const MOST: f64 = 2.0;
/// How often a row is run before the probe is late because of the daemon.
const ATTEMPTS: usize = 5;
/// For all of them to come.
const LIMIT: Duration = Duration::from_secs(60);
/// Streams.
const SUBSCRIBED: u64 = 3;
const PUBLISHED: u64 = 5;
/// Who it is.
const PROBE: &str = "spiffe://overlay.test/ns/test/client/probe";

/// What came of the messages so far.
#[derive(Default)]
struct Ledger {
    /// From publishing to arrival, of those that came.
    latencies: Vec<Duration>,
    published: u64,
    /// Refused for now, and published again.
    refused: u64,
}

/// A probe that runs.
pub(crate) struct Probe {
    ledger: Arc<Mutex<Ledger>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
    quiet: Latencies,
    /// Messages published when the quiet phase was over.
    before: u64,
    /// KiB resident in the daemon then.
    resident_kib: u64,
}

/// What a probe saw while the daemon was attacked.
pub(crate) struct Seen {
    /// Messages published, and so many came.
    pub(crate) messages: u64,
    /// Times that one was refused (429 or 503) and had to be published again.
    pub(crate) refused: u64,
    /// KiB resident in the daemon before the attack.
    pub(crate) resident_kib: u64,
    quiet: Latencies,
    attacked: Latencies,
}

/// The probe got all its messages, but not as soon as it should have.
#[derive(Debug, thiserror::Error)]
#[error("{0}: more than {MOST} times")]
struct Late(String);

/// Runs a row, and again where its probe was late: whatever else the machine does makes a p99
/// late now and then, and a daemon that starves its clients makes it so every time. In a thread
/// of its own: what attacks is to yield to the probe and the daemon ([`Probe::start`]).
pub(crate) fn run(row: fn() -> Result<()>) -> Result<()> {
    for _ in 1..ATTEMPTS {
        match apart(row) {
            Err(error) if error.is::<Late>() => println!("again: {error:#}"),
            result => return result,
        }
    }
    apart(row)
}

fn apart(row: fn() -> Result<()>) -> Result<()> {
    thread::spawn(row).join().map_err(|_| anyhow!("the row panicked"))?
}

/// Makes a test of each row that is attacked on one profile alone, run by [`run`].
macro_rules! rows {
    ($($name:ident),+ $(,)?) => {
        mod row {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                $crate::probe::run(super::$name)
            })+
        }
    };
}
pub(crate) use rows;

/// A distribution's marks.
#[derive(Clone, Copy, Debug)]
struct Latencies {
    p50: Duration,
    p99: Duration,
    most: Duration,
}

impl Latencies {
    fn of(mut all: Vec<Duration>) -> Result<Self> {
        all.sort_unstable();
        let most = *all.last().context("the probe got no message")?;
        let at = |percent: usize| all[(all.len() - 1) * percent / 100];
        Ok(Self { p50: at(50), p99: at(99), most })
    }
}

impl Probe {
    /// Starts one, and lets it run for a while with nothing else going on: what its latency is
    /// compared with. What the caller's thread does from then on, and those that it starts, yields
    /// to probe and daemon where they want a processor: the attacker's is not the daemon's to give.
    pub(crate) fn start(daemon: &Daemon) -> Result<Self> {
        let (mut wire, _) = daemon.offer(PROBE)?.greet(daemon.address)?;
        let token = daemon.token(PROBE)?;
        let topic: overlay_core::identity::Topic = "probe".parse()?;
        let code = wire.start(SUBSCRIBED, &Open::Subscribe { topics: vec![topic.clone()] }, token.clone())?;
        ensure!(code == 200, "the probe's subscription got {code}");
        let code = wire.start(PUBLISHED, &Open::Publish { topic }, token)?;
        ensure!(code == 200, "the probe's publishing got {code}");
        let (ledger, stop) = (Arc::<Mutex<Ledger>>::default(), Arc::<AtomicBool>::default());
        let run = Run {
            wire,
            ledger: Arc::clone(&ledger),
            stop: Arc::clone(&stop),
            sent_at: HashMap::new(),
            unanswered: VecDeque::new(),
            again: Vec::new(),
            next: 0,
        };
        let thread = thread::spawn(move || run.run());
        let quiet = wait::until("the probe's quiet phase", LIMIT, || {
            let mut ledger = lock(&ledger);
            if ledger.latencies.len() < QUIET {
                ensure!(!thread.is_finished(), "the probe ended");
                return Ok(Look::NotYet(format!("{} messages", ledger.latencies.len())));
            }
            Ok(Look::Holds(std::mem::take(&mut ledger.latencies)))
        })?;
        yield_to_others()?;
        let before = lock(&ledger).published;
        let resident_kib = daemon.resident_kib()?;
        Ok(Self { ledger, stop, thread, quiet: Latencies::of(quiet)?, before, resident_kib })
    }

    /// Makes an attack that is over at once, again and again while the probe [needs
    /// more](Self::needs_more).
    pub(crate) fn beside(&self, mut attack: impl FnMut() -> Result<()>) -> Result<()> {
        attack()?;
        while self.needs_more() {
            attack()?;
        }
        Ok(())
    }

    /// Whether an attack that is over is made once more: so far fewer messages were published
    /// beside it than were in the quiet phase. Of a probe that has failed, [`Self::finish`] says why.
    pub(crate) fn needs_more(&self) -> bool {
        !self.thread.is_finished() && lock(&self.ledger).published < self.before + QUIET as u64
    }

    /// **H**: ends it; every message that it published has come, once, and the p99 of how long
    /// they took is at most [`MOST`] times the quiet one.
    pub(crate) fn finish(self, row: &str) -> Result<Seen> {
        let seen = self.finish_shed(row)?;
        if seen.times() > MOST {
            return Err(Late(format!("{row}: {seen}")).into());
        }
        Ok(seen)
    }

    /// The same of an attack under which writes are to be shed (I-6): a message that was refused
    /// and published again is late by what its publisher was told to wait.
    pub(crate) fn finish_shed(self, row: &str) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the probe panicked"))?.context("the honest probe")?;
        let mut ledger = lock(&self.ledger);
        let attacked = Latencies::of(std::mem::take(&mut ledger.latencies))?;
        let seen = Seen {
            messages: ledger.published,
            refused: ledger.refused,
            resident_kib: self.resident_kib,
            quiet: self.quiet,
            attacked,
        };
        println!("{row}: {seen}");
        Ok(seen)
    }
}

/// Has this thread, and those that it starts, run when nobody else wants its processor
/// (`SCHED_IDLE`, sched(7)). A nice(2) of 19 would not do: under Linux's EEVDF a thread of whatever
/// weight keeps its processor for a slice, which is milliseconds.
fn yield_to_others() -> Result<()> {
    let thread = gettid().to_string();
    let output = Command::new("chrt").args(["--idle", "--pid", "0", &thread]).output().context("chrt")?;
    ensure!(output.status.success(), "chrt: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

impl Seen {
    fn times(&self) -> f64 {
        self.attacked.p99.as_secs_f64() / self.quiet.p99.as_secs_f64()
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { messages, refused, quiet, attacked, .. } = self;
        let times = self.times();
        write!(
            f,
            "all {messages} honest messages came ({refused} after a 429 or 503); p50 {:.1?}, p99 {:.1?}, most {:.1?}; \
             quiet {:.1?}, {:.1?}, {:.1?}; p99 {times:.2} times",
            attacked.p50, attacked.p99, attacked.most, quiet.p50, quiet.p99, quiet.most
        )
    }
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The probe's thread.
struct Run {
    wire: Tls,
    ledger: Arc<Mutex<Ledger>>,
    stop: Arc<AtomicBool>,
    /// Those that have not come, and when they were first published.
    sent_at: HashMap<u64, Instant>,
    /// Answers come in the order of the messages.
    unanswered: VecDeque<u64>,
    /// Refused ones, and when to publish them again.
    again: Vec<(Instant, u64)>,
    next: u64,
}

impl Run {
    fn run(mut self) -> Result<()> {
        let (mut due, mut end) = (now(), None);
        loop {
            let at = now();
            if self.stop.load(Ordering::Relaxed) {
                let end = *end.get_or_insert(at + LIMIT);
                if self.sent_at.is_empty() && self.unanswered.is_empty() {
                    return Ok(());
                }
                ensure!(at < end, "{} messages did not come", self.sent_at.len());
            } else if at >= due {
                // What a stall kept back is not published in a burst.
                due = (due + PACE).max(at);
                let number = self.next;
                self.next += 1;
                self.sent_at.insert(number, at);
                lock(&self.ledger).published += 1;
                self.publish(number)?;
            }
            while let Some(place) = self.again.iter().position(|(when, _)| *when <= at) {
                let (_, number) = self.again.swap_remove(place);
                self.publish(number)?;
            }
            let socket: &StreamOwned<ClientConnection, TcpStream> = &self.wire.stream;
            let pause = due.saturating_duration_since(now()).clamp(Duration::from_millis(1), PACE);
            socket.sock.set_read_timeout(Some(pause))?;
            match self.wire.poll()? {
                Heard::Frame(frame) => self.take(frame)?,
                Heard::Nothing => {}
                Heard::Closed => bail!("the daemon closed the probe's session"),
            }
        }
    }

    fn publish(&mut self, number: u64) -> Result<()> {
        let mut payload = vec![0; SIZE];
        payload[..8].copy_from_slice(&number.to_be_bytes());
        self.unanswered.push_back(number);
        let message = Publish::Message(Bytes::from(payload)).encode();
        self.wire.send(&request(PUBLISHED, Flags::default(), message))
    }

    fn take(&mut self, frame: Frame) -> Result<()> {
        if frame.flags.has(Flags::RESP) {
            ensure!(frame.corr_id == PUBLISHED, "an answer on stream {}: {}", frame.corr_id, frame.code);
            let number = self.unanswered.pop_front().context("an answer to nothing")?;
            if frame.code == 200 {
                return Ok(());
            }
            let body: ErrorBody = serde_json::from_slice(&frame.payload)?;
            ensure!(body.retryable, "message {number} was refused: {body:?}");
            lock(&self.ledger).refused += 1;
            self.again.push((now() + Duration::from_millis(body.retry_after_ms.unwrap_or(0)), number));
            return Ok(());
        }
        match Record::decode(frame.payload).context("an event that is no record")? {
            Record::Message { payload, .. } => {
                let number = u64::from_be_bytes(payload.get(..8).context("a short message")?.try_into()?);
                let sent = self.sent_at.remove(&number).with_context(|| format!("message {number} came twice"))?;
                lock(&self.ledger).latencies.push(now().duration_since(sent));
                Ok(())
            }
            Record::Gap { missed } => bail!("{missed} messages were lost"),
            other => bail!("an event that nobody published: {other:?}"),
        }
    }
}
