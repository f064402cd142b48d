//! The client's side of SOCKS5 (RFC 1928, RFC 1929), as much of it as Tor takes: one CONNECT,
//! with a name and a password by which the proxy keeps circuits apart. No other method is
//! offered: a proxy that chose to ask for neither would put every peer on one circuit, unsaid.

use std::fmt;
use std::io;
use std::net::IpAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const VERSION: u8 = 5;
const USERNAME_PASSWORD: u8 = 2;
const AUTH_VERSION: u8 = 1;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const DOMAIN: u8 = 3;
const IPV6: u8 = 4;

/// What keeps the circuits of one peer apart from those of all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Isolation {
    user: String,
    password: String,
}

impl Isolation {
    /// Of the peer called `peer`, at the daemon `own`: several daemons may share a proxy, and
    /// have peers of the same name. Neither is a secret.
    #[must_use]
    pub fn new(own: &str, peer: &str) -> Self {
        let mut password = blake3::hash(own.as_bytes()).to_hex().to_string();
        password.truncate(32);
        Self { user: peer.to_owned(), password }
    }
}

/// Why a proxy did not connect.
#[derive(Debug, thiserror::Error)]
pub enum SocksError {
    /// It does not speak SOCKS5, or ended in the middle of it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Not SOCKS5.
    #[error("what answers does not speak SOCKS5")]
    NotSocks,
    /// It does not tell one peer from another.
    #[error("it takes no user name and password, by which circuits are kept apart")]
    NoIsolation,
    /// It could not connect: not its own fault, as a rule.
    #[error("{0}")]
    Refused(Reply),
    /// The name does not fit into a request.
    #[error("the address is not one that SOCKS5 can carry")]
    Address,
}

/// A proxy's refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply(pub u8);

impl fmt::Display for Reply {
    /// RFC 1928, section 6; from 0xF0 on Tor's socks-extensions, of a port with `ExtendedErrors`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            0x01 => "general failure",
            0x02 => "not allowed by its rules",
            0x03 => "network unreachable",
            0x04 => "host unreachable",
            0x05 => "connection refused",
            0x06 => "time to live expired",
            0x07 => "it knows no CONNECT",
            0x08 => "it does not know this type of address",
            0xf0 => "the onion service's descriptor cannot be found",
            0xf1 => "the onion service's descriptor is invalid",
            0xf2 => "the introduction to the onion service failed",
            0xf3 => "the rendezvous with the onion service failed",
            0xf4 => "the onion service asks for a client's key",
            0xf5 => "the onion service refuses the client's key",
            0xf6 => "the onion address is invalid",
            0xf7 => "the introduction to the onion service timed out",
            _ => "for a reason of its own",
        };
        write!(f, "{text} (SOCKS reply {})", self.0)
    }
}

/// Has the proxy at the other end of `stream` connect to `address` (`HOST:PORT`; a name is never
/// looked up here). What is read from `stream` after that is the other side's.
pub(super) async fn connect<S>(stream: &mut S, address: &str, isolation: &Isolation) -> Result<(), SocksError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = request(address)?;
    stream.write_all(&[VERSION, 1, USERNAME_PASSWORD]).await?;
    match read(stream).await? {
        [VERSION, USERNAME_PASSWORD] => {}
        [VERSION, _] => return Err(SocksError::NoIsolation),
        _ => return Err(SocksError::NotSocks),
    }
    stream.write_all(&credentials(isolation)?).await?;
    match read(stream).await? {
        [AUTH_VERSION, 0] => {}
        [AUTH_VERSION, _] => return Err(SocksError::NoIsolation),
        _ => return Err(SocksError::NotSocks),
    }
    stream.write_all(&request).await?;
    let [version, reply, _reserved, kind] = read(stream).await?;
    match (version, reply) {
        (VERSION, 0) => {}
        (VERSION, reply) => return Err(SocksError::Refused(Reply(reply))),
        _ => return Err(SocksError::NotSocks),
    }
    // The address that it connected from, which nobody needs, and a port.
    let rest = match kind {
        IPV4 => 4,
        IPV6 => 16,
        DOMAIN => usize::from(read::<1, _>(stream).await?[0]),
        _ => return Err(SocksError::NotSocks),
    };
    let mut bound = [0; u8::MAX as usize + 2];
    stream.read_exact(&mut bound[..rest + 2]).await?;
    Ok(())
}

async fn read<const N: usize, S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

fn credentials(isolation: &Isolation) -> Result<Vec<u8>, SocksError> {
    let mut out = vec![AUTH_VERSION];
    for text in [&isolation.user, &isolation.password] {
        out.push(short(text.len())?);
        out.extend_from_slice(text.as_bytes());
    }
    Ok(out)
}

fn request(address: &str) -> Result<Vec<u8>, SocksError> {
    let (host, port) = address.rsplit_once(':').ok_or(SocksError::Address)?;
    let port: u16 = port.parse().map_err(|_| SocksError::Address)?;
    let mut out = vec![VERSION, CONNECT, 0];
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    match literal.parse() {
        Ok(IpAddr::V4(ip)) => {
            out.push(IPV4);
            out.extend_from_slice(&ip.octets());
        }
        Ok(IpAddr::V6(ip)) => {
            out.push(IPV6);
            out.extend_from_slice(&ip.octets());
        }
        Err(_) => {
            out.extend_from_slice(&[DOMAIN, short(host.len())?]);
            out.extend_from_slice(host.as_bytes());
        }
    }
    out.extend_from_slice(&port.to_be_bytes());
    Ok(out)
}

