//! Whether what NAME-tls and NAME-token hold is still good, and new credentials where it is
//! not. Decides when to issue: after a third of a life, or when the authority, the identity
//! or the tenants are others. What is still good stays byte for byte. Never reads or writes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::api::core::v1::Secret;
use overlay_core::grant::Claims;
use overlay_core::identity::{SpiffeId, TenantId};
use serde_json::Value;

use crate::build::{self, Credentials, LeafSecret};
use crate::trust::{self, Ca, LEAF_LIFETIME, LeafInfo, TOKEN_LIFETIME, TokenRoot, TrustError, renew_at};

/// The keys of an installation.
pub(super) struct Installation {
    /// Signs leaf certificates.
    pub ca: Ca,
    /// Signs tokens.
    pub tokens: TokenRoot,
}

/// The Secrets of one OverlayNode as they stand.
#[derive(Default)]
pub(super) struct Standing {
    /// NAME-tls.
    pub tls: Option<Secret>,
    /// NAME-token.
    pub token: Option<Secret>,
}

/// Whose credentials they are.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    /// The OverlayNode's identity.
    pub id: &'a SpiffeId,
    /// The tenants that it may carry.
    pub tenants: &'a [TenantId],
}

/// A certificate with its key and CA.
#[derive(Clone)]
pub(super) struct Certificate {
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
    /// When it expires.
    pub not_after: SystemTime,
    /// When another is due.
    pub renew_at: SystemTime,
}

/// The tokens of an OverlayNode, and the keys that they are verified with.
#[derive(Clone)]
pub(super) struct Tokens {
    keys: Vec<u8>,
    peer: Vec<u8>,
    local: Vec<u8>,
    /// When others are due.
    pub renew_at: SystemTime,
}

/// What the Secrets hold, as far as it is still good.
pub(super) struct Current {
    /// From NAME-tls.
    pub certificate: Option<Certificate>,
    /// From NAME-token.
    pub tokens: Option<Tokens>,
}

/// The certificates of an OverlayNode's pods.
pub(super) enum Leaves {
    /// One for all of them.
    Shared(Certificate),
    /// Each pod's own, which the signer issues.
    PerPod {
        /// The installation's CA.
        ca: Vec<u8>,
        /// NAME-tls still holds the key of one for all, and no pod mounts it any more.
        leftover: bool,
    },
}

/// Both, for the builder.
#[must_use]
pub(super) fn credentials(leaves: &Leaves, tokens: &Tokens) -> Credentials {
    let (leaf, ca) = match leaves {
        Leaves::Shared(Certificate { certificate, key, ca, .. }) => {
            (LeafSecret::Holds { certificate: certificate.clone(), key: key.clone() }, ca)
        }
        Leaves::PerPod { ca, leftover: true } => (LeafSecret::Emptied, ca),
        Leaves::PerPod { ca, leftover: false } => (LeafSecret::Absent, ca),
    };
    Credentials {
        leaf,
        ca: ca.clone(),
        token_keys: tokens.keys.clone(),
        peer_token: tokens.peer.clone(),
        local_token: tokens.local.clone(),
    }
}

/// What of `standing` is still good at `now`.
#[must_use]
pub(super) fn current(standing: &Standing, of: &Installation, subject: Subject<'_>, now: SystemTime) -> Current {
    Current {
        certificate: standing.tls.as_ref().and_then(|s| current_certificate(s, &of.ca, subject.id, now)),
        tokens: standing.token.as_ref().and_then(|s| current_tokens(s, &of.tokens, subject, now)),
    }
}

/// Whether NAME-tls of the OverlayNode with this UID holds a private key.
#[must_use]
pub(super) fn holds_key(standing: &Standing, uid: &str) -> bool {
    standing.tls.as_ref().is_some_and(|secret| {
        let owners = secret.metadata.owner_references.iter().flatten();
        let ours = owners.into_iter().any(|owner| owner.controller == Some(true) && owner.uid == uid);
        ours && bytes(secret, build::TLS_KEY).is_some_and(|key| !key.is_empty())
    })
}

fn bytes<'a>(secret: &'a Secret, key: &str) -> Option<&'a [u8]> {
    secret.data.as_ref()?.get(key).map(|b| b.0.as_slice())
}

