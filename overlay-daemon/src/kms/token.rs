//! Capability tokens: whether one was signed by a key that is believed. What it then allows is
//! `overlay_core::grant`'s to say. Nothing here can mint.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::Arc;

use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation, decode, decode_header};
use overlay_core::Millis;
use overlay_core::frame::MAX_CAP;
use overlay_core::grant::{Claims, Grant, Holder, SignedBy, TokenKey};
use overlay_core::node::Clock as CoreClock;
use overlay_core::status::{Refusal, Status};
use overlay_shared::Remembered;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::watch;

use super::KeySet;

/// Keys that the set may hold.
pub const MAX_TOKEN_KEYS: usize = 64;
/// Tokens whose signature is remembered: past it, the one that was shown least recently is
/// verified anew when it comes back.
const REMEMBERED_TOKENS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1_023);
/// Bytes of the longest token that is remembered; longer ones, of many topics, are verified each time.
/// By estimate lists take ten times in memory what they do in a token, so all that is remembered
/// takes some 10 MiB at the most, which no budget counts, and mostly less than one.
const REMEMBERED_BYTES: usize = 1_024;
/// Milliseconds after it was last shown for which one is remembered, until the next look at the files.
const REMEMBERED_MS: u64 = 20_000;

/// The public keys whose tokens are believed, by key id.
pub struct TokenKeys(HashMap<String, (TokenKey, DecodingKey)>);

/// Claims, and the key that signed them.
type Signed = (Arc<Claims>, TokenKey);

/// A JSON Web Key Set (RFC 7517), as much of it as is used.
#[derive(Deserialize)]
struct Jwks {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    crv: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    kid: Option<String>,
    x: Option<String>,
    /// The private half: a daemon must not hold what can mint.
    d: Option<IgnoredAny>,
}

impl TokenKeys {
    /// Reads a key set; only Ed25519 keys for signatures have a place in it.
    ///
    /// # Errors
    /// What is wrong with it, without a word of it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        // The position, not the parser's words: those could quote the file.
        let set: Jwks = serde_json::from_slice(text)
            .map_err(|e| format!("is not a JSON Web Key Set (line {}, column {})", e.line(), e.column()))?;
        if set.keys.is_empty() || set.keys.len() > MAX_TOKEN_KEYS {
            return Err(format!("holds {} keys, must hold 1 to {MAX_TOKEN_KEYS}", set.keys.len()));
        }
        let mut keys = HashMap::with_capacity(set.keys.len());
        for (index, jwk) in set.keys.into_iter().enumerate() {
            let (kid, key) = jwk.decode().map_err(|message| format!("key {}: {message}", index + 1))?;
            if keys.insert(kid, key).is_some() {
                return Err(format!("key {}: \"kid\" is another key's too", index + 1));
            }
        }
        Ok(Self(keys))
    }

    /// Every key.
    #[must_use]
    pub fn all(&self) -> BTreeSet<TokenKey> {
        self.0.values().map(|(key, _)| *key).collect()
    }

    /// The claims of `token` if one of these keys signed it.
    ///
    /// # Errors
    /// 401 with the first thing that is wrong.
    pub fn claims(&self, token: &[u8]) -> Result<Signed, Refusal> {
        let no = |message| Refusal::new(Status::Unauthorized, message);
        let header = decode_header(token).map_err(|_| no("the token cannot be read"))?;
        if header.alg != Algorithm::EdDSA {
            return Err(no("the token is not signed with EdDSA"));
        }
        if !plain(&header) {
            return Err(no("the token's header has members that are not understood"));
        }
        let key = header.kid.and_then(|kid| self.0.get(&kid));
        let (id, key) = key.ok_or_else(|| no("the token's key is not known"))?;
        let mut validation = Validation::new(Algorithm::EdDSA);
        // Audience, holder and time are the grant's, by the daemon's own clock.
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_aud = false;
        let token = decode::<Claims>(token, key, &validation).map_err(|error| {
            use jsonwebtoken::errors::ErrorKind::{Base64, InvalidSignature};
            match error.kind() {
                // The claims are decoded after the signature held, and then they do decode.
                InvalidSignature | Base64(_) => no("the token's signature does not hold"),
                _ => no("the token's claims cannot be read"),
            }
        })?;
        Ok((Arc::new(token.claims), *id))
    }
}

