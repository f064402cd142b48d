//! The gossip caps of a spec.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::{Duration, within};

/// How messages spread; what is left out follows from the profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Gossip {
    /// Peers that a message is pushed to at once; the rest hear of it and ask.
    #[schemars(range(min = 1, max = 64))]
    pub fanout: u32,
    /// Frames that one lane of one session holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 8, max = 65_536))]
    pub lane_depth_frames: Option<u32>,
    /// Messages and chunks a second that one peer is sent, and at most at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_536))]
    pub burst_frames: Option<u32>,
    /// Times a message is passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_hops: Option<u8>,
    /// How long, and how many, messages are remembered.
    pub dedupe: Dedupe,
}

/// The memory of messages already seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Dedupe {
    /// For how long a message is remembered; an older one is refused.
    #[schemars(schema_with = "within::<1_000, 3_600_000>")]
    pub window: Duration,
    /// Messages remembered.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 64, max = 4_194_304))]
    pub entries: Option<u32>,
}

impl Default for Gossip {
    fn default() -> Self {
        Self { fanout: 6, lane_depth_frames: None, burst_frames: None, max_hops: None, dedupe: Dedupe::default() }
    }
}

impl Default for Dedupe {
    fn default() -> Self {
        Self { window: Duration::from_secs(120), entries: None }
    }
}
