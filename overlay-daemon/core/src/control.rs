//! The JSON payloads: HELLO, and what a START asks for. Members that a reader does not know
//! are ignored in HELLO (OAP/1) and refused in a START, where a typo would change a meaning.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::config::Transport;
use crate::frame::MAX_FRAME;
use crate::identity::Topic;

/// Bytes of a control payload; a longer one is refused before it is parsed.
pub const MAX_CONTROL: usize = 16_384;
/// Members and elements of a control payload, all levels together: counted before any is
/// decoded, since each takes more room decoded than it had on the wire.
pub const MAX_MEMBERS: usize = 256;
/// Topics that one subscription may list.
pub const MAX_TOPICS: usize = 64;

/// The first request of a session, from the side that dialled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Who is speaking, for a person; null where it won't say.
    #[serde(default)]
    pub ua: Option<String>,
    /// Daemons only: what tells this process from others of the same identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub daemon: Option<DaemonHello>,
}

/// What one daemon tells another of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonHello {
    /// Its configured name.
    pub name: String,
    /// Its incarnation, 16 hexadecimal digits.
    pub incarnation: Incarnation,
}

/// A random number that a daemon draws once a process; text as 16 hexadecimal digits,
/// since JSON's numbers end at 53 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation(pub u64);

impl TryFrom<String> for Incarnation {
    type Error = std::num::ParseIntError;
    fn try_from(s: String) -> Result<Self, Self::Error> {
        u64::from_str_radix(&s, 16).map(Self)
    }
}

impl From<Incarnation> for String {
    fn from(i: Incarnation) -> Self {
        format!("{:016x}", i.0)
    }
}

/// The answer to HELLO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// Who answers.
    #[serde(default)]
    pub ua: Option<String>,
    /// Bytes of the largest frame.
    pub max_frame: u32,
    /// Requests that may be unanswered at once in this session.
    pub max_inflight: u32,
    /// The flag bits that are understood.
    pub flags_supported: u16,
    /// The OAP versions that are spoken.
    pub versions: Vec<u16>,
    /// The transports that sessions may come by.
    pub transports: Vec<String>,
    /// The answering daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub daemon: Option<DaemonHello>,
}

impl HelloReply {
    /// What this version of the daemon answers.
    #[must_use]
    pub fn of(daemon: DaemonHello, max_inflight: u32) -> Self {
        Self {
            ua: Some(concat!("overlay-daemon/", env!("CARGO_PKG_VERSION")).to_owned()),
            max_frame: u32::try_from(MAX_FRAME).unwrap_or(u32::MAX),
            max_inflight,
            // Every defined flag.
            flags_supported: 0xff,
            versions: vec![crate::frame::VERSION],
            transports: vec![Transport::Tcp.label().to_owned(), "unix".to_owned()],
            daemon: Some(daemon),
        }
    }

    /// The same of a daemon that accepts sessions over `transports`, beside the Unix socket.
    #[must_use]
    pub fn over(mut self, transports: &[Transport]) -> Self {
        for label in transports.iter().map(|transport| transport.label()) {
            if !self.transports.iter().any(|known| known == label) {
                self.transports.push(label.to_owned());
            }
        }
        self
    }
}

/// What a START's payload asks for. Which of them a stream may ask for is its
/// `app_proto_id`'s matter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Open {
    /// Protocol 1: the frames that follow are messages for this topic.
    Publish {
        /// Where they go.
        topic: Topic,
    },
    /// Protocol 1: push every message of these topics.
    Subscribe {
        /// Which; 1 to [`MAX_TOPICS`].
        topics: Vec<Topic>,
    },
    /// Protocol 3: the frames that follow are gossip.
    Gossip {},
    /// Any protocol: a stream of this session goes on here, by this START's token.
    Renew {
        /// Its `corr_id`.
        stream: u64,
    },
    /// Protocol 4: answer with the state of the daemon's sessions.
    Sessions {},
}

/// `value` as a control payload.
#[must_use]
pub fn json<T: Serialize>(value: &T) -> Bytes {
    // These types hold no map with other keys than strings and no failing serializer, the
    // only ways in which serde_json refuses.
    serde_json::to_vec(value).map(Bytes::from).unwrap_or_default()
}

