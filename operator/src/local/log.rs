//! What a daemon writes: cut into lines, the last of them kept to say why it died. Bounds
//! both; what a line means beyond its message is not looked at.

use std::collections::VecDeque;

use serde_json::Value;

/// Bytes of one line; the rest of a longer one is dropped.
pub(super) const MAX_LINE: usize = 8 << 10;
/// Lines kept of each daemon; older ones are dropped.
pub(super) const KEPT_LINES: usize = 20;
/// Bytes of a reason: it stands in a table and in an event.
const MAX_REASON: usize = 512;

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub(super) struct LineSplitter {
    partial: Vec<u8>,
}

impl LineSplitter {
    /// The lines that `bytes` complete. Empty ones are left out.
    pub(super) fn handle_bytes(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let (text, ended) = piece.strip_suffix(b"\n").map_or((piece, false), |text| (text, true));
            let room = MAX_LINE.saturating_sub(self.partial.len());
            self.partial.extend_from_slice(&text[..text.len().min(room)]);
            if ended {
                lines.extend(self.handle_end());
            }
        }
        lines
    }

    /// What is left when the stream ends.
    pub(super) fn handle_end(&mut self) -> Option<String> {
        let line = printable(&String::from_utf8_lossy(&std::mem::take(&mut self.partial)));
        Some(line).filter(|line| !line.trim().is_empty())
    }
}

/// A terminal obeys control characters; a log is only to be read.
fn printable(line: &str) -> String {
    line.trim_end().chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// What a daemon said before it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LastWords {
    /// It logged an error, which most likely is why.
    Error(String),
    /// It logged no error; whether this had to do with the end is not known.
    Line(String),
}

/// The last lines of a daemon's output.
#[derive(Debug, Default)]
pub(super) struct Tail(VecDeque<String>);

impl Tail {
    /// Keeps a line, and drops the oldest beyond [`KEPT_LINES`].
    pub(super) fn push(&mut self, line: String) {
        if self.0.len() == KEPT_LINES {
            self.0.pop_front();
        }
        self.0.push_back(line);
    }

    /// What the daemon said last: its last error if it logged one, else its last line.
    pub(super) fn last_words(&self) -> Option<LastWords> {
        match self.0.iter().rev().find(|line| is_error(line)) {
            Some(error) => Some(LastWords::Error(Self::short(error))),
            None => self.0.back().map(|line| LastWords::Line(Self::short(line))),
        }
    }

    fn short(line: &str) -> String {
        let mut text = message(line);
        if text.len() > MAX_REASON {
            let end = (0..=MAX_REASON).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            text.truncate(end);
            text.push('…');
        }
        text
    }
}

fn is_error(line: &str) -> bool {
    match serde_json::from_str::<Value>(line) {
        Ok(log) => log.get("level").and_then(Value::as_str).is_some_and(|level| level.eq_ignore_ascii_case("error")),
        Err(_) => line.to_ascii_lowercase().starts_with("error") || line.contains(" ERROR "),
    }
}

/// The message of a JSON log line with its other fields, else the line as it is.
fn message(line: &str) -> String {
    let Ok(Value::Object(log)) = serde_json::from_str(line) else { return line.trim().to_owned() };
    let fields = log.get("fields").and_then(Value::as_object).unwrap_or(&log);
    let Some(message) = fields.get("message").and_then(Value::as_str) else { return line.trim().to_owned() };
    let known = ["message", "timestamp", "level", "target", "fields", "span", "spans"];
    let mut text = message.to_owned();
    for (name, value) in fields.iter().filter(|(name, _)| !known.contains(&name.as_str())) {
        match value {
            Value::String(value) => text.push_str(&format!(", {name}: {value}")),
            other => text.push_str(&format!(", {name}: {other}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_however_they_arrive() {
        let bytes = "first\n\n  \nsécond\r\nthi\u{1b}[31mrd\nrest".as_bytes();
        let want = ["first", "sécond", "thi\u{fffd}[31mrd", "rest"];
        for step in 1..=bytes.len() {
            let mut splitter = LineSplitter::default();
            let mut lines: Vec<_> = bytes.chunks(step).flat_map(|chunk| splitter.handle_bytes(chunk)).collect();
            lines.extend(splitter.handle_end());
            assert_eq!(lines, want, "{step} bytes at a time");
            assert_eq!(splitter.handle_end(), None);
        }
    }

    /// A daemon that never ends its line takes no more than a line's memory here.
    #[test]
    fn a_line_is_bounded() {
        let mut splitter = LineSplitter::default();
        for _ in 0..100 {
            assert!(splitter.handle_bytes(&[b'x'; 1_000]).is_empty());
            assert!(splitter.partial.len() <= MAX_LINE);
        }
        assert_eq!(splitter.handle_bytes(b"\nnext\n").iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE, 4]);
    }

    #[test]
    fn last_words_are_the_last_error_or_line() {
        let error = |text: &str| Some(LastWords::Error(text.to_owned()));
        let line = |text: &str| Some(LastWords::Line(text.to_owned()));
        let table: [(&[&str], Option<LastWords>); 7] = [
            (&[], None),
            (&["one", "two"], line("two")),
            (
                &["error: overlay.toml: line 3: not an address", "bye"],
                error("error: overlay.toml: line 3: not an address"),
            ),
            (
                &["2026-01-01T00:00:00Z ERROR overlay: port taken", "bye"],
                error("2026-01-01T00:00:00Z ERROR overlay: port taken"),
            ),
            (
                &[
                    r#"{"level":"ERROR","fields":{"message":"cannot bind","address":"127.0.0.1:1"}}"#,
                    r#"{"level":"INFO","message":"bye"}"#,
                ],
                error("cannot bind, address: 127.0.0.1:1"),
            ),
            (&[r#"{"level":"INFO","timestamp":"now","message":"flat","port":1}"#], line("flat, port: 1")),
            (&[r#"{"level":"INFO","text":"no message"}"#], line(r#"{"level":"INFO","text":"no message"}"#)),
        ];
        for (lines, want) in table {
            let mut tail = Tail::default();
            lines.iter().for_each(|line| tail.push((*line).to_owned()));
            assert_eq!(tail.last_words(), want, "{lines:?}");
        }
    }

    #[test]
    fn the_tail_and_a_reason_are_bounded() {
        let mut tail = Tail::default();
        tail.push("error: long gone".into());
        (0..KEPT_LINES).for_each(|n| tail.push(format!("line {n}")));
        assert_eq!((tail.0.len(), tail.last_words()), (KEPT_LINES, Some(LastWords::Line("line 19".into()))));
        tail.push("é".repeat(MAX_REASON));
        assert!(matches!(tail.last_words(), Some(LastWords::Line(text)) if text.len() <= MAX_REASON + '…'.len_utf8()));
    }
}
