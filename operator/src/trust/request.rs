//! The key that somebody asks a certificate for: a PKCS #10 request as the kubelet makes it.
//! Decides whether the key is of the sort that is certified and whether who asks holds it;
//! every other word of the request is ignored.

use std::fmt;

use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

/// Ed25519 (RFC 8410, section 3).
const ED25519: &str = "1.3.101.112";

/// A public key whose private half the requester has shown to hold.
pub struct RequestedKey(pub(super) SubjectPublicKeyInfo);

/// Why a request names no key that can be certified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Not DER, or not a request.
    #[error("the request is not a PKCS #10 request")]
    Unreadable,
    /// Another algorithm.
    #[error("the key must be Ed25519: ask with keyType ED25519")]
    KeyType,
    /// Who asks does not hold the private key.
    #[error("the request is not signed with the key that it names")]
    Unproven,
}

impl RequestedKey {
    /// Reads the key of a request, DER.
    ///
    /// # Errors
    /// As [`RequestError`] has them.
    pub fn read(der: &[u8]) -> Result<Self, RequestError> {
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(|_| RequestError::Unreadable)?;
        if !rest.is_empty() {
            return Err(RequestError::Unreadable);
        }
        let key = &request.certification_request_info.subject_pki;
        if key.algorithm.algorithm.to_id_string() != ED25519 {
            return Err(RequestError::KeyType);
        }
        request.verify_signature().map_err(|_| RequestError::Unproven)?;
        SubjectPublicKeyInfo::from_der(key.raw).map(Self).map_err(|_| RequestError::Unreadable)
    }
}

impl fmt::Debug for RequestedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RequestedKey")
    }
}
