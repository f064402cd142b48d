//! One TOML table under inspection: hands out typed values and notes everything wrong with
//! them. Knows no field of the configuration.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use toml::de::{DeTable, DeValue};

/// One thing wrong with a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// Where, counted from 1. A field that is missing is reported at its table, a table that
    /// is missing at the file's first line.
    pub line: usize,
    /// The field with its table, as in `overlay.listen`; empty where the text is not TOML.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// Everything wrong with one file, as far as it has been read.
pub(super) struct Errors<'t> {
    text: &'t str,
    /// Lines on which the text is not TOML; what else is wrong with them follows from that.
    broken: Vec<usize>,
    found: Vec<ConfigError>,
}

impl<'t> Errors<'t> {
    /// Parses `text` as far as it goes.
    pub(super) fn parse(text: &'t str) -> (Self, DeTable<'t>) {
        let (table, syntax) = DeTable::parse_recoverable(text);
        let mut errors = Self { text, broken: Vec::new(), found: Vec::new() };
        for error in syntax {
            let line = errors.line(error.span().map_or(0, |span| span.start));
            errors.broken.push(line);
            // The parser may find several faults in one; the first is the cause.
            if errors.found.last().is_none_or(|last: &ConfigError| last.line != line) {
                let message = error.message().replace('\n', ", ");
                errors.found.push(ConfigError { line, field: String::new(), message });
            }
        }
        (errors, table.into_inner())
    }

    fn line(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().get(..offset).unwrap_or(self.text.as_bytes());
        before.iter().filter(|b| **b == b'\n').count() + 1
    }

    /// Notes one error, unless its line is not TOML anyway.
    pub(super) fn push(&mut self, line: usize, field: impl Into<String>, message: impl Into<String>) {
        if !self.broken.contains(&line) {
            self.found.push(ConfigError { line, field: field.into(), message: message.into() });
        }
    }

    /// Notes that something required is not there. In a text that is not TOML it may well be
    /// there, out of the parser's sight.
    fn missing(&mut self, line: usize, field: String) {
        if self.broken.is_empty() {
            self.push(line, field, "is required");
        }
    }

    /// `value` if nothing was wrong, else all that was, in the order of the lines.
    pub(super) fn finish<T>(mut self, value: Option<T>) -> Result<T, Vec<ConfigError>> {
        match value {
            Some(value) if self.found.is_empty() => Ok(value),
            _ => {
                self.found.sort_by_key(|error| error.line);
                Err(self.found)
            }
        }
    }
}

/// A value that was found: where it stands, and what it is.
type Found<'a, 'i> = (usize, &'a DeValue<'i>);

/// A table of the file. Getters answer `None` for what is wrong (and noted), the default for
/// what is absent.
pub(super) struct Table<'a, 'i> {
    path: String,
    line: usize,
    entries: Option<&'a DeTable<'i>>,
    known: Vec<&'static str>,
}

impl<'a, 'i> Table<'a, 'i> {
    /// The file's top.
    pub(super) fn root(entries: &'a DeTable<'i>) -> Self {
        Self { path: String::new(), line: 1, entries: Some(entries), known: Vec::new() }
    }

    /// The table `key`, empty if absent.
    pub(super) fn table(&mut self, key: &'static str, errors: &mut Errors<'_>) -> Table<'a, 'i> {
        let path = self.field(key);
        let (line, entries) = match self.value(key, errors) {
            None => (1, None),
            Some((line, DeValue::Table(entries))) => (line, Some(entries)),
            Some((line, other)) => {
                errors.push(line, path.clone(), wrong_type("a table", other));
                (line, None)
            }
        };
        Table { path, line, entries, known: Vec::new() }
    }

