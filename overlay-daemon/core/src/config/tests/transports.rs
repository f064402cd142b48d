//! Peers by each transport, and the settings that are a transport's own.

use super::*;

const ONION: &str = "bbcmkwiazzvvvzqasb2i3nzlmxtj6ydzzmqzhzgj5kszhd42ee4dcyad.onion";

/// An onion service is reached by Tor alone, and its address is whole; what is not an onion
/// service may be reached by Tor too.
#[test]
fn a_peer_by_tor() {
    let with =
        |address: &str, transport: &str| PEERS.replacen("\"[::1]:9501\"", &format!("\"{address}\"\n{transport}"), 1);
    let tor = "transport = \"Tor\"";
    let (service, subdomain) = (format!("{ONION}:9500"), format!("a.b.{ONION}:9500"));
    for address in [service.as_str(), &subdomain, "h.example:9500", "192.0.2.1:9500", "[::1]:9501"] {
        let read = peers(&with(address, tor)).unwrap();
        assert_eq!((read.peers[0].transport, read.peers[1].transport), (Transport::Tcp, Transport::Tor));
        assert_eq!(read.peers[1].address, address);
        assert_eq!(peers(&read.to_toml().unwrap()).unwrap(), read);
    }
    assert!(!peers(PEERS).unwrap().to_toml().unwrap().contains("transport"), "older daemons read it");

    let only = format!("must be Tor, by which alone {service} is reached");
    let whole = "must name an onion service of version 3: 56 of a-z and 2-7, the last a d, before .onion";
    let bad = format!("line 10: peer[1].address: {whole}");
    for (text, want) in [
        (with(&service, ""), format!("line 8: peer[1].transport: {only}")),
        (with(&service, "transport = \"TCP\""), format!("line 11: peer[1].transport: {only}")),
        (with("facebookcorewwwi.onion:9500", tor), bad.clone()),
        (with(&service.replacen("d.onion", "e.onion", 1), tor), bad.clone()),
        (with(&service.to_uppercase(), tor), bad.clone()),
        (with(&service.replacen('b', "1", 1), tor), bad.clone()),
        (with(".onion:1", tor), bad.clone()),
        (
            with(&service, "transport = \"tor\""),
            "line 11: peer[1].transport: must be TCP or QUIC or Tor, is \"tor\"".to_owned(),
        ),
    ] {
        assert_eq!(report(peers(&text)), [want], "{text}");
    }
    assert_eq!(report(peers(&with("short.onion:1", ""))).len(), 2, "both are told");
}

/// Each transport has an idle timeout of its own, Tor's longer; the Unix socket has TCP's.
#[test]
fn timeouts_are_the_transports() {
    let config = daemon(C6).unwrap();
    let idle = [Some(Transport::Tcp), None, Some(Transport::Tor)].map(|transport| config.idle_ms(transport));
    assert_eq!(idle, [15_000, 15_000, 30_000]);
    let (tor, tcp) = (&config.tor, &config.overlay);
    assert!(tor.handshake_timeout_ms > tcp.handshake_timeout_ms && tor.read_timeout_ms > tcp.read_timeout_ms);
    assert!(tor.write_timeout_ms > tcp.write_timeout_ms);
    let read = [Transport::Tcp, Transport::Quic, Transport::Tor].map(|transport| config.read_ms(Some(transport)));
    assert_eq!(read, [5_000, 5_000, 15_000]);
    assert!(tor.idle_timeout_ms / 3 < tcp.idle_timeout_ms, "pings keep a session whose acceptor has TCP's");
}

/// A peer is dialled over TCP unless it says otherwise, and over QUIC only where the other file
/// has the key exchange that QUIC takes.
#[test]
fn a_peer_over_quic_takes_the_hybrid_key_exchange() {
    let text = format!("{PEERS}transport = \"QUIC\"\n");
    let read = peers(&text).unwrap();
    assert_eq!(read.peers.iter().map(|peer| peer.transport).collect::<Vec<_>>(), [Transport::Tcp, Transport::Quic]);
    assert_eq!(peers(&read.to_toml().unwrap()).unwrap(), read);
    let mut beside = daemon(C6).unwrap();
    assert_eq!(peers_beside(&text, Some(&beside)).unwrap(), read);
    beside.tls.key_exchange = KeyExchange::PreferHybrid;
    assert!(peers_beside(PEERS, Some(&beside)).is_ok());
    let refused = report(peers_beside(&text, Some(&beside)));
    assert!(
        refused.len() == 1
            && refused[0].starts_with("line 12: peer[1].transport: must be TCP, or tls.key_exchange RequireHybrid: "),
        "{refused:?}"
    );
    let wrong = report(peers(&text.replace("QUIC", "quic")));
    assert_eq!(wrong, ["line 12: peer[1].transport: must be TCP or QUIC or Tor, is \"quic\""]);
}
