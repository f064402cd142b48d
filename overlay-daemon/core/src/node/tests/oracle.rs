//! K2 and F10: what a token lets through, against an oracle that shares no code with `grant`.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::sim::{SIGNED_BY, Sim, UNIX_MS};
use super::*;
use crate::grant::{Action, Claims};
use crate::identity::Topic;

const NODE: &str = "spiffe://example.org/ns/a/overlaynode/mesh";
const PEER: &str = "spiffe://example.org/ns/a/overlaynode/mesh/pod/node-1";
const TENANTS: [u128; 3] = [0, 5, 6];
/// The last of them the daemon does not carry.
const CARRIED: [u128; 2] = [0, 5];
const TOPICS: [&str; 5] = ["news", "newsflash", "log", "log.a", "log.a.b"];

/// A way on which something is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Publish,
    Subscribe,
    Gossip,
    Sessions,
    RenewPublish,
    RenewSubscribe,
}

#[derive(Clone, Debug)]
struct Case {
    path: Path,
    /// By the Unix socket, else by a peer's session.
    local: bool,
    audience: &'static str,
    holder: &'static str,
    tenants: Vec<u128>,
    patterns: Vec<&'static str>,
    actions: Vec<Action>,
    nbf: i64,
    exp: i64,
    tenant: u128,
    topics: Vec<&'static str>,
}

fn cases() -> impl Strategy<Value = Case> {
    use Action::{Admin, Get, Publish, Put, Subscribe};
    use Path::{Gossip, RenewPublish, RenewSubscribe, Sessions};
    let path = select(vec![Path::Publish, Path::Subscribe, Gossip, Sessions, RenewPublish, RenewSubscribe]);
    // What is right is likely, so that most cases differ in one thing or two.
    let audience = prop_oneof![6 => Just(NODE), 1 => select(vec![PEER, "spiffe://example.org/ns/a/overlaynode/other"])];
    let holder = select(vec!["local", "local", "local", NODE, NODE, PEER, "spiffe://example.org/ns/a/overlaynode/me"]);
    let times = (prop_oneof![6 => Just(-60), 1 => -7..7_i64], prop_oneof![6 => Just(60), 1 => -7..7_i64]);
    let patterns = subsequence(vec!["news", "news*", "log.*", "log", "*", ""], 0..=3);
    let actions = prop_oneof![
        3 => Just(vec![Publish, Subscribe, Get, Put, Admin]),
        2 => subsequence(vec![Publish, Subscribe, Get, Put, Admin], 0..=4),
    ];
    let tenants = prop_oneof![3 => Just(TENANTS.to_vec()), 1 => subsequence(TENANTS.to_vec(), 0..=2)];
    let asked = (prop_oneof![6 => select(CARRIED.to_vec()), 1 => Just(6)], subsequence(TOPICS.to_vec(), 1..=2));
    ((path, any::<bool>()), audience, holder, (tenants, patterns, actions), times, asked).prop_map(
        |((path, local), audience, holder, (tenants, patterns, actions), (nbf, exp), (tenant, topics))| Case {
            path,
            local,
            audience,
            holder,
            tenants,
            patterns,
            actions,
            nbf,
            exp,
            tenant,
            topics,
        },
    )
}

/// What must be answered: written from PROTOCOL.md's tables alone.
fn oracle(case: &Case) -> u16 {
    let held_by = if case.local { case.holder == "local" } else { case.holder == NODE || case.holder == PEER };
    if case.audience != NODE || !held_by || case.nbf > 5 || case.exp <= 0 {
        return 401;
    }
    let (action, has_topics) = match case.path {
        Path::Publish | Path::RenewPublish => (Action::Publish, true),
        Path::Subscribe | Path::RenewSubscribe => (Action::Subscribe, true),
        Path::Gossip => (Action::Publish, false),
        Path::Sessions => (Action::Admin, false),
    };
    let covers = |topic: &str| {
        case.patterns.iter().any(|pattern| {
            let open = pattern.ends_with('*');
            let stem = pattern.trim_end_matches('*');
            topic.len() >= stem.len()
                && topic.as_bytes()[..stem.len()] == *stem.as_bytes()
                && (open || topic.len() == stem.len())
        })
    };
    let place = match case.path {
        Path::Gossip => !case.local,
        Path::Sessions => case.local,
        _ => true,
    };
    // A publisher has one topic.
    let asked =
        if matches!(case.path, Path::Publish | Path::RenewPublish) { &case.topics[..1] } else { &case.topics[..] };
    let allowed = CARRIED.contains(&case.tenant)
        && case.tenants.contains(&case.tenant)
        && case.actions.contains(&action)
        && place
        && (!has_topics || asked.iter().all(|topic| covers(topic)));
    if allowed { 200 } else { 403 }
}

/// The code that answers the START on `corr_id`.
fn code(sim: &mut Sim, id: SessionId, corr_id: u64) -> u16 {
    let now = sim.clock().now;
    sim.nodes[0].handle_sent(id, now);
    let mut answer = None;
    while let Some((to, frames)) = sim.nodes[0].poll_transmit(now) {
        answer = answer
            .or(frames.iter().find(|f| to == id && f.corr_id == corr_id && f.flags.has(Flags::RESP)).map(|f| f.code));
        sim.nodes[0].handle_sent(to, now);
    }
    answer.unwrap()
}