    /// The array of tables `key`, empty if absent; at most `most`.
    pub(super) fn tables(&mut self, key: &'static str, most: usize, errors: &mut Errors<'_>) -> Vec<Table<'a, 'i>> {
        let mut tables = Vec::new();
        let Some((line, items)) = self.array(key, 0..=most, errors) else { return tables };
        for (index, item) in items.iter().enumerate() {
            let path = format!("{}[{index}]", self.field(key));
            let at = errors.line(item.span().start).max(line);
            match item.get_ref() {
                DeValue::Table(entries) => {
                    tables.push(Table { path, line: at, entries: Some(entries), known: Vec::new() });
                }
                other => errors.push(at, path, wrong_type("a table", other)),
            }
        }
        tables
    }

    /// The full name of `key`.
    pub(super) fn field(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Where `key` stands, or its table if it is absent.
    pub(super) fn line_of(&self, key: &str, errors: &Errors<'_>) -> usize {
        let entry = self.entries.and_then(|entries| entries.get_key_value(key));
        entry.map_or(self.line, |(name, _)| errors.line(name.span().start))
    }

    /// Notes that a rule across fields is broken, at `key`.
    pub(super) fn broken_rule(&self, key: &str, message: impl Into<String>, errors: &mut Errors<'_>) {
        errors.push(self.line_of(key, errors), self.field(key), message);
    }

    fn value(&mut self, key: &'static str, errors: &Errors<'_>) -> Option<Found<'a, 'i>> {
        self.known.push(key);
        let value = self.entries?.get(key)?;
        Some((self.line_of(key, errors), value.get_ref()))
    }

    /// A whole number within `range`.
    pub(super) fn integer<N>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<N>,
        default: N,
        errors: &mut Errors<'_>,
    ) -> Option<N>
    where
        N: TryFrom<i128> + PartialOrd + fmt::Display,
    {
        let Some((line, value)) = self.value(key, errors) else { return Some(default) };
        integer(value, &range).map_err(|message| errors.push(line, self.field(key), message)).ok()
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &'static str, default: bool, errors: &mut Errors<'_>) -> Option<bool> {
        match self.value(key, errors) {
            None => Some(default),
            Some((_, DeValue::Boolean(value))) => Some(*value),
            Some((line, other)) => {
                errors.push(line, self.field(key), wrong_type("true or false", other));
                None
            }
        }
    }

