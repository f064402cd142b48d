//! `overlay.toml` and a peers file: what is taken reads back the same, and what is refused says
//! why.

use std::collections::BTreeSet;

use overlay_core::config::{ConfigError, MAX_PEERS, daemon, peers};

use crate::chosen;

/// The first byte says which file the rest is.
pub fn configuration(data: &[u8]) {
    let (file, text) = chosen(data);
    let Ok(text) = std::str::from_utf8(text) else { return };
    if file % 2 == 0 { check_daemon(text) } else { check_peers(text) }
}

fn check_daemon(text: &str) {
    match daemon(text) {
        Ok(config) => {
            let printed = config.to_toml().unwrap_or_default();
            assert_eq!(daemon(&printed).as_ref(), Ok(&config), "{printed}");
            assert!(config.differences(&config).is_empty() && config.with_live(&config) == config);
            assert!(config.hash().is_ok() && config.restart_hash() == config.with_live(&config).restart_hash());
        }
        Err(errors) => check_errors(&errors),
    }
}

fn check_peers(text: &str) {
    match peers(text) {
        Ok(config) => {
            let printed = config.to_toml().unwrap_or_default();
            assert_eq!(peers(&printed).as_ref(), Ok(&config), "{printed}");
            let names: BTreeSet<_> = config.peers.iter().map(|peer| &peer.name).collect();
            assert!(names.len() == config.peers.len() && names.len() <= MAX_PEERS && !names.contains(&config.name));
        }
        Err(errors) => check_errors(&errors),
    }
}

fn check_errors(errors: &[ConfigError]) {
    assert!(!errors.is_empty());
    assert!(errors.iter().all(|error| !error.to_string().is_empty()));
}
