//! YAML into values that remember their lines. Decides what a document is, as kubectl does;
//! nothing of what a document means.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_yaml::Spanned;

/// One document of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    /// Its lines.
    pub(super) text: &'a str,
    /// The number of its first line in the whole, from 1.
    pub(super) first: usize,
}

/// A document as JSON, and the line of each field by its path.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Document {
    /// What it says.
    pub(super) value: Value,
    /// `spec.limits.inflight` to its line.
    pub(super) lines: BTreeMap<String, usize>,
}

/// Why a document is not YAML.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    /// Where.
    pub(super) line: Option<usize>,
    /// What is wrong.
    pub(super) message: String,
}

/// The documents of a text, without those that say nothing.
pub(super) fn split(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let (mut start, mut first, mut at) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let end = at + line.len();
        if is_separator(line) {
            parts.push(Part { text: &text[start..at], first });
            (start, first) = (end, index + 2);
        }
        at = end;
    }
    parts.push(Part { text: &text[start..], first });
    parts.retain(|part| part.text.lines().any(says_something));
    parts
}

fn is_separator(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| {
        let rest = rest.trim();
        rest.is_empty() || rest.starts_with('#')
    })
}

fn says_something(line: &str) -> bool {
    let line = line.trim();
    !line.is_empty() && !line.starts_with('#') && line != "..."
}

impl Part<'_> {
    /// Reads the document.
    ///
    /// # Errors
    /// It is not YAML.
    pub(super) fn read(&self) -> Result<Document, SyntaxError> {
        // As the parser behind kubectl reads numbers; its booleans are the default here.
        let options = serde_yaml::options! { legacy_octal_numbers: true };
        let node: Spanned<Node> =
            serde_yaml::from_str_with_options(self.text, options).map_err(|e| self.syntax_error(&e))?;
        let mut document = Document::default();
        document.value = self.lower(node.value, "", &mut document.lines);
        Ok(document)
    }

    fn syntax_error(&self, error: &serde_yaml::Error) -> SyntaxError {
        let line = error.location().and_then(|at| usize::try_from(at.line()).ok()).filter(|line| *line > 0);
        let line = line.map(|line| line + self.first - 1);
        match self.tab(line) {
            Some(tab) => SyntaxError {
                line: Some(tab),
                message: "a tab: YAML does not allow tabs for indentation, use spaces".into(),
            },
            None => SyntaxError { line, message: reason(error) },
        }
    }

    /// The line of the first tab among indentation, up to the line that the parser stopped at.
    fn tab(&self, stopped: Option<usize>) -> Option<usize> {
        let indented = |line: &str| line.trim_start_matches(' ').starts_with('\t');
        let index = self.text.lines().position(indented)?;
        // The parser may stop at the line before, where it looked for more of a value.
        Some(self.first + index).filter(|line| stopped.is_none_or(|stop| *line <= stop + 1))
    }

    fn lower(&self, node: Node, path: &str, lines: &mut BTreeMap<String, usize>) -> Value {
        match node {
            Node::Scalar(value) => value,
            Node::List(items) => {
                let lowered = items.into_iter().enumerate().map(|(index, item)| {
                    let path = format!("{path}[{index}]");
                    self.note(&item, &path, lines);
                    self.lower(item.value, &path, lines)
                });
                Value::Array(lowered.collect())
            }
            Node::Map(entries) => {
                let mut map = Map::new();
                for (key, value) in entries {
                    let path = if path.is_empty() { key.value.clone() } else { format!("{path}.{}", key.value) };
                    self.note(&key, &path, lines);
                    map.insert(key.value, self.lower(value, &path, lines));
                }
                Value::Object(map)
            }
        }
    }

    fn note<T>(&self, at: &Spanned<T>, path: &str, lines: &mut BTreeMap<String, usize>) {
        if let Some(line) = usize::try_from(at.referenced.line()).ok().filter(|line| *line > 0) {
            lines.insert(path.to_owned(), line + self.first - 1);
        }
    }
}

/// The parser's message without its location and its excerpt, which are shown apart.
fn reason(error: &serde_yaml::Error) -> String {
    let text = error.without_snippet().to_string();
    let line = text.lines().next().unwrap_or_default();
    let line = line.split_once(" at line ").map_or(line, |(message, _)| message);
    match line.strip_prefix("duplicate mapping key: ") {
        Some(key) => format!("{} stands here a second time", key.split(',').next().unwrap_or(key)),
        None => format!("not YAML: {}", line.trim_end_matches(':')),
    }
}

enum Node {
    Scalar(Value),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Node)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Node, D::Error> {
        Node::deserialize(from)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<Node, E> {
        /// Every whole number up to it is exact in a float.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        if v.fract() == 0.0 && v.abs() <= EXACT {
            // `3.0` and `1e1` reach an API server as 3 and 10.
            return Ok(Node::Scalar((v as i64).into()));
        }
        Number::from_f64(v).map(|n| Node::Scalar(n.into())).ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Node, E> {
        Ok(Node::Scalar(v.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}
