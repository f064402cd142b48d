//! etcd, kube-apiserver and kube-controller-manager in one folder, with certificates of their
//! own: on free loopback ports, or where a node's pods reach them. Authorisation is Node and
//! RBAC from the start. Neither a scheduler nor a kubelet: on
//! loopback, pods are made and never run.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tempfile::TempDir;

use crate::kubectl::Kubectl;
use crate::process::Process;
use crate::programs::Kubernetes;
use crate::wait::{self, Look};

mod certificates;

pub use certificates::Authority;

/// How long the whole control plane may take to answer.
const START_LIMIT: Duration = Duration::from_secs(90);
/// Service addresses; the first is the API server's own.
const SERVICE_RANGE: &str = "10.96.0.0/16";
/// [`SERVICE_RANGE`]'s first.
const SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The API server's port beside a node.
const NODE_SECURE_PORT: u16 = 6443;

/// Who is to reach the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Programs on this machine, on a free port.
    Loopback,
    /// A kubelet and its pods too, at this address of the node.
    Node(Ipv4Addr),
}

/// A running control plane; all of it ends when this is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    // Dropped in this order: clients of a server before the server, the folder last.
    controllers: Process,
    api_server: Process,
    etcd: Process,
    url: String,
    authority: Authority,
    programs: Kubernetes,
    admin: Kubectl,
    folder: PathBuf,
    temporary: Option<TempDir>,
}

impl ControlPlane {
    /// Starts all three on loopback, in a temporary folder.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("overlay-control-plane-").tempdir()?;
        let mut plane = Self::start_in(folder.path(), Reach::Loopback)?;
        plane.temporary = Some(folder);
        Ok(plane)
    }

    /// Starts all three and waits until the API server is ready and the controllers have begun
    /// to work.
    pub fn start_in(at: &Path, reach: Reach) -> Result<Self> {
        let programs = Kubernetes::find(reach)?;
        let [etcd_client, etcd_peer, free] = free_ports()?;
        let (address, port) = match reach {
            Reach::Loopback => (Ipv4Addr::LOCALHOST, free),
            Reach::Node(address) => (address, NODE_SECURE_PORT),
        };
        let authority = Authority::new("overlay-tests")?;
        write_credentials(&authority, address, at)?;
        let url = format!("https://{address}:{port}");
        let admin = Identity { url: &url, authority: &authority, folder: at }.client("admin", "system:masters")?;

        let etcd = start_etcd(&programs, at, etcd_client, etcd_peer)?;
        let api_server = start_api_server(&programs, at, etcd_client, reach, port)?;
        let controllers = start_controllers(&programs, at, &admin)?;
        let admin = Kubectl::new(programs.program("kubectl"), admin, at.join("kubectl-cache"));
        let folder = at.to_owned();
        let mut plane =
            Self { controllers, api_server, etcd, url, authority, programs, admin, folder, temporary: None };
        plane.wait_until_ready()?;
        Ok(plane)
    }

    /// kubectl as a cluster administrator.
    pub fn admin(&self) -> &Kubectl {
        &self.admin
    }

    /// The folder of everything temporary.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the API server is, and who vouches for it.
    pub fn identity(&self) -> Identity<'_> {
        Identity { url: &self.url, authority: &self.authority, folder: &self.folder }
    }

    /// An error with the end of its log, if one of the three is no longer running.
    pub fn check(&mut self) -> Result<()> {
        self.etcd.check()?;
        self.api_server.check()?;
        self.controllers.check()
    }

    /// All three.
    pub fn processes(&self) -> [&Process; 3] {
        [&self.etcd, &self.api_server, &self.controllers]
    }

    /// The Kubernetes programs.
    pub fn programs(&self) -> &Kubernetes {
        &self.programs
    }

    /// The API server answers nobody until [`Self::thaw_api_server`]; no connection breaks.
    pub fn freeze_api_server(&self) {
        self.api_server.signal(rustix::process::Signal::STOP);
    }

    /// It goes on where it was.
    pub fn thaw_api_server(&self) {
        self.api_server.signal(rustix::process::Signal::CONT);
    }

    /// kubectl with a bearer token, for a service account.
    pub fn with_token(&self, name: &str, token: &str) -> Result<Kubectl> {
        let path = self.identity().kubeconfig(name, &json!({ "token": token }))?;
        Ok(Kubectl::new(self.programs.program("kubectl"), path, self.folder.join("kubectl-cache")))
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        wait::until("the control plane", START_LIMIT, || {
            self.check()?;
            let ready = self.admin.try_run(&["get", "--raw", "/readyz"], None)?;
            if !ready.ok {
                return Ok(Look::NotYet(ready.stderr));
            }
            // Made by the controller manager: it works, and pods in `default` are admitted.
            let account = self.admin.try_run(&["get", "-n", "default", "serviceaccount", "default"], None)?;
            Ok(if account.ok { Look::Holds(()) } else { Look::NotYet(account.stderr) })
        })
    }
}

