use std::path::{Path, PathBuf};

use kube::core::ObjectMeta;
use overlay_core::identity::TenantId;

use super::*;
use crate::api::{Duration, Gossip, OverlayNodeSpec, PeerTransport, Quic, StaticPeer, Tor};

fn node(edit: impl FnOnce(&mut OverlayNodeSpec)) -> OverlayNode {
    let mut spec = OverlayNodeSpec::default();
    edit(&mut spec);
    let metadata = ObjectMeta { name: Some("mesh".into()), namespace: Some("prod".into()), ..ObjectMeta::default() };
    OverlayNode { metadata, spec, status: None }
}

fn config(edit: impl FnOnce(&mut OverlayNodeSpec)) -> DaemonConfig {
    let node = node(edit);
    daemon_config(&node, &Placement::pod(&node, TlsSource::SelfManaged))
}

/// A spec of defaults is a configuration of defaults, for both profiles.
#[test]
fn defaults_are_the_daemons_own() {
    for (ours, theirs) in
        [(Profile::Micronode, config::Profile::Micronode), (Profile::Macronode, config::Profile::Macronode)]
    {
        let got = config(|spec| spec.profile = ours);
        let want = DaemonConfig::with_defaults(
            theirs,
            got.overlay.listen,
            got.observability.metrics,
            got.tls.clone(),
            got.token.clone(),
            got.unix.socket.clone(),
        );
        assert_eq!(got, want);
    }
}

#[test]
fn every_field_of_the_spec_reaches_the_configuration() {
    let got = config(|spec| {
        spec.profile = Profile::Macronode;
        spec.amnesia = false;
        spec.transports.tcp.port = 9501;
        spec.tls.key_exchange = KeyExchange::PreferHybrid;
        spec.auth.tenants = vec![TenantId(7), TenantId(0), TenantId(7)];
        spec.limits.max_sessions = Some(1);
        spec.limits.max_handshakes_in_flight = Some(2);
        spec.limits.max_pending = 3;
        spec.limits.memory = Some("16Mi".to_owned().try_into().unwrap());
        spec.limits.inflight = 100;
        spec.limits.requests_per_second = 200;
        spec.limits.per_peer_inflight = Some(5);
        spec.limits.per_peer_requests_per_second = Some(6);
        spec.limits.decompression_ratio = 4;
        spec.limits.timeouts.handshake = Duration::from_millis(101);
        spec.limits.timeouts.read = Duration::from_millis(102);
        spec.limits.timeouts.write = Duration::from_millis(103);
        spec.limits.timeouts.idle = Duration::from_millis(304);
        spec.gossip = Gossip {
            fanout: 3,
            lane_depth_frames: Some(8),
            burst_frames: Some(9),
            max_hops: Some(10),
            ..Gossip::default()
        };
        spec.gossip.dedupe.window = Duration::from_secs(11);
        spec.gossip.dedupe.entries = Some(64);
        spec.readiness.min_peers = 1;
        spec.readiness.peer_loss_grace = Duration::from_secs(12);
        spec.readiness.shed_at_percent = 13;
        spec.readiness.unready_at_percent = 14;
        spec.readiness.recover_at_percent = 5;
        spec.drain.delay = Duration::from_secs(15);
        spec.drain.timeout = Duration::from_secs(16);
        spec.logging.level = LogLevel::Trace;
        spec.logging.format = LogFormat::Text;
    });
    let o = &got.overlay;
    assert_eq!((o.profile, o.amnesia, o.listen.port()), (config::Profile::Macronode, false, 9501));
    assert_eq!(o.tenants, [TenantId(7), TenantId(0)]);
    assert_eq!((o.max_sessions, o.max_handshakes_in_flight, o.inflight, o.rps), (1, 2, 100, 200));
    assert_eq!((o.max_pending, o.memory_bytes, got.gossip.store_bytes), (3, 16 << 20, 8 << 20));
    assert_eq!((o.per_peer_inflight, o.per_peer_rps, o.decompression_ratio), (5, 6, 4));
    assert_eq!(
        (o.handshake_timeout_ms, o.read_timeout_ms, o.write_timeout_ms, o.idle_timeout_ms),
        (101, 102, 103, 304)
    );
    assert_eq!(got.tls.key_exchange, config::KeyExchange::PreferHybrid);
    let g = &got.gossip;
    assert_eq!((g.fanout, g.lane_depth_frames, g.burst_frames, g.max_hops), (3, 8, 9, 10));
    assert_eq!((g.dedupe_window_ms, g.dedupe_entries), (11_000, 64));
    let r = &got.readiness;
    assert_eq!((r.min_peers, r.peer_loss_grace_ms), (1, 12_000));
    assert_eq!((r.shed_at_percent, r.unready_at_percent, r.recover_at_percent), (13, 14, 5));
    assert_eq!((got.drain.delay_ms, got.drain.timeout_ms), (15_000, 16_000));
    assert_eq!(got.observability.log_level, config::LogLevel::Trace);
    assert_eq!(got.observability.log_format, config::LogFormat::Text);
}

