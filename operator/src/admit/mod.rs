//! Admission without an API server: what `kubectl apply` would refuse is refused here, by
//! the same schema, the same defaults and the same rules, and nothing else is, save documents
//! that are not OverlayNodes, and keys that stand twice in a document, of which kubectl takes
//! the last.
//!
//! Decides whether text is a list of valid OverlayNodes; never what they mean.

mod documents;
mod error;
mod schema;
mod yaml;

use crate::api::OverlayNode;

pub use documents::documents;
pub use error::ManifestError;

/// A manifest that was admitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Admitted {
    /// With its namespace and its defaults filled in.
    pub node: OverlayNode,
    /// Which document of its source it was, from 1.
    pub document: usize,
    /// The first line of that document, from 1.
    pub line: usize,
}

#[cfg(test)]
mod tests;
