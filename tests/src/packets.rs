//! QUIC version 1 by hand (RFC 9000, RFC 9001), as far as an attacker needs it: packets are made
//! and opened here over a blocking socket, TLS is rustls's. Nothing is sent again, nothing is
//! acknowledged unless its caller says so, and every byte either way is counted.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::pki_types::ServerName;
use rustls::quic::{ClientConnection, KeyChange, Keys, Secrets, Suite, Version};
use rustls::{ClientConfig, Side};

/// Bytes that a datagram with an Initial must have at least.
pub const LEAST_INITIAL: usize = 1_200;
/// Bytes of the datagrams made here at the most.
const MOST: usize = 1_400;
/// Bytes of a packet's number as it is written here, and of what proves a packet.
const NUMBER: usize = 4;
const TAG: usize = 16;
const SAMPLE: usize = 16;
/// The bit of a session packet's first byte that turns with each change of keys.
const PHASE: u8 = 0x04;
/// The client's name for the connection.
const OWN: [u8; 8] = *b"attacker";
/// What the daemon is called first is made up by each client, another one each time.
static MADE_UP: AtomicU64 = AtomicU64::new(0x6d61_6465_7570_0000);

/// The kinds of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// With keys that everybody knows.
    Initial,
    /// Before any key is agreed on.
    Early,
    /// With the handshake's keys.
    Handshake,
    /// With the session's keys.
    Session,
}

/// What came from the daemon.
#[derive(Debug, PartialEq, Eq)]
pub enum Came {
    /// It wants the address shown: [`Attacker::token`] is set.
    Retry,
    /// It closed, with this code.
    Closed(u64),
    /// Bytes of stream 0.
    Stream(Vec<u8>),
    /// What needs no answer.
    Other,
    /// Nothing within the time given.
    Nothing,
}

/// A client that does as it is told.
pub struct Attacker {
    socket: UdpSocket,
    tls: ClientConnection,
    keys: BTreeMap<Level, Keys>,
    /// What the session's next keys come from, and the bit of those in use.
    next: Option<Secrets>,
    phase: u8,
    /// The daemon's name for the connection.
    daemon: Vec<u8>,
    /// From a Retry.
    pub token: Vec<u8>,
    numbers: BTreeMap<Level, u64>,
    /// The numbers that came last without a gap, by level. The daemon leaves some out, and closes
    /// on whoever acknowledges those.
    heard: BTreeMap<Level, RangeInclusive<u64>>,
    said: BTreeMap<Level, u64>,
    hearing: BTreeMap<Level, (u64, BTreeMap<u64, Vec<u8>>)>,
    stream: (u64, BTreeMap<u64, Vec<u8>>),
    /// Bytes of UDP payload sent.
    pub sent: usize,
    /// Bytes of UDP payload that came.
    pub received: usize,
    /// Whether the handshake's keys have led to the session's.
    pub ready: bool,
}

/// The transport parameters of an honest client: its name, what it takes of stream 0, and an idle
/// timeout that does not end anything before the daemon does.
#[must_use]
pub fn parameters() -> Vec<u8> {
    let mut out = Vec::new();
    let mut put = |id: u64, value: &[u8]| {
        varint(&mut out, id);
        varint(&mut out, value.len() as u64);
        out.extend_from_slice(value);
    };
    let number = |value: u64| {
        let mut bytes = Vec::new();
        varint(&mut bytes, value);
        bytes
    };
    put(0x01, &number(60_000));
    put(0x04, &number(1 << 20));
    put(0x05, &number(1 << 20));
    put(0x0f, &OWN);
    out
}