/// I-9: a peer's share never exceeds the daemon's total, whatever the profile gives it.
#[test]
fn a_low_total_narrows_a_peers_default_share() {
    for (inflight, rps, share) in [(512, 500, (32, 200)), (8, 500, (8, 200)), (512, 10, (32, 10)), (1, 1, (1, 1))] {
        let got = config(|spec| {
            spec.limits.inflight = inflight;
            spec.limits.requests_per_second = rps;
        });
        assert_eq!((got.overlay.per_peer_inflight, got.overlay.per_peer_rps), share, "{inflight}, {rps}");
    }
}

#[test]
fn min_peers_leaves_room_for_one_that_is_replaced() {
    for (replicas, asked, want) in
        [(3, 0, 0), (3, 1, 1), (3, 2, 1), (3, 9, 1), (2, 1, 0), (1, 1, 0), (0, 5, 0), (64, 500, 62), (64, 10, 10)]
    {
        let node = node(|spec| {
            spec.replicas = replicas;
            spec.readiness.min_peers = asked;
        });
        assert_eq!(min_peers(&node), want, "{replicas} replicas, {asked} asked");
        assert_eq!(effective(&node, None).min_peers, i32::try_from(want).unwrap());
    }
}

#[test]
fn everyone_is_everyone_elses_peer() {
    let node = node(|spec| spec.replicas = 3);
    let id = names::identity(&node, "overlay.local").unwrap();
    let got = peers_config(&node, 1, &id, |_| id.clone(), |other| names::pod_address(&node, other));
    assert_eq!(got.name, "mesh-1");
    let peers: Vec<_> = got.peers.iter().map(|p| (p.name.as_str(), p.address.as_str())).collect();
    assert_eq!(peers, [("mesh-0", "mesh-0.mesh-peers.prod.svc:9500"), ("mesh-2", "mesh-2.mesh-peers.prod.svc:9500"),]);
    assert!(got.peers.iter().all(|p| p.identity.as_str() == "spiffe://overlay.local/ns/prod/overlaynode/mesh"));

    let alone = peers_config(&self::node(|spec| spec.replicas = 1), 0, &id, |_| unreachable!(), |_| unreachable!());
    assert!(alone.peers.is_empty());

    let pod = |other| id.pod(&names::daemon(&node, other)).unwrap();
    let got = peers_config(&node, 1, &id, pod, |other| names::pod_address(&node, other));
    assert!(got.peers.iter().all(|p| p.identity.as_str() == format!("{id}/pod/{}", p.name)));
}

/// Over QUIC peers are dialled where QUIC is accepted; TCP goes on being accepted, and UDP only
/// where it was asked for.
#[test]
fn peers_over_quic_are_dialled_at_its_port() {
    let node = node(|spec| {
        spec.replicas = 2;
        spec.transports.quic = Quic { enabled: true, port: 9600 };
        spec.peers.transport = PeerTransport::Quic;
    });
    let id = names::identity(&node, "overlay.local").unwrap();
    let got = peers_config(&node, 0, &id, |_| id.clone(), |other| names::pod_address(&node, other));
    let got: Vec<_> = got.peers.iter().map(|p| (p.address.as_str(), p.transport)).collect();
    assert_eq!(got, [("mesh-1.mesh-peers.prod.svc:9600", Transport::Quic)]);
    let config = daemon_config(&node, &Placement::pod(&node, TlsSource::SelfManaged)).overlay;
    assert_eq!(config.listen.to_string(), "0.0.0.0:9500");
    assert_eq!(config.listen_quic.map(|quic| quic.to_string()), Some("0.0.0.0:9600".to_owned()));
    assert_eq!(self::config(|spec| spec.transports.quic.port = 7).overlay.listen_quic, None);
}

