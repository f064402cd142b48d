//! What the generator says to each server, and how it reads what comes back: the least of each
//! protocol that publishes, subscribes and counts.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use overlay_core::codec;
use overlay_core::control::Open;
use overlay_core::frame::{CHUNK, Flags, Frame};
use overlay_core::record::{Publish, pieces};
use overlay_tests::oap::{self, Offer};
use overlay_tests::trust::Authority;
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs::kx_group;

use crate::link::{Link, READ_BYTES, dial};

/// Who the generator is to the daemon.
pub(crate) const CLIENT: &str = "spiffe://overlay.test/ns/test/client/bench";
const TOPIC: &str = "bench";
/// The stream of every session.
const STREAM: u64 = 3;

/// What came.
#[derive(Debug)]
pub(crate) enum Event {
    /// A message, whose payload starts so: all of it where it is sent whole.
    Message(Bytes),
    /// A publisher's message was accepted.
    Accepted,
    /// Something else that belongs here.
    Other,
}

/// A protocol.
#[derive(Clone)]
pub(crate) enum Dialect {
    /// [`crate::floor`].
    Floor,
    /// NATS.
    Nats,
    /// OAP/1, with the token of its client.
    Oap(Bytes),
}

/// How a server is reached.
#[derive(Clone)]
pub(crate) struct Reach {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    pub(crate) dialect: Dialect,
    config: Arc<ClientConfig>,
}

impl Reach {
    /// By `authority`: with a certificate and X25519MLKEM768, but nats-server with neither.
    pub(crate) fn new(
        name: &'static str,
        address: SocketAddr,
        dialect: Dialect,
        authority: &Authority,
    ) -> Result<Self> {
        let mut offer = Offer::honest(authority.ca_der(), authority.leaf(CLIENT)?)?;
        if let Dialect::Nats = dialect {
            offer.certificate = None;
            offer.groups = vec![kx_group::X25519];
            offer.alpn.clear();
        }
        Ok(Self { name, address, dialect, config: Arc::new(offer.config()?) })
    }

    /// A session that may do anything, from the `number`th address.
    pub(crate) fn open(&self, number: u32) -> Result<Link> {
        let socket = dial(self.address, number)?;
        if let Dialect::Nats = self.dialect {
            // INFO comes in the clear, and nothing behind it before TLS: reading ahead takes nothing.
            let mut info = String::new();
            BufReader::new(&socket).read_line(&mut info)?;
            ensure!(info.starts_with("INFO "), "nats-server said {info:?}");
        }
        let mut link = Link::shake(socket, Arc::clone(&self.config))?;
        match &self.dialect {
            Dialect::Floor => {}
            Dialect::Nats => {
                link.send(b"CONNECT {\"verbose\":false,\"pedantic\":false,\"tls_required\":true,\"lang\":\"bench\"}\r\nPING\r\n")?;
                await_line(&mut link, "PONG")?;
            }
            Dialect::Oap(_) => {
                link.send(&codec::encoded(&oap::hello())?)?;
                ensure!(await_frame(&mut link)?.code == 200, "HELLO was refused");
            }
        }
        Ok(link)
    }

    /// A session that is held and does nothing.
    pub(crate) fn hold(&self, number: u32) -> Result<Link> {
        let mut link = self.open(number)?;
        if let Dialect::Floor = self.dialect {
            tell_floor(&mut link, b'h', None)?;
        }
        Ok(link)
    }

    /// A session that subscribes.
    pub(crate) fn subscribe(&self) -> Result<Link> {
        let mut link = self.open(0)?;
        match &self.dialect {
            Dialect::Floor => tell_floor(&mut link, b's', None)?,
            Dialect::Nats => {
                link.send(format!("SUB {TOPIC} 1\r\nPING\r\n").as_bytes())?;
                await_line(&mut link, "PONG")?;
            }
            Dialect::Oap(token) => start(&mut link, &Open::Subscribe { topics: vec![TOPIC.parse()?] }, token)?,
        }
        Ok(link)
    }

    /// A session that publishes messages of `size` bytes.
    pub(crate) fn publish(&self, size: usize) -> Result<Link> {
        let mut link = self.open(0)?;
        match &self.dialect {
            Dialect::Floor => tell_floor(&mut link, b'p', Some(size))?,
            Dialect::Nats => {}
            Dialect::Oap(token) => start(&mut link, &Open::Publish { topic: TOPIC.parse()? }, token)?,
        }
        Ok(link)
    }

    /// To the floor alone: it writes messages of `size` bytes for ever; `apart`, each its own
    /// record.
    pub(crate) fn take(&self, size: usize, apart: bool) -> Result<Link> {
        let mut link = self.open(0)?;
        tell_floor(&mut link, if apart { b'r' } else { b'w' }, Some(size))?;
        Ok(link)
    }
}

