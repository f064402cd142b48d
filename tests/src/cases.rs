//! A runner for test targets whose cases share one expensive thing that must be torn down at the
//! end, also after a failure, which libtest's statics never are. Cases run one after the other
//! on the main thread, in the order given.

use std::any::Any;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::Result;

use crate::wait::now;

/// A named case over a shared world.
pub type Case<W> = (&'static str, fn(&W) -> Result<()>);

/// Starts the world, runs the cases whose names contain one of the command line's words (all, where
/// there is none), drops the world, and prints `N passed, N failed` as the last line.
pub fn run<W>(start: impl FnOnce() -> Result<W>, cases: &[Case<W>]) -> ExitCode {
    run_with(start, cases, None::<(&str, fn() -> Result<()>)>)
}

/// [`run`], and one more case once the world is gone; also where it did not start.
pub fn run_and_then<W>(
    start: impl FnOnce() -> Result<W>,
    cases: &[Case<W>],
    after: (&str, impl FnOnce() -> Result<()>),
) -> ExitCode {
    run_with(start, cases, Some(after))
}

fn run_with<W>(
    start: impl FnOnce() -> Result<W>,
    cases: &[Case<W>],
    after: Option<(&str, impl FnOnce() -> Result<()>)>,
) -> ExitCode {
    let words: Vec<String> = env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let chosen: Vec<_> =
        cases.iter().filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(word))).collect();
    if env::args().any(|word| word == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let began = now();
    let mut total = chosen.len().max(1);
    let mut failed = match start() {
        Ok(world) => {
            println!("started in {:.1?}", began.elapsed());
            chosen.iter().filter(|(name, case)| !passes(name, || case(&world))).count()
        }
        Err(error) => {
            println!("FAILED to start: {error:#}");
            total
        }
    };
    if let Some((name, case)) = after {
        total += 1;
        failed += usize::from(!passes(name, case));
    }
    println!("{} passed, {failed} failed", total - failed);
    if failed == 0 && !chosen.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn passes(name: &str, case: impl FnOnce() -> Result<()>) -> bool {
    let began = now();
    // The world is only read through shared references, and a case that broke it is reported.
    let outcome = catch_unwind(AssertUnwindSafe(case));
    let took = began.elapsed();
    match outcome {
        Ok(Ok(())) => {
            println!("ok     {name} ({took:.1?})");
            true
        }
        Ok(Err(error)) => {
            println!("FAILED {name} ({took:.1?}): {error:#}");
            false
        }
        Err(panic) => {
            println!("FAILED {name} ({took:.1?}): {}", message(panic.as_ref()));
            false
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panicked")
}