/// A control payload as `T`, or nothing where it is too long, lists too much or is not one.
#[must_use]
pub fn parse<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Option<T> {
    let bounded = payload.len() <= MAX_CONTROL && members(payload) <= MAX_MEMBERS;
    bounded.then(|| serde_json::from_slice(payload).ok()).flatten()
}

/// Members and elements of a JSON text, all levels together, at the least: what stands between
/// them and opens them, outside strings.
fn members(payload: &[u8]) -> usize {
    let (mut count, mut quoted, mut escaped) = (0, false, false);
    for byte in payload {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' | b'[' | b'{' if !quoted => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subscribe(topics: usize) -> String {
        let listed: Vec<String> = (0..topics).map(|n| format!("\"{n:x},[\\\",\"")).collect();
        format!("{{\"op\":\"subscribe\",\"topics\":[{}]}}", listed.join(","))
    }

    /// F8: whatever repeats in a JSON payload is counted before any of it is decoded; what stands
    /// in a string is not counted.
    #[test]
    fn f8_members_are_counted_before_they_are_decoded() {
        let most = subscribe(MAX_TOPICS);
        assert!(matches!(parse(most.as_bytes()), Some(Open::Subscribe { topics }) if topics.len() == MAX_TOPICS));
        assert_eq!(members(most.as_bytes()), MAX_TOPICS + 2);
        assert!(parse::<Open>(subscribe(MAX_MEMBERS - 2).as_bytes()).is_some(), "too many, says `node`");
        assert_eq!(parse::<Open>(subscribe(MAX_MEMBERS - 1).as_bytes()), None);
        let hello = |nulls: usize| format!("{{\"x\":[{}]}}", vec!["0"; nulls].join(","));
        assert!(parse::<Hello>(hello(MAX_MEMBERS - 1).as_bytes()).is_some());
        assert_eq!(parse::<Hello>(hello(MAX_MEMBERS).as_bytes()), None);
        assert!(hello(8_000).len() <= MAX_CONTROL && parse::<Hello>(hello(8_000).as_bytes()).is_none());
    }

    /// F8: as many topics as may be, as long as they may be together: what they are decoded to is at
    /// most twice what they are on the wire.
    #[test]
    fn f8_the_longest_topics_take_at_most_twice_the_wire() {
        const COUNTS: usize = 2 * size_of::<usize>(); // of an Arc's owners, in front of its text
        let long = MAX_CONTROL / MAX_TOPICS - 4;
        let listed: Vec<String> = (0..MAX_TOPICS).map(|n| format!("\"{n:0>long$}\"")).collect();
        let wire = format!("{{\"op\":\"subscribe\",\"topics\":[{}]}}", listed.join(","));
        let Some(Open::Subscribe { topics }) = parse(wire.as_bytes()) else { panic!("{} bytes", wire.len()) };
        assert_eq!(topics.len(), MAX_TOPICS);
        let texts: usize = topics.iter().map(|topic| topic.as_str().len() + COUNTS).sum();
        assert!(topics.capacity() * size_of_val(&topics[0]) + texts <= 2 * wire.len());
        // And there is no room for longer ones.
        assert!(wire.len() + MAX_TOPICS > MAX_CONTROL);
    }

    /// F8: past 16 KiB nothing is parsed, nor is what nests deeper than any payload does.
    #[test]
    fn f8_json_is_bounded_in_length_and_depth() {
        let padded = |len: usize| format!("{{\"ua\":\"{}\"}}", "a".repeat(len - 9));
        assert_eq!(padded(MAX_CONTROL).len(), MAX_CONTROL);
        assert!(parse::<Hello>(padded(MAX_CONTROL).as_bytes()).is_some());
        assert!(parse::<Hello>(padded(MAX_CONTROL + 1).as_bytes()).is_none());
        let deep = format!("{{\"x\":{}1{}}}", "[".repeat(8_000), "]".repeat(8_000));
        assert!(parse::<Hello>(deep.as_bytes()).is_none());
    }
}
