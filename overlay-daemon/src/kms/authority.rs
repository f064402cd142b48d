//! For tests: an authority that issues leaves, a root that mints tokens, and the files of a
//! daemon that believes both. Real key material, made anew each time.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey};
use overlay_core::config::{KeyExchange, Tls, Token};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, PKCS_ED25519, SanType,
    date_time_ymd,
};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const NODE: &str = "spiffe://overlay.local/ns/a/overlaynode/mesh";
/// Some time in 2026, in milliseconds: certificates and tokens here are valid at it.
pub(crate) const NOW_MS: u64 = 1_790_000_000_000;

/// A certificate authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

/// What a leaf may deviate in.
pub(crate) struct LeafOptions<'a> {
    pub(crate) uris: &'a [&'a str],
    pub(crate) until_year: i32,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Default for LeafOptions<'_> {
    fn default() -> Self {
        use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        Self { uris: &[NODE], until_year: 2400, usages: vec![ServerAuth, ClientAuth] }
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority");
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A leaf and its key, both PEM.
    pub(crate) fn leaf(&self, options: LeafOptions<'_>) -> (String, String) {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = options.uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.not_after = date_time_ymd(options.until_year, 1, 1);
        params.extended_key_usages = options.usages;
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// A root of capability tokens.
pub(crate) struct TokenRoot {
    pub(crate) key: KeyPair,
    pub(crate) kid: String,
}

impl TokenRoot {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let kid = blake3::hash(key.public_key_raw()).to_hex()[..16].to_owned();
        Self { key, kid }
    }

    pub(crate) fn jwk(&self) -> Value {
        let x = base64url(self.key.public_key_raw());
        json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": self.kid, "x": x})
    }

    /// A token with this header and these claims, signed whatever they say.
    pub(crate) fn sign(&self, header: &str, claims: &str) -> String {
        let message = format!("{}.{}", base64url(header.as_bytes()), base64url(claims.as_bytes()));
        let key = EncodingKey::from_ed_der(&self.key.serialize_der());
        let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::EdDSA).unwrap();
        format!("{message}.{signature}")
    }

    pub(crate) fn header(&self) -> Value {
        json!({"alg": "EdDSA", "typ": "JWT", "kid": self.kid})
    }

    /// A proper token.
    pub(crate) fn mint(&self, claims: &Value) -> String {
        self.sign(&self.header().to_string(), &claims.to_string())
    }
}

/// The claims of the user of a daemon's Unix socket.
pub(crate) fn local_claims() -> Value {
    let now = NOW_MS / 1_000;
    json!({"aud": NODE, "sub": "local", "tenants": ["0"], "topics": ["*"], "actions": ["publish", "subscribe", "admin"],
           "nbf": now - 60, "exp": now + 3_600})
}

pub(crate) fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A folder laid out as the kubelet lays out a volume: names that point through a link, which
/// is swapped as a whole.
pub(crate) struct Volume {
    folder: TempDir,
    version: u32,
}

pub(crate) const NAMES: [&str; 5] = ["tls.crt", "tls.key", "ca.crt", "token-keys.json", "peer"];

impl Volume {
    pub(crate) fn new(files: &[String; 5]) -> Self {
        let mut volume = Self { folder: tempfile::tempdir().unwrap(), version: 0 };
        for name in NAMES {
            std::os::unix::fs::symlink(format!("..data/{name}"), volume.path(name)).unwrap();
        }
        volume.swap(files);
        volume
    }

    /// The files of a daemon that `authority` and `root` made: a leaf of `options`.
    pub(crate) fn files(authority: &Authority, root: &TokenRoot, options: LeafOptions<'_>) -> [String; 5] {
        let (certificate, key) = authority.leaf(options);
        let jwks = json!({"keys": [root.jwk()]}).to_string();
        [certificate, key, authority.pem.clone(), jwks, root.mint(&local_claims()) + "\n"]
    }

    /// Everything at once, as the kubelet does it.
    pub(crate) fn swap(&mut self, files: &[String; 5]) {
        self.version += 1;
        let name = format!("..version{}", self.version);
        fs::create_dir(self.path(&name)).unwrap();
        for (file, text) in NAMES.iter().zip(files) {
            fs::write(self.path(&name).join(file), text).unwrap();
        }
        std::os::unix::fs::symlink(&name, self.path("..data_tmp")).unwrap();
        fs::rename(self.path("..data_tmp"), self.path("..data")).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn config(&self, key_exchange: KeyExchange) -> (Tls, Token) {
        let tls =
            Tls { certificate: self.path("tls.crt"), key: self.path("tls.key"), ca: self.path("ca.crt"), key_exchange };
        (tls, Token { keys: self.path("token-keys.json"), file: self.path("peer") })
    }
}
