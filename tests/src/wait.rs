//! Waiting for a condition, to a deadline. This is the one clock of the tests; nothing else
//! in them sleeps.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// First pause between two looks.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause between two looks.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// What one look at a condition saw.
#[derive(Debug)]
pub enum Look<T> {
    /// It holds.
    Holds(T),
    /// It does not hold yet; the text says what is there instead.
    NotYet(String),
}

/// Looks again and again, backing off, until the condition holds. At the deadline the error says
/// what was waited for and what was seen last. An error of `look` itself ends the wait at once.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Look<T>>) -> Result<T> {
    let start = now();
    let mut pause = FIRST_PAUSE;
    loop {
        let last = match look()? {
            Look::Holds(value) => return Ok(value),
            Look::NotYet(seen) => seen,
        };
        if now().duration_since(start) >= limit {
            bail!("waited {limit:?} for {what}; last seen: {last}");
        }
        thread::sleep(pause);
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

/// [`until`] for a condition that is only true or false.
pub fn until_true(what: &str, limit: Duration, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(if look()? { Look::Holds(()) } else { Look::NotYet("not so".to_owned()) }))
}

/// Checks that a condition keeps holding for a while: for what must not happen.
pub fn throughout(what: &str, span: Duration, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = now();
    while now().duration_since(start) < span {
        if !look()? {
            bail!("{what}: it stopped after {:?}", now().duration_since(start));
        }
        thread::sleep(LONGEST_PAUSE.min(span));
    }
    Ok(())
}

/// The time, for measuring how long a case took.
#[allow(clippy::disallowed_methods, reason = "the one clock of the tests")]
pub fn now() -> Instant {
    Instant::now()
}
