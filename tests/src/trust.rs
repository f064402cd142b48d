//! An installation's trust for daemons that a test starts itself: a CA, the leaves that it
//! issues, and a token root. It also signs what an honest one never would: any claims, any
//! certificate. Independent of the operator's, so that one mistake is not made twice.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use aws_lc_rs::signature::Ed25519KeyPair;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use overlay_core::grant::{Action, Claims};
use overlay_core::identity::TenantId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ED25519, PublicKeyData, SanType, SigningKey,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde_json::{Value, json};

/// The identity of the daemons under test, and the audience of their tokens.
pub const NODE: &str = "spiffe://overlay.test/ns/test/overlaynode/target";
/// How long certificates and tokens are valid.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The subject of the CA: an attacker may name its own like it.
pub const CA_NAME: &str = "overlay test CA";

/// A CA and a token root.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: CertificateDer<'static>,
    ca_pem: String,
    token_key: KeyPair,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new() -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let params = ca_params();
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            ca: certificate.der().clone(),
            ca_pem: certificate.pem(),
            issuer: Issuer::new(params, key),
            token_key: KeyPair::generate_for(&PKCS_ED25519)?,
        })
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca_der(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// Signs a certificate for any key.
    ///
    /// # Errors
    /// The parameters cannot be encoded.
    pub fn issue(&self, params: &CertificateParams, key: &impl PublicKeyData) -> Result<rcgen::Certificate> {
        Ok(params.signed_by(key, &self.issuer)?)
    }

    /// A leaf and its private key, both PEM.
    ///
    /// # Errors
    /// The id is no URI.
    pub fn leaf_pem(&self, id: &str) -> Result<(String, String)> {
        // What OpenSSL reads too: the first version of PKCS #8.
        let key = Ed25519KeyPair::generate().and_then(|key| key.to_pkcs8v1()).context("generating a key")?;
        let key = KeyPair::try_from(key.as_ref())?;
        Ok((self.issue(&leaf_params(id)?, &key)?.pem(), key.serialize_pem()))
    }

    /// A leaf with its private key, as a client shows it.
    ///
    /// # Errors
    /// The id is no URI.
    pub fn leaf(&self, id: &str) -> Result<Arc<CertifiedKey>> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let certificate = self.issue(&leaf_params(id)?, &key)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Arc::new(CertifiedKey::new(vec![certificate.der().clone()], any_supported_type(&key)?)))
    }

    /// The public half of the token root, as daemons read it.
    #[must_use]
    pub fn jwks(&self) -> String {
        let x = URL_SAFE_NO_PAD.encode(self.token_key.public_key_raw());
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": self.kid(), "x": x}]})
            .to_string()
    }

    /// The key id that a token's header names (`PROTOCOL.md`, Tokens).
    #[must_use]
    pub fn kid(&self) -> String {
        blake3::hash(self.token_key.public_key_raw()).to_hex()[..16].to_owned()
    }

    /// A token that says `claims`.
    ///
    /// # Errors
    /// The claims cannot be encoded.
    pub fn token(&self, claims: &Claims) -> Result<Bytes> {
        let header = json!({"alg": "EdDSA", "typ": "JWT", "kid": self.kid()});
        self.sign(&header, &serde_json::to_value(claims)?)
    }

    /// A token with any header and any claims, signed by the root.
    ///
    /// # Errors
    /// The key does not sign.
    pub fn sign(&self, header: &Value, claims: &Value) -> Result<Bytes> {
        self.sign_text(&header.to_string(), &claims.to_string())
    }

    /// A token of any two texts, JSON or not, signed by the root.
    ///
    /// # Errors
    /// The key does not sign.
    pub fn sign_text(&self, header: &str, claims: &str) -> Result<Bytes> {
        let text = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = URL_SAFE_NO_PAD.encode(self.token_key.sign(text.as_bytes())?);
        Ok(Bytes::from(format!("{text}.{signature}")))
    }

    /// What allows `sub` everything that a client may do at [`NODE`].
    ///
    /// # Errors
    /// None in practice: [`NODE`] is an identity.
    pub fn claims(sub: &str) -> Result<Claims> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        Ok(Claims {
            aud: NODE.parse()?,
            sub: sub.to_owned(),
            tenants: vec![TenantId(0)],
            topics: vec!["*".to_owned()],
            actions: vec![Action::Publish, Action::Subscribe, Action::Admin],
            nbf: now,
            exp: now + LIFETIME.as_secs(),
        })
    }
}

/// What a CA's own certificate says.
#[must_use]
pub fn ca_params() -> CertificateParams {
    let mut params = within_lifetime(CertificateParams::default());
    params.distinguished_name.push(DnType::CommonName, CA_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

/// What a leaf says.
///
/// # Errors
/// The id is no URI.
pub fn leaf_params(id: &str) -> Result<CertificateParams> {
    let mut params = within_lifetime(CertificateParams::default());
    params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    Ok(params)
}

fn within_lifetime(mut params: CertificateParams) -> CertificateParams {
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(60)).into();
    params.not_after = (now + LIFETIME).into();
    params.distinguished_name = DistinguishedName::new();
    params
}
