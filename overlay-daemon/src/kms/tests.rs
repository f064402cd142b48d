//! Which key material is taken, which tokens are believed, and when new keys replace old.

use overlay_core::Millis;
use overlay_core::config::KeyExchange;
use overlay_core::grant::Holder;
use overlay_core::node::Clock as CoreClock;
use overlay_core::status::Status;
use serde_json::{Value, json};

use super::authority::{Authority, LeafOptions, NAMES, NODE, NOW_MS, TokenRoot, Volume, base64url, local_claims};
use super::reload::Reload;
use super::*;

const NOW: CoreClock = CoreClock { now: Millis(0), unix_ms: NOW_MS };

fn load(volume: &Volume) -> Result<Keys, Vec<KmsError>> {
    let (tls, token) = volume.config(KeyExchange::RequireHybrid);
    Keys::load(&tls, &token, NOW_MS)
}

/// Every error, without the folder's name.
fn errors(volume: &Volume) -> Vec<String> {
    let folder = format!("{}/", volume.folder().display());
    load(volume).err().expect("should be refused").iter().map(|e| e.to_string().replace(&folder, "")).collect()
}

/// What is wrong is named by field and file, and never quoted.
#[test]
fn key_material_that_is_refused() {
    let (authority, other, root) = (Authority::new(), Authority::new(), TokenRoot::new());
    let good = Volume::files(&authority, &root, LeafOptions::default());
    let leaf = |options| Volume::files(&authority, &root, options);
    let with = |index: usize, text: &str| {
        let mut files = good.clone();
        files[index] = text.to_owned();
        files
    };
    let jwks = |keys: Value| with(3, &json!({ "keys": keys }).to_string());
    let jwk = |change: Value| {
        let mut jwk = root.jwk();
        jwk.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        jwks(json!([jwk]))
    };
    let twice = [NODE, "spiffe://overlay.local/ns/a/overlaynode/other"];
    let canary = "-----BEGIN PRIVATE KEY-----\nCANARY!\n-----END PRIVATE KEY-----\n";
    let kind = "token.keys: token-keys.json: key 1: must have kty OKP, crv Ed25519, alg EdDSA and use sig";
    let table = [
        (with(0, ""), "tls.certificate: tls.crt: holds no PEM certificate"),
        (
            with(0, &other.leaf(LeafOptions::default()).0),
            "tls.certificate: tls.crt: is signed by no authority in tls.ca",
        ),
        (leaf(LeafOptions { until_year: 2020, ..Default::default() }), "tls.certificate: tls.crt: has expired"),
        (
            leaf(LeafOptions { uris: &[], ..Default::default() }),
            "tls.certificate: tls.crt: the certificate has 0 URI SANs, must have exactly one",
        ),
        (
            leaf(LeafOptions { uris: &twice, ..Default::default() }),
            "tls.certificate: tls.crt: the certificate has 2 URI SANs, must have exactly one",
        ),
        (
            leaf(LeafOptions { uris: &["https://example.org"], ..Default::default() }),
            "tls.certificate: tls.crt: the certificate's URI SAN is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/overlaynode/NAME[/pod/POD] or …/client/NAME",
        ),
        (with(1, &other.leaf(LeafOptions::default()).1), "tls.key: tls.key: is not the private key of tls.certificate"),
        (with(1, "nothing"), "tls.key: tls.key: holds no PEM private key"),
        (with(1, canary), "tls.key: tls.key: is not PEM"),
        (with(2, &good[1]), "tls.ca: ca.crt: holds no PEM certificate"),
        (with(3, "{"), "token.keys: token-keys.json: is not a JSON Web Key Set (line 1, column 1)"),
        (jwks(json!([])), "token.keys: token-keys.json: holds 0 keys, must hold 1 to 64"),
        (jwks(json!([root.jwk(), root.jwk()])), "token.keys: token-keys.json: key 2: \"kid\" is another key's too"),
        (jwk(json!({"kty": "RSA"})), kind),
        (jwk(json!({"alg": "HS256"})), kind),
        (jwk(json!({"x": "AAAA"})), "token.keys: token-keys.json: key 1: \"x\" must be 32 bytes in base64url"),
        (jwk(json!({"kid": null})), "token.keys: token-keys.json: key 1: \"kid\" must be 1 to 128 bytes"),
        (
            jwk(json!({"d": "CANARY"})),
            "token.keys: token-keys.json: key 1: is a private key; a daemon takes public keys only",
        ),
        (with(4, " \n"), "token.file: peer: is empty, must hold a token"),
        (with(4, "CANARY CANARY"), "token.file: peer: does not hold a token (three base64url parts joined by dots)"),
        (with(4, &"a".repeat(2_049)), "token.file: peer: holds 2049 bytes, a token has at most 2048"),
    ];
    for (files, want) in table {
        assert_eq!(errors(&Volume::new(&files)), [want]);
    }
}

