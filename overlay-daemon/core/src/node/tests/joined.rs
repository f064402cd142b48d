//! Two daemons joined in virtual time, and everything that may go on between and around them,
//! legal or not, in any order: nothing panics, nothing that was accepted is lost or comes twice,
//! and what is to close does so by itself, whether the other end hears of it or not.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::record::MessageId;

#[derive(Clone, Debug)]
enum Step {
    /// A client publishes, `size` bytes, perhaps compressed, perhaps asking for a window.
    Publish { node: usize, size: usize, comp: bool, ack: bool },
    /// A client sends anything.
    Client { node: usize, frame: Frame, granted: bool },
    /// A frame that is legal in no state comes by the session between the daemons.
    Illegal { node: usize, frame: Frame },
    /// Writes are shed, or not.
    Shed { node: usize, shedding: bool },
    /// The session between the daemons breaks and is dialled again, by either.
    Redial { node: usize },
    /// What is no frame comes by the session between the daemons.
    RefuseLink { node: usize, status: Status },
    /// The same by a client's, which reads on or not; another client comes.
    RefuseClient { node: usize, status: Status, stalled: bool },
    /// A client closes its connection, and another comes.
    Leave { node: usize },
    /// Time passes.
    Run(u64),
}

/// The last thing to happen: what is to have closed all sessions by the deadlines.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// A daemon stops, without a drain or after one.
    Stop { node: usize, drain: bool },
    /// A daemon refuses the session to the other.
    Refuse { node: usize },
    /// Nothing passes between the daemons, and no client says anything.
    Silence,
}

fn endings() -> impl Strategy<Value = Ending> {
    prop_oneof![
        2 => (0..2_usize, any::<bool>()).prop_map(|(node, drain)| Ending::Stop { node, drain }),
        1 => (0..2_usize).prop_map(|node| Ending::Refuse { node }),
        1 => Just(Ending::Silence),
    ]
}

fn payloads() -> impl Strategy<Value = Bytes> {
    let topic: crate::identity::Topic = TOPIC.parse().unwrap();
    let known = [
        json(&Open::Publish { topic: topic.clone() }),
        json(&Open::Subscribe { topics: vec![topic] }),
        json(&Open::Gossip {}),
        json(&Open::Sessions {}),
        Publish::Message("stray".into()).encode(),
        Publish::Begin { size: 70_000, hash: [7; 32] }.encode(),
        Record::Prune.encode(),
    ];
    prop_oneof![prop::sample::select(known.to_vec()), prop::collection::vec(any::<u8>(), 0..80).prop_map(Bytes::from),]
}

fn frames() -> impl Strategy<Value = Frame> {
    let likely = prop::sample::select(vec![1_u16, 9, 17, 25, 33, 65, 2, 4, 129]);
    let flags = prop_oneof![3 => likely, 1 => 0..=0xff_u16].prop_map(Flags::from_bits);
    let app = prop::sample::select(vec![0_u16, 1, 1, 1, 3, 4, 9]).prop_map(AppProto);
    let code = prop::sample::select(vec![0_u16, 200, 206, 400, 429, 503]);
    let corr_id = prop_oneof![4 => 0..20_u64, 1 => any::<u64>()];
    (flags, app, code, corr_id, 0..2_u128, payloads()).prop_map(|(flags, app, code, corr_id, tenant, payload)| Frame {
        code,
        ..Frame::new(flags, app, TenantId(tenant), corr_id, payload)
    })
}

