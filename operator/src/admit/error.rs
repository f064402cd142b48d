//! What is wrong with a manifest, and where.

use std::fmt;

/// One thing that is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file's name, or `standard input`.
    pub source: String,
    /// Which document of it, from 1; 0 where there is none.
    pub document: usize,
    /// The line in the file, from 1, where it is known.
    pub line: Option<usize>,
    /// The field's path, `spec.limits.inflight`; empty where no field is to blame.
    pub field: String,
    /// The rule or bound that does not hold.
    pub message: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)?;
        if self.document > 0 {
            write!(f, ", document {}", self.document)?;
        }
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ManifestError {}
