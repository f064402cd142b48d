//! Peers that are no replicas of the same OverlayNode, and Tor, by which they may be reached.
//! Decides shapes and bounds.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::duration::within;
use super::{Duration, PeerTransport};

/// Peers that a daemon may have (P-5): the daemons' own bound.
pub const MAX_PEERS: usize = overlay_core::config::MAX_PEERS;

/// Tor, through the SOCKS proxy of a Tor that runs beside the daemons; none is linked into them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Tor {
    /// Whether peers may be dialled over Tor, and sessions of an onion service are expected.
    pub enabled: bool,
    /// HOST:PORT of the SOCKS5 proxy, as daemons reach it; a host name is looked up at every dial. Each
    /// peer has a circuit of its own, by user name and password. Changed without a restart.
    #[schemars(schema_with = "socks_address")]
    pub socks_address: String,
    /// The TCP port that pods listen on for what an onion service forwards: its sessions are known as Tor's
    /// and have its timeouts. Without it an onion service forwards to transports.tcp.port. `local`
    /// opens none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "super::port")]
    pub port: Option<u16>,
    /// Timeouts of a session over Tor, instead of limits.timeouts; changed without a restart.
    pub timeouts: TorTimeouts,
}

/// Timeouts of a session over Tor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TorTimeouts {
    /// From the dial, circuits included, to the session's first answer, all of it.
    #[schemars(schema_with = "within::<100, 600_000>")]
    pub handshake: Duration,
    /// From a frame's first byte to its last.
    #[schemars(schema_with = "within::<100, 600_000>")]
    pub read: Duration,
    /// Bytes that are queued must leave within it.
    #[schemars(schema_with = "within::<100, 600_000>")]
    pub write: Duration,
    /// No frame either way for so long ends a session. The side that dialled pings at a third of it.
    #[schemars(schema_with = "within::<300, 3_600_000>")]
    pub idle: Duration,
}

/// A peer that is no replica: a daemon that runs elsewhere by the identity of this OverlayNode, its
/// authority and its token root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StaticPeer {
    /// The daemon's own name, as metrics and logs call it. Replicas' names are taken.
    #[schemars(schema_with = "name")]
    pub name: String,
    /// HOST:PORT where it is dialled; an onion service's with transport Tor alone.
    #[schemars(schema_with = "address")]
    pub address: String,
    /// Over what it is dialled; TCP if left out. QUIC takes tls.keyExchange RequireHybrid, Tor
    /// transports.tor.enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<PeerTransport>,
}

impl Default for Tor {
    fn default() -> Self {
        Self {
            enabled: false,
            socks_address: "127.0.0.1:9050".to_owned(),
            port: None,
            timeouts: TorTimeouts::default(),
        }
    }
}

impl Default for TorTimeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(60),
            read: Duration::from_secs(15),
            write: Duration::from_secs(15),
            idle: Duration::from_secs(30),
        }
    }
}

/// What the daemon takes for `HOST:PORT`, as a literal of CEL.
const HOST_PORT: &str = r"^([A-Za-z0-9._-]{1,253}|\\[[0-9A-Fa-f:.]{2,45}\\]):([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$";
/// Every address of an onion service, and those of version 3.
const ONION: &str = "[.][oO][nN][iI][oO][nN][.]?:";
const ONION_V3: &str = "(^|[.])[a-z2-7]{55}d[.]onion:";

fn address(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string", "minLength": 3, "maxLength": 259,
        "x-kubernetes-validations": [
            { "rule": format!("self.matches('{HOST_PORT}')"), "message": "must be HOST:PORT, an IPv6 address in brackets" },
            {
                "rule": format!("!self.matches('{ONION}') || self.matches('{ONION_V3}')"),
                "message": "must name an onion service of version 3: 56 of a-z and 2-7, the last a d, before .onion",
            },
        ],
    })
}

fn socks_address(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string", "minLength": 3, "maxLength": 259,
        "x-kubernetes-validations": [
            { "rule": format!("self.matches('{HOST_PORT}')"), "message": "must be HOST:PORT, an IPv6 address in brackets" },
            { "rule": format!("!self.matches('{ONION}')"), "message": "must be where a SOCKS5 proxy listens, which no onion service is" },
        ],
    })
}

fn name(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string", "minLength": 1, "maxLength": 63,
        "x-kubernetes-validations": [
            {
                "rule": "self.matches('^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$')",
                "message": "must be lowercase letters, digits, '-' and '.', and start and end with a letter or digit",
            },
            { "rule": "self != 'other'", "message": "must not be other, which is what metrics call peers that are not configured" },
        ],
    })
}

pub(super) fn static_peers(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array", "maxItems": MAX_PEERS,
        "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
        "items": generator.subschema_for::<StaticPeer>(),
        "x-kubernetes-validations": [{
            "rule": format!("self.all(peer, (has(peer.transport) && peer.transport == 'Tor') || !peer.address.matches('{ONION}'))"),
            "message": "must have transport Tor where the address is an onion service's",
        }],
    })
}