fn start_etcd(programs: &Kubernetes, at: &Path, client: u16, peer: u16) -> Result<Process> {
    Process::start("etcd", &programs.program("etcd"), &at.join("etcd.log"), |command| {
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        command
            .arg(format!("--data-dir={}", at.join("etcd").display()))
            .args(["--unsafe-no-fsync", "--log-level=warn"])
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=default={peer}"));
    })
}

fn start_api_server(programs: &Kubernetes, at: &Path, etcd: u16, reach: Reach, secure: u16) -> Result<Process> {
    Process::start("kube-apiserver", &programs.program("kube-apiserver"), &at.join("kube-apiserver.log"), |command| {
        command
            .arg(format!("--etcd-servers=http://127.0.0.1:{etcd}"))
            .arg(format!("--secure-port={secure}"))
            .arg("--authorization-mode=Node,RBAC")
            .arg(format!("--service-cluster-ip-range={SERVICE_RANGE}"))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(flag(at, "client-ca-file", "ca.crt"))
            .arg(flag(at, "tls-cert-file", "server.crt"))
            .arg(flag(at, "tls-private-key-file", "server.key"))
            .arg(flag(at, "service-account-key-file", "service-accounts.pub"))
            .arg(flag(at, "service-account-signing-key-file", "service-accounts.key"));
        match reach {
            Reach::Loopback => command.args(["--bind-address=127.0.0.1", "--endpoint-reconciler-type=none"]),
            Reach::Node(address) => command
                .args(["--bind-address=0.0.0.0", "--enable-admission-plugins=NodeRestriction"])
                .arg(format!("--advertise-address={address}"))
                // The node's name is in nobody's DNS: logs and exec go to its address.
                .arg("--kubelet-preferred-address-types=InternalIP")
                .arg(flag(at, "kubelet-client-certificate", "kubelet-client.crt"))
                .arg(flag(at, "kubelet-client-key", "kubelet-client.key")),
        };
    })
}

fn start_controllers(programs: &Kubernetes, at: &Path, kubeconfig: &Path) -> Result<Process> {
    let program = programs.program("kube-controller-manager");
    Process::start("kube-controller-manager", &program, &at.join("kube-controller-manager.log"), |command| {
        command
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .args(["--secure-port=0", "--leader-elect=false", "--use-service-account-credentials=true"])
            .arg(flag(at, "root-ca-file", "ca.crt"))
            .arg(flag(at, "service-account-private-key-file", "service-accounts.key"));
    })
}

fn flag(at: &Path, name: &str, file: &str) -> String {
    format!("--{name}={}", at.join(file).display())
}

fn write_credentials(authority: &Authority, address: Ipv4Addr, at: &Path) -> Result<()> {
    let server = authority.server(&[Ipv4Addr::LOCALHOST, SERVICE_ADDRESS, address])?;
    let kubelet_client = authority.client("kube-apiserver-kubelet-client", "system:masters")?;
    let (signing, verifying) = certificates::signing_keys()?;
    for (file, text) in [
        ("ca.crt", authority.certificate()),
        ("server.crt", &server.certificate),
        ("server.key", &server.key),
        ("kubelet-client.crt", &kubelet_client.certificate),
        ("kubelet-client.key", &kubelet_client.key),
        ("service-accounts.key", &signing),
        ("service-accounts.pub", &verifying),
    ] {
        fs::write(at.join(file), text)?;
    }
    Ok(())
}

/// Makes kubeconfigs for one API server.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    url: &'a str,
    authority: &'a Authority,
    folder: &'a Path,
}

impl Identity<'_> {
    /// The kubeconfig of a user in a group, by client certificate.
    pub fn client(&self, user: &str, group: &str) -> Result<PathBuf> {
        let credentials = self.authority.client(user, group)?;
        let user_data = json!({
            "client-certificate-data": base64(&credentials.certificate),
            "client-key-data": base64(&credentials.key),
        });
        self.kubeconfig(&user.replace(':', "-"), &user_data)
    }

    /// A kubeconfig is YAML, of which JSON is a part.
    fn kubeconfig(&self, name: &str, user: &serde_json::Value) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "tests",
            "clusters": [{"name": "tests", "cluster": {
                "server": self.url, "certificate-authority-data": base64(self.authority.certificate()),
            }}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": name}}],
        });
        let path = self.folder.join(format!("{name}.kubeconfig"));
        fs::write(&path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

/// Standard base64, through the encoder that Kubernetes's own types bring.
fn base64(text: &str) -> serde_json::Value {
    json!(k8s_openapi::ByteString(text.as_bytes().to_vec()))
}

/// Distinct free ports. All are held until all are known.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut held = Vec::with_capacity(N);
    for _ in 0..N {
        held.push(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?);
    }
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&held) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}