fn text<'a>(secret: &'a Secret, key: &str) -> Option<&'a str> {
    std::str::from_utf8(bytes(secret, key)?).ok()
}

fn current_certificate(secret: &Secret, ca: &Ca, id: &SpiffeId, now: SystemTime) -> Option<Certificate> {
    let certificate = text(secret, build::TLS_CERTIFICATE)?;
    let key = text(secret, build::TLS_KEY)?;
    let authority = text(secret, build::TLS_CA)?;
    let info = LeafInfo::read(certificate).ok()?;
    let due = renew_at(info.not_before, info.not_after);
    let good = authority == ca.cert_pem()
        && info.identity.as_ref() == Some(id)
        && now < due
        && belong_together(certificate, key)
        && ca.issued(certificate);
    good.then(|| Certificate {
        certificate: certificate.into(),
        key: key.into(),
        ca: authority.into(),
        not_after: info.not_after,
        renew_at: due,
    })
}

fn belong_together(certificate: &str, key: &str) -> bool {
    let Ok(key) = rcgen::KeyPair::from_pem(key) else { return false };
    let key = trust::Zeroizing::new(key);
    let Ok((_, block)) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()) else { return false };
    block.parse_x509().is_ok_and(|cert| *cert.public_key().subject_public_key.data == *key.public_key_raw())
}

fn current_tokens(secret: &Secret, root: &TokenRoot, subject: Subject<'_>, now: SystemTime) -> Option<Tokens> {
    let json = |text: &str| serde_json::from_str::<Value>(text).ok();
    let keys = text(secret, build::TOKEN_KEYS)?;
    let peer = text(secret, build::PEER_TOKEN)?;
    let local = text(secret, build::LOCAL_TOKEN)?;
    if json(keys)? != json(&root.jwks())? {
        return None;
    }
    let (peer_claims, local_claims) = (root.read(peer).ok()?, root.read(local).ok()?);
    let wanted = claims(subject, now);
    if !same_but_for_time(&peer_claims, &wanted.0) || !same_but_for_time(&local_claims, &wanted.1) {
        return None;
    }
    let due = token_due(&peer_claims).min(token_due(&local_claims));
    (now < due).then(|| Tokens { keys: keys.into(), peer: peer.into(), local: local.into(), renew_at: due })
}

fn same_but_for_time(a: &Claims, b: &Claims) -> bool {
    *a == Claims { nbf: a.nbf, exp: a.exp, ..b.clone() }
}

fn token_due(claims: &Claims) -> SystemTime {
    let at = |seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH);
    renew_at(at(claims.nbf), at(claims.exp))
}

fn claims(subject: Subject<'_>, now: SystemTime) -> (Claims, Claims) {
    (
        trust::peer_claims(subject.id, subject.tenants, now, TOKEN_LIFETIME),
        trust::local_claims(subject.id, subject.tenants, now, TOKEN_LIFETIME),
    )
}

/// A new certificate.
///
/// # Errors
/// The CA cannot sign.
pub(super) fn issue_certificate(ca: &Ca, id: &SpiffeId, now: SystemTime) -> Result<Certificate, TrustError> {
    let leaf = ca.issue_leaf(id, now, LEAF_LIFETIME)?;
    let info = LeafInfo::read(&leaf.cert_pem)?;
    Ok(Certificate {
        certificate: leaf.cert_pem.into_bytes(),
        key: leaf.key_pem.as_bytes().to_vec(),
        ca: ca.cert_pem().into(),
        not_after: info.not_after,
        renew_at: renew_at(info.not_before, info.not_after),
    })
}

/// New tokens.
///
/// # Errors
/// The token root cannot sign.
pub(super) fn issue_tokens(root: &TokenRoot, subject: Subject<'_>, now: SystemTime) -> Result<Tokens, TrustError> {
    let (peer, local) = claims(subject, now);
    Ok(Tokens {
        keys: root.jwks().into_bytes(),
        peer: root.mint(&peer)?.as_bytes().to_vec(),
        local: root.mint(&local)?.as_bytes().to_vec(),
        renew_at: token_due(&peer),
    })
}

#[cfg(test)]
mod tests;
