//! What the person or program that runs `local` sees: a live table on a terminal, a plain log
//! elsewhere, or one JSON object a line. Decides which words go where; what is true is the
//! run's. Standard output holds the form that was asked for, standard error the rest.

use std::io::{self, Write};
use std::time::Duration;

use super::events::Event;
use super::table;

/// The form of standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A table that is drawn again in place, and what happens above it.
    Table,
    /// A line for whatever happens.
    Plain,
    /// [`Event`]s.
    Json,
}

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// The two streams.
pub(super) struct Output<O, E> {
    form: Form,
    quiet: bool,
    out: O,
    err: E,
    /// Lines of the table that are on the screen.
    drawn: Vec<String>,
    size: Size,
    /// Whether the first event was printed: it has to be `ready`.
    began: bool,
    broken: bool,
}

impl<O: Write, E: Write> Output<O, E> {
    /// `quiet` leaves out what daemons write.
    pub(super) fn new(form: Form, quiet: bool, out: O, err: E) -> Self {
        Self {
            form,
            quiet,
            out,
            err,
            drawn: Vec::new(),
            size: Size { columns: 80, rows: 24 },
            began: false,
            broken: false,
        }
    }

    /// Which form it is.
    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Whether nobody reads standard output any more.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Something that happened, in words, and as an event where it is one. Before `ready`, a
    /// program that reads events finds the words on standard error.
    pub(super) fn say(&mut self, words: &str, event: Option<&Event<'_>>) {
        if self.form != Form::Json {
            self.above_table(words);
            return;
        }
        self.began |= matches!(event, Some(Event::Ready { .. }));
        match event.filter(|_| self.began).map(Event::to_line) {
            Some(Ok(line)) => self.print(&format!("{line}\n")),
            _ => self.warn(words),
        }
    }

    /// Lines for people only.
    pub(super) fn explain(&mut self, lines: &[String]) {
        if self.form == Form::Plain {
            self.print(&format!("{}\n", lines.join("\n")));
        }
    }

    /// A line that a daemon wrote.
    pub(super) fn pass(&mut self, daemon: &str, line: &str) {
        // On a terminal it would push the table away; the reason of an exit is told anyway.
        if !self.quiet && self.form != Form::Table {
            self.warn(&format!("{daemon} | {line}"));
        }
    }

    /// Something for standard error.
    pub(super) fn warn(&mut self, words: &str) {
        if self.form == Form::Table {
            self.above_table(words);
        } else {
            let _ = writeln!(self.err, "{words}").and_then(|()| self.err.flush());
        }
    }

    /// Draws the table in place of the last one, if it is another.
    pub(super) fn draw(&mut self, lines: Vec<String>, size: Size) {
        if self.form != Form::Table {
            return;
        }
        // A terminal that was resized has wrapped anew what stands on it.
        self.size = size;
        let lines = crop(lines, size);
        if lines != self.drawn {
            let text = format!("{}{}", self.erase(), lines.iter().map(|line| format!("{line}\n")).collect::<String>());
            self.drawn = lines;
            self.print(&text);
        }
    }

    fn above_table(&mut self, words: &str) {
        let table: String = self.drawn.iter().map(|line| format!("{line}\n")).collect();
        let text = format!("{}{words}\n{table}", self.erase());
        self.print(&text);
    }

    /// Up to the table's first line, and nothing below.
    fn erase(&self) -> String {
        let rows: usize = self.drawn.iter().map(|line| rows(line, self.size)).sum();
        if rows == 0 { String::new() } else { format!("\x1b[{rows}A\r\x1b[J") }
    }

    fn print(&mut self, text: &str) {
        if !self.broken && self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).is_err() {
            self.broken = true;
        }
    }
}

/// Rows of the terminal that a line takes.
fn rows(line: &str, size: Size) -> usize {
    line.chars().count().div_ceil(size.columns.max(1)).max(1)
}

/// What is taller than the terminal could not be drawn in place: the last lines go.
fn crop(mut lines: Vec<String>, size: Size) -> Vec<String> {
    let room = size.rows.saturating_sub(1);
    let taken = |lines: &[String]| lines.iter().map(|line| rows(line, size)).sum::<usize>();
    if taken(&lines) > room {
        while !lines.is_empty() && taken(&lines) + 1 > room {
            lines.pop();
        }
        lines.push(table::fit("… make the terminal larger to see the rest", Some(size.columns)));
    }
    lines
}

