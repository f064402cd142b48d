//! Two daemons joined in virtual time, and everything that may go on between and around them,
//! legal or not, in any order: nothing panics, nothing that was accepted is lost or comes twice,
//! and what is closed is gone.

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
    /// Time passes.
    Run(u64),
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
    let step = prop_oneof![
        4 => (0..2_usize, sizes, any::<bool>(), any::<bool>())
            .prop_map(|(node, size, comp, ack)| Step::Publish { node, size, comp, ack }),
        4 => (0..2_usize, frames(), any::<bool>()).prop_map(|(node, frame, granted)| Step::Client { node, frame, granted }),
        2 => (0..2_usize, illegal()).prop_map(|(node, frame)| Step::Illegal { node, frame }),
        1 => (0..2_usize, any::<bool>()).prop_map(|(node, shedding)| Step::Shed { node, shedding }),
        1 => (0..2_usize).prop_map(|node| Step::Redial { node }),
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

fn apply(sim: &mut Sim, step: Step, n: usize, publishers: &[SessionId; 2], hostile: &[SessionId; 2]) {
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
            let link = sim.nodes[node].links.values().next().copied();
            if let Some(session) = link {
                sim.client_says(node, session, frame, None);
            }
        }
        Step::Shed { node, shedding } => sim.nodes[node].handle_readiness(Report::default(), shedding),
        Step::Redial { node } => {
            sim.cut(0, 1);
            sim.dial(node, 1 - node);
        }
        Step::Run(ms) => sim.run(ms),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_accepted_is_lost_and_a_close_closes(steps in steps()) {
        let mut sim = Sim::new(2);
        sim.full_mesh();
        let subscribers = [sim.subscriber(0), sim.subscriber(1)];
        let publishers = [sim.publisher(0), sim.publisher(1)];
        let hostile = [sim.client(0), sim.client(1)];
        let mut published = [0, 0];
        for (n, step) in steps.into_iter().enumerate() {
            if let Step::Publish { node, .. } = &step {
                published[*node] += 1;
            }
            apply(&mut sim, step, n, &publishers, &hostile);
        }
        sim.nodes.iter_mut().for_each(|node| node.handle_readiness(Report::default(), false));
        sim.run(12_000);

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

        sim.close_all();
        for node in &sim.nodes {
            prop_assert!(node.sessions.is_empty() && node.links.is_empty() && node.subscriptions.is_empty());
            prop_assert_eq!(node.quota.inflight(), 0);
        }
    }
}
