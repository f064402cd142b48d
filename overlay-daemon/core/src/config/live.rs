//! Which settings a running daemon takes up, and which wait for a restart. Every field is
//! named here, so that a new one is decided on.

use super::{DaemonConfig, KeyExchange, Observability, Overlay, Profile, Tls, Tor};

impl DaemonConfig {
    /// This configuration, with those settings of `new` that take effect without a restart:
    /// limits and timeouts, Tor's proxy, gossip caps, readiness thresholds, key exchange and log
    /// level.
    #[must_use]
    pub fn with_live(&self, new: &Self) -> Self {
        let Self { format: _, overlay, tor, observability, tls, token: _, unix: _, gossip, readiness, drain: _ } = new;
        let Observability { metrics: _, log_level, log_format: _ } = observability;
        let Tls { certificate: _, key: _, ca: _, key_exchange } = tls;
        Self {
            overlay: self.overlay.with_live(overlay),
            tor: Tor { listen: self.tor.listen, ..tor.clone() },
            observability: Observability { log_level: *log_level, ..self.observability },
            tls: Tls { key_exchange: *key_exchange, ..self.tls.clone() },
            gossip: gossip.clone(),
            readiness: readiness.clone(),
            ..self.clone()
        }
    }

    /// The settings that are others in `other`, as `section.key = value`.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let (Ok(own), Ok(other)) = (toml::Table::try_from(self), toml::Table::try_from(other)) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for (section, value) in &other {
            let sections = (value.as_table(), own.get(section).and_then(toml::Value::as_table));
            let (Some(keys), Some(own)) = sections else { continue };
            let differ = keys.iter().filter(|(key, value)| own.get(*key) != Some(*value));
            found.extend(differ.map(|(key, value)| format!("{section}.{key} = {value}")));
            let gone = own.keys().filter(|key| !keys.contains_key(*key));
            found.extend(gone.map(|key| format!("{section}.{key} (removed)")));
        }
        found
    }

    /// What tells two configurations apart that a running daemon cannot turn into one another:
    /// [`Self::hash`] of this one with every live setting at its default.
    ///
    /// # Errors
    /// As [`Self::to_toml`].
    pub fn restart_hash(&self) -> Result<String, toml::ser::Error> {
        let defaults = Self::with_defaults(
            Profile::Micronode,
            self.overlay.listen,
            self.observability.metrics,
            self.tls.clone(),
            self.token.clone(),
            self.unix.socket.clone(),
        );
        let defaults = Self { tls: Tls { key_exchange: KeyExchange::RequireHybrid, ..defaults.tls }, ..defaults };
        self.with_live(&defaults).hash()
    }
}

impl Overlay {
    fn with_live(&self, new: &Self) -> Self {
        let Self {
            profile: _,
            amnesia: _,
            listen: _,
            listen_quic: _,
            tenants: _,
            max_sessions,
            max_handshakes_in_flight,
            max_pending,
            memory_bytes,
            inflight,
            rps,
            per_peer_inflight,
            per_peer_rps,
            decompression_ratio,
            handshake_timeout_ms,
            read_timeout_ms,
            write_timeout_ms,
            idle_timeout_ms,
        } = new;
        Self {
            max_sessions: *max_sessions,
            max_handshakes_in_flight: *max_handshakes_in_flight,
            max_pending: *max_pending,
            memory_bytes: *memory_bytes,
            inflight: *inflight,
            rps: *rps,
            per_peer_inflight: *per_peer_inflight,
            per_peer_rps: *per_peer_rps,
            decompression_ratio: *decompression_ratio,
            handshake_timeout_ms: *handshake_timeout_ms,
            read_timeout_ms: *read_timeout_ms,
            write_timeout_ms: *write_timeout_ms,
            idle_timeout_ms: *idle_timeout_ms,
            ..self.clone()
        }
    }
}
