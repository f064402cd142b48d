//! What a capability token says and what it allows. Decides on audience, holder, tenant,
//! topic, action and time; signatures are verified before, by the shell's `kms`.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::identity::{SpiffeId, TenantId, Topic};
use crate::status::{Refusal, Status};

/// The holder that Unix-socket clients present; refused on every other transport.
pub const LOCAL_HOLDER: &str = "local";
/// Tenants, and topics, that one token may list.
pub const MAX_LIST: usize = 64;
/// Milliseconds that clocks may differ before `nbf` and `exp` bite.
pub const CLOCK_SKEW_MS: u64 = 5_000;

/// Something a token may allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Put messages on topics; between daemons, gossip them.
    Publish,
    /// Receive the messages of topics.
    Subscribe,
    /// Fetch objects.
    Get,
    /// Store objects.
    Put,
    /// Read the daemon's state.
    Admin,
}

/// The claims of a token: a closed set, an unknown member refuses the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// The OverlayNode that it is for, without a pod.
    pub aud: SpiffeId,
    /// Who may present it: the SPIFFE id of the session's certificate (or one above it by
    /// whole segments), or [`LOCAL_HOLDER`].
    pub sub: String,
    /// The tenants whose frames it opens streams for.
    pub tenants: Vec<TenantId>,
    /// Topics: exact, or a prefix followed by `*`; `*` alone is every topic.
    pub topics: Vec<String>,
    /// What it allows on them.
    pub actions: Vec<Action>,
    /// Not valid before, seconds since 1970.
    pub nbf: u64,
    /// Not valid from, seconds since 1970.
    pub exp: u64,
}

/// The public key that a token was signed with: Ed25519, 32 bytes. Not the `kid`, which is a
/// name: another key may come to bear it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenKey(pub [u8; 32]);

/// Which key a signature was verified with, and in which set of keys it stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignedBy {
    /// The key.
    pub key: TokenKey,
    /// The set's number: each set has a higher one than the set that it replaced.
    pub generation: u64,
}

/// When a token is good: all that a stream keeps of it, whose lists may be long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Its `nbf`, seconds since 1970.
    not_before: u64,
    /// Its `exp`, seconds since 1970.
    expires: u64,
}

impl Validity {
    /// Whether the token is valid at `unix_ms`, milliseconds since 1970.
    ///
    /// # Errors
    /// 401 before `nbf` and from `exp` on.
    pub fn check(self, unix_ms: u64) -> Result<(), Refusal> {
        if unix_ms.saturating_add(CLOCK_SKEW_MS) < self.not_before.saturating_mul(1000) {
            return Err(Refusal::new(Status::Unauthorized, "the token is not valid yet"));
        }
        if unix_ms >= self.expires.saturating_mul(1000) {
            return Err(Refusal::new(Status::Unauthorized, "the token has expired"));
        }
        Ok(())
    }
}

/// For how long a stream may stay open by the token that it was opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// It ends then, milliseconds since 1970.
    pub until_ms: u64,
    /// It ends when this key is believed no longer.
    pub signed_by: SignedBy,
}

/// Who presents a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process on the Unix socket.
    Local,
    /// The identity of the session's certificate.
    Certificate(SpiffeId),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => LOCAL_HOLDER,
            Self::Certificate(id) => id.as_str(),
        })
    }
}

/// A token whose signature held, ready to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Shared with whoever remembers what was verified.
    claims: Arc<Claims>,
    signed_by: SignedBy,
}

impl Grant {
    /// Checks what does not depend on the request: bounds, audience, holder, time.
    ///
    /// # Errors
    /// 401 with the first rule that fails.
    pub fn new(
        claims: impl Into<Arc<Claims>>,
        signed_by: SignedBy,
        audience: &SpiffeId,
        holder: &Holder,
        unix_ms: u64,
    ) -> Result<Self, Refusal> {
        let no = |message| Err(Refusal::new(Status::Unauthorized, message));
        let claims = claims.into();
        if claims.tenants.len() > MAX_LIST || claims.topics.len() > MAX_LIST {
            return no("the token lists too much");
        }
        if claims.aud != *audience {
            return no("the token is for another audience");
        }
        let held = match holder {
            Holder::Local => claims.sub == LOCAL_HOLDER,
            Holder::Certificate(id) => claims.sub.parse::<SpiffeId>().is_ok_and(|sub| sub.covers(id)),
        };
        if !held {
            return no("the token belongs to another holder");
        }
        let grant = Self { claims, signed_by };
        grant.validity().check(unix_ms)?;
        Ok(grant)
    }

    /// When the token is good.
    #[must_use]
    pub fn validity(&self) -> Validity {
        Validity { not_before: self.claims.nbf, expires: self.claims.exp }
    }

    /// For how long a stream that it opens may stay open.
    #[must_use]
    pub fn lease(&self) -> Lease {
        Lease { until_ms: self.claims.exp.saturating_mul(1000), signed_by: self.signed_by }
    }

    /// Whether it allows `action` for `tenant`, and on `topic` where there is one.
    ///
    /// # Errors
    /// 403 with the first rule that fails.
    pub fn permit(&self, action: Action, tenant: TenantId, topic: Option<&Topic>) -> Result<(), Refusal> {
        let no = |message| Err(Refusal::new(Status::Forbidden, message));
        if !self.claims.tenants.contains(&tenant) {
            return no("the token is for another tenant");
        }
        if !self.claims.actions.contains(&action) {
            return no("the token does not allow this action");
        }
        if topic.is_some_and(|topic| !self.claims.topics.iter().any(|pattern| matches(pattern, topic))) {
            return no("the token does not allow this topic");
        }
        Ok(())
    }
}

