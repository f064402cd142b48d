use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use overlay_core::grant::{Claims, Grant, Holder, SignedBy, TokenKey};
use overlay_core::identity::{SpiffeId, TenantId};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;

use super::*;

const ID: &str = "spiffe://overlay.local/ns/default/overlaynode/mesh";
const HOUR: Duration = Duration::from_secs(3600);

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000) + Duration::from_millis(700)
}

fn id() -> SpiffeId {
    ID.parse().unwrap()
}

fn leaf(ca: &Ca) -> Leaf {
    ca.issue_leaf(&id(), now(), LEAF_LIFETIME).unwrap()
}

#[test]
fn a_leaf_says_who_and_how_long_and_chains_to_its_authority() {
    let ca = Ca::generate(now()).unwrap();
    let leaf = leaf(&ca);
    let (_, block) = parse_x509_pem(leaf.cert_pem.as_bytes()).unwrap();
    let cert = block.parse_x509().unwrap();

    let names = cert.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::URI(ID)]);
    let usage = cert.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    assert!(!cert.is_ca());
    assert_eq!(cert.signature_algorithm.algorithm.to_id_string(), "1.3.101.112", "Ed25519");
    assert_eq!(cert.public_key().algorithm.algorithm.to_id_string(), "1.3.101.112", "Ed25519");
    assert_eq!(cert.validity().not_after.timestamp(), 1_800_086_400);
    assert_eq!(leaf.not_after, UNIX_EPOCH + Duration::from_secs(1_800_086_400));
    assert!(cert.validity().not_before.timestamp() <= 1_800_000_000);

    let (_, block) = parse_x509_pem(ca.cert_pem().as_bytes()).unwrap();
    let authority = block.parse_x509().unwrap();
    assert!(authority.is_ca());
    assert_eq!(cert.issuer(), authority.subject());
    assert!(cert.verify_signature(Some(authority.public_key())).is_ok());
    assert!(ca.issued(&leaf.cert_pem));
    assert!(!Ca::generate(now()).unwrap().issued(&leaf.cert_pem), "another authority");
    assert!(!ca.issued("rubbish"));
}

#[test]
fn a_certificate_reads_back() {
    let ca = Ca::generate(now()).unwrap();
    let leaf = leaf(&ca);
    let info = LeafInfo::read(&leaf.cert_pem).unwrap();
    assert_eq!(info.identity, Some(id()));
    assert_eq!(info.not_after, leaf.not_after);
    assert_eq!(LeafInfo::read(ca.cert_pem()).unwrap().identity, None);
    assert!(LeafInfo::read("-----BEGIN CERTIFICATE-----").is_err());
}

#[test]
fn an_authority_is_kept_and_issues_on() {
    let ca = Ca::generate(now()).unwrap();
    let kept = ca.to_pem();
    let again = Ca::from_pem(&kept.cert, &kept.key).unwrap();
    assert!(ca.issued(&leaf(&again).cert_pem));

    let other = Ca::generate(now()).unwrap().to_pem();
    let leaf = leaf(&ca);
    for (case, cert, key) in [
        ("another's key", &kept.cert, &other.key),
        ("no authority", &leaf.cert_pem, &leaf.key_pem),
        ("no key", &kept.cert, &other.cert.clone().into()),
    ] {
        assert!(Ca::from_pem(cert, key).is_err(), "{case}");
    }
}

#[test]
fn a_token_is_verified_with_the_key_set() {
    let root = TokenRoot::generate().unwrap();
    let claims = peer_claims(&id(), &[TenantId(0), TenantId(7)], now(), TOKEN_LIFETIME);
    let token = root.mint(&claims).unwrap();

    let header = decode_header(token.as_str()).unwrap();
    assert_eq!((header.alg, header.typ.as_deref()), (Algorithm::EdDSA, Some("JWT")));
    let kid = header.kid.unwrap();
    assert_eq!((kid.as_str(), kid.len()), (root.kid(), 16));

    let keys: serde_json::Value = serde_json::from_str(&root.jwks()).unwrap();
    let key = &keys["keys"][0];
    assert_eq!([&key["kty"], &key["crv"], &key["alg"], &key["use"]], ["OKP", "Ed25519", "EdDSA", "sig"]);
    assert_eq!(key.as_object().unwrap().len(), 6, "no private member: {keys}");

    let set: JwkSet = serde_json::from_str(&root.jwks()).unwrap();
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.validate_exp = false;
    validation.validate_aud = false;
    let public = DecodingKey::from_jwk(set.find(&kid).unwrap()).unwrap();
    let read: Claims = decode(token.as_str(), &public, &validation).unwrap().claims;
    assert_eq!(read, claims);
    assert!(token.len() <= 2048, "{}", token.len());

    assert_eq!(root.read(&token).unwrap(), claims);
    assert!(TokenRoot::generate().unwrap().read(&token).is_err(), "another root");
    let again = TokenRoot::from_pem(&root.to_pem()).unwrap();
    assert_eq!((again.jwks(), again.read(&token).unwrap()), (root.jwks(), claims));
    assert!(TokenRoot::from_pem("rubbish").is_err());
}