/// Not exactly one of REQ, RESP and EVENT, an EVENT, or a protocol that there is not.
fn illegal() -> impl Strategy<Value = Frame> {
    (frames(), prop::sample::select(vec![0_u16, 3, 4, 5, 6, 7, 9])).prop_map(|(frame, kind)| match kind {
        9 => Frame { flags: Flags::REQ | Flags::START, app: AppProto(9), ..frame },
        _ => Frame { flags: Flags::from_bits(frame.flags.bits() & !7 | kind), ..frame },
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sizes = prop::sample::select(vec![0_usize, 1, 40, 65_536, 65_537, 140_000]);
    let status = || prop::sample::select(vec![Status::BadRequest, Status::PayloadTooLarge, Status::Unavailable]);
    let step = prop_oneof![
        4 => (0..2_usize, sizes, any::<bool>(), any::<bool>())
            .prop_map(|(node, size, comp, ack)| Step::Publish { node, size, comp, ack }),
        4 => (0..2_usize, frames(), any::<bool>()).prop_map(|(node, frame, granted)| Step::Client { node, frame, granted }),
        2 => (0..2_usize, illegal()).prop_map(|(node, frame)| Step::Illegal { node, frame }),
        1 => (0..2_usize, any::<bool>()).prop_map(|(node, shedding)| Step::Shed { node, shedding }),
        1 => (0..2_usize).prop_map(|node| Step::Redial { node }),
        1 => (0..2_usize, status()).prop_map(|(node, status)| Step::RefuseLink { node, status }),
        1 => (0..2_usize, status(), any::<bool>())
            .prop_map(|(node, status, stalled)| Step::RefuseClient { node, status, stalled }),
        1 => (0..2_usize).prop_map(|node| Step::Leave { node }),
        4 => (0..400_u64).prop_map(Step::Run),
    ];
    prop::collection::vec(step, 1..60)
}

/// The frames of one message, which is another for each `n`.
fn message(size: usize, n: usize, comp: bool, ack: bool) -> Vec<Frame> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&n.to_be_bytes()).finalize_xof().fill(&mut bytes);
    let payload = Bytes::from(bytes);
    let hash = crate::gossip::digest(&payload);
    let records: Vec<Publish> = if size <= crate::frame::CHUNK {
        vec![Publish::Message(payload)]
    } else {
        let begin = Publish::Begin { size: u32::try_from(size).unwrap(), hash };
        [begin].into_iter().chain(pieces(&payload, hash).map(Publish::Piece)).collect()
    };
    let mut flags = Flags::REQ;
    flags = if comp { flags | Flags::COMP } else { flags };
    flags = if ack { flags | Flags::ACK_REQ } else { flags };
    let encoded = records.iter().map(|record| {
        let plain = record.encode();
        let mut out = Vec::with_capacity(zstd_safe::compress_bound(plain.len()));
        zstd_safe::compress(&mut out, &plain, 1).unwrap();
        if comp { out.into() } else { plain }
    });
    encoded.map(|payload| Frame::new(flags, AppProto::PUBSUB, TenantId(0), 3, payload)).collect()
}

fn delivered_ids(frames: &[Frame]) -> (Vec<MessageId>, usize, usize) {
    let (mut ids, mut promised, mut pieces) = (Vec::new(), 0, 0);
    for record in delivered(frames) {
        match record {
            Record::Message { envelope, .. } => ids.push(envelope.id(TenantId(0))),
            Record::Begin { envelope, .. } => {
                promised += envelope.chunks() as usize;
                ids.push(envelope.id(TenantId(0)));
            }
            Record::Piece(_) => pieces += 1,
            other => panic!("{other:?}"),
        }
    }
    (ids, promised, pieces)
}

fn apply(sim: &mut Sim, step: Step, n: usize, publishers: &[SessionId; 2], hostile: &mut [SessionId; 2]) {
    match step {
        Step::Publish { node, size, comp, ack } => {
            for frame in message(size, n, comp, ack) {
                sim.client_sends(node, publishers[node], frame);
            }
        }
        Step::Client { node, frame, granted } => {
            let grant = granted.then(|| sim.grant());
            sim.client_says(node, hostile[node], frame, grant);
        }
        Step::Illegal { node, frame } => {
            if let Some(session) = link(sim, node) {
                sim.client_says(node, session, frame, None);
            }
        }
        Step::Shed { node, shedding } => sim.nodes[node].handle_readiness(Report::default(), shedding),
        Step::Redial { node } => {
            sim.cut(0, 1);
            sim.dial(node, 1 - node);
        }
        Step::RefuseLink { node, status } => {
            if let Some(session) = link(sim, node) {
                sim.refuse(node, session, status);
            }
        }
        Step::RefuseClient { node, status, stalled } => {
            sim.stall(node, hostile[node], stalled);
            sim.refuse(node, hostile[node], status);
            hostile[node] = sim.client(node);
        }
        Step::Leave { node } => {
            sim.leave(node, hostile[node]);
            hostile[node] = sim.client(node);
        }
        Step::Run(ms) => sim.run(ms),
    }
}

