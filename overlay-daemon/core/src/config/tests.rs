//! What a configuration file may say, and what is said about one that is wrong.

use proptest::prelude::*;

use super::*;

mod transports;

/// C-6 as the requirement prints it, and the files that every daemon needs.
const C6: &str = r#"[overlay]
listen        = "127.0.0.1:9500"
per_peer_inflight = 32
per_peer_rps      = 200
idle_timeout_ms   = 15000
read_timeout_ms   = 5000
write_timeout_ms  = 5000
amnesia           = true   # enforced for Micronode

[observability]
metrics = "127.0.0.1:9600"

[tls]
certificate = "/etc/overlay/tls/tls.crt"
key = "/etc/overlay/tls/tls.key"
ca = "/etc/overlay/tls/ca.crt"

[token]
keys = "/etc/overlay/token/token-keys.json"
file = "/etc/overlay/token/peer"

[unix]
socket = "/run/overlay/overlay.sock"
"#;

const PEERS: &str = r#"name = "mesh-0"

[[peer]]
name = "mesh-1"
address = "mesh-1.mesh-peers.default.svc:9500"
identity = "spiffe://overlay.local/ns/default/overlaynode/mesh"

[[peer]]
name = "mesh-2"
address = "[::1]:9501"
identity = "spiffe://overlay.local/ns/default/overlaynode/mesh"
"#;

fn defaults(profile: Profile) -> DaemonConfig {
    let tls = Tls {
        certificate: "/etc/overlay/tls/tls.crt".into(),
        key: "/etc/overlay/tls/tls.key".into(),
        ca: "/etc/overlay/tls/ca.crt".into(),
        key_exchange: KeyExchange::RequireHybrid,
    };
    let token = Token { keys: "/etc/overlay/token/token-keys.json".into(), file: "/etc/overlay/token/peer".into() };
    let (listen, metrics) = ("127.0.0.1:9500".parse().unwrap(), "127.0.0.1:9600".parse().unwrap());
    DaemonConfig::with_defaults(profile, listen, metrics, tls, token, "/run/overlay/overlay.sock".into())
}

fn report<T: std::fmt::Debug>(result: Result<T, Vec<ConfigError>>) -> Vec<String> {
    result.expect_err("the text should be refused").iter().map(ToString::to_string).collect()
}

/// C-6: the sketch of the requirement parses, and is the Micronode's defaults (I-9).
#[test]
fn the_sketch_is_the_defaults_of_a_micronode() {
    assert_eq!(daemon(C6).unwrap(), defaults(Profile::Micronode));
}

/// P-3: defaults follow the profile, whatever else is written.
#[test]
fn defaults_follow_the_profile() {
    let files = &C6[C6.find("[tls]").unwrap()..];
    let text = format!("[overlay]\nlisten = \"127.0.0.1:9500\"\nprofile = \"Macronode\"\n{files}");
    assert_eq!(daemon(&text).unwrap(), defaults(Profile::Macronode));
    let small = daemon(&text.replace("profile", "inflight = 16\nrps = 40\nprofile")).unwrap();
    assert_eq!((small.overlay.per_peer_inflight, small.overlay.per_peer_rps), (16, 40));
    let early = daemon(&format!("{text}[readiness]\nunready_at_percent = 50\n")).unwrap().readiness;
    assert_eq!((early.shed_at_percent, early.recover_at_percent), (50, 49));
}