/// The words for an exit.
pub(super) fn exited(name: &str, reason: &str, restart_in: Duration) -> String {
    format!("{name} {reason}; restarts in {} s", restart_in.as_secs())
}

/// The terminal of standard output, if it is one that a table can be drawn on.
pub(super) fn terminal() -> Option<Size> {
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|_| !dumb)?;
    let or = |size: u16, default: usize| if size == 0 { default } else { usize::from(size) };
    Some(Size { columns: or(size.ws_col, 80), rows: or(size.ws_row, 24) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STARTED: Event<'_> = Event::Started { namespace: "default", name: "mesh-0" };

    fn ready<'a>() -> Event<'a> {
        Event::Ready { daemons: Vec::new() }
    }

    /// What both streams hold after the same run.
    fn run(form: Form, quiet: bool) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut output = Output::new(form, quiet, &mut out, &mut err);
        output.say("mesh-0 exited early", Some(&STARTED));
        output.say("all are ready", Some(&ready()));
        output.explain(&["how to".to_owned()]);
        output.pass("mesh-0", "a log line");
        output.say("mesh-0 started", Some(&STARTED));
        output.say("words", None);
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn each_form_keeps_its_streams() {
        let (out, err) = run(Form::Plain, false);
        assert_eq!(out, "mesh-0 exited early\nall are ready\nhow to\nmesh-0 started\nwords\n");
        assert_eq!(err, "mesh-0 | a log line\n");
        assert_eq!(run(Form::Plain, true).1, "");

        let (out, err) = run(Form::Json, false);
        assert_eq!(
            out,
            "{\"event\":\"ready\",\"daemons\":[]}\n{\"event\":\"started\",\"namespace\":\"default\",\"name\":\"mesh-0\"}\n"
        );
        assert_eq!(err, "mesh-0 exited early\nmesh-0 | a log line\nwords\n", "the first line of output is `ready`");

        let (out, err) = run(Form::Table, false);
        assert!(out.contains("mesh-0 started") && !out.contains("a log line"), "{out}");
        assert_eq!(err, "");
    }

    #[test]
    fn the_table_is_drawn_in_place_and_only_when_it_changed() {
        let mut out = Vec::new();
        let mut output = Output::new(Form::Table, false, &mut out, Vec::new());
        let size = Size { columns: 10, rows: 9 };
        let table = |text: &str| vec!["HEAD".to_owned(), text.to_owned()];
        output.draw(table("one"), size);
        output.draw(table("one"), size);
        output.say("news", None);
        output.draw(table("takes two rows"), size);
        output.draw(table("one"), size);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "HEAD\none\n\x1b[2A\r\x1b[Jnews\nHEAD\none\n\x1b[2A\r\x1b[JHEAD\ntakes two rows\n\x1b[3A\r\x1b[JHEAD\none\n"
        );
    }

    #[test]
    fn what_is_taller_than_the_terminal_is_cropped() {
        let lines = |count: usize| (0..count).map(|n| format!("line {n:03}")).collect::<Vec<_>>();
        let more = "… make the terminal larger to see the rest";
        for (count, columns, rows, want) in
            [(10, 80, 11, 10), (10, 80, 10, 8), (10, 4, 20, 9), (10, 80, 2, 0), (10, 80, 1, 0)]
        {
            let cropped = crop(lines(count), Size { columns, rows });
            let left = cropped.iter().filter(|line| line.starts_with("line")).count();
            assert_eq!(left, want, "{count} lines in {columns} by {rows}");
            assert_eq!(cropped.len() - left, usize::from(want < count));
            assert!(columns < 80 || want == count || cropped.last().is_some_and(|last| last == more));
        }
    }

    #[test]
    fn a_closed_pipe_is_noticed() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut output = Output::new(Form::Json, false, Closed, Vec::new());
        assert!(!output.is_broken());
        output.say("ready", Some(&ready()));
        assert!(output.is_broken());
    }
}
