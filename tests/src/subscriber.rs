//! `overlay-daemon sub` as a child, however it is reached: it is there once the daemon has
//! confirmed the subscription, and gone with its value.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::wait::{self, Look};

/// A running `overlay-daemon sub`.
#[derive(Debug)]
pub struct Subscriber(Child);

impl Subscriber {
    /// Starts `command`, which runs `overlay-daemon sub`, and waits until it says that it is
    /// subscribed.
    ///
    /// # Errors
    /// It ended before it was.
    pub fn start(mut command: Command) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("sub")?;
        let mut said = String::new();
        let stderr = child.stderr.take().context("a pipe for standard error")?;
        let mut subscriber = Self(child);
        let mut lines = BufReader::new(stderr);
        while !said.contains("subscribed") {
            if lines.read_line(&mut said)? == 0 {
                subscriber.0.wait()?;
                bail!("sub ended before it was subscribed: {said}");
            }
        }
        Ok(subscriber)
    }

    /// What it received, once it has ended by itself with all that it was to wait for.
    ///
    /// # Errors
    /// It did not, within `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Vec<u8>> {
        let mut stdout = self.0.stdout.take().context("a pipe for standard output")?;
        // Read beside the wait, or a large message would fill the pipe.
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).map(|_| bytes)
        });
        let child = &mut self.0;
        let status = wait::until("the subscriber to have its messages", limit, || {
            Ok(child.try_wait()?.map_or_else(|| Look::NotYet("still waiting".to_owned()), Look::Holds))
        })?;
        ensure!(status.success(), "sub: {status}");
        reader.join().map_err(|_| anyhow!("the reader panicked"))?.context("reading what sub wrote")
    }

    /// The first `count` lines that it prints.
    ///
    /// # Errors
    /// It ended before it had as many.
    pub fn lines(mut self, count: usize) -> Result<Vec<String>> {
        let stdout = self.0.stdout.take().context("a pipe for standard output")?;
        let lines = BufReader::new(stdout).lines().take(count).collect::<Result<Vec<String>, _>>()?;
        ensure!(lines.len() == count, "sub ended after {} of {count} messages", lines.len());
        Ok(lines)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
