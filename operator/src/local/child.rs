//! One run of one daemon's program: started, listened to, told to end, and its end explained.
//! Never decides whether it is started again: that is `supervise`'s.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::log::{LastWords, LineSplitter, Tail};
use super::runtime_dir;

/// For how long a dead program's last output is waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What every child is told, all at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Go on.
    Run,
    /// SIGTERM, and SIGKILL once the grace period is over.
    Terminate,
    /// SIGKILL.
    Kill,
}

/// What to run.
#[derive(Clone, Debug)]
pub(super) struct Start {
    /// Which daemon it is, in the order of the run.
    pub(super) daemon: usize,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<OsString>,
    /// The daemon's folder, which records the process.
    pub(super) folder: PathBuf,
    /// From SIGTERM to SIGKILL.
    pub(super) grace: Duration,
}

/// A line that a daemon wrote.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) daemon: usize,
    pub(super) text: String,
}

/// Why a program no longer runs.
#[derive(Debug)]
pub(super) struct Exit {
    pub(super) daemon: usize,
    /// Whether it ended by itself with status 0.
    pub(super) clean: bool,
    /// How it ended, and what it said before.
    pub(super) reason: String,
}

/// Runs the program to its end. Dropped before that, the program is killed. Lines that the
/// receiver has no room for are dropped: a daemon never waits for a terminal.
pub(super) async fn run(start: Start, mut orders: watch::Receiver<Order>, lines: mpsc::Sender<Line>) -> Exit {
    let daemon = start.daemon;
    let mut command = Command::new(&start.program);
    command.args(&start.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Ctrl-C goes to the terminal's whole process group; daemons are told by us, in order.
    command.process_group(0).kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let reason = format!("{} cannot be started: {error}", start.program.display());
            return Exit { daemon, clean: false, reason };
        }
    };
    if let Some(Err(error)) = child.id().map(|pid| runtime_dir::record_process(&start.folder, pid)) {
        let _ = lines.try_send(Line { daemon, text: format!("its process is not written down: {error}") });
    }
    let mut output = Output {
        daemon,
        lines,
        tail: Tail::default(),
        out: Captured::new(child.stdout.take()),
        err: Captured::new(child.stderr.take()),
    };
    let status = attend(&mut child, &mut output, &mut orders, start.grace).await;
    // A program that it started may hold the pipes open for ever.
    let _ = timeout(LAST_WORDS, output.drain()).await;
    let clean = status.as_ref().is_ok_and(ExitStatus::success);
    let how = status.map_or_else(|error| format!("cannot be waited for: {error}"), explain);
    let reason = match output.tail.last_words() {
        Some(LastWords::Error(error)) => format!("{how}: {error}"),
        Some(LastWords::Line(line)) => format!("{how}, after its last line: {line}"),
        None => how,
    };
    Exit { daemon, clean, reason }
}

async fn attend(
    child: &mut Child,
    output: &mut Output,
    orders: &mut watch::Receiver<Order>,
    grace: Duration,
) -> std::io::Result<ExitStatus> {
    let mut kill_at: Option<Instant> = None;
    // An order may stand since before this program was started.
    orders.mark_changed();
    loop {
        tokio::select! {
            status = child.wait() => return status,
            () = output.take_some() => {}
            Ok(()) = orders.changed() => {
                let order = *orders.borrow_and_update();
                match order {
                    Order::Run => {}
                    Order::Terminate => {
                        signal(child, Signal::TERM);
                        kill_at = kill_at.or(Some(Instant::now() + grace));
                    }
                    Order::Kill => signal(child, Signal::KILL),
                }
            }
            () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                signal(child, Signal::KILL);
                kill_at = None;
            }
        }
    }
}

/// A child that is not waited for yet keeps its number, so this reaches no other process.
fn signal(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    // It has ended meanwhile, which its exit tells.
    let _ = pid.map(|pid| kill_process(pid, signal));
}

fn explain(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exited with status {code}"),
        // The standard library knows the names: `signal: 9 (SIGKILL)`.
        None if status.signal().is_some() => format!("killed by {}", status.to_string().replacen(": ", " ", 1)),
        None => status.to_string(),
    }
}

struct Output {
    daemon: usize,
    lines: mpsc::Sender<Line>,
    tail: Tail,
    out: Captured<tokio::process::ChildStdout>,
    err: Captured<tokio::process::ChildStderr>,
}

