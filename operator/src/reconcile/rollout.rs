//! Whether running daemons run what was written for them. A change that takes no restart
//! reaches a pod through its volumes: an annotation has the kubelet refresh them at once, and
//! the daemon says in `/readyz` what it runs. Asks only while something is not confirmed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use overlay_core::config::{DaemonConfig, PeersConfig};
use serde::Deserialize;
use tokio::time::{Instant, timeout, timeout_at};

use super::node::{Context, explain};
use super::{apply, pods};
use crate::api::OverlayNode;
use crate::build::{ADMIN_PORT, BuildError, labels, names};
use crate::daemon;

/// Daemons that are asked at once.
const ASKED_AT_ONCE: usize = 32;
/// For an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// For all of them.
const LOOK_WITHIN: Duration = Duration::from_secs(4);
/// Bytes of an answer: a daemon's is a tenth of it.
const MAX_ANSWER: usize = 16 * 1024;

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
#[derive(Debug, Deserialize)]
struct Running<'a> {
    #[serde(borrow)]
    config: Cow<'a, str>,
    #[serde(borrow)]
    peers: Cow<'a, str>,
}

/// What one daemon answered. Nothing of its words is kept: whose image it is, is anyone's guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Current,
    Behind,
    None,
}

/// Has every pod that is behind refreshed, and asks who runs what. Pods that the API server
/// does not show, or will not have annotated, are behind. Takes no longer than [`LOOK_WITHIN`]
/// and the API server do.
pub(super) async fn look(context: &Context, node: &OverlayNode, plan: &Plan) -> Rollout {
    let (namespace, name) = (names::namespace(node), names::name(node));
    let mut pods = pods::list(&context.client, namespace, name).await.unwrap_or_else(|error| {
        tracing::warn!(namespace, name, "cannot read the pods: {}", explain(&error));
        Vec::new()
    });
    pods.retain(|pod| is_staying(pod) && pod.metadata.name.as_ref().is_some_and(|name| plan.peers.contains_key(name)));
    let hash = plan.hash();
    for pod in pods.iter().filter(|pod| times_told(pod, &hash) == 0) {
        tell(context, pod, &hash, 1).await;
    }
    let asked = pods.iter().filter_map(|pod| Some((pod.metadata.name.clone()?, address(pod)?)));
    let mut answers: BTreeMap<String, Answer> = asked.clone().map(|(name, _)| (name, Answer::None)).collect();
    let questions = futures::stream::iter(asked.collect::<Vec<_>>()).map(|(name, admin)| async move {
        let answer = ask(admin, plan, &name).await;
        (name, answer)
    });
    let mut questions = questions.buffer_unordered(ASKED_AT_ONCE);
    // Who has not been heard by then is silent: others wait for this reconciliation to end.
    let deadline = Instant::now() + LOOK_WITHIN;
    while let Ok(Some((name, answer))) = timeout_at(deadline, questions.next()).await {
        answers.insert(name, answer);
    }
    // The kubelet may have looked before it knew of the new configuration: it is told again.
    let behind = |pod: &&Pod| pod.metadata.name.as_ref().and_then(|n| answers.get(n)) == Some(&Answer::Behind);
    for pod in pods.iter().filter(behind) {
        match times_told(pod, &hash) {
            0 => {}
            told => tell(context, pod, &hash, told.saturating_add(1)).await,
        }
    }
    judge(plan, &answers)
}

/// Annotates a pod with what it is to run, and how often it was told.
async fn tell(context: &Context, pod: &Pod, hash: &str, times: u32) {
    let value = format!("{hash}.{times}");
    if let Err(error) = apply::pod_annotation(&context.client, &context.metrics, pod, &value).await {
        tracing::warn!(pod = pod.metadata.name, "cannot annotate a pod: {}", explain(&error));
    }
}