impl Attacker {
    /// One that has sent nothing yet.
    ///
    /// # Errors
    /// TLS refuses the configuration.
    pub fn new(config: ClientConfig, parameters: Vec<u8>, daemon: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(daemon)?;
        let name = ServerName::try_from("overlay.invalid")?;
        let tls = ClientConnection::new(Arc::new(config), Version::V1, name, parameters)?;
        let mut new = Self {
            socket,
            tls,
            keys: BTreeMap::new(),
            next: None,
            phase: 0,
            daemon: MADE_UP.fetch_add(1, Ordering::Relaxed).to_be_bytes().to_vec(),
            token: Vec::new(),
            numbers: BTreeMap::new(),
            heard: BTreeMap::new(),
            said: BTreeMap::new(),
            hearing: BTreeMap::new(),
            stream: (0, BTreeMap::new()),
            sent: 0,
            received: 0,
            ready: false,
        };
        new.initial_keys()?;
        Ok(new)
    }

    fn initial_keys(&mut self) -> Result<()> {
        let keys = || anyhow::Ok(suite()?.keys(&self.daemon, Side::Client, Version::V1));
        let (initial, early) = (keys()?, keys()?);
        self.keys.insert(Level::Initial, initial);
        // Nobody has keys for early data without a ticket: these are as good as any.
        self.keys.insert(Level::Early, early);
        Ok(())
    }

    /// The bytes that TLS has to say first.
    pub fn hello(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _keys_come_with_the_answer = self.tls.write_hs(&mut bytes);
        bytes
    }

    /// Datagrams with what TLS says, from where it left off at that level.
    ///
    /// # Errors
    /// There are no keys for the level.
    pub fn say(&mut self, level: Level, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut datagrams = Vec::new();
        for part in bytes.chunks(1_000) {
            let offset = self.said.entry(level).or_default();
            let mut frame = vec![0x06];
            varint(&mut frame, *offset);
            varint(&mut frame, part.len() as u64);
            frame.extend_from_slice(part);
            *offset += part.len() as u64;
            datagrams.push(self.datagram(level, frame)?);
        }
        Ok(datagrams)
    }