fn matches(pattern: &str, topic: &Topic) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => topic.as_str().starts_with(prefix),
        None => topic.as_str() == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "spiffe://example.org/ns/a/overlaynode/mesh";

    fn signed_by() -> SignedBy {
        SignedBy { key: TokenKey([1; 32]), generation: 0 }
    }

    fn claims() -> Claims {
        Claims {
            aud: NODE.parse().unwrap(),
            sub: LOCAL_HOLDER.into(),
            tenants: vec![TenantId(0)],
            topics: vec!["news".into(), "log.*".into()],
            actions: vec![Action::Publish],
            nbf: 100,
            exp: 200,
        }
    }

    /// K1: expiry and not-before, a second and a millisecond to either side, and a daemon whose
    /// clock is five minutes off: only `nbf` is given the skew, a token never outlives `exp`.
    #[test]
    fn k1_the_time_is_kept_to_the_millisecond() {
        const MINUTES_5: i64 = 300_000;
        let (nbf, exp) = (100_000_i64, 200_000_i64);
        let skew = i64::try_from(CLOCK_SKEW_MS).unwrap();
        let grant = Grant::new(claims(), signed_by(), &NODE.parse().unwrap(), &Holder::Local, 150_000).unwrap();
        for (at, good) in [
            (nbf - skew - 1_000, false),
            (nbf - skew - 1, false),
            (nbf - skew, true),
            (nbf - 1_000, true),
            (nbf, true),
            (nbf + 1_000, true),
            (exp - 1_000, true),
            (exp - 1, true),
            (exp, false),
            (exp + 1, false),
            (exp + 1_000, false),
            (exp + skew, false),
            // A fresh token at a clock that is behind, an old one at a clock that is behind or
            // ahead.
            (nbf - MINUTES_5.min(nbf), false),
            (exp + MINUTES_5, false),
            (i64::MAX, false),
        ] {
            let at = u64::try_from(at).unwrap();
            assert_eq!(grant.validity().check(at).is_ok(), good, "{at}");
            let made = Grant::new(claims(), signed_by(), &NODE.parse().unwrap(), &Holder::Local, at);
            assert_eq!(made.is_ok(), good, "{at}");
        }
        let forever = Claims { nbf: 0, exp: u64::MAX, ..claims() };
        let grant = Grant::new(forever, signed_by(), &NODE.parse().unwrap(), &Holder::Local, 0).unwrap();
        assert_eq!(grant.lease().until_ms, u64::MAX, "and nothing overflows");
        let never = Claims { nbf: u64::MAX, exp: u64::MAX, ..claims() };
        assert!(Grant::new(never, signed_by(), &NODE.parse().unwrap(), &Holder::Local, u64::MAX - 5_001).is_err());
    }

    /// P-4, K2, K5: one claim off at a time, and the code that answers it.
    #[test]
    fn k2_k5_one_claim_off_refuses() {
        let pod = Holder::Certificate(format!("{NODE}/pod/mesh-0").parse().unwrap());
        let node: SpiffeId = NODE.parse().unwrap();
        let other: SpiffeId = "spiffe://example.org/ns/a/overlaynode/other".parse().unwrap();
        let ask = |claims: Claims,
                   audience: &SpiffeId,
                   holder: &Holder,
                   at: u64,
                   tenant: u128,
                   topic: &str,
                   action: Action| {
            let topic = topic.parse().unwrap();
            Grant::new(claims, signed_by(), audience, holder, at)
                .and_then(|g| g.permit(action, TenantId(tenant), Some(&topic)))
                .map_err(|r| r.status.code())
        };
        let remote = |sub: &str| Claims { sub: sub.into(), ..claims() };
        use Action::{Publish, Subscribe};
        let local = &Holder::Local;
        let (p, s) = (Publish, Subscribe);
        let table = [
            ("as granted", ask(claims(), &node, local, 150_000, 0, "news", p), Ok(())),
            ("prefix", ask(claims(), &node, local, 150_000, 0, "log.a", p), Ok(())),
            ("prefix is not exact", ask(claims(), &node, local, 150_000, 0, "newsflash", p), Err(403)),
            ("topic", ask(claims(), &node, local, 150_000, 0, "log", p), Err(403)),
            ("action", ask(claims(), &node, local, 150_000, 0, "news", s), Err(403)),
            ("tenant", ask(claims(), &node, local, 150_000, 1, "news", p), Err(403)),
            ("audience", ask(claims(), &other, local, 150_000, 0, "news", p), Err(401)),
            ("local over TLS", ask(claims(), &node, &pod, 150_000, 0, "news", p), Err(401)),
            ("another's over TLS", ask(remote(other.as_str()), &node, &pod, 150_000, 0, "news", p), Err(401)),
            ("a certificate's on the socket", ask(remote(NODE), &node, local, 150_000, 0, "news", p), Err(401)),
            ("held by the node, shown by its pod", ask(remote(NODE), &node, &pod, 150_000, 0, "news", p), Ok(())),
            ("early, within skew", ask(claims(), &node, local, 95_000, 0, "news", p), Ok(())),
            ("early", ask(claims(), &node, local, 94_999, 0, "news", p), Err(401)),
            ("last moment", ask(claims(), &node, local, 199_999, 0, "news", p), Ok(())),
            ("expired", ask(claims(), &node, local, 200_000, 0, "news", p), Err(401)),
        ];
        for (case, got, want) in table {
            assert_eq!(got, want, "{case}");
        }
    }
}