async fn ask(admin: SocketAddr, plan: &Plan, name: &str) -> Answer {
    let answer = timeout(ANSWER_WITHIN, daemon::get(admin, "/readyz", MAX_ANSWER)).await.ok().flatten();
    let Some((_, body)) = answer else { return Answer::None };
    match serde_json::from_str::<Running<'_>>(&body) {
        Ok(running) if running.config == plan.config && plan.peers.get(name).is_some_and(|p| running.peers == *p) => {
            Answer::Current
        }
        Ok(_) => Answer::Behind,
        Err(_) => Answer::None,
    }
}

fn judge(plan: &Plan, answers: &BTreeMap<String, Answer>) -> Rollout {
    let mut rollout = Rollout { wanted: plan.peers.len(), ..Rollout::default() };
    for name in plan.peers.keys() {
        match answers.get(name) {
            Some(Answer::Current) => rollout.current += 1,
            Some(Answer::None) => rollout.silent.push(name.clone()),
            Some(Answer::Behind) | None => {}
        }
    }
    rollout
}

fn is_staying(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
}

/// How often the pod was told of the plan with this hash.
fn times_told(pod: &Pod, hash: &str) -> u32 {
    let annotation = pod.metadata.annotations.as_ref().and_then(|all| all.get(labels::CONFIG_HASH));
    let told = annotation.and_then(|value| value.strip_prefix(hash)?.strip_prefix('.')?.parse().ok());
    told.unwrap_or(0)
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

    #[test]
    fn who_is_behind_and_who_is_silent() {
        use Answer::{Behind, Current, None};
        let plan = plan(&[("m-0", "p0"), ("m-1", "p1"), ("m-2", "p2")]);
        for (answers, current, silent) in [
            (vec![], 0, vec![]),
            (vec![("m-0", Current), ("m-1", Current), ("m-2", Current)], 3, vec![]),
            (vec![("m-0", Behind), ("m-1", Behind), ("m-2", Current)], 1, vec![]),
            (vec![("m-0", Current), ("m-1", None), ("m-9", None)], 1, vec!["m-1".to_owned()]),
        ] {
            let answers = answers.into_iter().map(|(name, answer)| (name.to_owned(), answer)).collect();
            let rollout = judge(&plan, &answers);
            assert_eq!((rollout.current, &rollout.silent), (current, &silent));
            assert_eq!(rollout.is_complete(), current == 3);
        }
    }

    /// What answers in a pod may be anything.
    #[tokio::test]
    async fn an_answer_is_compared_and_not_kept() {
        let plan = plan(&[("m-0", "p0")]);
        let long = format!("{{\"config\":\"{}\",\"peers\":\"p0\"}}", "c".repeat(2 * MAX_ANSWER));
        for (body, want) in [
            ("{\"ready\":true,\"config\":\"c\",\"peers\":\"p0\",\"conditions\":[]}", Answer::Current),
            ("{\"config\":\"c\",\"peers\":\"other\"}", Answer::Behind),
            ("{\"config\":\"c\"}", Answer::None),
            ("hello", Answer::None),
            (long.as_str(), Answer::None),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let admin = listener.local_addr().unwrap();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let serve = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut seen = [0; 1024];
                assert!(tokio::io::AsyncReadExt::read(&mut stream, &mut seen).await.unwrap() > 0);
                tokio::io::AsyncWriteExt::write_all(&mut stream, answer.as_bytes()).await.ok();
            };
            let (got, ()) = tokio::join!(ask(admin, &plan, "m-0"), serve);
            assert_eq!(got, want, "{}", &body[..body.len().min(40)]);
        }
    }

    #[test]
    fn how_often_a_pod_was_told() {
        for (annotation, want) in [(None, 0), (Some("h.1"), 1), (Some("h.12"), 12), (Some("g.1"), 0), (Some("h.x"), 0)]
        {
            let mut pod = Pod::default();
            let pair = |value: &str| [(labels::CONFIG_HASH.to_owned(), value.to_owned())].into();
            pod.metadata.annotations = annotation.map(pair);
            assert_eq!(times_told(&pod, "h"), want, "{annotation:?}");
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