#[test]
fn every_file_that_is_missing_is_named_at_once() {
    let volume = Volume::new(&Default::default());
    std::fs::remove_file(volume.path("..data")).unwrap();
    let found = errors(&volume);
    assert_eq!(found.len(), NAMES.len(), "{found:?}");
    assert!(found.iter().zip(NAMES).all(|(error, name)| error.contains(&format!("cannot read {name}: No such file"))));
}

/// Neither keys nor tokens show in what is printed.
#[test]
fn nothing_secret_is_printed() {
    let files = Volume::files(&Authority::new(), &TokenRoot::new(), LeafOptions::default());
    let keys = load(&Volume::new(&files)).unwrap();
    let printed = format!("{:?}", keys.current());
    assert_eq!(printed.matches("spiffe://").count(), 1, "{printed}");
    assert!(printed.len() < 300 && !printed.contains(files[4].trim()), "{printed}");
    assert_eq!(keys.current().peer_token(), files[4].trim().as_bytes());
}

/// P-4, K3, K4, K5: one token off at a time.
#[test]
fn k3_k4_k5_tokens_that_are_refused() {
    let (root, other) = (TokenRoot::new(), TokenRoot::new());
    let files = Volume::files(&Authority::new(), &root, LeafOptions::default());
    let keys = load(&Volume::new(&files)).unwrap();
    let verifier = keys.verifier();
    let verify = |token: &str| {
        let grant = verifier.verify(token.as_bytes(), &Holder::Local, NOW);
        grant.map(|_| "granted").map_err(|refusal| (refusal.status, refusal.message))
    };
    let header = |change: Value| {
        let mut header = root.header();
        header.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        root.sign(&header.to_string(), &local_claims().to_string())
    };
    let claims = |change: Value| {
        let mut claims = local_claims();
        claims.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        root.mint(&claims)
    };
    let raw = |header: &str, claims: &str| root.sign(header, claims);
    let good = root.mint(&local_claims());
    let (message, signature) = good.rsplit_once('.').unwrap();
    let text = local_claims().to_string();
    let doubled = text.replacen('{', "{\"sub\":\"local\",", 1);
    let hs256 = {
        // The public key as an HMAC secret: a key of one algorithm taken for another's.
        let header = json!({"alg": "HS256", "typ": "JWT", "kid": root.kid}).to_string();
        let message = format!("{}.{}", base64url(header.as_bytes()), base64url(text.as_bytes()));
        let key = jsonwebtoken::EncodingKey::from_secret(root.key.public_key_raw());
        let mac = jsonwebtoken::crypto::sign(message.as_bytes(), &key, jsonwebtoken::Algorithm::HS256).unwrap();
        format!("{message}.{mac}")
    };
    let hs256_pem = {
        let header = json!({"alg": "HS256", "typ": "JWT", "kid": root.kid}).to_string();
        let message = format!("{}.{}", base64url(header.as_bytes()), base64url(text.as_bytes()));
        let key = jsonwebtoken::EncodingKey::from_secret(root.key.public_key_pem().as_bytes());
        let mac = jsonwebtoken::crypto::sign(message.as_bytes(), &key, jsonwebtoken::Algorithm::HS256).unwrap();
        format!("{message}.{mac}")
    };
    let impostor = other.sign(&root.header().to_string(), &text);
    let deep = format!("{{\"aud\":{}{}}}", "[".repeat(600), "]".repeat(600));
    let unreadable = "the token cannot be read";
    let members = "the token's header has members that are not understood";
    let unknown = "the token's claims cannot be read";
    let table = [
        ("as minted", good.clone(), Ok("granted")),
        ("again, from the cache", good.clone(), Ok("granted")),
        ("no typ", raw(&json!({"alg": "EdDSA", "kid": root.kid}).to_string(), &text), Ok("granted")),
        ("nothing", String::new(), Err("START carries no capability token")),
        ("too long", "a".repeat(2_049), Err("the token is too long")),
        ("not a token", "a.b".into(), Err(unreadable)),
        ("alg none", raw(&json!({"alg": "none", "kid": root.kid}).to_string(), &text), Err(unreadable)),
        ("alg HS256 with the public key", hs256, Err("the token is not signed with EdDSA")),
        ("alg HS256 with the public key in PEM", hs256_pem, Err("the token is not signed with EdDSA")),
        ("alg ES256", header(json!({"alg": "ES256"})), Err("the token is not signed with EdDSA")),
        ("alg of no kind", header(json!({"alg": "Ed448"})), Err(unreadable)),
        ("alg in another case", header(json!({"alg": "eddsa"})), Err(unreadable)),
        ("alg None", header(json!({"alg": "None"})), Err(unreadable)),
        ("no alg", raw(&json!({"kid": root.kid}).to_string(), &text), Err(unreadable)),
        ("alg twice", raw(&format!(r#"{{"alg":"none",{}"#, &root.header().to_string()[1..]), &text), Err(unreadable)),
        ("kid twice", raw(&format!(r#"{{"kid":"x",{}"#, &root.header().to_string()[1..]), &text), Err(unreadable)),
        ("unsecured", format!("{}.{}.", base64url(br#"{"alg":"none"}"#), base64url(text.as_bytes())), Err(unreadable)),
        ("a token in a token", root.sign(&root.header().to_string(), &good), Err(unknown)),
        ("five parts", format!("{good}.a.b"), Err(unreadable)),
        ("white space", format!(" {good}"), Err(unreadable)),
        ("padded", format!("{good}="), Err("the token's signature does not hold")),
        ("no signature", format!("{message}."), Err("the token's signature does not hold")),
        (
            "another signature",
            format!("{message}.{}", signature.chars().rev().collect::<String>()),
            Err("the token's signature does not hold"),
        ),
        ("no key id", header(json!({"kid": null})), Err("the token's key is not known")),
        ("a foreign key id", other.mint(&local_claims()), Err("the token's key is not known")),
        ("a foreign key under our id", impostor, Err("the token's signature does not hold")),
        ("a key of its own", header(json!({"jwk": other.jwk()})), Err(members)),
        ("a key's address", header(json!({"jku": "https://example.org"})), Err(members)),
        ("crit", header(json!({"crit": ["exp"]})), Err(members)),
        ("crit, empty", header(json!({"crit": []})), Err(members)),
        ("a header member of its own", header(json!({"b64": false})), Err(members)),
        ("nested", header(json!({"cty": "JWT"})), Err(members)),
        ("another typ", header(json!({"typ": "at+jwt"})), Err(members)),
        ("a claim of its own", claims(json!({"roles": []})), Err(unknown)),
        ("a claim of the wrong type", claims(json!({"exp": "never"})), Err(unknown)),
        ("a claim less", claims(json!({"nbf": null})), Err(unknown)),
        ("tenants as a number", claims(json!({"tenants": [0]})), Err(unknown)),
        ("an action of no kind", claims(json!({"actions": ["*"]})), Err(unknown)),
        ("a claim twice", raw(&root.header().to_string(), &doubled), Err(unknown)),
        ("deep", raw(&root.header().to_string(), &deep), Err(unknown)),
        ("expired", claims(json!({"exp": NOW_MS / 1_000})), Err("the token has expired")),
        ("not yet", claims(json!({"nbf": NOW_MS / 1_000 + 6})), Err("the token is not valid yet")),
        (
            "another audience",
            claims(json!({"aud": "spiffe://overlay.local/ns/a/overlaynode/x"})),
            Err("the token is for another audience"),
        ),
        ("another holder", claims(json!({"sub": NODE})), Err("the token belongs to another holder")),
    ];
    for (case, token, want) in table {
        assert_eq!(verify(&token), want.map_err(|message| (Status::Unauthorized, message)), "{case}");
    }
}

/// K3: every other algorithm that JWT knows, by name, over our key's own signature.
#[test]
fn k3_every_other_algorithm_is_refused() {
    let root = TokenRoot::new();
    let keys = load(&Volume::new(&Volume::files(&Authority::new(), &root, LeafOptions::default()))).unwrap();
    let verifier = keys.verifier();
    for alg in [
        "none",
        "HS256",
        "HS384",
        "HS512",
        "RS256",
        "RS384",
        "RS512",
        "PS256",
        "PS384",
        "PS512",
        "ES256",
        "ES384",
        "ES512",
        "ES256K",
        "Ed25519",
        "Ed448",
        "ML-DSA-65",
        "dir",
        "A256GCM",
        "",
        " EdDSA",
    ] {
        let header = json!({"alg": alg, "typ": "JWT", "kid": root.kid}).to_string();
        let token = root.sign(&header, &local_claims().to_string());
        let refusal = verifier.verify(token.as_bytes(), &Holder::Local, NOW).unwrap_err();
        assert_eq!(refusal.status, Status::Unauthorized, "{alg}");
    }
}

/// M1: what is remembered of tokens is bounded in bytes too, and is forgotten once nobody shows
/// them, whatever the wall clock does meanwhile.
#[test]
fn m1_short_tokens_are_remembered_while_they_are_shown() {
    let root = TokenRoot::new();
    let keys = load(&Volume::new(&Volume::files(&Authority::new(), &root, LeafOptions::default()))).unwrap();
    let verifier = keys.verifier();
    let padded = |length: usize| {
        let mut claims = local_claims();
        claims["topics"] = json!(["x".repeat(200), "y".repeat(200), "z".repeat(length)]);
        root.mint(&claims)
    };
    let tokens: Vec<_> = (1..200).map(padded).collect();
    let longest = tokens.iter().rfind(|token| token.len() <= 1_024).unwrap();
    let longer = tokens.iter().find(|token| token.len() > 1_024).unwrap();
    let show = |token: &str, now, unix_ms| {
        let time = CoreClock { now: Millis(now), unix_ms };
        assert!(verifier.verify(token.as_bytes(), &Holder::Local, time).is_ok());
    };
    show(longest, 0, NOW_MS);
    show(longer, 0, NOW_MS);
    let remembers = |token: &str, now| verifier.remembers(token.as_bytes(), Millis(now));
    assert_eq!([longest, longer].map(|token| remembers(token, 0)), [true, false]);
    show(longest, 10_000, NOW_MS - 30_000);
    verifier.forget_unused(Millis(30_000));
    assert!(remembers(longest, 10_000), "shown 20 s ago");
    verifier.forget_unused(Millis(30_001));
    assert!(!remembers(longest, 30_001));
}

/// K6: what is too long is refused by its length, unread: a token of 64 KiB and one of 10,000
/// claims, though properly signed, are never parsed, and at the bound itself what is parsed is
/// the bound.
#[test]
fn k6_a_token_past_its_bound_is_not_parsed() {
    let root = TokenRoot::new();
    let keys = load(&Volume::new(&Volume::files(&Authority::new(), &root, LeafOptions::default()))).unwrap();
    let verifier = keys.verifier();
    let verify = |token: &str| verifier.verify(token.as_bytes(), &Holder::Local, NOW).map_err(|r| r.message);
    let padded = |claims: Value| root.mint(&claims);
    let with = |name: &str, value: Value| {
        let mut claims = local_claims();
        claims[name] = value;
        claims
    };
    let many: serde_json::Map<_, _> = (0..10_000).map(|n| (format!("c{n}"), json!(n))).collect();
    let deep = format!("{{\"aud\":{}{}}}", "[".repeat(20_000), "]".repeat(20_000));
    for long in [
        padded(with("topics", json!(["a".repeat(48_000)]))),
        padded(Value::Object(many)),
        root.sign(&root.header().to_string(), &deep),
        "a".repeat(65_535),
    ] {
        assert!(long.len() > overlay_core::frame::MAX_CAP);
        assert_eq!(verify(&long).unwrap_err(), "the token is too long");
    }
    // Signed and 2,048 bytes at the most: the deepest and the widest that there is.
    let nested = format!("{{\"aud\":{}{}}}", "[".repeat(650), "]".repeat(650));
    let wide = padded(with("topics", json!(vec!["a"; 200])));
    let signed = root.sign(&root.header().to_string(), &nested);
    assert!(signed.len() <= 2_048 && wide.len() <= 2_048, "{} {}", signed.len(), wide.len());
    assert_eq!(verify(&signed).unwrap_err(), "the token's claims cannot be read");
    assert_eq!(verify(&wide).unwrap_err(), "the token lists too much");
}

/// The audience is the OverlayNode's, whichever pod's certificate the daemon holds.
#[test]
fn a_token_is_for_the_node_and_not_for_its_pod() {
    let root = TokenRoot::new();
    let pod = format!("{NODE}/pod/mesh-0");
    let files = Volume::files(&Authority::new(), &root, LeafOptions { uris: &[&pod], ..Default::default() });
    let keys = load(&Volume::new(&files)).unwrap();
    assert_eq!(keys.current().identity().as_str(), pod);
    assert_eq!(keys.current().audience().as_str(), NODE);
    let token = root.mint(&local_claims());
    assert!(keys.verifier().verify(token.as_bytes(), &Holder::Local, NOW).is_ok());
}

/// A swapped volume is noticed, a bad one changes nothing, and a key
/// that is gone takes its tokens along, remembered or not.
#[test]
fn keys_are_replaced_whole_or_not_at_all() {
    let (authority, root, next) = (Authority::new(), TokenRoot::new(), TokenRoot::new());
    let first = Volume::files(&authority, &root, LeafOptions::default());
    let mut volume = Volume::new(&first);
    let keys = load(&volume).unwrap();
    let verifier = keys.verifier();
    let known = |root: &TokenRoot| verifier.verify(root.mint(&local_claims()).as_bytes(), &Holder::Local, NOW).is_ok();
    assert!(known(&root) && !known(&next));
    assert!(matches!(keys.reload(NOW_MS), Reload::Unchanged));

    let mut torn = Volume::files(&authority, &next, LeafOptions::default());
    torn[1] = first[1].clone();
    volume.swap(&torn);
    let Reload::Refused(errors) = keys.reload(NOW_MS) else { panic!("a leaf with another's key") };
    assert!(errors.len() == 1 && errors[0].to_string().starts_with("tls.key: "), "{errors:?}");
    assert!(matches!(keys.reload(NOW_MS), Reload::StillRefused));
    assert!(keys.current().generation() == 1 && known(&root));

    volume.swap(&Volume::files(&authority, &next, LeafOptions::default()));
    assert!(matches!(keys.reload(NOW_MS), Reload::Replaced));
    assert!(keys.current().generation() == 2 && known(&next) && !known(&root));
    assert!(matches!(keys.reload(NOW_MS), Reload::Unchanged));

    std::fs::remove_file(volume.path("..data")).unwrap();
    assert!(matches!(keys.reload(NOW_MS), Reload::Refused(_)));
    assert!(matches!(keys.reload(NOW_MS), Reload::StillRefused));
    assert!(known(&next));
}

/// T6: each file broken in turn on reload: the old set stays and works, what is wrong is said
/// once, with the field, and the good file is taken when it comes.
#[test]
fn t6_a_broken_reload_keeps_the_old() {
    let (authority, other, root) = (Authority::new(), Authority::new(), TokenRoot::new());
    let good = Volume::files(&authority, &root, LeafOptions::default());
    let expired = Volume::files(&authority, &root, LeafOptions { until_year: 2020, ..Default::default() });
    let half = |text: &str| text[..text.len() / 2].to_owned();
    let with = |index: usize, text: String| {
        let mut files = good.clone();
        files[index] = text;
        files
    };
    let private = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "x", "x": "AAAA", "d": "AAAA"}]});
    for (case, files, field) in [
        ("half a certificate", with(0, half(&good[0])), "tls.certificate: "),
        ("no certificate", with(0, String::new()), "tls.certificate: "),
        ("an expired certificate", expired, "tls.certificate: "),
        ("another authority's certificate", with(0, other.leaf(LeafOptions::default()).0), "tls.certificate: "),
        ("half a key", with(1, half(&good[1])), "tls.key: "),
        ("another's key", with(1, other.leaf(LeafOptions::default()).1), "tls.key: "),
        ("a certificate for a key", with(1, good[0].clone()), "tls.key: "),
        ("half a bundle", with(2, half(&good[2])), "tls.ca: "),
        ("an empty bundle", with(2, String::new()), "tls.ca: "),
        ("a bundle that does not vouch for us", with(2, other.pem.clone()), "tls.certificate: "),
        ("half a key set", with(3, half(&good[3])), "token.keys: "),
        ("an empty key set", with(3, r#"{"keys":[]}"#.into()), "token.keys: "),
        ("a private key", with(3, private.to_string()), "token.keys: "),
        ("half a token", with(4, half(&good[4])), "token.file: "),
        ("no token", with(4, String::new()), "token.file: "),
    ] {
        let mut volume = Volume::new(&good);
        let keys = load(&volume).unwrap();
        let before = keys.current();
        let known = || keys.verifier().verify(good[4].trim().as_bytes(), &Holder::Local, NOW).is_ok();
        volume.swap(&files);
        let Reload::Refused(errors) = keys.reload(NOW_MS) else { panic!("{case}") };
        let said: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert!(said.len() == 1 && said[0].starts_with(field), "{case}: {said:?}");
        assert!(matches!(keys.reload(NOW_MS), Reload::StillRefused), "{case}: said once");
        assert!(std::sync::Arc::ptr_eq(&before, &keys.current()) && known(), "{case}: the old one stays");
        volume.swap(&good);
        assert!(matches!(keys.reload(NOW_MS), Reload::Unchanged), "{case}");
        volume.swap(&Volume::files(&authority, &root, LeafOptions::default()));
        assert!(matches!(keys.reload(NOW_MS), Reload::Replaced) && known(), "{case}: and a good one replaces it");
    }
}

/// A chain that was believed is judged again by another bundle, for either side's usage.
#[test]
fn a_chain_whose_authority_leaves_the_bundle_is_believed_no_longer() {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    let (authority, next, root) = (Authority::new(), Authority::new(), TokenRoot::new());
    let mut files = Volume::files(&authority, &root, LeafOptions::default());
    let (old, _) = authority.leaf(LeafOptions::default());
    let chain = [CertificateDer::from_pem_slice(old.as_bytes()).unwrap()];
    let mut volume = Volume::new(&files);
    let keys = load(&volume).unwrap();
    let first = keys.current().bundle();
    let vouched = |at| [true, false].map(|server| keys.current().vouches_for(&chain, server, at));
    assert_eq!(vouched(NOW_MS), [true, true]);
    files[2] = format!("{}{}", authority.pem, next.pem);
    volume.swap(&files);
    assert!(matches!(keys.reload(NOW_MS), Reload::Replaced));
    assert!(keys.current().bundle() != first && vouched(NOW_MS) == [true, true], "while both are there");
    (files[0], files[1]) = next.leaf(LeafOptions::default());
    files[2] = next.pem.clone();
    volume.swap(&files);
    assert!(matches!(keys.reload(NOW_MS), Reload::Replaced));
    assert_eq!(vouched(NOW_MS), [false, false]);
    assert!(!keys.current().vouches_for(&[], true, NOW_MS));
}

/// The task that looks notices a swapped volume, and says what it did. Time is paused.
#[tokio::test(start_paused = true)]
async fn a_swapped_volume_is_noticed() {
    let (authority, root) = (Authority::new(), TokenRoot::new());
    let files = || Volume::files(&authority, &root, LeafOptions::default());
    let mut volume = Volume::new(&files());
    let (clock, cancel) = (crate::clock::Clock::start(), tokio_util::sync::CancellationToken::new());
    let (tls, token) = volume.config(KeyExchange::RequireHybrid);
    let keys = std::sync::Arc::new(Keys::load(&tls, &token, clock.unix_ms()).unwrap());
    let metrics = std::sync::Arc::new(crate::metrics::Metrics::new(true, "").unwrap());
    let mut changes = keys.subscribe();
    let mut tasks = tokio::task::JoinSet::new();
    let (asked, is_asked) = tokio::sync::watch::channel(0);
    tasks.spawn(std::sync::Arc::clone(&keys).watch(std::sync::Arc::clone(&metrics), clock, is_asked, cancel.clone()));
    volume.swap(&files());
    changes.changed().await.unwrap();
    assert_eq!(changes.borrow_and_update().generation(), 2);
    assert!(clock.now().0 < 2 * POLL_INTERVAL.as_millis() as u64, "{:?}", clock.now());
    let before = clock.now();
    volume.swap(&files());
    asked.send_replace(1);
    changes.changed().await.unwrap();
    assert_eq!((changes.borrow_and_update().generation(), clock.now()), (3, before), "asked to, it looks at once");
    cancel.cancel();
    tasks.join_next().await.unwrap().unwrap();
    let text = String::from_utf8(metrics.render().unwrap()).unwrap();
    assert!(text.contains("overlay_key_reloads_total{result=\"ok\",amnesia=\"on\"} 2"), "{text}");
    assert!(text.contains("overlay_certificate_expiry_timestamp_seconds{amnesia=\"on\"} 13569465600"), "{text}");
}

/// N2: whoever still has a configuration of a set that is gone has no key by it.
#[test]
fn n2_a_configuration_outlives_its_key() {
    let volume = Volume::new(&Volume::files(&Authority::new(), &TokenRoot::new(), LeafOptions::default()));
    let (tls, token) = volume.config(KeyExchange::RequireHybrid);
    let keys = Keys::load(&tls, &token, NOW_MS).unwrap();
    let set = keys.current();
    let client = Arc::clone(set.client());
    drop(keys);
    assert!(client.client_auth_cert_resolver.has_certs(), "who shakes hands has the set");
    drop(set);
    assert!(!client.client_auth_cert_resolver.has_certs());
}

#[test]
fn a_client_needs_no_token_keys() {
    let files = Volume::files(&Authority::new(), &TokenRoot::new(), LeafOptions::default());
    let volume = Volume::new(&files);
    let (tls, _) = volume.config(KeyExchange::RequireHybrid);
    let (client, identity) = client_config(&tls, NOW_MS).unwrap();
    assert_eq!((client.alpn_protocols.as_slice(), identity.as_str()), ([ALPN.to_vec()].as_slice(), NODE));
    assert_eq!(read_token("--token-file", &volume.path("peer")).unwrap(), files[4].trim().as_bytes());
}

/// Key and certificate in one file, as the kubelet writes a pod's credential bundle, and as it
/// renews it: the file is one, so neither half is ever another's.
#[test]
fn a_bundle_of_key_and_certificate() {
    let (authority, root) = (Authority::new(), TokenRoot::new());
    let pod = format!("{NODE}/pod/mesh-0");
    let files = || {
        let mut files = Volume::files(&authority, &root, LeafOptions { uris: &[&pod], ..Default::default() });
        files[0] = format!("{}{}", files[1], files[0]);
        files[1] = String::new();
        files
    };
    let first = files();
    let mut volume = Volume::new(&first);
    let (mut tls, token) = volume.config(KeyExchange::RequireHybrid);
    tls.key = tls.certificate.clone();
    let keys = Keys::load(&tls, &token, NOW_MS).unwrap();
    assert_eq!(keys.current().identity().as_str(), pod);
    assert!(matches!(keys.reload(NOW_MS), Reload::Unchanged));
    volume.swap(&files());
    assert!(matches!(keys.reload(NOW_MS), Reload::Replaced));
    assert_eq!(keys.current().generation(), 2);

    let mut half = files();
    half[0] = first[0].split_inclusive("-----END PRIVATE KEY-----\n").next().unwrap().to_owned();
    volume.swap(&half);
    let Reload::Refused(errors) = keys.reload(NOW_MS) else { panic!("a key without its certificate") };
    assert!(errors.len() == 1 && errors[0].to_string().contains("holds no PEM certificate"), "{errors:?}");
    assert!(!errors[0].to_string().contains("PRIVATE"));
}
