//! Real handshakes over loopback, between the daemon's own two sides. What strangers may do is in
//! `tests/attacks`.

use overlay_core::config::KeyExchange;
use overlay_core::status::Reason;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::tests::{CONFIG, keys};
use super::*;
use crate::clock::Clock;
use crate::kms::authority::{Authority, NODE};
use crate::transport::DialError;

fn listener(keys: &crate::kms::Keys, config: TransportConfig) -> QuicListener {
    let current = keys.current();
    QuicListener::bind("127.0.0.1:0".parse().unwrap(), current.quic().unwrap(), config, Clock::start()).unwrap()
}

/// Both sides know who the other is, that the key exchange is hybrid, and what carries them; what
/// was said last arrives though the stream is closed and dropped at once.
#[tokio::test]
async fn both_sides_know_each_other_and_the_last_byte_arrives() {
    let authority = Authority::new();
    let keys = keys(&authority, KeyExchange::RequireHybrid);
    let mut listener = listener(&keys, CONFIG);
    let (address, endpoints) = (listener.local_addr().unwrap().to_string(), Endpoints::default());
    let current = keys.current();
    let accept = async {
        let mut accepted = listener.accept().await.unwrap().handshake(&current).await.unwrap();
        let mut read = vec![0; 200_000];
        accepted.stream.read_exact(&mut read).await.unwrap();
        accepted.stream.write_all(&read).await.unwrap();
        accepted.stream.shutdown().await.unwrap();
        (accepted.peer.clone(), accepted.group, accepted.transport, accepted.chain.len())
    };
    let dial = async {
        let mut dialled = dial_quic(&address, &current, &CONFIG, Clock::start(), &endpoints).await.unwrap();
        dialled.stream.write_all(&vec![7; 200_000]).await.unwrap();
        let mut read = Vec::new();
        dialled.stream.read_to_end(&mut read).await.unwrap();
        assert!(read.len() == 200_000 && read.iter().all(|byte| *byte == 7), "{} bytes", read.len());
        (dialled.peer.clone(), dialled.group, dialled.transport, dialled.chain.len())
    };
    let (accepted, dialled) = tokio::join!(accept, dial);
    let want = (NODE.parse().unwrap(), KeyExchangeGroup::Hybrid, Transport::Quic, 1);
    assert_eq!((&accepted, &dialled), (&want, &want));
    endpoints.finish().await;
    listener.finish().await;
}

/// Without the hybrid key exchange there are no keys for QUIC, and nobody else's are believed.
#[tokio::test]
async fn other_policies_and_strangers_get_nowhere() {
    let authority = Authority::new();
    for policy in [KeyExchange::PreferHybrid, KeyExchange::Classical] {
        let keys = keys(&authority, policy);
        assert!(keys.current().quic().is_none(), "{policy:?}");
        let refused = dial_quic("127.0.0.1:1", &keys.current(), &CONFIG, Clock::start(), &Endpoints::default()).await;
        let refused = refused.unwrap_err();
        assert!(refused.to_string().ends_with("QUIC takes tls.key_exchange RequireHybrid"), "{refused}");
    }
    let ours = keys(&authority, KeyExchange::RequireHybrid);
    let theirs = keys(&Authority::new(), KeyExchange::RequireHybrid);
    let mut listener = listener(&ours, CONFIG);
    let (address, endpoints) = (listener.local_addr().unwrap().to_string(), Endpoints::default());
    let (ours, theirs) = (ours.current(), theirs.current());
    let accept = async { listener.accept().await.unwrap().handshake(&ours).await.unwrap_err() };
    let dial = dial_quic(&address, &theirs, &CONFIG, Clock::start(), &endpoints);
    let (accepted, dialled) = tokio::join!(accept, dial);
    assert_eq!(accepted.reason(), Some(Reason::Tls), "{accepted}");
    assert!(matches!(&dialled, Err(DialError::Handshake { .. })), "{dialled:?}");
}

/// A port where nobody listens, and a name that nobody has: named, within the deadline.
#[tokio::test(start_paused = true)]
async fn a_dial_names_the_address() {
    let keys = keys(&Authority::new(), KeyExchange::RequireHybrid);
    let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let endpoints = Endpoints::default();
    let refused = dial_quic(&closed, &keys.current(), &CONFIG, Clock::start(), &endpoints).await.unwrap_err();
    assert!(refused.to_string().contains(&closed), "{refused}");
    let refused = dial_quic("no port", &keys.current(), &CONFIG, Clock::start(), &endpoints).await.unwrap_err();
    assert!(matches!(refused, DialError::Connect { .. }), "{refused}");
}

/// P-2: who finishes its handshake and opens no stream has its turn still, and gives it up once
/// another waits: it is no session yet, and in no other account.
#[tokio::test]
async fn t1_who_opens_no_stream_keeps_its_turn_from_nobody() {
    let authority = Authority::new();
    let keys = keys(&authority, KeyExchange::RequireHybrid);
    let mut listener = listener(&keys, TransportConfig { max_handshakes_in_flight: 1, ..CONFIG });
    let (address, endpoints) = (listener.local_addr().unwrap(), Endpoints::default());
    let current = keys.current();
    let stranger = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = quinn::ClientConfig::new(current.quic().unwrap().client().clone());
    let silent = stranger.connect_with(client, address, "overlay.invalid").unwrap();
    let dial = async {
        let silent = silent.await.unwrap();
        let mut dialled = dial_quic(&address.to_string(), &current, &CONFIG, Clock::start(), &endpoints).await.unwrap();
        dialled.stream.write_all(b"hello").await.unwrap();
        (silent.closed().await, dialled)
    };
    let accept = async {
        let first = listener.accept().await.unwrap();
        let others = async { listener.accept().await.unwrap().handshake(&current).await };
        tokio::join!(first.handshake(&current), others)
    };
    let ((first, second), _kept) = tokio::join!(accept, dial);
    assert!(matches!(first, Err(HandshakeError::Crowded)) && second.is_ok(), "{first:?} {second:?}");
}
