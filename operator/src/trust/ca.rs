//! The certificate authority and the leaves that it issues: Ed25519, identity in the URI SAN.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::Ed25519KeyPair;
use overlay_core::identity::SpiffeId;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::{Pem, parse_x509_pem};
use zeroize::Zeroizing;

use super::{CA_LIFETIME, RequestedKey, TrustError};

/// How far a certificate's validity reaches back, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(60);
/// The subject of a certificate authority.
const CA_NAME: &str = "overlay mesh CA";

/// A certificate authority.
pub struct Ca {
    cert_pem: String,
    key: Zeroizing<KeyPair>,
}

/// A certificate authority's certificate and key, to be kept.
pub struct CaPem {
    /// The certificate.
    pub cert: String,
    /// The private key, PKCS #8.
    pub key: Zeroizing<String>,
}

/// A leaf certificate with its key.
pub struct Leaf {
    /// The certificate.
    pub cert_pem: String,
    /// The private key, PKCS #8.
    pub key_pem: Zeroizing<String>,
    /// When it expires.
    pub not_after: SystemTime,
}

/// A leaf certificate for a key that somebody else holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafCertificate {
    /// The certificate.
    pub cert_pem: String,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it expires.
    pub not_after: SystemTime,
}

/// What a leaf certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafInfo {
    /// Its URI SAN, if it is an identity.
    pub identity: Option<SpiffeId>,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it expires.
    pub not_after: SystemTime,
}

impl Ca {
    /// A new authority, valid from `now`.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn generate(now: SystemTime) -> Result<Self, TrustError> {
        let key = new_key("generating the CA's key")?;
        let mut params = CertificateParams::default();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + CA_LIFETIME).into();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, CA_NAME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert = params.self_signed(&*key).map_err(failed("signing the CA's certificate"))?;
        Ok(Self { cert_pem: cert.pem(), key })
    }

    /// The authority that was kept.
    ///
    /// # Errors
    /// One of them cannot be parsed, or they do not belong together.
    pub fn from_pem(cert: &str, key: &str) -> Result<Self, TrustError> {
        let key = Zeroizing::new(
            KeyPair::from_pkcs8_pem_and_sign_algo(key, &PKCS_ED25519).map_err(failed("reading the CA's key"))?,
        );
        let block = pem(cert)?;
        let parsed = x509(&block)?;
        if !parsed.is_ca() {
            return Err(TrustError::Parse("the CA's certificate is not one of an authority"));
        }
        if *parsed.public_key().subject_public_key.data != *key.public_key_raw() {
            return Err(TrustError::Parse("the CA's certificate and key do not belong together"));
        }
        Ok(Self { cert_pem: cert.to_owned(), key })
    }

    /// What [`Self::from_pem`] reads.
    #[must_use]
    pub fn to_pem(&self) -> CaPem {
        CaPem { cert: self.cert_pem.clone(), key: Zeroizing::new(self.key.serialize_pem()) }
    }

    /// The certificate, which daemons accept others by.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// A new key and a certificate for it, valid from `now` for `lifetime`.
    ///
    /// # Errors
    /// The system gives no randomness, or the authority's certificate is damaged.
    pub fn issue_leaf(&self, id: &SpiffeId, now: SystemTime, lifetime: Duration) -> Result<Leaf, TrustError> {
        let key = new_key("generating a leaf's key")?;
        let not_after = whole_seconds(now + lifetime);
        let cert_pem = self.sign(&*key, id, now - BACKDATE, not_after)?;
        Ok(Leaf { cert_pem, key_pem: Zeroizing::new(key.serialize_pem()), not_after })
    }

    /// A certificate for a key that its holder keeps. From its beginning, which lies a little
    /// before `now`, to its end it spans `lifetime` and no more.
    ///
    /// # Errors
    /// The authority's certificate is damaged.
    pub fn issue_for(
        &self,
        key: &RequestedKey,
        id: &SpiffeId,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<LeafCertificate, TrustError> {
        let not_before = whole_seconds(now - BACKDATE);
        let not_after = whole_seconds(not_before + lifetime);
        let cert_pem = self.sign(&key.0, id, not_before, not_after)?;
        Ok(LeafCertificate { cert_pem, not_before, not_after })
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        id: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<String, TrustError> {
        const WHAT: &str = "issuing a leaf certificate";
        let mut params = CertificateParams::default();
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(id.as_str()).map_err(failed(WHAT))?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_pem(&self.cert_pem, &*self.key).map_err(failed(WHAT))?;
        Ok(params.signed_by(key, &issuer).map_err(failed(WHAT))?.pem())
    }

    /// Whether this authority signed the certificate.
    #[must_use]
    pub fn issued(&self, cert_pem: &str) -> bool {
        let (Ok(ca), Ok(leaf)) = (pem(&self.cert_pem), pem(cert_pem)) else { return false };
        let (Ok(ca), Ok(leaf)) = (x509(&ca), x509(&leaf)) else { return false };
        leaf.verify_signature(Some(ca.public_key())).is_ok()
    }
}

impl LeafInfo {
    /// Reads a certificate, whoever issued it.
    ///
    /// # Errors
    /// It cannot be parsed.
    pub fn read(cert_pem: &str) -> Result<Self, TrustError> {
        let block = pem(cert_pem)?;
        let cert = x509(&block)?;
        let names = cert.subject_alternative_name().ok().flatten().map(|ext| &ext.value.general_names);
        let identity = match names.map(Vec::as_slice) {
            Some([GeneralName::URI(uri)]) => uri.parse().ok(),
            _ => None,
        };
        let at = |t: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(t).unwrap_or(0));
        let validity = cert.validity();
        Ok(Self {
            identity,
            not_before: at(validity.not_before.timestamp()),
            not_after: at(validity.not_after.timestamp()),
        })
    }
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}

impl fmt::Debug for CaPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaPem").field("cert", &self.cert).finish_non_exhaustive()
    }
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf")
            .field("cert_pem", &self.cert_pem)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// In the first version of PKCS #8, which every TLS library reads: OpenSSL does not know the
/// second, in which rcgen would write it.
fn new_key(what: &'static str) -> Result<Zeroizing<KeyPair>, TrustError> {
    let random = |_| failed(what)(rcgen::Error::RingUnspecified);
    let key = Ed25519KeyPair::generate().and_then(|key| key.to_pkcs8v1()).map_err(random)?;
    KeyPair::try_from(key.as_ref()).map(Zeroizing::new).map_err(failed(what))
}

fn failed(what: &'static str) -> impl Fn(rcgen::Error) -> TrustError {
    move |source| TrustError::Certificate { what, source }
}

fn pem(text: &str) -> Result<Pem, TrustError> {
    match parse_x509_pem(text.as_bytes()) {
        Ok((_, block)) if block.label == "CERTIFICATE" => Ok(block),
        _ => Err(TrustError::Parse("not a certificate in PEM")),
    }
}

fn x509(block: &Pem) -> Result<X509Certificate<'_>, TrustError> {
    block.parse_x509().map_err(|_| TrustError::Parse("the certificate cannot be parsed"))
}

/// A certificate's times have no fractions.
fn whole_seconds(at: SystemTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}
