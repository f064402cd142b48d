//! `tests/cluster`: a Kubernetes node to play with. See `overlay_tests::cluster`.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use overlay_tests::cluster::{Cluster, node};

/// One node of a real Kubernetes on this machine, in namespaces of its own.
#[derive(Parser)]
#[command(name = "tests/cluster", bin_name = "tests/cluster", version)]
struct Arguments {
    /// Which cluster; several may run
    #[arg(long, default_value = "play", global = true)]
    name: String,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start it and load the images of both programs, as built in the target folder
    Up,
    /// End it and take away all that it left; no error if there is none
    Down,
    /// Load an image of PROGRAMs, the first of which it starts; without IMAGE, those of both
    /// programs anew
    Load {
        /// The image's name, such as localhost/tool:1
        #[arg(requires = "programs")]
        image: Option<String>,
        /// Programs of this machine; their shared libraries come with them
        programs: Vec<PathBuf>,
    },
    /// kubectl as a cluster administrator
    #[command(disable_help_flag = true)]
    Kubectl {
        /// What kubectl is told
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// helm as a cluster administrator
    #[command(disable_help_flag = true)]
    Helm {
        /// What helm is told
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Any program in the node's network and mounts, from its root folder: curl, ctr, a shell
    Run {
        /// The program and what it is told
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<String>,
    },
    /// The first process of a sandbox
    #[command(hide = true)]
    Boot { folder: PathBuf, cgroup: String },
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tests/cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    let name = &arguments.name;
    match arguments.command {
        Action::Up => {
            let cluster = Cluster::up(name)?;
            cluster.load_ours()?;
            println!("cluster {name} is up; its folder is {}", cluster.folder().display());
        }
        Action::Down => Cluster::down(name)?,
        Action::Load { image: None, .. } => Cluster::running(name)?.load_ours()?,
        Action::Load { image: Some(image), programs } => Cluster::running(name)?.load(&image, &programs)?,
        Action::Kubectl { arguments } => {
            let cluster = Cluster::running(name)?;
            let mut command = cluster.in_network(&cluster.programs().program("kubectl"));
            command.args(arguments).env("KUBECONFIG", cluster.admin().kubeconfig());
            return Err(command.exec().into());
        }
        Action::Helm { arguments } => {
            let cluster = Cluster::running(name)?;
            let mut command = cluster.in_network(&cluster.programs().program("helm"));
            command.args(arguments).env("KUBECONFIG", cluster.admin().kubeconfig()).env("HOME", cluster.folder());
            return Err(command.exec().into());
        }
        Action::Run { arguments } => {
            let cluster = Cluster::running(name)?;
            let program = PathBuf::from(arguments.first().map_or("true", String::as_str));
            let mut command = cluster.in_node(&program);
            command.args(&arguments[1..]).env("KUBECONFIG", cluster.admin().kubeconfig());
            return Err(command.exec().into());
        }
        Action::Boot { folder, cgroup } => node::boot(&folder, &cgroup)?,
    }
    Ok(ExitCode::SUCCESS)
}
