//! What a certificate says of its holder: one identity, and until when. Judges no signature.

use overlay_core::identity::SpiffeId;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// A leaf certificate's identity and end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its only URI SAN.
    pub identity: SpiffeId,
    /// When it ceases to be valid, milliseconds since 1970.
    pub not_after_ms: u64,
}

/// Why a certificate names nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No certificate, or not one that can be read.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// No URI SAN, or several: an identity must be the only one.
    #[error("the certificate has {0} URI SANs, must have exactly one")]
    Count(usize),
    /// The URI SAN is not an identity.
    #[error(
        "the certificate's URI SAN is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/overlaynode/NAME[/pod/POD] or …/client/NAME"
    )]
    NotSpiffe,
}

impl Leaf {
    /// Reads the first certificate of a chain.
    ///
    /// # Errors
    /// It is missing or malformed, or does not have exactly one identity.
    pub fn of_chain(chain: Option<&[CertificateDer<'_>]>) -> Result<Self, IdentityError> {
        let der = chain.and_then(<[_]>::first).ok_or(IdentityError::Unreadable)?;
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| IdentityError::Unreadable)?;
        if !rest.is_empty() {
            return Err(IdentityError::Unreadable);
        }
        let names = certificate.subject_alternative_name().map_err(|_| IdentityError::Unreadable)?;
        let uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let uris: Vec<&str> = uris.collect();
        let [uri] = uris[..] else { return Err(IdentityError::Count(uris.len())) };
        let identity = uri.parse().map_err(|_| IdentityError::NotSpiffe)?;
        let seconds = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self { identity, not_after_ms: seconds.saturating_mul(1_000) })
    }
}
