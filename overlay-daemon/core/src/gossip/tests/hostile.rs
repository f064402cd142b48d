//! Links that know the protocol and use it against the others.

use super::*;
use crate::gossip::wanted::Key;

const OTHER: TenantId = TenantId(9);

/// An engine with so many links, which carries two tenants.
fn engine(links: usize) -> (Engine, Vec<LinkId>) {
    let identity: SpiffeId = "spiffe://example.org/ns/a/overlaynode/mesh".parse().unwrap();
    let me = Me { identity, incarnation: Incarnation(1) };
    let mut engine = Engine::new(me, Gossip::defaults(Profile::Micronode), vec![TENANT, OTHER], Millis(0));
    let links = (0..links).map(|_| engine.handle_link_up(Millis(0)).unwrap()).collect();
    (engine, links)
}

fn message(sequence: u64) -> (Envelope, Bytes) {
    let payload = Bytes::from(format!("message {sequence}"));
    let envelope = Envelope {
        attributes: 0,
        topic: "news".parse().unwrap(),
        origin: "spiffe://example.org/ns/a/overlaynode/origin".parse().unwrap(),
        incarnation: Incarnation(2),
        sequence,
        time_ms: UNIX_MS,
        size: u32::try_from(payload.len()).unwrap(),
        hash: digest(&payload),
    };
    (envelope, payload)
}

fn announce(engine: &mut Engine, link: LinkId, tenant: TenantId, ids: &[MessageId], now: Millis) {
    for ids in ids.chunks(crate::record::MAX_ANNOUNCED) {
        let record = Record::Announce(ids.to_vec());
        engine.handle_record(link, tenant, record, (UNIX_MS, now), &mut Sent::default()).unwrap();
    }
}

/// Lets time pass. Who was asked for what, of the links that `counts`.
fn asked(engine: &mut Engine, (from, to): (u64, u64), link: LinkId) -> Vec<Key> {
    let mut asks = Vec::new();
    for now in (from..to).map(Millis) {
        let mut out = Tenants::default();
        engine.handle_timeout(now, &mut out);
        asks.extend(out.0.into_iter().filter_map(|(to, tenant, record)| match record {
            Record::Graft { id, .. } if to == link => Some((tenant, id)),
            _ => None,
        }));
    }
    asks
}

/// Takes everything, and notes for which tenant.
#[derive(Default)]
struct Tenants(Vec<(LinkId, TenantId, Record)>);

impl Outlet for Tenants {
    fn has_stream(&self, _: LinkId, _: TenantId) -> bool {
        true
    }
    fn room(&self, _: LinkId, _: TenantId, _: Class) -> usize {
        usize::MAX
    }
    fn send(&mut self, link: LinkId, tenant: TenantId, _: Class, payload: Bytes) -> bool {
        self.0.extend(Record::decode(payload).map(|record| (link, tenant, record)));
        true
    }
    fn has_memory(&self, _: u64) -> bool {
        true
    }
}

/// F10, G1: an id that a link announces for another tenant does not keep the message from being
/// asked for where it is.
#[test]
fn f10_an_id_announced_for_another_tenant_is_asked_for_all_the_same() {
    let (mut engine, links) = engine(2);
    let id = message(1).0.id(TENANT);
    announce(&mut engine, links[0], OTHER, &[id], Millis(0));
    announce(&mut engine, links[1], TENANT, &[id], Millis(1));
    assert_eq!(asked(&mut engine, (2, 1_000), links[1]).first(), Some(&(TENANT, id)));
}

/// G3, G5: as many links that announce and never give as there may be, and silent at that: the
/// one that would give is asked before the message is given up.
#[test]
fn g5_silent_holders_do_not_outlast_the_patience() {
    let (mut engine, links) = engine(MAX_LINKS);
    let id = message(1).0.id(TENANT);
    links.iter().for_each(|link| announce(&mut engine, *link, TENANT, &[id], Millis(0)));
    assert!(!asked(&mut engine, (1, 30_000), links[MAX_LINKS - 1]).is_empty());
    asked(&mut engine, (30_000, 60_000), links[0]);
    assert_eq!((engine.counts().lost, engine.wanted.next()), (1, None), "and is given up in the end");
}

/// G3: what a link announced counts against it no longer than it lives: the next link of its
/// number is heard.
#[test]
fn g3_a_link_does_not_inherit_anothers_quota() {
    let (mut engine, links) = engine(2);
    let ids: Vec<MessageId> = (0..8_192).map(|n| message(n).0.id(TENANT)).collect();
    links.iter().for_each(|link| announce(&mut engine, *link, TENANT, &ids, Millis(0)));
    engine.handle_link_down(links[0]);
    let next = engine.handle_link_up(Millis(1)).unwrap();
    assert_eq!(next, links[0]);
    let id = message(100_000).0.id(TENANT);
    announce(&mut engine, next, TENANT, &[id], Millis(2));
    assert_eq!(asked(&mut engine, (3, 1_000), next).first(), Some(&(TENANT, id)));
}
