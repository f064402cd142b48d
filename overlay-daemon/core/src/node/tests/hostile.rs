//! Clients with a valid token, and peers, that use what they may against the others.

use super::*;
use crate::identity::Topic;

/// M1: subscriptions are memory. Sessions that open all the streams that they may, each with as
/// many and as long topics as there may be, are refused once the budget is used up; and what they
/// took is given back.
#[test]
fn m1_subscriptions_claim_what_they_take() {
    let mut sim = Sim::with(1, |config| {
        config.overlay.memory_bytes = 16 << 20;
        config.gossip.store_bytes = 1 << 20;
        config.overlay.per_peer_rps = 100_000;
        config.overlay.rps = 100_000;
    });
    let topics = |n: u64| -> Vec<Topic> {
        (0..64).map(|topic| format!("{n:03}-{topic:02}-{}", "x".repeat(240)).parse().unwrap()).collect()
    };
    let grant = sim.granted(sim::SIGNED_BY, |claims| claims.topics = vec!["*".into()]);
    let mut codes = Vec::new();
    let clients: Vec<SessionId> = (0..8).map(|_| sim.client(0)).collect();
    for client in &clients {
        for n in 0..200 {
            let open = Open::Subscribe { topics: topics(n) };
            let start = Frame::new(Flags::REQ | Flags::START, AppProto::PUBSUB, TenantId(0), 3 + 2 * n, json(&open));
            sim.client_starts(0, *client, start, Some(grant.clone()));
            sim.run(1);
        }
        codes.extend(sim.client_frames(0, *client).iter().skip(1).map(|frame| frame.code));
    }
    let opened = codes.iter().filter(|code| **code == 200).count();
    assert!((200..400).contains(&opened) && codes.len() == 1_600, "{opened} of {}", codes.len());
    assert!(codes.iter().all(|code| [200, 503].contains(code)));
    assert!(sim.nodes[0].memory_used() <= 16 << 20);
    let ended = Frame::new(Flags::REQ | Flags::END, AppProto::PUBSUB, TenantId(0), 3, Bytes::new());
    let before = sim.nodes[0].memory_used();
    sim.client_starts(0, clients[0], ended, None);
    sim.run(5);
    assert!(sim.nodes[0].memory_used() + 30_000 < before);
    clients.into_iter().for_each(|client| sim.nodes[0].handle_closed(client));
    assert_eq!(sim.nodes[0].memory_used(), 0);
}