/// The session between the daemons, as one of them has it.
fn link(sim: &Sim, node: usize) -> Option<SessionId> {
    sim.nodes[node].links.values().next().copied()
}

/// Time passes, and a daemon without a peer dials it, as its shell does.
fn settle(sim: &mut Sim, seconds: u64) {
    for _ in 0..seconds {
        if let Some(alone) = (0..2).find(|node| link(sim, *node).is_none()) {
            sim.dial(alone, 1 - alone);
        }
        sim.run(1_000);
    }
}

/// Ends it all. A daemon that stopped has no session left at once.
fn end(sim: &mut Sim, ending: Ending) {
    match ending {
        Ending::Stop { node, drain } => {
            if drain {
                sim.nodes[node].handle_drain();
                sim.run(1_000);
            }
            sim.nodes[node].handle_finish();
            sim.run(1);
            assert!(sim.nodes[node].is_deserted(), "{} sessions outlive their daemon", sim.nodes[node].sessions.len());
        }
        Ending::Refuse { node } => {
            let session = link(sim, node).unwrap();
            sim.refuse(node, session, Status::BadRequest);
        }
        Ending::Silence => sim.blackhole(0, 1),
    }
    // A ping after a third of it, and as much again for its answer.
    sim.run(sim.nodes[0].config.idle_ms(None) * 3 / 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_accepted_is_lost_and_a_close_closes(
        steps in steps(),
        ending in endings(),
        half_open in any::<bool>(),
    ) {
        let mut sim = Sim::new(2);
        sim.full_mesh();
        let subscribers = [sim.subscriber(0), sim.subscriber(1)];
        let publishers = [sim.publisher(0), sim.publisher(1)];
        let mut hostile = [sim.client(0), sim.client(1)];
        let mut published = [0, 0];
        for (n, step) in steps.into_iter().enumerate() {
            if let Step::Publish { node, .. } = &step {
                published[*node] += 1;
            }
            apply(&mut sim, step, n, &publishers, &mut hostile);
        }
        sim.nodes.iter_mut().for_each(|node| node.handle_readiness(Report::default(), false));
        settle(&mut sim, 12);

        let mut accepted = BTreeSet::new();
        for (node, publisher) in publishers.into_iter().enumerate() {
            let frames = sim.client_frames(node, publisher);
            let answers: Vec<&Frame> = frames[1..].iter().filter(|frame| frame.code != 206).collect();
            prop_assert_eq!(answers.len(), published[node], "one answer a message");
            let taken = answers.iter().filter(|frame| frame.code == 200);
            accepted.extend(taken.map(|frame| MessageId(frame.payload[..].try_into().unwrap())));
        }
        for (node, subscriber) in subscribers.into_iter().enumerate() {
            let (ids, promised, pieces) = delivered_ids(&sim.client_frames(node, subscriber));
            let distinct: BTreeSet<MessageId> = ids.iter().copied().collect();
            prop_assert!(accepted.is_subset(&distinct), "daemon {} lost {} of {}", node, accepted.difference(&distinct).count(), accepted.len());
            prop_assert_eq!((distinct.len(), pieces), (ids.len(), promised), "each once, and whole");
        }

        prop_assert_eq!(sim.unclosed(), 0, "what is refused and read is closed");
        sim.half_open = half_open;
        end(&mut sim, ending);
        for node in &sim.nodes {
            prop_assert!(node.is_deserted() && node.links.is_empty() && node.subscriptions.is_empty());
            prop_assert_eq!(node.quota.inflight(), 0);
        }
    }
}
