//! The node from the inside: the first process of its sandbox. Furnishes it, starts what a
//! node runs, in order, and stays until one of them ends, which is the end of all.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{WaitOptions, wait};

use super::{NODE, READY, RUNTIME, image, sandbox};
use crate::control_plane::{ControlPlane, Reach};
use crate::process::Process;
use crate::wait::{Look, until};

/// `OVERLAYFS_SUPER_MAGIC` (statfs(2)).
const OVERLAYFS: i64 = 0x794c_7630;
const START_LIMIT: Duration = Duration::from_secs(60);

/// Runs the node in `folder` until something that it cannot be without ends.
///
/// # Errors
/// It could not start; or what ended, with the end of its log.
pub fn boot(folder: &Path, cgroup: &str) -> Result<()> {
    sandbox::furnish(folder, cgroup)?;
    let mut plane = ControlPlane::start_in(folder, Reach::Node(sandbox::ADDRESS))?;
    let mut node = start(&plane, folder, cgroup)?;
    until("the node to be Ready", START_LIMIT, || {
        plane.check()?;
        node.iter_mut().try_for_each(Process::check)?;
        let ready = plane.admin().try_run(&["wait", "--for=condition=Ready", "--timeout=1s", "node", NODE], None)?;
        Ok(if ready.ok { Look::Holds(()) } else { Look::NotYet(ready.stderr) })
    })?;
    fs::write(folder.join(READY), "")?;

    // Also the parent of every process in the sandbox that has lost its own.
    let ours: Vec<u32> = node.iter().chain(plane.processes()).map(Process::id).collect();
    loop {
        let Some((pid, status)) = wait(WaitOptions::empty())? else { continue };
        if ours.contains(&pid.as_raw_nonzero().get().unsigned_abs()) {
            bail!("process {pid:?} of the node ended ({status:?}): the logs are in {}", folder.display());
        }
    }
}

fn start(plane: &ControlPlane, folder: &Path, cgroup: &str) -> Result<Vec<Process>> {
    // An overlay cannot lie on an overlay, as the folder does in a container.
    let snapshotter = if rustix::fs::statfs(folder)?.f_type == OVERLAYFS { "native" } else { "overlayfs" };
    let write = |file: &str, text: &str| {
        let text = text.replace("FOLDER", &folder.to_string_lossy()).replace("CGROUP", cgroup);
        let text = text.replace("SNAPSHOTTER", snapshotter);
        fs::write(folder.join(file), text).with_context(|| format!("writing {file}"))
    };
    write("containerd.toml", include_str!("containerd.toml"))?;
    write("kubelet.yaml", include_str!("kubelet.yaml"))?;
    write("Corefile", include_str!("Corefile"))?;
    fs::create_dir_all(folder.join("cni"))?;
    write("cni/network.conflist", include_str!("network.conflist"))?;
    plane.admin().apply("kube-system", include_str!("dns.yaml"))?;

    let identity = plane.identity();
    let kubelet = identity.client(&format!("system:node:{NODE}"), "system:nodes")?;
    let scheduler = identity.client("system:kube-scheduler", "")?;
    let proxy = identity.client("system:kube-proxy", "")?;
    identity.client("system:coredns", "")?;

    let programs = plane.programs();
    let begin = |name: &str, program: &Path, prepare: &dyn Fn(&mut Command)| {
        Process::start(name, program, &folder.join(format!("{name}.log")), |command| prepare(command))
    };
    let containerd = begin("containerd", Path::new("containerd"), &|command| {
        command.arg(format!("--config={}", folder.join("containerd.toml").display()));
    })?;
    until("containerd", START_LIMIT, || {
        Ok(match Command::new("ctr").args(["--address", RUNTIME, "version"]).output()? {
            output if output.status.success() => Look::Holds(()),
            output => Look::NotYet(String::from_utf8_lossy(&output.stderr).into_owned()),
        })
    })?;
    image::pause(folder)?.import()?;
    let kubelet = begin("kubelet", &programs.program("kubelet"), &|command| {
        command.arg(format!("--config={}", folder.join("kubelet.yaml").display()));
        command.arg(format!("--kubeconfig={}", kubelet.display()));
        command.args([format!("--hostname-override={NODE}"), format!("--node-ip={}", sandbox::ADDRESS)]);
    })?;
    let scheduler = begin("kube-scheduler", &programs.program("kube-scheduler"), &|command| {
        command.arg(format!("--kubeconfig={}", scheduler.display()));
        command.args(["--leader-elect=false", "--secure-port=0"]);
    })?;
    let proxy = begin("kube-proxy", &programs.program("kube-proxy"), &|command| {
        command.arg(format!("--kubeconfig={}", proxy.display()));
        command.args(["--proxy-mode=iptables", "--cluster-cidr=10.244.0.0/16", "--conntrack-max-per-core=0"]);
        command.arg(format!("--hostname-override={NODE}"));
    })?;
    let dns = begin("coredns", &programs.program("coredns"), &|command| {
        command.arg(format!("-conf={}", folder.join("Corefile").display()));
    })?;
    Ok(vec![dns, proxy, scheduler, kubelet, containerd])
}
