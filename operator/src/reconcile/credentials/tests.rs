use std::collections::BTreeMap;

use k8s_openapi::ByteString;

use super::*;
use crate::trust::{LEAF_LIFETIME, TOKEN_LIFETIME};

struct Rig {
    keys: Installation,
    id: SpiffeId,
    now: SystemTime,
}

const TENANTS: &[TenantId] = &[TenantId(0), TenantId(7)];

impl Rig {
    fn new() -> Self {
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        Self {
            keys: Installation { ca: Ca::generate(now).unwrap(), tokens: TokenRoot::generate().unwrap() },
            id: "spiffe://example.org/ns/a/overlaynode/mesh".parse().unwrap(),
            now,
        }
    }

    fn subject(&self) -> Subject<'_> {
        Subject { id: &self.id, tenants: TENANTS }
    }

    /// The Secrets as they stand after issuing at `now`.
    fn standing(&self) -> Standing {
        let certificate = issue_certificate(&self.keys.ca, &self.id, self.now).unwrap();
        let tokens = issue_tokens(&self.keys.tokens, self.subject(), self.now).unwrap();
        let c = credentials(&Leaves::Shared(certificate), &tokens);
        let LeafSecret::Holds { certificate, key } = c.leaf else { panic!("pods share it") };
        let secret = |data: [(&str, Vec<u8>); 3]| Secret {
            data: Some(data.into_iter().map(|(k, b)| (k.to_owned(), ByteString(b))).collect::<BTreeMap<_, _>>()),
            ..Default::default()
        };
        Standing {
            tls: Some(secret([("tls.crt", certificate), ("tls.key", key), ("ca.crt", c.ca)])),
            token: Some(secret([("token-keys.json", c.token_keys), ("peer", c.peer_token), ("local", c.local_token)])),
        }
    }

    /// Whether certificate and tokens stand.
    fn stand(&self, standing: &Standing, subject: Subject<'_>, now: SystemTime) -> (bool, bool) {
        let current = current(standing, &self.keys, subject, now);
        (current.certificate.is_some(), current.tokens.is_some())
    }
}

fn overwrite(secret: &mut Option<Secret>, key: &str, bytes: Option<Vec<u8>>) {
    let data = secret.as_mut().unwrap().data.as_mut().unwrap();
    match bytes {
        Some(bytes) => data.insert(key.to_owned(), ByteString(bytes)),
        None => data.remove(key),
    };
}

#[test]
fn what_is_good_stays_byte_for_byte() {
    let rig = Rig::new();
    let standing = rig.standing();
    let current = current(&standing, &rig.keys, rig.subject(), rig.now + Duration::from_secs(60));
    let kept = credentials(&Leaves::Shared(current.certificate.unwrap()), &current.tokens.unwrap());
    let LeafSecret::Holds { certificate, key } = kept.leaf else { panic!("pods share it") };
    let bytes = |secret: &Option<Secret>, key: &str| secret.as_ref().unwrap().data.as_ref().unwrap()[key].0.clone();
    assert!(certificate == bytes(&standing.tls, "tls.crt") && key == bytes(&standing.tls, "tls.key"));
    assert!(
        kept.peer_token == bytes(&standing.token, "peer")
            && kept.token_keys == bytes(&standing.token, "token-keys.json")
    );
}

#[test]
fn due_after_a_third_of_a_life() {
    let rig = Rig::new();
    let standing = rig.standing();
    for (lifetime, second) in [(LEAF_LIFETIME, 0), (TOKEN_LIFETIME, 1)] {
        let pick = |(certificate, tokens): (bool, bool)| if second == 0 { certificate } else { tokens };
        // A leaf is backdated by a minute, which moves its third by less than that.
        let third = lifetime / 3;
        let minute = Duration::from_secs(60);
        assert!(pick(rig.stand(&standing, rig.subject(), rig.now + third - minute)));
        assert!(!pick(rig.stand(&standing, rig.subject(), rig.now + third)));
    }
}

