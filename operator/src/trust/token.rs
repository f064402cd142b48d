//! The token root and the capability tokens that it mints: EdDSA over the closed set of
//! claims that [`overlay_core::grant`] reads.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use overlay_core::grant::{Action, Claims, LOCAL_HOLDER};
use overlay_core::identity::{SpiffeId, TenantId};
use rcgen::{KeyPair, PKCS_ED25519};
use zeroize::Zeroizing;

use super::TrustError;

/// The pattern of a token that every topic matches.
pub const EVERY_TOPIC: &str = "*";
/// Hexadecimal digits of a key id.
const KEY_ID: usize = 16;

/// The key that tokens are signed with.
pub struct TokenRoot {
    key: Zeroizing<KeyPair>,
    kid: String,
    jwks: String,
}

impl TokenRoot {
    /// A new root.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn generate() -> Result<Self, TrustError> {
        let what = "generating the token root's key";
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(|source| TrustError::Certificate { what, source })?;
        Self::new(key)
    }

    /// The root that was kept.
    ///
    /// # Errors
    /// It cannot be parsed, or it is not Ed25519.
    pub fn from_pem(key: &str) -> Result<Self, TrustError> {
        let what = "reading the token root's key";
        let key = KeyPair::from_pkcs8_pem_and_sign_algo(key, &PKCS_ED25519)
            .map_err(|source| TrustError::Certificate { what, source })?;
        Self::new(key)
    }

    fn new(key: KeyPair) -> Result<Self, TrustError> {
        let key = Zeroizing::new(key);
        let mut kid = blake3::hash(key.public_key_raw()).to_hex().to_string();
        kid.truncate(KEY_ID);
        let mut public = Jwk::from_decoding_key(&decoding_key(&key), Some(Algorithm::EdDSA))?;
        public.common.public_key_use = Some(PublicKeyUse::Signature);
        public.common.key_id = Some(kid.clone());
        let jwks = serde_json::to_string(&JwkSet { keys: vec![public] }).map_err(jsonwebtoken::errors::Error::from)?;
        Ok(Self { key, kid, jwks })
    }

    /// What [`Self::from_pem`] reads: the private key, PKCS #8.
    #[must_use]
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.key.serialize_pem())
    }

    /// The id of the key, which a token's header names.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The public half, as daemons read it: a JSON Web Key Set.
    #[must_use]
    pub fn jwks(&self) -> String {
        self.jwks.clone()
    }

    /// A token that says `claims`.
    ///
    /// # Errors
    /// The library refuses the key.
    pub fn mint(&self, claims: &Claims) -> Result<Zeroizing<String>, TrustError> {
        let header = Header { kid: Some(self.kid.clone()), ..Header::new(Algorithm::EdDSA) };
        let key = EncodingKey::from_ed_der(self.key.serialized_der());
        Ok(Zeroizing::new(jsonwebtoken::encode(&header, claims, &key)?))
    }

    /// The claims of a token that this root minted, whatever the time is.
    ///
    /// # Errors
    /// It is not a token, or another root minted it.
    pub fn read(&self, token: &str) -> Result<Claims, TrustError> {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        Ok(jsonwebtoken::decode::<Claims>(token.trim(), &decoding_key(&self.key), &validation)?.claims)
    }
}

fn decoding_key(key: &KeyPair) -> DecodingKey {
    DecodingKey::from_ed_der(key.public_key_raw())
}

impl fmt::Debug for TokenRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenRoot").field("kid", &self.kid).finish_non_exhaustive()
    }
}

/// What a daemon may do at its peers: gossip every topic of its tenants.
#[must_use]
pub fn peer_claims(id: &SpiffeId, tenants: &[TenantId], now: SystemTime, lifetime: Duration) -> Claims {
    claims(id, id.to_string(), tenants, vec![Action::Publish], now, lifetime)
}

/// What the user of a daemon's socket may do: everything there is.
#[must_use]
pub fn local_claims(id: &SpiffeId, tenants: &[TenantId], now: SystemTime, lifetime: Duration) -> Claims {
    let actions = vec![Action::Publish, Action::Subscribe, Action::Admin];
    claims(id, LOCAL_HOLDER.to_owned(), tenants, actions, now, lifetime)
}

fn claims(
    id: &SpiffeId,
    sub: String,
    tenants: &[TenantId],
    actions: Vec<Action>,
    now: SystemTime,
    lifetime: Duration,
) -> Claims {
    let seconds = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Claims {
        aud: id.clone(),
        sub,
        tenants: tenants.to_vec(),
        topics: vec![EVERY_TOPIC.to_owned()],
        actions,
        nbf: seconds(now),
        exp: seconds(now + lifetime),
    }
}