    /// One of the words of `choices`.
    pub(super) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
        default: T,
        errors: &mut Errors<'_>,
    ) -> Option<T> {
        let (line, value) = match self.value(key, errors) {
            None => return Some(default),
            Some(found) => found,
        };
        let words = choices.iter().map(|(word, _)| *word).collect::<Vec<_>>();
        let message = match value {
            DeValue::String(text) => match choices.iter().find(|(word, _)| word == text) {
                Some((_, choice)) => return Some(*choice),
                None => format!("must be {}, is {text:?}", words.join(" or ")),
            },
            other => wrong_type(&words.join(" or "), other),
        };
        errors.push(line, self.field(key), message);
        None
    }

    /// A string that `T` reads; required if there is no default.
    pub(super) fn parsed<T: FromStr>(
        &mut self,
        key: &'static str,
        shape: &str,
        default: Option<T>,
        errors: &mut Errors<'_>,
    ) -> Option<T> {
        let Some((line, value)) = self.value(key, errors) else {
            if default.is_none() {
                errors.missing(self.line, self.field(key));
            }
            return default;
        };
        parse(value, shape).map_err(|message| errors.push(line, self.field(key), message)).ok()
    }

    /// A string that `T` reads, if it is there: `Some(None)` where it is not.
    pub(super) fn optional<T: FromStr>(
        &mut self,
        key: &'static str,
        shape: &str,
        errors: &mut Errors<'_>,
    ) -> Option<Option<T>> {
        let Some((line, value)) = self.value(key, errors) else { return Some(None) };
        parse(value, shape).map(Some).map_err(|message| errors.push(line, self.field(key), message)).ok()
    }

    fn array(
        &mut self,
        key: &'static str,
        count: RangeInclusive<usize>,
        errors: &mut Errors<'_>,
    ) -> Option<(usize, &'a toml::de::DeArray<'i>)> {
        let (line, value) = self.value(key, errors)?;
        let message = match value {
            DeValue::Array(items) if count.contains(&items.len()) => return Some((line, items)),
            DeValue::Array(items) => {
                format!("must list {} to {} of them, lists {}", count.start(), count.end(), items.len())
            }
            other => wrong_type("a list", other),
        };
        errors.push(line, self.field(key), message);
        None
    }

    /// A list, each member read by `read`; no member twice.
    pub(super) fn list<T: PartialEq>(
        &mut self,
        key: &'static str,
        count: RangeInclusive<usize>,
        default: Vec<T>,
        read: impl Fn(&DeValue<'i>) -> Result<T, String>,
        errors: &mut Errors<'_>,
    ) -> Option<Vec<T>> {
        if !self.entries.is_some_and(|entries| entries.contains_key(key)) {
            self.known.push(key);
            return Some(default);
        }
        let (_, items) = self.array(key, count, errors)?;
        let mut list = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let problem = match read(item.get_ref()) {
                Ok(value) if !list.contains(&value) => {
                    list.push(value);
                    continue;
                }
                Ok(_) => "is listed twice".to_owned(),
                Err(message) => message,
            };
            let line = errors.line(item.span().start);
            errors.push(line, format!("{}[{index}]", self.field(key)), problem);
        }
        (list.len() == items.len()).then_some(list)
    }

    /// Notes every key that no getter asked for.
    pub(super) fn finish(self, errors: &mut Errors<'_>) {
        for (key, _) in self.entries.into_iter().flatten() {
            let name = key.get_ref().as_ref();
            if self.known.contains(&name) {
                continue;
            }
            let line = errors.line(key.span().start);
            let message = match nearest(name, &self.known) {
                Some(known) => format!("is not a known field; did you mean {known}?"),
                None => format!("is not a known field; known here: {}", self.known.join(", ")),
            };
            errors.push(line, self.field(name), message);
        }
    }
}

/// A whole number within `range`.
pub(super) fn integer<N>(value: &DeValue<'_>, range: &RangeInclusive<N>) -> Result<N, String>
where
    N: TryFrom<i128> + PartialOrd + fmt::Display,
{
    let DeValue::Integer(number) = value else { return Err(wrong_type("a whole number", value)) };
    let inside = i128::from_str_radix(number.as_str(), number.radix()).ok().and_then(|n| N::try_from(n).ok());
    match inside {
        Some(n) if range.contains(&n) => Ok(n),
        _ if range.start() == range.end() => Err(format!("must be {}, is {number}", range.start())),
        _ => Err(format!("must be {} to {}, is {number}", range.start(), range.end())),
    }
}

/// A string that `T` reads.
pub(super) fn parse<T: FromStr>(value: &DeValue<'_>, shape: &str) -> Result<T, String> {
    match value {
        DeValue::String(text) => text.parse().map_err(|_| format!("must be {shape}, is {text:?}")),
        other => Err(wrong_type(&format!("a string: {shape}"), other)),
    }
}

fn wrong_type(want: &str, value: &DeValue<'_>) -> String {
    let article = if matches!(value, DeValue::Integer(_) | DeValue::Array(_)) { "an" } else { "a" };
    format!("must be {want}, is {article} {}", value.type_str())
}

/// The known name that `name` most likely meant.
fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let close = |candidate: &str| (candidate.len() / 3).max(1);
    let ranked = known.iter().map(|candidate| (distance(name, candidate), *candidate));
    ranked.filter(|(far, candidate)| *far <= close(candidate)).min().map(|(_, candidate)| candidate)
}

/// Levenshtein's: characters to insert, delete or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // A name longer than any field is not a misspelling of one; its cost stays bounded.
    for (i, from) in a.chars().take(128).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, to) in row.iter_mut().skip(1).zip(&b) {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = *cell;
            left = replaced.min(*cell + 1).min(left + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}