/// One thing off at a time, and what is reissued over it.
#[test]
fn what_is_not_good_is_reissued() {
    let (rig, other) = (Rig::new(), Rig::new());
    let elsewhere: SpiffeId = "spiffe://example.org/ns/a/overlaynode/other".parse().unwrap();
    let strange = other.standing();
    let take =
        |secret: &Option<Secret>, key: &str| Some(secret.as_ref().unwrap().data.as_ref().unwrap()[key].0.clone());
    let peer_as_local = |s: &mut Standing| {
        let peer = take(&s.token, "peer");
        overwrite(&mut s.token, "local", peer);
    };
    type Change<'a> = Box<dyn Fn(&mut Standing) + 'a>;
    let table: Vec<(&str, Change<'_>, (bool, bool))> = vec![
        ("as issued", Box::new(|_| ()), (true, true)),
        ("no certificate", Box::new(|s| s.tls = None), (false, true)),
        ("no tokens", Box::new(|s| s.token = None), (true, false)),
        ("another's key", Box::new(|s| overwrite(&mut s.tls, "tls.key", take(&strange.tls, "tls.key"))), (false, true)),
        (
            "another's certificate",
            Box::new(|s| overwrite(&mut s.tls, "tls.crt", take(&strange.tls, "tls.crt"))),
            (false, true),
        ),
        ("another CA", Box::new(|s| overwrite(&mut s.tls, "ca.crt", take(&strange.tls, "ca.crt"))), (false, true)),
        ("another CA, all of it", Box::new(|s| s.tls = strange.tls.clone()), (false, true)),
        ("junk", Box::new(|s| overwrite(&mut s.tls, "tls.crt", Some(b"junk".to_vec()))), (false, true)),
        ("not UTF-8", Box::new(|s| overwrite(&mut s.tls, "tls.key", Some(vec![0xff]))), (false, true)),
        ("no key set", Box::new(|s| overwrite(&mut s.token, "token-keys.json", None)), (true, false)),
        ("another root", Box::new(|s| s.token = strange.token.clone()), (true, false)),
        ("the peers' as local", Box::new(peer_as_local), (true, false)),
    ];
    for (case, change, want) in table {
        let mut standing = rig.standing();
        change(&mut standing);
        assert_eq!(rig.stand(&standing, rig.subject(), rig.now), want, "{case}");
    }
    let standing = rig.standing();
    let renamed = Subject { id: &elsewhere, tenants: TENANTS };
    assert_eq!(rig.stand(&standing, renamed, rig.now), (false, false), "another identity");
    let narrowed = Subject { id: &rig.id, tenants: &TENANTS[..1] };
    assert_eq!(rig.stand(&standing, narrowed, rig.now), (true, false), "other tenants");
}

/// Where each pod has its own key, what NAME-tls held before is taken out, and no one else's.
#[test]
fn a_key_that_is_left_over() {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
    let rig = Rig::new();
    let mut standing = rig.standing();
    assert!(!holds_key(&standing, "uid"), "it is nobody's");
    let owner = OwnerReference { uid: "uid".into(), controller: Some(true), ..Default::default() };
    standing.tls.as_mut().unwrap().metadata.owner_references = Some(vec![owner]);
    assert!(holds_key(&standing, "uid") && !holds_key(&standing, "another"));
    overwrite(&mut standing.tls, "tls.key", Some(Vec::new()));
    assert!(!holds_key(&standing, "uid"), "it is empty");
    assert!(!holds_key(&Standing::default(), "uid"));

    let tokens = issue_tokens(&rig.keys.tokens, rig.subject(), rig.now).unwrap();
    for (leftover, want) in [(true, LeafSecret::Emptied), (false, LeafSecret::Absent)] {
        let c = credentials(&Leaves::PerPod { ca: b"ca".to_vec(), leftover }, &tokens);
        assert!(c.leaf == want && c.ca == b"ca");
    }
}