/// Whether a header has `alg`, `typ` and `kid` alone: a key or certificate that a token brings
/// along is never looked at, and what it calls critical is never skipped.
fn plain(header: &Header) -> bool {
    let Header { typ, alg: _, cty, jku, jwk, kid: _, x5u, x5c, x5t, x5t_s256, crit, enc, zip, url, nonce, extras } =
        header;
    let strings = [cty, jku, x5u, x5t, x5t_s256, url, nonce];
    typ.as_deref().is_none_or(|typ| typ == "JWT")
        && strings.iter().all(|member| member.is_none())
        && jwk.is_none()
        && x5c.is_none()
        && crit.is_none()
        && enc.is_none()
        && zip.is_none()
        && extras.inner().is_empty()
}

impl Jwk {
    fn decode(self) -> Result<(String, (TokenKey, DecodingKey)), String> {
        if self.d.is_some() {
            return Err("is a private key; a daemon takes public keys only".into());
        }
        let optional = |member: Option<String>, want: &str| member.is_none_or(|member| member == want);
        let ed25519 = self.kty == "OKP" && self.crv.as_deref() == Some("Ed25519");
        if !ed25519 || !optional(self.alg, "EdDSA") || !optional(self.usage, "sig") {
            return Err("must have kty OKP, crv Ed25519, alg EdDSA and use sig".into());
        }
        let kid = self.kid.filter(|kid| (1..=128).contains(&kid.len()));
        let kid = kid.ok_or_else(|| "\"kid\" must be 1 to 128 bytes".to_owned())?;
        let key = DecodingKey::from_ed_components(self.x.as_deref().unwrap_or_default()).ok();
        let key = key.and_then(|key| Some((TokenKey(key.try_get_as_bytes().ok()?.try_into().ok()?), key)));
        Ok((kid, key.ok_or_else(|| "\"x\" must be 32 bytes in base64url".to_owned())?))
    }
}

/// Verifies tokens by whatever keys are current. Signatures that held are remembered until the
/// keys change, or nobody has shown the token for a while; those that did not cost their sender a
/// verification each time. Clones share what is remembered.
#[derive(Clone)]
pub struct Verifier {
    keys: watch::Receiver<Arc<KeySet>>,
    cache: Remembered<blake3::Hash, Signed>,
}

impl Verifier {
    pub(super) fn new(keys: watch::Receiver<Arc<KeySet>>) -> Self {
        Self { keys, cache: Remembered::new(REMEMBERED_TOKENS) }
    }

    /// Forgets the tokens that nobody showed for a while.
    pub(super) fn forget_unused(&self, now: Millis) {
        self.cache.forget_unused(now.0.saturating_sub(REMEMBERED_MS));
    }

    #[cfg(test)]
    pub(super) fn remembers(&self, cap: &[u8], now: Millis) -> bool {
        self.cache.get(self.keys.borrow().generation(), &blake3::hash(cap), now.0).is_some()
    }

    /// The keys that it follows.
    #[must_use]
    pub fn keys(&self) -> watch::Receiver<Arc<KeySet>> {
        self.keys.clone()
    }

    /// What `cap` grants to `holder` at `time`.
    ///
    /// # Errors
    /// 401: no token, one past its bound, signed by no key that is believed, or with claims
    /// that [`Grant::new`] refuses.
    pub fn verify(&self, cap: &[u8], holder: &Holder, time: CoreClock) -> Result<Grant, Refusal> {
        if cap.is_empty() {
            return Err(Refusal::new(Status::Unauthorized, "START carries no capability token"));
        }
        if cap.len() > MAX_CAP {
            return Err(Refusal::new(Status::Unauthorized, "the token is too long"));
        }
        let keys = Arc::clone(&self.keys.borrow());
        let (claims, key) = self.claims(&keys, cap, time.now)?;
        Grant::new(claims, SignedBy { key, generation: keys.generation() }, keys.audience(), holder, time.unix_ms)
    }

    fn claims(&self, keys: &KeySet, cap: &[u8], now: Millis) -> Result<Signed, Refusal> {
        if cap.len() > REMEMBERED_BYTES {
            return keys.token_keys.claims(cap);
        }
        let id = blake3::hash(cap);
        if let Some(claims) = self.cache.get(keys.generation(), &id, now.0) {
            return Ok(claims);
        }
        let claims = keys.token_keys.claims(cap)?;
        self.cache.put(keys.generation(), id, claims.clone(), now.0);
        Ok(claims)
    }
}
