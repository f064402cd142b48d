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
    let words: Vec<String> = env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let chosen: Vec<_> =
        cases.iter().filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(word))).collect();
    if env::args().any(|word| word == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let began = now();
    let world = match start() {
        Ok(world) => world,
        Err(error) => {
            println!("FAILED to start: {error:#}\n0 passed, {} failed", chosen.len().max(1));
            return ExitCode::FAILURE;
        }
    };
    println!("started in {:.1?}", began.elapsed());
    let failed = chosen.iter().filter(|(name, case)| !passes(name, &world, *case)).count();
    drop(world);
    println!("{} passed, {failed} failed", chosen.len() - failed);
    if failed == 0 && !chosen.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn passes<W>(name: &str, world: &W, case: fn(&W) -> Result<()>) -> bool {
    let began = now();
    // The world is only read through shared references, and a case that broke it is reported.
    let outcome = catch_unwind(AssertUnwindSafe(|| case(world)));
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