/// One line changed at a time: the line, the field and the fix that are named.
#[test]
fn what_is_wrong_is_named() {
    let more = |lines: &str| format!("{C6}{lines}");
    let instead = |from: &str, to: &str| C6.replacen(from, to, 1);
    let table = [
        (more("[gossip]\nfanout = 900"), "line 25: gossip.fanout: must be 1 to 64, is 900"),
        (
            instead("amnesia           = true", "decompression_ratio = 11"),
            "line 8: overlay.decompression_ratio: must be 1 to 10, is 11",
        ),
        (more("[gossip]\nfanout = -1"), "line 25: gossip.fanout: must be 1 to 64, is -1"),
        (more("[gossip]\nfanout = \"6\""), "line 25: gossip.fanout: must be a whole number, is a string"),
        (more("[gossip]\nfanout = 6.5"), "line 25: gossip.fanout: must be a whole number, is a float"),
        (
            more("[gossip]\nmax_hops = 99999999999999999999999"),
            "line 25: gossip.max_hops: must be 1 to 64, is 99999999999999999999999",
        ),
        (more("[gossip]\nfan_out = 6"), "line 25: gossip.fan_out: is not a known field; did you mean fanout?"),
        (more("[gosip]\nfanout = 6"), "line 24: gosip: is not a known field; did you mean gossip?"),
        (more("[drain]\nwhen = 1"), "line 25: drain.when: is not a known field; known here: delay_ms, timeout_ms"),
        (format!("gossip = 3\n{C6}"), "line 1: gossip: must be a table, is an integer"),
        (format!("format = 2\n{C6}"), "line 1: format: must be 1, is 2"),
        (
            instead("amnesia           = true", "amnesia = \"yes\""),
            "line 8: overlay.amnesia: must be true or false, is a string",
        ),
        (
            instead("amnesia           = true", "amnesia = false"),
            "line 8: overlay.amnesia: must be true: profile Micronode never writes to a disk",
        ),
        (
            instead("amnesia           = true", "profile = \"micronode\""),
            "line 8: overlay.profile: must be Micronode or Macronode, is \"micronode\"",
        ),
        (
            instead("127.0.0.1:9500", "127.0.0.1:70000"),
            "line 2: overlay.listen: must be IP:PORT, is \"127.0.0.1:70000\"",
        ),
        (
            instead("127.0.0.1:9600", "127.0.0.1:9500"),
            "line 11: observability.metrics: must differ from overlay.listen",
        ),
        (
            instead("per_peer_inflight = 32", "per_peer_inflight = 513"),
            "line 3: overlay.per_peer_inflight: must be at most overlay.inflight (512), is 513",
        ),
        (
            instead("per_peer_rps      = 200", "per_peer_rps = 200\nrps = 100"),
            "line 4: overlay.per_peer_rps: must be at most overlay.rps (100), is 200",
        ),
        (
            instead("idle_timeout_ms   = 15000", "idle_timeout_ms = 1"),
            "line 5: overlay.idle_timeout_ms: must be 300 to 3600000, is 1",
        ),
        (
            instead("idle_timeout_ms   = 15000", "tenants = []"),
            "line 5: overlay.tenants: must list 1 to 64 of them, lists 0",
        ),
        (
            instead("idle_timeout_ms   = 15000", "tenants = [\"0\", 7]"),
            "line 5: overlay.tenants[1]: must be a string: 0, a UUID, a ULID or 32 hexadecimal digits, is an integer",
        ),
        (
            instead("idle_timeout_ms   = 15000", "tenants = [\"0\", \"0\"]"),
            "line 5: overlay.tenants[1]: is listed twice",
        ),
        (
            instead("amnesia           = true", "listen_quic = \"9500\""),
            "line 8: overlay.listen_quic: must be IP:PORT, is \"9500\"",
        ),
        (
            instead("amnesia           = true", "listen_quic = \"127.0.0.1:9500\"")
                .replace("[tls]", "[tls]\nkey_exchange = \"PreferHybrid\""),
            "line 14: tls.key_exchange: must be RequireHybrid with overlay.listen_quic: QUIC does not tell what was agreed on, \
             and is known to be hybrid only where nothing else is offered",
        ),
        (instead("key = \"/etc/overlay/tls/tls.key\"\n", ""), "line 13: tls.key: is required"),
        (instead("/etc/overlay/tls/tls.key", ""), "line 15: tls.key: must be a path, is \"\""),
        (
            instead("/run/overlay/overlay.sock", &"x".repeat(108)),
            "line 23: unix.socket: must be at most 107 bytes, is 108",
        ),
        (more("[tor]\nsocks = \"9050\""), "line 25: tor.socks: must be HOST:PORT, is \"9050\""),
        (
            more("[tor]\nsocks = \"a.onion:9050\""),
            "line 25: tor.socks: must be where a SOCKS5 proxy listens, which no onion service is",
        ),
        (more("[tor]\nlisten = \"tor:1\""), "line 25: tor.listen: must be IP:PORT, is \"tor:1\""),
        (more("[tor]\nlisten = \"127.0.0.1:9500\""), "line 25: tor.listen: must differ from overlay.listen"),
        (more("[tor]\nlisten = \"127.0.0.1:9600\""), "line 25: tor.listen: must differ from observability.metrics"),
        (more("[tor]\nidle_timeout_ms = 299"), "line 25: tor.idle_timeout_ms: must be 300 to 3600000, is 299"),
        (more("allow_uids = [-1]"), "line 24: unix.allow_uids[0]: must be 0 to 4294967295, is -1"),
        (
            more("[readiness]\nshed_at_percent = 95"),
            "line 25: readiness.shed_at_percent: must be at most readiness.unready_at_percent (90), is 95",
        ),
        (
            more("[readiness]\nrecover_at_percent = 80"),
            "line 25: readiness.recover_at_percent: must be less than readiness.shed_at_percent (80), is 80",
        ),
        (
            more("[gossip]\nstore_bytes = 67108865"),
            "line 25: gossip.store_bytes: must be at most half of overlay.memory_bytes (67108864)",
        ),
        (instead("[tls]", "[tls]\nca = \"/ca\""), "line 17: duplicate key"),
        (instead("= 32", "= "), "line 3: string values must be quoted, expected literal string"),
    ];
    for (text, want) in table {
        assert_eq!(report(daemon(&text)), [want], "{text}");
    }
}

