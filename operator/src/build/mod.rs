//! From an OverlayNode to what runs it. Pure: the same node gives the same result and
//! nothing is read or written.

mod config;
pub mod labels;
pub mod names;
pub mod objects;
mod placement;
pub mod workload;

pub use config::{daemon_config, effective, min_peers, peers_config};
pub use objects::{BuildError, Credentials, Inputs, LeafSecret, MAX_CONFIG, Objects, objects, pod_template, secrets};
pub use placement::*;
pub use workload::{image, pull_policy, source_of};
