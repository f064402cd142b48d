//! The credentials of an installation: a certificate authority with the leaves that it
//! issues, and a token root with the tokens that it mints.
//!
//! Decides what certificates and tokens say and for how long they are valid. Never where
//! they are kept, and it prints no private key: the types that hold one have no `Debug` that
//! would, and zero it when they go.

mod ca;
mod request;
mod token;

use std::time::{Duration, SystemTime};

pub use ca::{Ca, CaPem, Leaf, LeafCertificate, LeafInfo};
pub use request::{RequestError, RequestedKey};
pub use token::{EVERY_TOPIC, TokenRoot, local_claims, peer_claims};
pub use zeroize::Zeroizing;

/// How long a leaf is valid.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How long a token is valid.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How long a certificate authority is valid.
pub const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why there is no certificate or token.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A key or certificate could not be read or made.
    #[error("{what}: {source}")]
    Certificate {
        /// What was being done.
        what: &'static str,
        /// What the library says; it names no key material.
        source: rcgen::Error,
    },
    /// A certificate could not be parsed.
    #[error("{0}")]
    Parse(&'static str),
    /// A token could not be made or is not valid.
    #[error("token: {0}")]
    Token(#[from] jsonwebtoken::errors::Error),
}

/// When to renew what is valid from `not_before` to `not_after`: once a third of its life has
/// passed, so that whoever renews it may be away for the other two.
#[must_use]
pub fn renew_at(not_before: SystemTime, not_after: SystemTime) -> SystemTime {
    not_before + not_after.duration_since(not_before).unwrap_or_default() / 3
}

#[cfg(test)]
mod tests;