/// Every error at once, in the order of the lines; an empty file lacks what has no default.
#[test]
fn every_error_is_reported_at_once() {
    let text = "[overlay]\nrps = 0\ninflight = true\n[gossip]\nfanout = 900\nmax_hop = 1\n[nothing]\n[tls]\nkey = 3\n";
    assert_eq!(
        report(daemon(text)),
        [
            "line 1: overlay.listen: is required",
            "line 1: token.keys: is required",
            "line 1: token.file: is required",
            "line 1: unix.socket: is required",
            "line 2: overlay.rps: must be 1 to 10000000, is 0",
            "line 3: overlay.inflight: must be a whole number, is a boolean",
            "line 5: gossip.fanout: must be 1 to 64, is 900",
            "line 6: gossip.max_hop: is not a known field; did you mean max_hops?",
            "line 7: nothing: is not a known field; known here: format, overlay, observability, tor, tls, token, unix, gossip, readiness, drain",
            "line 8: tls.certificate: is required",
            "line 8: tls.ca: is required",
            "line 9: tls.key: must be a string: a path, is an integer",
        ]
    );
    let required =
        ["overlay.listen", "tls.certificate", "tls.key", "tls.ca", "token.keys", "token.file", "unix.socket"];
    assert_eq!(report(daemon("")), required.map(|field| format!("line 1: {field}: is required")));
}

/// A line that is not TOML hides neither the other errors nor invents any of its own.
#[test]
fn broken_syntax_does_not_hide_the_rest() {
    let text = C6.replacen("= 32", "= ", 1).replacen("= 15000", "= 1", 1);
    assert_eq!(
        report(daemon(&text)),
        [
            "line 3: string values must be quoted, expected literal string",
            "line 5: overlay.idle_timeout_ms: must be 300 to 3600000, is 1",
        ]
    );
}