impl Output {
    /// Takes in what comes next; never ends once both streams have. Safe to cancel.
    async fn take_some(&mut self) {
        let lines = tokio::select! {
            lines = self.out.next() => lines,
            lines = self.err.next() => lines,
        };
        for text in lines {
            self.tail.push(text.clone());
            let _ = self.lines.try_send(Line { daemon: self.daemon, text });
        }
    }

    async fn drain(&mut self) {
        while self.out.is_open() || self.err.is_open() {
            self.take_some().await;
        }
    }
}

struct Captured<R> {
    reader: Option<R>,
    splitter: LineSplitter,
}

impl<R: AsyncRead + Unpin> Captured<R> {
    fn new(reader: Option<R>) -> Self {
        Self { reader, splitter: LineSplitter::default() }
    }

    fn is_open(&self) -> bool {
        self.reader.is_some()
    }

    async fn next(&mut self) -> Vec<String> {
        let Some(reader) = &mut self.reader else { return std::future::pending().await };
        let mut bytes = [0; 4096];
        match reader.read(&mut bytes).await {
            Ok(length) if length > 0 => self.splitter.handle_bytes(&bytes[..length]),
            _ => {
                self.reader = None;
                self.splitter.handle_end().into_iter().collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sh` stands for the daemon: what is under test is how a program's end is told.
    fn shell(script: &str, folder: &std::path::Path, grace: Duration) -> Start {
        Start {
            daemon: 7,
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            folder: folder.to_owned(),
            grace,
        }
    }

    #[tokio::test]
    async fn an_end_has_its_reason_and_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let table = [
            ("echo fine; echo error: no port >&2; exit 3", false, "exited with status 3: error: no port"),
            ("exit 0", true, "exited with status 0"),
            ("kill -9 $$", false, "killed by signal 9 (SIGKILL)"),
            (
                "printf unfinished; kill -TERM $$",
                false,
                "killed by signal 15 (SIGTERM), after its last line: unfinished",
            ),
        ];
        for (script, clean, reason) in table {
            let (_orders, order) = watch::channel(Order::Run);
            let (lines, _taken) = mpsc::channel(1);
            let exit = run(shell(script, folder.path(), Duration::ZERO), order, lines).await;
            assert_eq!((exit.daemon, exit.clean, exit.reason.as_str()), (7, clean, reason), "{script}");
        }
    }

    #[tokio::test]
    async fn a_missing_program_is_an_end_too() {
        let (_orders, order) = watch::channel(Order::Run);
        let (lines, _taken) = mpsc::channel(1);
        let start =
            Start { program: "/nowhere/overlay-daemon".into(), ..shell("", std::path::Path::new("/"), Duration::ZERO) };
        let exit = run(start, order, lines).await;
        assert!(exit.reason.starts_with("/nowhere/overlay-daemon cannot be started"), "{}", exit.reason);
    }

    /// SIGTERM first; SIGKILL for the one that does not obey, or at once when told so.
    #[tokio::test]
    async fn orders_are_carried_out() {
        let obeys = "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done";
        let deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done";
        let table = [
            (obeys, Order::Terminate, Duration::from_secs(60), "exited with status 5"),
            (deaf, Order::Terminate, Duration::from_millis(50), "killed by signal 9 (SIGKILL)"),
            (deaf, Order::Kill, Duration::from_secs(60), "killed by signal 9 (SIGKILL)"),
        ];
        let folder = tempfile::tempdir().unwrap();
        for (script, order, grace, want) in table {
            let (orders, told) = watch::channel(Order::Run);
            let (lines, mut taken) = mpsc::channel(4);
            let (exit, ()) = tokio::join!(run(shell(script, folder.path(), grace), told, lines), async {
                assert_eq!(taken.recv().await.unwrap().text, "up");
                orders.send(order).unwrap();
            });
            assert_eq!(exit.reason, format!("{want}, after its last line: up"), "{order:?}");
        }
    }

    #[tokio::test]
    async fn an_order_from_before_the_start_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (_orders, told) = watch::channel(Order::Terminate);
        let (lines, _taken) = mpsc::channel(1);
        let exit = run(shell("exec sleep 600", folder.path(), Duration::from_secs(60)), told, lines).await;
        assert_eq!(exit.reason, "killed by signal 15 (SIGTERM)");
    }
}
