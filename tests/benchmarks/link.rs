//! The generator's end of a connection: TLS over a socket that blocks while a session is made
//! and no longer once it is measured. Counts nothing and knows no protocol.

use std::io::{self, BufRead as _, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::BytesMut;
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

/// Bytes that one read of a socket takes at the most.
pub(crate) const READ_BYTES: usize = 256 * 1024;
/// Connections from one address to one port: well within the ephemeral ports.
const PER_ADDRESS: u32 = 4_000;
/// For an answer that is expected to come.
const ANSWER: Duration = Duration::from_secs(30);

/// A connection.
pub(crate) struct Link {
    pub(crate) socket: TcpStream,
    tls: ClientConnection,
    /// What was decrypted and not yet parsed.
    pub(crate) read: BytesMut,
}

/// TCP to a loopback address, from one of 127.0.0.x by `number`, so that ten thousands fit.
pub(crate) fn dial(address: SocketAddr, number: u32) -> Result<TcpStream> {
    let SocketAddr::V4(address) = address else { anyhow::bail!("{address} is no IPv4 address") };
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    let last = u8::try_from(2 + number / PER_ADDRESS % 200)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, last), 0))?;
    connect(&socket, &address)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    Ok(stream)
}

impl Link {
    /// Shakes hands over `socket`.
    pub(crate) fn shake(mut socket: TcpStream, config: Arc<ClientConfig>) -> Result<Self> {
        let mut tls = ClientConnection::new(config, ServerName::try_from("overlay.invalid")?)?;
        tls.set_buffer_limit(None);
        while tls.is_handshaking() {
            tls.complete_io(&mut socket)?;
        }
        Ok(Self { socket, tls, read: BytesMut::new() })
    }

    /// Queues bytes; [`Self::flush`] sends them.
    pub(crate) fn queue(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.tls.writer().write_all(bytes)?)
    }

    /// Sends what is queued; false where the socket takes no more for now.
    pub(crate) fn flush(&mut self) -> Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// [`Self::queue`] and [`Self::flush`] while the socket blocks.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.queue(bytes)?;
        ensure!(self.flush()?, "the socket does not block yet");
        Ok(())
    }

    /// Reads once, into [`Self::read`]; false where nothing was there.
    pub(crate) fn receive(&mut self, room: &mut [u8]) -> Result<bool> {
        let n = match self.socket.read(room) {
            Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof)).context("the server closed"),
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let mut raw = &room[..n];
        while !raw.is_empty() {
            self.tls.read_tls(&mut raw)?;
            self.tls.process_new_packets()?;
            let mut reader = self.tls.reader();
            loop {
                let plain = match reader.fill_buf() {
                    Ok([]) => return Err(io::Error::from(ErrorKind::UnexpectedEof)).context("the server closed"),
                    Ok(plain) => plain,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                };
                let len = plain.len();
                self.read.extend_from_slice(plain);
                reader.consume(len);
            }
        }
        Ok(true)
    }

    /// The socket alone, for a session that is held and never used: the generator's memory is not
    /// what is measured.
    pub(crate) fn into_socket(self) -> TcpStream {
        self.socket
    }

    /// From now on nothing blocks.
    pub(crate) fn unblock(&self) -> Result<()> {
        Ok(self.socket.set_nonblocking(true)?)
    }
}