#[test]
fn a_peers_file() {
    let read = peers(PEERS).unwrap();
    assert_eq!((read.name.as_str(), read.peers.len()), ("mesh-0", 2));
    assert_eq!(peers(&read.to_toml().unwrap()).unwrap(), read);
    let alone = peers("name = \"mesh-0\"").unwrap();
    assert_eq!(peers(&alone.to_toml().unwrap()).unwrap(), alone);
    let many: String = (0..=MAX_PEERS)
        .map(|n| {
            format!("[[peer]]\nname = \"p-{n}\"\naddress = \"h:1\"\nidentity = \"spiffe://e/ns/a/overlaynode/m\"\n")
        })
        .collect();
    let table = [
        (PEERS.replacen("name = \"mesh-0\"\n", "", 1), "line 1: name: is required"),
        (PEERS.replacen("mesh-2", "mesh-1", 1), "line 9: peer[1].name: is the name of another peer too"),
        (PEERS.replacen("mesh-2", "mesh-0", 1), "line 9: peer[1].name: is this daemon's own name"),
        (
            PEERS.replacen("\"mesh-2\"", "\"other\"", 1),
            "line 9: peer[1].name: \"other\" is taken: it is what metrics call the peers that are not configured",
        ),
        (
            PEERS.replacen("mesh-2", "Mesh", 1),
            "line 9: peer[1].name: must be 1 to 63 of a-z, 0-9, '.' and '-', beginning and ending with a letter or digit, is \"Mesh\"",
        ),
        (PEERS.replacen("[::1]:9501", "::1:9501", 1), "line 10: peer[1].address: must be HOST:PORT, is \"::1:9501\""),
        (PEERS.replacen("[::1]:9501", "h:0", 1), "line 10: peer[1].address: must be HOST:PORT, is \"h:0\""),
        (PEERS.replacen("address = \"[::1]:9501\"\n", "", 1), "line 8: peer[1].address: is required"),
        (
            PEERS.replacen("/overlaynode/", "/", 1),
            "line 6: peer[0].identity: must be spiffe://TRUST-DOMAIN/ns/NAMESPACE/overlaynode/NAME, optionally followed by /pod/POD, is \"spiffe://overlay.local/ns/default/mesh\"",
        ),
        (PEERS.replacen("address", "adress", 1), "line 5: peer[0].adress: is not a known field; did you mean address?"),
        (format!("name = \"a\"\n{many}"), "line 2: peer: must list 0 to 64 of them, lists 65"),
        ("name = \"a\"\npeer = [1]\n".into(), "line 2: peer[0]: must be a table, is an integer"),
    ];
    for (text, want) in table {
        assert!(report(peers(&text)).contains(&want.to_owned()), "{:?}\n{want}", report(peers(&text)));
    }
}

fn caps() -> impl Strategy<Value = (u32, u32)> {
    (1..=1_000_000_u32).prop_flat_map(|total| (Just(total), 1..=total))
}

fn percents() -> impl Strategy<Value = (u8, u8, u8)> {
    (1..=100_u8)
        .prop_flat_map(|unready| (Just(unready), 1..=unready))
        .prop_flat_map(|(unready, shed)| (Just(unready), Just(shed), 0..shed))
}

prop_compose! {
    fn configuration()(
        macronode: bool, amnesia: bool, quic: bool, tenants in proptest::collection::btree_set(any::<u128>(), 1..5),
        inflight in caps(), rps in caps(), percents in percents(), ms in 300..600_000_u64, bytes in (1_u64 << 20)..(16 << 30),
        uids in proptest::collection::btree_set(any::<u32>(), 0..5), port in 1..=9_499_u16, key in "[ -~]{1,40}",
    ) -> DaemonConfig {
        let mut config = defaults(if macronode { Profile::Macronode } else { Profile::Micronode });
        config.overlay.amnesia = amnesia || !macronode;
        config.overlay.tenants = tenants.into_iter().map(TenantId).collect();
        (config.overlay.inflight, config.overlay.per_peer_inflight) = inflight;
        (config.overlay.rps, config.overlay.per_peer_rps) = rps;
        (config.readiness.unready_at_percent, config.readiness.shed_at_percent, config.readiness.recover_at_percent) = percents;
        config.overlay.read_timeout_ms = ms;
        config.tor.handshake_timeout_ms = ms;
        config.tor.listen = macronode.then(|| std::net::SocketAddr::from(([127, 0, 0, 1], 9_500)));
        config.drain.delay_ms = ms;
        config.gossip.store_bytes = bytes;
        config.overlay.memory_bytes = (2 * bytes).max(8 << 20);
        config.overlay.max_pending = u32::from(port);
        config.unix.allow_uids = uids.into_iter().collect();
        config.overlay.listen.set_port(port);
        config.tls.key = key.into();
        config.overlay.listen_quic = quic.then_some(config.overlay.listen);
        config.tls.key_exchange = if quic { KeyExchange::RequireHybrid } else { KeyExchange::Classical };
        config.observability.log_level = LogLevel::Trace;
        config
    }
}

proptest! {
    /// The effective configuration, printed, is a configuration file that means the same.
    #[test]
    fn what_is_written_reads_back(config in configuration()) {
        prop_assert_eq!(daemon(&config.to_toml().unwrap()), Ok(config));
    }

    /// No text panics, and an error's line is a line of the text.
    #[test]
    fn any_text_is_answered(text in "[ -~\n\"=\\[\\]]{0,200}") {
        for error in daemon(&text).err().into_iter().chain(peers(&text).err()).flatten() {
            prop_assert!((1..=text.matches('\n').count() + 1).contains(&error.line), "{error}");
        }
    }
}