/// Who is no replica is every replica's peer, of the same identity whatever the replicas' own; Tor
/// is set up where it is enabled, and then as the spec has it.
#[test]
fn static_peers_and_tor() {
    let onion = "bbcmkwiazzvvvzqasb2i3nzlmxtj6ydzzmqzhzgj5kszhd42ee4dcyad.onion:9500";
    let peer =
        |name: &str, address: &str, transport| StaticPeer { name: name.into(), address: address.into(), transport };
    let spec = |spec: &mut OverlayNodeSpec| {
        spec.replicas = 2;
        spec.peers.transport = PeerTransport::Quic;
        spec.peers.fixed = vec![peer("far", onion, Some(PeerTransport::Tor)), peer("near", "[::1]:9500", None)];
        spec.transports.tor =
            Tor { enabled: true, socks_address: "tor:9050".into(), port: Some(9501), ..Tor::default() };
        spec.transports.tor.timeouts.handshake = Duration::from_secs(90);
        spec.readiness.min_peers = 9;
    };
    let node = node(spec);
    let id = names::identity(&node, "overlay.local").unwrap();
    let pod = |other| id.pod(&names::daemon(&node, other)).unwrap();
    for ordinal in 0..2 {
        let got = peers_config(&node, ordinal, &id, pod, |other| names::pod_address(&node, other)).peers;
        let of = |at: usize| (got[at].name.as_str(), got[at].address.as_str(), got[at].transport);
        assert_eq!(
            (got.len(), of(1), of(2)),
            (3, ("far", onion, Transport::Tor), ("near", "[::1]:9500", Transport::Tcp))
        );
        assert!(got[1].identity == id && got[2].identity == id && got[0].identity != id);
    }
    assert_eq!(min_peers(&node), 2, "one of the three may be replaced");

    let tor = config(spec).tor;
    assert_eq!(
        (tor.socks.as_str(), tor.listen.map(|at| at.to_string())),
        ("tor:9050", Some("0.0.0.0:9501".to_owned()))
    );
    assert_eq!((tor.handshake_timeout_ms, tor.idle_timeout_ms), (90_000, 30_000));
    assert_eq!(
        config(|spec| spec.transports.tor.enabled = true).tor,
        config::Tor::default(),
        "defaults are the daemon's"
    );
    assert_eq!(config(|spec| spec.transports.tor.port = Some(9501)).tor, config::Tor::default(), "not enabled");
    let at = Placement::local(
        Path::new("/r"),
        Path::new("/t"),
        "127.0.0.1:1".parse().unwrap(),
        "127.0.0.1:2".parse().unwrap(),
    );
    assert_eq!(daemon_config(&node, &at).tor.listen, None);
}

#[test]
fn files_lie_where_pods_mount_them_and_where_local_puts_them() {
    let node = node(|_| {});
    let pod = daemon_config(&node, &Placement::pod(&node, TlsSource::SelfManaged));
    assert_eq!(pod.overlay.listen.to_string(), "0.0.0.0:9500");
    assert_eq!(pod.observability.metrics.to_string(), "0.0.0.0:9600");
    let paths = |c: &DaemonConfig| {
        [&c.tls.certificate, &c.tls.key, &c.tls.ca, &c.token.keys, &c.token.file, &c.unix.socket].map(PathBuf::clone)
    };
    let want = [
        "/etc/overlay/tls/tls.crt",
        "/etc/overlay/tls/tls.key",
        "/etc/overlay/tls/ca.crt",
        "/etc/overlay/token/token-keys.json",
        "/etc/overlay/token/peer",
        "/run/overlay/overlay.sock",
    ];
    assert_eq!(paths(&pod), want.map(PathBuf::from));

    let (listen, admin) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
    let at = Placement::local(Path::new("/r/prod.mesh-0"), Path::new("/r/trust"), listen, admin);
    let local = daemon_config(&node, &at);
    assert_eq!((local.overlay.listen, local.observability.metrics), (listen, admin));
    let want = [
        "/r/trust/tls.crt",
        "/r/trust/tls.key",
        "/r/trust/ca.crt",
        "/r/trust/token-keys.json",
        "/r/trust/peer",
        "/r/prod.mesh-0/overlay.sock",
    ];
    assert_eq!(paths(&local), want.map(PathBuf::from));
}

#[test]
fn the_status_tells_what_is_in_force() {
    let got = effective(&node(|spec| spec.limits.inflight = 16), Some("image:1".into()));
    assert_eq!((got.image.as_deref(), got.key_exchange), (Some("image:1"), KeyExchange::RequireHybrid));
    let l = got.limits;
    assert_eq!(
        (l.inflight, l.per_peer_inflight, l.requests_per_second, l.per_peer_requests_per_second),
        (16, 16, 500, 200)
    );
    assert_eq!((l.max_sessions, l.max_handshakes_in_flight, l.memory_bytes), (1_024, 64, 128 << 20));
    assert_eq!((l.lane_depth_frames, l.burst_frames, l.max_hops, l.dedupe_entries), (256, 256, 16, 65_536));
}
