//! Dials through proxies that misbehave, and through one that does not, over loopback: real
//! sockets and real TLS. A real Tor is for the process tests.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use overlay_core::config::KeyExchange;
use overlay_core::status::Reason;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpListener;

use super::super::tests::{CONFIG, client, keys};
use super::super::{Descriptors, HandshakeError, KeyExchangeGroup, Listener, Reply, Timing};
use super::*;
use crate::kms::authority::{Authority, NODE};

const ONION: &str = "bbcmkwiazzvvvzqasb2i3nzlmxtj6ydzzmqzhzgj5kszhd42ee4dcyad.onion:9500";

/// A port that a proxy may listen on.
async fn port() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// One SOCKS request, answered with `reply`; what was asked for, by whom.
async fn answer(stream: &mut TcpStream, reply: u8) -> (String, String) {
    let mut hello = [0; 3];
    stream.read_exact(&mut hello).await.unwrap();
    assert_eq!(hello, [5, 1, 2], "a user name is all that is offered");
    stream.write_all(&[5, 2]).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), 1);
    let user = text(stream).await;
    let _password = text(stream).await;
    stream.write_all(&[1, 0]).await.unwrap();
    let mut connect = [0; 4];
    stream.read_exact(&mut connect).await.unwrap();
    assert_eq!(connect, [5, 1, 0, 3], "a name is the proxy's to look up");
    let host = text(stream).await;
    let port = stream.read_u16().await.unwrap();
    stream.write_all(&[5, reply, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
    (user, format!("{host}:{port}"))
}

async fn text(stream: &mut TcpStream) -> String {
    let mut bytes = vec![0; usize::from(stream.read_u8().await.unwrap())];
    stream.read_exact(&mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

async fn dialled(proxy: SocketAddr, address: &str, tls: &Arc<ClientConfig>) -> Result<Connection, DialError> {
    let (proxy, isolation) = (proxy.to_string(), Isolation::new("own", "hub"));
    dial_tor(address, Via { proxy: &proxy, isolation: &isolation }, tls, &CONFIG, Clock::start()).await
}

/// TLS goes through the proxy unchanged: identities, the key exchange, and both ends know that it
/// was Tor.
#[tokio::test]
async fn a_session_by_a_proxy_is_as_safe_as_any() {
    let authority = Authority::new();
    let (server, clock) = (keys(&authority, KeyExchange::RequireHybrid), Clock::start());
    let timing = Timing::from(CONFIG).of(Transport::Tor);
    let mut listener =
        Listener::bind("127.0.0.1:0".parse().unwrap(), timing, Descriptors::of(1_024), clock).await.unwrap();
    let onion_forwards_to = listener.local_addr().unwrap();
    let (proxy, at) = port().await;
    let forward = async {
        let (mut stream, _) = proxy.accept().await.unwrap();
        let asked = answer(&mut stream, 0).await;
        let mut onward = TcpStream::connect(onion_forwards_to).await.unwrap();
        // Until either end has had enough.
        let _ended = copy_bidirectional(&mut stream, &mut onward).await;
        asked
    };
    let sessions = async {
        let tls = client(&authority, KeyExchange::RequireHybrid);
        let accept = async { listener.accept().await.unwrap().handshake(&server.current()).await };
        let (accepted, dialled) = tokio::join!(accept, dialled(at, ONION, &tls));
        for connection in [accepted.unwrap(), dialled.unwrap()] {
            assert_eq!((connection.peer.as_str(), connection.transport), (NODE, Transport::Tor));
            assert_eq!(connection.group, KeyExchangeGroup::Hybrid);
        }
    };
    let (asked, ()) = tokio::join!(forward, sessions);
    assert_eq!(asked, ("hub".to_owned(), ONION.to_owned()));

    // Whoever a proxy connects to, it is not believed without a certificate of ours.
    let foreign = keys(&Authority::new(), KeyExchange::RequireHybrid);
    let forward = async {
        let (mut stream, _) = proxy.accept().await.unwrap();
        answer(&mut stream, 0).await;
        let mut onward = TcpStream::connect(onion_forwards_to).await.unwrap();
        let _ended = copy_bidirectional(&mut stream, &mut onward).await;
    };
    let sessions = async {
        let tls = client(&authority, KeyExchange::RequireHybrid);
        let accept = async { listener.accept().await.unwrap().handshake(&foreign.current()).await };
        let (accepted, dialled) = tokio::join!(accept, dialled(at, ONION, &tls));
        assert_eq!(accepted.unwrap_err().reason(), Some(Reason::Tls));
        assert!(matches!(dialled, Err(DialError::Handshake { source: HandshakeError::Tls(_), .. })), "{dialled:?}");
    };
    tokio::join!(forward, sessions);
}

/// What went wrong is told apart: the proxy, what it says, what is behind it. Only the proxy's
/// own faults are remembered for readiness.
#[tokio::test]
async fn each_fault_names_who_is_at_fault() {
    let authority = Authority::new();
    let tls = client(&authority, KeyExchange::RequireHybrid);
    let (listener, at) = port().await;
    let told = Proxy::default();
    let problem = |dialled: &Result<Connection, DialError>| {
        told.handle_dial(dialled, Millis(1_000));
        told.problem(Millis(2_000))
    };

    for reply in [1, 4, 5, 0xf0] {
        let (_, dialled) = tokio::join!(
            async { answer(&mut listener.accept().await.unwrap().0, reply).await },
            dialled(at, ONION, &tls)
        );
        assert_eq!(problem(&dialled), None, "the proxy itself is well");
        let error = dialled.unwrap_err().to_string();
        let want = format!("the SOCKS proxy {at} (tor.socks) cannot connect to {ONION}: {}", Reply(reply));
        assert_eq!(error, want);
    }

    let faults: [(&[u8], &str); 4] = [
        (b"", "early eof"),
        (b"HTTP/1.1 400 Bad Request", "does not speak SOCKS5"),
        (&[5, 0], "takes no user name and password"),
        (&[5, 0xff], "takes no user name and password"),
    ];
    for (said, want) in faults {
        let speak = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut [0; 3]).await.unwrap();
            stream.write_all(said).await.unwrap();
        };
        let ((), dialled) = tokio::join!(speak, dialled(at, ONION, &tls));
        let reason = problem(&dialled).expect(want);
        assert!(reason.starts_with(&format!("cannot use the SOCKS proxy {at} (tor.socks): ")), "{reason}");
        assert!(reason.contains(want), "{reason}");
    }

    drop(listener);
    let dialled = dialled(at, ONION, &tls).await;
    let reason = problem(&dialled).expect("nobody listens there");
    assert!(reason.contains("refused"), "{reason}");
    assert_eq!(told.problem(Millis(1_000 + Proxy::REMEMBERED_MS)), None, "nobody has dialled since");
    told.handle_dial(&Ok::<_, DialError>(()), Millis(3_000));
    assert_eq!(told.problem(Millis(3_000)), None, "it is back");
}

/// The deadline is one for all of it: a proxy that says nothing, one that builds its circuit for
/// ever, and one behind which nobody speaks TLS. Time is paused: nothing here waits.
#[tokio::test(start_paused = true)]
async fn silence_ends_at_the_deadline() {
    let tls = client(&Authority::new(), KeyExchange::RequireHybrid);
    let (listener, at) = port().await;
    for connects in [false, true] {
        let clock = Clock::start();
        let proxy = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            if connects {
                answer(&mut stream, 0).await;
            }
            // Holds the connection, and says no more, for as long as the dialler stays.
            let _ended = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        };
        let (_, dialled) = tokio::join!(proxy, dialled(at, ONION, &tls));
        let timeout = match &dialled {
            Err(DialError::Refused { source: SocksError::Io(error), .. }) => error.kind() == ErrorKind::TimedOut,
            Err(DialError::Handshake { source: HandshakeError::Timeout, .. }) => connects,
            _ => false,
        };
        assert!(timeout, "{dialled:?}");
        assert!(clock.now().0 < 2 * u64::try_from(CONFIG.handshake.as_millis()).unwrap());
    }
}

/// No resolver ever hears of an onion service.
#[tokio::test]
async fn an_onion_address_is_not_looked_up() {
    let tls = client(&Authority::new(), KeyExchange::RequireHybrid);
    for address in [ONION, "a.ONION:1", "b.a.onion.:1"] {
        let config = TransportConfig { handshake: Duration::ZERO, ..CONFIG };
        let error = super::super::dial(address, &tls, &config, Clock::start()).await.unwrap_err();
        let want = "an onion address is reached by transport Tor alone";
        assert_eq!(error.to_string(), format!("cannot connect to {address}: {want}"));
    }
}
