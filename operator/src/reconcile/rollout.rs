//! Whether running daemons run what was written for them. A change that takes no restart
//! reaches a pod through its volumes: an annotation has the kubelet refresh them at once, and
//! the daemon says in `/readyz` what it runs. Asks only while something is not confirmed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use overlay_core::config::{DaemonConfig, PeersConfig};
use serde::Deserialize;
use tokio::time::timeout;

use super::node::{Context, explain};
use super::{apply, pods};
use crate::api::OverlayNode;
use crate::build::{ADMIN_PORT, BuildError, labels, names};
use crate::daemon;

/// Daemons that are asked at once.
const ASKED_AT_ONCE: usize = 32;
/// For an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The hashes of what each daemon is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    config: String,
    /// Of each daemon's peers file.
    peers: BTreeMap<String, String>,
}

impl Plan {
    /// Of this configuration, with a peers file for each daemon.
    ///
    /// # Errors
    /// One of them has no TOML form.
    pub(super) fn of(config: &DaemonConfig, peers: &[PeersConfig]) -> Result<Self, BuildError> {
        let hash = |peers: &PeersConfig| peers.hash().map_err(|e| BuildError::Toml(e.to_string()));
        let peers = peers.iter().map(|peers| Ok((peers.name.clone(), hash(peers)?)));
        let config = config.hash().map_err(|e| BuildError::Toml(e.to_string()))?;
        Ok(Self { config, peers: peers.collect::<Result<_, BuildError>>()? })
    }

    /// What tells one plan from another: 16 hexadecimal digits.
    #[must_use]
    pub(super) fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.config.as_bytes());
        for (name, hash) in &self.peers {
            // A name has no zero byte, and a hash is of one length.
            hasher.update(name.as_bytes()).update(&[0]).update(hash.as_bytes());
        }
        let mut hex = hasher.finalize().to_hex().to_string();
        hex.truncate(16);
        hex
    }
}

/// How far a plan is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rollout {
    /// Daemons that run what they are to run.
    pub current: usize,
    /// All of them.
    pub wanted: usize,
    /// Pods that run, and whose daemon does not answer.
    pub silent: Vec<String>,
}

impl Rollout {
    /// Whether nothing is left to be seen.
    #[must_use]
    pub(super) fn is_complete(&self) -> bool {
        self.current == self.wanted
    }
}

/// What a daemon says that it runs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Running {
    config: String,
    peers: String,
}

/// Has every pod that is behind refreshed, and asks who runs what. Pods that the API server
/// does not show, or will not have annotated, are behind.
pub(super) async fn look(context: &Context, node: &OverlayNode, plan: &Plan) -> Rollout {
    let (namespace, name) = (names::namespace(node), names::name(node));
    let pods = pods::list(&context.client, namespace, name).await.unwrap_or_else(|error| {
        tracing::warn!(namespace, name, "cannot read the pods: {}", explain(&error));
        Vec::new()
    });
    let hash = plan.hash();
    for pod in pods.iter().filter(|pod| is_staying(pod) && annotation(pod) != Some(&hash)) {
        if let Err(error) = apply::pod_annotation(&context.client, &context.metrics, pod, &hash).await {
            tracing::warn!(namespace, name, "cannot annotate a pod: {}", explain(&error));
        }
    }
    let asked = pods.iter().filter_map(|pod| Some((pod.metadata.name.clone()?, address(pod)?)));
    let answers = futures::stream::iter(asked.collect::<Vec<_>>()).map(|(name, admin)| async move {
        let answer = timeout(ANSWER_WITHIN, daemon::get(admin, "/readyz")).await.ok().flatten();
        (name, answer.and_then(|(_, body)| serde_json::from_str(&body).ok()))
    });
    judge(plan, answers.buffer_unordered(ASKED_AT_ONCE).collect().await)
}

fn judge(plan: &Plan, answers: BTreeMap<String, Option<Running>>) -> Rollout {
    let mut rollout = Rollout { wanted: plan.peers.len(), ..Rollout::default() };
    for (name, peers) in &plan.peers {
        match answers.get(name) {
            Some(Some(running)) if running.config == plan.config && running.peers == *peers => rollout.current += 1,
            Some(None) => rollout.silent.push(name.clone()),
            Some(Some(_)) | None => {}
        }
    }
    rollout
}

fn is_staying(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
}

fn annotation(pod: &Pod) -> Option<&String> {
    pod.metadata.annotations.as_ref()?.get(labels::CONFIG_HASH)
}

/// Where its daemon answers, once its container runs.
fn address(pod: &Pod) -> Option<SocketAddr> {
    let status = pod.status.as_ref().filter(|_| is_staying(pod))?;
    let runs =
        status.container_statuses.iter().flatten().any(|c| c.name == names::CONTAINER && c.started == Some(true));
    let ip: IpAddr = status.pod_ip.as_ref().filter(|_| runs)?.parse().ok()?;
    Some(SocketAddr::new(ip, ADMIN_PORT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(peers: &[(&str, &str)]) -> Plan {
        let text = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
        Plan { config: "c".into(), peers: peers.iter().map(text).collect() }
    }

    fn running(config: &str, peers: &str) -> Option<Running> {
        Some(Running { config: config.into(), peers: peers.into() })
    }

    #[test]
    fn who_is_behind_and_who_is_silent() {
        let plan = plan(&[("m-0", "p0"), ("m-1", "p1"), ("m-2", "p2")]);
        for (answers, current, silent) in [
            (vec![], 0, vec![]),
            (vec![("m-0", running("c", "p0")), ("m-1", running("c", "p1")), ("m-2", running("c", "p2"))], 3, vec![]),
            (vec![("m-0", running("old", "p0")), ("m-1", running("c", "old")), ("m-2", running("c", "p2"))], 1, vec![]),
            (vec![("m-0", running("c", "p0")), ("m-1", None), ("m-9", None)], 1, vec!["m-1".to_owned()]),
        ] {
            let answers = answers.into_iter().map(|(name, answer)| (name.to_owned(), answer)).collect();
            let rollout = judge(&plan, answers);
            assert_eq!((rollout.current, &rollout.silent), (current, &silent));
            assert_eq!(rollout.is_complete(), current == 3);
        }
    }

    #[test]
    fn a_plan_is_told_by_every_part_of_it() {
        let base = plan(&[("m-0", "p0"), ("m-1", "p1")]);
        let others = [
            Plan { config: "d".into(), ..base.clone() },
            plan(&[("m-0", "p0")]),
            plan(&[("m-0", "p0"), ("m-1", "x")]),
            plan(&[("m-0", "p0"), ("m-2", "p1")]),
        ];
        assert!(others.iter().all(|other| other.hash() != base.hash()));
        assert_eq!(base.hash().len(), 16);
    }
}
