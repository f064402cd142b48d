//! Who and whose: SPIFFE ids, tenants, topics. Parsing and matching, nothing else.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Bytes of a SPIFFE id (the SPIFFE-ID specification, section 2.3).
pub const MAX_ID: usize = 2_048;
/// Bytes of a topic.
pub const MAX_TOPIC: usize = 255;

/// Why a name is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not `spiffe://TRUST-DOMAIN/ns/NAMESPACE/(overlaynode|client)/NAME[/pod/POD]`.
    #[error(
        "must be spiffe://TRUST-DOMAIN/ns/NAMESPACE/overlaynode/NAME, optionally followed by /pod/POD, or …/client/NAME"
    )]
    Identity,
    /// Not a tenant.
    #[error("must be 0, a UUID, a ULID or 32 hexadecimal digits")]
    Tenant,
    /// Not a topic.
    #[error("must be 1 to 255 bytes without control characters or '*'")]
    Topic,
}

/// A session's identity: the URI SAN of its certificate. Clones share the text: every message
/// carries its origin's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId(Arc<str>);

impl SpiffeId {
    /// The id of an OverlayNode, which all its pods share or lie below.
    ///
    /// # Errors
    /// A part is empty or has a character that an id does not allow.
    pub fn overlay_node(trust_domain: &str, namespace: &str, name: &str) -> Result<Self, NameError> {
        format!("spiffe://{trust_domain}/ns/{namespace}/overlaynode/{name}").parse()
    }

    /// The id of one pod below this one.
    ///
    /// # Errors
    /// This is a pod's id already or a client's, or the pod's name has a character that an id
    /// does not allow.
    pub fn pod(&self, pod: &str) -> Result<Self, NameError> {
        format!("{self}/pod/{pod}").parse()
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// This id without `/pod/POD`: what tokens name as audience.
    #[must_use]
    pub fn without_pod(&self) -> Self {
        Self(self.0.split_once("/pod/").map_or_else(|| Arc::clone(&self.0), |(node, _)| node.into()))
    }

    /// Whether `other` is this id or lies below it, by whole segments.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        other.0.strip_prefix(&*self.0).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl FromStr for SpiffeId {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let rest = s.strip_prefix("spiffe://").filter(|_| s.len() <= MAX_ID).ok_or(NameError::Identity)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let segment = |p: &&str| {
            !matches!(*p, "" | "." | "..") && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        };
        let domain = |d: &str| d.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b));
        let shape = match parts[..] {
            [d, "ns", _, "overlaynode" | "client", _] | [d, "ns", _, "overlaynode", _, "pod", _] => domain(d),
            _ => false,
        };
        if shape && parts.iter().all(segment) { Ok(Self(s.into())) } else { Err(NameError::Identity) }
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = NameError;
    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.0.as_ref().to_owned()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A tenant: 128 bits, 0 where tenants are not used. 0 is a tenant like any other.
///
/// Read from `0`, a UUID, a ULID (26 characters of Crockford's base 32) or 32 hexadecimal
/// digits; written as `0` or as a UUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantId(pub u128);

impl FromStr for TenantId {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let hex = |s: &str| u128::from_str_radix(s, 16).ok().filter(|_| s.bytes().all(|b| b.is_ascii_hexdigit()));
        let value = match s.len() {
            1 if s == "0" => Some(0),
            26 => s.bytes().try_fold(0_u128, |acc, b| {
                let digit = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ".iter().position(|d| *d == b.to_ascii_uppercase())?;
                acc.checked_mul(32)?.checked_add(digit as u128)
            }),
            32 => hex(s),
            36 => {
                let dashes = [8, 13, 18, 23].iter().all(|i| s.as_bytes().get(*i) == Some(&b'-'));
                let digits = s.replace('-', "");
                (dashes && digits.len() == 32).then(|| hex(&digits)).flatten()
            }
            _ => None,
        };
        value.map(Self).ok_or(NameError::Tenant)
    }
}

impl TryFrom<String> for TenantId {
    type Error = NameError;
    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<TenantId> for String {
    fn from(t: TenantId) -> Self {
        t.to_string()
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0");
        }
        let h = format!("{:032x}", self.0);
        write!(f, "{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
    }
}

/// An opaque name that messages are published under: 1 to 255 bytes of UTF-8 without
/// control characters and without `*`, which tokens use for prefixes. Clones share the text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Topic(Arc<str>);

impl Topic {
    /// The topic as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Topic {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let fits = (1..=MAX_TOPIC).contains(&s.len());
        if fits && !s.chars().any(|c| c.is_control() || c == '*') { Ok(Self(s.into())) } else { Err(NameError::Topic) }
    }
}

impl TryFrom<String> for Topic {
    type Error = NameError;
    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<Topic> for String {
    fn from(t: Topic) -> Self {
        t.0.as_ref().to_owned()
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_covers_whole_segments_only() {
        let id = |s: &str| s.parse::<SpiffeId>().unwrap();
        let mesh = id("spiffe://example.org/ns/a/overlaynode/mesh");
        let pod = id("spiffe://example.org/ns/a/overlaynode/mesh/pod/mesh-0");
        assert!(mesh.covers(&mesh) && mesh.covers(&pod) && !pod.covers(&mesh));
        assert!(!mesh.covers(&id("spiffe://example.org/ns/a/overlaynode/mesh2")));
        assert_eq!(pod.without_pod(), mesh);
        assert_eq!((mesh.pod("mesh-0"), mesh.pod("a/b")), (Ok(pod.clone()), Err(NameError::Identity)));
        assert!(pod.pod("mesh-0").is_err() && id("spiffe://example.org/ns/a/client/c").pod("p").is_err());
    }

    #[test]
    fn what_is_not_an_id() {
        for bad in [
            "",
            "https://example.org/ns/a/overlaynode/m",
            "spiffe://Example.org/ns/a/overlaynode/m",
            "spiffe://e/ns/a/overlaynode/",
            "spiffe://e/ns/../overlaynode/m",
            "spiffe://e/ns/a/overlaynode/m/pod/",
            "spiffe://e/ns/a/overlaynode/m/pod/p/q",
            "spiffe://e/ns/a/pod/m",
            "spiffe://e:80/ns/a/overlaynode/m",
        ] {
            assert_eq!(bad.parse::<SpiffeId>(), Err(NameError::Identity), "{bad}");
        }
    }

    #[test]
    fn tenants_read_and_write() {
        for (text, value, shown) in [
            ("0", 0, "0"),
            ("00000000000000000000000000000001", 1, "00000000-0000-0000-0000-000000000001"),
            (
                "01234567-89ab-cdef-0123-456789abcdef",
                0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
                "01234567-89ab-cdef-0123-456789abcdef",
            ),
            (
                "01ARZ3NDEKTSV4RRFFQ69G5FAV",
                0x0156_3e3a_b5d3_d676_4c61_efb9_9302_bd5b,
                "01563e3a-b5d3-d676-4c61-efb99302bd5b",
            ),
        ] {
            let tenant: TenantId = text.parse().unwrap();
            assert_eq!((tenant.0, tenant.to_string().as_str()), (value, shown));
        }
        for bad in [
            "",
            "1",
            "+0000000000000000000000000000001",
            "zz",
            "8ZZZZZZZZZZZZZZZZZZZZZZZZZ",
            "01234567x89ab-cdef-0123-456789abcdef",
        ] {
            assert!(bad.parse::<TenantId>().is_err(), "{bad}");
        }
    }
}
