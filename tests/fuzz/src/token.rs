//! Capability tokens: nothing is believed but what was signed, and what is believed allows what
//! it says. The key is that of RFC 8037, A.1; its private half has been public since.

use std::sync::OnceLock;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use overlay_core::grant::{Action, CLOCK_SKEW_MS, Claims, Grant, Holder, LOCAL_HOLDER, MAX_LIST, SignedBy, TokenKey};
use overlay_core::identity::{SpiffeId, TenantId, Topic};
use overlay_daemon::kms::TokenKeys;

use crate::chosen;

const KEYS: &[u8] =
    br#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"rfc8037","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
/// The one token that was signed with it.
const SIGNED: &str = concat!(
    "eyJhbGciOiJFZERTQSIsImtpZCI6InJmYzgwMzcifQ.",
    "eyJhdWQiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy9ucy9hL292ZXJsYXlub2RlL21lc2giLCJzdWIiOiJsb2NhbCIsInRlbmFudHMiOlsiMCJdLCJ0",
    "b3BpY3MiOlsibmV3cyIsImxvZy4qIl0sImFjdGlvbnMiOlsicHVibGlzaCIsInN1YnNjcmliZSJdLCJuYmYiOjEwMCwiZXhwIjoyMDB9.",
    "5fnZXHTADlPjycEyX5GJVj9WkQI529RYsD-cGDZJXvWIGBVmWQERYlWk9Xssjm1QXB04_d-4o0R2Dl4dsuGTBQ",
);

/// The first byte says what the rest is: a token, its header, its claims, or a set of keys.
pub fn token(data: &[u8]) {
    let (kind, rest) = chosen(data);
    match kind % 4 {
        0 => whole(rest),
        1 => header(rest),
        2 => claims(rest),
        _ => keys(rest),
    }
}

fn known() -> Option<&'static TokenKeys> {
    static KNOWN: OnceLock<Option<TokenKeys>> = OnceLock::new();
    KNOWN.get_or_init(|| TokenKeys::parse(KEYS).ok()).as_ref()
}

fn is_believed(token: &[u8]) -> bool {
    known().is_some_and(|keys| keys.claims(token).is_ok())
}

fn whole(token: &[u8]) {
    assert_eq!(is_believed(token), token == SIGNED.as_bytes(), "whoever signs nothing is not believed");
}

/// Another header over the same claims: the signature never covers it.
fn header(json: &[u8]) {
    let Some((signed, rest)) = SIGNED.split_once('.') else { return };
    let header = URL_SAFE_NO_PAD.encode(json);
    assert_eq!(is_believed(format!("{header}.{rest}").as_bytes()), header == signed);
}

/// The claims of a token whose signature held.
fn claims(json: &[u8]) {
    let Ok(claims) = serde_json::from_slice::<Claims>(json) else { return };
    let again = serde_json::to_vec(&claims).ok().and_then(|text| serde_json::from_slice::<Claims>(&text).ok());
    assert_eq!(again.as_ref(), Some(&claims));
    let signed_by = SignedBy { key: TokenKey([1; 32]), generation: 1 };
    let other = claims.aud.as_str().to_owned() + "x";
    for at in [0, 100_000, claims.nbf.saturating_mul(1_000), claims.exp.saturating_mul(1_000), u64::MAX] {
        let grant = Grant::new(claims.clone(), signed_by, &claims.aud, &Holder::Local, at);
        let good = claims.sub == LOCAL_HOLDER
            && claims.tenants.len().max(claims.topics.len()) <= MAX_LIST
            && at.saturating_add(CLOCK_SKEW_MS) >= claims.nbf.saturating_mul(1_000)
            && at < claims.exp.saturating_mul(1_000);
        assert_eq!(grant.is_ok(), good);
        if let Ok(other) = other.parse::<SpiffeId>() {
            assert!(Grant::new(claims.clone(), signed_by, &other, &Holder::Local, at).is_err());
        }
        if let Ok(grant) = grant {
            permits(&claims, &grant);
        }
    }
}

fn permits(claims: &Claims, grant: &Grant) {
    let topics = ["news", "log.a", "x"].map(|topic| topic.parse::<Topic>().ok());
    for action in [Action::Publish, Action::Subscribe, Action::Get, Action::Put, Action::Admin] {
        for tenant in [TenantId(0), TenantId(1)] {
            let listed = claims.actions.contains(&action) && claims.tenants.contains(&tenant);
            for topic in topics.iter().flatten() {
                let covered = claims.topics.iter().any(|pattern| match pattern.split_once('*') {
                    Some((prefix, "")) => topic.as_str().starts_with(prefix),
                    _ => pattern == topic.as_str(),
                });
                // `a**` is no pattern of a topic: none has `*` in its name.
                assert_eq!(grant.permit(action, tenant, Some(topic)).is_ok(), listed && covered);
            }
            assert_eq!(grant.permit(action, tenant, None).is_ok(), listed);
        }
    }
}

/// A set of keys: whatever it is, it does not believe a token of a key that it does not hold.
fn keys(json: &[u8]) {
    if let (Ok(keys), Some(known)) = (TokenKeys::parse(json), known()) {
        let holds = keys.all().iter().any(|key| known.all().contains(key));
        assert!(holds || keys.claims(SIGNED.as_bytes()).is_err());
    }
}