/// Which settings a running daemon takes up: all of these, and none besides.
#[test]
fn live_settings() {
    type Change = fn(&mut DaemonConfig);
    let base = daemon(C6).unwrap();
    let live: &[(&str, Change)] = &[
        ("max_sessions", |c| c.overlay.max_sessions = 7),
        ("max_handshakes_in_flight", |c| c.overlay.max_handshakes_in_flight = 7),
        ("max_pending", |c| c.overlay.max_pending = 7),
        ("memory_bytes", |c| c.overlay.memory_bytes = 256 << 20),
        ("inflight", |c| c.overlay.inflight = 7),
        ("rps", |c| c.overlay.rps = 7),
        ("per_peer_inflight", |c| c.overlay.per_peer_inflight = 7),
        ("per_peer_rps", |c| c.overlay.per_peer_rps = 7),
        ("decompression_ratio", |c| c.overlay.decompression_ratio = 7),
        ("read_timeout_ms", |c| c.overlay.read_timeout_ms = 700),
        ("socks", |c| c.tor.socks = "tor:9050".into()),
        ("idle_timeout_ms", |c| c.tor.idle_timeout_ms = 700),
        ("fanout", |c| c.gossip.fanout = 7),
        ("store_bytes", |c| c.gossip.store_bytes = 7 << 20),
        ("min_peers", |c| c.readiness.min_peers = 7),
        ("key_exchange", |c| c.tls.key_exchange = KeyExchange::Classical),
        ("log_level", |c| c.observability.log_level = LogLevel::Trace),
    ];
    let restart: &[(&str, Change)] = &[
        ("listen", |c| c.overlay.listen.set_port(7)),
        ("tor.listen", |c| c.tor.listen = Some(c.overlay.listen)),
        ("listen_quic", |c| c.overlay.listen_quic = Some(c.overlay.listen)),
        ("tenants", |c| c.overlay.tenants = vec![TenantId(7)]),
        ("amnesia", |c| c.overlay.amnesia = false),
        ("profile", |c| c.overlay.profile = Profile::Macronode),
        ("metrics", |c| c.observability.metrics.set_port(7)),
        ("log_format", |c| c.observability.log_format = LogFormat::Text),
        ("certificate", |c| c.tls.certificate = "other".into()),
        ("file", |c| c.token.file = "other".into()),
        ("socket", |c| c.unix.socket = "other".into()),
        ("delay_ms", |c| c.drain.delay_ms = 7),
    ];
    for (changes, is_live) in [(live, true), (restart, false)] {
        for (name, change) in changes {
            let mut new = base.clone();
            change(&mut new);
            assert_ne!(new, base, "{name}");
            assert_eq!(base.with_live(&new) == new, is_live, "{name}");
            assert_eq!(base.restart_hash() == new.restart_hash(), is_live, "{name}");
            assert_ne!(base.hash(), new.hash(), "{name}");
            let waiting = base.with_live(&new).differences(&new);
            assert!(waiting.len() == usize::from(!is_live) && waiting.iter().all(|w| w.contains(name)), "{waiting:?}");
        }
    }
}

/// A peer keeps its place for as long as it is configured; a free place is used again.
#[test]
fn places_are_kept() {
    let peer = |name: &str, address: &str| Peer {
        name: name.into(),
        address: address.into(),
        identity: "spiffe://td/ns/a/overlaynode/b".parse().unwrap(),
        transport: Transport::Tcp,
    };
    let names = |places: &Places| places.iter().map(|(place, p)| (place, p.name.clone())).collect::<Vec<_>>();
    let mut places = Places::new(&[peer("a", "a:1"), peer("b", "b:1"), peer("c", "c:1")]);
    assert_eq!(places.update(&[peer("c", "c:1"), peer("a", "a:1")]), [1]);
    assert_eq!(names(&places), [(0, "a".into()), (2, "c".into())]);
    assert_eq!(places.update(&[peer("a", "a:2"), peer("c", "c:1"), peer("d", "d:1"), peer("e", "e:1")]), [0, 1, 3]);
    assert_eq!(names(&places), [(0, "a".into()), (1, "d".into()), (2, "c".into()), (3, "e".into())]);
    assert_eq!(places.update(&[peer("e", "e:1")]), [0, 1, 2]);
    assert_eq!((names(&places), places.span()), (vec![(3, "e".into())], 4));
}