fn tell_floor(link: &mut Link, role: u8, size: Option<usize>) -> Result<()> {
    let mut words = vec![role];
    if let Some(size) = size {
        words.extend_from_slice(&u32::try_from(size)?.to_be_bytes());
    }
    link.send(&words)?;
    let mut room = [0; 1_024];
    while link.read.is_empty() {
        link.receive(&mut room)?;
    }
    link.read.advance(1);
    Ok(())
}

fn await_line(link: &mut Link, wanted: &str) -> Result<()> {
    let mut room = [0; 4_096];
    loop {
        link.receive(&mut room)?;
        while let Some(end) = link.read.iter().position(|byte| *byte == b'\n') {
            let line = link.read.split_to(end + 1);
            if line.starts_with(wanted.as_bytes()) {
                return Ok(());
            }
        }
    }
}

/// The next frame of a session that blocks.
pub(crate) fn await_frame(link: &mut Link) -> Result<Frame> {
    let mut room = [0; 16 * 1_024];
    loop {
        if let Some(frame) = codec::decode(&mut link.read)? {
            return Ok(frame);
        }
        link.receive(&mut room)?;
    }
}

/// Opens a stream.
pub(crate) fn start(link: &mut Link, open: &Open, token: &Bytes) -> Result<()> {
    link.send(&codec::encoded(&oap::start(STREAM, open, token.clone()))?)?;
    let code = await_frame(link)?.code;
    ensure!(code == 200, "{open:?} got {code}");
    Ok(())
}

impl Dialect {
    /// What publishes one message.
    pub(crate) fn message(&self, payload: &Bytes) -> Result<Vec<u8>> {
        Ok(match self {
            Self::Floor => payload.to_vec(),
            Self::Nats => [format!("PUB {TOPIC} {}\r\n", payload.len()).as_bytes(), payload, b"\r\n"].concat(),
            Self::Oap(_) => {
                let mut out = BytesMut::new();
                let mut put = |record: &Publish| {
                    codec::encode(&oap::request(STREAM, Flags::default(), record.encode()), &mut out)
                };
                if payload.len() <= CHUNK {
                    put(&Publish::Message(payload.clone()))?;
                } else {
                    let hash = blake3::hash(payload).into();
                    put(&Publish::Begin { size: u32::try_from(payload.len())?, hash })?;
                    pieces(payload, hash).try_for_each(|piece| put(&Publish::Piece(piece)))?;
                }
                out.to_vec()
            }
        })
    }

    /// Takes the next thing off what was read, of messages of `size` bytes.
    pub(crate) fn next(&self, read: &mut BytesMut, size: usize) -> Result<Option<Event>> {
        match self {
            Self::Floor => Ok((read.len() >= size).then(|| Event::Message(read.split_to(size).freeze()))),
            Self::Nats => next_nats(read),
            Self::Oap(_) => Ok(codec::decode(read)?.map(|frame| event_of(frame, size)).transpose()?),
        }
    }
}

fn next_nats(read: &mut BytesMut) -> Result<Option<Event>> {
    let Some(end) = read.iter().take(1_024).position(|byte| *byte == b'\n') else { return Ok(None) };
    if !read.starts_with(b"MSG ") {
        let line = read.split_to(end + 1);
        ensure!(!line.starts_with(b"-ERR"), "nats-server said {}", String::from_utf8_lossy(&line));
        return Ok(Some(Event::Other));
    }
    let line = std::str::from_utf8(&read[..end])?.trim_end();
    let size: usize = line.rsplit(' ').next().context("MSG without a size")?.parse()?;
    let whole = end + 1 + size + 2;
    if read.len() < whole {
        return Ok(None);
    }
    let mut message = read.split_to(whole).freeze();
    message.advance(end + 1);
    message.truncate(size);
    Ok(Some(Event::Message(message)))
}

/// By the kinds of `PROTOCOL.md`: 0 a message, 1 its beginning, 2 a chunk of it, 3 a gap.
fn event_of(frame: Frame, size: usize) -> Result<Event> {
    if frame.flags.has(Flags::RESP) {
        ensure!(frame.code == 200, "a message got {}: {}", frame.code, String::from_utf8_lossy(&frame.payload));
        return Ok(Event::Accepted);
    }
    let mut payload = frame.payload;
    match payload.first() {
        Some(0) => Ok(Event::Message(payload.split_off(payload.len() - size))),
        Some(1) => Ok(Event::Other),
        Some(2) => {
            let index = payload.get(33..37).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
            let last = u32::try_from(size.div_ceil(CHUNK) - 1)?;
            Ok(if index == Some(last) { Event::Message(payload) } else { Event::Other })
        }
        Some(3) => bail!("the daemon left out messages: the window is too large for its lanes"),
        other => bail!("an event of kind {other:?}"),
    }
}

/// Room for reading, one for all links.
pub(crate) fn room() -> Vec<u8> {
    vec![0; READ_BYTES]
}
