//! A run: every daemon's life, moved on by exits, answers, signals and time, and told to the
//! output. It owns all tasks; decisions about one daemon are `supervise`'s.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::child::{self, Exit, Line, Order, Start};
use super::credentials::Tokens;
use super::events::{Event, ReadyDaemon};
use super::output::{self, Form, Output};
use super::plan::Daemon;
use super::probe;
use super::supervise::{Life, Probe};
use super::table::{self, Row};

/// Lines of daemons that wait to be printed; more are dropped.
const LINES: usize = 1_024;
/// Answers that wait to be looked at; whoever asks waits for room.
const ANSWERS: usize = 64;
/// How often a table counts down.
const TABLE_TICK: Duration = Duration::from_secs(1);

/// What a run is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// To go on until a signal.
    Stay,
    /// To see every daemon ready, within that time.
    Ready(Duration),
}

/// How a run went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The goal was reached.
    Done,
    /// It was not; the reasons were told.
    Failed,
}

/// The signals that end a run.
pub(super) struct Signals([Signal; 3]);

impl Signals {
    /// From now on they no longer end this process by themselves.
    ///
    /// # Errors
    /// The kernel refused.
    pub(super) fn install() -> io::Result<Self> {
        Ok(Self([signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

struct Member {
    daemon: Daemon,
    life: Life,
    /// Its name, with the namespace where there is more than one.
    shown: String,
}

/// The state of a run.
pub(super) struct Run<O, E> {
    members: Vec<Member>,
    tokens: Tokens,
    program: PathBuf,
    goal: Goal,
    output: Output<O, E>,
    began: Instant,
    was_ready: bool,
    stopping: bool,
    outcome: Outcome,
    orders: watch::Sender<Order>,
    lines: mpsc::Sender<Line>,
    children: JoinSet<Exit>,
}

impl<O: Write, E: Write> Run<O, E> {
    /// A run of `daemons`, none of them started yet.
    pub(super) fn new(
        daemons: Vec<Daemon>,
        tokens: Tokens,
        program: PathBuf,
        goal: Goal,
        output: Output<O, E>,
    ) -> (Self, mpsc::Receiver<Line>) {
        let namespaces = daemons.iter().map(|d| d.namespace.clone()).collect::<BTreeSet<_>>().len();
        let member = |daemon: Daemon| {
            let shown =
                if namespaces > 1 { format!("{}/{}", daemon.namespace, daemon.name) } else { daemon.name.clone() };
            Member { daemon, life: Life::new(), shown }
        };
        let (lines, taken) = mpsc::channel(LINES);
        let run = Self {
            members: daemons.into_iter().map(member).collect(),
            tokens,
            program,
            goal,
            output,
            began: Instant::now(),
            was_ready: false,
            stopping: false,
            outcome: Outcome::Done,
            orders: watch::Sender::new(Order::Run),
            lines,
            children: JoinSet::new(),
        };
        (run, taken)
    }

    /// Runs to the end: every daemon stopped.
    pub(super) async fn drive(
        mut self,
        mut lines: mpsc::Receiver<Line>,
        signals: &mut Signals,
    ) -> (Outcome, Output<O, E>) {
        let mut probes = JoinSet::new();
        let (answers, mut answered) = mpsc::channel(ANSWERS);
        for (index, member) in self.members.iter().enumerate() {
            probes.spawn(probe::watch(index, member.daemon.admin, answers.clone()));
        }
        loop {
            self.start_due();
            self.draw();
            if self.output.is_broken() {
                self.stop("nobody reads the output any more");
            }
            if self.stopping && self.children.is_empty() {
                break;
            }
            let (wake, rewrite) = (self.wake(), self.until_rewrite());
            tokio::select! {
                Some(exit) = self.children.join_next() => match exit {
                    Ok(exit) => self.handle_exit(exit),
                    Err(error) => self.fail(&format!("a task ended: {error}")),
                },
                Some((daemon, probe)) = answered.recv() => self.handle_probe(daemon, probe),
                Some(line) = lines.recv() => self.output.pass(&self.members[line.daemon].shown, &line.text),
                () = signals.next() => self.handle_signal(),
                () = sleep(rewrite) => self.rewrite_tokens(),
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => self.handle_time(),
            }
        }
        while let Ok(line) = lines.try_recv() {
            self.output.pass(&self.members[line.daemon].shown, &line.text);
        }
        self.draw();
        (self.outcome, self.output)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// When something is due although nothing happens.
    fn wake(&self) -> Option<Instant> {
        let starts = self.members.iter().filter_map(|member| member.life.next_start());
        let goal = match self.goal {
            Goal::Ready(within) if !self.stopping => Some(within),
            _ => None,
        };
        let tick = (self.output.form() == Form::Table).then(|| self.now() + TABLE_TICK);
        starts.chain(goal).chain(tick).min().map(|at| self.began + at)
    }

    /// For how long to wait before tokens are looked at: by the time of day, which goes on
    /// while a machine sleeps, so not for long at once.
    fn until_rewrite(&self) -> Duration {
        const LOOK_AGAIN: Duration = Duration::from_secs(60);
        if self.stopping {
            return LOOK_AGAIN;
        }
        self.tokens.due().duration_since(SystemTime::now()).unwrap_or_default().min(LOOK_AGAIN)
    }

    fn rewrite_tokens(&mut self) {
        let now = SystemTime::now();
        if now < self.tokens.due() {
            return;
        }
        if let Err(error) = self.tokens.rewrite(now) {
            self.output.warn(&format!("tokens are not rewritten: {error}"));
        }
    }

    fn start_due(&mut self) {
        let now = self.now();
        for index in 0..self.members.len() {
            let member = &mut self.members[index];
            if !member.life.poll_start(now) {
                continue;
            }
            let daemon = &member.daemon;
            let start = Start {
                daemon: index,
                program: self.program.clone(),
                arguments: [
                    "run".into(),
                    "--config".into(),
                    daemon.config_file.clone().into(),
                    "--peers".into(),
                    daemon.peers_file.clone().into(),
                ]
                .into(),
                folder: daemon.folder.clone(),
                grace: daemon.grace,
            };
            self.children.spawn(child::run(start, self.orders.subscribe(), self.lines.clone()));
            let again = member.life.restarts() > 0;
            let words = format!("{} {}", member.shown, if again { "started again" } else { "started" });
            let event = Event::Started { namespace: &daemon.namespace, name: &daemon.name };
            self.output.say(&words, again.then_some(&event));
        }
    }

    fn handle_exit(&mut self, exit: Exit) {
        let now = self.now();
        let member = &mut self.members[exit.daemon];
        let reason = exit.reason;
        match member.life.handle_exit(now, reason.clone()) {
            Some(restart_in) => {
                let words = output::exited(&member.shown, &reason, restart_in);
                let daemon = &member.daemon;
                let event =
                    Event::Exited { namespace: &daemon.namespace, name: &daemon.name, reason: &reason, restart_in };
                self.output.say(&words, Some(&event));
            }
            None => {
                let how = if exit.clean { String::new() } else { format!(" ({reason})") };
                let words = format!("{} stopped{how}", member.shown);
                self.output.say(&words, None);
            }
        }
    }

    fn handle_probe(&mut self, index: usize, probe: Probe) {
        let now = self.now();
        let member = &mut self.members[index];
        let changed = member.life.handle_probe(now, probe);
        if changed && self.output.form() == Form::Plain {
            let words = match member.life.why_not_ready() {
                None => format!(
                    "{} is ready, address {}, admin {}",
                    member.shown, member.daemon.address, member.daemon.admin
                ),
                Some(why) => format!("{}: {why}", member.shown),
            };
            self.output.say(&words, None);
        }
        if !self.was_ready && self.members.iter().all(|member| member.life.is_ready()) {
            self.was_ready = true;
            self.say_ready();
            if matches!(self.goal, Goal::Ready(_)) {
                self.stop("stopping");
            }
        }
    }

    fn say_ready(&mut self) {
        let daemons = self.members.iter().map(|member| ReadyDaemon {
            namespace: &member.daemon.namespace,
            name: &member.daemon.name,
            socket: &member.daemon.socket,
            address: member.daemon.address,
            admin: member.daemon.admin,
        });
        let event = Event::Ready { daemons: daemons.collect() };
        let words = match self.members.len() {
            1 => "the daemon is ready".to_owned(),
            n => format!("all {n} daemons are ready"),
        };
        self.output.say(&words, Some(&event));
        let mut lines = table::render(&rows(&self.members), self.now(), None);
        if self.goal == Goal::Stay {
            lines.extend(self.hints());
        }
        self.output.explain(&lines);
    }

    fn hints(&self) -> Vec<String> {
        let (Some(first), Some(last)) = (self.members.first(), self.members.last()) else { return Vec::new() };
        // The last daemon of the same mesh: others do not hear it.
        let publish = self.members.iter().rfind(|m| m.daemon.node == first.daemon.node).unwrap_or(last);
        let [sub, publish] = table::hints(&self.program, &first.daemon.socket, &publish.daemon.socket);
        vec![
            String::new(),
            "Subscribe in another shell, then publish in a third:".to_owned(),
            format!("  {sub}"),
            format!("  {publish}"),
            "Ctrl-C stops everything.".to_owned(),
        ]
    }

    fn handle_time(&mut self) {
        if let Goal::Ready(within) = self.goal
            && !self.stopping
            && self.now() >= within
        {
            let reasons = self
                .members
                .iter()
                .filter_map(|member| Some(format!("  {}: {}", member.shown, member.life.why_not_ready()?)));
            let reasons: Vec<_> = reasons.collect();
            self.fail(&format!("not ready within {} s:\n{}", within.as_secs(), reasons.join("\n")));
        }
    }

    fn handle_signal(&mut self) {
        if self.stopping {
            self.output.say("killing the daemons", None);
            self.orders.send_replace(Order::Kill);
            return;
        }
        if matches!(self.goal, Goal::Ready(_)) {
            self.outcome = Outcome::Failed;
        }
        self.stop("stopping; once more to kill the daemons at once");
    }

    fn fail(&mut self, why: &str) {
        self.output.warn(why);
        self.outcome = Outcome::Failed;
        self.stop("stopping");
    }

    fn stop(&mut self, words: &str) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        self.output.say(words, None);
        for member in &mut self.members {
            member.life.handle_stop();
        }
        self.orders.send_replace(Order::Terminate);
    }

    fn draw(&mut self) {
        if self.output.form() != Form::Table {
            return;
        }
        let Some(size) = output::terminal() else { return };
        let mut lines = table::render(&rows(&self.members), self.now(), Some(size.columns));
        if self.was_ready && !self.stopping {
            lines.extend(self.hints());
        }
        self.output.draw(lines, size);
    }
}

fn rows(members: &[Member]) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for Member { daemon, life, shown } in members {
        rows.push(Row { name: shown, life, address: daemon.address, admin: daemon.admin, socket: &daemon.socket });
    }
    rows
}
