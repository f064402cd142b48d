//! What a command says to a person beside its output: on standard error, and to nobody where
//! that was closed. `eprintln!` would panic then, and the exit code would tell of nothing else.

use std::fmt::Display;
use std::io::{self, Write};

/// Says one line.
pub fn tell(line: impl Display) {
    let _closed = writeln!(io::stderr().lock(), "{line}");
}