fn verdict(case: &Case, sim: &Sim) -> Result<Grant, Refusal> {
    let now = UNIX_MS / 1_000;
    let claims = Claims {
        aud: case.audience.parse().unwrap(),
        sub: case.holder.into(),
        tenants: case.tenants.iter().map(|tenant| TenantId(*tenant)).collect(),
        topics: case.patterns.iter().map(|pattern| (*pattern).into()).collect(),
        actions: case.actions.clone(),
        nbf: now.checked_add_signed(case.nbf).unwrap(),
        exp: now.checked_add_signed(case.exp).unwrap(),
    };
    let holder = if case.local { Holder::Local } else { Holder::Certificate(PEER.parse().unwrap()) };
    Grant::new(claims, SIGNED_BY, &sim.nodes[0].identity.without_pod(), &holder, UNIX_MS)
}

fn everything(sim: &Sim, local: bool) -> Grant {
    let case = Case {
        path: Path::Publish,
        local,
        audience: NODE,
        holder: if local { "local" } else { NODE },
        tenants: TENANTS.to_vec(),
        patterns: vec!["*"],
        actions: vec![Action::Publish, Action::Subscribe, Action::Admin],
        nbf: -60,
        exp: 60,
        tenant: 0,
        topics: vec!["news"],
    };
    verdict(&case, sim).unwrap()
}

fn check(case: &Case) {
    let mut sim = Sim::with(2, |config| config.overlay.tenants = CARRIED.map(TenantId).to_vec());
    sim.dial(1, 0);
    sim.run(50);
    let readers: Vec<(u128, SessionId)> = CARRIED.map(|tenant| (tenant, reader(&mut sim, tenant))).to_vec();
    let by_peer = sim.nodes[0].sessions.iter().find(|(_, entry)| entry.remote().is_some()).map(|(id, _)| *id);
    let id = if case.local { sim.client(0) } else { by_peer.unwrap() };
    let app = match case.path {
        Path::Gossip => AppProto::GOSSIP,
        Path::Sessions => AppProto::ADMIN,
        _ => AppProto::PUBSUB,
    };
    let names: Vec<Topic> = case.topics.iter().map(|topic| topic.parse().unwrap()).collect();
    let publish = Open::Publish { topic: names[0].clone() };
    let subscribe = Open::Subscribe { topics: names };
    let tenant = TenantId(case.tenant);
    let start = |corr_id, open: &Open| Frame::new(Flags::REQ | Flags::START, app, tenant, corr_id, json(open));
    let clock = Clock { now: sim.clock().now, unix_ms: UNIX_MS };
    let mut corr_id = 1_001;
    let open = match case.path {
        Path::Publish => publish,
        Path::Subscribe => subscribe,
        Path::Gossip => Open::Gossip {},
        Path::Sessions => Open::Sessions {},
        renewal => {
            let old = if renewal == Path::RenewPublish { publish } else { subscribe };
            let grant = everything(&sim, case.local);
            sim.nodes[0].handle_frame(id, start(corr_id, &old), Some(Ok(grant)), clock);
            assert_eq!(code(&mut sim, id, corr_id), if CARRIED.contains(&case.tenant) { 200 } else { 403 });
            corr_id += 2;
            Open::Renew { stream: corr_id - 2 }
        }
    };
    let grant = verdict(case, &sim);
    sim.nodes[0].handle_frame(id, start(corr_id, &open), Some(grant), clock);
    let (got, want) = (code(&mut sim, id, corr_id), oracle(case));
    assert_eq!(got, want);
    // What was published reaches its own tenant's readers if it was let through, and nobody else.
    if matches!(case.path, Path::Publish | Path::RenewPublish) {
        for (to, frame_tenant) in [(corr_id, case.tenant), (corr_id, 5 - case.tenant.min(5))] {
            let record = Publish::Message("x".into()).encode();
            let frame = Frame::new(Flags::REQ, AppProto::PUBSUB, TenantId(frame_tenant), to, record);
            sim.nodes[0].handle_frame(id, frame, None, clock);
        }
        for (tenant, reader) in readers {
            let events = |frames: &[Frame]| frames.iter().filter(|frame| frame.flags.has(Flags::EVENT)).count();
            let queued = events(&drain(&mut sim, reader));
            assert_eq!(queued, usize::from(want == 200 && tenant == case.tenant), "tenant {tenant}");
        }
    }
}

/// A subscriber to every topic of a tenant.
fn reader(sim: &mut Sim, tenant: u128) -> SessionId {
    let id = sim.client(0);
    let open = Open::Subscribe { topics: TOPICS.map(|topic| topic.parse().unwrap()).to_vec() };
    let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(tenant), 3, json(&open));
    let grant = everything(sim, true);
    sim.client_starts(0, id, start, Some(grant));
    sim.run(1);
    id
}

/// What waits to be sent to a session.
fn drain(sim: &mut Sim, id: SessionId) -> Vec<Frame> {
    let now = sim.clock().now;
    let entry = sim.nodes[0].sessions.get_mut(&id).unwrap();
    entry.lanes.take(usize::MAX, now)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// K2: audience, holder, tenant, action, topic and time, on every path that emits, none
    /// wrong; F10: a frame of another tenant within a stream delivers nothing.
    #[test]
    fn k2_f10_every_path_asks_the_token(case in cases()) {
        check(&case);
    }
}
