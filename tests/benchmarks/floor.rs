//! The floor: what rustls and sockets cost with nothing around them. One thread, one epoll, no
//! protocol but the first bytes of a connection, which say what it is for:
//!
//! | first bytes | then |
//! | --- | --- |
//! | `h` | nothing: a session that is held |
//! | `w`, u32 size | the server writes messages of that size for ever, gathered into 64 KiB |
//! | `r`, u32 size | the same, each message its own TLS record |
//! | `s` | the server writes what publishers send |
//! | `p`, u32 size | messages of that size come, each written to all `s` at once |
//!
//! Each is answered by one byte. Handshakes are as the daemon's: TLS 1.3 with certificates both
//! ways, X25519MLKEM768, no tickets.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

/// Bytes that a writer gathers.
const GATHERED: usize = 64 * 1024;
/// The listening socket among the connections.
const LISTENER: u64 = 0;

/// What a connection is for.
enum Role {
    Unknown,
    Held,
    Writer(Writer),
    Subscriber,
    Publisher { size: usize },
}

struct Writer {
    message: Vec<u8>,
    /// How much of it was written.
    at: usize,
    /// Each message its own record.
    apart: bool,
}

struct Held {
    socket: TcpStream,
    tls: ServerConnection,
    role: Role,
    read: Vec<u8>,
}

/// Serves until it is killed; the first line of its output is the port.
pub(crate) fn serve(trust: &Path) -> Result<()> {
    let config = config(trust)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // std's backlog is 128.
    rustix::net::listen(&listener, 4_096)?;
    listener.set_nonblocking(true)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&poll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    println!("{}", listener.local_addr()?.port());
    let mut floor = Floor { poll, config, held: BTreeMap::new(), next: LISTENER + 1, gathered: Vec::new() };
    let mut events = Vec::with_capacity(64);
    loop {
        epoll::wait(&floor.poll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in events.drain(..) {
            match event.data.u64() {
                LISTENER => floor.accept(&listener)?,
                number => {
                    let flags = event.flags;
                    if !floor.turn(number, flags).unwrap_or(false) {
                        floor.held.remove(&number);
                    }
                }
            }
        }
    }
}

fn config(trust: &Path) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(CryptoProvider { kx_groups: vec![kx_group::X25519MLKEM768], ..default_provider() });
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(trust.join("ca.crt"))?)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let chain = CertificateDer::pem_file_iter(trust.join("tls.crt"))?.collect::<Result<Vec<_>, _>>()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(trust.join("tls.key"))?)?;
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"ron/oap1".to_vec()];
    Ok(Arc::new(config))
}

struct Floor {
    poll: OwnedFd,
    config: Arc<ServerConfig>,
    held: BTreeMap<u64, Held>,
    next: u64,
    gathered: Vec<u8>,
}

impl Floor {
    fn accept(&mut self, listener: &TcpListener) -> Result<()> {
        loop {
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            epoll::add(&self.poll, &socket, EventData::new_u64(self.next), EventFlags::IN)?;
            let mut tls = ServerConnection::new(Arc::clone(&self.config))?;
            tls.set_buffer_limit(None);
            self.held.insert(self.next, Held { socket, tls, role: Role::Unknown, read: Vec::new() });
            self.next += 1;
        }
    }

    /// Whether the connection stays.
    fn turn(&mut self, number: u64, flags: EventFlags) -> Result<bool> {
        let held = self.held.get_mut(&number).context("no such connection")?;
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) && !held.read()? {
            return Ok(false);
        }
        let was_unknown = matches!(held.role, Role::Unknown);
        if was_unknown && held.learn_role()? {
            let writes = matches!(held.role, Role::Writer(_));
            let flags = if writes { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            epoll::modify(&self.poll, &held.socket, EventData::new_u64(number), flags)?;
        }
        match &mut held.role {
            Role::Writer(writer) => {
                while held.tls.wants_write() || writer.fill(&mut held.tls, &mut self.gathered)? {
                    if !flush(&mut held.tls, &mut held.socket)? {
                        break;
                    }
                }
            }
            Role::Publisher { size } => {
                let size = *size;
                let read = std::mem::take(&mut held.read);
                let whole = read.len() / size * size;
                for message in read[..whole].chunks(size) {
                    self.relay(message)?;
                }
                if let Some(held) = self.held.get_mut(&number) {
                    held.read = read;
                    held.read.drain(..whole);
                }
            }
            Role::Unknown | Role::Held | Role::Subscriber => drop(flush(&mut held.tls, &mut held.socket)?),
        }
        Ok(true)
    }

    fn relay(&mut self, message: &[u8]) -> Result<()> {
        for held in self.held.values_mut().filter(|held| matches!(held.role, Role::Subscriber)) {
            held.tls.writer().write_all(message)?;
            flush(&mut held.tls, &mut held.socket)?;
        }
        Ok(())
    }
}

impl Held {
    /// Reads what is there; false at the end.
    fn read(&mut self) -> Result<bool> {
        loop {
            match self.tls.read_tls(&mut self.socket) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error.into()),
            }
            self.tls.process_new_packets()?;
            match self.tls.reader().read_to_end(&mut self.read) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Ok(_) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn learn_role(&mut self) -> Result<bool> {
        let (what, takes) = match *self.read {
            [] => return Ok(false),
            [what @ (b'w' | b'r' | b'p'), a, b, c, d, ..] => ((what, u32::from_be_bytes([a, b, c, d]) as usize), 5),
            [b'w' | b'r' | b'p', ..] => return Ok(false),
            [what, ..] => ((what, 0), 1),
        };
        self.role = match what {
            (b's', _) => Role::Subscriber,
            (b'p', size) => Role::Publisher { size },
            (b'h', _) => Role::Held,
            (how, size) => Role::Writer(Writer { message: vec![7; size], at: 0, apart: how == b'r' }),
        };
        self.read.drain(..takes);
        self.tls.writer().write_all(b"k")?;
        flush(&mut self.tls, &mut self.socket)
    }
}

impl Writer {
    /// Gives TLS the next [`GATHERED`] bytes.
    fn fill(&mut self, tls: &mut ServerConnection, gathered: &mut Vec<u8>) -> Result<bool> {
        gathered.clear();
        let mut given = 0;
        while given < GATHERED {
            let left = &self.message[self.at..];
            let part = &left[..left.len().min(GATHERED - given)];
            // A message is whole in one gathering where it fits.
            if given > 0 && part.len() < left.len() && self.at == 0 && self.message.len() <= GATHERED {
                break;
            }
            given += part.len();
            if self.apart {
                tls.writer().write_all(part)?;
            } else {
                gathered.extend_from_slice(part);
            }
            self.at = (self.at + part.len()) % self.message.len();
        }
        tls.writer().write_all(gathered)?;
        Ok(true)
    }
}

/// Whether all of it left.
fn flush(tls: &mut ServerConnection, socket: &mut TcpStream) -> Result<bool> {
    while tls.wants_write() {
        match tls.write_tls(socket) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}