    /// A frame of stream 0.
    #[must_use]
    pub fn stream_frame(offset: u64, bytes: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x0e];
        varint(&mut frame, 0);
        varint(&mut frame, offset);
        varint(&mut frame, bytes.len() as u64);
        frame.extend_from_slice(bytes);
        frame
    }

    /// A datagram of one packet with these frames; an Initial is padded to its least.
    ///
    /// # Errors
    /// There are no keys for the level.
    pub fn datagram(&mut self, level: Level, mut frames: Vec<u8>) -> Result<Vec<u8>> {
        let number = self.numbers.entry(level).or_default();
        let (this, four) = (*number, u32::try_from(*number)?.to_be_bytes());
        *number += 1;
        let mut header = self.header(level);
        if level == Level::Initial {
            // The length is 2 bytes.
            let least = LEAST_INITIAL.saturating_sub(header.len() + 2 + NUMBER + TAG);
            frames.resize(frames.len().max(least), 0);
        }
        frames.resize(frames.len().max(SAMPLE), 0);
        if level != Level::Session {
            let length = u16::try_from(NUMBER + frames.len() + TAG)?;
            header.extend((length | 0x4000).to_be_bytes());
        }
        let at = header.len();
        header.extend(four);
        let keys = &self.keys.get(&level).context("no keys yet")?.local;
        let tag = keys.packet.encrypt_in_place(this, &header, &mut frames)?;
        let mut packet = header;
        packet.extend(frames);
        packet.extend(tag.as_ref());
        let (front, rest) = packet.split_at_mut(at + NUMBER);
        let (first, number) = front.split_at_mut(at);
        keys.header.encrypt_in_place(&rest[..SAMPLE], &mut first[0], number)?;
        Ok(packet)
    }

    fn header(&self, level: Level) -> Vec<u8> {
        let kind = match level {
            Level::Initial => 0xc3,
            Level::Early => 0xd3,
            Level::Handshake => 0xe3,
            Level::Session => return [&[0x43 | self.phase], &self.daemon[..]].concat(),
        };
        let mut header = vec![kind, 0, 0, 0, 1];
        for name in [&self.daemon[..], &OWN] {
            header.push(name.len() as u8);
            header.extend_from_slice(name);
        }
        if level == Level::Initial {
            varint(&mut header, self.token.len() as u64);
            header.extend_from_slice(&self.token);
        }
        header
    }

    /// Sends a datagram.
    ///
    /// # Errors
    /// The system refuses.
    pub fn send(&mut self, datagram: &[u8]) -> Result<()> {
        self.sent += datagram.len();
        self.socket.send(datagram).map(drop).or_else(|error| match error.kind() {
            // The daemon's socket is full, or was: what is lost is lost.
            ErrorKind::ConnectionRefused | ErrorKind::WouldBlock => Ok(()),
            _ => Err(error.into()),
        })
    }

    /// Says all of a ClientHello.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn begin(&mut self) -> Result<()> {
        let hello = self.hello();
        self.send_all(Level::Initial, &hello)
    }

    /// Says the first half of it.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn half(&mut self, hello: &[u8]) -> Result<()> {
        self.send_all(Level::Initial, &hello[..hello.len() / 2])
    }

    fn send_all(&mut self, level: Level, bytes: &[u8]) -> Result<()> {
        for datagram in self.say(level, bytes)? {
            self.send(&datagram)?;
        }
        Ok(())
    }

    /// Takes in what comes for so long after the last, whatever it is. How many bytes have come.
    ///
    /// # Errors
    /// The system refuses.
    pub fn received_bytes(&mut self, wait: Duration) -> Result<usize> {
        self.socket.set_read_timeout(Some(wait))?;
        let mut datagram = [0; 65_535];
        loop {
            match self.socket.recv(&mut datagram) {
                Ok(length) => self.received += length,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(self.received);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What came in the next datagram, without an answer to it.
    ///
    /// # Errors
    /// It cannot be opened, or TLS refuses it.
    pub fn receive(&mut self, wait: Duration) -> Result<Vec<Came>> {
        self.socket.set_read_timeout(Some(wait))?;
        let mut datagram = [0; 65_535];
        let length = match self.socket.recv(&mut datagram) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(vec![Came::Nothing]);
            }
            Err(error) => return Err(error.into()),
        };
        self.received += length;
        let (mut came, mut rest) = (Vec::new(), datagram.get_mut(..length).unwrap_or_default());
        while !rest.is_empty() {
            let taken = self.packet(rest, &mut came)?;
            rest = rest.split_at_mut(taken).1;
        }
        Ok(came)
    }

    /// Opens one packet of a datagram; how long it is.
    fn packet(&mut self, bytes: &mut [u8], came: &mut Vec<Came>) -> Result<usize> {
        let first = bytes[0];
        let mut at = 1;
        let level = if first & 0x80 == 0 {
            at += OWN.len();
            Level::Session
        } else {
            at += 4 + 1 + OWN.len();
            let name = usize::from(*bytes.get(at).context("a short header")?);
            let daemon = bytes.get(at + 1..at + 1 + name).context("a short header")?.to_vec();
            at += 1 + name;
            let level = match first & 0x30 {
                0x00 => Level::Initial,
                0x20 => Level::Handshake,
                0x30 => {
                    self.token = bytes.get(at..bytes.len() - TAG).context("a short Retry")?.to_vec();
                    self.daemon = daemon;
                    self.said.clear();
                    self.initial_keys()?;
                    came.push(Came::Retry);
                    return Ok(bytes.len());
                }
                _ => bail!("the daemon sent early data"),
            };
            self.daemon = daemon;
            level
        };
        let mut reader = Reader { bytes, at };
        if level == Level::Initial {
            let token = usize::try_from(reader.varint()?)?;
            reader.at += token;
        }
        let end = if level == Level::Session { reader.bytes.len() } else { reader.varint()? as usize + reader.at };
        at = reader.at;
        // Keys that are not there yet, or no more: a packet that came out of order.
        let Some(keys) = self.keys.get_mut(&level) else { return Ok(end) };
        let packet = bytes.get_mut(..end).context("a short packet")?;
        let (front, rest) = packet.split_at_mut(at);
        let (number, sample) = rest.split_at_mut(NUMBER);
        keys.remote.header.decrypt_in_place(&sample[..SAMPLE], &mut front[0], number)?;
        let length = usize::from(front[0] & 3) + 1;
        let number = number[..length].iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        // The daemon changes keys whenever it likes (RFC 9001 section 6), and is followed.
        let mut changed = None;
        if level == Level::Session && front[0] & PHASE != self.phase {
            let mut next = self.next.clone().context("the session's keys come with what the next are made of")?;
            changed = Some((next.next_packet_keys(), next));
        }
        let (header, payload) = packet.split_at_mut(at + length);
        let remote = changed.as_ref().map_or(&keys.remote.packet, |(changed, _)| &changed.remote);
        // What is not of this connection any more: a reset, say.
        let Ok(frames) = remote.decrypt_in_place(number, header, payload).map(<[u8]>::to_vec) else {
            came.push(Came::Other);
            return Ok(end);
        };
        if let Some((changed, next)) = changed {
            (keys.local.packet, keys.remote.packet) = (changed.local, changed.remote);
            self.next = Some(next);
            self.phase ^= PHASE;
        }
        let last = self.heard.entry(level).or_insert(number..=number);
        if number == last.end() + 1 {
            *last = *last.start()..=number;
        } else if number > *last.end() {
            *last = number..=number;
        }
        self.frames(level, &frames, came)?;
        Ok(end)
    }

    fn frames(&mut self, level: Level, bytes: &[u8], came: &mut Vec<Came>) -> Result<()> {
        let mut r = Reader { bytes, at: 0 };
        while r.at < bytes.len() {
            let kind = r.varint()?;
            match kind {
                0x00 | 0x01 | 0x1e => {}
                0x02 | 0x03 => r.acknowledgement(kind == 0x03)?,
                0x06 => {
                    let offset = r.varint()?;
                    let data = r.run()?;
                    self.hear(level, offset, data)?;
                }
                0x07 => drop(r.run()?),
                0x08..=0x0f => {
                    ensure!(r.varint()? == 0, "another stream");
                    let offset = if kind & 4 != 0 { r.varint()? } else { 0 };
                    let data = if kind & 2 != 0 { r.run()? } else { r.rest() };
                    self.stream.1.insert(offset, data);
                    let read = contiguous(&mut self.stream);
                    came.push(Came::Stream(read));
                }
                0x10 | 0x12..=0x14 | 0x16 | 0x17 | 0x19 => r.skip(1)?,
                0x05 | 0x11 | 0x15 => r.skip(2)?,
                0x04 => r.skip(3)?,
                0x18 => {
                    r.skip(2)?;
                    let name = usize::from(r.take(1)?[0]);
                    r.take(name + 16)?;
                }
                0x1c | 0x1d => {
                    came.push(Came::Closed(r.varint()?));
                    return Ok(());
                }
                other => bail!("a frame of kind {other:#x}"),
            }
        }
        came.push(Came::Other);
        Ok(())
    }

    /// Gives TLS what it can read, and takes the keys that it has then.
    fn hear(&mut self, level: Level, offset: u64, data: Vec<u8>) -> Result<()> {
        let hearing = self.hearing.entry(level).or_default();
        hearing.1.insert(offset, data);
        let read = contiguous(hearing);
        if read.is_empty() {
            return Ok(());
        }
        self.tls.read_hs(&read).context("TLS refuses the daemon")?;
        loop {
            let at = if self.keys.contains_key(&Level::Handshake) { Level::Handshake } else { Level::Initial };
            let mut bytes = Vec::new();
            let change = self.tls.write_hs(&mut bytes);
            let nothing = bytes.is_empty() && change.is_none();
            self.send_all(at, &bytes)?;
            match change {
                Some(KeyChange::Handshake { keys }) => drop(self.keys.insert(Level::Handshake, keys)),
                Some(KeyChange::OneRtt { keys, next }) => {
                    self.keys.insert(Level::Session, keys);
                    self.next = Some(next);
                    self.ready = true;
                }
                None => {}
            }
            if nothing {
                return Ok(());
            }
        }
    }

    /// Acknowledges what came last at a level.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn acknowledge(&mut self, level: Level) -> Result<()> {
        let Some(last) = self.heard.get(&level) else { return Ok(()) };
        let mut frame = vec![0x02];
        for number in [*last.end(), 0, 0, last.end() - last.start()] {
            varint(&mut frame, number);
        }
        let datagram = self.datagram(level, frame)?;
        self.send(&datagram)
    }

    /// Shakes hands to the end, as an honest client does.
    ///
    /// # Errors
    /// The daemon refused, or does not answer for that long.
    pub fn shake(&mut self, wait: Duration) -> Result<()> {
        self.begin()?;
        while !self.ready {
            for came in self.receive(wait)? {
                match came {
                    Came::Closed(code) => bail!("the daemon closed: {code:#x}"),
                    Came::Nothing => bail!("the daemon does not answer"),
                    Came::Retry => {
                        bail!("the daemon wants the address shown")
                    }
                    Came::Stream(_) | Came::Other => {}
                }
            }
            for level in [Level::Initial, Level::Handshake] {
                self.acknowledge(level)?;
            }
        }
        Ok(())
    }

    /// Sends frames of the session, as many to a datagram as fit.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_frames(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) -> Result<()> {
        let mut packed = Vec::new();
        for frame in frames {
            if packed.len() + frame.len() > MOST - 64 {
                let datagram = self.datagram(Level::Session, std::mem::take(&mut packed))?;
                self.send(&datagram)?;
            }
            packed.extend(frame);
        }
        let datagram = self.datagram(Level::Session, packed)?;
        self.send(&datagram)
    }
}

