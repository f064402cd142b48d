//! The state of a daemon as `overlay-daemon status` shows it: for its operator, never in metric labels.

use bytes::Bytes;
use serde_json::json;

use super::{Entry, Node, Party};
use crate::Millis;
use crate::config::Transport;
use crate::control;
use crate::grant::Holder;
use crate::session::Role;

impl Node {
    /// The JSON object of the admin protocol's `sessions`.
    pub(super) fn sessions_report(&self, now: Millis) -> Bytes {
        let sessions: Vec<_> = self.sessions.iter().map(|(id, entry)| session(id.0, entry, now, self)).collect();
        let conditions: Vec<_> = self
            .report
            .conditions
            .iter()
            .map(|c| json!({"name": c.name, "ok": c.ok, "reason": c.reason, "since_ms": c.since_ms}))
            .collect();
        let (held, bytes) = self.engine.held();
        control::json(&json!({
            "daemon": {
                "name": self.hello.name,
                "identity": self.identity,
                "incarnation": self.hello.incarnation,
                "version": env!("CARGO_PKG_VERSION"),
            },
            "ready": self.report.ready,
            "conditions": conditions,
            "sessions": sessions,
            "messages": {"held": held, "bytes": bytes},
            "memory": {"used": self.memory_used(), "limit": self.config.overlay.memory_bytes},
        }))
    }

    /// Requests in flight with each configured peer, by its place; the last number is everyone
    /// else's.
    #[must_use]
    pub fn inflight(&self) -> Vec<u32> {
        let mut inflight = vec![0_u32; self.places.span()];
        let mut others = self.quota.inflight();
        for (_, entry, remote) in self.remotes() {
            if let Some(sum) = remote.configured.and_then(|place| inflight.get_mut(place)) {
                *sum = sum.saturating_add(entry.quota.inflight());
                others = others.saturating_sub(entry.quota.inflight());
            }
        }
        inflight.push(others);
        inflight
    }
}

fn session(id: u64, entry: &Entry, now: Millis, node: &Node) -> serde_json::Value {
    let (kind, name) = match (&entry.party, &entry.holder) {
        (Party::Peer(remote), _) => {
            let peer = remote.configured.and_then(|peer| node.places.get(peer));
            ("peer", Some(peer.map_or(remote.name.as_str(), |peer| peer.name.as_str())))
        }
        (Party::Client, Holder::Local) => ("local", None),
        (Party::Client, Holder::Certificate(_)) => ("client", None),
    };
    let (age_ms, idle_ms) = entry.session.ages(now);
    json!({
        "id": id,
        "kind": kind,
        "peer": name,
        "identity": entry.holder.to_string(),
        "state": entry.session.state().label(),
        "direction": if entry.session.role() == Role::Dialler { "out" } else { "in" },
        "transport": Transport::label_of(entry.transport),
        "group": entry.group,
        "age_ms": age_ms,
        "idle_ms": idle_ms,
        "queued_frames": entry.lanes.len(),
        "queued_bytes": entry.lanes.bytes(),
        "streams": entry.session.streams().count(),
    })
}
