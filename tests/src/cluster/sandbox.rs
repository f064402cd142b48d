//! What a node has of its own instead of the machine's: namespaces for network, mounts, host
//! name and processes, a cgroup, and files in the place of the kernel settings that a kubelet
//! changes. All but the cgroup and the folder go when the namespace's first process does.

use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait::{self, Look};

/// The node's address; it is its own router's only neighbour, and nothing lies behind that.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);

/// `unshare` with what makes a sandbox. Its first process dies with it, and everything else
/// inside dies with its first process: the kernel sees to both.
pub(super) const UNSHARE: &[&str] = &[
    "--net",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    // Mounts made inside are never seen outside.
    "--propagation=private",
    "--",
];

/// Kernel settings of the whole machine that a kubelet writes to as it starts.
const SHIELDED: &[&str] = &[
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];

/// How long the kernel may take to let go of a cgroup whose processes have ended.
const CGROUP_LIMIT: Duration = Duration::from_secs(20);

/// Inside, before anything else runs.
pub(super) fn furnish(folder: &Path, cgroup: &str) -> Result<()> {
    // Among themselves the mounts of kubelet and containerd do propagate.
    run("mount", &["--make-rshared", "/"])?;
    // What the programs write outside their folder, wherever they have it built in, is memory.
    for place in ["/run", "/var/lib", "/var/log"] {
        run("mount", &["-t", "tmpfs", "-o", "mode=0755", "tmpfs", place])?;
    }
    shield_settings(folder)?;
    make_cgroup(cgroup)?;
    run("hostname", &[super::NODE])?;
    run("ip", &["link", "set", "lo", "up"])?;
    run("ip", &["link", "add", "node0", "type", "veth", "peer", "name", "router0"])?;
    run("ip", &["address", "add", &format!("{ADDRESS}/24"), "dev", "node0"])?;
    run("ip", &["link", "set", "node0", "up"])?;
    run("ip", &["link", "set", "router0", "up"])?;
    run("ip", &["route", "add", "default", "via", &ROUTER.to_string()])?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    // Whoever asks outside is told at once that there is nothing, and does not wait for an answer.
    let names = folder.join("resolv.conf");
    fs::write(&names, format!("nameserver {ADDRESS}\n"))?;
    let real = Path::new("/etc/resolv.conf");
    // Often a link into /run, where there is nothing by now.
    if let Ok(target) = fs::read_link(real) {
        let target = Path::new("/etc").join(target);
        fs::create_dir_all(target.parent().unwrap_or(Path::new("/")))?;
        fs::write(target, "")?;
    }
    if real.exists() { run("mount", &["--bind", &names.to_string_lossy(), "/etc/resolv.conf"]) } else { Ok(()) }
}

/// Puts a file with its present value over each setting: what is written lands there.
fn shield_settings(folder: &Path) -> Result<()> {
    for setting in SHIELDED {
        let (real, file) = (Path::new("/proc/sys").join(setting), folder.join(setting.replace('/', ".")));
        fs::copy(&real, &file).with_context(|| format!("copying {}", real.display()))?;
        run("mount", &["--bind", &file.to_string_lossy(), &real.to_string_lossy()])?;
    }
    Ok(())
}

/// The folders that hierarchies of cgroups are mounted on: one in version 2, many in version 1.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let mut found: Vec<PathBuf> = fs::read_dir(root)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    // Links such as `cpu` -> `cpu,cpuacct` name what is there already.
    found.retain(|path| path.is_dir() && !path.is_symlink());
    found.sort();
    Ok(found)
}

fn make_cgroup(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        offer_controllers(&hierarchy)?;
        let cgroup = hierarchy.join(name);
        fs::create_dir_all(&cgroup).with_context(|| format!("making the cgroup {}", cgroup.display()))?;
        // In version 1 a cpuset without processors takes no process.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let (from, to) = (hierarchy.join(file), cgroup.join(file));
            if hierarchy.ends_with("cpuset") && to.exists() {
                fs::write(&to, fs::read(&from)?).with_context(|| format!("writing {}", to.display()))?;
            }
        }
    }
    Ok(())
}

/// In version 2 a cgroup has the controllers that the one above offers it, and a kubelet wants
/// all of its own. What the root offers more after this hurts nobody, and stays.
fn offer_controllers(root: &Path) -> Result<()> {
    let offered = root.join("cgroup.subtree_control");
    if !offered.exists() {
        return Ok(());
    }
    let there = fs::read_to_string(root.join("cgroup.controllers"))?;
    for controller in ["cpu", "cpuset", "memory", "hugetlb", "pids", "io"] {
        if there.split_whitespace().any(|one| one == controller) {
            fs::write(&offered, format!("+{controller}")).with_context(|| format!("offering {controller}"))?;
        }
    }
    Ok(())
}

/// Takes the cgroup and all below it away. Its processes must have ended.
pub(super) fn remove_cgroup(name: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let cgroup = hierarchy.join(name);
        wait::until(&format!("{} to be empty", cgroup.display()), CGROUP_LIMIT, || {
            Ok(match remove_tree(&cgroup) {
                Ok(()) => Look::Holds(()),
                Err(error) => Look::NotYet(error.to_string()),
            })
        })?;
    }
    Ok(())
}

/// A cgroup is removed by removing the folders, innermost first; the files go by themselves.
fn remove_tree(cgroup: &Path) -> std::io::Result<()> {
    let children = match fs::read_dir(cgroup) {
        Ok(children) => children,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for child in children {
        let child = child?;
        if child.file_type()?.is_dir() {
            remove_tree(&child.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

pub(super) fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