fn suite() -> Result<Suite> {
    TLS13_AES_128_GCM_SHA256.tls13().and_then(|suite| suite.quic_suite()).context("no suite for QUIC")
}

/// Takes what follows on without a gap.
fn contiguous((next, parts): &mut (u64, BTreeMap<u64, Vec<u8>>)) -> Vec<u8> {
    let mut read = Vec::new();
    while let Some((offset, part)) = parts.pop_first() {
        if offset > *next {
            parts.insert(offset, part);
            break;
        }
        let known = usize::try_from(*next - offset).unwrap_or(usize::MAX);
        if let Some(new) = part.get(known..) {
            read.extend_from_slice(new);
            *next += new.len() as u64;
        }
    }
    read
}

/// A number as QUIC writes it (RFC 9000, section 16).
pub fn varint(out: &mut Vec<u8>, number: u64) {
    match number {
        0..0x40 => out.push(number as u8),
        0x40..0x4000 => out.extend((number as u16 | 0x4000).to_be_bytes()),
        0x4000..0x4000_0000 => out.extend((number as u32 | 0x8000_0000).to_be_bytes()),
        _ => out.extend((number | 0xc000_0000_0000_0000).to_be_bytes()),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let taken = self.bytes.get(self.at..self.at + count).context("a short frame")?;
        self.at += count;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64> {
        let first = self.take(1)?[0];
        let more = (1_usize << (first >> 6)) - 1;
        let rest = self.take(more)?;
        Ok(rest.iter().fold(u64::from(first & 0x3f), |number, byte| number << 8 | u64::from(*byte)))
    }

    fn skip(&mut self, numbers: usize) -> Result<()> {
        (0..numbers).try_for_each(|_| self.varint().map(drop))
    }

    fn run(&mut self) -> Result<Vec<u8>> {
        let count = usize::try_from(self.varint()?)?;
        Ok(self.take(count)?.to_vec())
    }

    fn rest(&mut self) -> Vec<u8> {
        let rest = self.bytes.get(self.at..).unwrap_or_default().to_vec();
        self.at = self.bytes.len();
        rest
    }

    fn acknowledgement(&mut self, marks: bool) -> Result<()> {
        self.skip(2)?;
        let ranges = self.varint()?;
        self.skip(1)?;
        for _ in 0..ranges {
            self.skip(2)?;
        }
        self.skip(if marks { 3 } else { 0 })
    }
}
