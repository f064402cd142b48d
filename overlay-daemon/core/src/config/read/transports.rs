//! What a file says of transports: `[tor]`, and which addresses which of them reaches.

use std::net::SocketAddr;

use super::super::{Tor, Transport, transport};
use super::table::{Errors, Table};
use super::{Address, HOST_PORT, SOCKET_ADDRESS};

/// An onion service's address is whole, and goes with Tor alone.
pub(super) fn onion(table: &Table<'_, '_>, address: &str, transport: Transport, e: &mut Errors<'_>) {
    if !transport::is_onion(address) {
        return;
    }
    if transport != Transport::Tor {
        table.broken_rule("transport", format!("must be Tor, by which alone {address} is reached"), e);
    }
    if !transport::is_valid_onion(address) {
        let message = "must name an onion service of version 3: 56 of a-z and 2-7, the last a d, before .onion";
        table.broken_rule("address", message, e);
    }
}

/// Reads `[tor]`. `taken` are the addresses that something else listens on.
pub(super) fn tor(mut t: Table<'_, '_>, taken: [(&str, Option<SocketAddr>); 2], e: &mut Errors<'_>) -> Option<Tor> {
    let d = Tor::default();
    let socks = t.parsed("socks", HOST_PORT, Some(Address(d.socks)), e).map(|Address(address)| address);
    if socks.as_deref().is_some_and(transport::is_onion) {
        t.broken_rule("socks", "must be where a SOCKS5 proxy listens, which no onion service is", e);
    }
    let listen = t.optional::<SocketAddr>("listen", SOCKET_ADDRESS, e);
    for (field, address) in taken {
        if let (Some(Some(listen)), Some(address)) = (listen, address)
            && listen == address
            && listen.port() != 0
        {
            t.broken_rule("listen", format!("must differ from {field}"), e);
        }
    }
    let handshake_timeout_ms = t.integer("handshake_timeout_ms", 100..=600_000, d.handshake_timeout_ms, e);
    let read_timeout_ms = t.integer("read_timeout_ms", 100..=600_000, d.read_timeout_ms, e);
    let write_timeout_ms = t.integer("write_timeout_ms", 100..=600_000, d.write_timeout_ms, e);
    let idle_timeout_ms = t.integer("idle_timeout_ms", 300..=3_600_000, d.idle_timeout_ms, e);
    t.finish(e);
    Some(Tor {
        socks: socks?,
        listen: listen?,
        handshake_timeout_ms: handshake_timeout_ms?,
        read_timeout_ms: read_timeout_ms?,
        write_timeout_ms: write_timeout_ms?,
        idle_timeout_ms: idle_timeout_ms?,
    })
}
