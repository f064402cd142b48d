//! Sessions over Tor: real daemons, and a private network of real `tor` processes between them.
//! One network for all cases, torn down at the end.

mod manifest;
mod peers;
mod proxy;
mod world;

use std::process::ExitCode;

use overlay_tests::cases::{self, Case};

use world::World;

const CASES: [Case<World>; 7] = [
    ("three_daemons_become_peers_by_onion_services", peers::three_daemons_become_peers_by_onion_services),
    ("messages_flow_both_ways", peers::messages_flow_both_ways),
    ("each_peer_has_a_circuit_of_its_own", peers::each_peer_has_a_circuit_of_its_own),
    ("an_onion_address_is_no_identity", peers::an_onion_address_is_no_identity),
    ("a_killed_peer_comes_back", peers::a_killed_peer_comes_back),
    ("a_manifest_has_a_peer_by_tor", manifest::a_manifest_has_a_peer_by_tor),
    ("a_proxy_that_is_down_is_named_and_tried_again", proxy::a_proxy_that_is_down_is_named_and_tried_again),
];

fn main() -> ExitCode {
    cases::run(World::start, &CASES)
}