/// A length in one byte, not 0.
fn short(len: usize) -> Result<u8, SocksError> {
    u8::try_from(len).ok().filter(|len| *len > 0).ok_or(SocksError::Address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_proxys_to_look_up() {
        let table: [(&str, &[u8]); 3] = [
            ("a.onion:9500", b"\x05\x01\x00\x03\x07a.onion\x25\x1c"),
            ("192.0.2.1:80", b"\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x50"),
            ("[::1]:80", b"\x05\x01\x00\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x00\x50"),
        ];
        for (address, want) in table {
            assert_eq!(request(address).unwrap(), want, "{address}");
        }
        for address in ["a", "a:", "a:b", "a:65536", ":1", &format!("{}:1", "a".repeat(256))] {
            assert!(matches!(request(address), Err(SocksError::Address)), "{address}");
        }
    }

    /// Each peer has circuits of its own, the same ones at every dial, and so has each daemon.
    #[test]
    fn circuits_are_a_peers_and_a_daemons() {
        let sent = |own, peer| credentials(&Isolation::new(own, peer)).unwrap();
        let first = sent("spiffe://td/ns/a/overlaynode/m m-0", "hub");
        assert!(first.starts_with(b"\x01\x03hub\x20"), "{first:?}");
        assert_eq!(first, sent("spiffe://td/ns/a/overlaynode/m m-0", "hub"));
        for other in
            [sent("spiffe://td/ns/b/overlaynode/m m-0", "hub"), sent("spiffe://td/ns/a/overlaynode/m m-0", "b")]
        {
            assert_ne!(first, other);
        }
    }

    /// Every answer that a proxy may give, and what is said of it.
    #[tokio::test]
    async fn what_a_proxy_refuses_is_named() {
        let good = b"\x05\x02\x01\x00\x05\x00\x00";
        let answer = |reply: &[u8]| [&good[..4], reply].concat();
        let table: Vec<(Vec<u8>, Result<(), &str>)> = vec![
            ([good, &b"\x01\x7f\x00\x00\x01\x25\x1c"[..]].concat(), Ok(())),
            ([good, &b"\x03\x07a.onion\x25\x1c"[..]].concat(), Ok(())),
            ([&good[..], b"\x04", &[0; 18]].concat(), Ok(())),
            (b"\x05\x00".to_vec(), Err("takes no user name")),
            (b"\x05\xff".to_vec(), Err("takes no user name")),
            (b"\x05\x02\x01\x01".to_vec(), Err("takes no user name")),
            (b"\x05\x02\x05\x00".to_vec(), Err("does not speak SOCKS5")),
            (b"\x04\x5a".to_vec(), Err("does not speak SOCKS5")),
            (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), Err("does not speak SOCKS5")),
            (answer(b"\x05\x01\x00\x01"), Err("general failure (SOCKS reply 1)")),
            (answer(b"\x05\x04\x00\x01"), Err("host unreachable (SOCKS reply 4)")),
            (answer(b"\x05\x05\x00\x01"), Err("connection refused (SOCKS reply 5)")),
            (answer(b"\x05\xf0\x00\x01"), Err("descriptor cannot be found (SOCKS reply 240)")),
            (answer(b"\x05\xf7\x00\x01"), Err("timed out (SOCKS reply 247)")),
            (answer(b"\x05\x7f\x00\x01"), Err("for a reason of its own (SOCKS reply 127)")),
            (answer(b"\x04\x00\x00\x01"), Err("does not speak SOCKS5")),
            (answer(b"\x05\x00\x00\x02"), Err("does not speak SOCKS5")),
            (answer(b"\x05\x00\x00\x01\x7f"), Err("early eof")),
            (good[..3].to_vec(), Err("early eof")),
            (Vec::new(), Err("early eof")),
        ];
        for (answers, want) in table {
            let mut proxy = tokio_test_stream(&answers);
            let got = connect(&mut proxy, "a.onion:9500", &Isolation::new("own", "peer")).await;
            match (&got, want) {
                (Ok(()), Ok(())) => assert_eq!(proxy.read_u8().await.unwrap(), b'!', "the rest is the other side's"),
                (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{answers:?}: {error}"),
                _ => panic!("{answers:?}: {got:?}, not {want:?}"),
            }
        }
    }

    /// A stream that takes everything and answers `bytes`, then, if they are a whole answer, `!`.
    fn tokio_test_stream(bytes: &[u8]) -> impl AsyncRead + AsyncWrite + Unpin {
        let whole = bytes.len() > 10 && bytes[..2] == [VERSION, USERNAME_PASSWORD];
        let said = io::Cursor::new([bytes, if whole { b"!" } else { b"" }].concat());
        tokio::io::join(said, tokio::io::sink())
    }
}