/// P-4: what the operator mints is what daemons let in, for as long as it says.
#[test]
fn tokens_are_granted_to_whom_they_are_for() {
    let ms = u64::try_from(now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
    let peer = peer_claims(&id(), &[TenantId(0)], now(), HOUR);
    let local = local_claims(&id(), &[TenantId(0)], now(), HOUR);
    let certificate = Holder::Certificate(id());
    let by = SignedBy { key: TokenKey([0; 32]), generation: 1 };
    for (case, claims, holder, at, granted) in [
        ("peer", &peer, &certificate, ms, true),
        ("peer, later", &peer, &certificate, ms + 3_600_000, false),
        ("peer on the socket", &peer, &Holder::Local, ms, false),
        ("local", &local, &Holder::Local, ms, true),
        ("local over TLS", &local, &certificate, ms, false),
    ] {
        assert_eq!(Grant::new(claims.clone(), by, &id(), holder, at).is_ok(), granted, "{case}");
    }
}

#[test]
fn renewal_is_due_after_a_third() {
    assert_eq!(renew_at(now(), now() + 24 * HOUR), now() + 8 * HOUR);
    assert_eq!(renew_at(now(), now() - HOUR), now());
}

/// The canary: whatever is printed of these, no line of a private key is in it.
#[test]
fn no_private_key_is_ever_printed() {
    let ca = Ca::generate(now()).unwrap();
    let (kept, leaf) = (ca.to_pem(), leaf(&ca));
    let root = TokenRoot::generate().unwrap();
    let printed = format!("{ca:?}{ca:#?}{kept:?}{leaf:?}{leaf:#?}{root:?}");
    assert!(!printed.contains("PRIVATE"));
    for key in [&kept.key, &leaf.key_pem, &root.to_pem()] {
        let body: Vec<&str> = key.lines().filter(|line| !line.starts_with("-----")).collect();
        assert!(!body.is_empty());
        assert!(body.iter().all(|line| !printed.contains(line)));
    }
    let bad = Ca::from_pem(&kept.cert, &kept.key[..kept.key.len() / 2]).unwrap_err();
    assert!(!format!("{bad} {bad:?}").contains(kept.key.lines().nth(1).unwrap()));
}

/// A private key is of the first version of PKCS #8, which other TLS libraries read too.
#[test]
fn a_leafs_key_is_one_that_others_read() {
    let leaf = leaf(&Ca::generate(now()).unwrap());
    let (_, block) = parse_x509_pem(leaf.key_pem.as_bytes()).unwrap();
    assert_eq!(block.label, "PRIVATE KEY");
    // PrivateKeyInfo (RFC 5208): version 0, Ed25519, 32 bytes of seed, and nothing else.
    assert_eq!(block.contents.len(), 48);
    assert_eq!(block.contents[..16], *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20");
}

/// A request as the kubelet makes it: a key, its signature, nothing else.
fn request_of(key: &rcgen::KeyPair) -> Vec<u8> {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.serialize_request(key).unwrap().der().to_vec()
}

/// The certificate is for the key that was asked for, and spans no more than was asked.
#[test]
fn a_leaf_for_a_key_that_another_holds() {
    let ca = Ca::generate(now()).unwrap();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let requested = RequestedKey::read(&request_of(&key)).unwrap();
    let pod = id().pod("mesh-0").unwrap();
    let leaf = ca.issue_for(&requested, &pod, now(), HOUR).unwrap();
    assert_eq!(leaf.not_after.duration_since(leaf.not_before).unwrap(), HOUR);
    assert!(leaf.not_before <= now() && now() < leaf.not_after);

    let info = LeafInfo::read(&leaf.cert_pem).unwrap();
    assert_eq!((info.identity, info.not_before, info.not_after), (Some(pod), leaf.not_before, leaf.not_after));
    let (_, block) = parse_x509_pem(leaf.cert_pem.as_bytes()).unwrap();
    let cert = block.parse_x509().unwrap();
    assert_eq!(*cert.public_key().subject_public_key.data, *key.public_key_raw());
    assert_eq!(cert.subject().iter().count(), 0);
    let usage = cert.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !cert.is_ca() && ca.issued(&leaf.cert_pem));
}
