//! What the cases share: a node with both images, and how they look at it and into its pods.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use overlay_tests::cluster::Cluster;
use overlay_tests::http::metric_sum;
use overlay_tests::kubectl::Kubectl;
use overlay_tests::programs;
use overlay_tests::subscriber::Subscriber;
use overlay_tests::wait::{self, Look};
use serde_json::Value;

/// The namespace of the operator.
pub(crate) const SYSTEM: &str = "overlay-system";
/// The namespace of the example.
pub(crate) const APPS: &str = "apps";
/// How long one step may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// How long a running daemon may take to run a new configuration, and a refusal to show.
pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) struct World {
    pub(crate) cluster: Cluster,
}

impl World {
    pub(crate) fn start() -> Result<Self> {
        let cluster = Cluster::start("tests")?;
        cluster.load_ours()?;
        let world = Self { cluster };
        for namespace in [SYSTEM, APPS] {
            world.restricted_namespace(namespace)?;
        }
        Ok(world)
    }

    pub(crate) fn admin(&self) -> &Kubectl {
        self.cluster.admin()
    }

    /// kubectl, for a person's own words; a failure is an error with its message.
    pub(crate) fn kubectl(&self, words: &str) -> Result<String> {
        self.admin().run(&words.split_whitespace().collect::<Vec<_>>())
    }

    /// A namespace whose pods must fit the restricted Pod Security standard.
    pub(crate) fn restricted_namespace(&self, name: &str) -> Result<()> {
        self.kubectl(&format!("create namespace {name}"))?;
        self.kubectl(&format!("label namespace {name} pod-security.kubernetes.io/enforce=restricted"))?;
        Ok(())
    }

    /// Applies an OverlayNode.
    pub(crate) fn apply_node(&self, namespace: &str, name: &str, spec: &str) -> Result<()> {
        let manifest = format!(
            "{{apiVersion: overlay.rustyonions.io/v1alpha1, kind: OverlayNode, metadata: {{name: {name}}}, spec: {spec}}}"
        );
        self.admin().apply(namespace, &manifest).map(|_| ())
    }

    /// `kubectl wait --for=condition=Ready overlaynode/NAME`.
    pub(crate) fn wait_ready(&self, namespace: &str, name: &str) -> Result<()> {
        let limit = format!("--timeout={}s", LIMIT.as_secs());
        let words = ["wait", "--for=condition=Ready", "-n", namespace, &limit, &format!("overlaynode/{name}")];
        self.admin().run(&words).map(|_| ()).map_err(|error| anyhow!("{error:#}\n{}", self.state(namespace)))
    }

    /// For the message of a failure.
    pub(crate) fn state(&self, namespace: &str) -> String {
        let look = |words: &str| self.kubectl(words).unwrap_or_else(|error| error.to_string());
        format!(
            "{}\n{}\n{}\n{}",
            look(&format!("get overlaynodes,pods -n {namespace} -o wide")),
            look(&format!("get events -n {namespace} --sort-by=.lastTimestamp")),
            look(&format!("logs -n {SYSTEM} deployment/overlay-operator --tail=20")),
            look(&format!("logs -n {namespace} -l app.kubernetes.io/name=overlay-daemon --prefix --tail=8")),
        )
    }

    /// A condition of an OverlayNode: status, reason, message.
    pub(crate) fn condition(&self, namespace: &str, name: &str, kind: &str) -> Result<[String; 3]> {
        let node = self.admin().must_get(namespace, "overlaynode", name)?;
        let conditions = node["status"]["conditions"].as_array().into_iter().flatten();
        let found = conditions.into_iter().find(|condition| condition["type"] == kind);
        let text = |key: &str| found.and_then(|c| c[key].as_str()).unwrap_or_default().to_owned();
        Ok([text("status"), text("reason"), text("message")])
    }

    /// The pods of an OverlayNode, in the order of their names.
    pub(crate) fn pods(&self, namespace: &str, name: &str) -> Result<Vec<Pod>> {
        let label = format!("overlay.rustyonions.io/name={name}");
        let text = self.admin().run(&["get", "pods", "-n", namespace, "-l", &label, "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        let mut pods: Vec<Pod> = list["items"].as_array().into_iter().flatten().map(Pod::read).collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pods)
    }

    /// A route of a pod's admin server, through the API server.
    pub(crate) fn admin_route(&self, namespace: &str, pod: &str, route: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:9600/proxy{route}");
        self.admin().run(&["get", "--raw", &path])
    }

    /// One metric of a pod, summed over its labels.
    pub(crate) fn metric(&self, namespace: &str, pod: &str, name: &str) -> Result<f64> {
        let text = self.admin_route(namespace, pod, "/metrics")?;
        metric_sum(&text, name).with_context(|| format!("{pod} has no metric {name}"))
    }

    /// `kubectl exec -i POD -- overlay-daemon …`.
    pub(crate) fn exec(&self, namespace: &str, pod: &str, arguments: &[&str]) -> Command {
        let mut command = self.admin().command();
        command.args(["exec", "-i", "-n", namespace, pod, "--", "overlay-daemon"]).args(arguments);
        // Whoever reads from it may wait for ever, were it not for this.
        let mut bounded = Command::new("timeout");
        bounded.args(["--kill-after=5s", "150s"]).arg(command.get_program()).args(command.get_args());
        bounded
    }

    /// A subscriber in a pod.
    pub(crate) fn subscribe(&self, namespace: &str, pod: &str, arguments: &[&str]) -> Result<Subscriber> {
        let mut all = vec!["sub"];
        all.extend(arguments);
        Subscriber::start(self.exec(namespace, pod, &all))
    }

    /// Publishes in a pod; the message is standard input.
    pub(crate) fn publish(&self, namespace: &str, pod: &str, topic: &str, message: &Path) -> Result<()> {
        let mut command = self.exec(namespace, pod, &["pub", topic, "--quiet"]);
        let output = command.stdin(std::fs::File::open(message)?).output()?;
        ensure!(output.status.success(), "pub in {pod}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Waits for something that a look at the cluster shows.
    pub(crate) fn until(&self, what: &str, limit: Duration, holds: impl Fn() -> Result<Look<()>>) -> Result<()> {
        wait::until(what, limit, holds).map_err(|error| anyhow!("{error:#}\n{}", self.state(APPS)))
    }

    /// A file below the repository's root, as an argument.
    pub(crate) fn file(path: &str) -> String {
        programs::repository().join(path).to_string_lossy().into_owned()
    }
}

/// What a case needs to know of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) restarts: i64,
    pub(crate) ready: bool,
}

impl Pod {
    fn read(pod: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let status = &pod["status"]["containerStatuses"][0];
        Self {
            name: text(&pod["metadata"]["name"]),
            uid: text(&pod["metadata"]["uid"]),
            restarts: status["restartCount"].as_i64().unwrap_or(0),
            ready: status["ready"] == true,
        }
    }
}
